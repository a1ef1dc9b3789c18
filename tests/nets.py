"""Three tiny float64 networks with data; no parameter's gradient is zero but for rounding."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Data = tuple[Tensor, Tensor]
B, CLASSES = 12, 3


def losses(model: nn.Module, batch: Data) -> Tensor:
    """Cross entropy of each example, shape (B,)."""
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="none")


def mlp(seed: int = 0) -> tuple[nn.Module, Data]:
    """6 - 8 - 8 - 3 with tanh."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES))
        return model.double(), data(6)


def convnet(seed: int = 0) -> tuple[nn.Module, Data]:
    """Two convolutions with BatchNorm (so without bias), mean pooling, a linear head."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.GELU(),
            nn.Conv2d(4, 5, 3, stride=2, bias=False),
            nn.BatchNorm2d(5),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(5, CLASSES),
        )
        return model.double(), data(2, 6, 6)


def transformer(seed: int = 0) -> tuple[nn.Module, Data]:
    """One pre-norm block on 5 continuous tokens of 6 numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Transformer(tokens=5, features=6, width=8, heads=2, depth=1)
        return model.double(), data(5, 6)


def data(*shape: int) -> Data:
    """B standard normal inputs of the given shape, with random labels."""
    return torch.randn(B, *shape, dtype=torch.float64), torch.randint(CLASSES, (B,))


class Transformer(nn.Module):
    """Linear embedding, positions, blocks, mean over tokens, head."""

    def __init__(self, tokens: int, features: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.positions = nn.Parameter(0.1 * torch.randn(tokens, width))
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.embed(x) + self.positions)
        return self.head(self.norm(x).mean(dim=1))


class Block(nn.Module):
    """Attention by hand (differentiable twice everywhere; a key bias would have no gradient), then an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, tokens, width / heads)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = self.split(self.query(h)), self.split(self.key(h)), self.split(self.value(h))
        attention = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
        x = x + self.out((attention @ v).transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norm2(x))
