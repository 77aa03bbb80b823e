"""Imports go down the floors of the house only; read from the sources, so that nobody need remember them."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "iresnet_fast"
# Highest first. Rooms on one floor do not know each other.
FLOORS = [
    {"__main__"},
    {"cli"},
    {"reproduce"},
    {"report"},
    {"scale", "training"},
    {"compat", "distributions"},
    {"models"},
    {"data"},
    {"certificate"},
    {"nn"},
    {"estimators"},
    {"solvers"},
    {"ops"},
    {"kernels", "reference", "_extension"},
    {"finite", "optional", "whole_file"},
]
LEVEL = {room: len(FLOORS) - level for level, rooms in enumerate(FLOORS) for room in rooms}


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path, tree):
    """Absolute dotted names of everything a file imports."""
    package = ["iresnet_fast", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, node.module] if node.module else base)
            # "from . import x" and "from .. import x" name a room; "from ..nn import X" names it already.
            yield from (f"{name}.{alias.name}" for alias in node.names)


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    here = room_of(path)
    for name in imported_modules(path, tree):
        parts = name.split(".")
        assert parts[0] not in {"tests", "benchmarks"}, f"{path} imports {name}"
        if parts[0] != "iresnet_fast" or len(parts) < 2 or here == "__init__":
            continue
        there = parts[1]
        if there in LEVEL and there != here:
            assert LEVEL[there] < LEVEL[here], f"{here} (in {path.name}) must not import {there}: it is not below"


def test_every_room_has_a_floor():
    rooms = {room_of(path) for path in FILES} - {"__init__"}
    assert rooms <= LEVEL.keys()


def test_reference_imports_torch_only():
    for path in (PACKAGE / "reference").glob("*.py"):
        for name in imported_modules(path, ast.parse(path.read_text(encoding="utf-8"))):
            top = name.split(".")[0]
            allowed = {"torch", "__future__", "math", "itertools", "dataclasses", "collections"}
            assert top in allowed or name.startswith("iresnet_fast.reference"), f"{path} imports {name}"


def test_reads_relative_imports():
    """The check itself: it must see a wrong import in each way of writing it."""
    path = PACKAGE / "ops" / "imagined.py"
    for source, found in [
        ("from .. import nn", "iresnet_fast.nn"),
        ("from ..nn import X", "iresnet_fast.nn.X"),
        ("from . import conv_norm", "iresnet_fast.ops.conv_norm"),
        ("import iresnet_fast.nn", "iresnet_fast.nn"),
    ]:
        assert list(imported_modules(path, ast.parse(source))) == [found]
