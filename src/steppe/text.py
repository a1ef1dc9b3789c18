"""Read a method from its expression: the inverse of ``repr``."""

from __future__ import annotations

import ast
import difflib
import inspect
import math
from typing import Any

from . import recipes
from .method import Method

LONGEST = 1000
"""Characters that an expression may have."""


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
    text = text.strip()
    if len(text) > LONGEST:
        raise ValueError(f"the expression of a method has {len(text)} characters; at most {LONGEST} are read")
    try:
        tree = ast.parse(text, mode="eval").body
        value = _build(text, tree)
    except SyntaxError as error:
        place = (error.lineno or 1, (error.offset or 1) - 1)
        raise _error(text, *place, 1, "this is no method expression such as rst(sam(), p=0.5)") from None
    except (RecursionError, MemoryError):
        raise ValueError("the expression is nested too deeply to be a method") from None
    if not isinstance(value, Method):
        raise _error_at(text, tree, f"this is {value!r}, and not a method")
    return value


def _build(text: str, node: ast.expr) -> Any:
    match node:
        case ast.Call(func=ast.Name(id=name)):
            function = _recipe(text, node.func, name)
            args = [_build(text, arg) for arg in node.args]
            kwargs: dict[str, Any] = {}
            for keyword in node.keywords:
                if keyword.arg is None:
                    raise _error_at(text, keyword.value, "write the arguments out")
                _check_argument(text, keyword, function, kwargs)
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


def _check_argument(text: str, keyword: ast.keyword, function: Any, given: dict[str, Any]) -> None:
    names = list(inspect.signature(function).parameters)
    assert keyword.arg is not None
    if keyword.arg not in names:
        what = f"{function.__name__} has no argument {keyword.arg!r}{_nearest(keyword.arg, names)}"
    elif keyword.arg in given:
        what = f"{function.__name__} is given {keyword.arg!r} twice"
    else:
        return
    raise _error(text, keyword.lineno, _column(text, keyword.lineno, keyword.col_offset), len(keyword.arg), what)


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(names)}"


def _column(text: str, line: int, offset: int) -> int:
    """Return the column, in characters, of an offset in bytes."""
    return len(text.split("\n")[line - 1].encode()[:offset].decode(errors="ignore"))


def _error_at(text: str, node: ast.expr, what: str) -> ValueError:
    start = _column(text, node.lineno, node.col_offset)
    end = len(text.split("\n")[node.lineno - 1])
    if node.end_lineno == node.lineno and node.end_col_offset is not None:
        end = _column(text, node.lineno, node.end_col_offset)
    return _error(text, node.lineno, start, end - start, what)


def _error(text: str, line: int, column: int, width: int, what: str) -> ValueError:
    quoted = [*text.split("\n"), ""][line - 1]
    return ValueError(f"{what}\n  {quoted}\n  {' ' * column}{'^' * max(1, width)}")
