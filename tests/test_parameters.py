"""Parameters of every kind: groups with a radius of their own, frozen, parametrised, sparse, complex, elsewhere."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.optim import SGD, Adam, SparseAdam

import nets
import steppe
from recipes_list import EVERY, same, step, weights, wrap

RHO = 0.05


def grouped(text: str, radii: list[float | None], lr: float = 0.1, **kwargs) -> tuple[nn.Module, nets.Data, object]:
    """The MLP with its three linear layers in three groups; None for a group without a radius of its own."""
    model, data = nets.mlp()
    groups = [
        {"params": model[2 * i].parameters(), **({} if rho is None else {"rho": rho})} for i, rho in enumerate(radii)
    ]
    opt = steppe.SharpnessAware(SGD(groups, lr=lr), steppe.parse(text), total_steps=12, **kwargs)
    return model, data, opt


def gradient(model: nn.Module, data: nets.Data) -> list[Tensor]:
    return list(torch.autograd.grad(nets.losses(model, data).mean(), list(model.parameters())))


def radius(p: int, radii: list[float | None], rho: float) -> float:
    own = radii[p // 2]
    return rho if own is None else own


def plain_step(text: str, model: nn.Module, data: nets.Data, radii: list[float | None], lr: float = 0.1) -> None:
    """SAM, ASAM or GSAM with radii, as a paper would write it."""
    params = list(model.parameters())
    r = [radius(i, radii, RHO) for i in range(len(params))]
    g0, home = gradient(model, data), [p.detach().clone() for p in params]
    t = [p.detach().abs() + 0.01 if text == "asam()" and p.ndim > 1 else torch.ones_like(p) for p in params]
    inside = [i for i in range(len(params)) if r[i] > 0]
    norm = math.sqrt(sum(float((t[i] * g0[i]).square().sum()) for i in inside))
    with torch.no_grad():
        for i in inside:
            params[i].add_(t[i] ** 2 * g0[i], alpha=r[i] / norm)
    g1 = gradient(model, data)
    if text == "gsam()":
        dot = sum(float((a * b).sum()) for a, b in zip(g0, g1, strict=True))
        square = sum(float((b * b).sum()) for b in g1)
        g1 = [b - 0.4 * (a - dot / square * b) for a, b in zip(g0, g1, strict=True)]
    with torch.no_grad():
        for p, w, g in zip(params, home, g1, strict=True):
            p.copy_(w - lr * g)


RADII = [[0.1, None, 0.02], [0.0, None, 0.02], [None, 0.0, 0.0], [0.3, 0.2, 0.1], [None, RHO, None]]


@pytest.mark.parametrize("radii", RADII, ids=str)
@pytest.mark.parametrize("text", ["sam()", "asam(rho=0.05)", "gsam()"])
def test_groups_have_their_own_radius(text, radii):
    model, data, opt = grouped(text, radii)
    twin, _ = nets.mlp()
    for _ in range(4):
        step(opt, model, data)
        plain_step(text.replace("rho=0.05", ""), twin, data, radii)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)


def perturbations(text: str, radii: list[float | None], **kwargs) -> list[Tensor]:
    """ε of the first step, from the weights that the last pass away from home sees."""
    model, data, opt = grouped(text, radii, **kwargs)
    before, seen = [p.detach().clone() for p in model.parameters()], []

    def loss(model, data):
        seen.append([p.detach().clone() for p in model.parameters()])
        return nets.losses(model, data)

    second = steppe.Batch(model, loss, data) if opt.method.needs_second else None
    opt.step(steppe.Batch(model, loss, data), second)
    away = [weights for weights in seen if not same(weights, before)]
    return [b - a for a, b in zip(before, away[-1] if away else before, strict=True)]


ONE_RADIUS = [t for t in EVERY if "rst" not in t and "gsam(rho_min" not in t and "by_name" not in t and t != "sgd()"]
MANY_RADII = [t for t in ONE_RADIUS if "second_order" not in t]
COMBINING = ("second_order", "rho_min", "looksam", "other", "m_sharpness", "sds", "esam")
AS_THE_BASE = [t for t in EVERY if not any(word in t for word in COMBINING)]


@pytest.mark.parametrize("text", [t for t in MANY_RADII if "steps=2" not in t])
def test_a_radius_scales_its_group_of_any_perturbation(text):
    """``(ρ_group/ρ) ε(ρ)``, whatever ε is."""
    whole = perturbations(text, [None] * 3, seed=1)
    rho = steppe.parse(text).when(grouped(text, [None] * 3)[2]._point([], 0))
    parts = perturbations(text, [2 * rho, None, rho / 4], seed=1)
    assert any(e.any() for e in whole)
    for i, (one, other) in enumerate(zip(whole, parts, strict=True)):
        torch.testing.assert_close(other, one * [2, 1, 0.25][i // 2], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("text", MANY_RADII)
def test_a_radius_of_zero_leaves_the_group_alone(text):
    moved = perturbations(text, [0.0, None, None], seed=3)
    assert not any(e.any() for e in moved[:2])
    if "esam(" not in text and "esam_swp" not in text:  # which may have picked nothing
        assert any(e.any() for e in moved[2:])


@pytest.mark.parametrize("text", AS_THE_BASE)
def test_where_all_radii_are_zero_it_is_the_base_alone(text):
    """Of methods that do not select, group or take another batch even without ε."""
    ends = []
    for method, radii in ((text, [0.0] * 3), ("sgd()", [None] * 3)):
        model, data, opt = grouped(method, radii)
        for _ in range(3):
            step(opt, model, data)
        ends.append(weights(model))
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("text", [t for t in ONE_RADIUS if "looksam" not in t])
def test_the_method_s_own_radius_written_into_the_groups_changes_nothing(text):
    rho = steppe.parse(text).when(grouped(text, [None] * 3)[2]._point([], 0))
    ends = []
    for radii in ([rho] * 3, [None] * 3):
        model, data, opt = grouped(text, radii)
        for _ in range(3):
            step(opt, model, data)
        ends.append(weights(model))
    assert same(*ends)


@pytest.mark.parametrize("radii", [[None] * 3, [None, RHO, None]], ids=str)
def test_the_second_order_term_of_one_radius(radii):
    """The gradient of L(w + ε(w)), ε differentiated too."""
    model, data, opt = grouped("sam(rho=0.05, second_order=True)", radii, lr=1.0)
    params = list(model.parameters())
    r = [radius(i, radii, RHO) for i in range(len(params))]
    named = dict(model.named_parameters())

    def loss(values: list[Tensor]) -> Tensor:
        logits = torch.func.functional_call(model, dict(zip(named, values, strict=True)), data[0])
        return F.cross_entropy(logits, data[1])

    w = [p.detach().clone().requires_grad_() for p in params]
    g = torch.autograd.grad(loss(w), w, create_graph=True)
    norm = torch.stack([a.norm() for a, rho in zip(g, r, strict=True) if rho > 0]).norm()
    expected = torch.autograd.grad(loss([a + rho / norm * b for a, b, rho in zip(w, g, r, strict=True)]), w)
    step(opt, model, data)
    for p, d in zip(params, expected, strict=True):
        torch.testing.assert_close(p.grad, d, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("radii", RADII[:4], ids=str)
def test_the_second_order_term_of_several_radii_is_refused(radii):
    """``SecondOrder`` differentiates one ε with one norm; with several radii it would be silently another's."""
    model, data, opt = grouped("sam(second_order=True)", radii)
    before = weights(model)
    with pytest.raises(ValueError, match="rho"):
        step(opt, model, data)
    assert same(weights(model), before)


