"""``python -m benchmarks [case …] [--quick] [--json FILE] [--save]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console

from . import machine, results
from .cases import CASES
from .harness import Row, measure
from .table import print_promises, print_rows

# Seconds of timed rounds per problem.
_BUDGET, _QUICK_BUDGET, _GPU_BUDGET = 8.0, 1.0, 2.0


def main(arguments: list[str] | None = None) -> int:
    """Measure the cases, print the tables and promises last, and write what was asked for."""
    options = _parse(arguments)
    device = torch.device(options.device)
    # Float32 means float32: with TF32 a convolution is another function, 1e-3 away from its oracle.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    # A table needs its columns also where the output goes to a file.
    width = None if sys.stdout.isatty() else 170
    console = Console(stderr=options.json == Path("-"), width=width)
    meta = machine.facts(device) | {"quick": options.quick, "ceilings": machine.ceilings(device)}
    budget = _QUICK_BUDGET if options.quick else _GPU_BUDGET if device.type == "cuda" else _BUDGET
    measured: dict[str, list[Row]] = {}
    for name in options.cases or CASES:
        rows = measured[name] = []
        for problem in CASES[name].problems(device, options.quick):
            console.log(f"{name}: {problem.name}")
            # A point of a study is one of many, and cheap to repeat.
            rows += measure(name, problem, device, budget / 4 if problem.study else budget)
            # After every problem: a run that is stopped keeps what it has.
            if options.save:
                results.write(results.FOLDER / meta["machine"] / f"{name}.json", meta, rows)
            if options.json and options.json != Path("-"):
                results.write(options.json, meta, _all(measured))
    every = _all(measured)
    if options.json == Path("-"):
        results.dump(sys.stdout, meta, every)
    for name, rows in measured.items():
        print_rows(console, CASES[name].title, rows)
    print_promises(console, every)
    console.print(
        f"{meta['device']}, {meta['threads']} threads, torch {meta['torch']}, {meta['commit']}, {meta['date']}"
    )
    return 1 if any(row.status in ("failed", "inexact") and not row.peer for row in every) else 0


def _all(measured: dict[str, list[Row]]) -> list[Row]:
    return [row for rows in measured.values() for row in rows]


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks", description="Measure, with the achieved error beside it.")
    parser.add_argument("cases", nargs="*", metavar="case", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--quick", action="store_true", help="small problems, under three minutes on two cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows to a file, - for standard output")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<machine>/<case>.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    options = parser.parse_args(arguments)
    for name in options.cases:
        if name not in CASES:
            parser.error(f"there is no case {name!r}; there are {', '.join(CASES)}")
    if options.save and options.quick:
        parser.error("--save keeps full results only; leave --quick out")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no GPU")
    return options


if __name__ == "__main__":
    sys.exit(main())
