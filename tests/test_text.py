"""repr and parse are inverse, parse is safe and says where it hurts, docstrings say what they must."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import re

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import steppe
from recipes_list import EVERY
from steppe import parse, recipes

FUNCTIONS = [getattr(recipes, name) for name in recipes.__all__]
SCHEDULES = {"piecewise", "linear", "cosine", "sine"}
steadily = settings(max_examples=150, deadline=None, derandomize=True, database=None)

unit = st.floats(0, 1) | st.sampled_from([1e-5, 0.5, 0, 1, 0.05])
share = st.floats(0, 1, exclude_min=True) | st.sampled_from([1e-5, 1, 0.3])
positive = st.floats(0, 1e6) | st.sampled_from([1e-5, 0, 3, 1e-300])
real = st.floats(-1e6, 1e6) | st.integers(-5, 5)
whole = st.integers(1, 300)
flag = st.booleans()
schedules = st.one_of(
    st.builds("piecewise({!r}, {!r})".format, unit, unit),
    st.builds("linear({!r}, {!r})".format, unit, unit),
    st.builds("cosine(flipped={!r})".format, flag),
    st.builds("sine({!r})".format, flag),
)
leaves = st.one_of(
    st.just("sgd()"),
    st.builds(
        "sam({!r}, p={!r}, steps={!r})".format, positive, st.floats(1, exclude_min=True) | st.just(math.inf), whole
    ),
    st.builds("sam(rho={!r}, second_order={!r})".format, positive, flag),
    st.builds("asam({!r}, eta={!r}, by_name={!r})".format, positive, positive, flag),
    st.builds("rwp({!r}, alpha={!r}, other={!r})".format, positive, unit, flag),
    st.builds("gsam(alpha={!r}, rho_min={!r})".format, real, st.none() | unit.map(lambda x: x / 20)),
)


def around(inner):
    inner = inner | positive.map(repr)
    return st.one_of(
        st.builds("esam({}, beta={!r}, gamma={!r})".format, inner, share, share),
        st.builds("esam_swp({}, {!r})".format, inner, share),
        st.builds("esam_sds({}, gamma={!r})".format, inner, share),
        st.builds("gnr({}, strength={!r})".format, inner, real),
        st.builds("gsam_min({}, {!r})".format, inner, real),
        st.builds("gsam_penalty(lam={1!r}, rho={0})".format, inner, real),
        st.builds("mixed_sam({}, {!r})".format, inner, unit),
        st.builds("looksam({}, alpha={!r}, k={!r})".format, inner, real, whole),
        st.builds("ssam({}, s={!r}, n={!r})".format, inner, st.floats(0, 1, exclude_max=True), whole),
        st.builds("ssam_dynamic({}, drop={!r}, refresh={!r})".format, inner, unit, whole),
        st.builds("m_sharpness({}, {!r})".format, inner, whole),
        st.builds("rst({}, p={})".format, inner, schedules | unit.map(repr)),
        st.builds("grst({}, {}, strength={!r})".format, inner, schedules | unit.map(repr), real),
    )


def refusal(text: str) -> str:
    with pytest.raises(ValueError, match=r"\S") as caught:
        parse(text)
    return str(caught.value)


def pointed(text: str) -> str:
    """What stands over the carets of the error message."""
    lines = refusal(text).splitlines()
    carets = lines[-1]
    first = carets.index("^")
    assert set(carets.strip()) == {"^"}
    return lines[-2][first : first + carets.count("^")]


@pytest.mark.parametrize("text", EVERY)
def test_parse_is_the_inverse_of_repr(text):
    method = parse(text)
    assert parse(repr(method)) == method
    assert repr(parse(repr(method))) == repr(method)


def test_every_recipe_is_in_the_list():
    named = set(re.findall(r"[a-z_]+(?=\()", " ".join(EVERY)))
    assert named == set(recipes.__all__)
    assert set(recipes.__all__) <= set(steppe.__all__)


def test_repr_leaves_defaults_out():
    assert repr(steppe.sam(0.05, p=2)) == "sam()"
    assert repr(steppe.rst(steppe.esam(steppe.asam(0.5), gamma=0.25), 1)) == "rst(esam(rho=asam(), gamma=0.25), p=1)"
    assert repr(steppe.sam(p=math.inf)) == "sam(p=inf)"
    assert parse("sam") == steppe.sam()


@steadily
@given(st.recursive(leaves, around, max_leaves=4))
def test_parse_is_the_inverse_of_repr_on_generated_nestings(text):
    try:
        method = parse(text)
    except ValueError:
        assume(False)
    assert parse(repr(method)) == method
    assert repr(parse(repr(method))) == repr(method)


def test_numpy_numbers_read_back():
    method = steppe.sam(rho=np.float64(0.1))
    assert parse(repr(method)) == method


tokens = st.sampled_from(
    [*recipes.__all__, *"()[]{},=.:*-+~@'\"\\ \n\t\0#", "rho", "inf", "1e5", "0.5", "lambda", "f'", "**"]
)


@steadily
@given(st.text() | st.lists(tokens, max_size=12).map("".join))
def test_any_text_is_a_method_or_a_value_error(text):
    with contextlib.suppress(ValueError):
        assert isinstance(parse(text), steppe.Method)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "__import__('os').system('touch evaluated')",
        "sam.__class__",
        "sam().when",
        "sam()()",
        "(lambda: sam())()",
        "f'{sam()}'",
        "'sam()'",
        "[sam()][0]",
        "sam() if True else sgd()",
        "sam(rho=0.1*2)",
        "sam(rho=(x := 1))",
        "sam(*[0.1])",
        "sam(**{'rho': 0.1})",
        "sam(rho=0.1, rho=0.2)",
        "sam(0.1, rho=0.2)",
        "sam(0.1, 2, 1, False, 5)",
        "sam(rho=nan)",
        "sam(rho='0.1')",
        "sam(rho=1j)",
        "sam(rho=...)",
        "sam(rho=None)",
        "sam(rho=True)",
        "sam(rho=-sam())",
        "sam(rho=-True)",
        "rst()",
        "rst(0.5)",
        "rst(sam(), p=sam())",
        "esam(linear(0, 1))",
        "linear",
        "cosine()",
        "inf",
        "1",
        "None",
        "sam(); sam()",
        "sam()\nsam()",
        "import os",
        "sam(\0)",
        "\ud800",
        "await sam()",
        "ascent(0.1)",
        "recipes",
    ],
)
def test_what_is_no_method_is_refused(text):
    refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "rst(" * 5000 + "sam()" + ")" * 5000,
        "sam(rho=" + "-" * 100_000 + "1)",
        "sam(" * 150 + ")" * 150,
        "sam(rho=" + "9" * 5000 + ")",
        "sam(rho=1" + "0" * 400 + ")",
        "sam(p=1" + "0" * 400 + ")",
        "gsam(alpha=1" + "0" * 400 + ")",
        "sam(rho=0x" + "f" * 10_000 + ")",
        "a" + ".a" * 100_000,
    ],
    ids=["deep", "signs", "nested", "digits", "rho", "p", "alpha", "hex", "dots"],
)
def test_monstrous_text_is_a_value_error(text):
    refusal(text)


def test_text_must_be_text():
    with pytest.raises(TypeError, match="int"):
        parse(3)


@pytest.mark.parametrize("lead", ["", "   ", "\n  "])
@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("rst(esamm(), p=0.5)", "esamm"),
        ("rst(sam(rh=0.1))", "rh"),
        ("rst(sam(rho=-0.1), p=0.5)", "sam(rho=-0.1)"),
        ("rst(sam(), p='a')", "'a'"),
        ("rst(sam(), p=1 + 1)", "1 + 1"),
        ("sam(**x)", "x"),
        ("linear(0, 1)", "linear(0, 1)"),
        ("rst(\n    esam(beta=2),\n    p=0.5,\n)", "esam(beta=2)"),
        ("rst(\n    esam(),\n    q=0.5,\n)", "q"),
        ("rst(\n    esam(),\n    p=linnear(0, 1),\n)", "linnear"),
        ("rst(sam(rho='é'), p=linnear(0, 1))", "'é'"),
        ("rst('é', sammm)", "'é'"),
        ("rst(é(), p=0.5)", "é"),
    ],
)
def test_the_caret_stands_under_the_place(lead, text, place):
    """One line is quoted, and the carets stand under the part of it that is wrong."""
    assert pointed(lead + text) == place


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("esm()", "'esam'"),
        ("looksm()", "'looksam'"),
        ("rst(gsan())", "'gsam'"),
        ("sam(roh=1)", "'rho'"),
        ("esam(gama=0.5)", "'gamma'"),
        ("rst(sam(), p=lineer(0, 1))", "'linear'"),
    ],
)
def test_the_nearest_name_is_offered(text, near):
    assert f"did you mean {near}?" in refusal(text)


def test_without_a_near_name_all_are_listed():
    assert all(name in refusal("xqzzw()") for name in recipes.__all__)
    assert all(name in refusal("esam(xqzzw=1)") for name in ("rho", "beta", "gamma"))


@pytest.mark.parametrize("name", [n for n in steppe.__all__ if not n.startswith("__")])
def test_public_names_have_docstrings(name):
    value = getattr(steppe, name)
    assert inspect.getdoc(value)
    if inspect.isclass(value):
        for member, function in vars(value).items():
            if not member.startswith("_") and (callable(function) or isinstance(function, property)):
                assert inspect.getdoc(function), f"{name}.{member}"


@pytest.mark.parametrize("function", FUNCTIONS, ids=recipes.__all__)
def test_recipes_are_documented(function):
    text = inspect.getdoc(function)
    head, *sections = re.split(r"^(Args|Raises|Cost|Source):\n", text, flags=re.MULTILINE)
    body = dict(zip(sections[::2], sections[1::2], strict=True))
    parameters = inspect.signature(function).parameters
    assert "\n" not in head.split("\n\n")[0]
    assert any("=" in paragraph for paragraph in head.split("\n\n")[1:]), "no equation"
    assert body["Source"].strip()
    assert ("Cost" in body) == (function.__name__ not in SCHEDULES)
    entries = dict(re.findall(r"^ {4}(\w+): (.+?)(?=^ {4}\w|\Z)", body.get("Args", ""), re.MULTILINE | re.DOTALL))
    assert list(entries) == list(parameters)
    for name, parameter in parameters.items():
        default, entry = parameter.default, " ".join(entries[name].split())
        if default is None:
            assert "None" in entry, name
        elif default is not parameter.empty:
            assert f"Default {default:g}" in entry or f"Default {default}" in entry, f"{name}={default}"


@pytest.mark.parametrize("function", [f for f in FUNCTIONS if f.__name__ not in SCHEDULES], ids=lambda f: f.__name__)
def test_the_stated_cost_is_the_cost(function):
    """A figure "… at the defaults", or in front, is what ``cost`` returns."""
    paragraph = re.split(r"^Cost:\n", inspect.getdoc(function), flags=re.MULTILINE)[1].split("\n\n")[0]
    required = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    stated = re.search(r"([\d.]+) (?:at the defaults|around SAM)", paragraph) or re.match(
        r"\s*([\d.]+) propagations?[.;]", paragraph
    )
    if stated:
        method = function(*([steppe.sam()] if required else []))
        assert method.cost(128) == pytest.approx(float(stated[1]), abs=0.005)


def test_a_method_changed_by_hand_is_no_longer_called_what_it_was():
    method = dataclasses.replace(steppe.sam(), m=4)
    parts = "when=Always(rho=0.05), perturb=Ascent(p=2.0, steps=1), combine=Second(), select=None, m=4"
    assert repr(method) == f"Method({parts})"
    by_hand = steppe.rst(steppe.sam(), p=steppe.parts.Linear(0.0, 1.0))
    assert repr(by_hand) == "rst(sam(), p=Linear(start=0.0, end=1.0))"
    assert dataclasses.replace(steppe.linear(0, 1), end=0.5) == steppe.linear(0, 0.5)
