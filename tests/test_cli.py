import errno
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import steppe
from steppe import cli
from steppe.cli import main
from steppe.lab import run
from steppe.lab.config import Setting
from steppe.lab.study import configure

TINY = ["--train-size", "64", "--batch-size", "32", "--width", "4", "--epochs", "2"]
ALONE = ["--jobs", "1"]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def refused(capsys, *arguments) -> str:
    """The one line with which the command refuses."""
    assert main(arguments) == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.startswith("steppe: ")
    return written.err


def test_compare_reports_and_goes_on(capsys, out):
    command = ["compare", *TINY, *ALONE, "--methods", "sgd", "rst(sam(), p=0.5)", "--seeds", "2", "--out", str(out)]
    assert main(command) == 0
    written = capsys.readouterr()
    assert "rst(sam())" in written.out
    assert "report.md" in written.out
    assert len(written.err.splitlines()) == 4
    assert len((out / "runs.jsonl").read_text().splitlines()) == 4
    report = (out / "report.md").read_text()
    assert "--methods sgd 'rst(sam(), p=0.5)' --seeds 2" in report
    assert main(command) == 0
    assert capsys.readouterr().err == ""


def test_train_writes_one_run(capsys, out):
    assert main(["train", *TINY, "--method", "sam", "--seed", "3", "--out", str(out)]) == 0
    (folder,) = (out / "runs").iterdir()
    result = json.loads((folder / "result.json").read_text())
    assert result["propagations"] == 2.0
    assert str(result["parameters"]) in capsys.readouterr().out


def test_tune_writes_its_choice(capsys, out):
    assert main(["tune", *TINY, *ALONE, "--grids", "sam(rho={0.1,0.5})", "--seeds", "1", "--out", str(out)]) == 0
    assert list(json.loads((out / "tuned.json").read_text())) == ["sam(rho={0.1,0.5})"]
    assert "best" in capsys.readouterr().out


def test_methods_lists_every_recipe(capsys):
    assert main(["methods"]) == 0
    written = capsys.readouterr().out
    for name in steppe.recipes.__all__:
        assert f"{name}(" in written
    assert "sam(rho=0.05" in written
    assert "Cost: 2 propagations" in written
    assert "Source: " in written


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"steppe {steppe.__version__}\n"


def test_help_shows_the_defaults_of_the_data(capsys):
    for arguments, model in ((["compare", "--help"], "cnn"), (["compare", "--data=x/y", "--help"], "resnet18")):
        with pytest.raises(SystemExit, match="0"):
            main(arguments)
        written = capsys.readouterr().out
        assert f"(default: {model})" in written
        assert "steppe compare --methods" in written


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compare", "--data", "no/such/folder"], ["no/such/folder"]),
        (["compare", "--methods", "sam(rh=0.1)"], ["sam(rh=0.1)", "^"]),
        (["compare", "--methods", "sgd", "sam(rho=-1)"], ["rho", "-1"]),
        (["compare", "--methods"], ["no method"]),
        (["compare", "--epochs", "0"], ["epochs", "0"]),
        (["compare", "--seeds", "0"], ["seeds", "0"]),
        (["compare", "--label-noise", "1"], ["label_noise", "[0, 1)", "1.0"]),
        (["compare", "--label-noise", "-0.1"], ["label_noise", "-0.1"]),
        (["compare", "--model", "resnet19"], ["resnet19", "resnet18"]),
        (["compare", "--train-size", "99999"], ["99999", "1000"]),
        (["compare", "--threads", "0"], ["threads", "0"]),
        (["compare", "--jobs", "0"], ["jobs", "0"]),
        (["compare", "--device", "cuda:99"], ["cuda"]),
        (["compare", "--device", "tpu9"], ["tpu9"]),
        (["train", "--method", "sam, sgd"], ["^"]),
        (["train", "--seed", "-1"], ["seed", "-1"]),
        (["tune", "--grids", "sam(rho={0.1)"], ["brace"]),
    ],
)
def test_bad_input_is_one_clear_message(capsys, out, arguments, words):
    message = refused(capsys, *arguments, "--out", str(out))
    for word in words:
        assert word in message
    assert "Traceback" not in message