@pytest.mark.parametrize(("text", "share"), [("sam()", 1 / 3), ("gsam()", 1.0), ("esam_sds()", 1 / 3)])
def test_pass_one_does_not_differentiate_what_is_left_alone(text, share):
    """Where only ε reads g0."""
    model, data, opt = grouped(text, [0.0, None, 0.0])
    sizes = [sum(p.numel() for p in group["params"]) for group in opt.param_groups]
    step(opt, model, data)
    kept = sizes[1] / sum(sizes) if share < 1 else 1.0
    second = 0.5 if "sds" in text else 1.0
    assert opt.stats.backward == pytest.approx(nets.B * ((1 + kept) / 2 + second))


@pytest.mark.parametrize("rho", [-0.1, math.inf, math.nan])
def test_radii_that_make_no_sense(rho):
    model, data, opt = grouped("sam()", [None, rho, None])
    before = weights(model)
    with pytest.raises(ValueError, match=r"rho.*group 1"):
        step(opt, model, data)
    assert same(weights(model), before)


def test_a_group_that_is_added_brings_its_radius():
    body, data = nets.mlp()
    head = nn.Linear(nets.CLASSES, nets.CLASSES).double()
    model, seen = nn.Sequential(body, head), []
    opt = wrap(body, "sam()")
    opt.add_param_group({"params": head.parameters(), "rho": 0.0})

    def loss(model, data):
        seen.append((weights(body), weights(head)))
        return nets.losses(model, data)

    step(opt, model, data, loss)
    assert not same(seen[0][0], seen[1][0])
    assert same(seen[0][1], seen[1][1])
    opt.param_groups[1]["rho"] = 0.1  # as a schedule of the user's would
    step(opt, model, data, loss)
    assert not same(seen[2][1], seen[3][1])


