"""Every invertible module's log-determinant against slogdet of its dense float64 Jacobian, through one registry."""

import math

import pytest
import torch
from torch import nn

import iresnet_fast as irf
from benchmarks.blocks import saturated
from iresnet_fast.estimators import Exact, PowerSeries, RussianRoulette
from iresnet_fast.nn import ActNorm, Bottleneck, Center, Flatten, LipschitzMLP, Logit, Split, Squeeze
from tests.helpers import jacobians, same_state, state_of
from tests.tolerances import FLOAT64


def block(branch):
    return irf.nn.InvertibleResidualBlock(saturated(branch), estimator=Exact())


def actnorm(channels):
    layer = ActNorm(channels)
    with torch.no_grad():
        layer.log_scale.normal_()
        layer.bias.normal_()
    layer.mark_initialized()
    return layer


def chain(*parts):
    return irf.nn.InvertibleSequential(*parts)


def multiscale():
    rest = chain(block(Bottleneck(2, 4, input_size=(2, 2))), Flatten((2, 2, 2)), block(LipschitzMLP(8)), actnorm(8))
    return chain(Squeeze(), actnorm(4), Split(rest, (4, 2, 2)))


# name: how to make it, the shape of a sample, whether its input is in [0, 1].
MODULES = {
    "actnorm": (lambda: actnorm(3), (3, 2, 2), False),
    "actnorm of vectors": (lambda: actnorm(3), (3,), False),
    "squeeze": (Squeeze, (1, 4, 2), False),
    "flatten": (lambda: Flatten((2, 3)), (2, 3), False),
    "logit": (Logit, (2, 3), True),
    "logit without margin": (lambda: Logit(0), (5,), True),
    "center": (Center, (2, 3), True),
    "block of vectors": (lambda: block(LipschitzMLP(4, coeff=0.97)), (4,), False),
    "block of images": (lambda: block(Bottleneck(2, 5, input_size=(3, 3))), (2, 3, 3), False),
    "split, last half kept": (
        lambda: Split(chain(Flatten((2, 2)), block(LipschitzMLP(4))), (3, 2), "last"),
        (3, 2),
        False,
    ),
    "split": (lambda: Split(chain(Flatten((2, 2)), block(LipschitzMLP(4))), (3, 2)), (3, 2), False),
    "chain": (multiscale, (1, 4, 4), False),
}


@pytest.fixture(params=MODULES)
def case(request):
    make, shape, bounded = MODULES[request.param]
    module = make().double().eval()
    draw = torch.rand if bounded else torch.randn
    return module, draw(4, *shape, dtype=torch.float64)


def test_registry_has_every_bijection():
    made = {type(part) for make, _, _ in MODULES.values() for part in make().modules()}
    known = {kind for kind in vars(irf.nn).values() if isinstance(kind, type) and issubclass(kind, irf.nn.Bijection)}
    assert known - made == {irf.nn.Bijection, irf.nn.InjectivePad}


def test_forward_and_log_det(case):
    module, x = case
    y, log_det = module.forward_and_log_det(x)
    torch.testing.assert_close(y, module(x))
    expected = torch.linalg.slogdet(jacobians(module, x)).logabsdet
    torch.testing.assert_close(log_det, expected, rtol=1e-10, atol=1e-10)


def test_fault_8_log_det_of_the_inverse(case):
    """Its sign, and that it is taken at x: the dense Jacobian of the inverse itself is the oracle."""
    module, x = case
    y = module(x).detach()
    found, log_det = module.inverse_and_log_det(y)
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)
    expected = torch.linalg.slogdet(jacobians(module.inverse, y)).logabsdet
    torch.testing.assert_close(log_det, expected, rtol=1e-4, atol=1e-4)


def test_gradient_of_log_det(case):
    module, x = case
    parameters = [p for p in module.parameters() if p.requires_grad]

    def value(x, *_):
        return module.forward_and_log_det(x)[1]

    torch.autograd.gradcheck(value, (x[:2].requires_grad_(), *parameters), atol=1e-5, rtol=1e-4, fast_mode=True)


