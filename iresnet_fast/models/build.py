"""Networks of either kind from a configuration that says which."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from .classifier import ClassifierConfig, IResNetClassifier
from .configuration import Source, build_config, nearest, read_config
from .flow import IResNetFlow
from .flow_config import FlowConfig

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
    return model_type(build_config(config_type, settings, {}))  # type: ignore[arg-type]


def config_of(model: Model) -> dict[str, Any]:
    """The settings of a network as plain values, of which :func:`build_model` makes its like."""
    return {"kind": model.config.kind, **asdict(model.config)}
