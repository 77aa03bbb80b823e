"""The command as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import iresnet_fast

COMMAND = Path(sys.executable).with_name("iresnet-fast")


def run(*arguments, expect=0, **environment):
    done = subprocess.run(
        [COMMAND, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "160", **environment},
    )
    assert done.returncode == expect, done.stderr
    return done


def test_demo_json_and_no_bar_when_not_a_terminal(tmp_path):
    done = run("demo", "--epochs", "1", "--out", str(tmp_path / "a" / "b"), "--json")
    result = json.loads(done.stdout)
    assert [network["guaranteed"] for network in result["networks"]] == [True, False]
    assert "\r" not in done.stderr
    assert "━━ " not in done.stdout
    assert (tmp_path / "a" / "b" / "report.html").exists()
    assert "guaranteed inverse" in done.stderr


def test_doctor():
    findings = json.loads(run("doctor", "--json").stdout)
    assert findings["iresnet_fast"] == iresnet_fast.__version__
    assert all(op["self_test"] == "passed" for op in findings["ops"])
    text = run("doctor").stdout
    assert "conv_singular_values" in text
    assert "IRESNET_FAST_BACKEND=auto|reference|stacked|triton|extension" in text


def test_doctor_names_a_choice_that_cannot_be_served():
    done = run("doctor", expect=1, IRESNET_FAST_BACKEND="triton")
    assert "no triton implementation for cpu" in " ".join(done.stdout.split())


@pytest.mark.parametrize("command", [(), ("demo",), ("doctor",)])
def test_help_has_examples(command):
    done = run(*command, "--help")
    assert "iresnet-fast" in done.stdout
    assert not command or "Examples" in done.stdout


def test_bad_arguments():
    assert "epochs" in run("demo", "--epochs", "0", expect=2).stderr
    done = run("demo", "--epochs", "1", "--out", "/proc/nowhere", expect=1)
    assert "Traceback" not in done.stderr
    assert "iresnet-fast: " in done.stderr


def test_missing_torch_is_one_line(tmp_path):
    """A console script beside an interpreter that has no torch."""
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    done = run("doctor", expect=1, PYTHONPATH=str(tmp_path))
    assert (
        done.stderr.strip() == "iresnet_fast needs PyTorch >= 2.11, and there is none here. Remedy: pip install torch"
    )