def test_norm_layers_only():
    model, data = nets.transformer()
    opt = steppe.SharpnessAware(SGD(steppe.norm_layers_only(model), lr=0.1), steppe.sam(rho=0.5))
    seen = []

    def loss(model, data):
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return nets.losses(model, data)

    before = copy.deepcopy(model)
    step(opt, model, data, loss)
    moved = {name: seen[1][name] - seen[0][name] for name in seen[0]}
    assert {name for name, e in moved.items() if e.any()} == {name for name in moved if "norm" in name}
    slopes = dict(zip(moved, gradient(before, data), strict=True))
    total = torch.stack([slopes[name].norm() for name in moved if "norm" in name]).norm()
    for name, e in moved.items():
        torch.testing.assert_close(e, 0.5 * slopes[name] / total * ("norm" in name), rtol=1e-9, atol=1e-14)
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match="no normalisation layer"):
        steppe.norm_layers_only(nn.Linear(2, 2))


@pytest.mark.parametrize("text", EVERY)
def test_a_parameter_unfrozen_on_the_way_is_trained(text):
    model, data = nets.mlp()
    model[0].requires_grad_(False)
    opt = wrap(model, text)
    step(opt, model, data)
    before = weights(model[0])
    step(opt, model, data)
    assert same(weights(model[0]), before)
    model[0].requires_grad_(True)
    for _ in range(3):
        step(opt, model, data)
    assert not any(torch.equal(a, b) for a, b in zip(weights(model[0]), before, strict=True))


