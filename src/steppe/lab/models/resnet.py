"""ResNet-18 for small images."""

import torch.nn.functional as F
from torch import Tensor, nn

from steppe.lab.models.init import he_convolutions


class ResNet18(nn.Module):
    """ResNet-18 in its CIFAR form: a 3×3 stem, no max-pooling, four stages of two basic blocks.

    Args:
        classes: number of logits.
        channels: channels of the images, which are (B, channels, H, W) with H, W ≥ 8.
        width: channels of the stem and the first stage; each later stage doubles them.

    Cost: 11.2 M parameters and 0.56 G multiply-adds for a 32×32 image at width 64.
    Source: He et al. 2016, "Deep residual learning for image recognition".
    """

    def __init__(self, classes: int = 10, channels: int = 3, width: int = 64) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.stem = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        blocks = []
        before = width
        for stage, after in enumerate(widths):
            blocks += [_Block(before, after, stride=1 if stage == 0 else 2), _Block(after, after)]
            before = after
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(before, classes)
        he_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, classes) of images (B, channels, H, W)."""
        x = F.relu(self.norm(self.stem(images)), inplace=True)
        logits: Tensor = self.head(self.blocks(x).mean((2, 3)))
        return logits


class _Block(nn.Module):
    """Conv-BN-ReLU-conv-BN, added to a shortcut that is a 1×1 convolution where the shape changes."""

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.shortcut = nn.Sequential()
        if stride != 1 or before != after:
            self.shortcut.append(nn.Conv2d(before, after, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.shortcut(x) + self.norm2(self.conv2(hidden)), inplace=True)
