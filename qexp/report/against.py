"""Is a method really better than another? Differences of top-1 at the same bits, seed by seed.

`qexp report --against lsq` sets every row beside the row `lsq` of its table (one protocol) and its
bits. A seed draws the order of the images and what is calibrated on for both alike, so differences
are taken seed by seed, over the seeds that both rows have (Student's t for pairs):

    d_s = top1_s - base_s,   d = mean of the n d_s,   s = their sample deviation
    interval  d -+ t(0.975, n-1) * s / sqrt(n)
    p         of |d| or more where the methods are alike, two-sided, t = d / (s / sqrt(n)), n-1

Both take differences for normal. One seed has neither, nor have differences that are all the same
(s = 0). Of many methods a few are below 0.05 by chance; `p_holm` is what S. Holm's step-down rule
makes of the p of all that a table compares at the same bits (Scandinavian Journal of Statistics 6,
1979): where it is below 0.05, at most one such set in twenty holds a false finding.

All of it is about other seeds, on the same test images. What other images would add is a column of
its own, `over images`, of the seeds on which both runs kept their answers (answers.npz; named where
they are fewer than n): with c_i the mean over these seeds of [ours right on i] - [base right on i],

    over images = sample deviation of the N c_i / sqrt(N)

the deviation that their d has over draws of N images. Of one seed it is McNemar's, about
sqrt(q / N) with q the share of images on which just one of the two is right; it says whether these
two networks differ, not whether their methods do.

A float row as the base (`--against fp32`, the float network trained on with the same schedule)
stands beside the rows of all bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qexp.errors import ConfigError, did_you_mean
from qexp.report.cells import NONE
from qexp.report.protocols import is_start
from qexp.report.rows import Row, Stat, Table
from qexp.report.runs import RunRecord
from qexp.runner.answers import ANSWERS, read_right

LEVEL = 0.95  # of the interval
SAME = 1e-6  # points: two top-1 less apart are of as many images
SAME_TOP1 = 0.05  # points between a top-1 and its answers: scored again on another processor
COLUMNS = (
    "method", "bits", "top-1 - base", "95 % interval", "p", "p, Holm", "above on", "seeds",
    "over images", "bytes", "bit operations",
)  # fmt: skip
NOTE = (
    "Points of top-1 over the base at the same bits, mean ± sample deviation of the differences "
    "seed by seed, over the seeds that both have; interval and p of Student's t for pairs; Holm: "
    "p that allows for all methods compared at the same bits. All this is about other seeds; over "
    "images: the deviation over other test images, of the seeds named or all. Bytes and bit "
    "operations are ratios to the base's; what quantizers themselves compute is in no count."
)


@dataclass
class Comparison:
    """A row beside the base at its bits.

    Attributes:
        seeds: that both have, in order.
        top1: statistics of the differences over `seeds`, points; None if they share no seed.
        interval: least and greatest difference at `LEVEL`, None where it is not known.
        p: two-sided, None where it is not known; `p_holm` allows for all of the table's rows at
            these bits.
        over_images: deviation of the difference over draws of test images, points, from the
            seeds of which both have kept their answers, `answered`; None without any.
        above: on how many of `seeds` the row has the higher top-1.
    """

    row: Row
    base: Row
    seeds: list[Any]
    top1: Stat | None
    interval: tuple[float, float] | None = None
    p: float | None = None
    p_holm: float | None = None
    over_images: float | None = None
    answered: list[Any] = field(default_factory=list)
    above: int = 0

    def ratio(self, key: str) -> float | None:
        """The row's mean of a field of result.json over the base's."""
        ours, theirs = self.row.stat(key), self.base.stat(key)
        return ours.mean / theirs.mean if ours and theirs and theirs.mean else None


def check_known(tables: Sequence[Table], name: str) -> None:
    """Raise a ConfigError unless a finished row is called `name`."""
    known = sorted({row.name for table in tables for row in table.rows if row.counted})
    if name not in known:
        raise ConfigError(
            f"report: no finished row is called '{name}'. Rows: {', '.join(known) or 'none'}."
            + did_you_mean(name, known)
        )


def compare(table: Table, name: str) -> list[Comparison]:
    """Every finished row of the table's protocol beside the row `name` at its bits."""
    fit = [row for row in table.rows if row.counted and row.protocol_hash not in table.others]
    fit = [row for row in fit if not is_start(row, table.protocol)]
    if table.protocol:  # of a run that recorded none nobody knows what it is comparable with
        fit = [row for row in fit if row.compared()]
    # Of rows of one name, as of a run whose config is lost, the one that is known is the base.
    bases = {_case(row): row for row in sorted(fit, key=_known) if row.name == name}
    made = []
    for row in fit:
        base = bases.get(_case(row)) or bases.get((*_network(row), "float"))
        if base is not None and base is not row:
            made.append(_pair(row, base))
    for bits in {c.row.bits for c in made}:
        _allow_for_all([c for c in made if c.row.bits == bits])
    return made


def _known(row: Row) -> bool:
    """Whether every run of a row has its config."""
    return all(run.config for run in row.counted)


def _network(row: Row) -> tuple[str, str]:
    return row.first.dataset, row.first.model


def _case(row: Row) -> tuple[str, str, str]:
    return *_network(row), row.bits


