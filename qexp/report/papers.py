"""Published numbers: `results/papers.csv`, and the one that belongs beside a row of ours.

A number is shown beside ours only if method, model, data set, both widths and the kind of bit-width
policy are the same; nothing is interpolated. The averages of a mixed policy are the same within
`NEAR`; where a source does not say one, its number is shown with what it says and without a
difference. A number with distillation is shown beside a run
without (and the reverse) only when there is no other, and flagged. Among several, one from memory
comes last; else the authors' paper comes before the authors' repository and that before a re-run.

Columns:
    method, model, dataset   names as in our configs where we have them
    w_bits, a_bits           32 for float; empty when the source does not say
    policy                   uniform | mixed
    top1, float_top1         percent; float_top1 as the same source gives it
    first_last               bits of first and last layer
    distillation             yes | no
    epochs                   of quantization-aware training
    kind                     paper | authors (their repository) | rerun (somebody else's)
    source                   where it was read: arXiv id or repository
    table                    table and row, where known
    verified                 yes: read in the primary source, or a checkpoint evaluated
                             reported: read in a secondary source that quotes it
                             no: from memory or one unconfirmed note
    notes
An empty cell is unknown.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from qexp.errors import ConfigError

KINDS = ("paper", "authors", "rerun")
VERIFIED = ("yes", "reported", "no")
CHOICES = {
    "kind": KINDS,
    "verified": VERIFIED,
    "policy": ("uniform", "mixed"),
    "distillation": ("yes", "no", ""),
}
RELEASED = "_released"
NEAR = 0.02  # bits: two averages of a mixed policy that papers would print as one
PACKAGE = Path(__file__).parents[1]
PLACES = (Path("results/papers.csv"), PACKAGE / "papers.csv", PACKAGE.parent / "results/papers.csv")


@dataclass(frozen=True)
class Paper:
    """One published number: a row of papers.csv."""

    method: str
    model: str
    dataset: str
    w_bits: float | None
    a_bits: float | None
    policy: str
    top1: float
    float_top1: float | None
    first_last: str
    distillation: str
    epochs: str
    kind: str
    source: str
    table: str
    verified: str
    notes: str

    @property
    def cite(self) -> str:
        """`arXiv 1902.08153, Table 1`."""
        return f"{self.source}, {self.table}" if self.table else self.source

    @property
    def widths_known(self) -> bool:
        """Whether the source says the bits of weights and of inputs."""
        return self.w_bits is not None and self.a_bits is not None

    @property
    def bits(self) -> str:
        """`W4A4`, `W2.81 (inputs unknown)`, `unknown bits`."""
        if self.w_bits is None:
            return "unknown bits" if self.a_bits is None else f"A{self.a_bits:g} (weights unknown)"
        known = f"W{self.w_bits:g}"
        return f"{known} (inputs unknown)" if self.a_bits is None else f"{known}A{self.a_bits:g}"

    @property
    def drop(self) -> float | None:
        """The source's own float minus its quantized top-1, points."""
        return None if self.float_top1 is None else self.float_top1 - self.top1


COLUMNS = tuple(f.name for f in fields(Paper))


def find_papers(given: Path | None = None) -> list[Paper]:
    """Read `given`, or the first papers.csv of the usual places; none is an empty list."""
    if given is not None and not given.is_file():
        raise ConfigError(f"report: no file '{given}'. Leave out --papers to use the shipped one.")
    path = given or next((place for place in PLACES if place.is_file()), None)
    return read_papers(path) if path else []


def read_papers(path: Path) -> list[Paper]:
    """Every row of a papers.csv. Raises ConfigError that names line and column."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = [c for c in COLUMNS if c not in (reader.fieldnames or ())]
        if missing:
            raise ConfigError(f"report: {path} lacks the columns {', '.join(missing)}.")
        return [_paper(row, f"{path}, line {i}") for i, row in enumerate(reader, start=2)]


def _paper(row: dict[str, str], where: str) -> Paper:
    numbers: dict[str, float | None] = {}
    for column in ("w_bits", "a_bits", "top1", "float_top1", "epochs"):
        try:
            numbers[column] = float(row[column]) if row[column] else None
        except ValueError:
            raise ConfigError(f"report: {where}: {column} '{row[column]}' is no number.") from None
    del numbers["epochs"]  # quoted as it is written
    top1 = numbers.pop("top1")
    if top1 is None:
        raise ConfigError(f"report: {where}: top1 is empty. Leave the row out instead.")
    for column, options in CHOICES.items():
        if row[column] not in options:
            known = ", ".join(option or "empty" for option in options)
            raise ConfigError(f"report: {where}: {column} '{row[column]}'. Use one of {known}.")
    rest = {c: row[c] for c in COLUMNS if c not in numbers and c != "top1"}
    return Paper(top1=top1, **numbers, **rest)  # type: ignore[arg-type]


def matches(
    papers: Sequence[Paper],
    *,
    method: str,
    model: str,
    dataset: str,
    w_bits: float | None,
    a_bits: float | None,
    mixed: bool,
    distilled: bool,
) -> list[Paper]:
    """The published numbers of exactly this case, best source first.

    Args:
        method: `X_released`, a method as its authors' code has it, is X's own.
    """
    key = (method.removesuffix(RELEASED), model, dataset, "mixed" if mixed else "uniform")
    if w_bits is None or a_bits is None or method == "fp32":  # no paper owns a float network
        return []
    same = [p for p in papers if (p.method, p.model, p.dataset, p.policy) == key]
    near = NEAR if mixed else 0.0
    found = [p for p in same if _meets(p, w_bits, a_bits, near, unknown=mixed)]
    wanted = "yes" if distilled else "no"
    return sorted(
        found,
        key=lambda p: (
            not p.widths_known,
            p.distillation not in (wanted, ""),
            p.verified == "no",
            KINDS.index(p.kind),
        ),
    )


def _meets(paper: Paper, w_bits: float, a_bits: float, near: float, *, unknown: bool) -> bool:
    """Whether both widths are ours within `near`; `unknown` lets one pass that it does not say."""
    pairs = ((paper.w_bits, w_bits), (paper.a_bits, a_bits))
    return all(
        unknown if theirs is None else abs(theirs - ours) <= near + 1e-9 for theirs, ours in pairs
    )
