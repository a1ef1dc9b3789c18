from pathlib import Path

import numpy as np
import pytest
import torch
from parquet_files import solid, write, write_set

from steppe.lab.data import load

CIFAR10 = Path(__file__).resolve().parents[2].parent / "shared/data/cifar10"


def rows(split):
    return {image.numpy().tobytes() for image in split.images}


# ---- digits


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    data = load("digits")
    assert (data.name, data.classes, data.channels, data.size) == ("digits", 10, 1, (8, 8))
    assert (len(data.train), len(data.test)) == (1000, 797)
    assert data.train.images.shape == (1000, 1, 8, 8)
    assert data.train.images.dtype == torch.uint8
    assert data.train.labels.dtype == torch.int64
    raw = load_digits()
    scaled = np.rint(raw.images * 255 / 16).astype(np.uint8)
    ours = torch.cat([data.train.images, data.test.images])[:, 0].numpy()
    labels = torch.cat([data.train.labels, data.test.labels]).tolist()
    expected = sorted(zip([x.tobytes() for x in scaled], raw.target.tolist(), strict=True))
    assert sorted(zip([x.tobytes() for x in ours], labels, strict=True)) == expected


def test_the_digits_split_does_not_depend_on_the_seed():
    assert torch.equal(load("digits", seed=0).train.images, load("digits", seed=7).train.images)
    assert torch.equal(load("digits", seed=0).test.labels, load("digits", seed=7).test.labels)


def test_statistics_are_those_of_the_training_images():
    for data in (load("digits"), load("digits", train_size=100), load("digits", validation=0.3)):
        pixels = data.train.images.double() / 255
        assert data.mean == pytest.approx([pixels.mean().item()], rel=1e-12)
        assert data.std == pytest.approx([pixels.std(correction=0).item()], rel=1e-12)


def test_statistics_are_per_channel_and_harmless_for_constant_channels(tmp_path):
    red_ramp = [np.dstack([solid(v, channels=1), solid(51, channels=1), solid(0, channels=1)]) for v in (0, 255)]
    write(tmp_path / "train.parquet", red_ramp, [0, 1])
    write(tmp_path / "test.parquet", red_ramp[:1], [0])
    data = load(str(tmp_path))
    assert data.mean == pytest.approx((0.5, 0.2, 0.0))
    assert data.std == pytest.approx((0.5, 1.0, 1.0))


# ---- subset, noise, validation


@pytest.mark.parametrize("size", [10, 105, 999, 1000])
def test_a_subset_is_balanced_and_of_training_images(size):
    data, full = load("digits", train_size=size, seed=3), load("digits")
    counts, available = data.train.labels.bincount(minlength=10), full.train.labels.bincount(minlength=10)
    assert len(data.train) == size
    short = counts == available  # classes that have no more to give
    assert counts[~short].numel() == 0 or counts[~short].max() - counts[~short].min() <= 1
    assert (counts[short] <= counts.max()).all()
    assert rows(data.train) <= rows(full.train)
    assert torch.equal(data.test.images, full.test.images)
    if size == 1000:
        assert torch.equal(data.train.images, full.train.images)


def test_no_image_is_drawn_twice_and_smaller_subsets_lie_in_larger(tmp_path):
    folder = write_set(tmp_path, train=[i % 3 for i in range(60)])
    small, large = (load(folder, train_size=n, seed=5) for n in (7, 30))
    assert len(rows(small.train)) == 7
    assert len(rows(large.train)) == 30
    assert rows(small.train) < rows(large.train)
    index = large.train.images[:, 0, 0, 0].long()
    assert torch.equal(large.train.labels, index % 3)


def test_the_subset_of_an_uneven_set_takes_all_of_the_rare_class(tmp_path):
    folder = write_set(tmp_path, train=[0] * 10 + [1] * 10 + [2])
    assert load(folder, train_size=11).train.labels.bincount().tolist() == [5, 5, 1]


def test_which_class_gets_the_odd_image_depends_on_the_seed():
    extra = {load("digits", train_size=11, seed=s).train.labels.bincount().argmax().item() for s in range(12)}
    assert len(extra) > 1


@pytest.mark.parametrize("size", [9, 1001, 0, -5])
def test_an_impossible_subset_is_refused_with_both_numbers(size):
    with pytest.raises(ValueError, match=rf"train_size={size} .* 10, .* 1000"):
        load("digits", train_size=size)


@pytest.mark.parametrize(("noise", "size"), [(0.2, None), (0.5, 333), (0.001, 100), (0.99, 100)])
def test_label_noise_changes_exactly_its_share(noise, size):
    clean = load("digits", train_size=size, seed=1)
    noisy = load("digits", train_size=size, seed=1, label_noise=noise)
    assert torch.equal(clean.train.images, noisy.train.images)
    changed = (clean.train.labels != noisy.train.labels).sum().item()
    assert changed == round(noise * len(clean.train))  # so no replacement kept its class
    assert noisy.train.labels.min() >= 0
    assert noisy.train.labels.max() < 10
    assert torch.equal(clean.test.labels, noisy.test.labels)


