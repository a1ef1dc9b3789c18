import json
from dataclasses import replace

import pytest
import torch

from steppe.lab.options import Sample
from steppe.lab.run import Run
from steppe.lab.train import Training
from steppe.lab.trained import find, grouped, home, load


def named(runs):
    return [(run.config.method, run.config.seed) for run in runs]


def change(folder, change_state):
    """Write a run's checkpoint anew."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    change_state(state)
    torch.save(state, folder / "checkpoint.pt")


def test_runs_are_found_by_study_by_its_runs_and_one_by_one(finished_study):
    expected = [("sgd()", 0), ("sgd()", 1), ("sam(rho=0.5)", 0), ("sam(rho=0.5)", 1)]
    assert named(find([finished_study])[0]) == expected
    assert named(find([finished_study / "runs"])[0]) == expected
    sam = next((finished_study / "runs").glob("sam*-s1-*"))
    assert named(find([sam, finished_study])[0]) == [expected[3], *expected[:3]]


def test_a_run_is_found_wherever_it_was_moved(finished_study, study_folder):
    (sam,) = (study_folder / "runs").glob("sam*-s1-*")
    moved = sam.rename(study_folder / "elsewhere")
    (run,), left_out = find([moved])
    assert (run.folder, run.accuracy, left_out) == (moved, run.result["test_accuracy"], [])
    (other,) = (finished_study / "runs").glob("sam*-s1-*")
    assert named(find([moved, other])[0]) == [("sam(rho=0.5)", 1)]
    assert "has the settings of" in find([moved, other])[1][0]


def test_unfinished_runs_of_a_study_are_left_out_and_named(study_folder):
    first, second, *others = sorted((study_folder / "runs").iterdir())
    (first / "result.json").unlink()
    (second / "result.json").write_text(json.dumps({"failed": "epoch 1: the loss is nan"}))
    runs, left_out = find([study_folder])
    assert len(runs) == 2
    assert [(first.name in line, second.name in line) for line in sorted(left_out)] == [(True, False), (False, True)]
    assert "not finished" in left_out[0]
    assert "the loss is nan" in left_out[1]
    with pytest.raises(ValueError, match="not finished"):
        find([first])
    with pytest.raises(ValueError, match=r"failed.*the loss is nan"):
        find([second])
    for folder in others:
        (folder / "result.json").unlink()
    with pytest.raises(ValueError, match="none of its 4 runs is finished"):
        find([study_folder])


@pytest.mark.parametrize(
    ("name", "words"), [("nowhere", "no such folder"), ("empty", "neither a run nor a study"), (None, "no run")]
)
def test_what_is_no_run_is_refused(tmp_path, name, words):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=words):
        find([tmp_path / name] if name else [])


def test_files_of_another_version_are_refused(study_folder):
    folder = next((study_folder / "runs").iterdir())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "temperature": 1}))
    with pytest.raises(ValueError, match=r"temperature"):
        find([folder])
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=folder.name):
        find([folder])


def test_home_is_the_folder_of_the_study(study_folder):
    run = next((study_folder / "runs").iterdir())
    assert home([study_folder]) == home([study_folder / "runs"]) == home([run]) == study_folder


def test_groups_are_methods_and_name_the_settings_in_which_they_differ(finished_study, tmp_path):
    runs, _ = find([finished_study])
    assert grouped(runs) == {"sgd()": [0, 1], "sam(rho=0.5)": [2, 3]}
    wider = Run(replace(runs[0].config, width=8, epochs=3), tmp_path)
    assert grouped([*runs, wider]) == {
        "sgd(), width=2, epochs=2": [0, 1],
        "sam(rho=0.5)": [2, 3],
        "sgd(), width=8, epochs=3": [4],
    }


def test_a_loaded_network_has_the_accuracy_that_was_reported(finished_study):
    for run in find([finished_study])[0]:
        model, batches = load(run, Sample(examples=10_000, split="test"))
        assert not model.training
        assert sum(len(labels) for _, labels in batches) == 797
        with torch.no_grad():
            hits = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)
        assert hits / 797 == run.result["test_accuracy"]


def test_images_are_those_of_training_with_their_noisy_labels_and_the_same_for_all_methods(finished_study):
    runs, _ = find([finished_study])
    sample = Sample(examples=50, batch_size=20)
    (_, one), (_, two) = load(runs[0], sample), load(runs[2], sample)
    assert [len(labels) for _, labels in one] == [20, 20, 10]
    for (images, labels), (others, their_labels) in zip(one, two, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, their_labels)
    train = Training(runs[0].config).dataset.train
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))[:50]
    assert torch.equal(torch.cat([labels for _, labels in one]), train.labels[order])
    _, everything = load(runs[0], Sample())
    assert sum(len(labels) for _, labels in everything) == 96


def test_the_optimizers_part_of_a_checkpoint_may_be_of_any_version(study_folder):
    run = find([study_folder])[0][0]
    expected = load(run, Sample())[0].state_dict()

    def older(state):
        state["training"]["opt"] = {"layout": "of long ago"}
        del state["training"]["schedule"]

    change(run.folder, older)
    for name, value in load(run, Sample())[0].state_dict().items():
        assert torch.equal(value, expected[name])


def test_checkpoints_that_are_missing_damaged_or_of_another_network_are_refused(study_folder):
    one, two, three, four = find([study_folder])[0]
    change(one.folder, lambda state: state["training"]["model"].pop("11.bias"))
    with pytest.raises(ValueError, match=rf"{one.folder}.*cnn.*11.bias"):
        load(one, Sample())
    (two.folder / "checkpoint.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match=rf"{two.folder}.*does not match"):
        load(two, Sample())
    (three.folder / "checkpoint.pt").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint.pt.*steppe compare.*--out"):
        load(three, Sample())
    with pytest.raises(ValueError, match="tpu9"):
        load(four, Sample(device="tpu9"))


@pytest.mark.parametrize("option", ["examples", "batch_size"])
def test_counts_of_images_are_positive(finished_study, option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        load(find([finished_study])[0][0], Sample(**{option: 0}))
