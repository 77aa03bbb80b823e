"""No certified sample lies beyond its bound: trained blocks, chains, and what must not be certified."""

import copy
import math
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import iresnet_fast as irf
from iresnet_fast.nn import InvertibleResidualBlock, InvertibleSequential, LipschitzMLP
from iresnet_fast.nn.residual.exact import exact_copy
from iresnet_fast.solvers import ExactBranch, sample_norms

ACTIVATIONS = ["relu", "elu", "softplus", "lipswish", "maxmin", "tanh"]
LONG = np.longdouble


def in_long_double(module, x):
    """A branch in 80 bits, by another implementation than PyTorch's."""
    for part in module:
        if isinstance(part, nn.Linear):
            x = x @ part.weight.detach().numpy().astype(LONG).T + part.bias.detach().numpy().astype(LONG)
        elif isinstance(part, nn.ReLU):
            x = np.maximum(x, LONG(0))
        elif isinstance(part, nn.ELU):
            x = np.where(x > 0, x, LONG(part.alpha) * np.expm1(np.minimum(x, LONG(0))))
        elif isinstance(part, nn.Softplus):
            x = np.logaddexp(x * LONG(part.beta), LONG(0)) / LONG(part.beta)
        elif isinstance(part, nn.Tanh):
            x = np.tanh(x)
        elif isinstance(part, irf.nn.LipSwish):
            beta = np.logaddexp(LONG(float(part.beta)), LONG(0))
            x = x / (1 + np.exp(-beta * x)) / LONG("1.1")
        elif isinstance(part, irf.nn.MaxMin):
            a, b = np.split(x, 2, axis=1)
            x = np.concatenate([np.maximum(a, b), np.minimum(a, b)], 1)
        else:
            raise AssertionError(type(part))
    return x


def distance_to_the_exact_inverse(block, y, x, lipschitz):
    """‖x − x*‖ of each sample, and how far off that number may be: by Banach's bound in 80 bits around a solution."""
    branch = exact_copy(block.g)
    target = y.double()
    near = ExactBranch(branch).finish(target, x.double(), lipschitz, torch.zeros(len(y), dtype=torch.float64)).x
    solution = near.numpy().astype(LONG)
    for _ in range(3):
        solution = target.numpy().astype(LONG) - in_long_double(branch, solution)
    residual = target.numpy().astype(LONG) - solution - in_long_double(branch, solution)
    known = np.linalg.norm(residual.astype(np.float64), axis=1) / (1 - lipschitz)
    apart = (x.double().numpy().astype(LONG) - solution).astype(np.float64)
    return torch.from_numpy(np.linalg.norm(apart, axis=1)), torch.from_numpy(known + 1e-18)


