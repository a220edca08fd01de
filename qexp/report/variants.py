"""What tells runs apart: the options of one method, and the keys of two protocols."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from qexp.report.runs import RunRecord

TARGET = "_target_"
# Keys of a protocol that say nothing about a float network.
QUANTIZED_ONLY = ("first_last", "act_sample")
ABSENT = "-"  # of an option that one side does not have
LISTED = 8  # keys that one protocol lacks, by name


def drop_new_options_(runs: Sequence[RunRecord]) -> None:
    """Forget options at their default where other runs of the method did not have them yet.

    Code that adds an option leaves what was there as it was; a run from before is the same
    experiment, another seed of it included. The default is that of the option's class; where it
    has none, off. Another value stays, and tells the rows apart.
    """
    methods: dict[str, list[RunRecord]] = {}
    for run in runs:
        if run.variant:
            methods.setdefault(run.method, []).append(run)
    for group in methods.values():
        everywhere = set.intersection(*(set(run.variant) for run in group))
        for run in group:
            new = [k for k in run.variant if k not in everywhere]
            for key in [k for k in new if _is_default(run.variant, k)]:
                del run.variant[key]


def _is_default(variant: Mapping[str, Any], key: str) -> bool:
    default = default_of(variant, key)
    return not variant[key] if default is ABSENT else variant[key] == default


def default_of(variant: Mapping[str, Any], key: str) -> Any:
    """What the class at `key` does where nobody asks for the option; ABSENT where unknown."""
    part, _, option = key.rpartition(".")
    module, _, name = str(variant.get(f"{part}.{TARGET}", "")).rpartition(".")
    if not module.startswith("qexp."):  # nothing else is imported for a report
        return ABSENT
    try:
        parameters = inspect.signature(getattr(import_module(module), name)).parameters
    except (ImportError, AttributeError, TypeError, ValueError):
        return ABSENT
    default = parameters[option].default if option in parameters else inspect.Parameter.empty
    return ABSENT if default is inspect.Parameter.empty else default


def name_variants(
    variants: Sequence[Mapping[str, Any]], shipped: Mapping[str, Any] | None = None
) -> list[str]:
    """For each variant the options in which it differs from the `shipped` config, `option=value`.

    An option that the shipped config does not know is named where it differs from most of the
    others, and where no value is commonest, where it is not the class's default. A part of another
    class than the shipped one (`quantizer.weight=POST`) is named by it, and its further options are
    compared among parts of that class alone. An option that a variant lacks, as code from before
    had it, is at its class's default; where that is not known, lacking it is the usual and has no
    name.
    """
    shown: list[list[str]] = [[] for _ in variants]
    known = [i for i, variant in enumerate(variants) if variant]  # of a run without config, nothing
    shipped = shipped or {}
    for key in dict.fromkeys(k for variant in variants for k in variant):
        part, _, option = key.rpartition(".")
        named_by_class = option == TARGET
        for alike in [known] if named_by_class else _by_class(variants, part, known):
            values = {i: str(variants[i].get(key, default_of(variants[i], key))) for i in alike}
            ours = shipped.get(f"{part}.{TARGET}")
            same = named_by_class or variants[alike[0]].get(f"{part}.{TARGET}", ours) == ours
            usual = _usual([*values.values()], str(shipped.get(key, ABSENT)) if same else ABSENT)
            if usual is None:
                usual = str(default_of(variants[alike[0]], key))
            for i, value in values.items():
                if value != usual:
                    name = f"{part}={value.rpartition('.')[2]}"
                    shown[i].append(name if named_by_class else f"{key}={value}")
    return [", ".join(options) for options in shown]


def _by_class(
    variants: Sequence[Mapping[str, Any]], part: str, known: Sequence[int]
) -> list[list[int]]:
    """Which of the variants `known` have the same class at `part`."""
    found: dict[str, list[int]] = {}
    for i in known:
        found.setdefault(str(variants[i].get(f"{part}.{TARGET}")), []).append(i)
    return [*found.values()]


def _usual(values: Sequence[str], shipped: str) -> str | None:
    """The value that has no name: none, else the shipped one, else the commonest."""
    if ABSENT in values:
        return ABSENT
    return commonest(values) if shipped == ABSENT else shipped


def commonest(values: Sequence[str]) -> str | None:
    """The value that occurs most; None where two do."""
    ranked = Counter(values).most_common(2)
    if len(ranked) > 1 and ranked[0][1] == ranked[1][1]:
        return None
    return ranked[0][0]


def differences(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], *, is_float: bool = False
) -> dict[str, tuple[Any, Any]]:
    """`{key: (ours, theirs)}` for the keys of two flat protocols that differ."""
    keys = [k for k in dict.fromkeys([*ours, *theirs]) if not (is_float and k in QUANTIZED_ONLY)]
    pairs = {k: (ours.get(k, ABSENT), theirs.get(k, ABSENT)) for k in keys}
    return {k: (a, b) for k, (a, b) in pairs.items() if a != b}


def briefly(differing: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """The keys; of those that one side lacks, as another recipe's do, only how many if many."""
    lacking = [key for key, pair in differing.items() if ABSENT in pair]
    if len(lacking) <= LISTED:
        return [*differing]
    shared = [key for key in differing if key not in lacking]
    return [*shared, f"{len(lacking)} keys that one of them lacks (another recipe)"]
