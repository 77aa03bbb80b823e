"""Training runs: stopped and resumed, in one process and several, with what can go wrong."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import iresnet_fast as irf
from iresnet_fast.data import ImageSplit, load_digits
from iresnet_fast.models import build_model
from iresnet_fast.training import DivergedError, InterruptedRunError, TrainingConfig
from iresnet_fast.training import checkpoint as checkpoints
from iresnet_fast.training import run as run_module
from iresnet_fast.training import train as run
from iresnet_fast.training.settings import make_optimizer, rate_at
from iresnet_fast.training.stepping import Stepper
from tests.helpers import small_classifier

ROOT = Path(__file__).parents[2]
CLASSIFIER = {"kind": "classifier", "in_shape": (1, 8, 8), "n_classes": 10, "blocks": (1, 1), "hidden": (4, 4)}
FLOW = {
    "kind": "flow",
    "in_shape": (1, 8, 8),
    "blocks": (1,),
    "hidden": (4,),
    "squeeze_input": True,
    "preprocessing": "center",
    "n_levels": 17,
    "n_classes": 10,
}


def few(train=96, test=20):
    whole = load_digits()
    return ImageSplit(
        whole.train_images[:train], whole.train_labels[:train], whole.test_images[:test], whole.test_labels[:test], 17
    )


def settings(**changes):
    plain = {"epochs": 2, "batch_size": 16, "lr": 0.05, "checkpoint_every": 4, "shift": 1, "certify_every": 5}
    return TrainingConfig(**{**plain, **changes})


def tensors(path):
    found = checkpoints.read(path)
    return {**found.model, **{f"o{k}": v for k, v in found.optimizer.items()}, **found.average}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


CASES = {
    "classifier": (CLASSIFIER, {"flip": True}),
    "dropout and batch norm": ({**CLASSIFIER, "coeff": None, "batch_norm": True, "dropout": 0.2}, {}),
    "adamax, averaged": (CLASSIFIER, {"optimizer": "adamax", "lr": 1e-3, "average": 0.9}),
    "flow": (FLOW, {"optimizer": "adamw", "lr": 1e-3, "clip": 1.0, "epochs": 1}),
    "low precision": (CLASSIFIER, {"precision": "bfloat16", "channels_last": True, "epochs": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_ends_as_one_that_never_stopped(tmp_path, case):
    """Bit for bit: weights, buffers, optimiser, average; and the log has every line once."""
    network, changes = CASES[case]
    training, data = settings(**changes), few()
    whole = run(network, training, data, tmp_path / "whole")

    class CrashedError(Exception):
        pass

    def crash_at(*steps):
        def on_step(step, total, loss):
            if step in steps:
                raise CrashedError

        return on_step

    for stop in (3, 5):
        with pytest.raises(CrashedError):
            run(network, training, data, tmp_path / "parts", resume=True, on_step=crash_at(stop))
    result = run(network, training, data, tmp_path / "parts", resume=True)
    assert same(tensors(tmp_path / "whole" / "last.safetensors"), tensors(tmp_path / "parts" / "last.safetensors"))
    assert result.evaluation == whole.evaluation
    logs = [
        [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (folder / "log.jsonl").open()]
        for folder in (tmp_path / "whole", tmp_path / "parts")
    ]
    assert logs[0] == logs[1]
    finished = run(network, training, data, tmp_path / "parts", resume=True)  # nothing is left to do
    assert finished.evaluation == whole.evaluation


def test_what_a_run_leaves(tmp_path):
    seen = []
    result = run(
        CLASSIFIER,
        settings(),
        few(),
        tmp_path / "run",
        on_evaluation=lambda step, evaluation: seen.append((step, evaluation.test_error)),
    )
    assert [step for step, _ in seen] == [6, 12]
    assert result.certificate.guaranteed
    assert result.evaluation.reconstruction_error < 1e-3
    names = {"config.json", "log.jsonl", "result.json", "certificate.md", "last.safetensors", "best.safetensors"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == names
    document = json.loads((tmp_path / "run" / "result.json").read_text())
    assert document["certificate"]["guaranteed"] is True
    assert document["evaluation"]["n_images"] == 20
    assert "Guaranteed inverse: yes" in (tmp_path / "run" / "certificate.md").read_text()


def test_leaves_the_generators_of_others_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    run(CLASSIFIER, settings(epochs=1), few(), tmp_path / "run")
    assert torch.equal(torch.randn(3), expected)


def test_it_learns(tmp_path):
    data = load_digits()
    result = run(
        {**CLASSIFIER, "blocks": (2, 2), "hidden": (8, 8)},
        settings(epochs=6, batch_size=32, lr=0.1, shift=0, certify_every=0),
        data,
        tmp_path / "run",
    )
    assert result.evaluation.test_error < 0.1


def test_an_interrupt_saves(tmp_path):
    """Ctrl-C: the step is finished, the run saved; with resume it goes on."""
    training, data = settings(checkpoint_every=1000), few()

    def interrupt(step, total, loss):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(InterruptedRunError, match="stopped after step 3 of 12, and saved. Remedy: .* --resume"):
        run(CLASSIFIER, training, data, tmp_path / "run", on_step=interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoints.read(tmp_path / "run" / "last.safetensors").state["step"] == 3
    run(CLASSIFIER, training, data, tmp_path / "run", resume=True)
    run(CLASSIFIER, training, data, tmp_path / "whole")
    assert same(tensors(tmp_path / "whole" / "last.safetensors"), tensors(tmp_path / "run" / "last.safetensors"))


def test_steps_that_are_not_finite_are_skipped_counted_and_end(tmp_path):
    with pytest.raises(DivergedError, match="10 steps in a row had a loss .* Remedy: a smaller lr than 1e\\+30"):
        run(CLASSIFIER, settings(lr=1e30, epochs=9, certify_every=0), few(), tmp_path / "run")


def test_a_run_without_a_step_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module._Run, "_loss", lambda self, network, x, labels: network(x).sum() * math.nan)
    with pytest.raises(DivergedError, match="none of 6 steps had a finite loss"):
        run(CLASSIFIER, settings(epochs=1), few(), tmp_path / "run")


def test_a_lost_step_leaves_batch_normalisation_alone():
    model = small_classifier(head="pooled").train()
    stepper = Stepper(model, torch.optim.SGD(model.parameters(), lr=0.01))
    images, labels = torch.randn(8, 1, 8, 8), torch.arange(8)
    stepper.step(F.cross_entropy(model(images), labels))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images[0] = math.nan
    stepper.step(F.cross_entropy(model(images), labels))
    assert stepper.counts == {"steps": 1, "skipped": 1, "in_a_row": 1}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_result_that_is_damaged_is_measured_again_and_one_that_is_whole_is_kept(tmp_path):
    first = run(CLASSIFIER, settings(epochs=1), few(), tmp_path / "run")
    path = tmp_path / "run" / "result.json"
    document = {**json.loads(path.read_text()), "threads": 99}
    path.write_text(json.dumps(document))
    assert run(CLASSIFIER, settings(epochs=1), few(), tmp_path / "run", resume=True).evaluation == first.evaluation
    assert json.loads(path.read_text())["threads"] == 99
    path.write_text("")
    assert run(CLASSIFIER, settings(epochs=1), few(), tmp_path / "run", resume=True).evaluation == first.evaluation
    assert json.loads(path.read_text())["steps"] == 6


def test_folders_are_not_overwritten(tmp_path):
    training, data = settings(epochs=1), few()
    run(CLASSIFIER, training, data, tmp_path / "run")
    before = tensors(tmp_path / "run" / "last.safetensors")
    with pytest.raises(FileExistsError, match="is not empty. Remedy: --resume"):
        run(CLASSIFIER, training, data, tmp_path / "run")
    with pytest.raises(ValueError, match="other settings: lr of the training was 0.05, and now is 0.1. Remedy: those"):
        run(CLASSIFIER, settings(epochs=1, lr=0.1), data, tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="has other settings: hidden of the model was"):
        run({**CLASSIFIER, "hidden": (8, 8)}, training, data, tmp_path / "run", resume=True)
    assert same(tensors(tmp_path / "run" / "last.safetensors"), before)
    other = replace(data, train_images=data.train_images.flip(3))
    with pytest.raises(ValueError, match="has other settings: checksum of the data was"):
        run(CLASSIFIER, training, other, tmp_path / "run", resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        run(CLASSIFIER, training, data, tmp_path / "file")


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    import safetensors.torch

    data = few()
    written = []
    real = safetensors.torch.save_file

    def save_file(state, path, metadata):
        written.append(path)
        if len(written) == 3:
            Path(path).write_bytes(b"half of")
            raise OSError(28, "No space left on device")
        real(state, path, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    with pytest.raises(OSError, match="No space left"):
        run(CLASSIFIER, settings(checkpoint_every=2), data, tmp_path / "run")
    assert checkpoints.read(tmp_path / "run" / "last.safetensors").state["step"] == 4
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]
    run(CLASSIFIER, settings(checkpoint_every=2), data, tmp_path / "run", resume=True)
    run(CLASSIFIER, settings(checkpoint_every=2), data, tmp_path / "whole")
    assert same(tensors(tmp_path / "whole" / "last.safetensors"), tensors(tmp_path / "run" / "last.safetensors"))


def test_bad_checkpoints(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "last.safetensors"
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        checkpoints.read(path)
    for content in (b"", b"no safetensors at all", b"\x08\0\0\0\0\0\0\0{}      "):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read|no checkpoint of a training run"):
            checkpoints.read(path)
    save_file({"a": torch.zeros(2)}, path, {"version": "99", "state": "{}"})
    with pytest.raises(ValueError, match="is of version 99, and this iresnet_fast reads up to 1. Remedy: pip install"):
        checkpoints.read(path)
    model, other = (build_model({**CLASSIFIER, "hidden": hidden}) for hidden in ((4, 4), (4, 5)))
    optimizer = make_optimizer(settings(), model.parameters())
    checkpoints.save(checkpoints.take(model, optimizer, None, {"step": 1}), path)
    found = checkpoints.read(path)
    with pytest.raises(ValueError, match=r"0 tensors are missing, 0 unknown, \d+ of another shape, as 'trunk"):
        checkpoints.restore(found, other, optimizer, None)


@pytest.mark.parametrize(
    ("network", "changes", "message"),
    [
        ({**CLASSIFIER, "in_shape": (1, 16, 16)}, {}, r"images are \(1, 8, 8\), the network takes \(1, 16, 16\)"),
        ({**CLASSIFIER, "n_classes": 5}, {}, "the data has 10 classes, the network 5. Remedy: --set n_classes"),
        ({**FLOW, "n_levels": 256}, {}, "17 grey levels, the flow 256. Remedy: --set n_levels=17"),
        (CLASSIFIER, {"batch_size": 100}, "batch_size must be at most the 96 images"),
        ({**CLASSIFIER, "kind": "clasifier"}, {}, "got 'clasifier': did you mean 'classifier'"),
    ],
)
def test_what_does_not_fit(tmp_path, network, changes, message):
    with pytest.raises(ValueError, match=message):
        run(network, settings(**changes), few(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be an int of at least 1"),
        ({"lr": -1.0}, "lr must be a number of at least 0, got -1.0"),
        ({"lr": 0}, "lr must be positive"),
        ({"lr": float("nan")}, "lr must be a number of at least 0, got nan"),
        ({"momentum": 1.0}, "momentum must be below 1"),
        ({"optimizer": "adam"}, "optimizer must be one of 'sgd', 'adamax', 'adamw', got 'adam'"),
        ({"schedule": "milestones"}, "needs milestones"),
        ({"flip": 1}, "flip must be true or false, got 1"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_rates():
    def rates(**changes):
        config = settings(epochs=10, lr=1.0, **changes)
        return [rate_at(config, step, 10) for step in range(100)]

    assert rates(schedule="constant") == [1.0] * 100
    onecycle = rates()
    assert max(onecycle) == pytest.approx(1.0, abs=1e-2)
    assert onecycle.index(max(onecycle)) in (29, 30)
    assert onecycle[-1] < 1e-4
    assert onecycle[0] == pytest.approx(0.04)
    cosine = rates(schedule="cosine", warmup=5)
    assert cosine[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert cosine[-1] == pytest.approx(0, abs=1e-12)
    falling = rates(schedule="milestones", milestones=(3, 6))
    assert (falling[29], falling[30], falling[60]) == pytest.approx((1, 0.2, 0.04))


def test_flows_of_truncated_series_are_evaluated_with_their_proof(tmp_path):
    result = run(
        {**FLOW, "estimator": "series"}, settings(epochs=2, lr=1e-3, optimizer="adamw"), few(), tmp_path / "run"
    )
    assert result.evaluation.bits_per_dim > 0


def test_large_seeds_and_json_without_infinities(tmp_path):
    """Twenty test images are one batch, which has no standard error."""

    def refuse(text):
        raise AssertionError(text)

    run(FLOW, settings(epochs=1, lr=1e-3, optimizer="adamw", seed=2**62), few(), tmp_path / "run")
    for text in (tmp_path / "run" / "log.jsonl").read_text().splitlines():
        json.loads(text, parse_constant=refuse)
    json.loads((tmp_path / "run" / "result.json").read_text(), parse_constant=refuse)


def test_packages_that_are_missing_are_named_before_anything_is_written(tmp_path, monkeypatch):
    for name, options in (("safetensors", {}), ("tensorboard", {"tensorboard": True})):
        monkeypatch.setattr(
            "iresnet_fast.optional.find_spec", lambda wanted, name=name: None if wanted == name else wanted
        )
        with pytest.raises(ModuleNotFoundError, match=rf"{name}.* Remedy: pip install 'iresnet_fast\[train\]'"):
            run(CLASSIFIER, settings(), few(), tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.full
def test_compiled_training(tmp_path):
    result = run(CLASSIFIER, settings(epochs=1, compile=True, certify_every=0), few(), tmp_path / "run")
    assert result.steps == 6
    assert result.certificate.guaranteed


PROGRAM = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, {root!r})
from tests.training.test_run import CLASSIFIER, few, settings
from iresnet_fast.training import train as run
torch.set_num_threads(1)
run(CLASSIFIER, settings(**{changes!r}), few(), Path(sys.argv[1]), resume=sys.argv[2:] == ["resume"])
print("ended")
"""


