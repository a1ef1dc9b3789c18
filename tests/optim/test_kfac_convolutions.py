"""K-FAC of convolutions: the patches that meet the kernel, the factors, and damped inverses of both forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fisher_blocks import dense, estimated, fisher, gap, inverse, look, made, normal
from steppe.optim.layers import blocks

CONVOLUTIONS = {
    "1d": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), (2, 9)),
    "1d circular": (lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), (2, 6)),
    "2d": (lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)), (2, 7, 5)),
    "2d same": (lambda: nn.Conv2d(2, 3, (2, 4), padding="same", bias=False), (2, 4, 5)),
    "2d reflect": (lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="reflect"), (2, 4, 5)),
    "2d groups": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 3, 4)),
    "2d depthwise": (lambda: nn.Conv2d(3, 3, 3, dilation=2, padding="same", groups=3, bias=False), (3, 4, 4)),
    "3d": (lambda: nn.Conv3d(2, 3, (2, 1, 2), padding="valid"), (2, 3, 2, 4)),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_patches_of_convolutions(case):
    """In the basis of the weights themselves EKFAC's moments are the diagonal of the exact block."""
    build, shape = CONVOLUTIONS[case]
    model = made(lambda: nn.Sequential(build(), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3, bias=False)))
    x = normal(5, *shape)
    model(x)
    model[3].double()
    known, _ = blocks(model, list(model[0].parameters()), corrected=True)
    (seen,) = look(model, x, known)
    (block,) = known
    basis = [torch.eye(n, dtype=torch.float64).expand(block.groups, n, n) for n in block.width]
    moments = block.rescale(seen, {"QA": basis[0], "QG": basis[1]})
    exact = fisher(model, x, block.params).diag()
    found = torch.cat([t.flatten() for t in block._tensors(moments["moments"], block.params)])
    assert gap(found, exact) < 1e-12


def test_convolution_over_the_whole_image_is_a_linear_layer():
    model = made(lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Tanh(), nn.Linear(4, 3)))
    flat = made(lambda: nn.Sequential(nn.Flatten(), nn.Linear(18, 4), nn.Tanh(), nn.Linear(4, 3)))
    with torch.no_grad():
        for p, q in zip(flat.parameters(), model.parameters(), strict=True):
            p.copy_(q.view_as(p))
    x = normal(6, 2, 3, 3)
    for (one, state), (other, wanted) in zip(estimated(model, x), estimated(flat, x), strict=True):
        assert gap(dense(one, state), dense(other, wanted)) < 1e-12


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("case", ["2d", "2d same", "3d"])
def test_factors_of_convolutions(case, sharing):
    """Against patches taken one at a time, by a convolution with a kernel that is 1 at one place."""
    build, shape = CONVOLUTIONS[case]
    model = made(lambda: nn.Sequential(build(), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3, bias=False)))
    x = normal(5, *shape)
    model(x)
    model[3].double()
    (_, state), _ = estimated(model, x, sharing=sharing)
    conv, size = model[0], model[0].weight[0].numel()
    ones = torch.eye(size, dtype=torch.float64).view(size, *conv.weight.shape[1:])
    padded = F.pad(x, conv._reversed_padding_repeated_twice)
    a = torch.cat([
        getattr(F, f"conv{len(shape) - 1}d")(padded, one[None], stride=conv.stride, dilation=conv.dilation)
        for one in ones
    ], 1).flatten(2)  # fmt: skip
    if conv.bias is not None:
        a = torch.cat([a, torch.ones_like(a[:, :1])], 1)
    a = a.mean(2, keepdim=True) if sharing == "reduce" else a
    assert gap(state["A"][0], (a @ a.mT).mean(0) / a.shape[2]) < 1e-12


def test_groups_are_blocks_of_their_own():
    model = made(lambda: nn.Sequential(nn.Conv1d(4, 6, 1, groups=2), nn.Flatten()))
    ((block, state),) = estimated(model, normal(5, 4, 1), likelihood="gaussian")
    exact = fisher(model, normal(5, 4, 1), block.params, likelihood="gaussian")
    assert gap(dense(block, state), exact) < 1e-12  # two linear layers side by side


@pytest.mark.parametrize("case", ["linear", "2d", "2d groups"])
@pytest.mark.parametrize("form", ["tikhonov", "factored"])
def test_damping(case, form):
    if case == "linear":
        model, x = made(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))), normal(6, 4)
        model[0].bias.requires_grad_(False)
    else:
        build, shape = CONVOLUTIONS[case]
        model, x = made(lambda: nn.Sequential(build(), nn.Tanh(), nn.Flatten())), normal(6, *shape)
    for damping in (1e-3, 0.3):
        block, state = estimated(model, x, damping=damping, form=form)[0]
        found = inverse(block, state, damping)
        if form == "tikhonov":
            F_ = dense(block, state)
            assert gap(found, torch.linalg.inv(F_ + damping * torch.eye(len(F_), dtype=F_.dtype))) < 1e-10
            continue
        A, G = state["A"], state["G"]
        for k in range(block.groups):
            pi = math.sqrt((A[k].trace() / len(A[k])) / (G[k].trace() / len(G[k])))
            left = A[k] + pi * math.sqrt(damping) * torch.eye(len(A[k]), dtype=A.dtype)
            right = G[k] + math.sqrt(damping) / pi * torch.eye(len(G[k]), dtype=A.dtype)
            wanted = torch.kron(torch.linalg.inv(right), torch.linalg.inv(left))
            assert gap(found[order(block, k)][:, order(block, k)], wanted) < 1e-10


def order(block, k: int) -> Tensor:
    """Where the entries of the matrix [W, bias] of a group stand among the block's, row by row."""
    places = torch.arange(sum(p.numel() for p in block.params)).split([p.numel() for p in block.params])
    rows = [at.view(block.groups, block.width[1], -1)[k] for at in places]
    return torch.cat(rows, 1).flatten()
