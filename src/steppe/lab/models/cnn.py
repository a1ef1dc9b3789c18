"""A small convolutional network for the scikit-learn digits."""

from torch import nn


class CNN(nn.Sequential):
    """Three convolutions, the last two strided, and a linear head: small enough to train on a CPU.

    Args:
        classes: number of logits.
        channels: channels of the images, which are (B, channels, H, W) with H, W ≥ 4.
        width: channels after the first convolution; the second and third have twice and four times as many.

    Cost: 24 058 parameters and 0.16 M multiply-adds for an 8×8 image of one channel at width 16.
    """

    def __init__(self, classes: int = 10, channels: int = 1, width: int = 16) -> None:
        super().__init__(
            *_convolution(channels, width, stride=1),
            *_convolution(width, 2 * width, stride=2),
            *_convolution(2 * width, 4 * width, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * width, classes),
        )


def _convolution(before: int, after: int, stride: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    conv = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
    return conv, nn.BatchNorm2d(after), nn.ReLU(inplace=True)
