"""K-FAC and EKFAC beside curvlinops 3.0.1, on networks without norm layers, which it does not know."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fisher_blocks import dense, estimated, gap, made, normal

curvlinops = pytest.importorskip("curvlinops")
THEIRS = {False: curvlinops.KFACLinearOperator, True: curvlinops.EKFACLinearOperator}


class Tokens(nn.Module):
    """Linear layers on tokens, then their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(x)).mean(1))


NETS = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 4, bias=False), nn.Tanh())
        .append(nn.Linear(4, 3)),
        (4,),
    ),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding="same"), nn.ReLU(inplace=True), nn.Conv2d(3, 4, (2, 3), stride=2, bias=False)
        ).extend([nn.GELU(), nn.Flatten(), nn.Linear(36, 3)]),
        (2, 6, 7),
    ),
    "tokens": (Tokens, (3, 4)),
}  # fmt: skip


def theirs(model: nn.Module, x: Tensor, labels: Tensor, corrected: bool, **how: str) -> Tensor:
    params = list(model.parameters())
    found = THEIRS[corrected](
        model,
        nn.CrossEntropyLoss(),
        params,
        [(x, labels)],
        check_deterministic=False,
        separate_weight_and_bias=False,
        **how,
    )
    return found @ torch.eye(sum(p.numel() for p in params), dtype=torch.float64)


@pytest.mark.parametrize("corrected", [False, True], ids=["kfac", "ekfac"])
@pytest.mark.parametrize("kind", ["type-2", "empirical"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", NETS)
def test_all_blocks(name, sharing, kind, corrected):
    build, shape = NETS[name]
    model, x, labels = made(build), normal(30, *shape), torch.arange(30) % 3
    wanted = theirs(model, x, labels, corrected, fisher_type=kind, kfac_approx=sharing)
    how = {"labels": labels} if kind == "empirical" else {}
    mine = [dense(*each) for each in estimated(model, x, corrected=corrected, sharing=sharing, **how)]
    assert gap(torch.block_diag(*mine), wanted) < 1e-6
