"""Protocols: which one a row is shown under, what to call it, in which keys two differ.

A table of a report holds the rows of one protocol. Some rows have none of their own: a float
network that was trained like the others asks nothing of `QUANTIZED_ONLY`; a float start has another
recipe by design; a run that did not end recorded none, but its config holds the same recipe. Each
joins the largest table that it belongs to.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qexp.report.rows import Row, Table
from qexp.report.runs import NOT_EXPERIMENT, RunRecord, at, flatten
from qexp.report.variants import ABSENT, QUANTIZED_ONLY, commonest, differences

BUDGET = ("epochs", "images", "iterations")  # said of every protocol that has them
# What a key stood for before results recorded it.
BEFORE = {"act_sample": "stride", "augment": False}
ALWAYS = ("lr", "amp", "act_sample")  # said where they differ; others only where out of the usual
NAMED = 8  # keys of a heading; the table of differences has all
SECTIONS = ("dataset", "recipe")  # of a config, what makes the protocol
SHORT = {True: "on", False: "off", None: "none"}


@dataclass(frozen=True)
class Differing:
    """The protocols of one recipe, and the keys in which they differ.

    Attributes:
        subject: data set, model and recipe.
        tables: positions of their tables, from 1.
        values: for each key, its value in each of the tables.
    """

    subject: str
    tables: list[int]
    hashes: list[str]
    values: dict[str, list[str]]

    def lines(self) -> list[list[str]]:
        """As a table: its head, then a line for each protocol."""
        told = [[str(number) for number in self.tables], self.hashes, *self.values.values()]
        return [["table", "protocol", *self.values], *map(list, zip(*told, strict=True))]


def place(rows: Sequence[Row]) -> list[str]:
    """For each row the key of the table it is shown in: mostly its own protocol's hash."""
    homes = {id(row): _own(row) for row in rows}
    sizes = Counter(homes.values())
    done = [row for row in rows if row.counted]
    for row in sorted(rows, key=lambda r: not r.counted):  # float networks before unfinished runs
        if row.counted and not row.first.is_float:
            continue
        near = [r for r in done if r is not row and _network(r) == _network(row)]
        quantized = [r for r in near if not r.first.is_float]
        if row.counted:
            fit = [r for r in quantized if not _differ(r, row)]
            fit = fit or _started_from(row, quantized)
        else:
            fit = [r for r in near if _same_recipe(r.first, row.first)]
        if fit:
            best = max(fit, key=lambda r: sizes[homes[id(r)]])
            homes[id(row)] = homes[id(best)]
    return [homes[id(row)] for row in rows]


def _own(row: Row) -> str:
    return row.protocol_hash if row.counted and row.protocol_hash else told_protocol(row.first)


def told_protocol(run: RunRecord) -> str:
    """Hash of what the config says of the protocol, for a run that has recorded none."""
    told = sorted(_recipe(run).items())
    return f"unrecorded {hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()}"


def _network(row: Row) -> tuple[str, str]:
    return row.first.dataset, row.first.model


def _differ(ours: Row, theirs: Row) -> bool:
    return bool(differences(ours.compared(), theirs.compared(), is_float=theirs.first.is_float))


def is_start(row: Row, protocol: Mapping[str, Any]) -> bool:
    """Whether this is a float network the others may start from: its recipe differs by design."""
    own = row.first.is_float and row.first.protocol.get("from_scratch")
    return bool(own) and not protocol.get("from_scratch")


def started(row: Row, protocol: Mapping[str, Any]) -> bool | None:
    """Whether runs of a protocol started from one of this row's networks; None: nobody recorded."""
    known = {sha256 for run in row.counted for sha256 in run.weights_sha256}
    wanted = protocol.get("float_sha256")
    return None if not known or wanted is None else wanted in known


def _started_from(row: Row, quantized: Sequence[Row]) -> list[Row]:
    """Those of `quantized` that may have started from the row; if it is known, those that did."""
    may = [r for r in quantized if is_start(row, r.first.protocol)]
    did = [r for r in may if started(row, r.first.protocol)]
    return did or [r for r in may if started(row, r.first.protocol) is None]