class Odd(nn.Module):
    """An empty parameter, a number, a frozen integer one, one in another memory format."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.empty = nn.Parameter(torch.zeros(0, 3, dtype=torch.float64))
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.codes = nn.Parameter(torch.ones(4, dtype=torch.int8), requires_grad=False)
        self.conv = nn.Conv2d(2, 3, 3).double().to(memory_format=torch.channels_last)
        self.transposed = nn.Parameter(torch.randn(nets.CLASSES, 3, dtype=torch.float64).t())

    def forward(self, x: Tensor) -> Tensor:
        features = self.scale * self.conv(x).tanh().mean((2, 3))
        return features @ self.transposed + self.empty.sum() * self.codes.sum()


@pytest.mark.parametrize("text", EVERY)
def test_odd_parameters(text):
    model, data = Odd(), nets.data(2, 6, 6)
    opt = wrap(model, text)
    before = weights(model)
    for _ in range(4):
        step(opt, model, data)
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.transposed.stride() == (1, 3)
    assert all(t.double().isfinite().all() for t in weights(model))
    assert torch.equal(model.codes, torch.ones(4, dtype=torch.int8))
    assert not torch.equal(model.scale, before[1])


@pytest.mark.parametrize("text", EVERY)
def test_the_memory_format_does_not_matter(text):
    ends = []
    for kept in (torch.contiguous_format, torch.channels_last):
        model, data = nets.convnet()
        model.to(memory_format=kept)
        opt = wrap(model, text)
        for _ in range(3):
            step(opt, model, data)
        ends.append(weights(model))
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def parametrised() -> tuple[nn.Module, nets.Data]:
    torch.manual_seed(0)
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(6, 8)),
        nn.Tanh(),
        parametrizations.orthogonal(nn.Linear(8, 8)),
        nn.Tanh(),
        parametrizations.spectral_norm(nn.Linear(8, nets.CLASSES)),
    )
    return model.double(), nets.data(6)


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("text", ["sam()", "gsam()", "sam(steps=2)", "looksam(k=2)"])
def test_the_cache_of_parametrize_does_not_hide_the_perturbation(text, closure):
    """It would go on with the weights of pass one: SAM without a trace of ε."""
    ends = []
    for cached in (False, True):
        model, data = parametrised()
        model[4].train(not closure)  # a closure cannot hold the power iteration
        opt = wrap(model[:4] if closure else model, text)

        def take(model=model, data=data, opt=opt):
            opt.zero_grad()
            loss = nets.losses(model, data).mean()
            loss.backward()
            return loss

        if cached:
            with parametrize.cached():
                for _ in range(3):
                    opt.step(take) if closure else step(opt, model, data)
        else:
            for _ in range(3):
                opt.step(take) if closure else step(opt, model, data)
        ends.append(weights(model[:4] if closure else model))
    assert same(*ends)


def test_the_cache_of_parametrize_holds_no_perturbed_weights_afterwards():
    model, data = parametrised()
    opt = wrap(model, "sam(rho=1)")
    with parametrize.cached(), torch.no_grad():
        step(opt, model, data)
        inside = model[:4](data[0])
    assert torch.equal(inside, model[:4](data[0]))


def test_the_tensors_behind_a_parametrisation_are_perturbed():
    """Weight norm has a length and a direction: ε is in these, not in the weight that they make."""
    model, data = parametrised()
    model = model[:4]
    model.append(nn.Linear(8, nets.CLASSES).double())
    params, rho = list(model.parameters()), 0.3
    home, g0 = [p.detach().clone() for p in params], gradient(model, data)
    norm = torch.stack([g.norm() for g in g0]).norm()
    with torch.no_grad():
        for p, g in zip(params, g0, strict=True):
            p.add_(rho / norm * g)
    g1 = gradient(model, data)
    with torch.no_grad():
        for p, w in zip(params, home, strict=True):
            p.copy_(w)
    opt = steppe.SharpnessAware(SGD(params, lr=0.1), steppe.sam(rho))
    step(opt, model, data)
    for p, w, g in zip(params, home, g1, strict=True):
        torch.testing.assert_close(p.detach(), w - 0.1 * g, rtol=1e-10, atol=1e-13)


class Bag(nn.Module):
    """An embedding with sparse gradients, and a dense head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.EmbeddingBag(20, 6, sparse=True, mode="sum").double()
        self.head = nn.Linear(6, nets.CLASSES).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.words(x).tanh())


def words() -> nets.Data:
    torch.manual_seed(1)
    return torch.randint(20, (nets.B, 4)), torch.randint(nets.CLASSES, (nets.B,))


@pytest.mark.parametrize("text", EVERY)
def test_sparse_gradients_are_refused_in_words_where_they_are_perturbed(text):
    model, data = Bag(), words()
    opt = steppe.SharpnessAware(SGD(model.parameters(), lr=0.1), steppe.parse(text), total_steps=12)
    if steppe.parse(text).when(opt._point([], 0)):
        before = weights(model)
        with pytest.raises(ValueError, match=r"sparse gradient.*sparse=False"):
            step(opt, model, data)
        assert same(weights(model), before)
        assert opt.stats.steps == 0
    else:
        step(opt, model, data)
        assert model.words.weight.grad.is_sparse


@pytest.mark.parametrize("base", [lambda p: SGD(p, lr=0.1), lambda p: SparseAdam(p, lr=0.01)])
def test_sparse_gradients_pass_through_a_step_of_the_base(base):
    ends = []
    for text in (None, "sgd()", "rst(sam(), p=0)"):
        model, data = Bag(), words()
        model.head.requires_grad_(False)
        optimizer = base(model.words.parameters())
        opt = steppe.SharpnessAware(optimizer, steppe.parse(text)) if text else None
        for _ in range(3):
            if opt is None:
                optimizer.zero_grad()
                nets.losses(model, data).mean().backward()
                optimizer.step()
            else:
                step(opt, model, data)
        ends.append(weights(model))
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])


