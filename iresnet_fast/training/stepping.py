"""Steps of an optimiser that a loss or a gradient that is not finite cannot spoil."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

# So many steps without a finite loss and gradient in a row, and training is over.
_HOPELESS = 10


class DivergedError(RuntimeError):
    """Too many steps in a row had a loss or a gradient that was not finite."""


class Stepper:
    """Takes the steps of an optimiser; one whose loss or gradient is not finite it skips and counts.

    A skipped step leaves nothing behind: buffers, such as the running statistics of batch normalisation, are what they
    were after the step before, and until the first step is taken everything is, as what is initialised from data.

    Args:
        model: the network, whose parameters the optimiser has.
        optimizer: of any kind.
        clip: largest norm of the gradient; 0 for any.
        average: decay of an exponential moving average of the parameters; 0 for none.
        schedule: of the learning rate; it goes on with every step that is taken.

    Attributes:
        taken: steps of the optimiser.
        skipped: steps that were not taken.
        average: the averaged network, where there is one.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        clip: float = 0.0,
        average: float = 0.0,
        schedule: LRScheduler | None = None,
    ) -> None:
        self._model, self._optimizer, self._clip, self._schedule = model, optimizer, clip, schedule
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(average)) if average else None
        self.load({"steps": 0, "skipped": 0, "in_a_row": 0})
        optimizer.zero_grad()

    @property
    def counts(self) -> dict[str, int]:
        """What :meth:`load` takes."""
        return {"steps": self.taken, "skipped": self.skipped, "in_a_row": self._in_a_row}

    def load(self, counts: Mapping[str, int]) -> None:
        """Go on from where another was, with the network as it is now."""
        self.taken, self.skipped, self._in_a_row = (counts[name] for name in ("steps", "skipped", "in_a_row"))
        self._untrained = None if self.taken else copy.deepcopy(self._model.state_dict())
        self._buffers = list(self._model.buffers())
        self._kept = [buffer.clone() for buffer in self._buffers]

    def step(self, loss: Tensor, lost_anywhere: Callable[[bool], bool] = bool) -> float:
        """Differentiate the loss and take the step, or skip it; returns the loss.

        Args:
            loss: a scalar.
            lost_anywhere: whether any process lost its step, from whether this one did: then all skip it.

        Raises:
            DivergedError: ten steps in a row were skipped.
        """
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self._model.parameters(), self._clip or math.inf).item()
        value = loss.item()
        if lost_anywhere(not (math.isfinite(value) and math.isfinite(norm))):
            self._skip(value, norm)
        else:
            self._optimizer.step()
            if self._schedule is not None:
                self._schedule.step()
            self.taken, self._in_a_row, self._untrained = self.taken + 1, 0, None
            self._copy(self._buffers, self._kept)
            if self.average is not None:
                self.average.update_parameters(self._model)
        self._optimizer.zero_grad()
        return value

    def _skip(self, value: float, norm: float) -> None:
        self.skipped, self._in_a_row = self.skipped + 1, self._in_a_row + 1
        self._copy(self._kept, self._buffers)
        if self._untrained is not None:
            self._model.load_state_dict(self._untrained)
        if self._in_a_row == _HOPELESS:
            raise DivergedError(
                f"{_HOPELESS} steps in a row had a loss ({value}) or a gradient (norm {norm}) that is not finite, the "
                f"last of them step {self.taken + self.skipped}. {self._remedy()}"
            )

    @staticmethod
    @torch.no_grad()
    def _copy(source: list[Tensor], target: list[Tensor]) -> None:
        if source:
            torch._foreach_copy_(target, source)

    def conclude(self) -> None:
        """Raise :class:`DivergedError` where no step at all was taken."""
        if not self.taken:
            raise DivergedError(f"none of {self.skipped} steps had a finite loss and gradient. {self._remedy()}")

    def _remedy(self) -> str:
        rate = self._optimizer.defaults["lr"]
        return f"Remedy: a smaller lr than {rate}, gradients clipped to a smaller norm, or data without extreme values"
