"""Image classification sets as the Hugging Face hub stores CIFAR-10: encoded images in Parquet files."""

import io
import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label")  # the second is CIFAR-100's
TEST_WORDS = ("test", "validation", "valid", "val")
MOST_CLASSES = 1_000_000
"""Labels from here on are no class numbers."""

_NAMING = "name the files train-*.parquet and test-*.parquet (or validation-*.parquet)"


def read(source: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], int]:
    """Decodes the training and the test split of an image classification set.

    The image column is `img` or `image`, encoded images (JPEG, PNG, ...) as plain binary or as a struct with
    a field `bytes`; the label column is `label` or `fine_label`, integers. The number of classes is that of
    the class names in the Hugging Face metadata of the training file where it has any, else the largest
    training label plus one. Images come out with one channel if all of them are grayscale, else with three
    (RGB; an alpha channel is dropped).

    Args:
        source: see `find_splits`.

    Returns:
        `((train_images, train_labels), (test_images, test_labels), classes)`, the images (N, C, H, W) uint8,
        the labels (N,) int64.

    Raises:
        FileNotFoundError: nothing at the path, or a folder without Parquet files.
        ValueError: a split or a column is missing, a file cannot be read, an image cannot be decoded or has
            another size than the first one, a label is null or outside the classes; the message names file
            and row (from 0).

    Cost: one thread, about 0.15 ms per 32x32 JPEG; a thread pool makes images this small slower, not faster.
    """
    train_files, test_files = find_splits(source)
    named = _named_classes(train_files[0])
    train_images, train_labels = _read_split(train_files, named, None)
    classes = named or int(train_labels.max()) + 1
    test_images, test_labels = _read_split(test_files, classes, train_images.shape[2:])
    channels = max(train_images.shape[1], test_images.shape[1])
    return (
        (train_images.expand(-1, channels, -1, -1).contiguous(), train_labels),
        (test_images.expand(-1, channels, -1, -1).contiguous(), test_labels),
        classes,
    )


def find_splits(source: Path) -> tuple[list[Path], list[Path]]:
    """Finds the Parquet files of the training and of the test split by their names.

    A file belongs to the split whose name stands as a word in its own name (`train-00000-of-00001.parquet`,
    `mnist_test.parquet`). The test split is `test`, and where there is none, `validation`, `valid` or `val`.

    Args:
        source: a folder, searched with its sub-folders, or a single file. A single file is the whole training
            set, whatever other training files lie beside it; its test split is the test files in its folder.

    Returns:
        The training files and the test files, each sorted by path and none empty.

    Raises:
        FileNotFoundError: nothing at the path, or a folder without Parquet files.
        ValueError: a split is missing or spread over several folders, or the single file is a test split.
    """
    if not source.exists():
        raise FileNotFoundError(f"no file or folder at {source}: check the path")
    single = source.is_file()
    folder = source.parent if single else source
    files = sorted(f for f in (folder.glob("*.parquet") if single else folder.rglob("*.parquet")) if f.is_file())
    if single and _split_word(source) in TEST_WORDS:
        raise ValueError(f"{source.name} is named as a test split: give the training file or the folder {folder}")
    if not single and not files:
        raise FileNotFoundError(f"no *.parquet file in {folder} or its sub-folders: {_NAMING}")

    train = [source] if single else [f for f in files if _split_word(f) == "train"]
    found = ([f for f in files if _split_word(f) == word] for word in TEST_WORDS)
    test = next(filter(None, found), [])
    for split, part in (("training", train), ("test", test)):
        if not part:
            raise ValueError(f"no {split} split in {folder} ({_listing(files)}): {_NAMING}")
        folders = sorted({str(f.parent) for f in part})
        if len(folders) > 1:
            raise ValueError(f"the {split} files lie in several folders ({', '.join(folders)}): give one data set's")
    return train, test


def _split_word(file: Path) -> str | None:
    words = re.split(r"[^a-z0-9]+", file.stem.lower())
    return next((word for word in words if word in ("train", *TEST_WORDS)), None)


def _listing(files: list[Path]) -> str:
    names = [file.name for file in files[:3]]
    return "found " + (", ".join(names) + (", ..." if len(files) > 3 else "") or "none")


