"""The log-determinant from its power series, truncated at a fixed or at a random number of terms."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor

from .products import Evaluation, inner
from .result import LogDet

# The probability to go on where no Lipschitz constant says more, and its range where one does.
_CONTINUATION, _LARGEST_CONTINUATION = 0.5, 0.99
PROBES = ("rademacher", "gaussian")
# The sum of a series' terms for one probe: (evaluation, probe, weight of each term) to (B,).
Sum = Callable[[Evaluation, Tensor, list[float]], Tensor]


@dataclass(frozen=True, kw_only=True)
class Series(ABC):
    """log det(I + J) = Σ_{k≥1} (−1)^{k+1} tr(J^k)/k, with tr(J^k) = E[vᵀ J^k v] (Hutchinson 1990).

    Attributes:
        n_probes: independent estimates per sample, averaged; their spread is the standard error.
        probe: distribution of v, ``"rademacher"`` (smaller variance) or ``"gaussian"``.
    """

    n_probes: int = 1
    probe: str = "rademacher"

    def __post_init__(self) -> None:
        _check_count("n_probes", self.n_probes, 1)
        if self.probe not in PROBES:
            raise ValueError(f"probe must be one of {', '.join(map(repr, PROBES))}, got {self.probe!r}")

    @property
    @abstractmethod
    def random_length(self) -> bool:
        """Whether the number of terms is drawn anew each time."""

    @abstractmethod
    def draw_weights(self, likely_lipschitz: float | None) -> list[float]:
        """The weight of each term of one estimate; as many as it takes vector–Jacobian products."""

    @abstractmethod
    def bias_bound(self, size: int, lipschitz: float | None) -> float:
        """Bound of the bias for samples of so many values; NaN unless a Lipschitz constant below 1 is proven."""

    @abstractmethod
    def finite_variance(self, lipschitz: float | None) -> bool | None:
        """Whether the variance is proven to be finite for every branch with this constant; None without one."""

    def __call__(
        self,
        g: Callable[[Tensor], Tensor],
        x: Tensor,
        *,
        lipschitz: float | None = None,
        assumed: float | None = None,
    ) -> tuple[Tensor, LogDet]:
        """g(x) (B, ...) and the estimated :class:`LogDet`; the arguments are those of :class:`Estimator`."""
        return self.estimate(g, x, _sum_of_terms, lipschitz, assumed)

    def estimate(
        self,
        g: Callable[[Tensor], Tensor],
        x: Tensor,
        sum_of_terms: Sum,
        lipschitz: float | None,
        assumed: float | None,
    ) -> tuple[Tensor, LogDet]:
        """The same with another way to sum the terms."""
        if self.random_length and torch.compiler.is_compiling():
            from ._uncompiled import estimate  # noqa: PLC0415  (imports torch._dynamo, which is there by now)

            return estimate(self, g, x, sum_of_terms, lipschitz, assumed)
        evaluation = Evaluation(g, x)
        likely = assumed if lipschitz is None else lipschitz
        estimates = torch.stack(
            [sum_of_terms(evaluation, self._draw_probe(x), self.draw_weights(likely)) for _ in range(self.n_probes)]
        )
        spread = estimates.detach().std(0) if self.n_probes > 1 else torch.full_like(estimates[0].detach(), math.nan)
        log_det = LogDet(
            estimates.mean(0),
            spread / math.sqrt(self.n_probes),
            self.bias_bound(x[:1].numel(), lipschitz),
            self.finite_variance(lipschitz),
            evaluation.n_vjps,
        )
        return evaluation.image, log_det

    def _draw_probe(self, x: Tensor) -> Tensor:
        x = x.detach()
        return torch.randn_like(x) if self.probe == "gaussian" else torch.empty_like(x).bernoulli_(0.5) * 2 - 1


@dataclass(frozen=True)
class PowerSeries(Series):
    """The first terms of the series (Behrmann et al. 2019, Section 3): fast, and biased.

    ``|bias| ≤ D·(−ln(1−L) − Σ_{k≤n} L^k/k)`` for samples of D values. The result carries this bound where a Lipschitz
    constant L < 1 is proven, else NaN.

    Args:
        n_terms: terms, each of which is a vector–Jacobian product.
        n_probes: estimates per sample that are averaged.
        probe: ``"rademacher"`` or ``"gaussian"``.

    Raises:
        ValueError: fewer than one term or probe, an unknown distribution.
    """

    n_terms: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count("n_terms", self.n_terms, 1)

    @property
    def random_length(self) -> bool:
        """It is fixed."""
        return False

    def draw_weights(self, likely_lipschitz: float | None) -> list[float]:
        """All 1."""
        return [1.0] * self.n_terms

    def bias_bound(self, size: int, lipschitz: float | None) -> float:
        """What the terms that were left out can sum to; NaN where L < 1 is not proven."""
        if not _contracts(lipschitz):
            return math.nan
        kept = math.fsum(lipschitz**k / k for k in range(1, self.n_terms + 1))
        return size * max(0.0, -math.log1p(-lipschitz) - kept)

    def finite_variance(self, lipschitz: float | None) -> bool | None:
        """A sum of finitely many terms has one, whatever the constant."""
        return True


@dataclass(frozen=True)
class RussianRoulette(Series):
    """The series up to a random term, unbiased where Lip(g) < 1 (Chen et al. 2019, Theorem 1).

    After ``n_exact`` terms each further one is reached with probability q, and term ``n_exact + j`` weighs q^−j. The
    variance is finite for every branch of Lipschitz constant L where q > L². Where L < 1 is not proven the series may
    diverge, and the result promises nothing.

    Args:
        n_exact: terms that are always taken.
        continuation: q in (0, 1). Default: the Lipschitz constant, proven or assumed, but at least ½: the cost of a
            term and the variance that it removes are then in balance; ½ where nothing is known.
        n_probes: estimates per sample that are averaged, each with its own number of terms.
        probe: ``"rademacher"`` or ``"gaussian"``.

    Raises:
        ValueError: a negative number of terms, fewer than one probe, q outside (0, 1), an unknown distribution.
    """

    n_exact: int = 2
    continuation: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count("n_exact", self.n_exact, 0)
        if self.continuation is not None and not 0 < self.continuation < 1:
            raise ValueError(f"continuation must be a probability in (0, 1), got {self.continuation!r}")

    def _probability(self, likely_lipschitz: float | None) -> float:
        if self.continuation is not None:
            return self.continuation
        likely = _CONTINUATION if likely_lipschitz is None or math.isnan(likely_lipschitz) else likely_lipschitz
        return min(max(likely, _CONTINUATION), _LARGEST_CONTINUATION)

    @property
    def random_length(self) -> bool:
        """It is drawn."""
        return True

    def draw_weights(self, likely_lipschitz: float | None) -> list[float]:
        """Reciprocals of the probabilities to reach each term; their number is drawn from torch's CPU generator."""
        q = self._probability(likely_lipschitz)
        reached = int(torch.empty((), device="cpu").geometric_(1 - q)) - 1
        return [1.0] * self.n_exact + [q**-j for j in range(1, reached + 1)]

    def bias_bound(self, size: int, lipschitz: float | None) -> float:
        """There is none where L < 1 is proven; NaN elsewhere, where the series may diverge."""
        return 0.0 if _contracts(lipschitz) else math.nan

    def finite_variance(self, lipschitz: float | None) -> bool | None:
        """Whether q > L²; None where no L is proven."""
        if lipschitz is None or not lipschitz >= 0:  # NaN is no constant
            return None
        return self._probability(lipschitz) > lipschitz**2


def _contracts(lipschitz: float | None) -> TypeGuard[float]:
    """Whether this proves that the series converges: a constant below 1, and not NaN."""
    return lipschitz is not None and 0 <= lipschitz < 1


def _sum_of_terms(evaluation: Evaluation, v: Tensor, weights: list[float]) -> Tensor:
    total = torch.zeros_like(inner(v[:, :0], v[:, :0]))
    product = v
    for k, weight in enumerate(weights, 1):
        product = evaluation.vjp(product, differentiable=evaluation.differentiable)
        total = total + (-1) ** (k + 1) * weight / k * inner(product, v)
    return total


def _check_count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
