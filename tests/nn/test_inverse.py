"""Inverses of modules: which g is inverted, what is reported, gradients, and state."""

import contextlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

import iresnet_fast as irf
from benchmarks.blocks import saturated
from iresnet_fast.nn import ACTIVATIONS
from tests.helpers import same_state, small_classifier, state_of
from tests.tolerances import GRADIENT


def mlp_block(d=3, hidden=(8,), **options):
    return irf.nn.InvertibleResidualBlock(irf.nn.LipschitzMLP(d, hidden, **options)).double()


@given(st.integers(0, 10_000), st.sampled_from(sorted(ACTIVATIONS)), st.floats(0.1, 0.97), st.booleans())
def test_error_never_exceeds_the_reported_bound(seed, activation, coeff, convolutional):
    """Random contractive branches, near their coeff: the true x is known, and the bound is never below the error."""
    torch.manual_seed(seed)
    if convolutional:
        branch = irf.nn.Bottleneck(4, 4, coeff=coeff, input_size=(3, 5), activation=activation)
        x = torch.randn(6, 4, 3, 5, dtype=torch.float64) * 10 ** torch.empty(6, 1, 1, 1).uniform_(-3, 3)
    else:
        branch = irf.nn.LipschitzMLP(4, (6, 6), coeff=coeff, activation=activation)
        x = torch.randn(6, 4, dtype=torch.float64) * 10 ** torch.empty(6, 1).uniform_(-3, 3)
    block = saturated(irf.nn.InvertibleResidualBlock(branch).double().eval())
    with torch.no_grad():
        assert irf.enforce(block).guaranteed
        y = block(x)
        for tol in (1e-3, 1e-9):
            result = block.solve_inverse(y, tol=tol)
            error = (result.x - x).flatten(1).norm(dim=1)
            assert result.certified.all()
            assert (error <= result.error_bound).all()
            assert (result.error_bound <= 1.001 * tol * y.flatten(1).norm(dim=1).clamp_min(1)).all()


