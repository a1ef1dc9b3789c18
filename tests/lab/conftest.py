"""A tiny study that has been run, for all that looks at finished runs."""

import shutil

import pytest
import torch

from steppe.lab.config import Setting
from steppe.lab.study import compare

torch.set_num_threads(1)
TINY = Setting(width=2, epochs=2, train_size=96, batch_size=32, lr=0.05)


@pytest.fixture(scope="session")
def finished_study(tmp_path_factory):
    """Never to be written into."""
    out = tmp_path_factory.mktemp("finished") / "study"
    compare(TINY, ["sgd", "sam(rho=0.5)"], 2, out)
    return out


@pytest.fixture
def study_folder(finished_study, tmp_path):
    """A copy that a test may write into."""
    return shutil.copytree(finished_study, tmp_path / "study")
