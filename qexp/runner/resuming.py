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

from qexp.errors import ConfigError, origin, quoted
from qexp.runner.atomic import write_bytes, write_json
from qexp.runner.folder import (
    EARLIER,
    NOT_IDENTITY,
    RESULT,
    RESUMED,
    STATUS,
    identity,
    locked,
    owner,
    read_config,
    read_json,
    read_status,
    refuse_running,
)
from qexp.runner.overrides import folder_override, task_overrides, typed, without_ours

CHECKPOINT = "last.pt"
RESUME = "resume"  # hydra.job.name of a `qexp resume`
# Where and how, not what; `float.*` is behind a run that has begun.
FREE = (*NOT_IDENTITY, "float", "dataset.root")
TOLD = ("recipe.epochs", "recipe.lr", "recipe.quantizer_lr", "recipe.grad_clip")

Segment = dict[str, Any]  # {"from": {key: value}, "to": {key: value}}


def take(folder: Path, cfg: DictConfig, processes: int = 1) -> None:
    """Make this process the owner of an existing run's folder, to go on with `cfg`.

    What is accepted is on the disk before anything is trained: a kill at any later moment leaves
    a folder that the next resume goes on with alike.

    Raises:
        RunError: the run still runs.
        ConfigError: see `next_segments`.
    """
    with locked(folder):
        status = read_status(folder)
        refuse_running(folder, status)
        segments = next_segments(folder, cfg, status, processes)
        if overrides := _resume_overrides(folder):
            write_bytes(folder / RESUMED, OmegaConf.to_yaml(overrides).encode())
        if read_json(folder / RESULT):
            (folder / RESULT).replace(folder / EARLIER)
        (folder / RESULT).unlink(missing_ok=True)  # a damaged one
        status.pop("error", None)
        status.pop("top1", None)  # of the result that is put aside
        status.update(state="running", identity=identity(cfg, segments), **owner())
        status["processes"] = processes
        if segments:
            status["segments"] = segments
        write_json(folder / STATUS, status)


def _resume_overrides(folder: Path) -> list[str]:
    """The values of this and earlier `qexp resume` commands; none where torchrun starts anew."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized() or HydraConfig.get().job.name != RESUME:
        return []
    typed_here = task_overrides()
    named = [o for o in typed_here if o.partition("=")[0] == "folder"]
    if named and named[-1] != folder_override(folder):
        return []  # of the run that this float network is trained for
    return without_ours(typed_here)


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
    if not (folder / CHECKPOINT).is_file():
        result = read_json(folder / RESULT)  # with a protocol: a recipe of ours, which saves
        if status.get("state") == "done" and "protocol_hash" in result:
            raise ConfigError(
                f"resume: {folder} is done, and its {CHECKPOINT} is gone: there is nothing to go "
                "on from. Start a new run."
            )
        return [*earlier]  # nothing was learned yet
    if not path.is_file():
        if new := [o for o in _resume_overrides(folder) if o not in typed(folder / RESUMED)]:
            raise ConfigError(
                f"resume: {path} is missing, so what {new[0]} changes cannot be told. Bring it "
                "back, or resume without changes."
            )
        return [*earlier]
    _same_processes(folder, status.get("processes", processes), processes)
    found = read_config(path, "Delete it: a resume writes it again.")
    before, now = (dict(_leaves(_plain(c))) for c in (found, cfg))
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
    segment = {"from": old, "to": new}
    # A kill may fall between the note of a segment and the writing of its config.
    return [*earlier] if earlier and earlier[-1] == segment else [*earlier, segment]


def _same_processes(folder: Path, before: int, now: int) -> None:
    """Refuse another number: the steps of an epoch and the images of a step depend on it."""
    if before == now:
        return
    many = f"torchrun --nproc-per-node={before} -m qexp resume {quoted(folder)}"
    raise ConfigError(
        f"resume: {folder} was begun by {before} process{'es' * (before > 1)}, not {now}. Type: "
        + (many if before > 1 else f"qexp resume {quoted(folder)}")
    )


class Before(NamedTuple):
    """A run's folder as a resume found it: what would be written over, and the checkpoint's age.

    A file that was not there is None.
    """

    files: dict[str, bytes | None]
    trained: int | None

    @classmethod
    def of(cls, folder: Path) -> Before:
        """Read the folder."""
        names = (RESULT, EARLIER, RESUMED, STATUS, "config.yaml", "env.json")
        kept = {name: folder / name for name in names}
        files = {name: p.read_bytes() if p.is_file() else None for name, p in kept.items()}
        return cls(files, _age(folder))

    def put_back(self, folder: Path, error: BaseException) -> None:
        """Undo a resume that failed before it trained, of a done run or by a config it refused."""
        refused = isinstance(origin(error), ConfigError)
        if (self.files[RESULT] is not None or refused) and _age(folder) == self.trained:
            with suppress(OSError):
                for name, content in self.files.items():
                    if content is None:
                        (folder / name).unlink(missing_ok=True)
                    else:
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
