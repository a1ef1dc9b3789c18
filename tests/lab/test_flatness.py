import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh

from steppe import curvature
from steppe.lab import flatness, measure, sharpness
from steppe.lab.figures import Figure, active, further, over, text
from steppe.lab.flatness import columns, write_sharpness
from steppe.lab.options import Sharpness
from steppe.lab.sharpness import measure_sharpness
from steppe.lab.train import cross_entropy
from steppe.lab.trained import find, load

QUICK = Sharpness(examples=64, batch_size=64, m=16, draws=3, products=6, kernel=4)
CHEAP = ["surrogate gap", "m-sharpness", "average rise", "linearity", "linearity of picks", "cosines"]
COSTLY = ["eigenvalues", "trace", "components", "spectrum", "smallest eigenvalues"]
NAMES = ["filters", "active neurons", *CHEAP, "PAC-Bayes bound", "tangent kernel", *COSTLY]


@pytest.fixture(scope="module")
def measured(finished_study, tmp_path_factory):
    runs, _ = find([shutil.copytree(finished_study, tmp_path_factory.mktemp("measured") / "study")])
    return runs, measure_sharpness(runs, QUICK)


@pytest.fixture
def untouchable(monkeypatch):
    """A laboratory that cannot load a network."""

    def refuse(*_):
        raise AssertionError("a network was loaded")

    monkeypatch.setattr(measure, "load", refuse)


def test_figures_are_those_of_the_library(measured):
    runs, found = measured
    model, batches = load(runs[2], QUICK)
    an = curvature.Analyzer(model, cross_entropy, batches, progress=False)
    eigenvalues = an.eigenvalues(5)
    assert found[2]["eigenvalues"]["values"] == pytest.approx(eigenvalues.values.tolist(), rel=2e-3)
    assert found[2]["surrogate gap"]["gap"] == pytest.approx(an.surrogate_gap(0.05).gap, rel=1e-6)
    assert found[2]["m-sharpness"]["value"] == pytest.approx(an.m_sharpness(0.05, 16).sharpness, rel=1e-6)
    assert found[2]["trace"]["value"] == pytest.approx(an.trace(products=6).value, rel=1e-4)
    assert found[2]["average rise"]["value"] == pytest.approx(an.average_sharpness(draws=3).sharpness, rel=1e-6)
    head = an.eigenvalues(params=r"^11\.")
    assert found[2]["components"]["head"]["values"] == pytest.approx(head.values.tolist(), rel=2e-3)
    assert list(found[2]["components"]) == ["convolution 1", "convolution 2", "convolution 3", "head"]
    assert sum(map(len, found[2]["filters"].values())) == sum(p.shape[0] for p in model.parameters() if p.ndim > 1)
    assert np.shape(found[2]["spectrum"]["nodes"]) == (1, 40)


def test_further_figures_are_those_of_the_library(measured):
    runs, found = measured
    figures = found[2]
    an = curvature.Analyzer(*_of(runs[2]), progress=False)
    smallest = an.eigenvalues(2, which="smallest")
    assert figures["smallest eigenvalues"]["values"] == pytest.approx(smallest.values.tolist(), rel=2e-3)
    assert figures["smallest eigenvalues"]["converged"] == [True, True]
    assert figures["linearity"]["value"] == pytest.approx(an.linearity().zeta, rel=1e-6)
    picks = [curvature.linearity(an.objective, 0.05, beta=0.6, seed=seed).zeta for seed in range(3)]
    assert figures["linearity of picks"]["value"] == pytest.approx(np.mean(picks), rel=1e-6)
    assert figures["linearity of picks"]["error"] == pytest.approx(np.std(picks, ddof=1) / 3**0.5, rel=1e-6)
    cosines = an.cosines()
    assert figures["cosines"]["B⁺"]["value"] == pytest.approx(cosines.sharpest, rel=1e-6)
    assert figures["cosines"]["B⁻"]["value"] == pytest.approx(cosines.flattest, rel=1e-6)
    assert figures["cosines"]["random"]["value"] == pytest.approx(cosines.random, rel=1e-6)
    assert figures["PAC-Bayes bound"]["bound"] == pytest.approx(an.pac_bayes().bound, rel=1e-6)
    assert figures["PAC-Bayes bound"]["examples"] == 64
    assert figures["tangent kernel"]["condition"] == pytest.approx(an.ntk(4).condition, rel=1e-6)
    assert len(figures["tangent kernel"]["eigenvalues"]) == 4 * 10
    activity = an.active_neurons()
    assert figures["active neurons"]["shares"] == pytest.approx(activity.shares)
    shares = {layer: figure.value for layer, figure in active(figures["active neurons"]).items()}
    expected = {**activity.shares, "whole": activity.share}
    assert shares == pytest.approx({layer: 100 * share for layer, share in expected.items()})


