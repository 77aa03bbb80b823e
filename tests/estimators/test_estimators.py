"""Estimators against the exact log-determinant: bias, variance, gradients, cost."""

import math

import pytest
import torch

import iresnet_fast as irf
from benchmarks.blocks import saturated
from benchmarks.memory import kept_bytes
from iresnet_fast.estimators import Exact, LogDet, NeumannGradient, PowerSeries, RussianRoulette
from tests.helpers import jacobians
from tests.tolerances import FLOAT64

DIMENSIONS = 3
DRAWS = 10_000


@pytest.fixture
def branch():
    """A branch in float64 whose layers are at their coefficient, so that the series converges slowly."""
    return saturated(irf.nn.LipschitzMLP(DIMENSIONS, (8, 8), coeff=0.95)).double().eval()


def lipschitz_of(branch):
    return irf.certify(irf.nn.InvertibleResidualBlock(branch)).blocks[0].lipschitz


def dense_log_det(branch, x):
    return torch.linalg.slogdet(torch.eye(x.shape[1], dtype=x.dtype) + jacobians(branch, x)).logabsdet


def inputs(batch):
    return torch.randn(batch, DIMENSIONS, dtype=torch.float64)


@pytest.mark.parametrize("batch", [0, 1, 5])
def test_exact_is_slogdet_of_the_jacobian(branch, batch):
    x = inputs(batch)
    image, log_det = Exact()(branch, x)
    torch.testing.assert_close(image, branch(x))
    assert log_det.value.shape == (batch,)
    if batch:
        torch.testing.assert_close(log_det.value, dense_log_det(branch, x), rtol=FLOAT64, atol=FLOAT64)
        assert log_det.n_vjps == DIMENSIONS
    assert (log_det.standard_error == 0).all()
    assert log_det.bias_bound == 0


def mean_and_error(estimator, branch, x, draws, lipschitz):
    """Mean over independent draws and its standard error; the draws are rows of one batch, in runs of their own."""
    runs, rows = 400, draws // 400
    values = []
    with torch.no_grad():
        for _ in range(runs):
            _, log_det = estimator(branch, x.expand(rows, -1), lipschitz=lipschitz)
            values.append(log_det.value.mean())
    values = torch.stack(values)
    return values.mean(), values.std() / math.sqrt(runs)


@pytest.mark.parametrize(
    "estimator",
    [
        RussianRoulette(),
        RussianRoulette(0, continuation=0.9),
        RussianRoulette(n_probes=2, probe="gaussian"),
        NeumannGradient(RussianRoulette()),
    ],
    ids=repr,
)
def test_unbiased(branch, estimator):
    x = inputs(1)
    lipschitz = lipschitz_of(branch)
    exact = dense_log_det(branch, x)
    mean, error = mean_and_error(estimator, branch, x, DRAWS, lipschitz)
    assert error < 0.1
    assert abs(mean - exact) <= 3 * error
    _, log_det = estimator(branch, x, lipschitz=lipschitz)
    assert log_det.finite_variance
    assert log_det.bias_bound == 0


@pytest.mark.parametrize("n_terms", [1, 2, 5])
def test_truncated_series_is_within_its_bound(branch, n_terms):
    x = inputs(1)
    lipschitz = lipschitz_of(branch)
    estimator = PowerSeries(n_terms)
    _, log_det = estimator(branch, x, lipschitz=lipschitz)
    assert log_det.n_vjps == n_terms
    mean, error = mean_and_error(estimator, branch, x, DRAWS, lipschitz)
    bias = mean - dense_log_det(branch, x)
    assert abs(bias) <= log_det.bias_bound + 3 * error
    # The bias that the kept terms leave, to the digit: what the bound is a bound of.
    jacobian = jacobians(branch, x)[0]
    kept = sum((-1) ** (k + 1) / k * jacobian.matrix_power(k).trace() for k in range(1, n_terms + 1))
    assert abs(mean - kept) <= 3 * error


def test_bias_bound_is_reached():
    """By g(x) = −Lx, whose series has terms of one sign."""
    lipschitz, size = 0.9, 4
    x = torch.randn(2, size, dtype=torch.float64)
    _, log_det = PowerSeries(7)(lambda x: -lipschitz * x, x, lipschitz=lipschitz)
    expected = size * math.log(1 - lipschitz)
    torch.testing.assert_close(log_det.value - expected, torch.full_like(log_det.value, log_det.bias_bound))


