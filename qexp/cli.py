"""The `qexp` command: a sub-command, then Hydra's own command line.

Tasks (train, eval, export, bench) are primary configs run by `hydra.main`; tools (resume, ls,
report, env) are argparse functions. Everything heavy is imported inside the branch that needs it:
`--help`, `--cfg job` and shell completion never import torch.

Hydra is told to raise (HYDRA_FULL_ERROR) instead of printing, and `main` alone turns what was
raised into one line and an exit code: 0 done, 1 the run failed, 2 bad command or config,
130 interrupted. QEXP_TRACEBACK=1 shows the traceback too.
"""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from qexp import __version__
from qexp.command_line import Line, parse, refuse_shadowed
from qexp.errors import ConfigError, QexpError, RunError, did_you_mean, one_line, origin, quoted


class Command(NamedTuple):
    """A Hydra task: its primary config, what it does in one line, whether it takes comma lists."""

    config: str
    summary: str
    lists: bool = False  # see `bench.words`


COMMANDS = {
    "train": Command("train", "quantize a float network, train it, evaluate it"),
    "eval": Command("eval", "top-1 of a finished run"),
    "export": Command("export", "pack a finished run into a file that other programs load"),
    "bench train": Command("bench_train", "cost of a training step against float", True),
    "bench inference": Command("bench_inference", "cost of a forward pass against float", True),
}
TOOLS = {
    "resume": "continue a run, or the unfinished runs of a sweep",
    "ls": "table of runs",
    "report": "mean and deviation over seeds, beside the papers' numbers",
    "env": "versions, devices, and where configs and data are",
}
EXAMPLES = """\
  qexp train quantizer=lsq bits=4
  qexp train -m quantizer=lsq,asq bits=2,4 seed=0,1,2"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code. `argv` is without the program's name."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    os.environ["HYDRA_FULL_ERROR"] = "1"
    os.environ["QEXP_COMMAND"] = shlex.join(["qexp", *arguments])
    code = _exit_code(arguments)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:  # `qexp ls | head`: who reads has seen enough, the code stands
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


def _exit_code(argv: list[str]) -> int:
    """Run, and say what went wrong; a closed pipe is an error of a run alone."""
    try:
        return _dispatch(argv)
    except SystemExit as exit_:  # argparse, and Hydra's --help
        return exit_.code if isinstance(exit_.code, int) else int(bool(exit_.code))
    except KeyboardInterrupt as error:
        _complain(_how_to_continue(error))
        return 130
    except BrokenPipeError as error:
        return _complain(describe(error)) if hasattr(error, "run_folder") else 0
    except Exception as error:
        if os.environ.get("QEXP_TRACEBACK"):
            traceback.print_exc()
        _complain(describe(error))
        cause = origin(error)
        return cause.exit_code if isinstance(cause, QexpError) else 1


def describe(error: Exception) -> str:
    """The line (for a config, the lines) that says what went wrong."""
    cause = origin(error)
    if isinstance(cause, QexpError):
        return str(cause)
    folder = getattr(error, "run_folder", None)
    if folder is not None:
        return f"run: {one_line(error)} (traceback in {folder}/train.log)"
    return f"qexp: {one_line(error)} (QEXP_TRACEBACK=1 shows where)"


def _how_to_continue(error: KeyboardInterrupt) -> str:
    """The line on Ctrl-C: what goes on with the sweep, or with the one run, that it ended."""
    from qexp import sweep

    folder = getattr(error, "run_folder", None)
    given = "".join(f" {quoted(o)}" for o in getattr(error, "overrides", ()))
    commands = sweep.to_continue() or ([f"qexp resume {quoted(folder)}{given}"] if folder else [])
    return f"interrupted. Continue with: {'; '.join(commands)}" if commands else "interrupted."


def _complain(text: str) -> int:
    red = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    with suppress(BrokenPipeError):  # `2>&1 | tee log`, and Ctrl-C ended tee
        sys.stderr.write(f"\033[31m{text}\033[0m\n" if red else f"{text}\n")
    return 1


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"qexp {__version__}")
        return 0
    if argv[0] in ("-sc", "--shell-completion", "--shell_completion"):
        return _completion(argv[1:])
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a `_target_` may be the user's, in the folder he works in
    if argv[0] in TOOLS:
        return _tool(argv[0])(argv[1:])
    if argv[1:2] in (["-h"], ["--help"]) and (names := _commands_below(argv[0])):
        print("\n".join(f"usage: qexp {name} [key=value ...]" for name in names))
        return 0
    name, rest = command_of(argv)
    return run_task(name, rest)


def usage() -> str:
    """The commands and two examples."""
    width = max(map(len, [*COMMANDS, *TOOLS]))
    rows = [*((name, c.summary) for name, c in COMMANDS.items()), *TOOLS.items()]
    lines = [f"  {name:<{width}}  {summary}" for name, summary in rows]
    return "\n".join(
        [
            "qexp: one bench for low-bit quantization of image classifiers.",
            "",
            "usage: qexp COMMAND [key=value ...]",
            "",
            *lines,
            "",
            "examples:",
            EXAMPLES,
            "",
            "qexp COMMAND --help lists a command's configs and keys; add --cfg job to see the",
            'config it would run. Tab completion: eval "$(qexp -sc install=bash)"',
        ]
    )


def command_of(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The task that `argv` starts with (one word or two), and the rest of the line."""
    for words in (2, 1):
        name = " ".join(argv[:words])
        if name in COMMANDS:
            return name, list(argv[words:])
    first = argv[0]
    if names := _commands_below(first):
        choices = " or ".join(f"qexp {name}" for name in names)
        if len(argv) == 1:
            raise ConfigError(f"qexp: say which: {choices}.")
        raise ConfigError(f"qexp: unknown command '{first} {argv[1]}'. Use {choices}.")
    hint = did_you_mean(first, [*dict.fromkeys(n.split()[0] for n in COMMANDS), *TOOLS])
    if "=" in first:
        hint = f" Did you mean 'qexp train {shlex.join(argv)}'?"
    raise ConfigError(f"qexp: unknown command '{first}'.{hint or ' Run qexp for the list.'}")