def test_the_chains_bound_holds_and_is_nan_without_a_proof():
    model = small_classifier().double()
    irf.enforce(model)
    x = torch.rand(5, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        for tol in (1e-2, 1e-5, 1e-10):
            result = model.solve_inverse(model.features(x), tol=tol)
            error = (result.x - x).flatten(1).norm(dim=1)
            assert (error <= result.error_bound).all()
            assert result.certified.all()
            assert (result.residual <= 10 * tol).all()
        model.trunk[1].g[0].bias.add_(1e-3)
        result = model.solve_inverse(model.features(x))
    assert result.error_bound.isnan().all()
    assert not result.certified.any()
    assert result.converged.all()


def test_foreign_links_have_no_bound():
    class Flip(nn.Module):
        def forward(self, x):
            return -x

        inverse = forward

    chain = irf.nn.InvertibleSequential(Flip(), mlp_block()).eval()
    irf.certify(chain)
    result = chain.solve_inverse(torch.randn(2, 3, dtype=torch.float64))
    assert result.error_bound.isnan().all()
    assert not result.certified.any()


def test_a_failing_block_is_named():
    model = small_classifier()
    position = [type(part).__name__ for part in model.trunk].index("InvertibleResidualBlock")
    with torch.no_grad():
        model.trunk[position].g[-1].bias.fill_(float("nan"))
    with pytest.raises(irf.NotConvergedError, match=f"block {position}: 2 of 2 samples did not converge"):
        model.inverse(torch.randn(2, *model.latent_shape))


def test_progress_and_interruption_leave_no_state():
    model = small_classifier().train()
    z = torch.randn(2, *model.latent_shape)
    before = state_of(model)
    seen = []
    model.inverse(z, progress=lambda done, total, result: seen.append((done, total, bool(result.converged.all()))))
    assert seen == [(1, 3, True), (2, 3, True), (3, 3, True)]

    def interrupt(done, total, result):
        if done == 2:
            raise KeyboardInterrupt

    expected = model.solve_inverse(z).x
    with pytest.raises(KeyboardInterrupt):
        model.inverse(z, progress=interrupt)
    assert irf.nn.weights._frame() is None
    assert not parametrize._cache_enabled
    assert same_state(model, before)
    assert torch.equal(model.inverse(z), expected)


def test_autocast_inverts_the_forward_under_autocast():
    """Under autocast g is another function; its own inverse is found, named, and not called certified."""
    block = irf.nn.InvertibleResidualBlock(irf.nn.LipschitzMLP(16, (64,), coeff=0.7)).eval()
    irf.enforce(block)
    x = torch.randn(20, 16)
    kind = torch.get_default_device().type
    with torch.no_grad():
        plain = block.solve_inverse(block(x))
        with torch.autocast(kind, dtype=torch.bfloat16):
            y = block(x)
            reduced = block.solve_inverse(y, tol=1e-2)
            assert (block(reduced.x) - y).norm(dim=1).max() <= 1e-2 * y.norm(dim=1).max()
        mixed = block.solve_inverse(y)
    assert plain.precision == "float32"
    assert reduced.precision == "autocast to bfloat16"
    assert plain.certified.all()
    assert not reduced.certified.any()
    assert reduced.unproven == "g is evaluated as PyTorch does in autocast to bfloat16"
    assert ((reduced.x - x).norm(dim=1) <= 1e-2 * y.norm(dim=1)).all()
    # The other precision's inverse of the same y is visibly another x.
    assert (mixed.x - reduced.x).norm(dim=1).max() > 1e-4
    # Where the forward ran in float32, the inverse does too.
    assert plain.x.dtype == torch.float32


def test_reduced_float32_products_are_named():
    y = torch.randn(2, 4)
    backends = torch.backends.cuda if y.device.type == "cuda" else torch.backends.mkldnn
    before = backends.matmul.fp32_precision
    backends.matmul.fp32_precision = "tf32" if y.device.type == "cuda" else "bf16"
    try:
        result = irf.solvers.invert_residual(lambda x: 0.5 * x, y, lipschitz=0.5)
    finally:
        backends.matmul.fp32_precision = before
    assert "products" in result.precision
    assert result.converged.all()
    assert not result.certified.any()


def gradients(inverse, y, model):
    x = inverse(y)
    v = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
    wanted = [y, *model.parameters()]
    return torch.autograd.grad(x, wanted, v, allow_unused=True)


@pytest.mark.parametrize("activation", ["elu", "lipswish", "maxmin"])
def test_gradcheck_of_the_inverse(activation):
    # In training mode an inverse takes u and v as they are: the gradient holds them constant, and so must this check.
    block = mlp_block(4, (6,), activation=activation).train()
    y = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def inverse(y, *parameters):
        return block.inverse(y, tol=1e-13)

    assert torch.autograd.gradcheck(inverse, (y, *block.parameters()), nondet_tol=1e-10)


@pytest.mark.parametrize("training", [False, True])
def test_gradcheck_of_a_networks_inverse(training):
    model = small_classifier(blocks=(1, 1), hidden=(2, 2), in_shape=(1, 4, 4), inject=0).double().train(training)
    z = torch.randn(2, *model.latent_shape, dtype=torch.float64, requires_grad=True)

    def inverse(z):
        return model.inverse(z, tol=1e-13)

    assert torch.autograd.gradcheck(inverse, (z,), nondet_tol=1e-10)


def test_fault_8_log_determinant_of_the_inverse():
    """log|det d inverse/dy| is −log|det(I + J_g)|, of the Jacobian at the solution x, not at y."""
    block = irf.nn.InvertibleResidualBlock(irf.nn.LipschitzMLP(4, (16,), coeff=0.95)).double().eval()
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.mul_(5 if "original" in name else 1)
    x = torch.randn(1, 4, dtype=torch.float64)
    y = block(x).detach()

    def log_det(function, at):
        jacobian = torch.autograd.functional.jacobian(function, at).reshape(4, 4)
        return torch.linalg.slogdet(jacobian).logabsdet

    inverse = log_det(lambda y: block.inverse(y, tol=1e-13), y)
    torch.testing.assert_close(inverse, -log_det(block, x), rtol=0, atol=1e-9)
    assert (inverse + log_det(block, y)).abs() > 1e-3
    assert (inverse - log_det(block, x)).abs() > 1e-3


def test_gradient_of_the_parameters_against_an_unrolled_solve():
    block = mlp_block(4, (6,)).train()
    y = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

    def unrolled(y):
        with irf.nn.frozen_state(block.g):
            x = y
            for _ in range(300):
                x = y - block.g(x)
            return x

    expected = gradients(unrolled, y, block)
    found = gradients(lambda y: block.inverse(y, tol=1e-13), y, block)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=GRADIENT[torch.float64], atol=GRADIENT[torch.float64])


