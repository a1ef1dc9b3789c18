"""The global random generators: read, replayed, and left as they were found; and generators of one's own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor

States: TypeAlias = Mapping[torch.device, Tensor]


def states(devices: Iterable[torch.device]) -> States:
    """Return the states of the generators of the CPU, always, and of ``devices``."""
    found = {torch.device("cpu"): torch.get_rng_state()}
    for device in devices:
        if device.type not in ("cpu", "meta"):
            found[device] = torch.get_device_module(device).get_rng_state(*_which(device))
    return found


@contextmanager
def replay(wanted: States) -> Iterator[None]:
    """Draw from ``wanted`` on, then leave the generators as they were found."""
    with kept(wanted):
        put_back(wanted)
        yield


@contextmanager
def kept(devices: Iterable[torch.device]) -> Iterator[None]:
    """Leave the generators of the CPU and of ``devices`` as they were found."""
    found = states(devices)
    try:
        yield
    finally:
        put_back(found)


def put_back(wanted: States) -> None:
    """Let the generators draw from ``wanted`` on."""
    for device, state in wanted.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, *_which(device))


def seeded(text: str, device: torch.device | str) -> torch.Generator:
    """Return a fresh generator, a function of the text."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def _which(device: torch.device) -> list[torch.device]:
    """Return what names the device to its module: MPS has one generator, and no argument for it."""
    return [] if device.type == "mps" else [device]
