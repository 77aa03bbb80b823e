"""The examples run, at their smallest."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import write_mnist

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.full


def run(name, *arguments):
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_density2d(tmp_path):
    printed = run("density2d", "--density", "moons", "--steps", 20, "--batch-size", 16, "--out", tmp_path)
    assert "invertible, proven: True" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"moons.png", "moons-depth.png", "moons.pt"}


def test_tabular(tmp_path):
    assert "malignant told from benign: area under the curve" in run("tabular", "--steps", 30)
    import numpy as np

    np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(size=(60, 3)))
    assert "nats on 12 rows held out" in run("tabular", "--steps", 5, "--data", tmp_path / "rows.npy")


def test_semi_supervised():
    printed = run("semi_supervised", "--seeds", 1, "--steps", 4, "--density-weights", 0, 0.1)
    assert "density weight 0.1: " in printed


def test_mnist_density(tmp_path):
    write_mnist(tmp_path / "mnist", train=80)
    options = ("--minutes", 0.001, "--batch-size", 8, "--test-images", 3)
    printed = run("mnist_density", "--data", tmp_path / "mnist", "--out", tmp_path / "out", *options)
    assert "bits/dim on 3 test images after 20 steps" in printed
    figures = json.loads((tmp_path / "out" / "mnist.json").read_text())
    assert figures["guaranteed"] is True
    assert (tmp_path / "out" / "mnist.png").stat().st_size > 10_000
