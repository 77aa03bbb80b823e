"""Draws docs/images/inverse-error.png: error of the inverse against evaluations, with the bound that is reported.

Run from the root of a checkout: ``python docs/draw_inverse.py``.
"""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

import iresnet_fast as irf
from iresnet_fast.solvers import invert_residual, sample_norms

# With the evaluations that are shown.
_LIPSCHITZ = {0.3: 40, 0.5: 40, 0.7: 60, 0.9: 120, 0.97: 200}
_D = 8
_STYLE = {"picard": ("#8a8f98", "Picard"), "anderson": ("#2563a8", "Anderson(1), safeguarded")}


def saturated_block(lipschitz: float) -> irf.nn.InvertibleResidualBlock:
    """Three linear layers, orthogonal up to their coefficient: as slow to invert as their L allows, nearly."""
    branch = irf.nn.LipschitzMLP(_D, (_D, _D), coeff=lipschitz ** (1 / 3), activation="elu")
    block = irf.nn.InvertibleResidualBlock(branch).double().eval()
    with torch.no_grad():
        for module in block.modules():
            if irf.nn.find_spectral_norm(module):
                torch.nn.init.orthogonal_(module.parametrizations.weight.original).mul_(8)
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
    x = torch.randn(32, _D, dtype=torch.float64)
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    panels = figure.subplots(1, len(_LIPSCHITZ), sharey=True)
    for axis, (lipschitz, n) in zip(panels, _LIPSCHITZ.items(), strict=True):
        block = saturated_block(lipschitz)
        for method, (color, label) in _STYLE.items():
            errors, bounds = curves(block, x, method, n)
            axis.semilogy(range(1, n + 1), errors, color=color, lw=1.6, label=f"{label}: error")
            axis.semilogy(range(1, n + 1), bounds, color=color, lw=1.2, ls="--", label=f"{label}: proven bound")
        axis.set_title(f"Lip(g) ≤ {block.proven_lipschitz():.3f}", fontsize=10)
        axis.set_xlabel("evaluations of g")
        axis.grid(alpha=0.25)
    figure.axes[0].set_ylabel("largest relative error of 32 samples")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    path = Path(__file__).parent / "images" / "inverse-error.png"
    figure.savefig(path, dpi=120)
    print(path)


if __name__ == "__main__":
    main()
