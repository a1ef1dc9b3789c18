"""PyramidNet for small images."""

import torch.nn.functional as F
from torch import Tensor, nn

from steppe.lab.models.init import he_convolutions


class PyramidNet(nn.Module):
    """Additive PyramidNet of basic blocks: every block widens a little, instead of each stage at once.

    With N = (depth − 2) / 2 blocks, block k puts out 16 + ⌊k width / N⌋ channels.

    Args:
        depth: 6n + 2 for n blocks in each of the three stages.
        classes: number of logits.
        channels: channels of the images, which are (B, channels, H, W) with H, W ≥ 4.
        width: the widening α: channels gained from the first block to the last.

    Raises:
        ValueError: if depth is not 6n + 2 with n ≥ 1.

    Cost: 28.5 M parameters at depth 110 and α = 270, 1.7 M at α = 48.
    Source: Han, Kim & Kim 2017, "Deep pyramidal residual networks".
    """

    def __init__(self, depth: int = 110, classes: int = 10, channels: int = 3, width: int = 270) -> None:
        super().__init__()
        count, rest = divmod(depth - 2, 6)
        if rest or count < 1:
            raise ValueError(f"PyramidNet: depth must be 6n + 2 with n ≥ 1, such as 110, got {depth}")
        total = 3 * count
        self.stem = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(16)
        blocks = []
        before = 16
        for k in range(total):
            after = 16 + (k + 1) * width // total
            blocks.append(_Block(before, after, stride=2 if k in (count, 2 * count) else 1))
            before = after
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(before)
        self.head = nn.Linear(before, classes)
        he_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, classes) of images (B, channels, H, W)."""
        x = self.blocks(self.stem_norm(self.stem(images)))
        logits: Tensor = self.head(F.relu(self.norm(x), inplace=True).mean((2, 3)))
        return logits


class _Block(nn.Module):
    """BN-conv-BN-ReLU-conv-BN, added to the input: averaged if strided, zero-padded to the new width."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.gain = after - before
        self.norm1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm2(self.conv1(self.norm1(x))), inplace=True)
        kept = x if self.stride == 1 else F.avg_pool2d(x, self.stride, ceil_mode=True)
        out: Tensor = F.pad(kept, (0, 0, 0, 0, 0, self.gain)) + self.norm3(self.conv2(hidden))
        return out
