"""Soft spectral normalization as a parametrization, with the layer's true linear operator."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..ops.arguments import can_look, check_values, per_axis
from ..ops.conv_norm import conv_padding
from ..ops.power_iteration import power_iteration as grouped_power_iteration
from ..ops.power_iteration import vector_shapes
from ..reference.conv_operator import ConvGeometry
from ..reference.power_iteration import estimate, normalized, power_iteration
from .recomputation import Writes, is_recomputing
from .sharding import whole
from .weights import adopt, check_sigma, is_frozen, weight_in_place

# Power iterations at construction.
_FIRST_ITERATIONS = 15
# Vectors that are not settled iterate, in float64, until σ's relative change is below the first tolerance. They are
# settled where one iteration changes it by less than the second, and then keep every bit: saving, loading and copying
# an evaluated model change nothing.
_SETTLE_TOL, _SETTLED_TOL, _SETTLE_ITERATIONS = 1e-7, 1e-6, 4000
# They are also compared with vectors orthogonal to them after so many iterations: σ must not be larger by this share.
_OTHER_ITERATIONS, _LARGER = 6, 1e-3
_CONVOLUTIONS: dict[type[nn.Module], int] = {
    nn.Conv1d: 1,
    nn.Conv2d: 2,
    nn.Conv3d: 3,
    nn.ConvTranspose1d: 1,
    nn.ConvTranspose2d: 2,
    nn.ConvTranspose3d: 3,
}


class SpectralNorm(nn.Module):
    r"""The parametrization :math:`\bar W = W / \max(1, \sigma/c)` (Gouk et al. 2018; Behrmann et al. 2019).

    σ = ⟨u, W v⟩ is the power-iteration estimate of the norm of the layer's operator, computed anew at every use with u
    and v held constant in the gradient. It approaches the norm *from below*: W̄ may exceed c until ``certify`` or
    ``enforce`` has proven otherwise. State is u and v only, under torch's names ``_u`` and ``_v``.

    In training mode every use iterates u and v once (``n_power_iterations`` times), except inside a backward, where
    ``torch.utils.checkpoint`` runs a forward again. In evaluation mode W̄ is a pure function of W, u and v, which have
    settled by then (:func:`iresnet_fast.nn.settle`). Inverses change no state in any mode.

    Args:
        weight: the weight to be normalized, for its shape.
        coeff: c > 0.
        n_power_iterations: per training forward; with ``tol``, at most this many.
        tol: stop iterating once σ changes by less than tol·σ.
        geometry: the convolution's operator; None for a matrix.
        name: of the parameter; with the shape it seeds u and v, so that data-parallel ranks agree.
    """

    _u: Tensor
    _v: Tensor

    def __init__(
        self,
        weight: Tensor,
        coeff: float,
        *,
        n_power_iterations: int = 1,
        tol: float | None = None,
        geometry: ConvGeometry | None = None,
        name: str = "weight",
    ) -> None:
        super().__init__()
        self.coeff = coeff
        self.n_power_iterations = n_power_iterations
        self.tol = tol
        self.geometry = geometry
        self.name = name
        u, v = self._first_vectors(weight)
        self.register_buffer("_u", u)
        self.register_buffer("_v", v)
        self.writes = Writes()

    def forward(self, weight: Tensor) -> Tensor:
        """The normalized weight, of weight's shape and dtype."""
        given = weight_in_place(self, weight)
        if given is not None:
            return given
        if self.training and not is_frozen(self):
            if torch.compiler.is_compiling() and self.can_be_updated(weight):
                # As one op, which the compiler does not run again in the backward, from u and v that have changed.
                return self._by_op(weight, self.n_power_iterations)
            if not is_recomputing():
                self._iterate_once(whole(weight))
            else:
                self.writes.check(inside=not self.writes.grouped, on_cpu=weight.device.type == "cpu")
                if self.writes.grouped:  # by the op that made it, so that a checkpoint saves the same tensors again
                    return self._by_op(weight, 0)
        return self.evaluate(weight)

    def evaluate(self, weight: Tensor) -> Tensor:
        """The normalized weight by u and v as they are, in any mode."""
        weight = whole(weight)
        # Clones: the graph must not see the next iteration, or a broadcast of buffers, write to them.
        u, v = (self._u.clone(), self._v.clone()) if torch.is_grad_enabled() else (self._u, self._v)
        dtype = _compute_dtype(weight)
        with _without_autocast(weight.device.type):
            sigma = estimate(weight.to(dtype), u.to(dtype), v.to(dtype), self.geometry)
        check_sigma(sigma, [weight])
        return normalized(weight, sigma, self.coeff)

    @torch.no_grad()
    def settle(self, weight: Tensor) -> None:
        """Iterate u and v until they have settled, in float64; settled vectors keep every bit."""
        weight = whole(weight)
        if not can_look(weight, self._u) or not bool(torch.isfinite(weight).all()):
            return  # nothing to iterate on, or NaN, which would settle never
        vectors = self._u, self._v
        norms = torch.stack([torch.linalg.vector_norm(part.float()) for part in vectors])
        if not bool(((norms > 0) & (norms < torch.inf)).all()):  # memory that was never written
            vectors = self._first_vectors(weight)
        wide, u, v = (part.double() for part in (weight, *vectors))
        tol = max(_SETTLED_TOL, torch.finfo(self._u.dtype).eps)
        if power_iteration(wide, u, v, 1, self.geometry, tol)[0] is not u:
            vectors = u, v = power_iteration(wide, u, v, _SETTLE_ITERATIONS, self.geometry, _SETTLE_TOL)
        # Vectors of another singular pair than the largest settle, too: is there a larger one beside them?
        fresh = self._first_vectors(weight)[1].double()
        fresh = fresh - (fresh * v).sum() / v.square().sum() * v
        others = power_iteration(wide, u, fresh, _OTHER_ITERATIONS, self.geometry)
        ratio = estimate(wide, *others, self.geometry) / estimate(wide, u, v, self.geometry)
        if bool(ratio > 1 + max(tol, _LARGER)):
            vectors = power_iteration(wide, *others, _SETTLE_ITERATIONS, self.geometry, _SETTLE_TOL)
        self.keep(*vectors)

    @torch.no_grad()
    def start(self, weight: Tensor) -> None:
        """Iterate u and v for the first time, a fixed number of times."""
        self.keep(*self._iterate(weight, (self._u, self._v), _FIRST_ITERATIONS, None))

    def can_be_updated(self, weight: Tensor) -> bool:
        """Return true if the next use is a training forward of a fixed number of iterations, in float32 or float64."""
        plain = weight.dtype == self._u.dtype == _compute_dtype(weight) and weight.device == self._u.device
        return self.training and plain and self.tol is None

    def keep(self, u: Tensor, v: Tensor, *, iterated: bool = False) -> None:
        """Write u and v, and record it; settled vectors are not written to."""
        if u is self._u:
            return
        compiling = torch.compiler.is_compiling()
        if not compiling and self._u.is_inference() and not torch.is_inference_mode_enabled():
            self._u, self._v = self._u.clone(), self._v.clone()
        self._u.copy_(u)
        self._v.copy_(v)
        self.writes.note(grouped=not iterated and self.writes.grouped)

    def _by_op(self, weight: Tensor, iterations: int) -> Tensor:
        """Iterate, and normalize the weight, by the op of grouped updates."""
        found = grouped_power_iteration(
            [weight],
            [self._u],
            [self._v],
            coeff=self.coeff,
            geometries=[self.geometry],
            n_iterations=iterations,
            in_backward=False,
        )
        if iterations:
            with torch.no_grad():
                self.keep(*found.u, *found.v, iterated=True)
        return found.weights[0]

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What to store so that the weight becomes this one: itself, where its norm is at most coeff."""
        return weight

    @torch.no_grad()
    def _iterate_once(self, weight: Tensor) -> None:
        self.keep(*self._iterate(weight, (self._u, self._v), self.n_power_iterations, self.tol), iterated=True)

    def _first_vectors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors, drawn on the CPU whatever the default device: the same start everywhere."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.name}{tuple(weight.shape)}".encode()))
        shapes = vector_shapes(weight, self.geometry)
        u, v = (torch.randn(shape, generator=generator, device="cpu").to(weight) for shape in shapes)
        return u / torch.linalg.vector_norm(u), v / torch.linalg.vector_norm(v)

    def _iterate(
        self, weight: Tensor, vectors: tuple[Tensor, Tensor], iterations: int, tol: float | None
    ) -> tuple[Tensor, Tensor]:
        """Both in their own dtype, as they are kept."""
        dtype = _compute_dtype(weight)
        with _without_autocast(weight.device.type):
            u, v = (part.to(dtype) for part in vectors)
            u, v = power_iteration(weight.detach().to(dtype), u, v, iterations, self.geometry, tol)
        return u.to(vectors[0].dtype), v.to(vectors[1].dtype)

    def extra_repr(self) -> str:
        """Shown by repr."""
        return f"coeff={self.coeff}, n_power_iterations={self.n_power_iterations}"


def spectral_norm(
    module: nn.Module,
    coeff: float = 0.9,
    *,
    n_power_iterations: int = 1,
    tol: float | None = None,
    input_size: int | Sequence[int] | None = None,
    name: str = "weight",
) -> nn.Module:
    """Constrain the norm of a layer's linear operator to about coeff, softly; changes the module in place.

    Only a weight whose norm exceeds coeff is scaled. Linear layers and 1×1 convolutions are matrices; any other
    convolution is normalised as the operator it is at its input size and padding (Gouk et al. 2018), not as the
    reshaped kernel that ``torch.nn.utils.parametrizations.spectral_norm`` takes.

    Args:
        module: ``nn.Linear``, a convolution of 1 to 3 axes (zero or circular padding), or a transposed one, whose
            operator is the adjoint of the convolution with its weight.
        coeff: the Lipschitz coefficient c > 0; below 1 for a residual branch.
        n_power_iterations: iterations per training forward, at least 1.
        tol: iterate until σ's relative change is below tol instead, at most ``n_power_iterations`` times.
        input_size: spatial size of the layer's input in pixels; not needed for 1×1 and linear layers.
        name: of the parameter.

    Returns:
        The module itself. Its state dict has ``parametrizations.<name>.original`` and ``….0._u``, ``….0._v``.

    Raises:
        TypeError: another kind of module, or a weight that is not of floating point.
        ValueError: coeff ≤ 0, a convolution without ``input_size``, a padding mode that has no operator here, an
            empty or non-finite weight, a weight that is already parametrized.

    Example:
        >>> layer = spectral_norm(torch.nn.Conv2d(3, 8, 3, padding=1), coeff=0.9, input_size=(32, 32))
        >>> layer.weight.shape
        torch.Size([8, 3, 3, 3])
    """
    _check_coeff(coeff)
    if isinstance(n_power_iterations, bool) or not isinstance(n_power_iterations, int) or n_power_iterations < 1:
        raise ValueError(f"n_power_iterations must be an int of at least 1, got {n_power_iterations!r}")
    if tol is not None and not 0 < tol < 1:
        raise ValueError(f"tol must be in (0, 1), got {tol!r}")
    kind = parametrize.type_before_parametrizations(module)
    axes = next((n for base, n in _CONVOLUTIONS.items() if issubclass(kind, base)), None)
    if axes is None and not issubclass(kind, nn.Linear):
        raise TypeError(
            f"spectral_norm serves nn.Linear, nn.Conv1d to nn.Conv3d and nn.ConvTranspose1d to nn.ConvTranspose3d, got "
            f"{kind.__name__}"
        )
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor) or weight.dim() < 2:
        raise ValueError(f"{kind.__name__} has no weight named {name!r}")
    if parametrize.is_parametrized(module, name):
        raise ValueError(f"{kind.__name__}.{name} is already parametrized; remove_parametrizations first")
    check_values(name, weight)
    geometry = None if axes is None else _conv_geometry(module, weight, input_size, axes)
    parametrization = SpectralNorm(
        weight, coeff, n_power_iterations=n_power_iterations, tol=tol, geometry=geometry, name=name
    ).train(module.training)
    parametrize.register_parametrization(module, name, parametrization, unsafe=True)
    stored = adopt(module, name)
    parametrization.start(stored.original)
    if not module.training:
        stored.settle()
    if input_size is not None and geometry is not None:
        module.register_forward_pre_hook(check_input_size, with_kwargs=True)
    return module


def find_spectral_norm(module: nn.Module, name: str = "weight") -> SpectralNorm | None:
    """The module's own :class:`SpectralNorm`, if it has one."""
    if parametrize.is_parametrized(module, name):
        for parametrization in module.parametrizations[name]:  # type: ignore[index]  # torch types attributes of modules as Tensor | Module
            if isinstance(parametrization, SpectralNorm):
                return parametrization
    return None


