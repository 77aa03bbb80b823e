"""What is proven, what is refused, and that a proof lapses with what it was a proof of."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import iresnet_fast as irf
from iresnet_fast.certificate import lipschitz
from iresnet_fast.nn import InvertibleResidualBlock, InvertibleSequential, LipschitzMLP, find_spectral_norm
from tests.helpers import dense_norm, small_classifier
from tests.numerics import default_device  # noqa: F401  (every test here runs on each device)
from tests.tolerances import ENFORCED, NORM_ROUNDING


@pytest.fixture
def registry():
    saved = dict(lipschitz.REGISTRY)
    yield
    lipschitz.REGISTRY.clear()
    lipschitz.REGISTRY.update(saved)


def block_of(*layers):
    return InvertibleResidualBlock(nn.Sequential(*layers)).eval()


def oversized(model, factor=3.0):
    """A model in training whose normalized weights exceed coeff, as one power iteration a step can leave them."""
    for module in model.modules():
        norm = find_spectral_norm(module)
        if norm is not None:
            original = module.parametrizations.weight.original
            with torch.no_grad():
                original.mul_(factor)
                norm._u.copy_(torch.randn_like(norm._u) / norm._u.numel() ** 0.5)
    return model.train()


def test_bounds_are_never_below_the_dense_norms(device):
    model = small_classifier().to(device)
    certificate = irf.certify(model)
    layers = {layer.name: layer for block in certificate.blocks for layer in block.layers}
    assert len(layers) == 9
    for name, layer in layers.items():
        exact = dense_norm(model.get_submodule(name))
        assert exact * (1 - NORM_ROUNDING) <= layer.bound <= 1.08 * exact
        assert layer.coeff == 0.9
    for block in certificate.blocks:
        assert block.lipschitz == pytest.approx(math.prod(layer.bound for layer in block.layers))


def test_network_bound_holds(device):
    model = small_classifier().to(device).double()
    certificate = irf.enforce(model)
    assert certificate.guaranteed
    x = torch.randn(64, 1, 8, 8, dtype=torch.float64, device=device)
    y = x + 1e-3 * torch.randn_like(x)
    stretch = (model.features(x) - model.features(y)).flatten(1).norm(dim=1) / (x - y).flatten(1).norm(dim=1)
    assert stretch.max() <= certificate.lipschitz
    assert 1 / stretch.min() <= certificate.inverse_lipschitz


def test_enforce_brings_every_norm_below_coeff():
    model = oversized(small_classifier())
    assert not irf.certify(model).guaranteed
    assert irf.enforce(model).guaranteed
    for module in model.modules():
        if find_spectral_norm(module):
            assert dense_norm(module) <= 0.9 * (1 + ENFORCED)
    again = {name: value.clone() for name, value in model.state_dict().items()}
    irf.enforce(model)
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_certificate_of_a_trained_step_can_say_no_and_names_the_remedy():
    certificate = irf.certify(oversized(small_classifier()))
    assert not certificate.guaranteed
    assert certificate.inverse_lipschitz is None
    assert "not below 1. Remedy: spectral_norm with a smaller coeff, or enforce(model)" in certificate.obstacles[0]


def test_proof_reaches_the_inverse():
    model = small_classifier()
    with torch.no_grad():
        z = model.features(torch.randn(4, 1, 8, 8))
    assert not model.solve_inverse(z).certified.any()
    irf.enforce(model)
    with torch.no_grad():
        z = model.features(torch.randn(4, 1, 8, 8))
    assert model.solve_inverse(z).certified.all()


@pytest.mark.parametrize("how", ["in place", "data", "load", "buffer", "train", "replace"])
def test_proof_lapses_when_anything_changes(how):
    block = InvertibleResidualBlock(LipschitzMLP(3, (4,))).eval()
    irf.certify(block)
    assert block.proven_lipschitz() is not None
    linear = block.g[0]
    original = linear.parametrizations.weight.original
    if how == "in place":
        with torch.no_grad():
            original.add_(1)
    elif how == "data":
        original.data.add_(1)
    elif how == "load":
        block.load_state_dict({name: 2 * value for name, value in block.state_dict().items()})
    elif how == "buffer":
        find_spectral_norm(linear)._u.mul_(0.5)
    elif how == "train":
        block.train()
    else:
        block.g[1] = nn.SiLU()
    assert block.proven_lipschitz() is None


def test_proof_outlives_evaluation():
    """Neither a forward nor an inverse may make a fresh proof lapse, also right after training."""
    model = small_classifier().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(8, 1, 8, 8)).square().sum().backward()
    optimizer.step()
    model.eval()
    irf.certify(model)
    with torch.no_grad():
        z = model.features(torch.randn(2, 1, 8, 8))
    model.inverse(z, on_failure="return")
    blocks = [part for part in model.trunk if isinstance(part, InvertibleResidualBlock)]
    assert all((block.proven_lipschitz() is None) == (block._proof[0] >= 1) for block in blocks)


def test_unknown_module_is_not_proven(registry):
    class Halve(nn.Module):
        def forward(self, x):
            return x / 2

    block = block_of(irf.nn.SpectralLinear(3, 3), Halve())
    certificate = irf.certify(block)
    assert not certificate.guaranteed
    assert (
        "g.1: not proven: Halve states no Lipschitz constant. Remedy: irf.register_lipschitz(Halve, fn)"
        in (certificate.obstacles[0])
    )
    irf.register_lipschitz(Halve, lambda module: 0.5)
    assert irf.certify(block).guaranteed

    class Other(Halve):
        def forward(self, x):
            return 9 * x

    assert not irf.certify(block_of(Other())).guaranteed


def test_activations_steeper_than_one():
    block = block_of(
        irf.nn.SpectralLinear(8, 8, coeff=0.99), nn.SiLU(), irf.nn.SpectralLinear(8, 8, coeff=0.99), nn.SiLU()
    )
    with torch.no_grad():
        for index in (0, 2):
            block.g[index].parametrizations.weight.original.mul_(10)
    certificate = irf.enforce(block)
    assert certificate.blocks[0].lipschitz == pytest.approx(1.21 * 0.99**2, rel=1e-3)
    assert not certificate.guaranteed


def test_fault_13_dropout_counts_in_training_mode():
    block = InvertibleResidualBlock(nn.Sequential(irf.nn.SpectralLinear(3, 3), nn.Dropout(0.5)))
    evaluated = irf.certify(block.eval()).blocks[0].lipschitz
    trained = irf.certify(block.train()).blocks[0].lipschitz
    assert trained == pytest.approx(2 * evaluated)


def test_batch_norm():
    norm = nn.BatchNorm1d(3)
    norm(5 * torch.randn(64, 3))
    block = block_of(nn.Linear(3, 3), norm)
    bound = irf.certify(block).blocks[0].lipschitz
    x, y = torch.randn(2, 500, 3)
    assert ((block.g(x) - block.g(y)).norm(dim=1) <= bound * (x - y).norm(dim=1) * 1.0001).all()
    assert "batch statistics" in irf.certify(block.train()).obstacles[0]


def test_hooks_make_it_unproven():
    linear = irf.nn.SpectralLinear(3, 3)
    linear.register_forward_hook(lambda module, inputs, output: 5 * output)
    assert "forward hook" in irf.certify(block_of(linear)).obstacles[0]


def test_plain_convolutions_are_bounded_at_any_size():
    conv = nn.Conv2d(2, 2, 3, padding=1)
    bound = irf.certify(block_of(conv)).blocks[0].lipschitz
    assert bound == pytest.approx(float(irf.conv_norm_bound(conv.weight, None, padding=1).detach()))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_every_padding_mode_is_bounded(mode):
    conv = nn.Conv2d(2, 2, 3, padding=1, padding_mode=mode)
    bound = irf.certify(block_of(conv)).blocks[0].lipschitz
    expected = irf.conv_norm_bound(conv.weight.detach(), None, padding=1, padding_mode=mode)
    assert bound == pytest.approx(float(expected))


def test_foreign_link_in_a_chain_is_not_proven():
    class Negate(nn.Module):
        def forward(self, x):
            return -x

        inverse = forward

    chain = InvertibleSequential(Negate(), InvertibleResidualBlock(LipschitzMLP(2)))
    certificate = irf.certify(chain)
    assert not certificate.guaranteed
    assert "Negate is not an irf.nn.Bijection" in certificate.obstacles[0]


def linear(scale, d=2):
    layer = nn.Linear(d, d, bias=False)
    with torch.no_grad():
        layer.weight.copy_(scale * torch.eye(d))
    return layer


def test_modules_used_twice_count_twice():
    steep, flat, silu = linear(1.5), linear(0.6), nn.SiLU()
    assert irf.certify(block_of(steep, flat, steep)).blocks[0].lipschitz == pytest.approx(1.35)
    assert irf.certify(block_of(linear(0.9), silu, linear(0.95), silu)).blocks[0].lipschitz == pytest.approx(
        1.21 * 0.855
    )
    block = block_of(linear(0.5))
    assert irf.certify(InvertibleSequential(block, block)).lipschitz == pytest.approx(2.25)


def test_branches_that_work_in_place_are_refused():
    block = block_of(nn.ReLU(inplace=True), linear(0.5))
    assert "it works in place" in irf.certify(block).obstacles[0]
    with pytest.raises(ValueError, match="in place.*inplace=False"):
        block(torch.randn(3, 2))
    y = torch.randn(3, 2)
    kept = y.clone()
    with pytest.raises(ValueError, match="in place.*inplace=False"):
        block.inverse(y)
    assert torch.equal(y, kept)


def test_subclasses_and_hooks_of_links_are_not_trusted():
    class Minus(InvertibleResidualBlock):
        def forward(self, x):
            return x - 2 * self.g(x)

    certificate = irf.certify(Minus(linear(0.6)))
    assert not certificate.guaranteed
    assert "Minus has a forward or inverse of its own" in certificate.obstacles[0]
    block = block_of(linear(0.5))
    block.register_forward_hook(lambda module, inputs, output: 0 * output)
    assert "forward hook" in irf.certify(block).obstacles[0]


def test_what_stands_outside_the_chains_is_named():
    block = block_of(linear(0.5))
    certificate = irf.certify(nn.Sequential(block, nn.ReLU(), linear(100), block))
    assert certificate.scope == ("0", "3")
    assert certificate.lipschitz is None
    assert "Judged: 0, 3" in certificate.to_markdown()
    assert irf.certify(small_classifier()).scope == ("trunk",)


@pytest.mark.parametrize("how", ["coeff", "slope", "hook", "permuted data", "negated data"])
def test_proof_lapses_with_settings_and_hidden_writes(how):
    block = block_of(irf.nn.SpectralLinear(3, 3, coeff=0.5), nn.LeakyReLU(0.1), linear(0.9, 3))
    irf.certify(block)
    assert block.proven_lipschitz() is not None
    if how == "coeff":
        find_spectral_norm(block.g[0]).coeff = 0.95
    elif how == "slope":
        block.g[1].negative_slope = 5
    elif how == "hook":
        block.g[2].register_forward_hook(lambda module, inputs, output: 5 * output)
    elif how == "permuted data":
        row = torch.zeros(3, 3)
        row[0] = 0.9
        block.g[2].weight.data.copy_(row)
    else:
        block.g[2].weight.data.neg_()
    assert block.proven_lipschitz() is None


def test_cached_weights_are_not_certified():
    with parametrize.cached(), pytest.raises(RuntimeError, match="cached"):
        irf.certify(block_of(irf.nn.SpectralLinear(3, 3)))


def test_chain_is_certified_only_where_every_link_is_known():
    class Bad(nn.Module):
        def forward(self, x):
            return 2 * x

        def inverse(self, y):
            return y

    block = block_of(linear(0.5))
    irf.certify(block)
    result = InvertibleSequential(Bad(), block).solve_inverse(torch.randn(3, 2))
    assert not result.certified.any()
    assert (result.residual > 0.5).all()
    assert InvertibleSequential(irf.nn.ActNorm(2), block).eval().solve_inverse(torch.randn(3, 2)).certified.all()


def test_a_proof_ends_with_hooks_and_methods_of_the_block():
    block = block_of(linear(0.5))
    x = torch.randn(3, 2)
    for change in (
        lambda: block.register_forward_hook(lambda module, inputs, output: 3 * output),
        lambda: setattr(block, "forward", lambda x: 3 * x),
    ):
        irf.certify(block)
        assert block.proven_lipschitz() is not None
        undo = change()
        assert block.proven_lipschitz() is None
        assert not block.solve_inverse(x).certified.any()
        with pytest.raises(RuntimeError, match="forward hooks or a forward of its own"):
            block.forward_and_log_det(x)
        if undo is None:
            del block.forward
        else:
            undo.remove()


def test_a_certificate_that_says_no_withdraws_the_proof():
    block = block_of(linear(0.5), nn.ReLU())
    irf.certify(block)
    hook = block.register_forward_hook(lambda module, inputs, output: 3 * output)
    assert not irf.certify(block).guaranteed
    hook.remove()
    assert block.proven_lipschitz() is None


def test_a_forward_that_is_replaced_for_all_modules_of_a_type(monkeypatch):
    block, fresh = block_of(linear(0.8), nn.ReLU()), block_of(linear(0.8), nn.ReLU())
    irf.certify(block)
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: -1.2 * torch.relu(x))
    assert block.proven_lipschitz() is None
    assert "ReLU.forward has been replaced" in irf.certify(fresh).obstacles[0]
    x = torch.randn(3, 2)
    result = block.solve_inverse(block(x).detach())
    assert result.path == "general"
    torch.testing.assert_close(result.x, x, rtol=0, atol=1e-4)


class Noise(nn.Module):
    def forward(self, weight):
        return weight * torch.bernoulli(torch.full_like(weight, 0.5))


class Rounding(torch.Tensor):
    """As quantized weights: the module's type does not tell what it computes."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs or {})


