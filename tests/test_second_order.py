"""Where a sharpness-aware step has a second-order base look at the curvature, and what it pays."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor

import nets
import steppe
from recipes_list import DETERMINISTIC, EVERY, TOTAL, step, weights
from steppe.products import with_products
from steppe.second_order import SecondOrder


class Scaled(SecondOrder):
    """``w ← w − lr·g/(1 + |c|)``, c the Hessian's product with ones: notes where it looked."""

    def __init__(self, params, lr=0.1, *, n=1, **how):
        super().__init__(params, {"lr": lr}, **how)
        self.n, self.looked, self.seen, self.updates = n, [], [], 0

    def is_due(self):
        return self.steps % self.n == 0

    def backward(self, batch, params, *, share=1.0, rows=None, again=False, reduce=True, weight=1.0, scaler=None):
        every = self.trainable()
        ones = [torch.ones_like(p) for p in every]
        losses, gradient, (product,) = with_products(
            batch, every, [ones], rows=rows, again=again, weight=weight, scaler=scaler
        )
        for p, g in zip(every, gradient, strict=True):
            if g is not None and (params is None or any(p is q for q in params)):
                p.grad = g if p.grad is None else p.grad.add_(g)
        self.looked.append([p.detach().clone() for p in every])
        self.seen.append((share, product))
        self.extra = (0, 3)
        return losses

    def forget(self):
        self.seen = []

    def update(self):
        self.updates += 1
        for i, p in enumerate(self.trainable()):
            kept = self.state[p]
            if self.seen:
                kept["curvature"] = sum(share * product[i] for share, product in self.seen)
            kept["step"] = kept.get("step", torch.zeros(())) + 1
            if p.grad is not None:
                p.sub_(self.group_of(p)["lr"] * p.grad / (1 + kept["curvature"].abs()))
        self.seen = []

    def cost(self):
        return 1 + 2 / self.n


def made(text="sam()", net=nets.mlp, **how):
    model, data = net()
    base = Scaled(model.parameters(), **how)
    return steppe.SharpnessAware(base, steppe.parse(text), total_steps=TOTAL), base, model, data


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    return float(sum((x - y).square().sum() for x, y in zip(a, b, strict=True)).sqrt())


def params(model) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("text", EVERY)
@pytest.mark.parametrize("at", ["perturbed", "weights"])
def test_every_method_takes_the_curvature_where_it_is_asked_to(text, at):
    opt, base, model, data = made(text, at=at)
    for _ in range(4):
        before, sharp = params(model), opt.stats.sharp
        base.looked = []
        step(opt, model, data)
        away = [distance(before, point) for point in base.looked]
        assert len(away) == (3 if opt.stats.sharp > sharp and "m_sharpness" in text else 1)
        if at == "weights" or opt.stats.sharp == sharp:
            assert max(away) == 0
        else:
            assert min(away) > 1e-3


@pytest.mark.parametrize("text", EVERY)
@pytest.mark.parametrize("at", ["perturbed", "weights"])
def test_the_direction_is_that_of_any_base(text, at):
    """Looking changes no gradient: that of the curved base is SGD's, to rounding."""
    opt, _, model, data = made(text, at=at, lr=0.0)
    plain, _ = nets.mlp()
    other = steppe.SharpnessAware(torch.optim.SGD(plain.parameters(), lr=0.0), steppe.parse(text), total_steps=TOTAL)
    for _ in range(3):
        step(opt, model, data)
        step(other, plain, data)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("net", [nets.convnet])
