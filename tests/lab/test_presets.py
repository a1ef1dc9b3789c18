"""The values that the comparison ships with come from the grids that `steppe tune` tries."""

import steppe
from steppe.lab import bases
from steppe.lab.presets import BASE_GRIDS, BASES, GRIDS, METHODS, base_preset
from steppe.lab.tune import expand, expand_base


def test_every_default_method_is_a_candidate_of_its_own_grid():
    shipped = [repr(steppe.parse(method)) for method in METHODS]
    assert shipped[0] == "sgd()"
    for method, grid in zip(shipped[1:], GRIDS, strict=True):
        assert method in expand(grid)


def test_the_values_of_every_base_are_a_candidate_of_its_own_grid():
    assert list(BASES) == list(bases.BASES)
    for name, grid in zip(BASES, BASE_GRIDS, strict=True):
        candidates = [{**base_preset("digits", name), **bases.read(text)[1]} for text in expand_base(grid)]
        assert {bases.read(text)[0] for text in expand_base(grid)} == {name}
        assert base_preset("digits", name) in candidates