def test_weights_that_may_be_anything_are_not_proven():
    layer = linear(0.5)
    parametrize.register_parametrization(layer, "weight", Noise())
    assert "parametrization Noise" in irf.certify(block_of(layer)).obstacles[0]
    layer = linear(0.5)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Rounding), requires_grad=False)
    assert "Rounding" in irf.certify(block_of(layer)).obstacles[0]
    assert irf.certify(block_of(nn.utils.parametrizations.orthogonal(nn.Linear(2, 2)), linear(0.5))).guaranteed


def broken(module, name, value):
    tensor = getattr(module, name)
    if isinstance(tensor, torch.Tensor):
        tensor.data.fill_(value)
    else:
        setattr(module, name, value)
    return module


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (lambda: nn.BatchNorm1d(2), "running_mean", math.nan),
        (lambda: nn.BatchNorm1d(2), "running_var", math.inf),
        (lambda: nn.BatchNorm1d(2), "running_var", -1.0),
        (lambda: nn.BatchNorm1d(2), "weight", math.nan),
        (lambda: nn.BatchNorm1d(2), "bias", math.inf),
        (irf.nn.LipSwish, "beta", math.nan),
        (irf.nn.LipSwish, "beta", math.inf),
        (nn.ELU, "alpha", math.nan),
        (nn.LeakyReLU, "negative_slope", math.nan),
        (nn.Hardtanh, "min_val", math.nan),
    ],
)
def test_numbers_that_are_not_finite_prove_nothing(make, name, value):
    assert not irf.certify(block_of(linear(0.5), broken(make(), name, value))).guaranteed


