"""Bound the rounding error of a function in float64 while it is evaluated."""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# Unit roundoff of float64, and a little more for the rounding of the bounds themselves.
UNIT = 1.001 * torch.finfo(torch.float64).eps / 2
# Rounding of an elementary function, in units of its value and of its argument. Vector libraries state 1 to 4.
_ELEMENTARY = 8
# How deep tensors of a function are looked for: attributes of attributes of what a closure holds.
_DEEPEST = 4
_EMPTY = types.CellType()
# Squares of smaller numbers vanish, and norms with them: what they leave out.
TINY = 1e-150
_FLOAT64 = torch.float64
_aten: Any = torch.ops.aten


class NoErrorModelError(Exception):
    """Raised where nothing bounds the rounding of a function; the message says why."""


class WatchedFunction:
    """A function that is evaluated with a bound of its rounding error.

    Every operation is watched: its own rounding is bounded by the norms of what goes in and comes out, and the errors
    before it grow by what it can stretch them (running error analysis; Higham 2002, chapters 3 and 4).

    Args:
        function: a function of x (B, ...) in float64 that treats samples independently. Its own tensors, in float64,
            are taken as exact: those of a module, or those that a plain function refers to.
        norms: proven norms of the operators of weights, by :func:`key_of`. Of others the root of the largest row and
            column sums is taken.
        checks: whether it asks for conditions of values, of which it makes nothing but an error. What depends on such
            an answer otherwise has no error model.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        norms: Mapping[tuple[Any, ...], float] | None = None,
        *,
        checks: bool = False,
    ) -> None:
        self.function = function
        self._checks = checks
        self._norms = norms or {}
        self._own = _tensors_of(function)
        self._sums: dict[tuple[Any, ...], float] = {}

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate.

        Args:
            x: (B, ...) float64, taken as exact.

        Returns:
            The value (B, ...), and the bound (B,) of the Euclidean norm of its error.

        Raises:
            NoErrorModelError: an operation has no error model, an intermediate is not float64, its first axis is not
                that of the samples, or it is made of a tensor that the function does not own.
        """
        # Outside of inference mode, which hides from the watch what operations consist of.
        with torch.inference_mode(False), torch.no_grad():
            watch = _Watch(x.clone() if x.is_inference() else x, self._own, self._norms, self._sums, self._checks)
            with watch:
                value = self.function(watch.x)
            if not isinstance(value, Tensor) or watch.known.get(_storage(value)) is None:
                raise NoErrorModelError("its value is not what watched operations have made of x")
            return value, watch.error(value).expand(len(x))


