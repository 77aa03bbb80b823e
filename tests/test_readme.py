"""The README's example prints what the README shows; the docstrings' examples hold."""

import contextlib
import doctest
import importlib
import io
import os
import pkgutil
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import iresnet_fast
import iresnet_fast as irf

ROOT = Path(__file__).parent.parent
MODULES = [
    module.name for module in pkgutil.walk_packages(iresnet_fast.__path__, "iresnet_fast.") if module.name[-2:] != "_C"
]


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "docs/coming-from.md",
        "docs/density.md",
        "docs/inverting.md",
        "docs/normalisation.md",
        "docs/scale.md",
        "docs/spectra.md",
        "docs/training.md",
    ],
)
def test_examples_print_what_the_documents_show(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", text, re.DOTALL)
    assert examples
    for code, shown in examples:
        assert len([line for line in code.splitlines() if line.strip()]) <= 15
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, document, "exec"), {})
        assert printed.getvalue() == shown


@pytest.mark.full
def test_the_example_of_a_job_works_as_typed(tmp_path):
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/scale.md")]
    found = [code for text in texts for code in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)]
    (block,) = {code for code in found if "examples/digits_table.py" in code}  # the same in both
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-e", "-c", block],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("images is whole\n")


def test_files_that_the_documents_name_exist():
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_the_results_page_is_what_the_result_files_say():
    written = runpy.run_path(str(ROOT / "docs" / "write_results.py"))["page"]()
    assert (ROOT / "docs" / "results.md").read_text(encoding="utf-8") == written


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(name)
    names = {"torch": torch, "irf": irf, **vars(irf.nn), **vars(module)}
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, name, globs=names):
        if example.examples:
            torch.manual_seed(0)
            results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example)
            assert results.failed == 0, example.name
