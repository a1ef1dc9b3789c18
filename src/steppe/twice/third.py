"""What is made for two derivatives has no third."""

from __future__ import annotations

import torch


def refuse_third() -> None:
    """Refuse a graph of the second derivative, which would be wrong: it would miss what was not recorded.

    Raises:
        RuntimeError: if there is to be one.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("there is no third derivative here: no create_graph=True in the second backward")
