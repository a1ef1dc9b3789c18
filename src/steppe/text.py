"""Read a method from its expression: the inverse of ``repr``."""

from __future__ import annotations

import ast
import difflib
import inspect
import math
from typing import Any

from . import recipes
from .method import Method


def parse(text: str) -> Method:
    """Return the method that an expression over the recipes' names builds, such as ``rst(esam(rho=0.05), p=0.5)``.

    The syntax tree is walked over calls, numbers, True, False, None and inf; nothing is evaluated. A recipe without
    parentheses stands for its defaults.

    Args:
        text: the expression.

    Raises:
        ValueError: if the text does not parse, names no recipe or argument, or the recipe refuses a value; the
            message has the text with a caret under the place, and the nearest right name.
        TypeError: if ``text`` is no string.
    """
    if not isinstance(text, str):
        raise TypeError(f"parse takes the text of a method, not {type(text).__name__}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise _error(
            text, (error.offset or 1) - 1, 1, "this is no method expression such as rst(sam(), p=0.5)"
        ) from None
    value = _build(text, tree)
    if not isinstance(value, Method):
        raise _error_at(text, tree, f"this is {value!r}, and not a method")
    return value


def _build(text: str, node: ast.expr) -> Any:
    match node:
        case ast.Call(func=ast.Name(id=name)):
            function = _recipe(text, node.func, name)
            args = [_build(text, arg) for arg in node.args]
            kwargs = {}
            for keyword in node.keywords:
                if keyword.arg is None:
                    raise _error_at(text, keyword.value, "write the arguments out")
                _check_argument(text, keyword, function)
                kwargs[keyword.arg] = _build(text, keyword.value)
            try:
                return function(*args, **kwargs)
            except (ValueError, TypeError, AttributeError) as error:
                raise _error_at(text, node, str(error)) from None
        case ast.Name(id="inf"):
            return math.inf
        case ast.Name(id=name):
            function = _recipe(text, node, name)
            try:
                return function()
            except TypeError as error:
                raise _error_at(text, node, str(error)) from None
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = _build(text, operand)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return -value
        case ast.Constant(value=value) if value is None or isinstance(value, (bool, int, float)):
            return value
    raise _error_at(text, node, "only recipes, numbers, True, False, None and inf may stand here")


def _recipe(text: str, node: ast.expr, name: str) -> Any:
    if name not in recipes.__all__:
        raise _error_at(text, node, f"no recipe is called {name!r}{_nearest(name, recipes.__all__)}")
    return getattr(recipes, name)


def _check_argument(text: str, keyword: ast.keyword, function: Any) -> None:
    names = list(inspect.signature(function).parameters)
    if keyword.arg not in names:
        assert keyword.arg is not None
        what = f"{function.__name__} has no argument {keyword.arg!r}{_nearest(keyword.arg, names)}"
        raise _error(text, _column(text, keyword), len(keyword.arg), what)


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(names)}"


def _column(text: str, node: ast.expr | ast.keyword) -> int:
    stripped = text.strip()
    return len(stripped.encode()[: node.col_offset].decode())


def _error_at(text: str, node: ast.expr, what: str) -> ValueError:
    start = _column(text, node)
    end = len(text.strip().encode()[: node.end_col_offset].decode())
    return _error(text, start, end - start, what)


def _error(text: str, column: int, width: int, what: str) -> ValueError:
    return ValueError(f"{what}\n  {text.strip()}\n  {' ' * column}{'^' * max(1, width)}")
