"""The bases: the optimizers that take the step, by expressions such as `kfac(lr=0.03, damping=0.01)`."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import steppe
from steppe import optim
from steppe.lab.config import Config

__all__ = ["BASES", "SHARED", "Base", "Values", "build", "check", "cost", "read", "write"]

Values: TypeAlias = dict[str, Any]
"""Arguments of an optimizer by name: numbers, words, True, False or None."""

SHARED = ("lr", "momentum", "weight_decay")
"""Arguments that every base has, and every run keeps as settings of its own."""
BETA2 = 0.999
EXPRESSION = re.compile(r"([\w-]+)\s*(?:\((.*)\))?")
WORDS = {"None": None, "True": True, "False": False}


class Base(NamedTuple):
    """What is said of a base: g is the direction that the method hands over, μ the momentum."""

    update: str
    cost: str
    source: str


BASES: Mapping[str, Base] = {
    "sgd": Base(
        "v ← μv + g + λw,  w ← w − ηv",
        "1 propagation",
        "Polyak 1964, Some methods of speeding up the convergence of iteration methods",
    ),
    "adamw": Base(
        "w ← (1 − ηλ)w − η m̂/(√v̂ + ε),  m̂ and v̂ the running means of g and g², μ = β₁",
        "1 propagation",
        "Loshchilov and Hutter 2019, Decoupled weight decay regularization",
    ),
    "adahessian": Base(
        "w ← (1 − ηλ)w − η m̂/(√v̂ + ε),  v̂ the running mean of D², D ≈ diag H from random probes",
        "1 + 2/n propagations, n = 1",
        "Yao et al. 2021, AdaHessian: An adaptive second order optimizer for machine learning",
    ),
    "kfac": Base(
        "m ← μm + g,  w ← (1 − ηλ)w − sη(F + δI)⁻¹m,  F = G ⊗ A of each layer, s ≤ 1 the trust region",
        "1 + 1/3n propagations, n = 10, and two eigenvalue problems a layer every n_inverse = 100 steps",
        "Martens and Grosse 2015, Optimizing neural networks with Kronecker-factored approximate curvature",
    ),
    "ekfac": Base(
        "kfac's, with the gradients' own second moments in the eigenbasis of G ⊗ A",
        "kfac's",
        "George et al. 2018, Fast approximate natural gradient descent in a Kronecker-factored eigenbasis",
    ),
    "newton-cg": Base(
        "w ← (1 − ηλ)w − ηd,  (B + δI)d = g by conjugate gradients, B the Gauss-Newton matrix",
        "at most 74 propagations, with iterations = 50; for small networks",
        "Martens 2010, Deep learning via Hessian-free optimization",
    ),
}


def read(text: str) -> tuple[str, Values]:
    """Name and arguments of a base's expression, such as `adamw` or `adamw(lr=0.003, weight_decay=0.1)`.

    Raises:
        ValueError: if the text is no such expression, or names no base; the message has the nearest name.
    """
    found = EXPRESSION.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no base such as adamw, or kfac(lr=0.03, damping=0.01)")
    name, inside = found.groups()
    if name not in BASES:
        near = difflib.get_close_matches(name.lower(), BASES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(BASES)}"
        raise ValueError(f"no base is called {name!r}; {hint}")
    values: Values = {}
    for argument in (inside or "").split(",") if (inside or "").strip() else []:
        key, _, value = (word.strip() for word in argument.partition("="))
        if not key.isidentifier() or not value or key in values:
            raise ValueError(f"{text!r}: write each argument of a base once, as lr=0.1")
        values[key] = _value(value)
        if key in SHARED and (isinstance(values[key], bool) or not isinstance(values[key], (int, float))):
            raise ValueError(f"{text!r}: {key} must be a number")
    return name, values


def write(name: str, values: Mapping[str, Any]) -> str:
    """The one expression of a base with arguments: what `read` takes."""
    return f"{name}({', '.join(f'{key}={value}' for key, value in sorted(values.items()))})" if values else name


def build(config: Config, params: Iterable[Tensor]) -> Optimizer:
    """The base of a run.

    Momentum is β1 of adamw and adahessian. Weight decay is decoupled from the gradient but in sgd.

    Args:
        config: of the run.
        params: what is trained.

    Raises:
        ValueError: if the optimizer refuses a value.
        TypeError: if it has no such argument.
    """
    name, own = read(config.base)
    values: Values = {"lr": config.lr, "weight_decay": config.weight_decay, **own}
    match name:
        case "sgd":
            return torch.optim.SGD(params, momentum=config.momentum, **values)
        case "adamw":
            return torch.optim.AdamW(params, betas=(config.momentum, BETA2), **values)
        case "adahessian":
            return optim.AdaHessian(params, betas=(config.momentum, BETA2), seed=config.seed, **values)
        case "newton-cg":
            return optim.NewtonCG(params, **values)
        case _:
            kind: Any = name
            return optim.NaturalGradient(params, fisher=kind, momentum=config.momentum, seed=config.seed, **values)


def check(config: Config) -> None:
    """Refuse what the optimizer of a run would refuse.

    Raises:
        ValueError: if it does, in one line.
    """
    try:
        build(config, [nn.Parameter(torch.zeros(1))])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{config.base}: {error}") from error


def cost(config: Config) -> float:
    """Expected propagations of a step of a run; with newton-cg, at most."""
    method = steppe.parse(config.method)
    base: Any = build(config, [nn.Parameter(torch.zeros(1))])
    return float(base.cost_under(method)) if hasattr(base, "cost_under") else method.cost()


def _value(word: str) -> Any:
    try:
        number = float(word)
    except ValueError:
        return WORDS.get(word, word)
    return int(number) if number.is_integer() and abs(number) < 1e15 else number