def test_active_neurons_of_a_module_are_counted_together():
    shares = {":relu": 0.5, "blocks.0:relu": 0.2, "blocks.0:relu#2": 0.8, "blocks.1.mlp.1": 0.1}
    neurons = {":relu": 10, "blocks.0:relu": 30, "blocks.0:relu#2": 10, "blocks.1.mlp.1": 1}
    found = active({"shares": shares, "neurons": neurons, "share": 0.4})
    values = {layer: figure.value for layer, figure in found.items()}
    assert values == pytest.approx({"relu": 50, "blocks.0": 35, "blocks.1.mlp.1": 10, "whole": 40})


def test_a_singular_kernel_has_no_condition_number(measured):
    _, found = measured
    assert text([further(found[0])["NTK κ"]]) != "—"
    singular = {**found[0], "tangent kernel": {"condition": None}}
    assert text([further(singular)["NTK κ"]]) == "—"
    assert text([further(each)["NTK κ"] for each in (singular, found[1])]).endswith("(1 of 2)")


def test_figures_kept_earlier_are_found_again(measured, study_folder, untouchable):
    """These descriptions are in files that are kept with results."""
    (run, *_), _ = find([study_folder])
    _, found = measured
    names = {
        "filters()": "filters",
        "surrogate gap(examples=64, split=train, seed=0, rho=0.05)": "surrogate gap",
        "m-sharpness(examples=64, split=train, seed=0, batch_size=64, rho=0.05, m=16)": "m-sharpness",
        "average rise(examples=64, split=train, seed=0, noise=0.01, draws=3)": "average rise",
        "eigenvalues(examples=64, split=train, seed=0, eigenvalues=5, tol=0.001)": "eigenvalues",
        "trace(examples=64, split=train, seed=0, products=6)": "trace",
        "components(examples=64, split=train, seed=0, tol=0.001)": "components",
        "spectrum(examples=64, split=train, seed=0, spectra=1)": "spectrum",
    }
    (run.folder / "sharpness.json").write_text(json.dumps({key: found[0][name] for key, name in names.items()}))
    assert measure_sharpness([run], QUICK, list(names.values())) == [{k: found[0][k] for k in names.values()}]


def test_lanczos_power_iteration_and_eigsh_agree_on_the_runs_of_a_comparison(measured):
    runs, found = measured
    for run, figures in zip(runs, found, strict=True):
        an = curvature.Analyzer(*_of(run), progress=False)
        (power,) = an.eigenvalues(method="power", max_products=2000).values.tolist()
        (scipy,) = eigsh(an.operator().linear_operator(), 1, which="LA", return_eigenvectors=False)
        assert figures["eigenvalues"]["converged"][0]
        assert figures["eigenvalues"]["values"][0] == pytest.approx(scipy, rel=1e-3)
        assert figures["eigenvalues"]["values"][0] == pytest.approx(power, rel=1e-3)


def _of(run):
    model, batches = load(run, QUICK)
    return model, cross_entropy, batches


def test_nothing_is_measured_twice_and_what_is_kept_needs_no_checkpoint(measured, untouchable):
    runs, found = measured
    assert json.dumps(measure_sharpness(runs, QUICK)) == json.dumps(found)  # NaN is not equal to itself
    with pytest.raises(AssertionError, match="loaded"):
        measure_sharpness(runs[:1], replace(QUICK, rho=0.1))


def test_options_measure_anew_only_what_depends_on_them(study_folder, monkeypatch):
    (run, *_), _ = find([study_folder])
    made = []
    tasks = sharpness._tasks

    def watched(what, network):
        for task in tasks(what, network):
            yield task._replace(make=lambda *_, name=task.name: made.append(name) or {"value": 0.0})

    monkeypatch.setattr(sharpness, "_tasks", watched)
    for options, expected in (
        ({}, NAMES),
        ({}, []),
        ({"rho": 0.1}, [*CHEAP[:2], *CHEAP[3:], "PAC-Bayes bound"]),
        ({"kernel": 2}, ["tangent kernel"]),
        ({"device": "cpu"}, []),
        ({"split": "test"}, NAMES[1:]),
    ):
        made.clear()
        measure_sharpness([run], replace(QUICK, **options))
        assert made == expected, options


