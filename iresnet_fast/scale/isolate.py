"""Batches in which a sample that cannot be evaluated costs no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# What was found of samples (B, ...): columns by name, each (B, ...), and of every sample why it failed, or None.
Findings = tuple[dict[str, Tensor], list[str | None]]


def evaluate_rows(
    evaluate: Callable[[Tensor], Findings], x: Tensor, reasons: list[str | None], like: dict[str, Tensor]
) -> Findings:
    """Evaluate the samples without a reason against it, all together where that works.

    Samples that are refused (ValueError) are found by halving the batch, and have the message as their reason.

    Args:
        evaluate: of (B, ...); what it finds is on the CPU.
        x: (n, ...) samples, on the CPU.
        reasons: n; why a sample is not to be evaluated, or None.
        like: columns of no samples.

    Returns:
        Columns (n, ...), NaN, 0 or False for samples that were not evaluated; and the reasons.
    """
    columns = {name: _fill(len(x), value) for name, value in like.items()}
    reasons = list(reasons)
    rows = torch.tensor([row for row, reason in enumerate(reasons) if reason is None], dtype=torch.int64)
    for part, (found, why) in _isolated(evaluate, x, rows):
        for name, value in found.items():
            columns[name][part] = value
        for row, reason in zip(part.tolist(), why, strict=True):
            reasons[row] = reason
    return columns, reasons


def _isolated(evaluate: Callable[[Tensor], Findings], x: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, Findings]]:
    if not len(rows):
        return
    try:
        found = evaluate(x if len(rows) == len(x) else x[rows])
    except ValueError as error:
        if len(rows) > 1:
            for half in rows.tensor_split(2):
                yield from _isolated(evaluate, x, half)
            return
        found = {}, [str(error)]
    yield rows, found


def _fill(n: int, like: Tensor) -> Tensor:
    return like.new_full((n, *like.shape[1:]), torch.nan if like.is_floating_point() else 0)
