"""Both passes span all micro-batches, of equal or unequal size, with the selection across the whole (trap 7)."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import nets
import steppe
from recipes_list import DETERMINISTIC, EVERY, weights, wrap

CUTS = {"equal": [4, 4, 4], "unequal": [1, 7, 4], "one": [12], "singles": [1] * 12}


def parts(data, sizes):
    return list(zip(*(t.split(sizes) for t in data), strict=True))


def second(opt, model, data):
    return steppe.Batch(model, nets.losses, (data[0].flip(0), data[1])) if opt.method.needs_second else None


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("net", [nets.mlp, nets.transformer], ids=["mlp", "transformer"])
@pytest.mark.parametrize("text", EVERY)
def test_micro_batches_equal_the_one_large_batch(text, net, cut):
    (one, data), (two, _) = net(), net()
    whole, accumulated = wrap(one, text), wrap(two, text)
    for _ in range(3):
        a = whole.step(steppe.Batch(one, nets.losses, data), second(whole, one, data))
        batch = steppe.Batch.from_micro_batches(two, nets.losses, parts(data, CUTS[cut]))
        b = accumulated.step(batch, second(accumulated, two, data))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-10)
    assert whole.stats.steps == accumulated.stats.steps
    assert whole.stats.propagations == pytest.approx(accumulated.stats.propagations)


@pytest.mark.parametrize("text", [t for t in DETERMINISTIC if "sds" not in t and "esam" not in t])
def test_the_mean_of_a_micro_batch_is_enough_where_nobody_looks_at_examples(text):
    (one, data), (two, _) = nets.mlp(), nets.mlp()
    whole, mean = wrap(one, text), wrap(two, text)
    for _ in range(3):
        whole.step(steppe.Batch(one, nets.losses, data), second(whole, one, data))
        mean.step(
            steppe.Batch.from_micro_batches(
                two, lambda model, d: F.cross_entropy(model(d[0]), d[1]), parts(data, [5, 1, 6])
            ),
            second(mean, two, data),
        )
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-10)


def test_a_mean_is_too_little_for_a_selection():
    model, data = nets.mlp()
    batch = steppe.Batch(model, lambda model, d: F.cross_entropy(model(d[0]), d[1]), data)
    before = weights(model)
    with pytest.raises(TypeError, match=r"mean.*each example"):
        wrap(model, "esam_sds()").step(batch)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


def test_the_selection_may_fall_on_one_micro_batch_alone():
    model, (x, y) = nets.mlp()
    opt, seen = wrap(model, "esam_sds(gamma=0.25)"), []

    def losses(model, data):
        seen.append((len(data[0]), torch.is_grad_enabled()))
        found = nets.losses(model, data[:2])
        return found * data[2]

    weight = torch.tensor([1.0] * 8 + [1000.0] * 4, dtype=torch.float64)
    opt.step(steppe.Batch.from_micro_batches(model, losses, parts((x, y, weight), [8, 4])))
    assert seen == [(8, True), (4, True), (8, False), (4, False), (3, True)]


def test_statistics_move_once_over_all_micro_batches():
    """Trap 8, with accumulation: four micro-batches would have moved them four times, two passes eight times."""
    model, data = nets.convnet()
    opt = wrap(model, "sam()")
    opt.step(steppe.Batch.from_micro_batches(model, nets.losses, parts(data, [3, 3, 6])))
    assert int(model[1].num_batches_tracked) == 1
    other, _ = nets.convnet()
    wrap(other, "sgd()").step(steppe.Batch(other, nets.losses, data))
    torch.testing.assert_close(model[1].running_mean, other[1].running_mean, rtol=0, atol=1e-12)


def test_micro_batches_of_other_shapes():
    """Sequences padded to other lengths: nothing could be concatenated."""
    model = torch.nn.Embedding(20, 4).double()
    tokens = [torch.arange(6).reshape(2, 3), torch.arange(10).reshape(2, 5), torch.arange(3).reshape(3, 1)]
    opt = wrap(model, "esam_sds(gamma=0.5)")
    loss = opt.step(
        steppe.Batch.from_micro_batches(
            model, lambda m, t: m(t["ids"]).square().mean((1, 2)), [{"ids": t} for t in tokens]
        )
    )
    assert loss.isfinite()
    assert opt.stats.examples == 7


def test_no_micro_batches_are_refused():
    model, data = nets.mlp()
    with pytest.raises(ValueError, match="no micro-batches"):
        steppe.Batch.from_micro_batches(model, nets.losses, [])
    with pytest.raises(ValueError, match="empty"):
        steppe.Batch.from_micro_batches(model, nets.losses, parts(data, [12, 0]))


def test_a_closure_after_accumulated_gradients_is_refused():
    """Trap 7: the second pass would see the last micro-batch only."""
    model, data = nets.mlp()
    opt = wrap(model, "sam()")

    def closure():
        opt.zero_grad()
        loss = nets.losses(model, data).mean()
        loss.backward()
        return loss

    opt.step(closure)
    opt.step(closure)
    opt.zero_grad()
    opt.step(closure)
    nets.losses(model, data).mean().backward()
    with pytest.raises(TypeError, match="from_micro_batches"):
        opt.step(closure)
    opt.zero_grad()
    nets.losses(model, data).mean().backward()
    with pytest.raises(TypeError, match="from_micro_batches"):
        opt.step(closure)
    opt.zero_grad(set_to_none=False)
    opt.zero_grad()
    opt.step(closure)


def test_a_step_without_anything_names_the_integrations():
    model, data = nets.mlp()
    opt = wrap(model, "sam()")
    nets.losses(model, data).mean().backward()
    with pytest.raises(TypeError, match=r"steppe\.integrations"):
        opt.step()
