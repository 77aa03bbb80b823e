"""What invertible modules with a log-determinant have in common."""

from __future__ import annotations

import functools
import inspect
import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...estimators import Estimator, LogDet
from ..inspection import foreign_hooks
from ..weights import frozen_state


class Bijection(nn.Module):
    """An invertible module of which the volume change is known: the base of all that have a log-determinant.

    A subclass has ``forward``, ``inverse`` and ``estimate_log_det``.
    """

    @abstractmethod
    def inverse(self, y: Tensor) -> Tensor:
        """The x that is mapped to y.

        A chain passes on the keywords of its own ``inverse`` (``tol``, ``on_failure``, ...) that this one names, so
        that a bijection that contains residual blocks can give them to these.
        """

    @abstractmethod
    def estimate_log_det(self, x: Tensor, estimator: Estimator | None = None) -> tuple[Tensor, LogDet]:
        """The image of x and log|det J| there, with what is known of its error.

        Args:
            x: (B, ...) inputs.
            estimator: of residual blocks, in place of their own.

        Returns:
            What ``forward`` returns, and a :class:`LogDet` with values of shape (B,).
        """

    def lipschitz(self) -> tuple[float | None, float | None]:
        """Proven Lipschitz constants of the map and of its inverse as it is now; None where there is no proof.

        Override it to let ``certify`` and the error bounds of an inverse see through your own bijection.
        """
        return None, None

    def outside_domain(self, x: Tensor) -> Tensor | None:
        """Which samples (B,) the forward would refuse; None if it is defined everywhere."""
        return None

    def forward_and_log_det(self, x: Tensor, estimator: Estimator | None = None) -> tuple[Tensor, Tensor]:
        """The image of x, and log|det J| there (B,); arguments as for :meth:`estimate_log_det`."""
        y, log_det = self.estimate_log_det(x, estimator)
        return y, log_det.value

    def inverse_and_log_det(
        self, y: Tensor, estimator: Estimator | None = None, *, tol: float | None = None, on_failure: str = "raise"
    ) -> tuple[Tensor, Tensor]:
        """The x that is mapped to y, and the log-determinant of the inverse there: −log|det J| at x, not at y.

        Args:
            y: (B, ...) outputs.
            estimator: as for :meth:`estimate_log_det`.
            tol: of ``inverse``, where it iterates.
            on_failure: of ``inverse``, where it can fail.

        Returns:
            x (B, ...) and the log-determinants (B,).
        """
        x = self.inverse(y, **options_of(self, {"tol": tol, "on_failure": on_failure}))
        with frozen_state(self):
            return x, -self.forward_and_log_det(x, estimator)[1]


def proven_constants(module: Bijection) -> tuple[float | None, float | None]:
    """What a bijection's ``lipschitz()`` proves: None of what cannot be a constant (NaN, infinite, negative).

    Raises:
        TypeError: it does not return two numbers, or None in place of one.
    """
    found: Any = module.lipschitz()
    numbers = (int, float, type(None))
    if not isinstance(found, tuple) or len(found) != 2 or not all(isinstance(each, numbers) for each in found):
        raise TypeError(
            f"{type(module).__name__}.lipschitz() must return two numbers or None, of the map and of its inverse, got "
            f"{found!r}"
        )
    lipschitz, inverse = (None if each is None or not 0 <= each < math.inf else float(each) for each in found)
    return lipschitz, inverse


def options_of(module: nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those options that a module's ``inverse`` names as keywords, or all if it takes any."""
    function: Any = module.inverse
    parameters = _parameters(getattr(function, "__func__", function))
    if any(kind == inspect.Parameter.VAR_KEYWORD for kind in parameters.values()):
        return dict(options)
    return {name: value for name, value in options.items() if name in parameters}


@functools.lru_cache(maxsize=256)
def _parameters(function: Any) -> dict[str, Any]:
    return {name: parameter.kind for name, parameter in inspect.signature(function).parameters.items()}


def apply_with_log_det(
    name: str, module: nn.Module | None, x: Tensor, estimator: Estimator | None = None
) -> tuple[Tensor, LogDet]:
    """``estimate_log_det`` of a module inside another one.

    Args:
        name: of the module there, for the messages.
        module: a :class:`Bijection`.
        x: (B, ...) its input.
        estimator: as for :meth:`Bijection.estimate_log_det`.

    Raises:
        TypeError: the module has no log-determinant.
        RuntimeError: it has hooks, which may change what it computes.
    """
    if not isinstance(module, Bijection):
        raise TypeError(
            f"module {name} ({type(module).__name__}) has no log-determinant. Remedy: a subclass of irf.nn.Bijection "
            "with estimate_log_det"
        )
    if foreign_hooks(module):
        raise RuntimeError(f"module {name} ({type(module).__name__}) has forward hooks, which see no log-det")
    try:
        return module.estimate_log_det(x, estimator)
    except (TypeError, ValueError, RuntimeError) as error:
        error.add_note(f"in module {name} ({type(module).__name__})")
        raise


def sum_over_positions(per_channel: Tensor, x: Tensor) -> Tensor:
    """Log-scales of channels (C,), the same at every position and in every sample of x (B, C, ...), summed to (B,)."""
    positions = x[:1, :1].numel() if len(x) else 0
    dtype = torch.promote_types(per_channel.dtype, torch.float32)
    return (per_channel.sum(dtype=dtype) * positions).expand(len(x))


def no_volume_change(x: Tensor) -> Tensor:
    """The log-determinant (B,) of an isometry."""
    return torch.zeros(len(x), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
