"""Arguments out of range, and methods that exclude each other, are refused in one line that names them."""

from __future__ import annotations

import re

import numpy as np
import pytest
from torch.optim import SGD

import nets
import steppe
from steppe import (
    asam,
    esam,
    esam_sds,
    esam_swp,
    gnr,
    grst,
    gsam,
    gsam_min,
    gsam_penalty,
    linear,
    looksam,
    m_sharpness,
    mixed_sam,
    piecewise,
    rst,
    rwp,
    sam,
    ssam,
    ssam_dynamic,
)

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("build", "name", "value"),
    [
        (build, name, value)
        for build, name, values in [
            (sam, "rho", [-0.1, NAN, INF, "x", None, True]),
            (sam, "p", [1, 0.5, -2, NAN, "x", None, True]),
            (sam, "steps", [0, -1, 1.5, True, None]),
            (asam, "rho", [-0.1, NAN, INF, "x"]),
            (asam, "eta", [-0.1, NAN, INF, "x"]),
            (mixed_sam, "rho", [-0.1, NAN, "x"]),
            (mixed_sam, "alpha", [-0.1, 1.1, NAN, "x"]),
            (gnr, "rho", [-0.1, NAN]),
            (gnr, "strength", [NAN, INF, "x", None]),
            (gsam, "rho", [-0.1, NAN]),
            (gsam, "alpha", [NAN, INF, "x", None]),
            (gsam, "rho_min", [-0.1, 0.06, NAN, "x"]),
            (gsam, "lr_min", [-0.1, NAN, "x"]),
            (gsam_min, "rho", [-0.1, NAN]),
            (gsam_min, "alpha", [NAN, INF, "x"]),
            (gsam_penalty, "rho", [-0.1, NAN]),
            (gsam_penalty, "lam", [NAN, INF, "x", None, True]),
            (looksam, "rho", [-0.1, NAN]),
            (looksam, "alpha", [NAN, INF, "x"]),
            (looksam, "k", [0, -1, 2.5, "x", True]),
            (esam, "rho", [-0.1, NAN]),
            (esam, "beta", [0, -0.1, 1.1, NAN, "x", True]),
            (esam, "gamma", [0, -0.1, 1.1, NAN, "x", True]),
            (esam_swp, "rho", [-0.1, NAN]),
            (esam_swp, "beta", [0, 1.1, NAN]),
            (esam_sds, "rho", [-0.1, NAN]),
            (esam_sds, "gamma", [0, 1.1, NAN]),
            (ssam, "rho", [-0.1, NAN]),
            (ssam, "s", [-0.1, 1, NAN, "x", True]),
            (ssam, "n", [0, 1.5, "x"]),
            (ssam, "refresh", [0, 1.5, "x"]),
            (ssam_dynamic, "rho", [-0.1, NAN]),
            (ssam_dynamic, "s", [-0.1, 1, NAN, "x"]),
            (ssam_dynamic, "drop", [-0.1, 1.1, NAN, "x"]),
            (ssam_dynamic, "refresh", [0, 1.5, "x"]),
            (rwp, "gamma", [-0.1, NAN, INF, "x"]),
            (rwp, "alpha", [-0.1, 1.1, NAN, "x"]),
        ]
        for value in values
    ],
)
def test_arguments_out_of_range_are_named_with_their_value(build, name, value):
    with pytest.raises((ValueError, TypeError)) as caught:
        build(**{name: value})
    message = str(caught.value)
    assert "\n" not in message
    assert name in message
    assert repr(value) in message or re.search(rf"\b{name}=", message)


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: rst(sam(), p=1.1), ValueError, "p=1.1"),
        (lambda: rst(sam(), p=-0.1), ValueError, "p=-0.1"),
        (lambda: rst(sam(), p=NAN), ValueError, "p=nan"),
        (lambda: rst(sam(), p="linear"), TypeError, "schedule"),
        (lambda: rst(sam(), p=sam()), TypeError, "schedule"),
        (lambda: rst(sam(), p=steppe.cosine), TypeError, "schedule"),
        (lambda: rst(sam(), p=lambda progress: 0.5), TypeError, "schedule"),
        (lambda: rst(0.05), TypeError, "recipe"),
        (lambda: rst("sam()"), TypeError, "recipe"),
        (lambda: rst(rst(sam())), ValueError, "coin already"),
        (lambda: grst(sam(), p=1.1), ValueError, "p=1.1"),
        (lambda: grst(sam(), strength=NAN), ValueError, "strength=nan"),
        (lambda: grst(0.05), TypeError, "recipe"),
        (lambda: grst(esam()), ValueError, "Masked.*Amplified"),
        (lambda: m_sharpness(sam(), 0), ValueError, "m=0"),
        (lambda: m_sharpness(sam(), 2.5), ValueError, "m=2.5"),
        (lambda: m_sharpness(0.05, 3), TypeError, "recipe"),
        (lambda: m_sharpness(looksam(), 3), ValueError, "m=3.*Look"),
        (lambda: m_sharpness(ssam(), 3), ValueError, "m=3.*FisherSparse"),
        (lambda: m_sharpness(rwp(other=True), 3), ValueError, "m=3.*Another"),
        (lambda: m_sharpness(m_sharpness(sam(), 5), 3), ValueError, "m="),
        (lambda: piecewise(1.1, 0.5), ValueError, "a=1.1"),
        (lambda: piecewise(0.5, -0.1), ValueError, "b=-0.1"),
        (lambda: linear(1.1, 0), ValueError, "start=1.1"),
        (lambda: linear(0, NAN), ValueError, "end=nan"),
        (lambda: sam(p=3, second_order=True), ValueError, "p=3"),
        (lambda: sam(steps=2, second_order=True), ValueError, "steps=2"),
        (lambda: rwp(alpha=0, other=True), ValueError, "alpha=0"),
        (lambda: gsam(mixed_sam()), ValueError, "gsam.*Mix"),
        (lambda: gsam(rst(sam()), rho_min=0.01), ValueError, "rho_min=0.01.*Coin"),
        (lambda: looksam(gsam()), ValueError, "looksam.*Orthogonal"),
        (lambda: looksam(esam()), ValueError, "Masked.*Look"),
        (lambda: gsam(esam()), ValueError, "Masked.*Orthogonal"),
        (lambda: esam(gsam()), ValueError, "Masked.*Orthogonal"),
        (lambda: esam(rwp()), ValueError, "Masked|selects"),
        (lambda: esam(esam()), ValueError, "Masked"),
        (lambda: esam_sds(esam_sds()), ValueError, "Sharpest"),
        (lambda: ssam(ssam()), ValueError, "FisherSparse"),
        (lambda: ssam(esam()), ValueError, "Masked"),
        (lambda: ssam_dynamic(ssam()), ValueError, "FisherSparse"),
        (lambda: sam(steppe.sgd()), ValueError, "rho="),
    ],
)
def test_what_does_not_go_together_is_refused(build, error, words):
    with pytest.raises(error, match=words) as caught:
        build()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("total", [0, -1, 1.5, NAN, "10", True])
def test_a_length_that_is_no_number_of_steps_is_refused(total):
    model, _ = nets.mlp()
    with pytest.raises(ValueError, match=r"total_steps=.* must be a whole number"):
        steppe.SharpnessAware(SGD(model.parameters(), lr=0.1), sam(), total_steps=total)


def test_numbers_of_numpy_are_numbers():
    model, data = nets.mlp()
    base = SGD([{"params": model.parameters(), "rho": np.float32(0.1)}], lr=0.1)
    opt = steppe.SharpnessAware(base, sam(), total_steps=np.int64(3), clip=np.float32(1))
    opt.step(steppe.Batch(model, nets.losses, data, micro=np.int64(2)))
    assert opt.stats.steps == 1


@pytest.mark.parametrize("micro", [0, 13, 2.0, "2", None])
def test_micro_is_a_whole_number_of_parts(micro):
    model, data = nets.mlp()
    with pytest.raises(ValueError, match=r"micro=.* must be a whole number between 1 and"):
        steppe.Batch(model, nets.losses, data, micro=micro)