def test_unknown_options_exit_with_2(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["compare", "--epoch-count", "3"])
    assert "--epoch-count" in capsys.readouterr().err


def test_a_full_disk_keeps_finished_runs(capsys, out, monkeypatch):
    command = ["compare", *TINY, *ALONE, "--methods", "sgd", "sam", "--seeds", "1", "--out", str(out)]
    monkeypatch.setattr(run.torch, "save", _full(run.torch.save, after=3))
    assert main(command) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("steppe: no space left")
    assert "--out" in message
    finished = [path.parent.name for path in out.glob("runs/*/result.json")]
    assert len(finished) == 1
    monkeypatch.undo()
    assert main(command) == 0
    assert finished[0][:3] not in capsys.readouterr().err


def _full(write, after):
    """`write` until the disk is full, `after` calls later."""
    left = iter(range(after))

    def instead(*arguments, **options):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments, **options)

    return instead


def test_a_loss_that_is_not_finite_exits_with_2_and_reports(capsys, out):
    command = ["compare", *TINY, *ALONE, "--lr", "1e30", "--methods", "sgd", "--seeds", "1", "--out", str(out)]
    assert main(command) == 2
    assert "sgd() seed 0: epoch" in capsys.readouterr().err
    assert "failed" in (out / "report.md").read_text()


def test_interruption(capsys, out, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run.Run, "advance", interrupt)
    assert main(["train", *TINY, "--out", str(out)]) == 130
    assert capsys.readouterr().err == "steppe: interrupted; run the same command again to go on\n"


def test_missing_extras_say_how_to_install_them(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert "pip install 'steppe[lab]'" in refused(capsys, "methods")


def test_help_loads_nothing_heavy():
    code = "import sys\ntry: from steppe.cli import main; main(['compare', '--help'])\nexcept SystemExit: pass\n"
    code += "print([name for name in ('matplotlib', 'scipy', 'sklearn', 'pyarrow') if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.endswith("[]\n")


def test_the_core_never_imports_the_laboratory():
    package = Path(steppe.__file__).parent
    for path in package.rglob("*.py"):
        if path.parts[len(package.parts)] not in ("lab", "cli.py"):
            assert "steppe.lab" not in path.read_text(), path


def test_nothing_asked_shows_the_help(capsys):
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 0
    assert "compare" in capsys.readouterr().out


def test_a_path_that_cannot_be_used_is_named_with_a_mend(capsys, tmp_path):
    (tmp_path / "file").touch()
    said = refused(capsys, "compare", *TINY, *ALONE, "--methods", "sgd", "--out", str(tmp_path / "file"))
    assert str(tmp_path / "file") in said
    assert "another path" in said


def test_more_than_the_memory_holds_is_one_line(capsys, out):
    said = refused(capsys, "train", *TINY, "--batch-size", "8", "--width", "100000000", "--out", str(out))
    assert len(said.splitlines()) == 1
    assert "smaller --width" in said


def test_more_threads_than_there_are_cores_are_refused(capsys, out):
    assert "threads must lie between 1 and" in refused(capsys, "train", *TINY, "--threads", "100000", "--out", str(out))


def test_the_last_of_two_data_counts(out):
    found = cli._parse(["train", "--data", "digits", "--data", str(out)])
    assert (found.data, found.model) == (str(out), "resnet18")


def test_a_path_with_brackets_is_shown_as_it_is(capsys, tmp_path):
    assert main(["train", *TINY, "--out", str(tmp_path / "a[/red]b[red]c")]) == 0
    assert "a[/red]b[red]c" in capsys.readouterr().out


def test_one_folder_has_one_name(tmp_path):
    setting = Setting(data=str(tmp_path))
    assert configure(setting, "sgd", 0) == configure(replace(setting, data=f"{tmp_path}/"), "sgd", 0)


def test_a_report_is_there_before_the_sharpness_is_measured(capsys, out, monkeypatch):
    def fails(_):
        raise ValueError("m=128 is more than a batch holds")

    monkeypatch.setattr("steppe.lab.flatness.columns", fails)
    assert main(["compare", *TINY, *ALONE, "--methods", "sgd", "--seeds", "1", "--sharpness", "--out", str(out)]) == 2
    assert (out / "report.md").exists()
