"""Residual networks for small images: ResNet-18 and ResNet-20."""

import torch.nn.functional as F
from torch import Tensor, nn

from steppe.lab.models.init import he_convolutions


class _ResNet(nn.Module):
    """A 3×3 stem, stages of basic blocks each with twice the channels of the one before, a linear head."""

    def __init__(self, classes: int, channels: int, width: int, stages: int, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        layers = []
        before = width
        for stage in range(stages):
            after = width * 2**stage
            layers.append(_Block(before, after, stride=1 if stage == 0 else 2))
            layers += [_Block(after, after) for _ in range(blocks - 1)]
            before = after
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(before, classes)
        he_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, classes) of images (B, channels, H, W)."""
        x = F.relu(self.norm(self.stem(images)), inplace=True)
        logits: Tensor = self.head(self.blocks(x).mean((2, 3)))
        return logits


class ResNet18(_ResNet):
    """ResNet-18 in its CIFAR form: a 3×3 stem, no max-pooling, four stages of two basic blocks.

    Args:
        classes: number of logits.
        channels: channels of the images, which are (B, channels, H, W) with H, W ≥ 8.
        width: channels of the stem and the first stage; each later stage doubles them.

    Cost: 11.2 M parameters and 0.56 G multiply-adds for a 32×32 image at width 64.
    Source: He et al. 2016, "Deep residual learning for image recognition".
    """

    def __init__(self, classes: int = 10, channels: int = 3, width: int = 64) -> None:
        super().__init__(classes, channels, width, stages=4, blocks=2)


class ResNet20(_ResNet):
    """The paper's ResNet-20 for CIFAR: three stages of three basic blocks, with 1×1 convolutions as shortcuts.

    Args:
        classes: number of logits.
        channels: channels of the images, which are (B, channels, H, W) with H, W ≥ 4.
        width: channels of the stem and the first stage; each later stage doubles them.

    Cost: 0.27 M parameters and 0.041 G multiply-adds for a 32×32 image at width 16.
    Source: He et al. 2016, "Deep residual learning for image recognition", section 4.2; shortcuts of its option B.
    """

    def __init__(self, classes: int = 10, channels: int = 3, width: int = 16) -> None:
        super().__init__(classes, channels, width, stages=3, blocks=3)


class _Pointwise(nn.Conv2d):
    """A strided 1×1 convolution of few channels: torch's backward pass (2.13, CPU) writes beyond its memory there."""

    def forward(self, x: Tensor) -> Tensor:
        down, across = self.stride
        return F.conv2d(x[:, :, ::down, ::across], self.weight)


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
            pointwise = nn.Conv2d if before >= 8 else _Pointwise
            self.shortcut.append(pointwise(before, after, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.shortcut(x) + self.norm2(self.conv2(hidden)), inplace=True)
