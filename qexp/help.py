"""`qexp COMMAND --help`: what the command does, the configs to choose from, the keys to set.

Hydra's own help lists every group of every package twice and takes twice as long; the text itself
is the `header` of `configs/hydra/help/<config>.yaml`, where Hydra looks for it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from qexp.command_line import searchpath

OPTIONS = """\
Options: -m sweeps over comma lists (bits=2,4); --cfg job shows the config of this command line;
--config-dir DIR adds configs of your own; --hydra-help lists the rest."""


def text(config_path: Path, config_name: str, overrides: Sequence[str], extra: str | None) -> str:
    """The help of the command whose primary config is `config_name`.

    Args:
        extra: a folder of the user's own configs, or None.
    """
    folders = [config_path, *([Path(extra)] if extra else [])]
    parts = [_header(config_path, config_name)]
    if config_name == "train":
        parts += ["Configs to choose from, as group=name:", groups(folders)]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_path), version_base="1.3"):
        cfg = compose(config_name, [*overrides, *searchpath(extra)])
    parts += ["Keys to set, as key=value:", OmegaConf.to_yaml(cfg), OPTIONS]
    return "\n\n".join(part.rstrip() for part in parts)


def _header(config_path: Path, config_name: str) -> str:
    path = config_path / "hydra" / "help" / f"{config_name}.yaml"
    if not path.is_file():
        return f"qexp {config_name.replace('_', ' ')}"
    return str(OmegaConf.select(OmegaConf.load(path), "header"))


def groups(folders: Sequence[Path]) -> str:
    """`  group: names` a line, for every folder of YAML files below the config folders."""
    found: dict[str, set[str]] = {}
    for folder in folders:
        for path in folder.rglob("*.yaml"):
            group = path.parent.relative_to(folder).as_posix()
            if group != "." and not group.startswith("hydra"):
                found.setdefault(group, set()).add(path.stem)
    return "\n".join(f"  {group}: {', '.join(sorted(found[group]))}" for group in sorted(found))
