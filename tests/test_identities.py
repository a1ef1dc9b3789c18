"""What must be the same, to the bit where it says so: float64."""

from __future__ import annotations

import copy

import pytest
import torch

import steppe
from nets import convnet, losses, mlp, transformer

NETS = {"mlp": mlp, "convnet": convnet, "transformer": transformer}
BASES = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda params: torch.optim.AdamW(params, lr=3e-3),
}


def run(expression, net, base="sgd", steps=8, loss_fn=losses, micro=1):
    """Return the tensors of the model after some steps of the method; of the bare base where there is none."""
    model, batch = NETS[net]()
    optimizer = BASES[base](model.parameters())
    opt = None
    if expression is not None:
        opt = steppe.SharpnessAware(optimizer, steppe.parse(expression), total_steps=steps, seed=3)
    for _ in range(steps):
        if opt is None:
            optimizer.zero_grad()
            loss_fn(model, batch).mean().backward()
            optimizer.step()
        else:
            one = steppe.Batch(model, loss_fn, batch, micro=micro)
            opt.step(one, steppe.Batch(model, loss_fn, batch) if opt.method.needs_second else None)
    return copy.deepcopy(model.state_dict())


def assert_same(a, b):
    for name in a:
        assert torch.equal(a[name], b[name]), name


AT_ZERO = [
    "sgd()",
    "sam(rho=0)",
    "sam(rho=0, p=inf)",
    "sam(rho=0, p=3)",
    "sam(rho=0, steps=3)",
    "sam(rho=0, second_order=True)",
    "m_sharpness(sam(rho=0), 100)",
    "asam(rho=0)",
    "asam(rho=0, by_name=True)",
    "mixed_sam(rho=0)",
    "gnr(rho=0, strength=2)",
    "gsam(rho=0)",
    "gsam(rho=0, rho_min=0)",
    "gsam_min(rho=0)",
    "gsam_penalty(rho=0)",
    "esam(rho=0)",
    "esam_swp(rho=0)",
    "esam_sds(rho=0)",
    "rwp(gamma=0)",
    "rwp(gamma=0, alpha=0)",
    "rwp(gamma=0, other=True)",
    "rst(sam(rho=0), p=0.5)",
    "grst(gsam(rho=0), p=0.5, strength=2)",
    "looksam(rho=0)",
    "ssam(rho=0, refresh=2)",
    "ssam_dynamic(rho=0, refresh=2)",
    "rst(sam(), p=0)",
    "rst(esam(), p=0)",
    "rst(looksam(), p=0)",
    "grst(gsam(), p=0)",
    "mixed_sam(alpha=1)",
    "gnr(strength=0)",
]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("expression", AT_ZERO)
def test_no_perturbation_is_the_base_bitwise(expression, net, base):
    assert_same(run(expression, net, base), run(None, net, base))


@pytest.mark.parametrize("size", [1, 2, 10, 11, 12, 23])
@pytest.mark.parametrize("mean", [False, True], ids=["losses", "mean"])
def test_the_gradient_is_that_of_the_mean_loss_bitwise(size, mean):
    model, data = mlp()
    batch = tuple(torch.cat([each] * 4)[:size] for each in data)
    losses(model, batch).mean().backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    loss_fn = (lambda *given: losses(*given).mean()) if mean else losses
    steppe.Batch(model, loss_fn, batch).backward(None)
    for p, g in zip(model.parameters(), expected, strict=True):
        assert torch.equal(p.grad, g)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(
    "expression",
    [
        "mixed_sam(alpha=0)",
        "gsam(alpha=0)",
        "gsam_penalty(lam=0)",
        "gnr(strength=1)",
        "esam(beta=1, gamma=1)",
        "esam_swp(beta=1)",
        "esam_sds(gamma=1)",
        "rst(sam(), p=1)",
        "grst(sam(), p=1, strength=1)",
        "sam(steps=1)",
        "sam(p=2)",
        "m_sharpness(sam(), 12)",
        "looksam(k=1)",
        "ssam(s=0, refresh=2)",
        "ssam_dynamic(s=0, refresh=2)",
    ],
)
def test_special_cases_are_sam_bitwise(expression, net):
    assert_same(run(expression, net), run("sam()", net))


