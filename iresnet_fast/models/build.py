"""Networks of either kind from a configuration that says which."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .classifier import ClassifierConfig, IResNetClassifier
from .configuration import Source, build_config, nearest, read_config
from .flow import IResNetFlow
from .flow_config import FlowConfig
from .pretrained import CONFIG

Model = IResNetClassifier | IResNetFlow

_KINDS: dict[str, tuple[type[ClassifierConfig] | type[FlowConfig], type[Model]]] = {
    ClassifierConfig.kind: (ClassifierConfig, IResNetClassifier),
    FlowConfig.kind: (FlowConfig, IResNetFlow),
}


def build_model(config: Source, **overrides: Any) -> Model:
    """The network of a configuration, which says by ``kind`` whether it is a classifier or a flow.

    Args:
        config: a name, with ``:vanilla`` or ``:batchnorm`` behind it for the unconstrained twins of a classifier; the
            path of a TOML file; or the settings themselves.
        **overrides: settings to change.

    Raises:
        ValueError: an unknown name, kind or setting; the message suggests the nearest one.
    """
    settings = {**read_config(config), **overrides}
    kind = settings.get("kind")
    if kind not in _KINDS:
        near = nearest(str(kind), list(_KINDS))
        raise ValueError(f"kind must be {' or '.join(map(repr, _KINDS))}, got {kind!r}{near}")
    config_type, model_type = _KINDS[kind]
    return model_type(build_config(config_type, settings, {}))  # type: ignore[arg-type]  # types that belong together, in one table


def load_pretrained(folder: str | Path) -> Model:
    """The network that ``save_pretrained`` kept in a folder, of either kind, in evaluation mode.

    Raises:
        FileNotFoundError: files are missing.
        ValueError: a file is damaged, or of no kind that there is.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}. Remedy: save_pretrained writes it")
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("kind")
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if kind not in _KINDS:
        raise ValueError(f"{path} is of the kind {kind!r}; {' and '.join(_KINDS)} are known")
    return _KINDS[kind][1].from_pretrained(folder)


def config_of(model: Model) -> dict[str, Any]:
    """The settings of a network as plain values, of which :func:`build_model` makes its like."""
    return {"kind": model.config.kind, **asdict(model.config)}