def test_an_interrupted_command_goes_on_at_the_measurement(study_folder, monkeypatch):
    (run, *_), _ = find([study_folder])

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(curvature, "trace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        measure_sharpness([run], QUICK)
    monkeypatch.undo()
    kept = json.loads((run.folder / "sharpness.json").read_text())
    assert [name.split("(")[0] for name in kept] == NAMES[: NAMES.index("trace")]
    monkeypatch.setattr(curvature, "surrogate_gap", interrupt)
    assert list(measure_sharpness([run], QUICK)[0]) == NAMES


def test_a_damaged_file_is_named(study_folder):
    (run, *_), _ = find([study_folder])
    (run.folder / "sharpness.json").write_text('{"eigenv')
    with pytest.raises(ValueError, match=r"sharpness.json is damaged.*delete it"):
        measure_sharpness([run], QUICK)


def test_a_measurement_that_is_impossible_names_the_run(study_folder):
    (run, *_), _ = find([study_folder])
    with pytest.raises(ValueError, match=rf"eigenvalues of {run.folder}.*k=99999"):
        measure_sharpness([run], replace(QUICK, eigenvalues=99999))
    with pytest.raises(ValueError, match=rf"m-sharpness of {run.folder}.*m=65"):
        measure_sharpness([run], replace(QUICK, m=65))


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ([Figure(12.345678, 0.0123)], "12.35 ± 0.01"),
        ([Figure(0.000123456)], "0.0001235"),
        ([Figure(1234567.8, 999.0)], "1.235e+06 ± 999"),
        ([Figure(12.0, 3.0, converged=False)], "12.00 ± 3 (not converged)"),
        ([Figure(1.0, 0.1), Figure(2.0, 0.2), Figure(3.0, 0.3)], "2.000 ± 2.5"),
        ([Figure(1.0), Figure(2.0, converged=False), Figure(3.0)], "2.000 ± 2.5 (1 of 3 not converged)"),
        ([Figure(1.0), None, Figure(1.0)], "1.000 ± 0 (2 of 3)"),
        ([None, None], "—"),
        ([Figure(math.nan)], "nan"),
    ],
)
def test_cells(figures, expected):
    assert text(figures) == expected


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([(Figure(2.0), Figure(4.0))], "0.50"),
        ([(Figure(2.0), Figure(4.0)), (Figure(8.0), Figure(4.0))], "1.00 (0.00 to 6682.65)"),
        (
            [(Figure(2.0), Figure(4.0)), (Figure(1.0), Figure(2.0, converged=False))],
            "0.50 (0.50 to 0.50), 1 not converged",
        ),
        ([(Figure(2.0), None), (Figure(1.0), Figure(4.0))], "0.25, 1 of 2"),
        ([(Figure(-2.0), Figure(4.0))], "—"),
        ([], "—"),
    ],
)
def test_ratios(pairs, expected):
    assert over(pairs) == expected


def test_ratios_are_of_the_same_seed(measured, tmp_path):
    runs, found = measured
    order = [0, 1, 3, 2]
    write_sharpness([runs[i] for i in order], [found[i] for i in order], [], QUICK, tmp_path, "steppe sharpness x")
    lines = (tmp_path / "sharpness.md").read_text().splitlines()
    place = next(
        i for i, line in enumerate(lines) if line.startswith("| over sgd() | seeds | λmax | λ5 | λmax/λ5 | surr")
    )
    cells = lines[place + 2].strip("| ").split(" | ")
    assert cells[:2] == ["sam(rho=0.5)", "2"]
    logs = [math.log(found[i + 2]["trace"]["value"] / found[i]["trace"]["value"]) for i in range(2)]
    mean, half = np.mean(logs), 12.7062 * abs(logs[0] - logs[1]) / 2
    assert cells[-1] == f"{math.exp(mean):.2f} ({math.exp(mean - half):.2f} to {math.exp(mean + half):.2f})"
    assert "2h/ρ²" not in lines[place]


def test_one_method_is_not_held_against_itself(measured, tmp_path):
    runs, found = measured
    write_sharpness(runs[:2], found[:2], [], QUICK, tmp_path, "steppe sharpness x")
    assert "| over " not in (tmp_path / "sharpness.md").read_text()


