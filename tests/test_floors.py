"""The floors of the package: imports go down only, typing-only and function-level ones included."""

from __future__ import annotations

import ast
import functools
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import svd_optim

ROOT = Path(svd_optim.__file__).parent
# From the ground up. A module imports from its own floor and from those before it.
FLOORS = ("_version", "records", "checks", "config", "distributed", "decisions", "linalg", "factors", "tracking",
          "optimizer", "storage", "console", "__init__", "__main__")  # fmt: skip
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
TORCH_FREE = ("records", "checks", "config", "decisions")
MOST_LINES = 440
SCRIPTS = {path.stem for folder in ("examples", "benchmarks") for path in (ROOT.parent / folder).glob("*.py")}
TESTS = sorted(Path(__file__).parent.glob("*.py"))


def floor_of(module: Path) -> str:
    return module.parts[0].removesuffix(".py")


@functools.cache
def imports_of(module: Path) -> set[str]:
    """Absolute dotted names of all that a module imports, wherever in it."""
    package = ("svd_optim", *module.parts[:-1])
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            name = ".".join(filter(None, (base, node.module)))
            found |= {f"{name}.{alias.name}" for alias in node.names}
    return found


def own_module(name: str) -> Path | None:
    """The file of this package that an imported name comes from; a package is its ``__init__``."""
    parts = name.split(".")
    if parts[0] != "svd_optim":
        return None
    for length in range(len(parts), 0, -1):
        path = Path(*parts[1:length])
        for file in (path.with_suffix(".py") if path.parts else Path("__init__.py"), path / "__init__.py"):
            if (ROOT / file).exists():
                return file
    return None


def test_every_module_stands_on_a_floor() -> None:
    assert {floor_of(module) for module in MODULES} == set(FLOORS)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_go_down_only(module: Path) -> None:
    here = FLOORS.index(floor_of(module))
    up = {
        name
        for name in imports_of(module)
        if (target := own_module(name)) is not None and FLOORS.index(floor_of(target)) > here
    }
    assert not up


def test_no_two_files_need_each_other() -> None:
    graph = {
        str(module): {str(target) for name in imports_of(module) if (target := own_module(name)) is not None}
        for module in MODULES
    }
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)  # raises CycleError


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_library_is_known_on_its_floor_only(module: Path) -> None:
    roots = {name.split(".")[0] for name in imports_of(module)}
    if floor_of(module) in TORCH_FREE:
        assert not roots & {"torch", "numpy", "safetensors", "rich", "matplotlib"}
    if floor_of(module) != "console":
        assert not roots & {"rich", "matplotlib"}
    if floor_of(module) != "distributed":
        assert "torch.distributed" not in (ROOT / module).read_text().replace("``torch.distributed", "")


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_files_can_be_read_at_a_sitting(module: Path) -> None:
    assert len((ROOT / module).read_text().splitlines()) <= MOST_LINES


def test_the_public_names_are_a_dozen_and_each_floor_says_what_it_exports() -> None:
    names = [name for name in svd_optim.__all__ if not name.startswith("__")]
    assert len(names) == 12
    for floor in ("records", "decisions", "linalg", "factors", "tracking", "storage", "console"):
        module = __import__(f"svd_optim.{floor}", fromlist=["__all__"])
        assert module.__doc__ and all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize("file", TESTS, ids=lambda file: file.name)
def test_what_tests_share_is_in_helpers(file: Path) -> None:
    """A test needs no other test; examples and benchmarks are loaded by their files, with ``helpers.script``."""
    assert {"corpus", "faults"} <= SCRIPTS
    roots = {name.split(".")[0] for name in imports_of(file)}
    assert not roots & (SCRIPTS | {path.stem for path in TESTS if path.name.startswith("test_")})
    assert "sys.path" + "." not in file.read_text()
