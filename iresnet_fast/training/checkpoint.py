"""Checkpoints: one file that is there whole or not at all, from which a run goes on as if it had never stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..whole_file import replacing

VERSION = 1
_MODEL, _OPTIMIZER, _AVERAGE = "model.", "optimizer.", "average."


@dataclass(frozen=True)
class Checkpoint:
    """What a run is at a step.

    Attributes:
        model: state dict of the network.
        optimizer: state of the optimiser, by the parameter's index and the name of its part.
        average: state dict of the moving average, where there is one.
        state: everything that is no tensor: ``step`` and what else the run keeps.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    average: dict[str, Tensor]
    state: dict[str, Any]


def take(
    model: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module | None, state: Mapping[str, Any]
) -> Checkpoint:
    """The present state; tensors are not copied."""
    parts = {
        f"{index}.{name}": torch.as_tensor(value)
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
        if value is not None
    }
    return Checkpoint(model.state_dict(), parts, {} if average is None else average.state_dict(), dict(state))


def restore(
    checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module | None
) -> None:
    """Put a network, an optimiser and an average into that state.

    Raises:
        ValueError: the checkpoint is of another network; the message names what differs.
    """
    load_into(model, checkpoint.model)
    if average is not None:
        load_into(average, checkpoint.average)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    found: dict[int, dict[str, Tensor]] = {}
    for key, value in checkpoint.optimizer.items():
        index, name = key.split(".", 1)
        shape = parameters[int(index)].shape
        # Averages of a parameter that was a scalar in version 0.1; the count of steps is one in every version.
        found.setdefault(int(index), {})[name] = value if name == "step" or value.dim() else value.expand(shape).clone()
    optimizer.load_state_dict({"state": found, "param_groups": optimizer.state_dict()["param_groups"]})


def load_into(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """``load_state_dict`` with an error that says what differs.

    Raises:
        ValueError: names or shapes are others.
    """
    # A scalar is taken for one value: LipSwish's beta was one in version 0.1.
    own = {name: tuple(value.shape) or (1,) for name, value in model.state_dict().items()}
    theirs = {name: tuple(value.shape) or (1,) for name, value in state.items()}
    if own != theirs:
        missing, unknown = sorted(own.keys() - theirs.keys()), sorted(theirs.keys() - own.keys())
        differing = [name for name in own if name in theirs and own[name] != theirs[name]]
        first = next(iter([*missing, *unknown, *differing]))
        raise ValueError(
            f"the checkpoint is of another network: {len(missing)} tensors are missing, {len(unknown)} unknown, "
            f"{len(differing)} of another shape, as {first!r} ({theirs.get(first)}, here {own.get(first)}). Remedy: "
            "the configuration that it was trained with"
        )
    model.load_state_dict(dict(state))


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Write beside the file first, and put it in its place when it is whole: the one before survives a full disk.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors import SafetensorError  # noqa: PLC0415  (an optional package)
    from safetensors.torch import save_file  # noqa: PLC0415

    tensors = {
        prefix + name: value.detach().contiguous()
        for prefix, part in (
            (_MODEL, checkpoint.model),
            (_OPTIMIZER, checkpoint.optimizer),
            (_AVERAGE, checkpoint.average),
        )
        for name, value in part.items()
    }
    # Tensors that share memory are written as often as they have names.
    seen: set[int] = set()
    for name, value in tensors.items():
        if value.data_ptr() in seen and value.numel():
            tensors[name] = value.clone()
        seen.add(value.data_ptr())
    try:
        with replacing(path) as beside:
            save_file(tensors, beside, {"version": str(VERSION), "state": json.dumps(checkpoint.state)})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def read(path: Path) -> Checkpoint:
    """What :func:`save` wrote; nothing in it is executed.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, no checkpoint, or of a newer version.
    """
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415

    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Remedy: another checkpoint of the run") from error
    if "version" not in metadata or "state" not in metadata:
        raise ValueError(f"{path} is no checkpoint of a training run: it has tensors alone")
    if int(metadata["version"]) > VERSION:
        raise ValueError(
            f"{path} is of version {metadata['version']}, and this iresnet_fast reads up to {VERSION}. Remedy: pip "
            "install --upgrade iresnet_fast"
        )
    parts: list[dict[str, Tensor]] = [
        {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        for prefix in (_MODEL, _OPTIMIZER, _AVERAGE)
    ]
    return Checkpoint(parts[0], parts[1], parts[2], json.loads(metadata["state"]))