@pytest.mark.parametrize("text", ["sam()", "rwp(alpha=0)", "sgd()", "m_sharpness(sam(), 5)", "esam()"])
@pytest.mark.parametrize("at", ["perturbed", "weights"])
def test_running_statistics_move_once(net, text, at):
    opt, _, model, data = made(text, net, at=at, lr=0.0)
    plain, _ = net()
    other = steppe.SharpnessAware(torch.optim.SGD(plain.parameters(), lr=0.0), steppe.parse(text), total_steps=TOTAL)
    step(opt, model, data)
    step(other, plain, data)
    for (name, mine), yours in zip(model.named_buffers(), plain.buffers(), strict=True):
        if "num_batches" in name:
            assert mine == yours == 1
        elif not (
            at == "weights" and text == "rwp(alpha=0)"
        ):  # there the first pass is at the weights, not beside them
            torch.testing.assert_close(mine, yours, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("text", DETERMINISTIC)
@pytest.mark.parametrize("at", ["perturbed", "weights"])
@pytest.mark.parametrize("n", [1, 3])
def test_what_runs_is_what_is_predicted(text, at, n):
    opt, base, model, data = made(text, at=at, n=n)
    for _ in range(TOTAL):
        step(opt, model, data)
    predicted = base.cost_under(opt.method, batch_size=nets.B, total_steps=TOTAL)
    assert opt.stats.propagations == pytest.approx(predicted, rel=1e-12)


def test_groups_of_examples_share_the_step():
    opt, base, model, data = made("m_sharpness(sam(), 5)", at="weights")
    shares: list[float] = []
    update = base.update
    base.update = lambda: (shares.extend(share for share, _ in base.seen), update())
    step(opt, model, data)
    assert shares == [5 / 12, 5 / 12, 2 / 12]
    whole, single, other, _ = made("sam(rho=0.1)", at="weights")
    step(whole, other, data)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(base.state[p]["curvature"], single.state[q]["curvature"], rtol=1e-9, atol=1e-12)


def test_alone_it_is_the_step_of_sgd_around_it():
    opt, _, model, data = made("sgd()")
    other, _ = nets.mlp()
    alone = Scaled(other.parameters())
    for _ in range(3):
        first = opt.step(steppe.Batch(model, nets.losses, data))
        second = alone.step(steppe.Batch(other, nets.losses, data))
        assert torch.equal(first, second)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_a_step_that_fails_leaves_nothing_behind():
    opt, base, model, data = made("sam()")
    step(opt, model, data)
    before, kept = weights(model), copy.deepcopy(base.state_dict()["state"])
    with pytest.raises(ValueError, match="loss is nan"):
        step(opt, model, data, loss_fn=lambda model, batch: nets.losses(model, batch) * float("nan"))
    assert all(map(torch.equal, before, weights(model)))
    assert base.updates == 1
    seen = len(base.seen)
    assert seen == 1
    step(opt, model, data)
    assert base.updates == 2
    for number, state in base.state_dict()["state"].items():
        assert state["step"] == kept[number]["step"] + 1
        assert state["curvature"].isfinite().all()


def test_after_a_wrapped_step_that_failed_the_base_takes_its_own():
    opt, base, model, data = made("sam()")
    twin, _, other, _ = made("sam()")
    with pytest.raises(ValueError, match="loss is nan"):
        step(opt, model, data, loss_fn=lambda model, batch: nets.losses(model, batch) * float("nan"))
    for each, net in ((base, model), (twin.base, other)):
        assert each.step(steppe.Batch(net, nets.losses, data)).isfinite()
    assert all(map(torch.equal, weights(model), weights(other)))


def test_alone_a_loss_that_is_not_finite_leaves_the_weights():
    model, data = nets.mlp()
    base = Scaled(model.parameters())
    before = weights(model)
    with pytest.raises(ValueError, match="loss is nan at step 0 of Scaled"):
        base.step(steppe.Batch(model, lambda m, b: nets.losses(m, b) * float("nan"), data))
    assert all(map(torch.equal, before, weights(model)))


def test_an_overflow_skips_the_update_and_its_curvature():
    opt, base, model, data = made("sam()")
    opt.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    before = weights(model)
    factor = torch.tensor(1.0)

    def losses(model, batch):
        return nets.losses(model, batch) * factor

    factor = torch.tensor(float("inf"))
    step(opt, model, data, loss_fn=losses)
    assert base.updates == 0
    assert opt.stats.skipped == 1
    assert all(map(torch.equal, before, weights(model)))
    factor = torch.tensor(1.0)
    step(opt, model, data, loss_fn=losses)
    assert base.updates == 1


def test_closures_are_refused_in_one_line():
    opt, base, model, data = made("sam()")
    with pytest.raises(TypeError, match="Scaled looks at the curvature, which a bare closure hides"):
        opt.step(lambda: nets.losses(model, data).mean())
    with pytest.raises(TypeError, match="Scaled looks at the model, which a closure hides"):
        base.step(lambda: nets.losses(model, data).mean())
    with pytest.raises(TypeError, match="needs the loss with its graph"):
        base.step()


def test_split_is_refused():
    model, _ = nets.mlp()
    with pytest.raises(ValueError, match="split=True"):
        steppe.SharpnessAware(Scaled(model.parameters()), steppe.rwp(), split=True)


def test_where_is_one_of_two():
    model, _ = nets.mlp()
    with pytest.raises(ValueError, match="at='elsewhere' must be 'perturbed' or 'weights'"):
        Scaled(model.parameters(), at="elsewhere")


def test_resumes_to_the_bit_and_is_copied_whole():
    opt, base, model, data = made("rst(sam(), p=0.5)", n=2)
    for _ in range(3):
        step(opt, model, data)
    again, _, other, _ = made("rst(sam(), p=0.5)", n=2)
    other.load_state_dict(model.state_dict())
    buffer = io.BytesIO()
    torch.save(opt.state_dict(), buffer)
    buffer.seek(0)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    for _ in range(3):
        step(opt, model, data)
        step(again, other, data)
    assert all(map(torch.equal, weights(model), weights(other)))
    twin = pickle.loads(pickle.dumps(base))
    assert (twin.at, twin.seed, twin.n) == (base.at, base.seed, base.n)


def test_the_state_keeps_wider_types_than_the_weights():
    model = torch.nn.Linear(3, 2).bfloat16()
    base = Scaled(model.parameters())
    base.state[model.weight]["curvature"] = torch.full((2, 3), 1 + 2**-20)
    other = Scaled(torch.nn.Linear(3, 2).bfloat16().parameters())
    other.load_state_dict(base.state_dict())
    (kept,) = [state["curvature"] for state in other.state.values() if "curvature" in state]
    assert kept.dtype == torch.float32
    assert torch.equal(kept, base.state[model.weight]["curvature"])


BASES = {
    "adahessian": lambda params, n: steppe.optim.AdaHessian(params, lr=0.01, n=n),
    "natural": lambda params, n: steppe.optim.NaturalGradient(params, 0.01, fisher="kfac", damping=0.1, n=n),
}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("base", BASES)
def test_a_layer_that_is_frozen_on_the_way_stands_still_and_the_count_goes_on(base, n, wrapped):
    model, data = nets.mlp()
    opt = BASES[base](model.parameters(), n)
    run = steppe.SharpnessAware(opt, steppe.sam()) if wrapped else opt
    looks = []
    for i in range(9):
        if i == 4:
            model[0].requires_grad_(False)
            home = [p.detach().clone() for p in model[0].parameters()]
        assert opt.steps == i
        looks.append(opt.is_due())
        run.step(steppe.Batch(model, nets.losses, data))
    anew = {4} if base == "natural" else set()  # its factors are of the layers that there are
    assert looks == [i % n == 0 or i in anew for i in range(9)]
    for p, w in zip(model[0].parameters(), home, strict=True):
        assert torch.equal(p, w)


def test_the_damping_goes_on_where_the_first_layer_is_frozen():
    model, data = nets.mlp()
    opt = steppe.optim.NewtonCG(model.parameters(), damping=1.0)
    seen = []
    for i in range(5):
        if i == 2:
            model[0].requires_grad_(False)
        opt.step(steppe.Batch(model, nets.losses, data))
        seen.append((opt.damping, float(opt.state[model[4].weight]["damping"])))
    assert all(damping == kept for damping, kept in seen)
    assert seen[1] != seen[-1]