def test_transforms_of_torch_func(case):
    """jvp, jacrev and vmap of every module, against finite differences: a custom op inside would give zeros."""
    module, x = case
    x = x[:2] * 0.9 + 0.05
    tangent = torch.randn_like(x)
    step = 1e-6
    difference = (module(x + step * tangent) - module(x - step * tangent)) / (2 * step)
    with irf.nn.frozen_state(module):
        image, product = torch.func.jvp(module, (x,), (tangent,))
        rows = torch.func.jacrev(module)(x)
        each = torch.func.vmap(lambda one: module(one[None])[0], randomness="error")(x)
    torch.testing.assert_close(product, difference, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rows.flatten(difference.dim()) @ tangent.flatten(), difference, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(each, image, rtol=FLOAT64, atol=FLOAT64)


def test_empty_batch_and_shapes(case):
    module, x = case
    y, log_det = module.forward_and_log_det(x[:0])
    assert len(y) == 0
    assert log_det.shape == (0,)
    y, log_det = module.forward_and_log_det(x.transpose(1, -1).contiguous().transpose(1, -1))
    torch.testing.assert_close(log_det, module.forward_and_log_det(x)[1])


def test_low_precision_sums_in_float32(case):
    module, x = case
    if any(isinstance(part, irf.nn.InvertibleResidualBlock) for part in module.modules()):
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            found = module.float().forward_and_log_det(x.float())[1]
    else:
        found = module.bfloat16().forward_and_log_det(x.bfloat16())[1]
    expected = module.double().forward_and_log_det(x)[1]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0.1, atol=0.1)


def test_chain_adds_what_is_known():
    model = multiscale().double().eval()
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    assert math.isnan(model.estimate_log_det(x, PowerSeries(3))[1].bias_bound)
    certificate = irf.certify(model)
    assert certificate.guaranteed
    _, log_det = model.estimate_log_det(x, PowerSeries(3))
    each = [PowerSeries(3).bias_bound(8, bound.lipschitz) for bound in certificate.blocks]
    assert log_det.bias_bound == pytest.approx(sum(each))
    assert log_det.n_vjps == 6
    _, log_det = model.estimate_log_det(x, RussianRoulette(n_probes=4))
    assert log_det.finite_variance
    assert (log_det.standard_error > 0).all()
    exact = model.estimate_log_det(x)[1].value
    _, many = model.estimate_log_det(x, RussianRoulette(n_probes=1000))
    assert ((many.value - exact).abs() <= 4 * many.standard_error).all()


def test_split_certificate_takes_the_identity_into_account():
    """ActNorm that shrinks inside a split: the part beside it does not shrink."""
    layer = actnorm(4)
    with torch.no_grad():
        layer.log_scale.fill_(-1.0)
    certificate = irf.certify(Split(chain(Flatten((2, 2)), layer), (4, 2)))
    assert certificate.lipschitz == 1
    assert certificate.inverse_lipschitz == pytest.approx(math.e)


def test_solve_inverse_through_a_split_is_certified():
    model = multiscale().eval()
    irf.certify(model)
    x = torch.randn(5, 1, 4, 4)
    seen = []
    result = model.solve_inverse(model(x).detach(), progress=lambda *step: seen.append(step[:2]))
    assert seen == [(1, 2), (2, 2)]
    assert result.certified.all()
    assert ((result.x - x).flatten(1).norm(dim=1) <= result.error_bound).all()


def test_error_bound_of_a_split_counts_what_was_factored_out():
    """An ActNorm whose inverse shrinks errors stands in ``rest`` alone; those of the other half stay."""
    shrinking = actnorm(4)
    with torch.no_grad():
        shrinking.log_scale.fill_(4.0)
    model = chain(Split(chain(Flatten((2, 2)), shrinking), (4, 2)), block(LipschitzMLP(8))).eval()
    irf.certify(model)
    result = model.solve_inverse(torch.randn(5, 8), tol=1e-3)
    assert (result.error_bound >= result.blocks[0].error_bound).all()
    assert (result.error_bound < 1.1 * result.blocks[0].error_bound).all()