def check_input_size(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: a convolution is only used at the input size its norm was taken at."""
    norm = find_spectral_norm(module)
    if norm is None or norm.geometry is None:
        return
    expected = norm.geometry.input_size
    if module.transposed:  # its input is the output of the convolution
        expected = norm.geometry.output_size(module.kernel_size)  # type: ignore[arg-type]  # torch types attributes of modules as Tensor | Module
    found = tuple((args[0] if args else kwargs["input"]).shape[-len(expected) :])
    if found != expected:
        raise ValueError(
            f"this convolution was normalised for input_size={expected}, got an input of spatial size {found}: its "
            "Lipschitz bound does not hold there. Remedy: build it with that input_size"
        )


def _check_coeff(coeff: float) -> None:
    if isinstance(coeff, bool) or not isinstance(coeff, int | float) or not 0 < coeff < float("inf"):
        raise ValueError(f"coeff must be a positive number, got {coeff!r}")


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Within it products are in the dtype of their factors; the meta device knows no autocast."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def _compute_dtype(weight: Tensor) -> torch.dtype:
    """Float32 for low precision, else the weight's own."""
    return torch.promote_types(weight.dtype, torch.float32)


def _conv_geometry(
    module: nn.Module, weight: Tensor, input_size: int | Sequence[int] | None, axes: int
) -> ConvGeometry | None:
    """The operator of a convolution module; None where it is a matrix."""
    conv: Any = module
    if conv.padding_mode not in ("zeros", "circular"):
        raise ValueError(
            f"spectral_norm has no operator for padding_mode={conv.padding_mode!r}. Remedy: 'zeros' or 'circular'"
        )
    padding = conv_padding(conv.padding, weight.shape[2:], conv.dilation)
    repeats = conv.padding_mode == "circular" and any(map(any, padding))
    if input_size is None and (weight[0, 0].numel() > 1 or repeats):
        raise ValueError(
            f"input_size is missing: the norm of a convolution with a kernel of {tuple(weight.shape[2:])} depends on "
            f"the spatial size of its input. Remedy: input_size={('H', 'W', 'D')[:axes]} in pixels"
        )
    size = (1,) * axes if input_size is None else per_axis("input_size", input_size, axes)
    if conv.transposed:
        rows = zip(size, weight.shape[2:], conv.stride, conv.dilation, padding, conv.output_padding, strict=True)
        size = tuple((n - 1) * s - sum(p) + d * (k - 1) + extra + 1 for n, k, s, d, p, extra in rows)
        if min(size) < 1:
            raise ValueError(f"input_size={input_size} gives an output of size {size}")
    geometry = ConvGeometry(
        input_size=size,
        stride=conv.stride,
        dilation=conv.dilation,
        padding=padding,
        padding_mode=conv.padding_mode,
        groups=conv.groups,
    )
    if min(geometry.output_size(tuple(weight.shape[2:]))) < 1:
        raise ValueError(
            f"input_size={geometry.input_size} is too small for a kernel of {tuple(weight.shape[2:])} with padding "
            f"{conv.padding!r}"
        )
    matrix = weight[0, 0].numel() == 1 and conv.groups == 1 and not repeats
    return None if matrix else geometry