def test_sam_is_not_the_base():
    a, b = run("sam(rho=0.5)", "mlp"), run(None, "mlp")
    assert any(not torch.allclose(a[name], b[name], atol=1e-4) for name in a)


EVERY = ["sam()", "asam()", "gsam()", "esam()", "rwp()", "looksam(k=2)", "grst(sam())", "ssam(refresh=2)"]


@pytest.mark.parametrize("net", ["mlp", "transformer"])
@pytest.mark.parametrize("expression", ["sgd()", *EVERY, "sam(second_order=True)", "sam(steps=2)"])
def test_four_micro_batches_equal_one_batch(expression, net):
    a, b = run(expression, net, micro=4), run(expression, net)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("expression", EVERY)
def test_scaling_the_loss_scales_nothing_but_the_gradient(expression, net):
    model, batch = NETS[net]()
    twin = copy.deepcopy(model)
    method = steppe.parse(expression)
    for network, scale in ((model, 1.0), (twin, 1024.0)):
        base = torch.optim.SGD(network.parameters(), lr=0.1 / scale, momentum=0.9)
        opt = steppe.SharpnessAware(base, method, total_steps=6)
        for _ in range(6):
            opt.step(steppe.Batch(network, lambda m, b, s=scale: losses(m, b) * s, batch))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p.grad * 1024, q.grad)


def test_the_ball_is_as_large_as_asked():
    model, batch = mlp()
    weights = [p.detach().clone() for p in model.parameters()]
    moved = []

    def watched(network, data):
        moved.append([(p.detach() - w) for p, w in zip(network.parameters(), weights, strict=True)])
        return losses(network, data)

    for expression, p in (("sam(rho=0.3)", 2), ("sam(rho=0.3, p=3)", 3), ("sam(rho=0.3, p=inf)", torch.inf)):
        moved.clear()
        opt = steppe.SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.0), steppe.parse(expression))
        opt.step(steppe.Batch(model, watched, batch))
        flat = torch.cat([m.flatten() for m in moved[1]])
        assert float(torch.linalg.vector_norm(flat, p)) == pytest.approx(0.3, abs=1e-12)


@pytest.mark.parametrize("p", [1.01, 1.1, 1.5, 3, torch.inf])
@pytest.mark.parametrize("scale", [1e-4, 1, 1e5])
def test_the_ball_does_not_depend_on_the_size_of_the_gradient(p, scale):
    """For p near 1, ε has |g| to a power of 1/(p − 1): beyond float32 unless the largest entry is made 1."""
    model, (x, y) = mlp()
    model, x = model.float(), x.float()
    weights, moved = [w.detach().clone() for w in model.parameters()], []

    def watched(network, data):
        moved.append([(q.detach() - w).double() for q, w in zip(network.parameters(), weights, strict=True)])
        return scale * losses(network, data)

    opt = steppe.SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.0), steppe.sam(0.3, p=p))
    opt.step(steppe.Batch(model, watched, (x, y)))
    flat = torch.cat([m.flatten() for m in moved[1]])
    assert float(torch.linalg.vector_norm(flat, p)) == pytest.approx(0.3, rel=1e-3)


@pytest.mark.parametrize("size", [10, 11, 12, 23])
def test_the_loss_returned_is_a_mean_loss_of_the_users_own_bitwise(size):
    model, (x, y) = mlp()
    batch = torch.cat([x, x])[:size], torch.cat([y, y])[:size]
    opt = steppe.SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), steppe.sam())
    expected = losses(model, batch).mean().detach()
    found = opt.step(steppe.Batch(model, lambda *given: losses(*given).mean(), batch))
    assert torch.equal(found, expected)
    assert found.shape == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 5])
def test_looksam_has_no_direction_where_both_gradients_are_parallel(dtype, size):
    """On an isotropic quadratic, what is left across g0 is rounding: it has a direction only if it is normalised."""
    torch.manual_seed(size)
    w = torch.nn.Parameter(torch.randn(size, dtype=dtype))
    model = torch.nn.ParameterList([w])
    opt = steppe.SharpnessAware(torch.optim.SGD([w], lr=0.1), steppe.looksam(k=2))
    for i in range(4):
        before = w.detach().clone()
        opt.step(steppe.Batch(model, lambda m, x: x + m[0].square().sum() / 2, torch.zeros(2, dtype=dtype)))
        if i % 2:
            torch.testing.assert_close(w.grad, before)
