"""Imports point one way: launcher -> cluster, configs; trainer -> cluster, configs; cluster -> configs."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "launcher": {"launcher", "cluster", "configs"},
    "trainer": {"trainer", "cluster", "configs"},
    "cluster": {"cluster", "configs"},
    "configs": {"configs"},
}
HEAVY = {"torch", "transformers"}
MODULES = sorted(path.relative_to(ROOT) for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[str]:
    """Top-level packages that a piece of a module imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import hides its direction"
            assert node.module is not None
            yield node.module.split(".")[0]


def at_start(module: ast.Module) -> ast.Module:
    """The module without the bodies of its functions: what runs when it is imported."""

    class Outside(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

    found: ast.Module = Outside().visit(module)
    return found


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_a_package_imports_only_those_below_it(path: Path) -> None:
    used = set(imported(ast.parse((ROOT / path).read_text())))
    assert used & MAY_IMPORT.keys() <= MAY_IMPORT[path.parts[0]]


@pytest.mark.parametrize("path", [path for path in MODULES if path.parts[0] != "trainer"], ids=str)
def test_only_the_trainer_imports_heavy_libraries_at_module_level(path: Path) -> None:
    used = set(imported(at_start(ast.parse((ROOT / path).read_text()))))
    assert not used & HEAVY - ({"torch"} if path == Path("cluster/agent.py") else set())


@pytest.mark.parametrize(
    "arguments", [["--help"], ["plan", "model=llama-7b"], ["plan", "--json"], ["runs"]], ids=" ".join
)
def test_a_quick_verb_loads_no_torch(arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-X", "importtime", "-m", "launcher", *arguments]
    environment = os.environ | {"XDG_STATE_HOME": str(tmp_path)}
    outcome = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    loaded = {line.split("|")[-1].strip() for line in outcome.stderr.splitlines() if "|" in line}
    assert "launcher.cli" in loaded
    assert not loaded & HEAVY
