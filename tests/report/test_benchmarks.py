"""The report of benchmark results."""

import json
import re

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import harness, machine, results
from benchmarks.case import Problem, Promise, Provider, StudyPoint, Work
from iresnet_fast.cli import app
from iresnet_fast.report.benchmarks import read
from iresnet_fast.report.page import write_benchmark_page

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

CPU = torch.device("cpu")


def broken(x):
    raise RuntimeError("it cannot")


def problem(name, study=None):
    return Problem(
        name=name,
        inputs=[torch.rand(100) + 1],
        providers=[
            Provider("eager <i>", lambda x: [x * x for _ in range(20)][-1], 1e-6, peer=True),
            Provider("iresnet_fast", lambda x: x.square(), 1e-6, counts=lambda output: {"steps": 4.0}),
            Provider("broken", broken, 1e-6),
        ],
        oracle=lambda x: x.double().square(),
        work=Work(1e3, torch.float32, 800),
        promises=[Promise("iresnet_fast", "eager <i>", 1e9, 1e9)],
        study=study,
    )


@pytest.fixture(scope="module")
def rows():
    found = harness.measure("squares", problem("plain"), CPU, 0.05)
    for value in (1, 2, 4):
        found += harness.measure(
            "growth", problem(f"of size {value}", StudyPoint("growth", "size", value, 2)), CPU, 0.05
        )
    return found


@pytest.fixture
def file(rows, tmp_path):
    facts = machine.facts(CPU) | {"quick": False, "ceilings": machine.ceilings(CPU)}
    results.write(tmp_path / "results.json", facts, rows)
    return tmp_path / "results.json"


def test_page_shows_every_measurement_and_needs_no_other_file(file, tmp_path):
    (found,) = read([file])
    text = write_benchmark_page([found], tmp_path / "new" / "page.html").read_text()
    for shown in ("eager &lt;i&gt;", "failed: RuntimeError: it cannot", "4 steps", "4 not met", "Scaling", "Roofline"):
        assert shown in text, shown
    assert "<i>" not in text
    assert text.count("<svg") == 3
    assert "of size 2, broken: failed: RuntimeError: it cannot" in text
    links = set(re.findall(r'(?:href|src)="([^"#][^"]*)"', text))
    assert not links
    assert "quick run" not in text


def test_slopes_are_those_of_the_last_points(file):
    document = json.loads(file.read_text())
    studied = [row for row in document["rows"] if row["study"] and row["wall"]]
    for row in studied:
        row["wall"] = 3e-4 * row["study"]["value"] ** 2
        # What each call costs by itself, at the lower end.
        if row["study"]["value"] == 1:
            document["rows"].append({**row, "problem": "small", "wall": 1.0, "study": {**row["study"], "value": 0.1}})
    file.write_text(json.dumps(document))
    (found,) = read([file])
    (study,) = found.studies
    assert (study.axis, study.slope) == ("size", 2)
    assert [curve.provider for curve in study.curves] == ["eager <i>", "iresnet_fast"]
    for curve in study.curves:
        assert curve.values == (0.1, 1, 2, 4)
        assert curve.slope == pytest.approx(2)
    assert set(found.cases) == {"squares"}


def test_counts_can_be_studied(file):
    document = json.loads(file.read_text())
    for row in document["rows"]:
        if row["study"]:
            row["study"]["of"] = "steps"
            row["counts"] = {"steps": row["study"]["value"]} if row["provider"] == "iresnet_fast" else {}
    file.write_text(json.dumps(document))
    ((curve,),) = [study.curves for study in read([file])[0].studies]
    assert curve.costs == (1, 2, 4)
    assert curve.slope == pytest.approx(1)


def test_old_files_and_studies_without_a_measurement_are_shown(file, tmp_path):
    document = json.loads(file.read_text())
    needed = ("case", "problem", "provider", "status", "error", "wall", "speedup", "floor_ratio", "promises")
    for row in document["rows"]:
        if row["study"]:
            row["wall"] = None
        else:
            for name in row.keys() - set(needed):
                del row[name]
    file.write_text(json.dumps(document))
    (found,) = read([file])
    assert found.studies == []
    text = write_benchmark_page([found], tmp_path / "page.html").read_text()
    assert "Scaling" not in text
    assert "Roofline" not in text


def test_results_that_are_none_are_named(file, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json does not exist. Remedy: python -m benchmarks"):
        read([tmp_path / "none.json"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty has no result file.*Remedy: python -m benchmarks --json"):
        read([tmp_path / "empty"])
    text = tmp_path / "text.json"
    text.write_text("{")
    with pytest.raises(ValueError, match=r"text\.json is not JSON"):
        read([text])
    for content in ("[]", "{}", '{"meta": {}, "rows": []}', '{"meta": 3, "rows": 4}', '{"meta": {}, "rows": [1]}'):
        text.write_text(content)
        with pytest.raises(ValueError, match=r"text\.json is no result file of the benchmarks: .*ceilings"):
            read([text])
    with pytest.raises(ValueError, match=r"squares / plain / eager <i> is in the result files twice"):
        read([file, file])


@pytest.mark.full
def test_committed_results_make_a_page(tmp_path):
    machines = read([results.FOLDER])
    text = write_benchmark_page(machines, tmp_path / "page.html").read_text()
    assert all(found.name in text for found in machines)
    assert len(text) < 5 << 20


def test_a_quick_run_says_so(file, tmp_path):
    document = json.loads(file.read_text())
    document["meta"]["quick"] = True
    file.write_text(json.dumps(document))
    assert "quick runs" in write_benchmark_page(read([file]), tmp_path / "page.html").read_text()


def test_command(file, tmp_path):
    done = CliRunner().invoke(app, ["report", str(file), "--out", str(tmp_path / "made" / "page.html")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "made" / "page.html").stat().st_size > 10_000
