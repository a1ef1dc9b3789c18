"""The two weight initialisations that the networks share."""

from torch import nn


def he_convolutions(network: nn.Module) -> None:
    """Draw the weights of every convolution from N(0, 2 / fan_out) and zero its bias.

    Args:
        network: changed in place; its other layers stay as they are.

    Source: He et al. 2015, "Delving deep into rectifiers".
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def narrow_linears(network: nn.Module) -> None:
    """Draw the weights of every linear layer from a normal of deviation 0.02 and zero its bias.

    Args:
        network: changed in place; its other layers stay as they are.

    Source: Dosovitskiy et al. 2021 and the code of DeiT (Touvron et al. 2021). The draw is cut at ±2, so in
    practice it is a plain normal.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
