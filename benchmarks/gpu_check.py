"""``make gpu-check``: everything that needs a GPU, in steps that cannot cost each other their results."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Each case with the seconds it may take; a test holds them to the registry, and all steps to eight minutes.
CASE_SECONDS = {
    "certificate": 15,
    "conv_spectrum": 30,
    "conv_symbol": 20,
    "fixed_point_update": 20,
    "flow2d": 5,
    "inverse": 35,
    "log_det": 15,
    "recompute": 15,
    "scale": 15,
    "scaling": 30,
    "spectral_norm": 25,
}
_SANITIZED_TESTS = "(test_values and dtype1) or test_matches_the_fft"
SANITIZED = ("tests/ops/test_conv_symbol.py", "tests/ops/test_fixed_point_update.py")


@dataclass(frozen=True)
class Step:
    """One command, with the seconds it may take."""

    name: str
    command: Sequence[str]
    seconds: int
    missing: str | None = None


def steps(out: Path) -> list[Step]:
    """Build, tests, benchmarks (each with its ceilings), sanitizer: under 8 minutes in all."""
    python = sys.executable
    sanitizer = shutil.which("compute-sanitizer")
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    return [
        Step("build", [python, "setup.py", "-q", "build_ext", "--inplace"], 100),
        Step("doctor", [python, "-c", "from iresnet_fast.cli import main; main()", "doctor"], 20),
        Step("tests marked gpu", [*pytest, "--timeout", "60", f"--junitxml={out / 'tests.xml'}"], 100),
        *(
            Step(
                f"benchmark {case}",
                [python, "-m", "benchmarks", case, "--device", "cuda", "--json", str(out / f"{case}.json")],
                seconds,
            )
            for case, seconds in CASE_SECONDS.items()
        ),
        Step(
            "compute-sanitizer",
            [
                sanitizer or "",
                "--report-api-errors",
                "no",
                "--error-exitcode",
                "1",
                *pytest,
                "-k",
                _SANITIZED_TESTS,
                *SANITIZED,
            ],
            30,
            None if sanitizer else "compute-sanitizer is not on the PATH",
        ),
    ]


def main() -> int:
    """Run the steps, write a log and a summary; 2 without a GPU, 1 where a step failed."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_check")
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-check", help="folder for results and logs")
    out = parser.parse_args().out.resolve()
    obstacle = _no_gpu()
    out.mkdir(parents=True, exist_ok=True)
    outcomes: list[dict[str, object]] = []
    for step in steps(out):
        reason = obstacle or step.missing
        outcome = {"step": step.name, "outcome": f"not run: {reason}"} if reason else _run(step, out)
        outcomes.append(outcome)
        summary = "".join(f"  {outcome['step']:28} {outcome['outcome']}\n" for outcome in outcomes)
        (out / "summary.txt").write_text(summary, encoding="utf-8")
    print(f"\ngpu-check\n{summary}", end="")
    if obstacle:
        print(f"No GPU: {obstacle}. Nothing was measured.")
        return 2
    return (
        0 if all(outcome["outcome"] == "passed" or "not run" in str(outcome["outcome"]) for outcome in outcomes) else 1
    )


def _run(step: Step, out: Path) -> dict[str, object]:
    """Run a step within its time, its output in a log of its own and on the terminal."""
    print(f"\n== {step.name} (at most {step.seconds} s)", flush=True)
    environment = {**os.environ, "FORCE_CUDA": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "170"}
    log = out / f"{step.name.replace(' ', '-')}.log"
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as stream:
        # A session of its own, so that what a stopped step started does not disturb the next one's timings.
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=step.seconds)
            outcome = "passed" if code == 0 else f"failed (exit {code})"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            outcome = f"stopped after {step.seconds} s"
    text = log.read_text(encoding="utf-8", errors="replace")
    print(text[-6000:], flush=True)
    return {"step": step.name, "outcome": outcome, "seconds": round(time.monotonic() - started, 1), "log": log.name}


def _no_gpu() -> str | None:
    try:
        import torch  # noqa: PLC0415  (its absence is a finding)
    except ModuleNotFoundError:
        return f"{sys.executable} has no torch"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    return None


if __name__ == "__main__":
    sys.exit(main())
