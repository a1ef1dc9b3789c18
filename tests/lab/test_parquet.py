import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from parquet_files import encode, solid, write, write_set
from PIL import Image

from steppe.lab.data import load

# ---- what is read


@pytest.mark.parametrize("image", ["img", "image"])
@pytest.mark.parametrize("struct", [True, False])
def test_pixels_and_labels_come_back_in_order(tmp_path, image, struct):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8)
    labels = [0, 1, 2, 1, 0]
    write(tmp_path / "set/train-0.parquet", pixels[:3], labels[:3], image=image, struct=struct)
    write(tmp_path / "set/train-1.parquet", pixels[3:], labels[3:], image=image, struct=struct)
    write(tmp_path / "set/test-0.parquet", pixels[:1], labels[:1], image=image, struct=struct)
    data = load(str(tmp_path / "set"))
    assert (data.name, data.classes, data.channels, data.size) == ("set", 3, 3, (4, 6))
    assert torch.equal(data.train.images, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert data.train.images.is_contiguous()
    assert data.train.labels.tolist() == labels
    assert (len(data.train), len(data.test)) == (5, 1)


def test_more_rows_than_one_batch_stay_in_order(tmp_path):
    count = 2500
    write(
        tmp_path / "train.parquet",
        [solid(i % 251, (1, 1)) for i in range(count)],
        [i % 7 for i in range(count)],
    )
    write(tmp_path / "test.parquet", [solid(0, (1, 1))], [0])
    train = load(str(tmp_path)).train
    assert torch.equal(train.images[:, 1, 0, 0].long(), torch.arange(count) % 251)
    assert torch.equal(train.labels, torch.arange(count) % 7)


@pytest.mark.parametrize(
    "names",
    [
        "train-00000-of-00001 test-00000-of-00001",
        "mnist_TRAIN tiny-validation",
        "train valid",
        "plain_text/train-0 plain_text/test-0",
        "train/train test/test",
    ],
)
def test_splits_are_found_by_name(tmp_path, names):
    train, test = names.split()
    write(tmp_path / f"{train}.parquet", [solid(1)], [0])
    write(tmp_path / f"{test}.parquet", [solid(2)], [0])
    write(tmp_path / "retrained-tests.parquet", [solid(3)], [0])  # no word of it is a split
    data = load(str(tmp_path))
    assert data.train.images.unique().tolist() == [1]
    assert data.test.images.unique().tolist() == [2]


def test_the_test_split_comes_before_the_validation_split(tmp_path):
    for name, value in (("train", 1), ("validation", 2), ("test", 3)):
        write(tmp_path / f"{name}.parquet", [solid(value)], [0])
    assert load(str(tmp_path)).test.images.unique().tolist() == [3]


def test_a_single_file_is_the_training_set_beside_its_test_set(tmp_path):
    write(tmp_path / "set/train-0.parquet", [solid(1)], [0])
    write(tmp_path / "set/train-1.parquet", [solid(2)], [0])
    write(tmp_path / "set/test-0.parquet", [solid(3)], [0])
    data = load(str(tmp_path / "set/train-1.parquet"))
    assert data.name == "set"
    assert data.train.images.unique().tolist() == [2]
    assert data.test.images.unique().tolist() == [3]


def test_grayscale_stays_one_channel_and_mixed_becomes_rgb(tmp_path):
    gray, colour = solid(9, channels=1), solid(5)
    for name, train, test in (("gray", [gray] * 2, gray), ("late", [gray, colour], gray),
                              ("early", [colour, gray], gray), ("test", [gray] * 2, colour)):  # fmt: skip
        write(tmp_path / name / "train.parquet", train, [0, 1])
        write(tmp_path / name / "test.parquet", [test], [0])
    assert load(str(tmp_path / "gray")).train.images.shape == (2, 1, 4, 5)
    assert load(str(tmp_path / "late")).train.images[:, :, 0, 0].tolist() == [[9, 9, 9], [5, 5, 5]]
    assert load(str(tmp_path / "early")).train.images[:, :, 0, 0].tolist() == [[5, 5, 5], [9, 9, 9]]
    mixed = load(str(tmp_path / "test"))
    assert mixed.train.images[:, :, 0, 0].tolist() == [[9, 9, 9]] * 2
    assert mixed.channels == mixed.test.images.shape[1] == 3


def test_class_names_in_the_metadata_count_the_classes(tmp_path):
    write(tmp_path / "train.parquet", [solid(0)] * 2, [0, 1], names=["a", "b", "c", "d"])
    write(tmp_path / "test.parquet", [solid(1)], [3])
    assert load(str(tmp_path)).classes == 4


def test_the_labels_of_cifar100_are_the_fine_ones(tmp_path):
    write(tmp_path / "train.parquet", [solid(0)] * 2, [0, 7], label="fine_label")
    write(tmp_path / "test.parquet", [solid(1)], [3], label="fine_label")
    assert load(str(tmp_path)).classes == 8


def test_a_second_load_decodes_nothing(tmp_path, monkeypatch):
    folder = write_set(tmp_path)
    first = load(folder)
    monkeypatch.setattr(Image, "open", None)
    assert load(folder, seed=1).train.images is first.train.images


# ---- what is refused


def refused(source, *parts, error=ValueError):
    """The load fails with one line that contains every part."""
    with pytest.raises(error, match=re.escape(str(parts[0]))) as caught:
        load(str(source))
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


def test_a_missing_path(tmp_path):
    refused(tmp_path / "nowhere", tmp_path / "nowhere", "check the path", error=FileNotFoundError)


def test_a_folder_without_parquet(tmp_path):
    (tmp_path / "readme.md").write_text("nothing here")
    refused(tmp_path, tmp_path, "*.parquet", "train-*.parquet", error=FileNotFoundError)


@pytest.mark.parametrize(("present", "missing"), [("train", "test"), ("test", "training")])
def test_a_missing_split(tmp_path, present, missing):
    write(tmp_path / f"{present}-0.parquet", [solid(0)], [0])
    refused(tmp_path, f"no {missing} split", tmp_path, f"{present}-0.parquet", "name the files train-*.parquet")


def test_a_single_file_without_a_test_split(tmp_path):
    write(tmp_path / "train-0.parquet", [solid(0)], [0])
    refused(tmp_path / "train-0.parquet", "no test split", tmp_path, "test-*.parquet")


def test_a_single_file_that_is_the_test_split(tmp_path):
    write_set(tmp_path)
    refused(tmp_path / "test-00000-of-00001.parquet", "test-00000-of-00001.parquet", "training file")


def test_two_data_sets_in_one_folder(tmp_path):
    write_set(tmp_path / "a")
    write_set(tmp_path / "b")
    refused(tmp_path, "several folders", tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(("column", "wanted"), [({"image": "picture"}, "img or image"), ({"label": "y"}, "label")])
def test_a_missing_column(tmp_path, column, wanted):
    write_set(tmp_path)
    file = tmp_path / "train-00000-of-00001.parquet"
    write(file, [solid(0)], [0], **column)
    refused(tmp_path, file, f"no column {wanted}", *column.values())


def test_a_column_of_the_wrong_type(tmp_path):
    write_set(tmp_path / "label")
    file = tmp_path / "label/train-00000-of-00001.parquet"
    write(file, [solid(0)], ["cat"], label_type=pa.string())
    refused(tmp_path / "label", file, "'label' holds string", "integers")
    write_set(tmp_path / "image")
    file = tmp_path / "image/test-00000-of-00001.parquet"
    pq.write_table(pa.table({"img": [[0, 1, 2]], "label": [0]}), file)
    refused(tmp_path / "image", file, "'img' holds list", "encoded images")


PHOTO = encode(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8), "JPEG")
PICTURE = encode(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8), "PNG")


