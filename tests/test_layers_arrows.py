"""Who may import whom (the layers of the design), read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "qexp"

# layer: what it may import from qexp, and of the packages outside the standard library
ALLOWED = {
    "quant": ({"qexp.quant", "qexp.errors"}, {"torch", "numpy", "scipy", "typing_extensions"}),
    "models": ({"qexp.models", "qexp.errors"}, {"torch", "torchvision", "safetensors"}),
    "data": ({"qexp.data", "qexp.errors"}, {"torch", "torchvision", "numpy", "PIL"}),
    "runner": ({"qexp.runner", "qexp.errors"}, {"torch", "numpy", "omegaconf", "hydra", "tqdm"}),
    "engine": (
        {"qexp.engine", "qexp.export", "qexp.quant", "qexp.runner", "qexp.errors"},
        {"torch", "triton"},
    ),
    # `qexp eval checkpoint=model.safetensors` scores a packed network in the engine.
    "recipes": (
        {f"qexp.{name}" for name in ("recipes", "quant", "models", "data", "runner", "errors")}
        | {f"qexp.{name}" for name in ("config", "signature", "ranges", "plot", "plot_ptq")}
        | {"qexp.engine", "qexp.export.command"},
        {"torch", "omegaconf", "hydra", "tqdm"},
    ),
    "report": (
        {f"qexp.{name}" for name in ("report", "runner", "errors")}
        | {f"qexp.{name}" for name in ("figure", "command_line", "config")},
        {"numpy", "scipy", "yaml", "matplotlib"},
    ),
}
LIGHT = (
    "cli",
    "config",
    "errors",
    "help",
    "job",
    "messages",
    "ranges",
    "bench.words",
    "report.command",
    "schema",
    "signature",
    "sweep",
    "tools",
)


def imports(path: Path) -> Iterator[str]:
    """Names of the modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, path  # `from . import x` would hide a name
            assert not node.level, path
            yield node.module
            if node.module == "qexp":
                yield from (f"qexp.{alias.name}" for alias in node.names)


def files(layer: str) -> list[Path]:
    return sorted((PACKAGE / layer).rglob("*.py"))


@pytest.mark.parametrize("layer", ALLOWED)
def test_a_layer_imports_only_layers_below_it(layer: str) -> None:
    allowed, _ = ALLOWED[layer]
    wrong = [
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in files(layer)
        for name in imports(path)
        if name.startswith("qexp.")
        and name != "qexp.__version__"
        and not any(name == a or name.startswith(f"{a}.") for a in allowed)
    ]
    assert not wrong


@pytest.mark.parametrize("layer", ALLOWED)
def test_a_layer_imports_no_package_but_its_own(layer: str) -> None:
    _, packages = ALLOWED[layer]
    known = packages | sys.stdlib_module_names | {"qexp"}
    wrong = [
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in files(layer)
        for name in imports(path)
        if name.partition(".")[0] not in known
    ]
    assert files(layer)
    assert not wrong


def test_the_runner_never_imports_quant() -> None:
    names = [name for path in files("runner") for name in imports(path)]
    assert names
    assert not [name for name in names if name.startswith("qexp.quant")]


def test_the_command_line_imports_no_torch() -> None:
    code = "; ".join(f"import qexp.{name}" for name in LIGHT)
    code += "; import sys; print(sorted({'torch', 'torchvision', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_method_is_asked_for_by_name_in_code() -> None:
    methods = {"lsq", "lsqplus", "asq", "adq", "apot", "pot", "post", "n2uq", "dorefa", "pact"}
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                subject = ast.unparse(node.left)
                words = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                if words & methods and ("quantizer" in subject or "method" in subject):
                    wrong.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)}")
    assert not wrong
