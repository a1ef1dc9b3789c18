"""`steppe sharpness`, `steppe landscape` and `steppe compare --sharpness`."""

import json

import pytest

from steppe.cli import main
from steppe.lab import measure

TINY = ["--train-size", "96", "--batch-size", "32", "--width", "2", "--epochs", "2", "--lr", "0.05"]
SMALL = ["--examples", "64", "--batch-size", "64"]


def ok(capsys, *arguments):
    assert main(list(map(str, arguments))) == 0
    return capsys.readouterr()


def refused(capsys, *arguments):
    assert main(list(map(str, arguments))) == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.splitlines()[-1].startswith("steppe: ")
    assert "Traceback" not in written.err
    return written.err.splitlines()[-1]


def test_sharpness(capsys, study_folder, monkeypatch):
    command = ["sharpness", study_folder, *SMALL, "--m", "16", "--products", "6", "--draws", "3", "--kernel", "4"]
    written = ok(capsys, *command)
    assert "λmax" in written.out
    assert "convolution 3" in written.out
    assert "active neurons (%) of" in written.out
    assert "PAC-Bayes" in written.out
    assert len(written.err.splitlines()) == 4
    files = {file.name for file in (study_folder / "sharpness").iterdir()}
    assert files - {".lock"} == {"sharpness.md", "sharpness.json", "spectra.png", "filters.png"}
    assert f"    steppe sharpness {study_folder}" in (study_folder / "sharpness" / "sharpness.md").read_text()
    monkeypatch.setattr(measure, "load", None)
    (study_folder / "runs" / "sam").mkdir()
    (study_folder / "runs" / "sam" / "config.json").write_text(
        next(study_folder.glob("runs/sgd*/config.json")).read_text()
    )
    again = ok(capsys, *command, "--out", study_folder / "elsewhere")
    assert again.out.split("written to")[0] == written.out.split("written to")[0]
    assert (
        again.err
        == f"steppe: left out: {study_folder / 'runs' / 'sam'}: the run is not finished; give its command again\n"
    )
    assert "left out" in (study_folder / "elsewhere" / "sharpness.md").read_text()


def test_landscape(capsys, study_folder):
    one, *_ = sorted(study_folder.glob("runs/*"))
    written = ok(capsys, "landscape", one, *SMALL, "--points", "3", "--draws", "1")
    assert str(study_folder / "landscape" / "surfaces.html") in written.out.replace("\n", "")
    assert (study_folder / "landscape" / "curves.svg").exists()
    ok(capsys, "landscape", one, *SMALL, "--points", "3", "--dims", "1", "--out", study_folder / "other")
    assert not (study_folder / "other" / "surfaces.html").exists()


def test_compare_with_sharpness(capsys, study_folder, monkeypatch):
    command = ["compare", *TINY, "--methods", "sgd", "sam(rho=0.5)", "--seeds", "2", "--jobs", "1", "--sharpness"]
    written = ok(capsys, *command, "--out", study_folder)
    assert "m-sharpness" in written.out
    report = (study_folder / "report.md").read_text()
    assert "| λmax | λmax/λ5 | surrogate gap | m-sharpness |" in report
    assert "Flatness is measured on" in report
    rows = [line.split(" | ") for line in report.splitlines() if line.startswith(("| sgd", "| sam"))]
    assert all(len(row) == 12 and " ± " in row[8] for row in rows)
    assert len(list(study_folder.glob("runs/*/sharpness.json"))) == 4
    monkeypatch.setattr(measure, "load", None)
    assert ok(capsys, *command, "--out", study_folder).out == written.out
    ok(capsys, *command[:-1], "--out", study_folder)
    assert "λmax" not in (study_folder / "report.md").read_text()


def test_compare_measures_no_run_that_failed(capsys, tmp_path):
    command = ["compare", *TINY, "--jobs", "1", "--lr", "1e30", "--methods", "sgd", "--seeds", "1", "--sharpness"]
    assert main([*command, "--out", str(tmp_path)]) == 2
    assert "| sgd() | sgd | failed | 0 | — | — | — | — | — | — | — | — |" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("command", ["sharpness", "landscape"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], ["nowhere", "no such folder", "steppe compare"]),
        ([], ["no run"]),
        (["{run}", "--examples", "0"], ["examples", "0"]),
        (["{run}", "--batch-size", "0"], ["batch_size", "0"]),
        (["{run}", "--threads", "0"], ["threads", "0"]),
        (["{run}", "--device", "cuda:99"], ["cuda:99"]),
    ],
)
def test_bad_input_of_both_is_one_clear_message(capsys, study_folder, command, arguments, words):
    run = str(next(study_folder.glob("runs/*")))
    message = refused(capsys, command, *(each.replace("{run}", run) for each in arguments))
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sharpness", "--eigenvalues", "99999"], ["99999", "fewer"]),
        (["sharpness", "--eigenvalues", "0"], ["0"]),
        (["sharpness", "--m", "999"], ["m=999", "batch"]),
        (["sharpness", "--rho", "-1"], ["rho", "-1"]),
        (["sharpness", "--tol", "-1"], ["tol", "-1"]),
        (["sharpness", "--products", "1"], ["products=1", "6"]),
        (["sharpness", "--kernel", "0"], ["tangent kernel", "0"]),
        (["landscape", "--points", "1"], ["points=1"]),
        (["landscape", "--draws", "0"], ["draws=0"]),
        (["landscape", "--radius", "0"], ["radius=0"]),
        (["landscape", "--directions", "line"], ["two"]),
    ],
)
def test_bad_input_is_one_clear_message(capsys, study_folder, arguments, words):
    command, *options = arguments
    run = next(study_folder.glob("runs/*"))
    usual = ["--m", "16"] if command == "sharpness" and "--m" not in options else []
    message = refused(capsys, command, run, *SMALL, *usual, *options)
    for word in words:
        assert word in message


def test_runs_that_cannot_be_measured_are_named(capsys, study_folder):
    one, two, *_ = sorted(study_folder.glob("runs/*"))
    (one / "checkpoint.pt").unlink()
    assert f"{one} has no checkpoint.pt" in refused(capsys, "sharpness", one)
    (two / "checkpoint.pt").write_bytes((two / "config.json").read_bytes())
    assert f"{two / 'checkpoint.pt'} does not match" in refused(capsys, "landscape", two)
    config = json.loads((two / "config.json").read_text())
    (two / "config.json").write_text(json.dumps({**config, "data": "no/images"}))
    assert "no/images" in refused(capsys, "sharpness", two)


def test_unknown_choices_exit_with_2(capsys):
    for arguments in (
        ["landscape", ".", "--directions", "up"],
        ["landscape", ".", "--dims", "3"],
        ["sharpness", "--k", "1"],
    ):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert arguments[-2] in capsys.readouterr().err
