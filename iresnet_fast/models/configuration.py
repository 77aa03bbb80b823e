"""Named configurations: settings from a name, a TOML file or a mapping."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

_Config = TypeVar("_Config")
Source = str | Path | Mapping[str, Any]


# Networks to compare with: the same without a Lipschitz constraint, and with batch normalisation in its branches.
_TWINS: dict[str, dict[str, Any]] = {"vanilla": {"coeff": None}, "batchnorm": {"coeff": None, "batch_norm": True}}
# What a configuration says beside the settings of its network.
_BESIDE = ("kind", "training")


def read_config(config: Source) -> dict[str, Any]:
    """The settings of a configuration; ``kind`` says of what network, and ``training`` how to train it.

    Args:
        config: the name of one that the package carries, with ``:vanilla`` or ``:batchnorm`` behind it for its
            unconstrained twins; the path of a TOML file; or the settings themselves.

    Raises:
        ValueError: an unknown name; the message suggests the nearest one.
    """
    if isinstance(config, Mapping):
        return dict(config)
    name, _, twin = str(config).partition(":")
    if twin and twin not in _TWINS:
        raise ValueError(f"unknown twin {twin!r}{nearest(twin, list(_TWINS))} of {name}; there are {', '.join(_TWINS)}")
    return {**_read(name), **_TWINS.get(twin, {})}


def build_config(kind: type[_Config], config: Source, overrides: Mapping[str, Any]) -> _Config:
    """A configuration of this kind.

    Args:
        kind: its dataclass.
        config: as for :func:`read_config`.
        overrides: settings to change.

    Raises:
        ValueError: an unknown name or setting; the message suggests the nearest one. A configuration of another kind.
    """
    settings = {**read_config(config), **overrides}
    said, own = settings.get("kind"), getattr(kind, "kind", None)
    if said is not None and said != own:
        raise ValueError(f"this is the configuration of a {said}, not of a {own}")
    settings = {key: value for key, value in settings.items() if key not in _BESIDE}
    known = [item.name for item in fields(kind)]  # type: ignore[arg-type]  # a type of dataclass
    for key in settings:
        if key not in known:
            raise ValueError(f"unknown setting {key!r}{nearest(key, known)} of a {kind.__name__}")
    needed = [item.name for item in fields(kind) if item.default is MISSING]  # type: ignore[arg-type]  # a type of dataclass
    if missing := [name for name in needed if name not in settings]:
        raise ValueError(f"a {kind.__name__} needs {', '.join(missing)}")
    return kind(**settings)


def check_choices(config: Any, choices: Mapping[str, Sequence[str]]) -> None:
    """Raise where a setting is none of its choices."""
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {getattr(config, name)!r}")


def check_counts(config: Any, **least: int) -> None:
    """Raise where a setting is not an int of at least its least value."""
    for name, minimum in least.items():
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"{name} must be an int of at least {minimum}, got {value!r}")


def check_flags(config: Any, *names: str) -> None:
    """Raise where a setting is neither True nor False."""
    for name in names:
        if not isinstance(getattr(config, name), bool):
            raise ValueError(f"{name} must be true or false, got {getattr(config, name)!r}")


def check_numbers(config: Any, *names: str) -> None:
    """Raise where a setting is no number; None is one that is left out."""
    for name in names:
        value = getattr(config, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{name} must be a number, got {value!r}")


def freeze_sequences(config: Any, *names: str) -> None:
    """Make tuples of ints of these settings; raise where one is not a sequence of ints."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, Sequence) or not all(isinstance(entry, int) for entry in value):
            raise ValueError(f"{name} must be a sequence of ints, got {value!r}")
        object.__setattr__(config, name, tuple(value))


def check_stages(config: Any, halvings: int) -> None:
    """Raise where a trunk of residual blocks cannot be made of these settings."""
    if len(config.blocks) != len(config.hidden):
        raise ValueError(
            f"blocks and hidden need one entry per stage, got {len(config.blocks)} and {len(config.hidden)}"
        )
    if min((*config.blocks, *config.hidden), default=1) < 1:
        raise ValueError(f"blocks and hidden must be positive, got {config.blocks} and {config.hidden}")
    if config.coeff is not None and not 0 < config.coeff < 1:
        raise ValueError(
            f"coeff must be in (0, 1) for an invertible network, got {config.coeff}; None for a plain ResNet"
        )
    if any(size % 2**halvings for size in config.in_shape[1:]):
        raise ValueError(
            f"{len(config.blocks)} stages{' and squeeze_input' * config.squeeze_input} halve the image {halvings} "
            f"times: H and W of in_shape={config.in_shape} must be divisible by {2**halvings}"
        )


def _read(config: str | Path) -> dict[str, Any]:
    folder = resources.files(__package__) / "configs"
    path = Path(config)
    if path.suffix == ".toml":
        return tomllib.loads(path.read_text(encoding="utf-8"))
    names = sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))
    if str(config) not in names:
        raise ValueError(
            f"unknown configuration {str(config)!r}{nearest(str(config), names)}; there are {', '.join(names)}, or "
            "the path of a .toml file"
        )
    return tomllib.loads((folder / f"{config}.toml").read_text(encoding="utf-8"))


def nearest(word: str, known: list[str]) -> str:
    """What was probably meant, as the middle of a message; nothing where nothing is near."""
    close = difflib.get_close_matches(word, known, n=1)
    return f": did you mean {close[0]!r}?" if close else ""
