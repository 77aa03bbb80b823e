"""The command as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import iresnet_fast
from iresnet_fast.cli import main

COMMAND = Path(sys.executable).with_name("iresnet-fast")


def command(*arguments, expect=0, **environment):
    """The installed console script, in a process of its own."""
    done = subprocess.run(
        [COMMAND, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "160", **environment},
    )
    assert done.returncode == expect, done.stderr
    return done


@pytest.fixture
def run(monkeypatch, capsys):
    """The console script's function, in this process."""
    monkeypatch.setenv("COLUMNS", "160")

    def call(*arguments, expect=0):
        monkeypatch.setattr(sys, "argv", ["iresnet-fast", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        done = capsys.readouterr()
        message = ended.value.code
        code = 1 if isinstance(message, str) else message
        assert code == expect, done.err
        return done.out, done.err + (message if isinstance(message, str) else "")

    return call


@pytest.mark.full
def test_demo_json_and_no_bar_when_not_a_terminal(tmp_path):
    done = command("demo", "--epochs", "1", "--out", str(tmp_path / "a" / "b"), "--json")
    result = json.loads(done.stdout)
    assert [network["guaranteed"] for network in result["networks"]] == [True, False]
    assert "\r" not in done.stderr
    assert "━━ " not in done.stdout
    assert (tmp_path / "a" / "b" / "report.html").exists()
    assert "guaranteed inverse" in done.stderr


def test_doctor(run):
    findings = json.loads(command("doctor", "--json").stdout)
    assert findings["iresnet_fast"] == iresnet_fast.__version__
    assert all(op["self_test"] == "passed" for op in findings["ops"])
    text, _ = run("doctor")
    assert "conv_singular_values" in text
    assert "IRESNET_FAST_BACKEND=auto|reference|stacked|triton|extension" in text


def test_doctor_names_a_choice_that_cannot_be_served(run, monkeypatch):
    monkeypatch.setenv("IRESNET_FAST_BACKEND", "triton")
    text, _ = run("doctor", expect=1)
    assert "no triton implementation for cpu" in " ".join(text.split())


@pytest.mark.parametrize("arguments", [(), ("demo",), ("doctor",)])
def test_help_has_examples(run, arguments):
    text, _ = run(*arguments, "--help")
    assert "iresnet-fast" in text
    assert not arguments or "Examples" in text


def test_bad_arguments(run):
    assert "epochs" in run("demo", "--epochs", "0", expect=2)[1]
    _, message = run("demo", "--epochs", "1", "--out", "/proc/nowhere", expect=1)
    assert message.startswith("iresnet-fast: ")


def test_missing_torch_is_one_line(tmp_path):
    """A console script beside an interpreter that has no torch."""
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    done = command("doctor", expect=1, PYTHONPATH=str(tmp_path))
    assert (
        done.stderr.strip() == "iresnet_fast needs PyTorch >= 2.11, and there is none here. Remedy: pip install torch"
    )
