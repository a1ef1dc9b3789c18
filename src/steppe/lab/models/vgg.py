"""VGG-16 with batch normalisation, for small images."""

from torch import Tensor, nn

from steppe.lab.models.init import he_convolutions

_STAGES = [(1, 2), (2, 2), (4, 3), (8, 3), (8, 3)]  # (multiple of the width, convolutions)


class VGG16(nn.Module):
    """VGG-16-BN in its CIFAR form: thirteen convolutions in five stages and one linear layer.

    Args:
        classes: number of logits.
        channels: channels of the images, which are (B, channels, H, W) with H, W ≥ 32.
        width: channels of the first stage; the others have 2, 4, 8 and 8 times as many.

    Cost: 14.7 M parameters and 0.31 G multiply-adds for a 32×32 image at width 64.
    Source: Simonyan & Zisserman 2015, configuration D; one linear layer, not three, as is usual on CIFAR.
    """

    def __init__(self, classes: int = 10, channels: int = 3, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = channels
        for multiple, convolutions in _STAGES:
            after = multiple * width
            for _ in range(convolutions):
                layers += [
                    nn.Conv2d(before, after, 3, padding=1),
                    nn.BatchNorm2d(after),
                    nn.ReLU(inplace=True),
                ]
                before = after
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(before, classes)
        he_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, classes) of images (B, channels, H, W)."""
        logits: Tensor = self.head(self.features(images).mean((2, 3)))
        return logits
