"""User errors: one line that says what happened and where, and what to type next.

Every module may raise these; only `cli.py` prints them. Exit codes: 0 done, 1 the run failed,
2 bad command or config, 130 interrupted. Imports nothing, so that help and completion stay fast.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QexpError(Exception):
    """A user's error: the message is one line `area: what happened. What to do.`"""

    exit_code = 1


class ConfigError(QexpError):
    """Bad command line, config, or value: nothing has been written (exit code 2)."""

    exit_code = 2


class DataError(QexpError):
    """A data set that is missing, empty, unreadable, or does not fit the model."""


class CheckpointError(QexpError):
    """A checkpoint that is missing, truncated, or belongs to another model."""


class RunError(QexpError):
    """The run itself failed: non-finite loss, no space, no permission."""


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the closest option, else an empty string."""
    close = difflib.get_close_matches(word, list(options), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""