def _commands_below(word: str) -> list[str]:
    """`bench train` and `bench inference` of `bench`; nothing of a whole command."""
    return [name for name in COMMANDS if name.startswith(f"{word} ")]


def run_task(name: str, argv: Sequence[str]) -> int:
    """Run a Hydra task; returns the exit code of a sweep, raises what a single job raises."""
    from qexp.config import configs_dir
    from qexp.job import Job

    command = COMMANDS[name]
    if command.lists:
        from qexp.bench import words as bench_words

        argv = bench_words.translate(argv)
    return hydra_main(Job(name), configs_dir(), command.config, argv)


def hydra_main(job: Any, config_path: Path, config_name: str, argv: Sequence[str]) -> int:
    """Hand `argv` to Hydra, with `job` as the task; its errors of composition become ours."""
    from qexp import messages

    line = parse(argv)
    known = line.options
    config_name = known.config_name or config_name
    config_path = Path(known.config_path or config_path)
    if known.config_dir:
        refuse_shadowed(known.config_dir, config_path)
    if known.multirun and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "qexp: a sweep starts its own processes. Start it without torchrun, or each of its "
            "jobs with torchrun."
        )
    try:
        if known.help:
            from qexp import help as help_

            print(help_.text(config_path, config_name, line.overrides, known.config_dir))
            return 0
        failures = _launch(job, config_path, config_name, line)
    except messages.COMPOSITION as error:
        source = messages.Source(config_path, config_name, line.overrides, known.config_dir)
        raise ConfigError(messages.explain(error, source)) from error
    except ValueError as error:  # options that do not go together; a job itself never raises
        raise ConfigError(f"qexp: {error}. Try: qexp COMMAND --hydra-help") from error
    job.raise_error()
    if failures:
        raise RunError(failures)
    return 0


def _launch(job: Any, config_path: Path, config_name: str, line: Line) -> str:
    """Run the job, or the jobs; returns a line about those of a sweep that failed."""
    import hydra

    from qexp import sweep

    task = hydra.main(version_base="1.3", config_path=str(config_path), config_name=config_name)
    before = sys.argv
    failures = ""
    with sweep.folder_for(dry=line.is_dry) as extra:
        sys.argv = ["qexp", *line.words, *extra]
        sweep.forget()
        try:
            with sweep.place_errors():
                task(job)()
        finally:
            sys.argv = before
            failures = sweep.summary()
    return failures


def _tool(name: str) -> Callable[[list[str]], int]:
    if name == "report":
        from qexp.report import command as report

        return report.main
    from qexp import tools

    return {"resume": tools.resume, "ls": tools.ls, "env": tools.env}[name]


def _completion(argv: Sequence[str]) -> int:
    """Hydra's completion with the sub-command taken off the line; sub-commands by ourselves."""
    line = os.environ.get("COMP_LINE", "")
    words = line.split()[1:]
    if argv and argv[0].startswith("query="):
        typed = " ".join(words) + (" " if words and line.endswith(" ") else "")
        matching = [name for name in (*COMMANDS, *TOOLS) if f"{name} ".startswith(typed)]
        name = next((name for name in COMMANDS if typed.startswith(f"{name} ")), None)
        if name is None:
            skip = len(words) - (not line.endswith(" "))  # whole words already typed
            print(" ".join(dict.fromkeys(m.split()[skip] for m in matching if m.split()[skip:])))
            return 0
        os.environ["COMP_LINE"] = line.replace(name, "", 1) if name in line else line
        return _query(name, argv)
    return _query("train", argv)


def _query(name: str, argv: Sequence[str]) -> int:
    import hydra

    from qexp.config import configs_dir

    sys.argv = ["qexp", "-sc", *argv]
    task = hydra.main(
        version_base="1.3", config_path=str(configs_dir()), config_name=COMMANDS[name].config
    )
    task(lambda cfg: None)()
    return 0


if __name__ == "__main__":
    sys.exit(main())
