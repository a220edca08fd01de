"""Mappings from YAML against signatures: unknown keys, missing keys, wrong types, in words.

A `Signature` is read from a dataclass or from a callable's parameters and annotations;
`against` compares a mapping with one; `says(4.5, int)` -> "an integer" is the rule for a value.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

from qexp.errors import did_you_mean


@dataclasses.dataclass
class Signature:
    """Names, types and which are required."""

    hints: dict[str, Any]
    required: set[str]
    open: bool = False  # takes **kwargs

    @classmethod
    def of_dataclass(cls, schema: type) -> Signature:
        required = {
            f.name
            for f in dataclasses.fields(schema)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        return cls({f: type_hints(schema).get(f, Any) for f in _names(schema)}, required)

    @classmethod
    def of_callable(cls, target: Callable[..., Any]) -> Signature:
        parameters, is_open = parameters_of(target)
        hints = type_hints(target)
        required = {p.name for p in parameters if p.default is inspect.Parameter.empty}
        return cls({p.name: hints.get(p.name, Any) for p in parameters}, required, is_open)

    def without(self, names: set[str]) -> Signature:
        hints = {name: hint for name, hint in self.hints.items() if name not in names}
        return Signature(hints, self.required - names, self.open)


def _names(schema: type) -> list[str]:
    return [f.name for f in dataclasses.fields(schema)]


def against(
    node: Mapping[str, Any], signature: Signature, path: str, owner: str = ""
) -> Iterator[str]:
    """Lines for unknown keys, missing keys and wrong types of `node`."""
    dot = f"{path}." if path else ""
    for key, value in node.items():
        if key in signature.hints:
            hint = signature.hints[key]
            nested = _of_mapping(value, hint)
            if nested is not None:
                yield from against(value, nested, f"{dot}{key}")
                continue
            wanted = says(value, hint)
            if wanted:
                given = f"{value!r} ({type(value).__name__})"
                yield f"config: {dot}{key} must be {wanted}, got {given}."
        elif not signature.open:
            yield unknown_key(f"{dot}{key}", list(signature.hints), owner)
    for key in sorted(signature.required - set(node)):
        yield f"config: {dot}{key} is missing. Set {dot}{key}=..."


def _of_mapping(value: Any, hint: Any) -> Signature | None:
    """What `hint` says of the keys of `value`, if that is a mapping and no node of its own."""
    if not isinstance(value, Mapping) or "_target_" in value:
        return None
    for member in _members(hint) or (hint,):
        if is_node(member):
            return Signature.of_dataclass(member)
        if typing.get_origin(member) is Mapping:
            return Signature(dict.fromkeys(value, typing.get_args(member)[1]), set())
    return None


def unknown_key(path: str, known: list[str], owner: str = "") -> str:
    """The line about a key that is not there, with those that are."""
    parent, _, key = path.rpartition(".")
    name = owner or parent.rpartition(".")[2] or "it"
    options = ", ".join(sorted(known)) or "no keys"
    return f"config: no key '{path}' ({name} has: {options}).{did_you_mean(key, known)}"


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

    Knows int, float, bool, str, Path, None, Literal, unions, sequences, mappings and
    dataclasses. Anything else, and every nested `_target_`, is left to the code that receives it.
    """
    if isinstance(value, Mapping) and "_target_" in value:
        return None
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if members := _members(hint):
        problems = [says(value, member) for member in members]
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
    if kind in (Mapping, dict) or is_node(kind):
        return None if isinstance(value, Mapping) else "a mapping"
    return None


def members(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type that it is."""
    return _members(hint) or (hint,)


def _members(hint: Any) -> tuple[Any, ...]:
    """The types of a union; none of anything else."""
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else ()


def is_node(hint: Any) -> bool:
    """Whether `hint` is a dataclass, written in YAML as a mapping of its fields."""
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


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


def missing_keys(node: Any, path: str = "") -> Iterator[str]:
    """Dotted keys whose value is `???`."""
    for key, value in node.items() if isinstance(node, Mapping) else ():
        if value == "???":
            yield f"{path}{key}"
        yield from missing_keys(value, f"{path}{key}.")