def test_label_noise_is_uniform_over_the_other_classes(tmp_path):
    folder = write_set(tmp_path, train=[0] * 1 + [1] * 1 + [2] * 1 + [3] * 197)
    changes = torch.zeros(4)
    for seed in range(30):
        labels = load(folder, seed=seed, label_noise=0.9).train.labels
        changes += labels[3:].bincount(minlength=4)
    share = changes[:3] / changes[:3].sum()  # about 5300 draws: a standard deviation of 0.0065
    assert share.tolist() == pytest.approx([1 / 3] * 3, abs=0.03)


def test_label_noise_leaves_the_cached_labels_alone():
    before = load("digits").train.labels.clone()
    load("digits", label_noise=0.5)
    assert torch.equal(load("digits").train.labels, before)


def test_validation_is_held_out_of_training_and_the_test_images_are_in_neither(tmp_path):
    folder = write_set(tmp_path, train=[i % 3 for i in range(40)])
    full, data = load(folder), load(folder, validation=0.25, seed=2)
    assert (len(data.train), len(data.test)) == (30, 10)
    assert not rows(data.train) & rows(data.test)
    assert rows(data.train) | rows(data.test) == rows(full.train)
    assert not (rows(data.train) | rows(data.test)) & rows(full.test)


def test_validation_comes_after_subset_and_noise(tmp_path):
    folder = write_set(tmp_path, train=[i % 3 for i in range(60)])
    settings = {"train_size": 40, "label_noise": 0.5, "seed": 4}
    whole, data = load(folder, **settings), load(folder, **settings, validation=0.5)
    labels = dict(zip(whole.train.images[:, 0, 0, 0].tolist(), whole.train.labels.tolist(), strict=True))
    parts = [
        (int(x[0, 0, 0]), int(y)) for s in (data.train, data.test) for x, y in zip(s.images, s.labels, strict=True)
    ]
    assert sorted(parts) == sorted(labels.items())
    held_noisy = [label != image % 3 for image, label in parts[20:]]
    assert any(held_noisy)
    assert not all(held_noisy)


@pytest.mark.parametrize("setting", ["label_noise", "validation"])
@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_shares_outside_their_range_are_refused(setting, value):
    with pytest.raises(ValueError, match=rf"{setting}={value} is not in \[0, 1\)"):
        load("digits", **{setting: value})


@pytest.mark.parametrize("share", [0.0001, 0.9999])
def test_a_validation_split_that_leaves_nothing_is_refused(share):
    with pytest.raises(ValueError, match=rf"validation={share} of 1000 training images leaves"):
        load("digits", validation=share)


def test_label_noise_needs_two_classes(tmp_path):
    with pytest.raises(ValueError, match=r"label_noise=0.5 needs a second class"):
        load(write_set(tmp_path, train=[0, 0], test=[0]), label_noise=0.5)


def test_one_seed_gives_one_result_whatever_the_global_generator():
    settings = {"train_size": 200, "label_noise": 0.3, "validation": 0.2}
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = load("digits", seed=11, **settings)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    again, other = load("digits", seed=11, **settings), load("digits", seed=12, **settings)
    for a, b in ((first.train, again.train), (first.test, again.test)):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
    assert not torch.equal(first.train.images, other.train.images)


def test_each_purpose_has_draws_of_its_own(tmp_path):
    folder = write_set(tmp_path, train=[i % 3 for i in range(60)])
    clean = load(folder, seed=1).train.labels
    noisy = load(folder, seed=1, label_noise=0.5).train.labels != clean
    held = torch.zeros(60, dtype=torch.bool)
    held[load(folder, seed=1, validation=0.5).test.images[:, 0, 0, 0].long()] = True
    assert not torch.equal(noisy, held)
    assert not torch.equal(noisy, ~held)


# ---- CIFAR-10


@pytest.mark.skipif(not CIFAR10.is_dir(), reason="CIFAR-10 is not at ../shared/data/cifar10")
def test_cifar10():
    data = load(str(CIFAR10))
    assert (data.name, data.classes, data.channels, data.size) == ("cifar10", 10, 3, (32, 32))
    assert data.train.labels.bincount().tolist() == [5000] * 10
    assert data.test.labels.bincount().tolist() == [1000] * 10
    assert data.train.images.shape == (50000, 3, 32, 32)
    assert data.test.images.shape == (10000, 3, 32, 32)
    assert data.mean == pytest.approx((0.491, 0.482, 0.447), abs=0.002)
    subset = load(str(CIFAR10), train_size=1000, label_noise=0.2, validation=0.1)
    assert (len(subset.train), len(subset.test)) == (900, 100)