def test_backward_hooks_have_no_log_determinant():
    block = block_of(linear(0.5), nn.ELU(), linear(0.5))
    block.g[1].register_full_backward_hook(lambda module, grads, _: tuple(0.1 * part for part in grads))
    with pytest.raises(RuntimeError, match="ELU has backward hooks"):
        block.forward_and_log_det(torch.randn(3, 2))


def test_enforce_refuses_before_it_rescales():
    layer = irf.nn.spectral_norm(nn.Linear(4, 4), 0.9)
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(100)
    before = layer.parametrizations.weight.original.clone()
    with pytest.raises(ValueError, match="contains no invertible module"):
        irf.enforce(nn.Sequential(layer))
    assert torch.equal(layer.parametrizations.weight.original, before)


class Doubled(irf.nn.Bijection):
    """A bijection of a user's own, with its constants."""

    def forward(self, x):
        return 2 * x

    def inverse(self, y, **options):
        return y / 2

    def lipschitz(self):
        return 2.0, 0.5


class Stretched(Doubled):
    def forward(self, x):
        return 200 * x


def test_a_bijection_states_its_own_constants():
    block = block_of(linear(0.5))
    certificate = irf.certify(InvertibleSequential(Doubled(), block))
    assert certificate.guaranteed
    assert certificate.lipschitz == pytest.approx(2 * (1 + certificate.blocks[0].lipschitz))
    x = torch.randn(3, 2)
    result = InvertibleSequential(Doubled(), block).solve_inverse(2 * x + block.g(2 * x))
    assert result.certified.all()
    assert ((result.x - x).norm(dim=1) <= result.error_bound).all()


