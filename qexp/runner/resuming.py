"""What a resumed run may change, and how the change stays visible.

A run that has a checkpoint goes on with the network, the optimizer and the data order it has: most
keys of its config are settled. The few in `TOLD` may change, because a user has reason to (train
longer, a smaller rate after a NaN); each change becomes a segment in status.json, is part of the
protocol and of the run's identity, and so is never taken for an uninterrupted run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from qexp.errors import ConfigError, origin
from qexp.runner.atomic import write_bytes
from qexp.runner.folder import NOT_IDENTITY, RESULT, STATUS

CHECKPOINT = "last.pt"
# Where and how, not what; `float.*` is behind a run that has begun.
FREE = (*NOT_IDENTITY, "float", "recipe.plots", "recipe.save_every", "recipe.cache_gb",
        "dataset.root", "dataset.download", "dataset.workers")  # fmt: skip
TOLD = ("recipe.epochs", "recipe.lr", "recipe.quantizer_lr", "recipe.grad_clip")

Segment = dict[str, Any]  # {"from": {key: value}, "to": {key: value}}


def next_segments(
    folder: Path, cfg: DictConfig, status: Mapping[str, Any], processes: int = 1
) -> list[Segment]:
    """The segments of the run in `folder` when it goes on with `cfg`.

    Args:
        status: the run's, with its earlier segments and its number of processes.
        processes: how many train it now.

    Raises:
        ConfigError: a key that cannot change any more, or another number of processes.
    """
    path, earlier = folder / "config.yaml", status.get("segments", [])
    if not (folder / CHECKPOINT).is_file() or not path.is_file():
        return [*earlier]  # nothing was learned yet
    _same_processes(folder, status.get("processes", processes), processes)
    before, now = (dict(_leaves(_plain(c))) for c in (OmegaConf.load(path), cfg))
    keys = [k for k in dict.fromkeys([*before, *now]) if before.get(k) != now.get(k)]
    free_keys = [k for k in FREE if processes == 1 or k != "sync_bn"]
    keys = [k for k in keys if not any(k == free or k.startswith(f"{free}.") for free in free_keys)]
    settled = [k for k in keys if k not in TOLD]
    if settled:
        key = settled[0]
        # A recipe has some of them; post-training quantization none that shapes its result.
        may = [k for k in TOLD if k in before]
        may = may or [k for k in FREE if k in before and k.startswith("recipe.")]
        raise ConfigError(
            f"resume: {key} cannot change from {before.get(key)} to {now.get(key)} in a run that "
            f"has begun. Start a new run. (What may change: {', '.join(may)}.)"
        )
    if not keys:
        return [*earlier]
    old, new = ({k: values.get(k) for k in keys} for values in (before, now))
    return [*earlier, {"from": old, "to": new}]


def _same_processes(folder: Path, before: int, now: int) -> None:
    """Refuse another number: the steps of an epoch and the images of a step depend on it."""
    if before == now:
        return
    many = f"torchrun --nproc-per-node={before} -m qexp resume {folder}"
    raise ConfigError(
        f"resume: {folder} was begun by {before} process{'es' * (before > 1)}, not {now}. Type: "
        + (many if before > 1 else f"qexp resume {folder}")
    )


class Before(NamedTuple):
    """A run's folder as a resume found it: what would be written over, and the checkpoint's age."""

    files: dict[str, bytes]
    trained: int | None

    @classmethod
    def of(cls, folder: Path) -> Before:
        """Read the folder."""
        kept = [folder / name for name in (RESULT, STATUS, "config.yaml", "env.json")]
        return cls({p.name: p.read_bytes() for p in kept if p.is_file()}, _age(folder))

    def put_back(self, folder: Path, error: BaseException) -> None:
        """Undo a resume that failed before it trained, of a done run or by a config it refused."""
        refused = isinstance(origin(error), ConfigError)
        if (RESULT in self.files or refused) and _age(folder) == self.trained:
            with suppress(OSError):
                for name, content in self.files.items():
                    write_bytes(folder / name, content)


def _age(folder: Path) -> int | None:
    path = folder / CHECKPOINT
    return path.stat().st_mtime_ns if path.is_file() else None


def _plain(cfg: Any) -> Any:
    return OmegaConf.to_container(cfg, resolve=True)


def _leaves(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
