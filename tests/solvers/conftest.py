"""The ways that an inverse can take, so that one contract is tested over all of them."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

import iresnet_fast as irf
from iresnet_fast.solvers import invert_residual

GPU = pytest.mark.gpu


@dataclass
class Solver:
    """One path on one device: ``solve`` has the signature of invert_residual, for branches made here."""

    path: str
    device: torch.device

    @property
    def dtype(self):
        """The CUDA kernels compute in float32."""
        return torch.float32 if self.device.type == "cuda" and self.path != "general" else torch.float64

    @property
    def fine(self):
        """A tolerance near what the dtype resolves."""
        return 1e-12 if self.dtype == torch.float64 else 1e-6

    def randn(self, *shape):
        return torch.randn(*shape, dtype=self.dtype, device=self.device)

    def branch(self, matrices, activation=None):
        """Linear layers with an activation between them."""
        layers = []
        for matrix in matrices:
            layer = nn.Linear(*matrix.T.shape, bias=False)
            layer.weight = nn.Parameter(matrix.to(self.device, self.dtype), requires_grad=False)
            layers += [layer, *([activation] if activation else [])]
        return nn.Sequential(*layers[: -1 if activation else None])

    def contraction(self, d, lipschitz):
        """x ↦ W₂ tanh(W₁ x) with a Lipschitz constant of at most ``lipschitz``, attained at 0."""
        first, second = (torch.randn(d, d, dtype=torch.float64) for _ in range(2))
        first, second = (w / torch.linalg.matrix_norm(w, 2) for w in (first, second))
        return self.branch([first, lipschitz * second], nn.Tanh())

    def solve(self, g, y, **options):
        if self.path == "general":
            return invert_residual(g, y, **options)
        options = {name: value for name, value in options.items() if name != "compact"}
        with torch.no_grad():
            if self.path == "mlp_inverse":
                result = irf.nn.InvertibleResidualBlock(g).solve_inverse(y, path="fused", **options)
            else:
                result = self._solve_as_images(g, y, options)
        assert result.path == self.path
        return result

    def _solve_as_images(self, g, y, options):
        """Linear layers are the middle taps of convolutions of a single pixel."""
        matrices = [layer.weight for layer in g if isinstance(layer, nn.Linear)]
        activations = [layer for layer in g if not isinstance(layer, nn.Linear)]
        if len(matrices) < 3:
            matrices.insert(1, torch.eye(len(matrices[0])).to(y))
            if len(matrices) < 3:
                matrices.append(torch.eye(len(y[0])).to(y))
        layers = []
        for matrix, size, activation in zip(matrices, (3, 1, 3), [*activations, None, None], strict=False):
            conv = nn.Conv2d(*matrix.T.shape, size, padding=size // 2, bias=False, device=y.device, dtype=y.dtype)
            weight = torch.zeros_like(conv.weight)
            weight[..., size // 2, size // 2] = matrix
            conv.weight = nn.Parameter(weight, requires_grad=False)
            layers += [conv, *([activation] if activation else [])]
        if options.get("x0") is not None:
            options = {**options, "x0": options["x0"][..., None, None]}
        block = irf.nn.InvertibleResidualBlock(nn.Sequential(*layers))
        result = block.solve_inverse(y[..., None, None], path="fused", **options)
        return replace(result, x=result.x[..., 0, 0])


@pytest.fixture(
    params=[
        ("general", "cpu"),
        ("mlp_inverse", "cpu"),
        pytest.param(("general", "cuda"), marks=GPU),
        pytest.param(("mlp_inverse", "cuda"), marks=GPU),
        pytest.param(("bottleneck_inverse", "cuda"), marks=GPU),
    ],
    ids="-".join,
    scope="module",
)
def solver(request):
    path, device = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return Solver(path, torch.device(device))
