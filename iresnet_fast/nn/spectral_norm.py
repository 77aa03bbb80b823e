"""Soft spectral normalisation as a parametrization, with the layer's true linear operator."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..ops._arguments import check_values, per_axis
from ..ops.conv_norm import conv_padding
from ..ops.power_iteration import vector_shapes
from ..reference.conv_operator import ConvGeometry
from ..reference.power_iteration import estimate, normalized, power_iteration

# Power iterations at construction.
_FIRST_ITERATIONS = 15
# Where u and v are not those of the weight (it was loaded without them, or changed since and is now evaluated), they
# are fitted again: by rounds of so many iterations, each ended early where σ's relative change is below the first,
# until they are settled, which is that one iteration changes σ by less than the last. Settled vectors stay as they are,
# so that saving, loading and copying an evaluated model change no bit of it.
_REFRESH_TOL, _REFRESH_ITERATIONS, _REFRESH_ROUNDS, _SETTLED_TOL = 1e-6, 200, 20, 1e-5
# What u and v were last fitted to, where that is no weight, so that they are fitted at the next use in evaluation mode:
# they came with theirs from a state dict, or had a training forward's few iterations.
_LOADED, _ITERATED = (0, -1), (0, -2)
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

    σ is the power-iteration estimate of the norm of the layer's operator. It approaches the norm *from below*: W̄ may
    exceed c until ``certify`` or ``enforce`` has proven otherwise. State is u and v only, under torch's names ``_u``
    and ``_v``; σ = ⟨u, W v⟩ is computed anew at every use, with u and v held constant in the gradient.

    Training mode iterates at every use; evaluation mode and inverses do not. At its first use in evaluation mode after
    training forwards, or after it changed (averaged weights), u and v are fitted to a weight until they settle.
    Code compiled by ``torch.compile`` does not fit again: evaluate a changed model once, or certify it, before.

    Args:
        weight: the weight to be normalised, for its shape.
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
        self.frozen = False
        # The normalised weight to give out in place of computing it; set by a Snapshot.
        self.held: Tensor | None = None
        # The same, of a fused update for the length of a training forward; of which weight, and whose update it was.
        self._lent: Tensor | None = None
        self._lent_for: tuple[int, int] | None = None
        self._lender: object = None
        shape_u, shape_v = vector_shapes(weight, geometry)
        seed = zlib.crc32(f"{name}{tuple(weight.shape)}".encode())
        generator = torch.Generator().manual_seed(seed)
        # Drawn on the CPU whatever the default device: the same start everywhere.
        shapes = (shape_u, shape_v)
        u, v = (torch.randn(shape, generator=generator, device="cpu").to(weight) for shape in shapes)
        self.register_buffer("_u", u / torch.linalg.vector_norm(u))
        self.register_buffer("_v", v / torch.linalg.vector_norm(v))
        # The weight (its address and version) that u and v were last fitted to; None: fit them at the next use.
        self._fitted_to: tuple[int, int] | None = None

    def forward(self, weight: Tensor) -> Tensor:
        """The normalised weight, of weight's shape and dtype."""
        if self.held is not None:
            return self.held
        if self._lent is not None and self._is_current(weight):
            return self._lent
        return normalized(weight, self._sigma(weight, *self._vectors(weight)), self.coeff)

    def start(self, weight: Tensor) -> None:
        """Fit u and v to a weight for the first time, by a fixed number of iterations."""
        self._u, self._v = self._iterate(weight, (self._u, self._v), _FIRST_ITERATIONS, None)
        self._fitted_to = _ITERATED

    def can_be_updated(self, weight: Tensor) -> bool:
        """Whether the next use is a training forward of a fixed number of iterations, which another may do for it."""
        at_its_own_use = self._fitted_to is None or self.frozen or self.tol is not None
        served = self.held is not None or self._lent is not None
        plain = weight.dtype == self._u.dtype == _compute_dtype(weight) and weight.device == self._u.device
        return self.training and plain and not (at_its_own_use or served)

    def lend(self, weight: Tensor, normalized: Tensor, lender: object) -> None:
        """Give out this normalised weight, to which u and v have been fitted, until :meth:`release`."""
        if not torch.compiler.is_compiling():
            self._fitted_to, self._lent_for = _ITERATED, _identity(weight)
        self._lent, self._lender = normalized, lender

    def release(self, lender: object) -> None:
        """Forget the weight that this lender gave, if it did."""
        if self._lender is lender:
            self._lent = self._lent_for = self._lender = None

    def _is_current(self, weight: Tensor) -> bool:
        """Whether what was lent, maybe by a forward that was interrupted, is what a training forward would compute."""
        if not self.training or self.frozen:
            return False
        return torch.compiler.is_compiling() or self._lent_for == _identity(weight)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What to store so that the weight becomes this one: itself, where its norm is at most coeff."""
        self._fitted_to = None
        return weight

    def _sigma(self, weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """⟨u, W v⟩, differentiable by W."""
        dtype = _compute_dtype(weight)
        with torch.autocast(weight.device.type, enabled=False):
            sigma = estimate(weight.to(dtype), u.to(dtype), v.to(dtype), self.geometry)
        check_sigma(sigma, [weight])
        return sigma

    @torch.no_grad()
    def _vectors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """U and v for this use: iterated as the mode asks, and written back unless frozen."""
        compiling = torch.compiler.is_compiling()
        identity = _LOADED if compiling else _identity(weight)
        anew = self._fitted_to is None or not (compiling or self.training or self._fitted_to == identity)
        u, v = self._u, self._v
        if anew:
            u, v = self._fitted(weight)
        elif self.training and not self.frozen:
            u, v = self._iterate(weight, (u, v), self.n_power_iterations, self.tol)
        if u is not self._u and not self.frozen:
            self._u.copy_(u)
            self._v.copy_(v)
        if not (self.frozen or compiling):  # compiled code would be traced anew for every weight
            self._fitted_to = identity if anew or not self.training else _ITERATED
        # Clones: the graph must not see the next iteration, or a broadcast of buffers, write to them.
        return u.clone(), v.clone()

    def _fitted(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """U and v that are settled; in compiled code, which cannot look at them, those of one round."""
        vectors = (self._u, self._v)
        if torch.compiler.is_compiling():
            return self._iterate(weight, vectors, _REFRESH_ITERATIONS, _REFRESH_TOL)
        finite = bool(torch.isfinite(weight).all())  # NaN would settle never
        for _ in range(_REFRESH_ROUNDS if finite else 0):
            if self._is_settled(weight, vectors):
                break
            vectors = self._iterate(weight, vectors, _REFRESH_ITERATIONS, _REFRESH_TOL)
        return vectors

    def _is_settled(self, weight: Tensor, vectors: tuple[Tensor, Tensor]) -> bool:
        """Whether another iteration would change σ by next to nothing: it is then dropped."""
        tol = max(_SETTLED_TOL, torch.finfo(self._u.dtype).eps)
        return all(map(torch.equal, self._iterate(weight, vectors, 1, tol), vectors))

    def _iterate(
        self, weight: Tensor, vectors: tuple[Tensor, Tensor], iterations: int, tol: float | None
    ) -> tuple[Tensor, Tensor]:
        """Both in their own dtype, as they are kept."""
        dtype = _compute_dtype(weight)
        with torch.autocast(weight.device.type, enabled=False):
            u, v = (part.to(dtype) for part in vectors)
            u, v = power_iteration(weight.detach().to(dtype), u, v, iterations, self.geometry, tol)
        return u.to(vectors[0].dtype), v.to(vectors[1].dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._fitted_to = _LOADED if {f"{prefix}_u", f"{prefix}_v"} <= state_dict.keys() else None

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
    parametrization.start(module.parametrizations[name].original)  # type: ignore[index, union-attr]  # torch types attributes of modules as Tensor | Module
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


def check_sigma(sigma: Tensor, weights: Sequence[Tensor]) -> None:
    """Raise where a norm is not finite.

    Not on a GPU, where the host would wait for the device, nor in compiled code: a NaN weight shows in every output.
    """
    if sigma.device.type != "cpu" or torch.compiler.is_compiling() or bool(torch.isfinite(sigma).all()):
        return
    index = int((~torch.isfinite(sigma.view(-1))).nonzero()[0])
    raise ValueError(
        f"spectral_norm: the norm of the weight of shape {tuple(weights[index].shape)} is "
        f"{sigma.view(-1)[index].item()}: it has NaN, infinite or overflowing values. Remedy: a smaller learning rate, "
        "or load finite weights"
    )


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


def _identity(weight: Tensor) -> tuple[int, int]:
    """Address and version of a weight; tensors of inference mode have no version, and cannot change."""
    return weight.data_ptr(), -1 if weight.is_inference() else weight._version


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