def key_of(weight: Tensor) -> tuple[Any, ...]:
    """Return the key of a weight among the proven norms: its memory, and how it is read."""
    return _storage(weight), weight.data_ptr(), tuple(weight.shape), weight.stride()


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tensors_of(value: Any) -> dict[int, Tensor]:
    """Find the tensors that a function refers to, by storage: those of modules, closures, defaults and attributes."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()
    stack = [(value, 0)]
    while stack:
        part, depth = stack.pop()
        if id(part) in seen or depth > _DEEPEST:
            continue
        seen.add(id(part))
        inside: Iterable[Any] = ()
        if isinstance(part, Tensor):
            found[_storage(part)] = part
        elif isinstance(part, nn.Module):
            owned = [vars(module) for module in part.modules()]
            inside = [each for own in owned for name, each in own.items() if name != "_modules"]
            depth = 0
        elif isinstance(part, (list, tuple, set)):
            inside = part
        elif isinstance(part, Mapping):
            inside = part.values()
        elif isinstance(part, functools.partial):
            inside = (part.func, part.args, part.keywords)
        elif isinstance(part, types.MethodType):
            inside = (part.__self__, part.__func__)
        elif isinstance(part, types.FunctionType):
            cells = [cell.cell_contents for cell in part.__closure__ or () if cell != _EMPTY]
            named = [part.__globals__.get(name) for name in part.__code__.co_names]
            inside = (*cells, part.__defaults__, part.__kwdefaults__, *named)
        elif not isinstance(part, (type, types.ModuleType)) and hasattr(part, "__dict__"):
            inside = vars(part).values()
        stack += [(each, depth + 1) for each in inside]
    return found


class _Known(NamedTuple):
    """What is known of a storage.

    Attributes:
        tensor: in it; kept, so that its memory is not given to another one.
        error: bound of the Euclidean distance to the exact values: (B,) of samples; () of what depends on the
            function's own tensors alone.
    """

    tensor: Tensor
    error: Tensor


class _Watch(TorchDispatchMode):
    """Follow tensors through a function by their storage, for a view has the error of what it is a view of."""

    def __init__(
        self,
        x: Tensor,
        own: Mapping[int, Tensor],
        norms: Mapping[tuple[Any, ...], float],
        sums: dict[tuple[Any, ...], float],
        checks: bool,
    ) -> None:
        super().__init__()
        self.x, self.n_samples = x, len(x)
        self.known: dict[int, _Known] = {_storage(x): _Known(x, x.new_zeros(len(x)))}
        self.own, self.norms, self.sums, self.checks = own, norms, sums, checks

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler at the first operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs, op = kwargs or {}, func.overloadpacket
        before = args
        if func._schema.is_mutable and op is not _aten.copy_:
            declared = {each.name for each in func._schema.arguments if each.alias_info and each.alias_info.is_write}
            named = dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | kwargs
            for part in (named.get(name) for name in declared):
                if isinstance(part, Tensor) and _storage(part) not in self.known:
                    raise NoErrorModelError(f"{op} changes a tensor of the function's own")
            before = [self._copy_of(part) if isinstance(part, Tensor) else part for part in args]
        output = func(*args, **kwargs)
        if op in _VIEWS:
            self._check_view(op, args, output)
            return output
        first = output[0] if isinstance(output, (tuple, list)) else output
        inputs = list(_tensors((*before, *kwargs.values())))
        if not isinstance(first, Tensor):
            asks = all(part.dtype == torch.bool for part in inputs) and self.checks
            if any(self.is_sampled(part) for part in inputs) and not asks:
                raise NoErrorModelError(f"{op} makes a Python number of values")
            return output
        self._check_inputs(op, inputs)
        if op in _NEW:
            self.known[_storage(first)] = _Known(first, first.new_zeros((), dtype=_FLOAT64))
            return output
        call = _Call(self, op, before, kwargs, first, any(self.is_sampled(part) for part in inputs))
        if not first.is_floating_point():
            if call.sampled:  # a mask: what is made of it jumps
                self.known[_storage(first)] = _Known(first, first.new_full((len(self.x),), math.inf, dtype=_FLOAT64))
            return output
        if first.dtype != _FLOAT64:
            raise NoErrorModelError(f"{op} computes in {str(first.dtype).removeprefix('torch.')}, not in float64")
        if any(not part.is_floating_point() and self.is_sampled(part) for part in inputs):
            raise NoErrorModelError(f"{op} depends on a comparison of values")
        if op not in _RULES or not inputs:
            raise NoErrorModelError(f"{op} has no error model")
        error = _RULES[op](call)
        self._know(first, error.expand(self.n_samples) if call.sampled else error)
        return output

    def _check_inputs(self, op: Any, inputs: Sequence[Tensor]) -> None:
        for part in inputs:
            key = _storage(part)
            if part.is_floating_point() and key not in self.known and key not in self.own:
                raise NoErrorModelError(f"{op} takes a tensor {tuple(part.shape)} that the function does not own")

    def _copy_of(self, tensor: Tensor) -> Tensor:
        """A tensor as it is before an operation writes to it."""
        known = self.known.get(_storage(tensor))
        if known is None:  # it is not written to
            return tensor
        copied = tensor.clone()
        self.known[_storage(copied)] = known._replace(tensor=copied)
        return copied

    def _know(self, tensor: Tensor, error: Tensor) -> None:
        """Record the error of a result; of one that is a part of its storage, beside the error of the rest."""
        key, known = _storage(tensor), self.known.get(_storage(tensor))
        whole = tensor.numel() * tensor.element_size() >= tensor.untyped_storage().nbytes()
        if known is not None and not whole:
            error = torch.hypot(known.error, error)
        self.known[key] = _Known(tensor, error)

    def error(self, tensor: Tensor) -> Tensor:
        """Return the bound of a tensor's error: (B,), or () of constants."""
        known = self.known.get(_storage(tensor))
        if known is None:
            return tensor.new_zeros((), dtype=_FLOAT64)
        if known.error.dim() and (tensor.dim() == 0 or tensor.shape[0] != self.n_samples):
            raise NoErrorModelError(f"samples are not on the first axis of an intermediate {tuple(tensor.shape)}")
        return known.error

    def is_sampled(self, tensor: Tensor) -> bool:
        """Return true if a tensor depends on the input."""
        known = self.known.get(_storage(tensor))
        return known is not None and known.error.dim() > 0

    def _check_view(self, op: Any, args: Sequence[Any], output: Any) -> None:
        source = args[0]
        known = self.known.get(_storage(source))
        if known is None:
            return
        parts = output if isinstance(output, (tuple, list)) else [output]
        if known.error.dim() and (
            _moves_samples(op, source.dim(), args[1:])
            or any(part.dim() == 0 or part.shape[0] != self.n_samples for part in parts)
        ):
            raise NoErrorModelError(f"{op} moves samples from the first axis")
        if op is _aten.expand:
            self.known[_storage(source)] = known._replace(error=known.error * _copies(output.numel(), source.numel()))


