from dataclasses import replace

import pytest
import torch

from steppe.lab.config import Config
from steppe.lab.memory import peak_memory
from steppe.lab.train import step_memory

MB = 1_000_000


def test_counts_what_is_held_at_once():
    def program():
        first = torch.zeros(MB // 4)
        second = torch.zeros(2 * MB // 4)
        del first
        third = torch.zeros(MB // 4)
        return second.numel() + third.numel()

    assert peak_memory(program) == 3 * MB


def test_leaves_out_what_was_there_before():
    before = torch.zeros(MB // 4)
    assert peak_memory(lambda: before.add_(1)) < 100
    assert peak_memory(lambda: before.clone()) == MB


def test_a_cycle_of_an_earlier_program_takes_no_part():
    class Node:
        pass

    def leak():
        node = Node()
        node.myself, node.tensor = node, torch.zeros(5 * MB // 4)

    assert peak_memory(leak) == 5 * MB
    assert peak_memory(lambda: torch.zeros(MB // 4)) == MB


CONFIG = Config(model="cnn", width=8, batch_size=4)


def memory(method: str) -> int:
    step_memory.cache_clear()
    return step_memory(replace(CONFIG, method=method), classes=10, channels=1, size=4)


def test_step_memory_repeats():
    assert memory("sam()") == memory("sam()")


def test_step_memory_sees_copies_of_the_weights():
    from steppe.lab import models

    model = models.build("cnn", classes=10, channels=1, size=4, width=8)
    weights = 4 * sum(p.numel() for p in model.parameters())
    plain, sharp, stored = memory("sgd()"), memory("sam()"), memory("looksam(k=2)")
    assert plain > 3 * weights  # weights, gradients, momentum
    assert sharp - plain == pytest.approx(weights, rel=0.5)  # a copy to go back to
    assert stored > sharp  # and a direction kept between steps


@pytest.mark.parametrize("method", ["rst(sam(), p=0.1)", "rst(sam(), p=linear(0, 1))"])
def test_step_memory_waits_for_a_sharp_step(method):
    assert memory(method) == memory("sam()") > memory("sgd()")


def test_step_memory_waits_for_a_step_that_finds_what_another_left():
    assert memory("looksam(k=20)") == memory("looksam(k=2)")