def test_methods_and_hooks_of_their_own_are_respected_and_not_certified():
    class Doubled(Split):
        def forward(self, x):
            return 2 * super().forward(x)

        def inverse(self, y, **options):
            return super().inverse(y / 2, **options)

    class Shifted(irf.nn.InvertibleSequential):
        def forward(self, x):
            return super().forward(x) + 1

        def inverse(self, y, **options):
            return super().inverse(y - 1, **options)

    def certified(link):
        model = chain(link, block(LipschitzMLP(6))).eval()
        irf.certify(model)
        x = torch.randn(4, 3, 2)
        result = model.solve_inverse(model(x).detach())
        torch.testing.assert_close(result.x, x, rtol=1e-4, atol=1e-4)
        return bool(result.certified.any())

    rest = chain(Flatten((2, 2)), block(LipschitzMLP(4)))
    assert certified(Split(rest, (3, 2)))
    assert not certified(Doubled(rest, (3, 2)))
    assert not certified(Split(Shifted(*rest), (3, 2)))
    assert not certified(Shifted(Split(rest, (3, 2))))
    hooked = Split(chain(*rest), (3, 2))
    hooked.rest.register_forward_hook(lambda module, args, output: output)
    assert not certified(hooked)
    with pytest.raises(RuntimeError, match=r"module rest \(InvertibleSequential\) has forward hooks"):
        hooked.forward_and_log_det(torch.randn(2, 3, 2))
    with pytest.raises(TypeError, match=r"module rest \(InvertibleFlatten\) has no log-determinant"):
        Split(type("InvertibleFlatten", (nn.Flatten,), {"inverse": None.__class__})(), (3, 2)).forward_and_log_det(
            torch.randn(2, 3, 2)
        )


def test_options_reach_bijections_with_an_inverse_of_their_own():
    seen = []

    class Mine(irf.nn.InvertibleResidualBlock):
        def inverse(self, y, **options):
            seen.append(options)
            return super().inverse(y, **options)

    model = chain(Mine(LipschitzMLP(3)), block(LipschitzMLP(3))).eval()
    steps = []
    model.inverse(torch.randn(4, 3), tol=1e-3, progress=lambda *step: steps.append(step[:2]))
    assert seen == [{"tol": 1e-3}]
    model.solve_inverse(torch.randn(4, 3))
    assert seen[1] == {"on_failure": "return"}
    assert steps == [(1, 1)]


def test_an_average_of_models_keeps_what_actnorm_learned():
    """Its copy has the buffer, and not the flag beside it."""
    layer = ActNorm(2)
    average = torch.optim.swa_utils.AveragedModel(layer)
    layer.train()(torch.randn(50, 2))
    average.update_parameters(layer)
    before = state_of(average.module)
    average.module.train()(100 * torch.randn(50, 2))
    assert same_state(average.module, before)


def test_a_module_that_stands_twice_counts_twice():
    layer = actnorm(3)
    x = torch.randn(4, 3)
    torch.testing.assert_close(
        chain(layer, layer).forward_and_log_det(x)[1], 2 * chain(layer).forward_and_log_det(x)[1]
    )


def test_inverse_and_log_det_change_no_state():
    """In training mode either, where a forward would iterate and initialise."""
    model = chain(ActNorm(3), block(LipschitzMLP(3))).train()
    before = state_of(model)
    y = torch.randn(4, 3)
    x, log_det = model.inverse_and_log_det(y)
    assert same_state(model, before)
    with irf.nn.frozen_state(model):
        torch.testing.assert_close(-model.forward_and_log_det(x)[1], log_det)


def test_what_is_proven_is_not_used_in_training():
    """The weights of the next forward are other weights."""
    model = block(LipschitzMLP(3)).eval()
    irf.certify(model)
    x = torch.randn(4, 3)
    assert model.estimate_log_det(x, PowerSeries(3))[1].bias_bound < math.inf
    irf.certify(model.train())
    assert math.isnan(model.estimate_log_det(x, PowerSeries(3))[1].bias_bound)


