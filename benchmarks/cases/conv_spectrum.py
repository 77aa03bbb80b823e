"""All singular values of a circular convolution, proofs that its norm stays below a bound, and a whole network's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import iresnet_fast as irf
from iresnet_fast.reference import conv_spectrum as reference

from ..case import Case, Problem, Promise, Provider, Work, compiled

# (c, n): what all values and the proof promise over NumPy, each (must, aim).
_SIZES = {(64, 32): ((10, 17), (25, 50)), (128, 16): ((6, 10), (16, 32)), (512, 8): ((4, 7), (8, 16))}
_QUICK_SIZES = ((16, 16), (48, 8))
_NUMPY, _OURS, _PROOF = "NumPy fft2 + svd", "iresnet_fast, gram", "iresnet_fast, proof of the norm"


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


def values_work(c: int, n: int) -> Work:
    """Of all singular values: one matrix c × c for each of the frequencies that differ."""
    frequencies = (n * n + (4 if n % 2 == 0 else 1)) // 2
    # Eigenvalues of c×c complex matrices: 4/3 c³ complex multiply-adds of 8 operations to tridiagonal form.
    return Work(frequencies * 16 / 3 * c**3, torch.float64, 8 * c * c * 9 + 8 * c * n * n)


def _problem(c: int, n: int, promised: bool, device: torch.device) -> Problem:
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

    promises = []
    if promised and device.type == "cpu":
        values, proof = _SIZES[c, n]
        promises = [Promise(_OURS, _NUMPY, *values), Promise(_PROOF, _NUMPY, *proof)]

    def prove(weight: Tensor) -> Tensor:
        tau = 1.001 * float(exact[id(weight)].amax())
        verdict = irf.conv_norm_certified(weight, tau, (n, n), padding="same", padding_mode="circular")
        return torch.tensor([float(verdict)])

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
            # Cholesky factors take a quarter of the operations of eigenvalues.
            Provider(
                _PROOF,
                prove,
                0,
                oracle=lambda _: torch.ones(1, dtype=torch.float64),
                work=Work(values_work(c, n).flops / 4, torch.float64, 8 * c * c * 9),
            ),
        ],
        work=values_work(c, n),
        promises=promises,
        threads=1,
    )


def _threads(c: int, n: int) -> Problem:
    """What a second thread gains."""
    weight = torch.randn(c, c, 3, 3, dtype=torch.float64)
    exact = _numpy(weight, n)

    def on(threads: int) -> Provider:
        def run(weight: Tensor) -> Tensor:
            torch.set_num_threads(threads)
            return irf.conv_singular_values(weight, (n, n))

        return Provider(f"{_OURS}, {threads} thread{'s' * (threads > 1)}", run, 1e-9)

    one, two = on(1), on(2)
    return Problem(
        name=f"c={c} n={n} k=3, threads",
        inputs=[weight],
        oracle=lambda _: exact,
        providers=[one, two],
        promises=[Promise(two.name, one.name, 1.7, 1.9)],
        threads=2,
    )


@torch.no_grad()
def _network(device: torch.device) -> Problem:
    """Proving the 63 convolutions of the 7-7-7 network, as certify does; the oracle is the reference's bounds."""
    model = irf.models.IResNetClassifier.from_config("iresnet-64").to(device).eval()
    model.trunk(torch.randn(2, 3, 32, 32, device=device))

    def bounds(model: nn.Module) -> Tensor:
        layers = [layer for block in irf.certify(model).blocks for layer in block.layers]
        return torch.tensor([layer.bound for layer in layers], dtype=torch.float64)

    with mock.patch.dict(os.environ, {"IRESNET_FAST_BACKEND": "reference"}):
        exact = bounds(model)
    return Problem(
        name="certify the 7-7-7 network",
        inputs=[model],
        oracle=lambda _: exact,
        providers=[Provider("iresnet_fast", bounds, 1e-6)],
        promises=[Promise("iresnet_fast", None, 1, 0.3, quantity="value")] if device.type == "cpu" else [],
    )


def _problems(device: torch.device, quick: bool) -> Iterator[Problem]:
    torch.manual_seed(0)
    for c, n in _QUICK_SIZES if quick else _SIZES:
        yield _problem(c, n, not quick, device)
    if quick:
        return
    if device.type == "cpu" and torch.get_num_threads() >= 2:
        yield _threads(64, 32)
        yield _threads(128, 16)
    yield _network(device)


CASE = Case("All singular values of a circular convolution (float64), and proofs", _problems)