def test_a_sparse_embedding_beside_the_method():
    """What the message does not say but works: another optimizer for the embedding, or a frozen one."""
    model, data = Bag(), words()
    model.words.requires_grad_(False)
    opt = wrap(model, "sam()")
    step(opt, model, data)
    assert opt.stats.sharp == 1


class Phase(nn.Module):
    """A complex weight, held as such or as its real view."""

    def __init__(self, real: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        weight = torch.randn(6, nets.CLASSES, dtype=torch.complex128)
        self.real = real
        self.weight = nn.Parameter(torch.view_as_real(weight).clone() if real else weight)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.view_as_complex(self.weight) if self.real else self.weight
        return (x.to(weight.dtype) @ weight).abs()


def test_complex_parameters_are_refused_when_the_optimizer_is_made():
    with pytest.raises(ValueError, match=r"complex.*view_as_real"):
        wrap(Phase(real=False), "sam()")
    model, data = nets.mlp()
    opt = wrap(model, "sam()")
    with pytest.raises(ValueError, match=r"complex.*view_as_real"):
        opt.add_param_group({"params": Phase(real=False).parameters()})
    assert len(opt.param_groups) == 1
    step(opt, model, data)


@pytest.mark.parametrize("text", ["sam()", "gsam()", "rwp()"])
def test_the_real_view_of_a_complex_parameter_works(text):
    model, data = Phase(real=True), nets.data(6)
    opt = wrap(model, text)
    first = nets.losses(model, data).mean()
    for _ in range(5):
        step(opt, model, data)
    assert nets.losses(model, data).mean() < first


class Split(nn.Module):
    """A body and a head on two devices."""

    def __init__(self, here: torch.device, there: torch.device) -> None:
        super().__init__()
        self.body, _ = nets.mlp()
        self.head = nn.Linear(nets.CLASSES, nets.CLASSES).double()
        self.body.to(here)
        self.head.to(there)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x.to(self.body[0].weight.device))
        return self.head(x.to(self.head.weight.device))


def crossed(model: nn.Module, data: nets.Data) -> Tensor:
    return F.cross_entropy(model(data[0]).to(data[1].device), data[1], reduction="none")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    "text", ["sgd()", "sam()", "asam()", "sam(p=3)", "gsam()", "esam()", "looksam(k=2)", "ssam(refresh=2)"]
)
def test_parameters_on_several_devices(text, turned):
    """The noise of RWP is drawn where the weights are, so its numbers are others."""
    cpu, cuda, ends = torch.device("cpu"), torch.device("cuda"), []
    for places in ((cpu, cpu), (cuda, cpu) if turned else (cpu, cuda)):
        torch.manual_seed(0)
        model, data = Split(*places), nets.mlp()[1]
        opt = wrap(model, text)
        for _ in range(4):
            step(opt, model, data, crossed)
        ends.append([t.cpu() for t in weights(model)])
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-11)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_noise_on_several_devices():
    model, data = Split(torch.device("cuda"), torch.device("cpu")), nets.mlp()[1]
    opt = steppe.SharpnessAware(Adam(model.parameters(), lr=0.01), steppe.rwp())
    for _ in range(4):
        step(opt, model, data, crossed)
    assert all(t.isfinite().all() for t in weights(model))


def test_what_looksam_keeps_is_a_unit_vector_whichever_layers_a_step_uses():
    branches, data = nn.ModuleList([nets.mlp(seed)[0] for seed in (0, 1)]), nets.mlp()[1]
    opt = wrap(branches, "looksam(k=1)")
    for step_number in range(4):
        opt.step(steppe.Batch(branches, lambda m, d, i=step_number % 2: nets.losses(m[i], d), data))
        kept = torch.cat([named["gv"].reshape(-1) for named in opt._memory.values()])
        assert float(kept.norm()) == pytest.approx(1, abs=1e-12)