def weighted_gradient(branch, estimator, x, weights, **options):
    branch.zero_grad()
    _, log_det = estimator(branch, x, **options)
    (weights * log_det.value).sum().backward()
    return torch.cat([p.grad.flatten().clone() for p in branch.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    "estimator", [NeumannGradient(RussianRoulette()), NeumannGradient(PowerSeries(60)), RussianRoulette()], ids=repr
)
def test_fault_16_gradient_under_weights_of_samples(branch, estimator):
    """Unbiased for every weighting of the samples: an estimator that sums them before is 75 % off."""
    x = inputs(2)
    weights = torch.tensor([1.0, -3.0], dtype=torch.float64)
    exact = weighted_gradient(branch, Exact(), x, weights)
    copies, runs = 50, 40
    wide = weights.repeat(copies) / copies
    lipschitz = lipschitz_of(branch)
    found = torch.stack(
        [weighted_gradient(branch, estimator, x.repeat(copies, 1), wide, lipschitz=lipschitz) for _ in range(runs)]
    )
    error = found.std(0) / math.sqrt(runs)
    deviation = (found.mean(0) - exact).norm()
    assert deviation <= 3 * error.norm()
    assert error.norm() < 0.25 * exact.norm()


def test_neumann_gradient_in_x(branch):
    x = inputs(1)
    copies = 20_000
    grads = []
    for estimator, batch in ((Exact(), x), (NeumannGradient(PowerSeries(80)), x.expand(copies, -1))):
        leaf = batch.clone().requires_grad_()
        estimator(branch, leaf)[1].value.sum().backward()
        grads.append(leaf.grad)
    exact, found = grads
    error = found.std(0) / math.sqrt(copies)
    assert ((found.mean(0) - exact[0]).abs() <= 4 * error).all()


def test_value_of_neumann_is_that_of_its_series(branch):
    """With and without a graph, for the same draws."""
    x = inputs(5)
    for series in (PowerSeries(1), PowerSeries(7), RussianRoulette(0), RussianRoulette(3)):
        for seed in range(5):
            values = []
            for estimator, graph in (
                (series, False),
                (NeumannGradient(series), True),
                (NeumannGradient(series), False),
            ):
                torch.manual_seed(seed)
                with torch.set_grad_enabled(graph):
                    found = estimator(branch, x)[1]
                values.append((found.value.detach(), found.n_vjps))
            for value, count in values[1:]:
                torch.testing.assert_close(value, values[0][0], rtol=FLOAT64, atol=FLOAT64)
                assert count == values[0][1]


def test_fault_9_probes_do_not_mix_samples(branch):
    """Samples alone and in a batch, with many probes: each has its own value."""
    x = inputs(3)
    exact = dense_log_det(branch, x)
    _, log_det = RussianRoulette(n_probes=1000)(branch, x, lipschitz=lipschitz_of(branch))
    assert ((log_det.value - exact).abs() <= 4 * log_det.standard_error).all()
    assert (log_det.standard_error < 0.5 * exact.std()).all()


def test_standard_error_is_that_of_the_estimates(branch):
    x = inputs(4)
    lipschitz = lipschitz_of(branch)
    values, errors = zip(
        *(
            (found.value, found.standard_error)
            for found in (RussianRoulette(n_probes=8)(branch, x, lipschitz=lipschitz)[1] for _ in range(100))
        ),
        strict=True,
    )
    measured = torch.stack(values).std(0)
    reported = torch.stack(errors).square().mean(0).sqrt()
    assert ((reported / measured - 1).abs() < 0.35).all()
    assert RussianRoulette()(branch, x)[1].standard_error.isnan().all()


@pytest.mark.parametrize(("continuation", "finite"), [(0.5, False), (0.8, False), (0.82, True), (None, True)])
def test_finite_variance_needs_enough_terms(branch, continuation, finite):
    """At L = 0.9 the continuation must exceed 0.81."""
    estimator = RussianRoulette(continuation=continuation)
    assert estimator(branch, inputs(1), lipschitz=0.9)[1].finite_variance is finite
    assert estimator(branch, inputs(1), assumed=0.9)[1].finite_variance is None


@pytest.mark.parametrize("n_exact", [0, 3])
def test_number_of_products(branch, n_exact):
    """Asserted, and counted by the branch itself."""
    counted = []

    class Counting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            counted.append(1)
            return grad.clone()

    def counting(x):
        return branch(Counting.apply(x))

    for estimator in (RussianRoulette(n_exact), PowerSeries(4), NeumannGradient(RussianRoulette(n_exact))):
        with torch.no_grad():
            counted.clear()
            found = estimator(counting, inputs(2), assumed=0.8)[1]
        assert len(counted) == found.n_vjps
    counted.clear()
    found = NeumannGradient(PowerSeries(6))(counting, inputs(2))[1]
    assert len(counted) == found.n_vjps == 6


def test_neumann_memory_does_not_grow_with_terms(branch):
    x = torch.randn(512, DIMENSIONS, dtype=torch.float64)

    def kept(estimator):
        return kept_bytes(lambda: estimator(branch, x)[1].value)

    few, many = (kept(NeumannGradient(PowerSeries(n))) for n in (3, 30))
    assert many <= 1.05 * few
    assert kept(PowerSeries(30)) > 3 * many


@pytest.mark.parametrize("estimator", [Exact(), PowerSeries(3), NeumannGradient()], ids=repr)
def test_branches_without_a_jacobian(estimator):
    """Constant, or without a graph: rather an error than a log-determinant of 0."""
    x = torch.randn(4, 2)
    constant = torch.ones(4, 2, requires_grad=True)
    for branch in (
        torch.ones_like,
        lambda x: x.detach() * 0.5,
        constant.expand_as,
        torch.no_grad()(torch.sin),
    ):
        with pytest.raises(ValueError, match="image has no gradient in x.* Remedy: no torch.no_grad or detach"):
            estimator(branch, x)


@pytest.mark.parametrize("estimator", [Exact(), PowerSeries(3), RussianRoulette(), NeumannGradient()], ids=repr)
def test_inference_mode(branch, estimator):
    """It records no graph, so that products taken there would be 0: they are taken outside of it."""
    values = []
    for mode in (torch.no_grad, torch.inference_mode):
        torch.manual_seed(0)
        with mode():
            x = inputs(4)
            values.append(estimator(branch, x)[1].value)
    torch.testing.assert_close(*values)
    assert (values[0] != 0).all()


def test_neumann_gradients_are_not_differentiated_again(branch):
    """The second would be biased without a word; the series themselves give it."""
    x = inputs(2).requires_grad_()
    for estimator in (PowerSeries(3), Exact()):
        (gradient,) = torch.autograd.grad(estimator(branch, x)[1].value.sum(), x, create_graph=True)
        assert torch.autograd.grad(gradient.square().sum(), x)[0].abs().sum() > 0
    with pytest.raises(RuntimeError, match="cannot be differentiated again without bias. Remedy: PowerSeries"):
        torch.autograd.grad(NeumannGradient()(branch, x)[1].value.sum(), x, create_graph=True)


def test_probes_have_their_distributions():
    """tr(J) = vᵀJv of one probe in one dimension: J itself for ±1, and J times a χ² variable for normal ones."""
    x = torch.randn(20_000, 1, dtype=torch.float64)
    signs, normal = (PowerSeries(1, probe=probe)(lambda x: 0.5 * x, x)[1].value for probe in ("rademacher", "gaussian"))
    assert (signs == 0.5).all()
    assert float(normal.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(normal.std()) == pytest.approx(0.5 * math.sqrt(2), rel=0.05)


def test_low_precision_sums_in_float32():
    """4096 products of 1/256 each, which bfloat16 would round to 3 digits."""
    x = torch.randn(3, 4097, dtype=torch.bfloat16)
    _, log_det = PowerSeries(1)(lambda x: x / 256, x)
    torch.testing.assert_close(log_det.value, torch.full((3,), 4097 / 256), rtol=1e-6, atol=0)


ROULETTES = (
    RussianRoulette(),
    RussianRoulette(0, continuation=0.9, n_probes=2),
    NeumannGradient(),
    NeumannGradient(RussianRoulette(continuation=0.9)),
)
TRUNCATED = (PowerSeries(3), NeumannGradient(PowerSeries(3)))


@pytest.mark.parametrize("lipschitz", [None, math.nan, -0.5, 1.0, 1.5, math.inf])
@pytest.mark.parametrize("estimator", [*ROULETTES, *TRUNCATED], ids=repr)
@pytest.mark.parametrize("graph", [False, True])
def test_no_bound_without_a_proof(estimator, lipschitz, graph):
    """The series of g(x) = −1.2x diverges."""
    with torch.set_grad_enabled(graph):
        _, log_det = estimator(lambda x: -1.2 * x, inputs(2), lipschitz=lipschitz, assumed=0.9)
    assert math.isnan(log_det.bias_bound)
    if estimator in ROULETTES:
        assert log_det.finite_variance is (False if lipschitz in (1.0, 1.5, math.inf) else None)
    else:  # finitely many terms
        assert log_det.finite_variance is True


@pytest.mark.parametrize("graph", [False, True])
def test_bounds_with_a_proof(graph):
    for lipschitz in (0.0, 0.9, math.nextafter(1, 0)):
        for estimator in (*ROULETTES, *TRUNCATED):
            with torch.set_grad_enabled(graph):
                bound = estimator(lambda x, factor=lipschitz: factor * x, inputs(2), lipschitz=lipschitz)[1].bias_bound
            assert 0 < bound < math.inf if estimator in TRUNCATED and lipschitz else bound == 0


def test_exact_needs_no_proof():
    for lipschitz in (None, math.nan, 1.5):
        x = inputs(2)
        _, log_det = Exact()(lambda x: -1.2 * x, x, lipschitz=lipschitz)
        torch.testing.assert_close(log_det.value, torch.full((2,), DIMENSIONS * math.log(0.2), dtype=torch.float64))
        assert log_det.bias_bound == 0
        assert log_det.finite_variance is True


def test_sums_prove_what_all_parts_prove():
    """In either order; a result that says nothing of its bias claims nothing."""
    value = torch.zeros(2)
    exact, unknown = LogDet.exactly(value), LogDet(value, value)
    assert math.isnan(unknown.bias_bound)
    assert unknown.finite_variance is None
    for total in (exact.plus(unknown), unknown.plus(exact), unknown.plus(unknown)):
        assert math.isnan(total.bias_bound)
        assert total.finite_variance is None
    total = exact.plus(LogDet(value, value, 0.25, True)).plus(LogDet(value, value, 0.5, False))
    assert total.bias_bound == 0.75
    assert total.finite_variance is False


@pytest.mark.parametrize("estimator", [*ROULETTES, *TRUNCATED, Exact()], ids=repr)
def test_a_chain_is_proven_where_all_its_blocks_are(estimator):
    """One block that does not contract takes the bound from the chain."""
    chain = irf.nn.InvertibleSequential(
        irf.nn.InvertibleResidualBlock(irf.nn.LipschitzMLP(DIMENSIONS)),
        irf.nn.ActNorm(DIMENSIONS),
        irf.nn.InvertibleResidualBlock(torch.nn.Linear(DIMENSIONS, DIMENSIONS)),
    ).double()
    chain(inputs(8))
    linear = chain.eval()[2].g
    exact = isinstance(estimator, Exact)
    for scale, proven in ((1.2, False), (0.5, True)):
        with torch.no_grad():
            linear.weight.copy_(scale * torch.eye(DIMENSIONS))
        assert irf.certify(chain).guaranteed is proven
        bound = chain.estimate_log_det(inputs(2), estimator)[1].bias_bound
        if not proven and not exact:
            assert math.isnan(bound)
        else:
            assert 0 < bound < math.inf if estimator in TRUNCATED else bound == 0
    assert exact or math.isnan(chain.train().estimate_log_det(inputs(2), estimator)[1].bias_bound)


@pytest.mark.parametrize("estimator", [Exact(), PowerSeries(3), NeumannGradient()], ids=repr)
def test_leaves_no_gradients_behind(branch, estimator):
    x = inputs(2).requires_grad_()
    with torch.no_grad():
        image, log_det = estimator(branch, x)
    assert not image.requires_grad
    assert not log_det.value.requires_grad
    assert x.grad is None
    assert all(p.grad is None for p in branch.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PowerSeries(0), "n_terms must be an int of at least 1, got 0"),
        (lambda: PowerSeries(n_probes=0), "n_probes must be an int of at least 1"),
        (lambda: PowerSeries(probe="poisson"), "probe must be one of 'rademacher', 'gaussian', got 'poisson'"),
        (lambda: RussianRoulette(-1), "n_exact must be an int of at least 0"),
        (lambda: RussianRoulette(continuation=1.0), r"a probability in \(0, 1\), got 1.0"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_branch_that_changes_the_shape():
    with pytest.raises(ValueError, match=r"maps shape \(2, 3\) to \(2, 2\)"):
        PowerSeries()(lambda x: x[:, :2], torch.randn(2, 3))
    with pytest.raises(TypeError, match="series must be a PowerSeries or a RussianRoulette"):
        NeumannGradient(Exact())