def test_gradient_survives_power_iteration_in_between():
    """A training forward between the inverse and its backward moves u and v, not the gradient."""
    block = mlp_block(4, (6,)).train()
    y = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    expected = gradients(lambda y: block.inverse(y, tol=1e-13), y, block)

    def disturbed(y):
        x = block.inverse(y, tol=1e-13)
        before = state_of(block)
        block(torch.randn(2, 4, dtype=torch.float64))
        assert not same_state(block, before)
        return x

    for a, b in zip(gradients(disturbed, y, block), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("grad", [True, False])
def test_no_graph_where_none_is_wanted(grad):
    block = mlp_block().eval().requires_grad_(False)
    with contextlib.nullcontext() if grad else torch.no_grad():
        assert not block.inverse(torch.randn(2, 3, dtype=torch.float64)).requires_grad
    with torch.inference_mode():
        mlp_block().eval().inverse(torch.randn(2, 3, dtype=torch.float64))


def test_channels_last_is_kept():
    block = irf.nn.InvertibleResidualBlock(irf.nn.Bottleneck(4, 8, input_size=(6, 6))).eval()
    irf.enforce(block)
    y = torch.randn(5, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    layouts = []

    def look(module, args):
        layouts.append(args[0].is_contiguous(memory_format=torch.channels_last))

    block.g[1].register_forward_pre_hook(look)
    with torch.no_grad():
        x = block.inverse(y, tol=1e-5)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert all(layouts)
    torch.testing.assert_close(x, block.inverse(y.contiguous(), tol=1e-5), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("y", "options", "error", "message"),
    [
        (torch.ones(2, 4), {}, RuntimeError, "mat1 and mat2|size mismatch|shape"),
        (torch.ones(2, 3, dtype=torch.int64), {}, TypeError, "floating point, got torch.int64"),
        (torch.ones(2, 3, dtype=torch.float64), {}, ValueError, r"weights of torch.float32 on .*Use y.to"),
        (torch.ones(2, 3, device="meta"), {}, ValueError, "but y is torch.float32 on meta"),
        (torch.ones(2, 3), {"tol": 1e-9}, ValueError, "floor is"),
        (torch.ones(2, 3), {"tolerance": 1e-3}, TypeError, "unexpected keyword argument 'tolerance'"),
    ],
)
def test_bad_input(y, options, error, message):
    block = irf.nn.InvertibleResidualBlock(irf.nn.LipschitzMLP(3)).eval()
    with pytest.raises(error, match=message) as caught:
        block.inverse(y if y.device.type == "meta" else y.to(torch.get_default_device()), **options)
    if error is RuntimeError:
        assert caught.value.__notes__ == ["while inverting y of shape (2, 4), which this branch may not take"]


def test_gradient_inside_a_surrounding_cache_of_parametrizations():
    block = mlp_block(4, (6,)).eval()
    y = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    expected = gradients(lambda y: block.inverse(y, tol=1e-13), y, block)
    with parametrize.cached():
        block(y)
        found = gradients(lambda y: block.inverse(y, tol=1e-13), y, block)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_gradient_of_an_inverse_under_autocast():
    """The backward evaluates the branch as the inverse did, wherever it is called."""
    block = irf.nn.InvertibleResidualBlock(irf.nn.LipschitzMLP(8, (16,), coeff=0.5)).eval()
    y = torch.randn(6, 8, requires_grad=True)
    expected = torch.autograd.grad(block.inverse(y).sum(), y)[0]
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        x = block.inverse(y, tol=1e-2)
    (found,) = torch.autograd.grad(x.sum(), y)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_outside_the_range_of_the_padding_nothing_is_certified():
    chain = irf.nn.InvertibleSequential(irf.nn.InjectivePad(1)).eval()
    z = torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 5e-4]])
    result = chain.solve_inverse(z)
    assert result.certified.tolist() == [True, False]
    assert result.error_bound.isnan().tolist() == [False, True]


