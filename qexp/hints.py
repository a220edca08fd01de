"""Type hints read as rules for YAML values: `says(4.5, int)` -> "an integer"."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}


def type_hints(target: Any) -> dict[str, Any]:
    """Resolved annotations of a class's `__init__`, a dataclass or a function; else none."""
    own = isinstance(target, type) and "__dataclass_fields__" not in target.__dict__
    try:
        return typing.get_type_hints(target.__init__ if own else target)
    except (NameError, TypeError, AttributeError):
        return {}  # annotations of someone else's code that name things only a type checker sees


def parameters_of(target: Callable[..., Any]) -> tuple[list[inspect.Parameter], bool]:
    """The parameters that can be given by name, and whether `**kwargs` takes any other."""
    try:
        every = list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):
        return [], True  # builtin without a signature
    named = [p for p in every if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return named, any(p.kind is p.VAR_KEYWORD for p in every)


def says(value: Any, hint: Any) -> str | None:
    """What `hint` asks for, in words, when `value` is something else; None when it fits.

    Knows int, float, bool, str, Path, None, Literal, unions, sequences and mappings. Anything
    else, and every nested `_target_`, is left to the code that receives it.
    """
    if isinstance(value, Mapping) and "_target_" in value:
        return None
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        problems = [says(value, argument) for argument in arguments]
        return None if None in problems else " or ".join(dict.fromkeys(p for p in problems if p))
    if origin is Literal:
        fits = any(value == a and type(value) is type(a) for a in arguments)
        return None if fits else "one of " + ", ".join(dict.fromkeys(str(a) for a in arguments))
    if hint is None or hint is type(None):
        return None if value is None else "null"
    if hint is Path:
        hint = str
    if hint in NAMES:
        return None if _is(value, hint) else NAMES[hint]
    kind = origin or hint
    if isinstance(kind, type) and kind in (Sequence, list, tuple):
        return _sequence(value, arguments)
    if kind in (Mapping, dict):
        return None if isinstance(value, Mapping) else "a mapping"
    return None


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _sequence(value: Any, arguments: tuple[Any, ...]) -> str | None:
    if not isinstance(value, (list, tuple)):
        return "a list"
    items = [a for a in arguments if a is not Ellipsis]
    for index, item in enumerate(value):
        hint = items[min(index, len(items) - 1)] if items else Any
        problem = says(item, hint)
        if problem:
            return f"a list, each {problem.removeprefix('a ').removeprefix('an ')}"
    return None