def test_constants_of_a_base_class_do_not_cover_another_forward():
    block = block_of(linear(0.5))
    irf.certify(block)
    certificate = irf.certify(InvertibleSequential(Stretched(), block))
    assert "Stretched has a forward or inverse of its own" in certificate.obstacles[0]
    assert not InvertibleSequential(Stretched(), block).solve_inverse(torch.randn(3, 2)).certified.any()


def test_actnorm_beyond_the_dtype_is_not_proven():
    for values in ([800.0, 0.0], [-110.0, 0.0], [float("nan"), 0.0]):
        norm = irf.nn.ActNorm(2).eval()
        with torch.no_grad():
            norm.log_scale.copy_(torch.tensor(values))
        assert "no finite constant" in irf.certify(InvertibleSequential(norm, block_of(linear(0.5)))).obstacles[0]


def test_jumping_softplus_is_not_proven():
    assert not irf.certify(block_of(nn.Softplus(threshold=0.0))).guaranteed
    assert irf.certify(block_of(nn.Softplus(), linear(0.5))).guaranteed


def test_enforce_knows_the_resolution_of_the_dtype():
    branch = LipschitzMLP(32, (32, 32, 32), coeff=0.9).to(torch.bfloat16)
    for layer in branch:
        if find_spectral_norm(layer):
            with torch.no_grad():
                layer.parametrizations.weight.original.mul_(5)
    certificate = irf.enforce(InvertibleResidualBlock(branch).eval())
    assert all(layer.bound <= 0.9 for layer in certificate.blocks[0].layers)


