"""The folder of a training run, and the network in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..models import Model, build_model
from . import checkpoint as checkpoints

LAST, BEST = "last.safetensors", "best.safetensors"
CONFIG, LOG, RESULT, CERTIFICATE = "config.json", "log.jsonl", "result.json", "certificate.md"
_AVERAGED = "module."


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of a run: ``model`` and ``training``, and what ``data`` it has.

    Raises:
        FileNotFoundError: the folder is not that of a run.
        ValueError: its settings are damaged.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not the folder of a training run: it has no {CONFIG}")
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return settings


def load_run(folder: Path, checkpoint: str = LAST) -> Model:
    """The network of a run, in evaluation mode: its moving average, where there is one.

    Args:
        folder: of the run.
        checkpoint: ``"last.safetensors"`` or ``"best.safetensors"``.

    Raises:
        FileNotFoundError: there is no such run or checkpoint.
        ValueError: the checkpoint is damaged, or of another network.
    """
    model = build_model(read_settings(folder)["model"])
    found = checkpoints.read(folder / checkpoint)
    averaged = {
        name.removeprefix(_AVERAGED): value for name, value in found.average.items() if name.startswith(_AVERAGED)
    }
    checkpoints.load_into(model, averaged or found.model)
    return model.eval()
