"""All singular values of a circular convolution, float64, one thread."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import iresnet_fast as irf
from iresnet_fast.reference import conv_spectrum as reference

from ..case import Case, Problem, Promise, Provider, Work, compiled

_SIZES = {(64, 32): (10, 17), (128, 16): (6, 10), (512, 8): (4, 7)}
_QUICK_SIZES = {(16, 16): None, (48, 8): None}
_NUMPY, _OURS = "NumPy fft2 + svd", "iresnet_fast, gram"


def _numpy(weight: Tensor, n: int) -> Tensor:
    """The public snippet (Sedghi, Gupta, Long 2018)."""
    transforms = np.fft.fft2(weight.cpu().permute(2, 3, 0, 1).numpy(), (n, n), axes=(0, 1))
    return torch.from_numpy(np.linalg.svd(transforms, compute_uv=False))


def _eager(weight: Tensor, n: int, driver: str) -> Tensor:
    return reference.conv_singular_values(weight, (n, n), (1, 1), (1, 1), 1, driver)


def _half_spectrum(weight: Tensor, n: int) -> Tensor:
    """torch.linalg.svdvals on the columns that a real transform keeps."""
    symbol = torch.fft.rfft2(weight, s=(n, n)).permute(2, 3, 0, 1)
    return torch.linalg.svdvals(symbol)


def _problem(c: int, n: int, promise: tuple[float, float] | None, device: torch.device) -> Problem:
    inputs = [torch.randn(c, c, 3, 3, dtype=torch.float64, device=device) for _ in range(2)]
    exact = {id(weight): _numpy(weight, n) for weight in inputs}
    mirrored = torch.tensor([min(j, n - j) for j in range(n)])
    rows = torch.arange(n)
    opposite = torch.where((torch.arange(n) <= n // 2).unsqueeze(0), rows.unsqueeze(1), (-rows % n).unsqueeze(1))

    def fill(half: Tensor) -> Tensor:
        return half[opposite, mirrored.expand(n, n)]

    # cuSOLVER's singular values loop over matrices larger than 32×32.
    slow = "minutes on a GPU: svdvals loops over matrices" if device.type == "cuda" and c > 64 else None

    def provider(name: str, driver: str, eager: bool = True) -> Provider:
        missing = slow if driver == "svd" else None
        if eager:
            return Provider(name, lambda weight: _eager(weight, n, driver), 1e-9, missing=missing)
        return Provider(
            name, lambda weight: irf.conv_singular_values(weight, (n, n), driver=driver), 1e-9, missing=missing
        )

    frequencies = (n * n + (4 if n % 2 == 0 else 1)) // 2
    promises = []
    if promise is not None and device.type == "cpu":
        promises.append(Promise(_OURS, _NUMPY, *promise))
    return Problem(
        name=f"c={c} n={n} k=3",
        inputs=inputs,
        oracle=lambda weight: exact[id(weight)].to(device),
        providers=[
            Provider(
                _NUMPY,
                lambda weight: _numpy(weight, n).to(device),
                1e-9,
                missing=None if device.type == "cpu" else "measured on the CPU",
            ),
            provider("eager reference (fft + svdvals)", "svd"),
            Provider("torch.compile of it", compiled(lambda weight: _eager(weight, n, "svd")), 1e-9, missing=slow),
            Provider(
                "torch svdvals, half spectrum", lambda weight: _half_spectrum(weight, n), 1e-9, fill, missing=slow
            ),
            provider("eager eigvalsh of FᴴF", "gram"),
            provider("iresnet_fast, svd", "svd", eager=False),
            provider(_OURS, "gram", eager=False),
        ],
        # Eigenvalues of c×c complex matrices: 4/3 c³ complex multiply-adds of 8 operations to tridiagonal form.
        work=Work(frequencies * 16 / 3 * c**3, torch.float64, 8 * c * c * 9 + 8 * c * n * n),
        promises=promises,
        threads=1,
    )


def _problems(device: torch.device, quick: bool) -> Iterator[Problem]:
    for (c, n), promise in (_QUICK_SIZES if quick else _SIZES).items():
        yield _problem(c, n, promise, device)


CASE = Case("conv_spectrum", "All singular values of a circular convolution (float64, one thread)", _problems)