class _Call(NamedTuple):
    """An operation that has just run, and what its rule asks for."""

    watch: _Watch
    op: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    output: Tensor
    sampled: bool

    def get(self, position: int, default: Any) -> Any:
        """An argument, or its default."""
        return self.args[position] if len(self.args) > position else default

    def error(self, tensor: Any) -> Tensor:
        """Bound of the error of an argument, spread over the output's shape."""
        if not isinstance(tensor, Tensor):
            return self.output.new_zeros(())
        return self.watch.error(tensor) * self._spread(tensor)

    def norm(self, tensor: Any) -> Tensor:
        """Euclidean norm of an argument spread over the output's shape, or of the output: (B,) or ()."""
        if not isinstance(tensor, Tensor):
            return self.output.new_full((), abs(float(tensor)) * _copies(self._size(self.output), 1))
        if tensor is self.output or self.watch.is_sampled(tensor):
            return (_rows(tensor, 2) if self.sampled else torch.linalg.vector_norm(tensor)) * self._spread(tensor)
        return torch.linalg.vector_norm(tensor.to(_FLOAT64)) * self._spread(tensor)

    def extreme(self, tensor: Any, order: float) -> Tensor:
        """Largest (∞) or smallest (−∞) absolute value of each sample, or of a constant."""
        if not isinstance(tensor, Tensor):
            return self.output.new_full((), abs(float(tensor)))
        if self.sampled and (tensor is self.output or self.watch.is_sampled(tensor)):
            return _rows(tensor, order)
        return torch.linalg.vector_norm(tensor.to(_FLOAT64), order) if tensor.numel() else self.output.new_zeros(())

    def _spread(self, tensor: Tensor) -> float:
        if tensor.dim() < self.output.dim() and self.watch.is_sampled(tensor):
            raise NoErrorModelError(f"{self.op} spreads samples over another axis")
        return _copies(self._size(self.output), self._size(tensor))

    def _size(self, tensor: Tensor) -> float:
        """Values of one sample, or of a constant."""
        sampled = self.sampled and (tensor is self.output or self.watch.is_sampled(tensor))
        return tensor.numel() / max(1, self.watch.n_samples) if sampled else tensor.numel()


def _copies(size: float, of: float) -> float:
    """How much the norm of ``of`` values grows where they are spread over ``size``."""
    return math.sqrt(max(1.0, size / of)) if of else 1.0


def _rows(tensor: Tensor, order: float) -> Tensor:
    rows = tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None]
    return torch.linalg.vector_norm(rows, order, dim=1) if rows.numel() else rows.new_zeros(len(rows))


def _tensors(args: Sequence[Any]) -> Iterator[Tensor]:
    for part in args:
        if isinstance(part, Tensor):
            yield part
        elif isinstance(part, (list, tuple)):
            yield from _tensors(part)


def _ops(*names: str) -> list[Any]:
    return [getattr(_aten, name) for name in names if hasattr(_aten, name)]


_NEW = frozenset(
    _ops("empty_like", "new_empty", "new_zeros", "zeros_like", "ones_like", "new_ones", "new_full", "full_like")
    + _ops("empty", "zeros", "ones", "full", "eye", "scalar_tensor")
)
_VIEWS = frozenset(
    _ops("view", "_unsafe_view", "_reshape_alias", "alias", "detach", "expand", "squeeze")
    + _ops("t", "transpose", "permute", "unsqueeze", "select", "slice", "split", "split_with_sizes", "unbind")
)