def contracting_block(activation, coeff, d, seed, bias, steps=40):
    """A block trained to contract, as flows do on wide data: its slope is near −L."""
    torch.manual_seed(seed)
    block = InvertibleResidualBlock(LipschitzMLP(d, (32, 32), activation=activation, coeff=coeff))
    optimizer = torch.optim.Adam(block.parameters(), lr=2e-2)
    for _ in range(steps):
        x = 3 * torch.randn(64, d)
        loss = (block(x) - 0.1 * x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for part in block.g:
            if isinstance(part, nn.Linear):
                part.bias.mul_(bias)
    return block.eval()


def check_bounds(block, y):
    lipschitz = irf.enforce(block).blocks[0].lipschitz
    with torch.no_grad():
        result = block.solve_inverse(y, on_failure="return")
    assert result.unproven is None
    error, uncertainty = distance_to_the_exact_inverse(block, y, result.x, lipschitz)
    assert (error <= result.error_bound + uncertainty).all()
    tol = 1e-6 * sample_norms(result.x).double().clamp_min(1)
    assert (result.error_bound[result.certified] <= tol[result.certified]).all()
    return result, error


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(ACTIVATIONS),
    st.sampled_from([0.5, 0.8, 0.97, 0.99, 0.999]),
    st.sampled_from([2, 4]),
    st.integers(0, 100),
    st.sampled_from([1.0, 30.0, 1e3]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_certified_samples_of_trained_blocks_lie_within_their_bound(activation, coeff, d, seed, bias, dtype):
    block = contracting_block(activation, coeff, d, seed, bias).to(dtype)
    y = torch.randn(100, d, dtype=dtype)
    result, _ = check_bounds(block, y)
    # What float32 resolves is certified: rounding x alone takes eps/2 of the tolerance.
    assert result.certified.all()


@pytest.mark.full
@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(ACTIVATIONS),
    st.floats(0.5, 0.999),
    st.sampled_from([2, 4, 8]),
    st.integers(0, 10**6),
    st.floats(0, 1e3),
    st.sampled_from([torch.float32, torch.float64]),
    st.floats(-3, 3),
)
def test_many_more_trained_blocks(activation, coeff, d, seed, bias, dtype, decade):
    block = contracting_block(activation, coeff, d, seed, bias).to(dtype)
    check_bounds(block, 10**decade * torch.randn(200, d, dtype=dtype))


def test_a_bound_that_leaves_out_rounding_would_not_hold():
    """What the test above sees: without the finish, float32 solutions lie beyond L/(1 − L) times their residual."""
    block = contracting_block("relu", 0.97, 2, 0, 30.0)
    lipschitz = irf.enforce(block).blocks[0].lipschitz
    y = torch.randn(1000, 2)
    with torch.no_grad():
        result = block.solve_inverse(y, on_failure="return", certify=False)
    error, _ = distance_to_the_exact_inverse(block, y, result.x, lipschitz)
    assert (error > lipschitz / (1 - lipschitz) * result.residual).any()


def trained_chain(*links, coeff=0.9):
    torch.manual_seed(0)
    blocks = [InvertibleResidualBlock(LipschitzMLP(4, (16,), coeff=coeff)) for _ in range(3)]
    chain = InvertibleSequential(blocks[0], *links, *blocks[1:])
    optimizer = torch.optim.Adam(chain.parameters(), lr=2e-2)
    for _ in range(60):
        x = torch.randn(64, 4)
        loss = (chain(x) - 0.3 * x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return chain.eval()


class Shift(irf.nn.Bijection):
    """A user's bijection."""

    def __init__(self, constants=(2.0, 0.5)):
        super().__init__()
        self.constants = constants
        self.offset = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return 2 * x + self.offset

    def inverse(self, y):
        return (y - self.offset) / 2

    def estimate_log_det(self, x, estimator=None):
        return self(x), irf.estimators.LogDet.exactly(torch.full((len(x),), 4 * math.log(2)))

    def lipschitz(self):
        return self.constants


class FloatShift(Shift):
    def forward(self, x):
        return (2 * x.float() + self.offset.float()).to(x.dtype)

    def lipschitz(self):
        return 2.0, 0.5


@pytest.mark.parametrize("link", [irf.nn.ActNorm(4), Shift(), irf.nn.Flatten((4,))], ids=["actnorm", "own", "flatten"])
def test_chains_are_certified_end_to_end(link):
    chain = trained_chain(link)
    certificate = irf.enforce(chain)
    x = torch.randn(50, 4)
    with torch.no_grad():
        y = chain(x)
        result = chain.solve_inverse(y)
        exact = exact_copy(chain).inverse(y.double(), tol=1e-15)
    assert result.certified.all()
    assert result.block_certified.all()
    assert result.unproven is None
    assert result.growth == pytest.approx(certificate.inverse_lipschitz)
    assert (sample_norms(result.x.double() - exact) <= result.error_bound + 1e-12).all()
    assert (result.error_bound <= 1e-6 * sample_norms(result.x).double().clamp_min(1)).all()


def test_what_a_chain_cannot_prove_it_says():
    chain = trained_chain()
    y = torch.randn(6, 4)
    with torch.no_grad():
        assert chain.solve_inverse(y).unproven.startswith("2 (InvertibleResidualBlock): its branch has no proven")
        irf.enforce(chain)
        assert chain.solve_inverse(y, certify=False).unproven == "no proof was asked for"
        for link, why in (
            (Shift((2.0, None)), "1 (Shift): its inverse has no proven Lipschitz constant"),
            (Shift((2.0, math.nan)), "1 (Shift): its inverse has no proven Lipschitz constant"),
            (FloatShift(), r"1 (FloatShift): aten._to_copy computes in float32, not in float64"),
        ):
            other = copy.deepcopy(chain)
            other.insert(1, link.eval())
            irf.certify(other)
            result = other.solve_inverse(y)
            assert result.unproven == why
            assert not result.certified.any()
            assert result.error_bound.isnan().all()
            assert result.converged.all()


def test_deep_chains_say_why_nothing_is_certified():
    torch.manual_seed(0)
    chain = InvertibleSequential(*(InvertibleResidualBlock(LipschitzMLP(4, (16,), coeff=0.99)) for _ in range(16)))
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter.mul_(2)
    irf.enforce(chain.eval())
    y = torch.randn(6, 4)
    with torch.no_grad():
        result = chain.solve_inverse(y)
    assert not result.certified.any()
    assert result.growth > 1e20
    assert "errors can grow" in result.unproven
    assert result.converged.all()
    assert {int(block.proof_evaluations.max()) for block in result.blocks} == {1}
    assert (result.residual <= 1e-5).all()


def test_the_finish_goes_on_where_one_evaluation_is_not_enough():
    """Biases of 1000 inside: float32 resolves 1e-4 there, and float64 what was asked for."""
    block = contracting_block("elu", 0.9, 2, 1, 1e3)
    irf.enforce(block)
    y = torch.randn(20, 2)
    with torch.no_grad():
        plain = block.solve_inverse(y, certify=False, on_failure="return")
        result = block.solve_inverse(y)
    assert not plain.converged.all()
    assert result.converged.all()
    assert result.certified.all()
    assert (result.proof_evaluations > 1).any()


def test_a_missing_proof_never_raises():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.lock = threading.Lock()  # cannot be copied
            self.scale = nn.Parameter(torch.tensor(0.5))

        def forward(self, x):
            return self.scale * torch.erf(x) * 0.5

    block = InvertibleResidualBlock(Odd()).eval()
    y = torch.randn(4, 3)
    with torch.no_grad():
        result = block.solve_inverse(y, lipschitz=0.3)
    assert "cannot be copied" in result.unproven
    assert result.converged.all()
    del block.g.lock
    with torch.no_grad():
        result = block.solve_inverse(y, lipschitz=0.3)
    assert result.unproven == "aten.erf has no error model"


@pytest.mark.parametrize("activation", [nn.ELU(0.3), nn.Softplus(beta=1.3)])
def test_parameters_of_activations_are_those_of_float64(activation):
    block = InvertibleResidualBlock(nn.Sequential(nn.Linear(2, 2), activation)).double().eval()
    with torch.no_grad():
        block.g[0].weight.mul_(0.3)
    irf.certify(block)
    y = torch.randn(20, 2, dtype=torch.float64)
    with torch.no_grad():
        whole, general = block.solve_inverse(y, tol=1e-13), block.solve_inverse(y, tol=1e-13, path="general")
    torch.testing.assert_close(whole.x, general.x, rtol=0, atol=1e-12)
    error, _ = distance_to_the_exact_inverse(block, y, whole.x, block.proven_lipschitz())
    assert (error <= whole.error_bound + 1e-17).all()


def test_weights_that_are_held_are_those_that_are_proven():
    block = contracting_block("relu", 0.9, 2, 0, 1.0)
    irf.enforce(block)
    y = torch.randn(3, 2)
    originals = [part.parametrizations.weight.original for part in block.g if isinstance(part, nn.Linear)]
    with torch.no_grad(), irf.nn.frozen_state(block):
        assert block.solve_inverse(y).certified.all()
        for original in originals:
            original.mul_(0.1)
        assert block.proven_lipschitz() is None
        with pytest.raises(RuntimeError, match="would prove what frozen_state"):
            irf.certify(block)
    with torch.no_grad():
        irf.certify(block)
        for original in originals:
            original.mul_(10)
        with irf.nn.frozen_state(block):
            for original in originals:
                original.mul_(0.1)
            assert not block.solve_inverse(y).certified.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_constant_of_actnorm_is_not_rounded_down(dtype):
    for scale in (-2.40625, -0.7, 1.3):
        layer = irf.nn.ActNorm(1).to(dtype).eval()
        with torch.no_grad():
            layer.log_scale.fill_(scale)
        exact = math.exp(float(layer.log_scale.double()))
        assert layer.lipschitz()[0] >= exact
        assert layer.lipschitz()[1] >= 1 / exact


def test_values_whose_squares_vanish_have_a_bound():
    block = contracting_block("relu", 0.9, 2, 0, 0.0).double()
    irf.enforce(block)
    with torch.no_grad():
        for path in ("auto", "general"):
            assert (
                block.solve_inverse(torch.full((2, 2), 1e-180, dtype=torch.float64), path=path).error_bound > 0
            ).all()


def test_a_branch_that_fails_in_float64_is_not_certified_and_does_not_raise():
    class Picky(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function, self.weight = function, nn.Parameter(torch.eye(2) / 2)
            self.plain = torch.eye(2) / 3

        def forward(self, x):
            return self.function(self, x)

    def only_float32(self, x):
        assert x.dtype == torch.float32
        return x / 2

    irf.register_lipschitz(Picky, lambda module: 0.5)
    y = torch.randn(3, 2)
    for function, why in (
        (lambda self, x: x @ self.plain, None),
        (lambda self, x: x @ torch.full((2, 2), 0.2), "not evaluated in float64: RuntimeError"),
        (only_float32, "not evaluated in float64: AssertionError"),
    ):
        block = InvertibleResidualBlock(Picky(function)).eval()
        irf.certify(block)
        with torch.no_grad():
            result = block.solve_inverse(y)
        assert result.converged.all()
        assert result.certified.all() == (why is None)
        assert (result.unproven or "").startswith(why or "")


@pytest.mark.parametrize("constants", [(2.0, -0.5), (2.0, math.inf), (2.0,), 0.5, "no"])
def test_constants_that_are_none_prove_nothing(constants):
    chain = InvertibleSequential(InvertibleResidualBlock(LipschitzMLP(4)), Shift(constants)).eval()
    irf.certify(chain[0])
    with torch.no_grad():
        result = chain.solve_inverse(torch.randn(3, 4))
    assert not result.certified.any()
    assert result.unproven.startswith("1 (Shift): ")
    if isinstance(constants, tuple) and len(constants) == 2:
        assert not irf.certify(chain).guaranteed
    else:
        with pytest.raises(TypeError, match="must return two numbers or None"):
            irf.certify(chain)


def test_a_chain_under_autocast_is_not_certified():
    chain = trained_chain()
    irf.enforce(chain)
    x = torch.randn(5, 4)
    with torch.no_grad(), torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        result = chain.solve_inverse(chain(x), tol=1e-2)
    assert result.unproven == "g is evaluated as PyTorch does in autocast to bfloat16"
    assert not result.certified.any()
    assert not result.block_certified.any()
    assert result.error_bound.isnan().all()


def test_a_constant_branch_is_finished_by_one_step():
    """Behind another block in a chain, where y has moved since its float32 solve."""
    constant = InvertibleResidualBlock(LipschitzMLP(4, (8,)))
    with torch.no_grad():
        constant.g[-1].parametrizations.weight.original.zero_()
    for path in ("auto", "general"):
        chain = trained_chain(constant)
        irf.enforce(chain)
        with torch.no_grad():
            result = chain.solve_inverse(torch.randn(20, 4), tol=5e-7, path=path)
        assert result.certified.all(), result.unproven
    exact = ExactBranch(exact_copy(constant.g))
    y = torch.randn(3, 4, dtype=torch.float64)
    found = exact.finish(y, y + 1, 0.0, torch.full((3,), 1e-12, dtype=torch.float64))
    assert (found.error_bound <= 1e-12).all()


def test_what_is_returned_with_a_gradient_is_what_is_proven():
    chain = trained_chain()
    irf.enforce(chain)
    y = torch.randn(6, 4)
    with torch.no_grad():
        expected = chain.solve_inverse(y, tol=5e-7).x
    found = chain.solve_inverse(y.requires_grad_(), tol=5e-7).x
    assert torch.equal(found.detach(), expected)
    (gradient,) = torch.autograd.grad(found.sum(), y)
    torch.testing.assert_close(gradient, torch.autograd.grad(chain.inverse(y).sum(), y)[0], rtol=1e-4, atol=1e-5)


def test_every_unknown_keyword_is_an_error():
    flow = irf.models.IResNetFlow.from_config({"in_shape": (2,), "fc_blocks": 1}).eval()
    z, image = torch.randn(2, 2), torch.randn(2, 4, 2, 2)
    block = InvertibleResidualBlock(LipschitzMLP(2)).eval()
    calls = [
        lambda: irf.nn.Squeeze().inverse(image, toll=1),
        lambda: irf.nn.ActNorm(2).inverse(z, toll=1),
        lambda: irf.nn.Logit().inverse(z, toll=1),
        lambda: irf.nn.Center().inverse(z, toll=1),
        lambda: irf.nn.Flatten((2,)).inverse(z, toll=1),
        lambda: irf.nn.InjectivePad(1).inverse(z, toll=1),
        lambda: irf.nn.Split(irf.nn.Flatten((1,)), (2,)).inverse(z, toll=1),
        lambda: block.inverse(z, toll=1),
        lambda: block.solve_inverse(z, toll=1),
        lambda: block.inverse_and_log_det(z, toll=1),
        lambda: InvertibleSequential(block).inverse(z, toll=1),
        lambda: InvertibleSequential(block).solve_inverse(z, toll=1),
        lambda: flow.inverse(z, toll=1),
        lambda: flow.solve_inverse(z, toll=1),
        lambda: flow.reconstruct(z, toll=1),
        lambda: flow.sample(2, toll=1),
        lambda: flow.interpolate(z, z, toll=1),
        lambda: irf.distributions.FlowTransform(flow, toll=1),
        lambda: irf.solvers.invert_residual(lambda x: x / 2, z, toll=1),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="unexpected keyword argument 'toll'"):
            call()
