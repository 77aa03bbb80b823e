"""What the documents say: their code runs, prints what they show, and names what there is."""

import contextlib
import importlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import benchmarks.cases
from benchmarks import harness
from tests.helpers import write_mnist

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
# Lines of shell that are run elsewhere, and where.
ELSEWHERE = {
    "make demo": "tests/test_cli.py, shorter",
    "make test": "this run",
    "iresnet-fast reproduce table1 --data path/to/mnist --scale cpu --out reproduced": "tests/reproduce, smaller",
    "pip install torch 'setuptools>=77' ninja": "tests/test_install.py",
    "pip install --no-build-isolation '.[demo,train,scale]'": "tests/test_install.py, without the extras",
}


def blocks(page, language):
    """Code of a page, with the text that is shown as its output."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```\n(?:\n```text\n(.*?)```)?", text, re.DOTALL | re.MULTILINE)


JOB = [code for code, _ in blocks("docs/scale.md", "sh")[:1]]


def pages(language):
    # Those on jobs over files need their files and Ray.
    heavy = {"docs/scale.md": pytest.mark.full, "docs/tutorial.md": pytest.mark.full}
    return [pytest.param(page, marks=heavy.get(page, ())) for page in PAGES if blocks(page, language)]


def lines_to_run(page):
    """Lines of shell of a page; the README's example of a job is that of its page."""
    found = [code for code, _ in blocks(page, "sh") if page == "docs/scale.md" or code not in JOB]
    return [line for line in "".join(found).splitlines() if line.split("  ")[0] not in ELSEWHERE]


def shell(commands, folder):
    """Run lines of shell where a reader would: in the project's folder, with the environment on the path."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", commands],
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{commands}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the commands of a page run one after the other."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    write_mnist(tmp_path / "path" / "to" / "mnist", train=300, test=16)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_python(page):
    """Every block of a page in one program."""
    names = {}
    for code, shown in blocks(page, "python"):
        assert not shown or len([line for line in code.splitlines() if line.strip()]) <= 15
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, page, "exec"), names)
        assert not shown or printed.getvalue() == shown


@pytest.mark.parametrize("page", [page for page in pages("python") if "CONTRIBUTING.md" not in page.values])
def test_python_of_a_page_runs_from_top_to_bottom_and_prints_what_is_shown(page, folder):
    if page == "docs/scale.md":  # Ray keeps what other tests' Rays had in their process
        program = f"from tests import test_documents; test_documents.run_python({page!r})"
        shell(f"{sys.executable} -c {shlex.quote(program)}", folder)
    else:
        run_python(page)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", [page for page in PAGES if lines_to_run(page)])
def test_commands_of_a_page_run_from_top_to_bottom(page, folder):
    shell("\n".join(lines_to_run(page)), folder)


def test_lines_that_are_run_elsewhere_are_in_the_documents():
    lines = {line.split("  ")[0] for page in PAGES for code, _ in blocks(page, "sh") for line in code.splitlines()}
    assert lines >= ELSEWHERE.keys()


def test_the_recipe_for_a_case_is_one_that_can_be_measured():
    ((code, _),) = blocks("CONTRIBUTING.md", "python")
    names = {"__name__": f"{benchmarks.cases.__name__}.square", "__package__": benchmarks.cases.__name__}
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)
    (problem,) = names["CASE"].problems(torch.device("cpu"), True)
    rows = harness.measure("square", problem, torch.device("cpu"), 0.05)
    assert [row.status for row in rows] == ["measured", "measured"]


def test_files_that_the_documents_name_exist():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8")):
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def test_sections_that_the_documents_link_to_exist():
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for target, section in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", text):
            there = (ROOT / page).parent / target if target else ROOT / page
            prose = re.sub(r"^```.*?^```$", "", there.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
            headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert section in anchors, f"{page} links to {target}#{section}"


def test_the_results_page_is_what_the_result_files_say():
    written = runpy.run_path(str(ROOT / "docs" / "write_results.py"))["page"]()
    assert (ROOT / "docs" / "results.md").read_text(encoding="utf-8") == written


def test_the_map_of_the_code_is_the_tree():
    """Every path of the map exists, and every folder of code, and every file beside folders, is on it."""
    ((tree, _),) = [block for block in blocks("CONTRIBUTING.md", "") if "library.cpp" in block[0]]
    named, above = set(), ""
    for line in tree.splitlines():
        paths = re.match(r"( *)(\S.*?)(?:  |$)", line)
        if paths is None or len(paths[1]) > 2:
            continue  # the explanation goes on
        above = above if paths[1] else ""
        for path in paths[2].split():
            named.add(above + path)
        if not paths[1] and paths[2].endswith("/") and paths[0].rstrip() == paths[2]:
            above = paths[2]
    for path in named:
        assert list(ROOT.glob(path.replace("<op>", "*"))), f"CONTRIBUTING.md has {path}"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    if not listed:
        pytest.skip("no git checkout")
    for file in listed.splitlines():
        parts = Path(file).parts
        if parts[0] in ("csrc", "iresnet_fast"):
            room = "/".join(parts[:2]) + ("/" if len(parts) > 2 else "")
            assert any(path.startswith(room) for path in named) or parts[-1].startswith("__"), f"{file} is on no map"
        elif len(parts) > 1 and not parts[0].startswith("."):
            assert f"{parts[0]}/" in named, f"{file} is on no map"


@pytest.mark.full
def test_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    reference = "".join(path.read_text(encoding="utf-8") for path in tmp_path.glob("api/*.html"))
    for path in (ROOT / "docs" / "api").glob("*.md"):
        room = {"certify": "certificate"}.get(path.stem, path.stem)
        rooms = (f"iresnet_fast.{room}", f"module-iresnet_fast.{room}")
        for name in getattr(importlib.import_module(f"iresnet_fast.{room}"), "__all__", ()):
            assert any(f'id="{found}.{name}"' in reference for found in (*rooms, "iresnet_fast")), name
    text = "".join(path.read_text(encoding="utf-8") for path in tmp_path.glob("*.html"))
    pictures = set(re.findall(r'<img[^>]* src="([^":]+)"', text))
    assert pictures
    for picture in pictures:
        assert (tmp_path / picture).is_file(), picture