def _moves_samples(op: Any, axes: int, args: Sequence[Any]) -> bool:
    """Return true if a view takes samples from the first axis, and its shape may not show it."""
    if op is _aten.permute:
        return bool(args[0][0] % axes)
    if op is _aten.transpose:
        return 0 in (args[0] % axes, args[1] % axes)
    if op is _aten.unsqueeze:
        return args[0] in (0, -axes - 1)
    if op is _aten.select or op is _aten.unbind:
        return (args[0] if args else 0) % axes == 0
    return op is _aten.t and axes > 1


# The rules: each returns the bound of the output's error.


def _exact(call: _Call) -> Tensor:
    """No rounding, and steps of at most one in every argument."""
    errors = [call.error(part) for part in _tensors(call.args)]
    return torch.stack(torch.broadcast_tensors(*errors)).sum(0)


def _elementary(slope: float | Callable[[_Call], Tensor | float]) -> Callable[[_Call], Tensor]:
    """An elementwise function whose derivative is bounded."""

    def rule(call: _Call) -> Tensor:
        steepest = slope(call) if callable(slope) else slope
        rounding = _ELEMENTARY * UNIT * (call.norm(call.output) + call.norm(call.args[0]))
        return steepest * call.error(call.args[0]) + rounding

    return rule


def _sum(call: _Call) -> Tensor:
    a, b = call.args[:2]
    alpha = abs(float(call.kwargs.get("alpha", 1)))
    scaled = 0.0 if alpha == 1 else alpha * call.norm(b)
    return call.error(a) + alpha * call.error(b) + UNIT * (call.norm(call.output) + scaled)


def _product(call: _Call) -> Tensor:
    a, b = call.args[:2]
    of_a, of_b = call.error(a), call.error(b)
    grown = call.extreme(b, math.inf) * of_a + (call.extreme(a, math.inf) + of_a) * of_b
    return grown + UNIT * call.norm(call.output)


def _quotient(call: _Call) -> Tensor:
    if call.kwargs.get("rounding_mode") is not None:
        raise NoErrorModelError(f"{call.op} with rounding_mode has no error model")
    a, b = call.args[:2]
    of_b = call.error(b)
    room = call.extreme(b, -math.inf) - of_b
    grown = (call.error(a) + call.extreme(call.output, math.inf) * of_b) / room
    return torch.where(room > 0, grown, math.inf) + UNIT * call.norm(call.output)


def _linear(
    call: _Call, x: Tensor, weight: Tensor, key: tuple[Any, ...], sums: float, terms: int, offset: Tensor | float
) -> Tensor:
    """Sums of ``terms`` products with a weight whose absolute values have a norm of at most ``sums``, and an offset."""
    if not call.watch.is_sampled(x) or call.watch.is_sampled(weight):
        raise NoErrorModelError(f"{call.op} of two intermediates has no error model")
    gamma = (terms + 1) * UNIT / (1 - (terms + 1) * UNIT)
    inside, size = call.watch.error(x), _rows(x, 2)
    norm = min(sums, call.watch.norms.get(key, math.inf))
    moved = call.watch.error(weight) * math.sqrt(terms)  # of a weight that is computed, in the Frobenius norm
    return (norm + moved) * inside + moved * size + gamma * (sums * size + offset)


def root_of_sums(rows: Tensor, columns: Tensor) -> float:
    """Bound the norm of the absolute values of a weight by their row and column sums (Schur's test)."""
    return math.sqrt(float(rows.max()) * float(columns.max()))


def _cached(call: _Call, weight: Tensor, sums: Callable[[], tuple[Tensor, Tensor]]) -> float:
    """The root of the largest row sum times the largest column sum of absolute values, taken once of own weights."""
    key = key_of(weight)
    if key in call.watch.sums:
        return call.watch.sums[key]
    found = root_of_sums(*sums()) if weight.numel() else 0.0
    if _storage(weight) in call.watch.own:  # whose memory is no other's, as long as the function lives
        call.watch.sums[key] = found
    return found


def _mm(call: _Call) -> Tensor:
    x, weight = call.args
    sums = _cached(call, weight, lambda: (weight.abs().sum(0), weight.abs().sum(1)))
    return _linear(call, x, weight, key_of(weight.t()), sums, len(weight), 0.0)


