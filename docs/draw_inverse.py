"""Draws docs/images/inverse-error.png: error of the inverse against evaluations, with the bound that is reported.

Run from the root of a checkout: ``python docs/draw_inverse.py``.
"""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

import iresnet_fast as irf
from iresnet_fast.solvers import invert_residual, sample_norms

_LIPSCHITZ = (0.3, 0.5, 0.7, 0.9, 0.97)
_STYLE = {"picard": ("#8a8f98", "Picard"), "anderson": ("#2563a8", "Anderson(1), safeguarded")}


def saturated_block(lipschitz: float) -> irf.nn.InvertibleResidualBlock:
    """A bottleneck whose three convolutions all reach their coefficient, so that L is their product."""
    branch = irf.nn.Bottleneck(8, 16, coeff=lipschitz ** (1 / 3), input_size=(8, 8))
    block = irf.nn.InvertibleResidualBlock(branch).double().eval()
    with torch.no_grad():
        for module in block.modules():
            if irf.nn.find_spectral_norm(module):
                module.parametrizations.weight.original.mul_(8)
    irf.enforce(block)
    return block


def curves(block: irf.nn.InvertibleResidualBlock, x: Tensor, method: str, n: int) -> tuple[list[float], list[float]]:
    """Largest relative error and largest relative reported bound after 1 … n evaluations."""
    y = block(x)
    errors, bounds = [], []
    with irf.nn.frozen_state(block):
        for limit in range(1, n + 1):
            result = invert_residual(
                block.g,
                y,
                tol=1e-15,
                lipschitz=block.proven_lipschitz(),
                method=method,
                max_iterations=limit,
                on_failure="return",
            )
            scale = sample_norms(x)
            errors.append(float((sample_norms(result.x - x) / scale).max()))
            bounds.append(float((result.error_bound / scale).max()))
    return errors, bounds


@torch.no_grad()
def main() -> None:
    """Draw one panel for each Lipschitz constant."""
    torch.manual_seed(0)
    x = torch.randn(32, 8, 8, 8, dtype=torch.float64)
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    for axis, lipschitz in zip(figure.subplots(1, len(_LIPSCHITZ), sharey=True), _LIPSCHITZ, strict=True):
        block = saturated_block(lipschitz)
        n = 40
        for method, (color, label) in _STYLE.items():
            errors, bounds = curves(block, x, method, n)
            axis.semilogy(range(1, n + 1), errors, color=color, lw=1.6, label=f"{label}: error")
            axis.semilogy(range(1, n + 1), bounds, color=color, lw=1.2, ls="--", label=f"{label}: proven bound")
        axis.set_title(f"Lip(g) ≤ {block.proven_lipschitz():.3f}", fontsize=10)
        axis.set_xlabel("evaluations of g")
        axis.grid(alpha=0.25)
    figure.axes[0].set_ylabel("largest relative error of 32 samples")
    figure.axes[-1].legend(frameon=False, fontsize=8)
    path = Path(__file__).parent / "images" / "inverse-error.png"
    figure.savefig(path, dpi=120)
    print(path)


if __name__ == "__main__":
    main()
