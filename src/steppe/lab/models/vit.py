"""A vision transformer for small images."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steppe.lab.models.init import narrow_linears

_HEAD = 64  # dimensions of one attention head


class ViT(nn.Module):
    """Vision transformer: pre-norm blocks over 4×4 patches, a class token and learned positions.

    The fused attention kernels have no second derivative; for curvature run it under
    `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`.

    Args:
        classes: number of logits.
        channels: channels of the images, which are (B, channels, size, size).
        size: side of the images in pixels, a multiple of the patch.
        width: dimensions of a token, a multiple of 64: one attention head for every 64.
        depth: number of blocks.
        patch: side of a patch in pixels.

    Raises:
        ValueError: if width is no positive multiple of 64, or size none of patch.

    Cost: 5.4 M parameters at width 192 and depth 12 (ViT-Ti).
    Source: Dosovitskiy et al. 2021, "An image is worth 16×16 words"; ViT-Ti from Touvron et al. 2021.
    """

    def __init__(
        self,
        classes: int = 10,
        channels: int = 3,
        size: int = 32,
        width: int = 192,
        depth: int = 12,
        patch: int = 4,
    ) -> None:
        super().__init__()
        if width < _HEAD or width % _HEAD:
            raise ValueError(f"ViT: width must be a positive multiple of {_HEAD}, the size of a head, got {width}")
        if size < patch or size % patch:
            raise ValueError(f"ViT: the image side must be a positive multiple of the patch {patch}, got {size}")
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.positions, std=0.02)
        narrow_linears(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, classes) of images (B, channels, size, size)."""
        patches = self.embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(images), -1, -1), patches], dim=1) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(tokens)[:, 0]))
        return logits


class _Block(nn.Module):
    """Self-attention, then an MLP four times as wide, each on the normalised tokens and added to them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attend(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out

    def _attend(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, width // _HEAD, _HEAD)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, tokens, 64)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        out: Tensor = self.project(mixed)
        return out