@pytest.mark.parametrize("alpha", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_logit_comes_back_from_far_out(alpha, dtype):
    """Where the sigmoid rounds to 0 or 1 the ends of the interval are not reached, which a density would refuse."""
    layer = Logit(alpha)
    x = layer.inverse(torch.tensor([[-1e4, -30.0, 0.0, 30.0, 1e4]], dtype=dtype))
    assert layer.forward_and_log_det(x)[1].isfinite().all()


def test_logit_has_no_lipschitz_constant_on_its_interval():
    certificate = irf.certify(chain(Logit(), block(LipschitzMLP(3))))
    assert certificate.guaranteed
    assert certificate.lipschitz is None
    assert "\nLip(F⁻¹) ≤" in certificate.to_markdown()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_actnorm_initialises_from_large_values(dtype):
    """Whose squares leave the dtype's range."""
    x = torch.randn(256, 3) * torch.tensor([1e4, 1.0, 1e-3]) + torch.tensor([0.0, 5.0, 0.0])
    layer = ActNorm(3).to(dtype).train()
    y = layer(x.to(dtype)).float()
    torch.testing.assert_close(y.mean(0), torch.zeros(3), rtol=0, atol=0.05)
    torch.testing.assert_close(y.std(0), torch.ones(3), rtol=0.03, atol=0)


def test_training_mode_iterates_once_and_defaults_by_size():
    small, large = (irf.nn.InvertibleResidualBlock(LipschitzMLP(size, (8,))).train() for size in (16, 17))
    assert small.estimate_log_det(torch.randn(3, 16))[1].n_vjps == 16
    _, log_det = large.estimate_log_det(torch.randn(3, 17))
    assert log_det.standard_error.isnan().all()
    norm = irf.nn.find_spectral_norm(small.g[0])
    before = norm._u.clone()
    with torch.no_grad():
        small.g[0].parametrizations.weight.original.normal_()
    small.estimate_log_det(torch.randn(3, 16))
    assert not torch.equal(norm._u, before)


def test_no_log_det_where_there_is_none():
    pad = irf.nn.InjectivePad(1)
    with pytest.raises(ValueError, match="no log-determinant: its image fills no volume"):
        chain(pad).forward_and_log_det(torch.randn(2, 3, 4, 4))

    class Shift(nn.Module):
        def forward(self, x):
            return x + 1

        def inverse(self, y):
            return y - 1

    with pytest.raises(TypeError, match=r"module 0 \(Shift\) has no log-determinant. Remedy: a subclass"):
        chain(Shift()).forward_and_log_det(torch.randn(2, 3))
    hooked = actnorm(3)
    hooked.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(RuntimeError, match=r"module 0 \(ActNorm\) has forward hooks"):
        chain(hooked).forward_and_log_det(torch.randn(2, 3))
    dropping = irf.nn.InvertibleResidualBlock(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))).train()
    with pytest.raises(RuntimeError, match="no inverse while 1"):
        dropping.forward_and_log_det(torch.randn(2, 2))


@pytest.mark.parametrize(
    ("make", "x", "message"),
    [
        (
            Logit,
            torch.tensor([[0.5, 1.2]]),
            r"must be in \(-0.0555556, 1.05556\), got values from 0.5 to 1.2. Remedy: scale it",
        ),
        (Logit, torch.tensor([[float("nan")]]), "got NaN"),
        (lambda: Logit(0), torch.tensor([[0.0, 0.5]]), r"must be in \(0, 1\), got values from 0 to 0.5"),
        (lambda: Logit(0.5), None, r"alpha must be in \[0, 0.5\), got 0.5"),
        (lambda: Split(Flatten((1,)), (1,)), None, "a split needs at least two channels"),
        (lambda: Split(Flatten((1,)), (2,), "second"), None, "keep must be one of 'first', 'last', got 'second'"),
        (lambda: Flatten((2, 3)), torch.ones(2, 3, 2), r"Flatten needs \(B, 2, 3\), got \(2, 3, 2\)"),
        (Center, torch.tensor([[0.0, 255.0]]), r"must be in \[0, 1\] or near it, got values from 0 to 255. Remedy"),
        (
            lambda: ActNorm(1).train(),
            torch.tensor([[0.0], [1e300]], dtype=torch.float64),
            r"its values, up to 1e\+300, leave the range of torch.float32. Scale the data",
        ),
        (lambda: ActNorm(3).train(), torch.ones(1, 3), "a single value per channel has no variance"),
    ],
)
def test_bad_input(make, x, message):
    with pytest.raises(ValueError, match=message):
        make()(x)


def test_integers_have_no_density():
    with pytest.raises(TypeError, match="integers have none. Remedy: irf.data.dequantize"):
        Logit()(torch.ones(2, 3, dtype=torch.uint8))
