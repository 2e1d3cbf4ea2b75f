"""The benchmarks go along with what they measure."""

import ast
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.pages import ROOT

SCRIPTS = sorted((ROOT / "benchmarks").rglob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_what_a_benchmark_imports_of_this_package_is_there(script: Path) -> None:
    imports = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.ImportFrom)]
    for node in imports:
        if node.module and node.module.split(".")[0] in ("applications", "interpolate"):
            module = import_module(node.module)
            for alias in node.names:
                there = hasattr(module, alias.name) or find_spec(f"{node.module}.{alias.name}")
                assert there, f"line {node.lineno}: there is no {alias.name} in {node.module}"