def test_report_files(measured, tmp_path):
    runs, found = measured
    write_sharpness(runs, found, ["runs/x: the run failed, nan"], QUICK, tmp_path, "steppe sharpness x")
    lines = (tmp_path / "sharpness.md").read_text().splitlines()
    header, sgd, sam = (lines[i].strip("| ").split(" | ") for i in (2, 4, 5))
    assert header[:4] == ["method", "seeds", "test accuracy (%)", "λmax"]
    assert header[4:6] == ["λ5", "λmax/λ5"]
    assert sgd[:2] == ["sgd()", "2"]
    assert sam[:2] == ["sam(rho=0.5)", "2"]
    mean = sum(each["eigenvalues"]["values"][0] for each in found[2:]) / 2
    assert float(sam[3].split(" ± ")[0]) == pytest.approx(mean, rel=1e-3)
    (parts,) = (line for line in lines if line.startswith("| λmax of"))
    assert parts == "| λmax of | convolution 1 | convolution 2 | convolution 3 | head | whole |"
    (more,) = (line for line in lines if line.startswith("| method | λmin"))
    assert more == (
        "| method | λmin | λn−1 | ζ | ζ, β = 0.6 | cos B⁺ | cos B⁻ | cos random | PAC-Bayes bound | NTK κ |"
    )
    assert sum(line.startswith("| 2 |") or line.startswith("| whole |") for line in lines) == 2
    assert "| active neurons (%) of | sgd() | sam(rho=0.5) |" in lines
    assert all(any(line.startswith(word) for line in lines) for word in ("λmin and", "ζ = ", "cos is", "NTK κ is"))
    assert "mean of 3 draws" in "".join(lines)
    assert "- left out: runs/x: the run failed, nan" in lines
    assert "    steppe sharpness x" in lines
    assert "noisy labels" in "".join(lines)
    assert "torch" in lines[-1]
    for picture in ("spectra.png", "filters.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    kept = json.loads((tmp_path / "sharpness.json").read_text())
    assert kept["options"]["m"] == 16
    assert [(run["method"], run["seed"]) for run in kept["runs"]] == [(r.config.method, r.config.seed) for r in runs]
    assert kept["runs"][0]["measured"]["eigenvalues"] == found[0]["eigenvalues"]


def test_what_did_not_converge_says_so_in_the_tables(study_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sharpness, "LIMIT", 12)
    (run, *_), _ = find([study_folder])
    what = replace(QUICK, tol=1e-9)
    write_sharpness([run], measure_sharpness([run], what), [], what, tmp_path, "steppe sharpness x")
    lines = (tmp_path / "sharpness.md").read_text().splitlines()
    first, further, second = (line for line in lines if line.startswith("| sgd()"))
    assert first.count("(not converged)") == 3  # λmax, λ5 and their ratio
    assert further.count("(not converged)") == 2  # λmin and the next
    assert second.count("(not converged)") == 5


def test_different_networks_have_tables_of_their_own(measured, tmp_path):
    runs, found = measured
    other = {**found[0], "components": {"embedding": found[0]["components"]["head"]}}
    mixer = replace(runs[1].config, model="mixer", seed=0)
    runs[1].config, kept = mixer, runs[1].config
    try:
        write_sharpness(runs[:2], [found[0], other], [], QUICK, tmp_path, "steppe sharpness x")
    finally:
        runs[1].config = kept
    lines = (tmp_path / "sharpness.md").read_text().splitlines()
    heads = [line.strip("| ").split(" | ")[1:] for line in lines if line.startswith("| λmax of")]
    assert heads == [["convolution 1", "convolution 2", "convolution 3", "head", "whole"], ["embedding", "whole"]]
    assert any(line.startswith("| sgd(), model=mixer") for line in lines)


def test_columns_of_a_comparison(study_folder):
    runs, _ = find([study_folder])
    runs[0].result = {"failed": "epoch 1: the loss is nan"}
    found = columns(runs)
    assert found.titles == ("λmax", "λmax/λ5", "surrogate gap", "m-sharpness")
    assert {method: [" ± " in cell for cell in cells] for method, cells in found.cells.items()} == {
        "sgd()": [True, True, False, False],  # of one seed, and of one group of images
        "sam(rho=0.5)": [True] * 4,
    }
    assert "m = 96" in found.legend
    assert "average rise" not in found.legend
    kept = json.loads((runs[1].folder / "sharpness.json").read_text())
    assert [name.split("(")[0] for name in kept] == list(flatness.MEASUREMENTS)
    assert columns(runs[:1]).cells == {}


def test_seeds_share_a_spectrum_and_their_filters(measured):
    _, found = measured
    both = flatness._spectrum(found[:2])
    assert both.nodes.shape == (2, 40)
    torch.testing.assert_close(both.weights.sum(1), torch.ones(2, dtype=torch.float64))
    assert len(flatness._norms(found[:2]).every) == 2 * len(flatness._norms(found[:1]).every)
