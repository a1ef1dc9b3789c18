"""Small image sets in Parquet files, for the tests of the data."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def encode(pixels, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels)).save(buffer, kind)
    return buffer.getvalue()


def solid(value, size=(4, 5), channels=3):
    return np.full((*size, channels) if channels > 1 else size, value, np.uint8)


def write(file, images, labels, *, image="img", label="label", struct=True, names=None, label_type=None):
    """Images are pixel arrays, encoded bytes or None."""
    file.parent.mkdir(parents=True, exist_ok=True)
    encoded = [x if x is None or isinstance(x, bytes) else encode(x) for x in images]
    column = [{"bytes": x, "path": "somewhere"} for x in encoded] if struct else encoded
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if struct else pa.binary()
    columns = {image: pa.array(column, kind), label: pa.array(labels, label_type or pa.int64())}
    table = pa.table(columns)
    if names:
        features = {label: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, file)


def write_set(folder, train=(0, 1, 2, 0, 1, 2), test=(0, 1)):
    """A colour set whose image i of a split has all pixels i (training) or 100 + i (test)."""
    write(folder / "train-00000-of-00001.parquet", [solid(i) for i in range(len(train))], train)
    write(folder / "test-00000-of-00001.parquet", [solid(100 + i) for i in range(len(test))], test)
    return str(folder)
