"""Bad data: a loader that shuffles, changes, runs out or has nothing; one line names the culprit and the mend."""

from __future__ import annotations

import random

import torch
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

from exact import dense, gap, losses, operator, refused, small, uneven, untouched
from steppe.curvature.objective import Objective
from steppe.curvature.operator import Operator

BATCHES = uneven(4)
ONES = torch.ones(43, dtype=torch.float64)


class Augmented(Dataset):
    """Random noise from Python's generator, of which torch knows nothing."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return torch.full((4,), i + random.random(), dtype=torch.float64), i % 3


def test_a_loader_that_shuffles():
    data = TensorDataset(torch.cat([x for x, _ in BATCHES]), torch.cat([y for _, y in BATCHES]))
    words = "the loader shuffles", "shuffle=False", "list(loader)"
    shuffling = DataLoader(data, 3, shuffle=True)
    refused(lambda: Objective(small(), losses, shuffling), *words)
    refused(lambda: Objective(small(), losses, shuffling, mode="train"), *words)
    for sampler in (SubsetRandomSampler(range(8)), WeightedRandomSampler([1.0] * 8, 8)):
        refused(lambda sampler=sampler: Objective(small(), losses, DataLoader(data, 3, sampler=sampler)), *words)
    found = dense(operator(small(), losses, list(shuffling)))
    assert gap(found, dense(operator(small(), losses, BATCHES))) < 1e-12


class Changing:
    """A loader that gives other batches each time, or another number of them."""

    def __init__(self, *runs):
        self.runs = list(runs)

    def __iter__(self):
        yield from self.runs.pop(0)


def test_data_that_change_between_products():
    whole = [((4 * x).round(), y) for x, y in BATCHES]  # sums of which do not depend on their order
    (x, y), second, third = whole
    flipped, swapped = (x.flip(0), y.flip(0)), (x.flip(1), y)
    words = "the loader gives other data each time", "turn shuffling and random augmentation off", "list(loader)"
    for runs, where in (
        ((whole, [(flipped), second, third]), "batch 0 is not what it was"),
        ((whole, [(swapped), second, third]), "batch 0 is not what it was"),
        ((whole, [(x, (y + 1) % 3), second, third]), "batch 0 is not what it was"),
        ((whole, [(x, y), (second[0] + 1e-9, second[1]), third]), "batch 1 is not what it was"),
        ((whole, [(x, y), third, second]), "batch 1 is not what it was"),
        ((whole, whole[:2]), "2 batches came where there had been 3"),
        ((whole[:2], whole), "more than 2 batches came"),
        ((whole, []), "no batches"),
    ):
        model = small()
        A = operator(model, losses, Changing(*runs))
        A @ ONES
        with untouched(model):
            refused(lambda A=A: A @ ONES, where, *(words if runs[1] else ()))
    random_loader = DataLoader(Augmented(), 3)
    A = operator(small(), losses, random_loader)
    A @ ONES
    refused(lambda: A @ ONES, *words)
    A = operator(small(), losses, list(random_loader))
    assert torch.equal(A @ ONES, A @ ONES)


def test_one_run_through_is_not_confused_by_one_that_was_cut_short():
    objective = Objective(small(), losses, BATCHES)
    next(iter(objective.batches()))
    assert len(list(objective.batches())) == 3
    assert objective.examples == 8


def test_loaders_that_cannot_be_used():
    model = small()
    words = "can be run through only once", "list(...)"
    refused(lambda: Objective(model, losses, iter(BATCHES)), "list_iterator", *words)
    refused(lambda: Objective(model, losses, (batch for batch in BATCHES)), "generator", *words)
    for empty in ([], DataLoader(TensorDataset(torch.zeros(0, 4)), 3)):
        for measure in (Objective.loss, Objective.gradient, lambda objective: Operator(objective) @ ONES):
            refused(lambda m=measure, e=empty: m(Objective(model, losses, e)), "the loader has no batches")
    nothing = [(torch.zeros(0, 4, dtype=torch.float64), torch.zeros(0).long())]
    refused(lambda: operator(model, losses, nothing) @ ONES, "the batch is empty")
    refused(lambda: operator(model, losses, [("a", 1)]) @ ONES, "no tensor with a batch dimension", error=TypeError)
    refused(lambda: Objective(model, losses, BATCHES, max_batches=0), "max_batches=0", "at least 1")
    refused(lambda: Objective(model, losses, BATCHES, mode="test"), "mode='test'", '"eval" or "train"')
