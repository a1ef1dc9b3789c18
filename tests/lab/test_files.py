"""Files are whole or absent, and a folder belongs to one command at a time."""

import subprocess
import sys

import pytest

from steppe.lab.files import claimed, write

HOLD = """
import sys, pathlib
from steppe.lab.files import claimed
with claimed(pathlib.Path(sys.argv[1])):
    print("claimed", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_claimed_until_the_other_process_dies(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "claimed\n"
    with pytest.raises(ValueError, match="in use by another command"), claimed(tmp_path):
        pass
    other.kill()
    other.wait()
    with claimed(tmp_path):
        pass


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "deep" / "file"
    write(path, "first")
    with pytest.raises(OSError, match="file") as caught:
        write(path / "below", "second")
    assert caught.value.filename == str(path / "below")
    assert path.read_text() == "first"
    assert [p.name for p in path.parent.iterdir()] == ["file"]