def _recipe(run: RunRecord) -> dict[str, Any]:
    """What the config of a run says of its protocol, flat."""
    own = {name: run.config[name] for name in SECTIONS if run.config.get(name)}
    told = {k: v for k, v in flatten(own) if k.rpartition(".")[2] not in NOT_EXPERIMENT}
    first_last = at(run.config, "bitwidth", "first_last")
    return told if first_last is None else {**told, "first_last": first_last}


def _same_recipe(one: RunRecord, other: RunRecord) -> bool:
    """Whether two configs say the same of the protocol, as far as both say something."""
    a, b = _recipe(one), _recipe(other)
    shared = a.keys() & b.keys()
    return bool(shared) and all(a[key] == b[key] for key in shared)


def recipe_of(rows: Sequence[Row]) -> str:
    """The recipe of a table's quantized rows, else of the float ones."""
    ranked = sorted(rows, key=lambda row: (row.first.is_float, not row.counted))
    return ranked[0].first.recipe


def label_(tables: Sequence[Table]) -> None:
    """Write each table's protocol in words: recipe, budget, and what sets it apart."""
    for group in _by_recipe(tables).values():
        keys = [key for key in varying(group) if key not in BUDGET]
        words = {key: [_word(table, key) for table in group] for key in keys}
        usual = {key: None if key in ALWAYS else commonest(words[key]) for key in keys}
        for i, table in enumerate(group):
            told = _told(table)
            budget = [f"{key} {told[key]}" for key in BUDGET if key in told]
            own = [words[key][i] for key in keys if words[key][i] not in ("", usual[key])]
            more = [f"more: {len(own) - NAMED}"] if len(own) > NAMED else []
            unknown = [] if table.protocol else ["no finished run"]
            table.label = ", ".join([table.recipe, *budget, *own[:NAMED], *more, *unknown])


def differing(tables: Sequence[Table]) -> list[Differing]:
    """For every recipe that ran under several protocols, the keys in which those differ."""
    found = []
    for (subject, recipe), group in _by_recipe(t for t in tables if t.protocol).items():
        if keys := varying(group):
            values = {key: [value_of(table.protocol, key) for table in group] for key in keys}
            numbers = [1 + tables.index(table) for table in group]
            hashes = [table.protocol_hash for table in group]
            found.append(Differing(f"{subject}, {recipe}", numbers, hashes, values))
    return found


def _by_recipe(tables: Iterable[Table]) -> dict[tuple[str, str], list[Table]]:
    found: dict[tuple[str, str], list[Table]] = {}
    for table in tables:
        found.setdefault((table.subject, table.recipe), []).append(table)
    return found


def _told(table: Table) -> Mapping[str, Any]:
    """The protocol; of runs that did not end, what their config says of it."""
    if table.protocol:
        return table.protocol
    return {k.partition(".")[2] or k: v for k, v in _recipe(table.rows[0].first).items()}


def varying(group: Sequence[Table]) -> list[str]:
    """Keys that differ among the finished protocols; a float network is not asked for some."""
    known = [table for table in group if table.protocol]
    keys = dict.fromkeys(key for table in known for key in table.protocol)
    return [key for key in keys if len({_word(t, key) for t in known} - {""}) > 1]


def _word(table: Table, key: str) -> str:
    """`lr 0.02`; empty where the table's float networks are not asked for it."""
    if key in QUANTIZED_ONLY and all(row.first.is_float for row in table.rows):
        return ""
    told = _told(table)
    if not table.protocol and key not in told:
        return ""
    value = value_of(told, key)
    return f"no {key}" if value == ABSENT else f"{key} {value}"


def value_of(protocol: Mapping[str, Any], key: str) -> str:
    """The value of a key in words."""
    value = protocol.get(key, BEFORE.get(key, ABSENT))
    return SHORT[value] if value is None or isinstance(value, bool) else brief(value)


def brief(value: Any) -> str:
    """A value of a protocol; of a hash, the first digits."""
    text = str(value)
    return text[:8] if len(text) >= 32 and text.isalnum() else text
