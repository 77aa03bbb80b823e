"""Writes results.md from the result files: ``python docs/write_results.py``.

What differs from the papers, and why, is ``results/<data>-<scale>/findings.md``, written by hand. A training run's
``result.json`` is kept as ``results/runs/<name>.json``, and what ``iresnet-fast reproduce`` wrote as
``results/<data>-<scale>/``.
"""

import json
from pathlib import Path

from iresnet_fast.reproduce import TARGETS, Record

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results", HERE / "results.md"

_HEAD = """# Results

Written by `python docs/write_results.py` from the result files in `docs/results`, which hold every setting. CIFAR-10 is
a copy stored as JPEG (quality 75), which that of the published figures is not.

"""
_RUNS = """## Trained networks

Errors are on all test images; the reconstruction error is the largest ‖x̂ − x‖/‖x‖ of the first hundred of them, after
the inverse of the whole trunk; a guaranteed inverse is one that a certificate proves. MNIST by `iresnet-fast train
mnist-small --data PATH --out run` and `mnist-small:vanilla`; CIFAR-10, for a few minutes of a CPU, by `mnist-small
--set 'in_shape=[3,32,32]' --set epochs=2 --set flip=true --set data=cifar10-jpeg75`.

| run | test error | reconstruction error | guaranteed inverse | largest Lip of a block | parameters | steps | CPU min |
|---|---|---|---|---|---|---|---|
"""


def row(name: str, run: dict) -> str:
    """A line of the table of runs."""
    evaluation, certificate = run["evaluation"], run["certificate"]
    error = evaluation["reconstruction_error"]
    cells = (
        f"[{name}](results/runs/{name}.json)",
        "–" if evaluation["test_error"] is None else f"{100 * evaluation['test_error']:.2f} %",
        "no inverse found" if error is None else f"{error:.1e}",
        "yes" if certificate["guaranteed"] else "no",
        f"{max(block['lipschitz'] for block in certificate['blocks'] if block['lipschitz'] is not None):.3g}",
        f"{run['parameters']:,}",
        f"{run['steps']:,} of {run['settings']['training']['batch_size']}",
        f"{run['cpu_seconds'] / 60:.1f}",
    )
    return f"| {' | '.join(cells)} |\n"


def page() -> str:
    """The whole page."""
    runs = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("runs/*.json"))}
    parts = [_HEAD, _RUNS, *(row(name, run) for name, run in runs.items())]
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir() and path.name != "runs"):
        parts.append(f"\n## The papers: {folder.name}\n")
        for path in (folder / f"{target}.json" for target in TARGETS):
            if path.is_file():
                record = Record.from_dict(json.loads(path.read_text(encoding="utf-8")))
                parts.append(
                    f"\n### {record.target}: {record.title}\n\n{record.to_markdown(f'results/{folder.name}/')}"
                )
        if (notes := folder / "findings.md").is_file():
            parts.append(f"\n### Where this differs from the papers\n\n{notes.read_text(encoding='utf-8')}")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
