"""Training and its commands as a user runs them."""

import json
import sys

import numpy as np
import pytest

from iresnet_fast.cli import main
from iresnet_fast.cli.runs import split_settings
from iresnet_fast.models import read_config
from tests.data.test_load import write_cifar10
from tests.helpers import write_mnist

TINY = """
kind = "classifier"
in_shape = [1, 28, 28]
n_classes = 10
squeeze_input = true
blocks = [1]
hidden = [4]
coeff = 0.8

[training]
data = "mnist"
epochs = 1
batch_size = 8
lr = 0.05
clip = 1.0
"""
FLOW = """
kind = "flow"
in_shape = [1, 28, 28]
squeeze_input = true
blocks = [1]
hidden = [4]
preprocessing = "center"

[training]
data = "mnist"
epochs = 1
batch_size = 8
optimizer = "adamw"
lr = 1e-3
"""


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """The console script's function, in this process and in a folder of its own with MNIST-like data."""
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("IRESNET_FAST_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    write_mnist(tmp_path / "mnist", train=40)
    (tmp_path / "tiny.toml").write_text(TINY)
    (tmp_path / "flow.toml").write_text(FLOW)

    def call(*arguments, expect=0):
        monkeypatch.setattr(sys, "argv", ["iresnet-fast", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        done = capsys.readouterr()
        message = ended.value.code
        code = 1 if isinstance(message, str) else message
        assert code == expect, (done.err, message)
        return done.out, done.err + (message if isinstance(message, str) else "")

    return call


def test_a_classifier_from_training_to_reconstruction(run, tmp_path):
    text, _ = run("train", "tiny.toml", "--data", "mnist", "--out", "run", "--set", "hidden=[5]", "--set", "lr=0.02")
    assert "5 steps (0 skipped)" in text
    assert "invertible: proven" in text
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["model"]["hidden"] == [5]
    assert settings["training"]["lr"] == 0.02
    _, message = run("train", "tiny.toml", "--data", "mnist", "--out", "run", expect=1)
    assert "run is not empty. Remedy: --resume" in message
    text, _ = run("evaluate", "run", "--data", "mnist", "--json")
    assert json.loads(text)["n_images"] == 3
    assert "test error" in run("evaluate", "run", "--data", "mnist", "--best")[0]
    assert json.loads(run("certify", "run", "--json")[0])["guaranteed"] is True
    assert "**Guaranteed inverse: yes**" in run("certify", "run")[0]
    assert "relative error" in run("reconstruct", "run", "--data", "mnist", "--count", 2, "--out", "r.png")[0]
    assert (tmp_path / "r.png").stat().st_size > 500
    _, message = run("sample", "run", expect=1)
    assert "run has a classifier, which has no density to draw from. Remedy: a run of a flow" in message


def test_a_flow_from_training_to_samples(run, tmp_path):
    text, _ = run("train", "flow.toml", "--data", "mnist", "--out", "run", "--json")
    assert json.loads(text)["evaluation"]["bits_per_dim"] > 0
    run("sample", "run", "--count", 5, "--out", "samples.npy", "--temperature", 0.5)
    assert np.load(tmp_path / "samples.npy").shape == (5, 1, 28, 28)
    run("sample", "run", "--count", 5, "--out", "samples.png")
    from PIL import Image

    assert Image.open(tmp_path / "samples.png").size == (3 * 29, 2 * 29)
    run("interpolate", "run", "--data", "mnist", "--rows", 1, "--steps", 3, "--out", "between.npy")
    _, message = run("interpolate", "run", "--data", "mnist", "--rows", 2, expect=1)
    assert "--rows 2 takes 4 test images, and there are 3. Remedy: fewer rows" in message
    assert np.load(tmp_path / "between.npy").shape == (3, 1, 28, 28)


def test_twins_are_trained_and_not_proven(run):
    config = {**read_config("mnist-small:batchnorm")}
    assert (config["coeff"], config["batch_norm"]) == (None, True)
    text, _ = run("train", "tiny.toml", "--data", "mnist", "--out", "plain", "--set", "coeff=none")
    assert "invertible: not proven" in text
    assert "Guaranteed inverse: no" in run("certify", "plain", expect=1)[0]


def test_tensorboard(run, tmp_path):
    pytest.importorskip("tensorboard")
    run("train", "tiny.toml", "--data", "mnist", "--out", "run", "--tensorboard")
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "mnist-smal", "--out", "run"), "unknown configuration 'mnist-smal': did you mean 'mnist-small'"),
        (("train", "tiny.toml", "--out", "run", "--set", "epoch=3"), "unknown setting 'epoch': did you mean 'epochs'"),
        (("train", "tiny.toml", "--out", "run", "--set", "actnorm=1", "--data", "mnist"), "actnorm must be true or"),
        (("train", "tiny.toml", "--out", "run", "--set", "epochs"), "--set takes key=value, got 'epochs'"),
        (("train", "tiny.toml", "--out", "run"), "data/MNIST/raw/train-images-idx3-ubyte"),
        (("train", "tiny.toml", "--out", "run", "--data", "nowhere"), "nowhere"),
        (("train", "missing.toml", "--out", "run"), "missing.toml"),
        (("train", "digits", "--out", "run", "--data", "mnist"), "images are (1, 28, 28), the network takes (1, 8, 8)"),
        (("evaluate", "nothing"), "nothing is not the folder of a training run: it has no config.json"),
    ],
)
def test_bad_input(run, arguments, message):
    assert message in " ".join(run(*arguments, expect=1)[1].split())


def test_the_place_of_a_named_set_comes_first(run, tmp_path):
    """torchvision keeps all sets in one folder."""
    write_mnist(tmp_path / "all" / "MNIST" / "raw")
    write_cifar10(tmp_path / "all" / "cifar-10-batches-py")
    (tmp_path / "ten.toml").write_text(TINY.replace('"mnist"', '"cifar10"').replace("[1, 28, 28]", "[3, 32, 32]"))
    assert "proven" in run("train", "ten.toml", "--data", "all", "--out", "run")[0]


def test_an_interrupt_says_how_to_go_on(run, monkeypatch):
    from iresnet_fast.training import InterruptedRunError

    def interrupted(*args, **kwargs):
        raise InterruptedRunError("stopped, and saved")

    monkeypatch.setattr("iresnet_fast.cli.runs.train_network", interrupted)
    assert "stopped, and saved" in run("train", "tiny.toml", "--data", "mnist", "--out", "run", expect=130)[1]


def test_settings_are_split():
    model, training = split_settings(
        {"kind": "flow", "in_shape": [2], "training": {"lr": 0.1}},
        ["fc_blocks=3", "optimizer=adamw", "prior=learned", "actnorm=False"],
    )
    assert model == {"kind": "flow", "in_shape": [2], "fc_blocks": 3, "prior": "learned", "actnorm": False}
    assert (training.lr, training.optimizer) == (0.1, "adamw")
    with pytest.raises(ValueError, match="unknown setting 'lrr': did you mean 'lr'. of training"):
        split_settings({"kind": "flow", "training": {"lrr": 0.1}}, [])


@pytest.mark.parametrize("name", ["train", "evaluate", "certify", "reconstruct", "sample", "interpolate"])
def test_help_has_examples(run, name):
    assert f"iresnet-fast {name}" in run(name, "--help")[0]