def test_enforce_refuses_what_it_cannot_rescale():
    layer = irf.nn.SpectralLinear(3, 3)
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    with pytest.raises(ValueError, match="other parametrizations"):
        irf.enforce(block_of(layer))


def test_certifying_changes_no_training_state():
    model = small_classifier().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    irf.certify(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_reports():
    certificate = irf.enforce(small_classifier())
    text = certificate.to_markdown()
    assert "**Guaranteed inverse: yes**" in text
    assert f"| trunk.1 | {certificate.blocks[0].lipschitz:.6g} | proven |" in text
    assert text.count("| Conv2d |") == 9
    data = json.loads(json.dumps(certificate.to_dict()))
    assert data["guaranteed"] is True
    assert data["blocks"][0]["layers"][0]["coeff"] == 0.9


def test_bad_input(registry):
    with pytest.raises(ValueError, match="contains no invertible module"):
        irf.certify(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="nn.Module, got int"):
        irf.certify(3)
    with pytest.raises(TypeError, match="nn.Module, got int"):
        irf.enforce(3)
    with pytest.raises(TypeError, match="subclass of torch.nn.Module"):
        irf.register_lipschitz("ReLU", lambda module: 1.0)
    with pytest.raises(TypeError, match="callable"):
        irf.register_lipschitz(nn.ReLU, 1.0)
    irf.register_lipschitz(nn.Hardswish, lambda module: math.nan)
    assert "returned nan" in irf.certify(block_of(nn.Hardswish())).obstacles[0]
    model = small_classifier()
    with torch.no_grad():
        model.trunk[1].g[0].parametrizations.weight.original.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        irf.certify(model)