@pytest.mark.parametrize(
    "broken", [PHOTO[: len(PHOTO) // 2], PICTURE[: len(PICTURE) // 2], PHOTO[:20], b"", b"no image"]
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_an_image_that_cannot_be_decoded(tmp_path, split, broken):
    for name in ("train", "test"):
        images = [PHOTO, PHOTO, broken] if name == split else [PHOTO]
        write(tmp_path / f"{name}.parquet", images, [0] * len(images))
    refused(tmp_path, tmp_path / f"{split}.parquet", "row 2", f"{len(broken)} bytes cannot be decoded")


@pytest.mark.parametrize("struct", [True, False])
def test_an_image_that_is_null(tmp_path, struct):
    write_set(tmp_path)
    file = tmp_path / "train-00000-of-00001.parquet"
    write(file, [solid(0), None], [0, 1], struct=struct)
    refused(tmp_path, file, "row 1", "null")


def test_an_image_of_more_than_8_bits(tmp_path):
    write_set(tmp_path)
    file = tmp_path / "train-00000-of-00001.parquet"
    write(file, [encode(np.full((4, 5), 60000, np.uint16))], [0])
    refused(tmp_path, file, "row 0", "I;16", "8 bits")


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_image_of_another_size(tmp_path, split):
    for name in ("train", "test"):
        images = [solid(0), solid(0, (6, 7))] if name == split else [solid(0)]
        write(tmp_path / f"{name}.parquet", images, [0] * len(images))
    refused(tmp_path, tmp_path / f"{split}.parquet", "row 1", "6x7", "4x5")


@pytest.mark.parametrize(
    ("label", "shown"),
    [(-1, "label -1"), (None, "label null"), (4, "label 4 is outside the 3 classes 0..2")],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_label_outside_the_classes(tmp_path, split, label, shown):
    for name in ("train", "test"):
        labels = [0, 1, label] if name == split else [2]
        write(tmp_path / f"{name}.parquet", [solid(0)] * len(labels), labels, names=["a", "b", "c"])
    refused(tmp_path, tmp_path / f"{split}.parquet", "row 2", shown)


def test_a_test_label_that_training_never_showed(tmp_path):
    write_set(tmp_path, train=[0, 1], test=[0, 2])
    refused(tmp_path, tmp_path / "test-00000-of-00001.parquet", "row 1", "label 2 is outside the 2 classes")


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_empty_split(tmp_path, split):
    write_set(tmp_path)
    file = tmp_path / f"{split}-00000-of-00001.parquet"
    write(file, [], [])
    refused(tmp_path, file, "no rows")


def test_a_file_that_is_no_parquet(tmp_path):
    write_set(tmp_path)
    file = tmp_path / "test-00000-of-00001.parquet"
    for content in (b"not a parquet file", b"", file.read_bytes()[:-20]):
        file.write_bytes(content)
        refused(tmp_path, file, "not a readable Parquet file")


def test_a_file_with_corrupt_pages(tmp_path):
    write_set(tmp_path)
    file = tmp_path / "train-00000-of-00001.parquet"
    content = bytearray(file.read_bytes())
    content[4:60] = b"\xff" * 56
    file.write_bytes(content)
    refused(tmp_path, file, "unreadable from row 0 on")


@pytest.mark.parametrize("label", [10**12, 2**63 - 1])
def test_a_label_that_is_no_class_number_is_refused(tmp_path, label):
    write(tmp_path / "train.parquet", [solid(1), solid(2)], [0, label])
    write(tmp_path / "test.parquet", [solid(1)], [0])
    with pytest.raises(ValueError, match=f"row 1: label {label} is no class number"):
        load(str(tmp_path))


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    image = pa.array([encode(solid(1))], pa.binary())
    table = pa.Table.from_arrays([image, image, pa.array([0])], names=["img", "img", "label"])
    for split in ("train", "test"):
        pq.write_table(table, tmp_path / f"{split}.parquet")
    with pytest.raises(ValueError, match="2 columns are called img"):
        load(str(tmp_path))
