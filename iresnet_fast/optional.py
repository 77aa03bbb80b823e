"""Packages that only a part of what there is needs."""

from __future__ import annotations

from importlib.util import find_spec

# By the name that is imported: what pip calls it, and the extra that brings it.
_PACKAGES = {
    "PIL": ("pillow", "train"),
    "jinja2": ("jinja2", "demo"),
    "matplotlib": ("matplotlib", "demo"),
    "normflows": ("normflows", "peers"),
    "pyarrow": ("pyarrow", "train"),
    "ray": ("ray", "scale"),
    "safetensors": ("safetensors", "train"),
    "sklearn": ("scikit-learn", "demo"),
    "tensorboard": ("tensorboard", "train"),
    "zuko": ("zuko", "peers"),
}


def require(purpose: str, *packages: str) -> None:
    """Check for packages before the work that needs them.

    Args:
        purpose: what needs them, as the subject of the message.
        packages: the names that are imported.

    Raises:
        ModuleNotFoundError: one is not installed; it says what needs it, and the extra that brings it.
    """
    for package in packages:
        if find_spec(package) is None:
            name, extra = _PACKAGES[package]
            raise ModuleNotFoundError(
                f"{purpose} needs {name}, which is not installed. Remedy: pip install 'iresnet_fast[{extra}]'",
                name=package,
            )
