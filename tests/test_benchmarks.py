"""The harness: exact before fast, one schema, promises judged; the README shows what the result files say."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, harness, machine, readme, results
from benchmarks.case import Problem, Promise, Provider, Work
from benchmarks.cases import CASES, scale
from iresnet_fast.report.benchmarks import Results, read

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def problem(**changes):
    def broken(x):
        raise RuntimeError("no\nsecond line")

    def mute(x):
        raise RuntimeError

    settings = {
        "name": "square",
        "inputs": [torch.randn(1000), torch.randn(1000)],
        "oracle": lambda x: x.double().square(),
        "providers": [
            Provider("slow", lambda x: [x.square() for _ in range(200)][-1], 1e-6),
            Provider("fast", lambda x: x.square(), 1e-6, counts=lambda output: {"steps": 4.0}),
            Provider("wrong", lambda x: x.square() + 0.1, 1e-6),
            Provider("nan", lambda x: x / 0 * 0, 1e-6),
            Provider("broken", broken, 1e-6),
            Provider("mute", mute, 1e-6),
            Provider("absent", lambda x: x, 1e-6, missing="not installed"),
        ],
        "work": Work(1000, torch.float32, 8000),
        "promises": [
            Promise("fast", "slow", 2, 1e9),
            Promise("fast", "slow", 1e9, 1e9),
            Promise("fast", "slow", 0.5, 1e-9, quantity="share"),
            Promise("fast", None, 5, 3, quantity="value", of="steps"),
            Promise("wrong", "slow", 2, 3),
        ],
        **changes,
    }
    return Problem(**settings)


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a compiler")
def test_ceilings_are_what_a_thread_can_do_not_what_blas_does():
    single, double = (machine.vector_rate(1, dtype) for dtype in (torch.float32, torch.float64))
    assert 1.2 * double < single < 3.5 * double
    assert machine.rate("cpu", 1, torch.float32) >= max(single, machine.matrix_rate("cpu", 1, torch.float32))


def test_ceilings_without_a_compiler_say_so(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning, match=r"no-such-compiler does not compile multiply_adds.cpp.*matrix products alone"):
        assert machine._multiply_adds.__wrapped__() is None


@pytest.fixture(scope="module")
def rows():
    return {row.provider: row for row in harness.measure("test", problem(), CPU, 0.1)}


def test_no_timing_without_the_right_answer(rows):
    statuses = {name: row.status for name, row in rows.items()}
    assert statuses == {
        "slow": "measured",
        "fast": "measured",
        "wrong": "inexact",
        "nan": "inexact",
        "broken": "failed",
        "mute": "failed",
        "absent": "missing",
    }
    assert all((row.wall is None) == (row.status != "measured") for row in rows.values())
    assert 1e-3 < rows["wrong"].error < 0.5
    assert rows["broken"].reason == "RuntimeError: no"


def test_figures(rows):
    fast = rows["fast"]
    assert fast.error < 1e-6
    assert fast.speedup == pytest.approx(rows["slow"].wall / fast.wall)
    assert fast.speedup > 2
    assert fast.floor_ratio == pytest.approx(fast.wall / fast.floor)
    assert fast.rounds >= 3
    assert fast.cpu > 0
    assert fast.peak_bytes is None or fast.peak_bytes >= 0


def test_promises(rows):
    verdicts = [promise["verdict"] for promise in rows["fast"].promises]
    assert verdicts == ["met", "not met", "met", "met"]
    assert rows["wrong"].promises[0]["verdict"] == "not measured"


def test_peak_memory_sees_an_allocation():
    found = machine.peak_memory(lambda: torch.ones(8 << 20, dtype=torch.float64), CPU)
    assert found is None or 60 << 20 < found < 80 << 20


def test_schema(rows, tmp_path):
    path = tmp_path / "machine" / "test.json"
    facts = machine.facts(CPU) | {"quick": False, "ceilings": {"copy": 1e9}}
    results.write(path, facts, list(rows.values()))
    found = read([tmp_path])
    text = readme.page(found)
    assert "| square | fast |" in text
    assert "| square | wrong | inexact: error" in text
    assert "| square | mute | failed: RuntimeError: no message |" in text
    unmet = readme.not_met(found)
    assert unmet.count("test, square: fast against slow, wall") == 1
    assert "(must 1,000,000,000×)" in unmet
    assert "wrong against slow, wall – (must 2×)" in unmet


def test_headlines_compare_what_both_were_measured_on(monkeypatch):
    meta = {"device": "M", "threads": 2, "torch": "2", "date": "2026-01-01"}

    def row(problem, provider, wall, error):
        return {"case": "c", "problem": problem, "provider": provider, "wall": wall, "error": error, "promises": []}

    rows = [row("one", "ours", 1.0, 1e-7), row("one", "peer (3)", 5.0, 1e-6)]
    rows += [row("two", "ours", 1.0, 1e-8), row("two", "peer (9)", 2.0, 1e-9)]
    rows += [row("three", "ours", 1.0, 1e-3), row("three", "peer (9)", None, None)]
    monkeypatch.setattr(readme, "HEADLINES", (readme.Headline("it", "c", "ours", "peer", "the peer"),))
    found = Results((meta,), tuple(rows))
    text = readme.headlines([found])
    assert "| it | the peer | 2 | 2× to 5× | 1.0e-07, 1.0e-06 |" in text
    assert "Every promise" in readme.not_met([found])


def test_documents_show_the_result_files():
    found = read([results.FOLDER])
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.update(text, found) == text, "run python -m benchmarks.readme"
    assert readme.PAGE.read_text(encoding="utf-8") == readme.page(found), "run python -m benchmarks.readme"


def test_every_headline_has_results():
    text = readme.headlines(read([results.FOLDER]))
    for headline in readme.HEADLINES:
        assert f"| {headline.task} | {headline.shown} |" in text, headline


def test_committed_results_are_exact_and_complete():
    found = read([results.FOLDER])
    assert found
    for measured in found:
        assert not any(meta["quick"] for meta in measured.meta)
        assert {row["case"] for row in measured.rows} <= CASES.keys()
        for row in measured.rows:
            assert row["status"] in ("measured", "missing") or row["peer"]
            assert row["status"] != "measured" or row["error"] <= row["tolerance"]
    assert {row["case"] for measured in found for row in measured.rows} == CASES.keys()


@pytest.mark.full
def test_command_line_measures():
    command = [sys.executable, "-m", "benchmarks"]
    done = subprocess.run(
        [*command, "fixed_point_update", "--quick", "--device", "cpu", "--json", "-"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert {row["case"] for row in json.loads(done.stdout)["rows"]} == {"fixed_point_update"}
    assert "Promises" in done.stderr


def test_command_line_knows_its_cases():
    command = [sys.executable, "-m", "benchmarks"]
    done = subprocess.run([*command, "inverted"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "there is no case 'inverted'; there are certificate, conv_spectrum" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_check_without_a_gpu_says_so(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "No GPU" in done.stdout
    assert done.stdout.count("not run") == len(gpu_check.steps(tmp_path))


def test_gpu_check_measures_every_case_within_eight_minutes(tmp_path):
    assert gpu_check.CASE_SECONDS.keys() == CASES.keys()
    assert sum(step.seconds for step in gpu_check.steps(tmp_path)) <= 480


def test_pace_is_of_the_time_in_which_all_workers_work():
    alone = [(10.0, 12.0, 100), (12.0, 14.0, 100)]
    assert scale._pace(alone, 1) == pytest.approx(4 / 200)
    late = [(11.0, 13.0, 100), (13.0, 17.0, 100)]  # together from 11 to 14: 150 and 125 samples
    assert scale._pace(alone + late, 2) == pytest.approx(3 / (50 + 100 + 100 + 25))