def _read_split(files: list[Path], classes: int | None, size: tuple[int, ...] | None) -> tuple[Tensor, Tensor]:
    """Decodes all rows of files; classes and size (H, W) bind where they are given."""
    images: np.ndarray[Any, np.dtype[np.uint8]] | None = None
    total = sum(_open(file).metadata.num_rows for file in files)
    labels = np.empty(total, np.int64)
    for i, (where, encoded, label) in enumerate(chain.from_iterable(map(_rows, files))):
        pixels = _decode(encoded, where)
        size = size or pixels.shape[1:]
        if pixels.shape[1:] != size:
            (h, w), (height, width) = pixels.shape[1:], size
            raise ValueError(f"{where}: image of {h}x{w} pixels among images of {height}x{width}: resize to one size")
        if images is None:
            images = np.empty((total, *pixels.shape), np.uint8)
        elif pixels.shape[0] > images.shape[1]:  # the first colour image after grayscale ones
            images = images.repeat(3, axis=1)
        images[i] = pixels
        labels[i] = _check_label(label, classes, where)
    if images is None:
        raise ValueError(f"{files[0]}: no rows in this split: at least one image is needed")
    return torch.from_numpy(images), torch.from_numpy(labels)


def _rows(file: Path) -> Iterator[tuple[str, bytes | None, int | None]]:
    """The rows of one file: where the row is (for messages), its encoded image, its label."""
    table = _open(file)
    image, label = _column(table, IMAGE_COLUMNS, file), _column(table, LABEL_COLUMNS, file)
    kind = table.schema_arrow.field(image).type
    as_struct = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    if not (as_struct or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise ValueError(f"{file}: column {image!r} holds {kind}: store encoded images, binary or struct<bytes, path>")
    kind = table.schema_arrow.field(label).type
    if not pa.types.is_integer(kind):
        raise ValueError(f"{file}: column {label!r} holds {kind}: store class numbers, integers from 0")
    row = 0
    try:
        for batch in table.iter_batches(batch_size=1024, columns=[image, label]):
            encoded = batch[image].field("bytes") if as_struct else batch[image]
            for pair in zip(encoded.to_pylist(), batch[label].to_pylist(), strict=True):
                yield f"{file}, row {row}", *pair
                row += 1
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file}: unreadable from row {row} on ({_line(error)}): get the file again") from error


def _open(file: Path) -> Any:  # pq.ParquetFile, which has no types
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file}: not a readable Parquet file ({_line(error)}): get the file again") from error


def _column(table: Any, wanted: tuple[str, ...], file: Path) -> str:
    names = table.schema_arrow.names
    for name in wanted:
        if names.count(name) > 1:
            raise ValueError(f"{file}: {names.count(name)} columns are called {name}: keep one of them")
        if name in names:
            return name
    raise ValueError(f"{file}: no column {' or '.join(wanted)} among {', '.join(names)}: rename the column")


def _named_classes(file: Path) -> int | None:
    """The number of class names in the Hugging Face metadata of file, None where it has none."""
    table = _open(file)
    try:
        features = json.loads(table.schema_arrow.metadata[b"huggingface"])["info"]["features"]
        return len(features[_column(table, LABEL_COLUMNS, file)]["names"]) or None
    except (KeyError, TypeError, json.JSONDecodeError):
        return None


def _decode(encoded: bytes | None, where: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """One image as (1, H, W) if it is grayscale, else (3, H, W)."""
    if encoded is None:
        raise ValueError(f"{where}: no image bytes (null): store the encoded image in the file, not only its path")
    try:
        image: Image.Image = Image.open(io.BytesIO(encoded))
        stored = image.mode
        wanted = "L" if stored in ("1", "L", "LA") else "RGB"
        pixels = np.asarray(image if stored == wanted else image.convert(wanted))
    except Exception as error:  # pillow's decoders raise OSError, SyntaxError, struct.error, ...
        raise ValueError(
            f"{where}: image of {len(encoded)} bytes cannot be decoded: replace or drop the row"
        ) from error
    if stored[0] in "IF":
        raise ValueError(f"{where}: image has pixels of mode {stored}: convert it to 8 bits a channel")
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _check_label(label: int | None, classes: int | None, where: str) -> int:
    if label is None or label < 0:
        raise ValueError(f"{where}: label {'null' if label is None else label}: drop or label the unlabelled rows")
    if label >= MOST_CLASSES:
        raise ValueError(f"{where}: label {label} is no class number: number the classes from 0")
    if classes is not None and label >= classes:
        raise ValueError(f"{where}: label {label} is outside the {classes} classes 0..{classes - 1}: correct it")
    return label


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
