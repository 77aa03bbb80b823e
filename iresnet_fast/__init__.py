"""Fast, certified invertible residual networks for PyTorch."""

import sys as _sys
from importlib.metadata import version as _version
from pathlib import Path as _Path

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError:
    _message = "iresnet_fast needs PyTorch >= 2.11, and there is none here. Remedy: pip install torch"
    if _Path(_sys.argv[0]).name == "iresnet-fast":
        _sys.exit(_message)
    raise ImportError(_message) from None

from . import compat, data, distributions, estimators, models, nn, ops, solvers, training
from .certificate import Certificate, certify, enforce, layer_spectra, register_lipschitz, spectra_to_markdown
from .nn import fuse, settle, unfuse
from .ops import conv_norm_bound, conv_norm_certified, conv_singular_values
from .solvers import InverseResult, NotConvergedError

__version__ = _version("iresnet_fast")

__all__ = [
    "Certificate",
    "InverseResult",
    "NotConvergedError",
    "certify",
    "compat",
    "conv_norm_bound",
    "conv_norm_certified",
    "conv_singular_values",
    "data",
    "distributions",
    "enforce",
    "estimators",
    "fuse",
    "layer_spectra",
    "models",
    "nn",
    "ops",
    "register_lipschitz",
    "settle",
    "solvers",
    "spectra_to_markdown",
    "training",
    "unfuse",
]