def program(tmp_path, **changes):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM.format(root=str(ROOT), changes=changes))
    return path


@pytest.mark.full
@pytest.mark.soak
def test_ten_kills_at_random_moments(tmp_path):
    """kill -9, and resume: the weights of a run that nobody disturbed, bit for bit."""
    script = program(tmp_path, epochs=24, checkpoint_every=2)
    subprocess.run([sys.executable, script, tmp_path / "whole"], check=True, timeout=200)
    draw = random.Random(0)
    killed = 0
    while killed < 10:
        process = subprocess.Popen([sys.executable, script, tmp_path / "parts", "resume"], stdout=subprocess.DEVNULL)
        log = tmp_path / "parts" / "last.safetensors"
        changed = log.stat().st_mtime_ns if log.exists() else 0
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline and process.poll() is None:  # until it has written anything
            if log.exists() and log.stat().st_mtime_ns != changed:
                break
            time.sleep(0.005)
        time.sleep(draw.random() * 0.1)
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        killed += 1
    subprocess.run([sys.executable, script, tmp_path / "parts", "resume"], check=True, timeout=200)
    assert killed == 10
    assert same(tensors(tmp_path / "whole" / "last.safetensors"), tensors(tmp_path / "parts" / "last.safetensors"))


@pytest.mark.full
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_two_processes_equal_one(tmp_path):
    """Within rounding: the batch is divided, gradients are averaged, ActNorm sees all of it."""
    # In fp32 sums of another order differ by rounding, which a few steps do not amplify much.
    script = program(tmp_path, epochs=1, certify_every=0, lr=0.01)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, script, tmp_path / "one"], check=True, timeout=200, env=env)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    subprocess.run([*launch, script, tmp_path / "two"], check=True, timeout=280, env=env)
    one, two = (tensors(tmp_path / name / "last.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        if not name.endswith(("_u", "_v")):  # of which the sign is free
            torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)


def test_the_networks_that_are_built():
    plain = build_model("iresnet-38:vanilla")
    assert not any(irf.nn.find_spectral_norm(part) for part in plain.modules())
    normalised = build_model("iresnet-38:batchnorm")
    assert sum(isinstance(part, torch.nn.BatchNorm2d) for part in normalised.trunk.modules()) == 12 * 3 - 1
    with pytest.raises(ValueError, match="unknown twin 'vanila': did you mean 'vanilla'"):
        build_model("iresnet-38:vanila")
    with pytest.raises(ValueError, match="this is the configuration of a flow, not of a classifier"):
        irf.models.IResNetClassifier.from_config("density2d")