def test_rounding_of_actnorm_counts_what_cancels():
    """A bias of 1000 beside values of 1e-3: the subtraction rounds at 1000's own resolution."""
    actnorm = irf.nn.ActNorm(4)
    with torch.no_grad():
        actnorm.bias.fill_(1000.0)
        actnorm.log_scale.fill_(0.1)
    chain = irf.nn.InvertibleSequential(actnorm).eval()
    x = 1e-3 * torch.randn(50, 4, dtype=torch.float64)
    log_scale = torch.tensor(0.1).double()
    y = ((x + 1000) * log_scale.exp()).float()
    with torch.no_grad():
        result = chain.solve_inverse(y)
    exact = y.double() * (-log_scale).exp() - 1000
    error = (result.x.double() - exact).norm(dim=1)
    assert (error <= result.error_bound).all()
    assert (result.error_bound <= 1e-9).all()


def test_a_chain_takes_no_start():
    with pytest.raises(TypeError, match="unexpected keyword argument 'x0'"):
        small_classifier().inverse(torch.randn(1, 4, 4, 4), x0=torch.zeros(1))


@pytest.mark.filterwarnings("error")
def test_a_sample_outside_the_range_of_the_padding_is_one_that_did_not_converge():
    model = small_classifier(inject=3)
    irf.certify(model)
    with torch.no_grad():
        z = model.features(torch.randn(3, *model.config.in_shape) / 4)
    alone = model.solve_inverse(z)
    z[1] = 1.0
    with pytest.raises(ValueError, match="1 of 3 samples are outside the range"):
        model.solve_inverse(z)
    result = model.solve_inverse(z, on_failure="return")
    assert result.converged.tolist() == [True, False, True]
    assert not result.certified[1]
    assert result.error_bound.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(result.x[[0, 2]], alone.x[[0, 2]])
    with pytest.warns(UserWarning, match="1 of 3 samples are outside the range"):
        model.solve_inverse(z, on_failure="warn")


def test_what_is_done_to_a_chain_gives_a_chain():
    block, other = (irf.nn.InvertibleResidualBlock(irf.nn.LipschitzMLP(2, (4,))) for _ in range(2))
    chain = irf.nn.InvertibleSequential(block, recompute="inverse")
    for longer in (
        chain + irf.nn.InvertibleSequential(other),
        chain + torch.nn.Sequential(irf.nn.Squeeze()),
        2 * chain,
        chain * 2,
    ):
        assert type(longer) is irf.nn.InvertibleSequential
        assert (len(longer), longer.recompute) == (2, "inverse")
    chain += [other]
    chain[0] = other
    chain.extend([block])
    assert list(chain) == [other, other, block]
    for change in (lambda: chain.__setitem__(0, torch.nn.Tanh()), lambda: chain + torch.nn.Sequential(torch.nn.Tanh())):
        with pytest.raises(TypeError, match=r"module \d \(Tanh\) has no inverse method"):
            change()
    with pytest.raises(TypeError, match="no inverse method"):
        chain += [torch.nn.Tanh()]


@pytest.mark.parametrize("derived", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_captured_tensor_that_would_lose_its_gradient_is_an_error(derived, recompute):
    leaf = torch.tensor(0.3, requires_grad=True)
    scale = 2 * leaf if derived else leaf

    class Scaled(nn.Module):
        def __init__(self, keep_graph):
            super().__init__()
            self.inner = irf.nn.LipschitzMLP(3, (4,))
            self.scale = scale if keep_graph else scale.detach()

        def forward(self, x):
            return self.scale * self.inner(x)

    def backward(keep_graph):
        block = irf.nn.InvertibleResidualBlock(Scaled(keep_graph))
        x = torch.randn(2, 3, requires_grad=True)
        out = irf.nn.InvertibleSequential(block, recompute="inverse")(x) if recompute else block.inverse(x)
        out.sum().backward()

    with pytest.raises(RuntimeError, match=r"a tensor of shape \(\) that requires a gradient and is no parameter"):
        backward(keep_graph=True)
    backward(keep_graph=False)
