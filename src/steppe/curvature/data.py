"""Batches that have to be the same each time a loader is run through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from ..examples import extent, leaves

SHUFFLES = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


class Watch:
    """Compares the batches of each run-through with those of the first.

    A product with a matrix that is not the same each time has no eigenvalues.

    Args:
        loader: what is run through.

    Raises:
        ValueError: if it can be run through only once, or shuffles.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        if isinstance(loader, Iterator):
            raise ValueError(
                f"the loader is a {type(loader).__name__}, which can be run through only once: give a DataLoader, or "
                "list(...) of the batches"
            )
        if isinstance(getattr(loader, "sampler", None), SHUFFLES):
            raise ValueError("the loader shuffles: products with a matrix of other batches each time mean nothing; "
                             "give a DataLoader(shuffle=False), or list(loader)")  # fmt: skip
        self.index = 0
        """Number of the batch given last."""
        self.examples = 0
        """Number of examples in one run-through, known once one is complete."""
        self.complete = False
        self._prints: list[tuple[float, ...]] = []

    def through(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Give the batches.

        Raises:
            ValueError: if there is none, or one is not what it was the first time.
        """
        count = examples = 0
        for self.index, batch in enumerate(batches):
            self._compare(self.index, fingerprint(batch))
            count, examples = count + 1, examples + extent(batch)[0]
            yield batch
        if not count:
            raise ValueError("the loader has no batches: nothing can be measured")
        if count < len(self._prints):
            raise ValueError(_changed(f"{count} batches came where there had been {len(self._prints)}"))
        self.complete, self.examples = True, examples

    def _compare(self, index: int, found: tuple[float, ...]) -> None:
        if index < len(self._prints):
            if self._prints[index] != found:
                raise ValueError(_changed(f"batch {index} is not what it was"))
        elif self.complete:
            raise ValueError(_changed(f"more than {len(self._prints)} batches came"))
        else:
            self._prints.append(found)


def fingerprint(batch: Any) -> tuple[float, ...]:
    """Return numbers that change with the batch's values and with their order."""
    found: list[float] = []
    for leaf in leaves(batch):
        table = leaf.detach().reshape(leaf.shape or (1,)).unsqueeze(-1).flatten(1)
        wide = torch.float32 if leaf.device.type == "mps" else torch.float64
        for dim in (0, 1):
            sums = table.sum(dim, dtype=wide)
            places = torch.arange(1, len(sums) + 1, dtype=wide, device=leaf.device).sin_()
            found += torch.stack([sums.sum(), sums @ places]).nan_to_num(0.0).tolist()
        found += leaf.shape
    return tuple(found)


def _changed(what: str) -> str:
    return (
        f"the loader gives other data each time ({what}), and products with a changing matrix mean nothing: "
        "turn shuffling and random augmentation off, or give list(loader)"
    )
