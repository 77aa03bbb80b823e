"""A training run in a folder of its own: it can be stopped at any moment, and goes on as if it had not been."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..certificate import Certificate, certify, enforce
from ..data import ImageSplit, centered, dequantize
from ..data.augment import augment
from ..finite import finite_or_none
from ..models import IResNetFlow, Model, build_model, config_of
from ..optional import require
from ..whole_file import sweep, write_whole
from . import checkpoint as checkpoints
from .density import hybrid_loss
from .evaluate import Evaluation, evaluate
from .folder import BEST, CERTIFICATE, CONFIG, LAST, LOG, RESULT, read_settings
from .processes import Processes
from .settings import TrainingConfig, make_optimizer, rate_at
from .stepping import Stepper

_LOG_EVERY = 20
# Seeds of different steps, epochs and processes are this far apart.
_STRIDE = 1_000_003


class InterruptedRunError(KeyboardInterrupt):
    """The run was asked to stop; it has saved where it is, and goes on with ``resume``."""


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Attributes:
        steps: optimiser steps taken.
        skipped: steps that were not, for a loss or gradient that was not finite.
        evaluation: of the network at the end, on the test images.
        certificate: of the network at the end.
        seconds: wall time of training, over all parts of the run.
    """

    steps: int
    skipped: int
    evaluation: Evaluation
    certificate: Certificate
    seconds: float


def train(
    settings: Mapping[str, Any],
    training: TrainingConfig,
    data: ImageSplit,
    out: Path,
    *,
    resume: bool = False,
    tensorboard: bool = False,
    on_step: Callable[[int, int, float], None] | None = None,
    on_evaluation: Callable[[int, Evaluation], None] | None = None,
) -> RunResult:
    """Train a network, evaluate and certify it, and keep everything in a folder.

    The folder has ``config.json`` (network and training), ``log.jsonl``, ``last.safetensors`` and ``best.safetensors``
    (checkpoints: weights, optimiser and average), ``certificate.md``, and ``result.json``: everything but the weights.
    With the same threads on a CPU, a run that was stopped and resumed ends with the very weights of one that was not.

    Args:
        settings: of the network, as :func:`iresnet_fast.models.build_model` takes them.
        training: how.
        data: images to train on and to test on.
        out: the folder; it must be new, or empty, unless ``resume``.
        resume: go on from the last checkpoint in ``out``, if there is one.
        tensorboard: whether what is logged goes to ``tensorboard`` in the folder, too.
        on_step: called with the step (from 1), all steps, and the loss.
        on_evaluation: called with the step and what was measured after it.

    Raises:
        FileExistsError: ``out`` holds a run, and ``resume`` is off.
        ValueError: images of another shape than the network's, fewer than a batch of them, labels that it has no class
            for, other settings than those of the run in ``out``.
        DivergedError: ten steps in a row were skipped, or all of them.
        InterruptedRunError: Ctrl-C; the run is saved.
    """
    require("training", "safetensors", *(["tensorboard"] if tensorboard else []))
    # torch's generators are afterwards what they were before.
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        return _Run(settings, training, data, out, resume=resume, tensorboard=tensorboard).train(on_step, on_evaluation)


