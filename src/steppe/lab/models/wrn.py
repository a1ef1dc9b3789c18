"""Wide residual networks for small images."""

import torch.nn.functional as F
from torch import Tensor, nn

from steppe.lab.models.init import he_convolutions


class WideResNet(nn.Module):
    """WRN-depth-width: three stages of pre-activation basic blocks, without dropout.

    Args:
        depth: 6n + 4 for n blocks a stage.
        classes: number of logits.
        channels: channels of the images, which are (B, channels, H, W) with H, W ≥ 4.
        width: widening factor k; the stages have 16k, 32k and 64k channels.

    Raises:
        ValueError: if depth is not 6n + 4 with n ≥ 1.

    Cost: 11.0 M parameters for WRN-16-8, 36.5 M for WRN-28-10.
    Source: Zagoruyko & Komodakis 2016, "Wide residual networks".
    """

    def __init__(self, depth: int = 28, classes: int = 10, channels: int = 3, width: int = 10) -> None:
        super().__init__()
        count, rest = divmod(depth - 4, 6)
        if rest or count < 1:
            raise ValueError(f"WideResNet: depth must be 6n + 4 with n ≥ 1, such as 16 or 28, got {depth}")
        self.stem = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        blocks = []
        before = 16
        for stage, after in enumerate([16 * width, 32 * width, 64 * width]):
            for i in range(count):
                blocks.append(_Block(before, after, stride=2 if stage > 0 and i == 0 else 1))
                before = after
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(before)
        self.head = nn.Linear(before, classes)
        he_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, classes) of images (B, channels, H, W)."""
        x = F.relu(self.norm(self.blocks(self.stem(images))), inplace=True)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class _Block(nn.Module):
    """BN-ReLU-conv twice; where the shape changes, the shortcut is a 1×1 convolution of the activation."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or before != after:
            self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x), inplace=True)
        hidden = F.relu(self.norm2(self.conv1(active)), inplace=True)
        kept = x if self.shortcut is None else self.shortcut(active)
        out: Tensor = kept + self.conv2(hidden)
        return out
