"""The values that the comparison ships with come from the grids that `steppe tune` tries."""

import steppe
from steppe.lab.presets import GRIDS, METHODS
from steppe.lab.tune import expand


def test_every_default_method_is_a_candidate_of_its_own_grid():
    shipped = [repr(steppe.parse(method)) for method in METHODS]
    assert shipped[0] == "sgd()"
    for method, grid in zip(shipped[1:], GRIDS, strict=True):
        assert method in expand(grid)