def without_base(table: Table, name: str, made: Sequence[Comparison]) -> list[str]:
    """`adq W3A3.44 sensitivity`: rows that are in no comparison of `made` with `name`."""
    told = {id(c.row) for c in made}
    rows = [row for row in table.rows if row.name != name and id(row) not in told]
    return [f"{row.name} {row.bits}" for row in rows]


def _pair(row: Row, base: Row) -> Comparison:
    ours = {run.seed: run for run in row.counted}
    theirs = {run.seed: run for run in base.counted}
    seeds = [seed for seed in ours if seed is not None and seed in theirs]
    pairs = [(ours[seed], theirs[seed]) for seed in seeds]
    found = [run.result["top1"] - other.result["top1"] for run, other in pairs]
    made = Comparison(row, base, seeds, Stat.of(found), above=sum(d > SAME for d in found))
    made.over_images, made.answered = _over_images(pairs)
    if made.top1 and made.top1.std is not None and made.top1.std > SAME:
        from scipy.stats import t as student

        error = made.top1.std / math.sqrt(made.top1.n)
        reach = float(student.ppf((1 + LEVEL) / 2, made.top1.n - 1)) * error
        made.interval = made.top1.mean - reach, made.top1.mean + reach
        made.p = 2 * float(student.sf(abs(made.top1.mean) / error, made.top1.n - 1))
    return made


def _over_images(pairs: Sequence[tuple[RunRecord, RunRecord]]) -> tuple[float | None, list[Any]]:
    """The deviation, and the seeds that it is of."""
    ours, theirs, seeds = [], [], []
    for mine, other in pairs:
        right, base = _right(mine), _right(other)
        if right is not None and base is not None:
            ours.append(right)
            theirs.append(base)
            seeds.append(mine.seed)
    if not seeds:
        return None, []
    first, labels = ours[0]
    if len(first) < 2 or not all(np.array_equal(labels, kept) for _, kept in (*ours, *theirs)):
        return None, []
    apart = np.mean([right for right, _ in ours], axis=0)
    apart -= np.mean([right for right, _ in theirs], axis=0)
    return 100 * float(apart.std(ddof=1)) / math.sqrt(len(first)), seeds


def _right(run: RunRecord) -> tuple[np.ndarray, np.ndarray] | None:
    """On which images a run is right, and the labels; None of answers that are not its top-1's."""
    found = read_right(run.folder / ANSWERS)
    near = found is not None and abs(100 * found[0].mean() - run.result["top1"]) < SAME_TOP1
    return found if near else None


def _allow_for_all(made: Sequence[Comparison]) -> None:
    """Holm: the i-th least of k (from 0) times k - i, never below one before it, at most 1."""
    ranked = sorted((c for c in made if c.p is not None), key=lambda c: c.p or 0.0)
    least = 0.0
    for i, comparison in enumerate(ranked):
        assert comparison.p is not None
        least = max(least, min(1.0, (len(ranked) - i) * comparison.p))
        comparison.p_holm = least


def cells(made: Comparison) -> list[str]:
    """Its texts, in the order of `COLUMNS`."""
    top1, n = made.top1, len(made.seeds)
    deviation = f" ± {top1.std:.2f}" if top1 and top1.std is not None else ""
    return [
        made.row.name,
        made.row.bits,
        f"{top1.mean:+.2f}{deviation}" if top1 else NONE,
        f"{made.interval[0]:+.2f} to {made.interval[1]:+.2f}" if made.interval else NONE,
        probability(made.p),
        probability(made.p_holm),
        f"{made.above} of {n}" if n else NONE,
        " ".join(map(str, made.seeds)) or "none in common",
        _over(made),
        *(_ratio(made.ratio(key)) for key in ("size_bytes", "bops")),
    ]


def _over(made: Comparison) -> str:
    """`± 0.18`; `± 0.18 of 1 2` where not all seeds have kept their answers."""
    if made.over_images is None:
        return NONE
    some = "" if made.answered == made.seeds else f" of {' '.join(map(str, made.answered))}"
    return f"± {made.over_images:.2f}{some}"


def _ratio(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def probability(p: float | None) -> str:
    """Two digits of what counts: `0.30`, `0.006`, `<0.001`."""
    if p is None:
        return NONE
    if p < 0.001:
        return "<0.001"
    return f"{p:.2f}" if p >= 0.01 else f"{p:.3f}"


def notes(table: Table, name: str, made: Sequence[Comparison]) -> list[str]:
    """What stands below the comparisons of a table with its row `name`."""
    if not made:
        return [f"Nothing here has the protocol and the bits of a finished {name}."]
    alone = without_base(table, name, made)
    told = f"Without {name} at their bits, or unfinished: {', '.join(alone)}."
    return [NOTE, told] if alone else [NOTE]


def csv_fields(made: Comparison | None, name: str) -> dict[str, Any]:
    """Columns of the CSV form, numbers unrounded, empty where there is none."""
    top1 = made and made.top1
    low, high = (made and made.interval) or (None, None)
    return {
        "against": name if made else None,
        "against_difference": top1 and top1.mean,
        "against_std": top1 and top1.std,
        "against_low": low,
        "against_high": high,
        "against_p": made and made.p,
        "against_p_holm": made and made.p_holm,
        "against_above": made and made.above,
        "against_over_images": made and made.over_images,
        "against_seeds": " ".join(map(str, made.seeds)) if made else None,
    }