def _addmm(call: _Call) -> Tensor:
    if any(float(call.kwargs.get(name, 1)) != 1 for name in ("alpha", "beta")):
        raise NoErrorModelError(f"{call.op} with alpha or beta has no error model")
    bias, x, weight = call.args
    sums = _cached(call, weight, lambda: (weight.abs().sum(0), weight.abs().sum(1)))
    return _linear(call, x, weight, key_of(weight.t()), sums, len(weight), call.norm(bias)) + call.error(bias)


def _convolution(call: _Call) -> Tensor:
    x, weight, bias, _, _, _, transposed, _, groups = call.args
    per_group = weight.shape[0] // groups  # outputs, or inputs of a transposed one

    def sums() -> tuple[Tensor, Tensor]:
        kernel = weight.abs().flatten(2).sum(2).view(groups, per_group, -1)
        return kernel.sum(1), kernel.sum(2)

    terms = weight[0, 0].numel() * (per_group if transposed else weight.shape[1])
    if bias is None:
        return _linear(call, x, weight, key_of(weight), _cached(call, weight, sums), terms, 0.0)
    positions = math.sqrt(call.output[:1, :1].numel())
    offset = torch.linalg.vector_norm(bias) * positions
    error = _linear(call, x, weight, key_of(weight), _cached(call, weight, sums), terms, offset)
    return error + call.watch.error(bias) * positions


def _batch_norm(call: _Call) -> Tensor:
    x, weight, bias, mean, variance = call.args[:5]
    fixed = call.op is _aten._native_batch_norm_legit_no_training
    if mean is None or (not fixed and call.args[5]):
        raise NoErrorModelError("batch normalization of the batch has no error model")
    if any(part is not None and _storage(part) in call.watch.known for part in (weight, bias, mean, variance)):
        raise NoErrorModelError("batch normalization by computed statistics has no error model")
    scale = torch.rsqrt(variance + call.args[6 if fixed else 7])
    scale = scale if weight is None else scale * weight.abs()
    offset = torch.linalg.vector_norm(mean * scale)
    offset = offset if bias is None else offset + torch.linalg.vector_norm(bias)
    rounding = scale.max() * _rows(x, 2) + offset * math.sqrt(x[:1, :1].numel())
    return scale.max() * call.error(x) + _ELEMENTARY * UNIT * rounding


def _reduction(call: _Call) -> Tensor:
    x, axes = call.args[0], call.get(1, None)
    axes = [axis % x.dim() for axis in axes] if axes else range(x.dim())
    if call.sampled and 0 in axes:
        raise NoErrorModelError(f"{call.op} over samples has no error model")
    terms = math.prod(x.shape[axis] for axis in axes)
    share = math.sqrt(terms) / (terms if call.op is _aten.mean else 1)
    size = _rows(x, 2) if call.sampled else torch.linalg.vector_norm(x)
    return share * (call.watch.error(x) + (terms + 1) * UNIT * size)


def _softplus(call: _Call) -> Tensor:
    x, beta, threshold = call.args[0], float(call.get(1, 1)), float(call.get(2, 20))
    # Beyond the threshold it is the identity, log1p(exp(-threshold))/beta below what it stands for.
    jump = math.log1p(math.exp(-threshold)) / abs(beta)
    beyond = (beta * x > threshold - 1).to(_FLOAT64)
    count = beyond.flatten(1).sum(1) if call.sampled else beyond.sum()
    return _elementary(1.0)(call) + jump * count.sqrt()


def _pad_by_copies(call: _Call) -> Tensor:
    """Reflected or replicated borders: a value stands at most once more for every position of padding."""
    return call.watch.error(call.args[0]) * math.sqrt(math.prod(1 + abs(size) for size in call.args[1]))


def _copy(call: _Call) -> Tensor:
    target, source = call.args[:2]
    return torch.hypot(call.watch.error(target), call.error(source))


def _cat(call: _Call) -> Tensor:
    parts, axis = call.args[0], call.get(1, 0)
    if call.sampled and axis % call.output.dim() == 0:
        raise NoErrorModelError(f"{call.op} puts samples side by side")
    errors = torch.broadcast_tensors(*(call.watch.error(part) for part in parts))
    return torch.linalg.vector_norm(torch.stack(errors), dim=0)