class _Run:
    def __init__(
        self,
        settings: Mapping[str, Any],
        training: TrainingConfig,
        data: ImageSplit,
        out: Path,
        *,
        resume: bool,
        tensorboard: bool,
    ) -> None:
        self._config, self._data, self._out = training, data, out
        self._processes = Processes()
        torch.manual_seed(training.seed)
        self._device = self._processes.device
        self._model: Model = build_model(settings).to(self._device)
        _check_data(self._model, data, training.batch_size, self._processes.count)
        if training.channels_last:
            self._model = self._model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # its overloads leave memory_format alone out
        self._optimizer = make_optimizer(training, self._model.parameters())
        self._stepper = Stepper(self._model, self._optimizer, clip=training.clip, average=training.average)
        self._steps_per_epoch = max(1, len(data.train_images) // training.batch_size)
        self._total = training.epochs * self._steps_per_epoch
        self._state: dict[str, Any] = {"step": 0, "seconds": 0.0, "cpu_seconds": 0.0, "best": None}
        self._images, self._labels = data.train_images.to(self._device), data.train_labels.to(self._device)
        self._order: tuple[int, Tensor] | None = None
        self._open_folder(config_of(self._model), resume)
        self._board = _open_board(out) if tensorboard and self._processes.first else None

    def train(
        self,
        on_step: Callable[[int, int, float], None] | None,
        on_evaluation: Callable[[int, Evaluation], None] | None,
    ) -> RunResult:
        config, state = self._config, self._state
        network = self._processes.wrap(self._model)
        loss_of = torch.compile(self._loss) if config.compile else self._loss
        evaluation: Evaluation | None = None
        started, cpu_started = time.perf_counter() - state["seconds"], time.process_time() - state["cpu_seconds"]
        with _stop_after_step() as asked:
            while state["step"] < self._total:
                step = state["step"]
                self._model.train()
                # The first step initialises what depends on data, which is no code to compile.
                loss = self._step(network, loss_of if self._stepper.taken else self._loss)
                state["step"] = step = step + 1
                state["seconds"] = time.perf_counter() - started
                state["cpu_seconds"] = time.process_time() - cpu_started
                if on_step is not None:
                    on_step(step, self._total, loss)
                if step % _LOG_EVERY == 0 or step == 1:
                    self._log(step=step, loss=loss, lr=rate_at(config, step - 1, self._steps_per_epoch))
                if config.certify_every and step % config.certify_every == 0:
                    self._log(step=step, guaranteed=self._certify().guaranteed)
                ended = step % self._steps_per_epoch == 0
                epoch = step // self._steps_per_epoch
                if ended and (epoch % config.evaluate_every == 0 or step == self._total):
                    if step == self._total:
                        self._certify()
                    evaluation = self._evaluate(step)
                    if on_evaluation is not None:
                        on_evaluation(step, evaluation)
                stopping = self._processes.any(bool(asked))
                if ended or step % config.checkpoint_every == 0 or stopping:
                    self._save(LAST)
                if stopping and step < self._total:
                    raise InterruptedRunError(
                        f"stopped after step {step} of {self._total}, and saved. Remedy: the same command with --resume"
                    )
        self._stepper.conclude()
        result = self._conclude(evaluation)
        if asked:
            raise InterruptedRunError(f"stopped after the last step: the run in {self._out} is finished")
        return result

    def _step(self, network: nn.Module, loss_of: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> float:
        """One step of the optimiser; returns the loss."""
        step = self._state["step"]
        images, labels = self._batch(step)
        torch.manual_seed(_seed(self._config.seed, step, self._processes.rank))
        x = self._prepared(images)
        for group in self._optimizer.param_groups:
            group["lr"] = rate_at(self._config, step, self._steps_per_epoch)
        return self._stepper.step(loss_of(network, x, labels), self._processes.any)

    def _prepared(self, images: Tensor) -> Tensor:
        """Integers as the network takes them: dequantised, or centred."""
        if isinstance(self._model, IResNetFlow):
            return dequantize(images, self._model.config.n_levels)
        return centered(images, self._data.n_levels)

    def _loss(self, network: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
        config = self._config
        low = torch.autocast(self._device.type, torch.bfloat16) if config.precision == "bfloat16" else nullcontext()
        with low:
            if isinstance(self._model, IResNetFlow):
                weights = {"density_weight": config.density_weight, "class_weight": config.class_weight}
                return hybrid_loss(network(x), labels if self._model.head is not None else None, **weights)
            return F.cross_entropy(network(x).float(), labels)

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This process's part of a step's batch: a function of the step alone."""
        config = self._config
        epoch, position = divmod(step, self._steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(_seed(config.seed, epoch, -1))
            self._order = epoch, torch.randperm(len(self._images), generator=generator).to(self._device)
        chosen = self._order[1][position * config.batch_size : (position + 1) * config.batch_size]
        generator = torch.Generator().manual_seed(_seed(config.seed, step, -2))
        images = augment(self._images[chosen], shift=config.shift, flip=config.flip, generator=generator)
        mine = self._processes.part_of(len(images))
        images = images[mine]
        if config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, self._labels[chosen][mine]

    def _judged(self) -> Model:
        """The network that is evaluated: the average, where there is one."""
        average = self._stepper.average
        return self._model if average is None else average.module  # type: ignore[return-value]  # AveragedModel has any Module

    def _certify(self) -> Certificate:
        model = self._judged().eval()
        rescale = self._config.enforce and model.config.coeff is not None
        certificate = enforce(model) if rescale else certify(model)
        if self._processes.first:
            write_whole(self._out / CERTIFICATE, certificate.to_markdown())
        return certificate

    def _evaluate(self, step: int) -> Evaluation:
        torch.manual_seed(_seed(self._config.seed, step, -3))
        evaluation = evaluate(self._judged().eval(), self._data)
        self._log(step=step, **evaluation.to_dict())
        best, score = self._state["best"], evaluation.score
        if math.isfinite(score) and (best is None or score < best):
            self._state["best"] = score
            self._save(BEST)
        return evaluation

    def _conclude(self, evaluation: Evaluation | None) -> RunResult:
        certificate = certify(self._judged().eval())
        known = self._known_evaluation() if evaluation is None else None  # resumed after its last step
        evaluation = evaluation or known or self._evaluate(self._total)
        stepper = self._stepper
        result = RunResult(stepper.taken, stepper.skipped, evaluation, certificate, self._state["seconds"])
        if self._processes.first and known is None:
            document = {
                "steps": result.steps,
                "skipped": result.skipped,
                "seconds": result.seconds,
                "cpu_seconds": self._state["cpu_seconds"],
                "threads": torch.get_num_threads(),
                "processes": self._processes.count,
                "device": str(self._device),
                "torch": torch.__version__,
                "parameters": sum(parameter.numel() for parameter in self._model.parameters()),
                "evaluation": evaluation.to_dict(),
                "certificate": certificate.to_dict(),
                "settings": read_settings(self._out),
            }
            write_whole(self._out / RESULT, json.dumps(document, indent=1, allow_nan=False))
        return result

    def _known_evaluation(self) -> Evaluation | None:
        """That of the run's end, where it had come to it before."""
        try:
            known = json.loads((self._out / RESULT).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return Evaluation.from_dict(known["evaluation"]) if known["steps"] == self._stepper.taken else None

    def _open_folder(self, network: dict[str, Any], resume: bool) -> None:
        sizes = {"train_images": len(self._data.train_images), "test_images": len(self._data.test_images)}
        data = {**sizes, "checksum": self._data.checksum()}
        document = {"model": network, "training": asdict(self._config), "data": data}
        path, last = self._out / CONFIG, self._out / LAST
        if self._out.exists() and not self._out.is_dir():
            raise FileExistsError(f"{self._out} is a file. Remedy: another folder")
        if self._out.is_dir() and any(self._out.iterdir()) and not resume:
            raise FileExistsError(
                f"{self._out} is not empty. Remedy: --resume to go on with its run, or another folder"
            )
        text = json.dumps(document, indent=1)
        if resume and path.is_file() and (before := read_settings(self._out)) != json.loads(text):
            raise ValueError(
                f"the run in {self._out} has other settings: {_first_difference(before, json.loads(text))}. Remedy: "
                "those of the run, or another folder"
            )
        self._processes.wait()  # all have looked before one writes
        if self._processes.first:
            self._out.mkdir(parents=True, exist_ok=True)
            sweep(self._out)
            if not path.is_file():
                write_whole(path, text)
        self._processes.wait()
        if resume and last.is_file():
            found = checkpoints.read(last)
            checkpoints.restore(found, self._model, self._optimizer, self._stepper.average)
            self._stepper.load(found.state)
            self._state = {name: found.state[name] for name in self._state}
        self._trim_log()

    def _trim_log(self) -> None:
        """Drop what was logged after the checkpoint: those steps come again."""
        path = self._out / LOG
        if self._processes.first and path.is_file():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
            write_whole(path, "".join(x for x in lines if json.loads(x)["step"] <= self._state["step"]))

    def _log(self, **entry: Any) -> None:
        if self._processes.first:
            with (self._out / LOG).open("a", encoding="utf-8") as file:
                line = finite_or_none(entry)
                file.write(json.dumps({**line, "seconds": round(self._state["seconds"], 3)}, allow_nan=False) + "\n")
        if self._board is not None:
            for name, value in entry.items():
                if name != "step" and value is not None:
                    self._board.add_scalar(name, float(value), entry["step"])
            self._board.flush()

    def _save(self, name: str) -> None:
        if self._processes.first:
            state = {**self._state, **self._stepper.counts}
            taken = checkpoints.take(self._model, self._optimizer, self._stepper.average, state)
            checkpoints.save(taken, self._out / name)


@contextmanager
def _stop_after_step() -> Iterator[list[int]]:
    """A list that Ctrl-C or a polite kill fills, so that the step is finished and the run saved; twice ends at once."""
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, ask)
    except ValueError:  # not the main thread, which alone is told
        pass
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _open_board(out: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  (an optional package)

    return SummaryWriter(str(out / "tensorboard"))


def _seed(seed: int, index: int, stream: int) -> int:
    return ((seed * _STRIDE + index) * _STRIDE + stream + 16) % 2**63


def _check_data(model: Model, data: ImageSplit, batch_size: int, processes: int) -> None:
    shape = tuple(data.train_images.shape[1:])
    if shape != model.config.in_shape:
        raise ValueError(
            f"the images are {shape}, the network takes {model.config.in_shape}. Remedy: --set in_shape=..."
        )
    if len(data.train_images) < batch_size or batch_size % processes:
        raise ValueError(
            f"batch_size must be at most the {len(data.train_images)} images and a multiple of the {processes} "
            f"processes, got {batch_size}"
        )
    classes = model.config.n_classes
    if classes and data.n_classes > classes:
        raise ValueError(f"the data has {data.n_classes} classes, the network {classes}. Remedy: --set n_classes=...")
    if isinstance(model, IResNetFlow) and model.config.n_levels != data.n_levels:
        raise ValueError(
            f"the images have {data.n_levels} grey levels, the flow {model.config.n_levels}. Remedy: --set "
            f"n_levels={data.n_levels}"
        )


def _first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    for part, settings in now.items():
        for key in {**before.get(part, {}), **settings}:
            old, new = before.get(part, {}).get(key), settings.get(key)
            if old != new:
                return f"{key} of the {part} was {old!r}, and now is {new!r}"
    return "it was written by another version"
