"""MLP-Mixer for small images."""

from torch import Tensor, nn

from steppe.lab.models.init import narrow_linears


class Mixer(nn.Module):
    """MLP-Mixer: blocks that mix the 4×4 patches of each channel, then the channels of each patch.

    The token MLP is width / 2 wide and the channel MLP 4 width: the proportions of Mixer-S.

    Args:
        classes: number of logits.
        channels: channels of the images, which are (B, channels, size, size).
        size: side of the images in pixels, a multiple of the patch.
        width: dimensions of a token, an even number.
        depth: number of blocks.
        patch: side of a patch in pixels.

    Raises:
        ValueError: if width is not positive and even, or size no multiple of patch.

    Cost: 17.1 M parameters at width 512 and depth 8.
    Source: Tolstikhin et al. 2021, "MLP-Mixer: an all-MLP architecture for vision".
    """

    def __init__(
        self,
        classes: int = 10,
        channels: int = 3,
        size: int = 32,
        width: int = 512,
        depth: int = 8,
        patch: int = 4,
    ) -> None:
        super().__init__()
        if width < 2 or width % 2:
            raise ValueError(f"Mixer: width must be positive and even, got {width}")
        if size < patch or size % patch:
            raise ValueError(f"Mixer: the image side must be a positive multiple of the patch {patch}, got {size}")
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.blocks = nn.Sequential(*(_Block((size // patch) ** 2, width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        narrow_linears(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, classes) of images (B, channels, size, size)."""
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits


class _Block(nn.Module):
    """An MLP along the tokens, then one along the channels, each on normalised tokens and added to them."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.across_tokens = _mlp(tokens, width // 2)
        self.norm2 = nn.LayerNorm(width)
        self.across_channels = _mlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.across_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        out: Tensor = x + self.across_channels(self.norm2(x))
        return out


def _mlp(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
