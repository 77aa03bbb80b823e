"""What a case is: inputs, providers, oracle, floor and promises."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Work:
    """The least that any implementation must do; the floor is the slower of the two on the measured machine.

    Attributes:
        flops: floating-point operations.
        dtype: of the rate that they run at.
        bytes: read from and written to memory.
    """

    flops: float
    dtype: torch.dtype
    bytes: float


@dataclass(frozen=True)
class Provider:
    """One way to compute the problem.

    Attributes:
        name: shown in the table.
        run: takes one of the problem's inputs; this is what is timed.
        tolerance: largest error that a timing is printed for.
        result: what of the output is compared with the oracle.
        missing: why it cannot run here, None where it can.
        oracle: the float64 answer for one input, where it is not the problem's.
        counts: what its output says that it took, by name, as {"evaluations": 12}; shown beside the times.
        work: for its floor, where it does another job than the problem's.
        peer: another library, whose failure is a finding rather than a fault of the run.
        outside: other processes do the work, so that their CPU time and memory are not measured.
    """

    name: str
    run: Callable[[Any], Any]
    tolerance: float
    result: Callable[[Any], Tensor] = lambda output: output
    missing: str | None = None
    oracle: Callable[[Any], Tensor] | None = None
    counts: Callable[[Any], dict[str, float]] = lambda output: {}
    work: Work | None = None
    peer: bool = False
    outside: bool = False


@dataclass(frozen=True)
class Promise:
    """A figure the project holds itself to.

    Attributes:
        provider: whose figure.
        against: the provider it is compared with; None for ``"value"``.
        must: the least ratio, or the largest share or value.
        aim: the one we are after.
        quantity: ``"speedup"`` (against/provider, at least), ``"share"`` (provider/against, at most) or ``"value"``
            (provider's own, at most).
        of: ``"wall"``, ``"cpu"``, ``"error"`` or a name of the providers' counts.
    """

    provider: str
    against: str | None
    must: float
    aim: float
    quantity: str = "speedup"
    of: str = "wall"


@dataclass(frozen=True)
class StudyPoint:
    """The place of a problem in a study of how a cost grows.

    Attributes:
        name: of the study: its problems are the points of one plot.
        axis: what grows, with its unit.
        value: of it in this problem.
        slope: of the cost against it, both on logarithmic scales, that theory states for the work.
        of: the cost: ``"wall"`` or a name of the providers' counts.
    """

    name: str
    axis: str
    value: float
    slope: float
    of: str = "wall"


@dataclass(frozen=True)
class Problem:
    """One size of a case: a group of rows.

    Attributes:
        name: shown in the table.
        inputs: some fresh sets of inputs, taken in turn.
        providers: what is measured, interleaved; the first that is exact is the baseline of the speed-ups.
        oracle: the float64 answer for one input.
        work: for the floor; None where none is stated.
        promises: checked after measuring.
        threads: of the CPU; None for torch's own number.
        study: where the problem is a point of one.
    """

    name: str
    inputs: Sequence[Any]
    providers: Sequence[Provider]
    oracle: Callable[[Any], Tensor]
    work: Work | None = None
    promises: Sequence[Promise] = field(default_factory=tuple)
    threads: int | None = None
    study: StudyPoint | None = None

    def error(self, found: Tensor, exact: Tensor) -> float:
        """Largest absolute difference over the largest exact value; infinite where the shapes differ or NaN."""
        if found.shape != exact.shape:
            return float("inf")
        difference = (found.to(exact) - exact).abs().max() / exact.abs().max()
        return float(difference.nan_to_num(float("inf")))


@dataclass(frozen=True)
class Case:
    """A family of problems; its module's name is that of its result file.

    Attributes:
        title: one line for the table.
        problems: makes them, one after the other, for a device; ``quick`` asks for small ones.
    """

    title: str
    problems: Callable[[torch.device, bool], Iterator[Problem]]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` of a function for its own shapes; the harness's warm-up compiles it."""
    compiled_function: Callable[..., Any] = torch.compile(function, dynamic=False)
    return compiled_function
