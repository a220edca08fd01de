"""User errors: one line that says what happened and where, and what to type next.

Every module may raise these; only `cli.py` prints them. Exit codes: 0 done, 1 the run failed,
2 bad command or config, 130 interrupted. Imports nothing, so that help and completion stay fast.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable
from itertools import takewhile


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
    """` Did you mean 'x'?` for the closest option, else an empty string; capitals count last."""
    known = list(options)
    small = {option.lower(): option for option in known}
    best = _closest(word, known) or small.get(_closest(word.lower(), small))
    return f" Did you mean '{best}'?" if best else ""


def _closest(word: str, options: Iterable[str]) -> str:
    """The one most like it; of two that are as like, the one with the same beginning."""

    def likeness(option: str) -> tuple[float, int]:
        same = (a == b for a, b in zip(word, option, strict=False))
        return difflib.SequenceMatcher(None, word, option).ratio(), sum(takewhile(bool, same))

    return max(difflib.get_close_matches(word, list(options)), key=likeness, default="")


def origin(error: BaseException) -> BaseException:
    """The user's error that `error` wraps (Hydra wraps what a constructor raises), or itself."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, QexpError):
            return cause
        cause = cause.__cause__
    return error


def reason(error: BaseException) -> str:
    """The text of `error` in one line, without the C++ frames that torch may add."""
    return " ".join(str(error).partition("\nException raised from ")[0].split())


def quoted(path: object) -> str:
    """A path as a command takes it."""
    return shlex.quote(str(path))


def one_line(error: BaseException) -> str:
    """An exception in one line: a user's error says it all, another one needs its type."""
    error = origin(error)
    text = reason(error)
    if isinstance(error, QexpError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