def _exp_slope(call: _Call) -> Tensor:
    return call.extreme(call.output, math.inf) * torch.exp(call.error(call.args[0]))


def _elu_slope(call: _Call) -> float:
    alpha, scale, input_scale = (float(call.get(position, 1)) for position in (1, 2, 3))
    return abs(scale) * max(1.0, abs(alpha * input_scale))


def _steepest_at_zero(power: float) -> Callable[[_Call], Tensor]:
    """Of log, sqrt, rsqrt and reciprocal: |x|^power bounds the slope."""

    def slope(call: _Call) -> Tensor:
        room = call.extreme(call.args[0], -math.inf) - call.error(call.args[0])
        return torch.where(room > 0, room.clamp_min(0) ** power, math.inf)

    return slope


def _logit(call: _Call) -> Tensor:
    """log(p/(1 − p)): the quotient is rounded by a few units, and the logarithm by a few of its value."""
    if call.get(1, None) is not None:
        raise NoErrorModelError(f"{call.op} with eps has no error model")
    p, ends = call.args[0], torch.minimum(call.args[0], 1 - call.args[0])
    spread = call.error(p)
    room = (_rows(ends, -math.inf) if call.sampled else ends.min()) - spread
    slope = torch.where(room > 0, 2 / room.clamp_min(0), math.inf)
    return slope * spread + _ELEMENTARY * UNIT * (call.norm(call.output) + call.norm(1.0))


def _power(call: _Call) -> Tensor:
    """x², x³, ...: steepest at the largest value."""
    exponent = call.get(1, 2)
    if not isinstance(exponent, int) or exponent < 1:
        raise NoErrorModelError(f"{call.op} with the exponent {exponent!r} has no error model")
    largest = call.extreme(call.args[0], math.inf) + call.error(call.args[0])
    rounding = exponent * _ELEMENTARY * UNIT * call.norm(call.output)
    return exponent * largest ** (exponent - 1) * call.error(call.args[0]) + rounding


# Bounds of the slopes of smooth activations; GELU's is 1.12890, SiLU's 1.09984, Mish's 1.08850.
_RULES: dict[Any, Callable[[_Call], Tensor]] = {
    **dict.fromkeys(_ops("relu", "relu_", "neg", "abs", "clone", "_to_copy", "maximum", "minimum"), _exact),
    **dict.fromkeys(_ops("clamp", "clamp_min", "clamp_max", "hardtanh", "constant_pad_nd"), _exact),
    **dict.fromkeys(_ops("pixel_shuffle", "pixel_unshuffle"), _exact),
    **dict.fromkeys(_ops("reflection_pad1d", "reflection_pad2d", "reflection_pad3d"), _pad_by_copies),
    **dict.fromkeys(_ops("replication_pad1d", "replication_pad2d", "replication_pad3d"), _pad_by_copies),
    **dict.fromkeys(_ops("add", "add_", "sub", "sub_"), _sum),
    **dict.fromkeys(_ops("mul", "mul_"), _product),
    **dict.fromkeys(_ops("div", "div_"), _quotient),
    **dict.fromkeys(_ops("sum", "mean"), _reduction),
    **dict.fromkeys(_ops("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"), _batch_norm),
    **dict.fromkeys(_ops("tanh", "sin", "cos", "atan"), _elementary(1.0)),
    _aten.sigmoid: _elementary(0.25),
    _aten.silu: _elementary(1.1),
    _aten.gelu: _elementary(1.13),
    _aten.mish: _elementary(1.09),
    _aten.hardswish: _elementary(1.5),
    _aten.elu: _elementary(_elu_slope),
    _aten.leaky_relu: _elementary(lambda call: max(1.0, abs(float(call.get(1, 0.01))))),
    _aten.softplus: _softplus,
    _aten.exp: _elementary(_exp_slope),
    _aten.log: _elementary(_steepest_at_zero(-1.0)),
    _aten.sqrt: _elementary(_steepest_at_zero(-0.5)),
    _aten.rsqrt: _elementary(_steepest_at_zero(-1.5)),
    _aten.reciprocal: _elementary(_steepest_at_zero(-2.0)),
    _aten.logit: _logit,
    _aten.square: _power,
    _aten.pow: _power,
    _aten.mm: _mm,
    _aten.addmm: _addmm,
    _aten.convolution: _convolution,
    _aten.copy_: _copy,
    _aten.cat: _cat,
}
