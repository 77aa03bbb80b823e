"""One grouped update for a whole model: the same numbers, and nothing else changed."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import iresnet_fast as irf
from iresnet_fast.nn import SpectralNorm, is_fused, weights
from iresnet_fast.reference.power_iteration import estimate
from tests.helpers import dense_norm, same_state, small_classifier, state_of
from tests.tolerances import GROUPED


def counted(monkeypatch):
    """How often layers iterate on their own."""
    calls = []
    original = SpectralNorm._iterate
    monkeypatch.setattr(SpectralNorm, "_iterate", lambda self, *args: calls.append(self) or original(self, *args))
    return calls


def models(n=1, **overrides):
    """An unfused and a fused copy of one model, and an input."""
    plain = small_classifier(n_power_iterations=n, **overrides).train()
    irf.unfuse(plain.trunk)
    fused = copy.deepcopy(plain)
    irf.fuse(fused)
    channels, height, width = plain.config.in_shape
    return plain, fused, torch.randn(5, channels, height, width)


@pytest.mark.parametrize("n", [1, 3])
def test_the_numbers_of_the_unfused_model(n, monkeypatch):
    plain, fused, x = models(n)
    plain, fused, x = plain.double(), fused.double(), x.double()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (plain, fused)]
    for _ in range(5):
        losses = []
        for model, optimizer in zip((plain, fused), optimizers, strict=True):
            optimizer.zero_grad()
            losses.append(model(x).square().mean())
            losses[-1].backward()
            optimizer.step()
        torch.testing.assert_close(*losses)
    for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    calls = counted(monkeypatch)
    fused(x)
    assert not calls
    plain(x)
    assert calls


@pytest.mark.full
def test_sigma_follows_the_float64_sequence_over_200_steps():
    """Every layer's σ, from the same weights, to 1e-5."""
    _, fused, x = models()
    norms = [part for part in fused.modules() if isinstance(part, SpectralNorm)]
    originals = [p.original for m in fused.modules() for p in getattr(m, "parametrizations", {}).values()]
    exact = copy.deepcopy(fused).double()
    exact_norms = [part for part in exact.modules() if isinstance(part, SpectralNorm)]
    exact_originals = [p.original for m in exact.modules() for p in getattr(m, "parametrizations", {}).values()]
    optimizer = torch.optim.SGD(fused.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        fused(x).square().mean().backward()
        with torch.no_grad():
            for norm, other, weight, wide in zip(norms, exact_norms, originals, exact_originals, strict=True):
                wide.copy_(weight)
                other(wide)
                sigma = estimate(weight, norm._u, norm._v, norm.geometry)
                reference = estimate(wide, other._u, other._v, other.geometry)
                assert abs(float(sigma / reference) - 1) <= GROUPED
        optimizer.step()


def test_nothing_but_speed_changes():
    plain, fused, x = models()
    assert plain.state_dict().keys() == fused.state_dict().keys()
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in fused.named_parameters()]
    plain.load_state_dict(fused.state_dict())
    assert torch.equal(plain.eval()(x), fused.eval()(x))
    assert repr(plain) == repr(fused)


def test_our_models_are_fused(monkeypatch):
    model = small_classifier().train()
    assert is_fused(model.trunk)
    calls = counted(monkeypatch)
    model(torch.randn(4, 1, 8, 8))
    model.features(torch.randn(4, 1, 8, 8))
    assert not calls


def test_fusing_twice_and_unfusing():
    model = nn.Sequential(irf.nn.SpectralLinear(3, 3), nn.Sequential(irf.nn.SpectralLinear(3, 3)))
    assert irf.fuse(irf.fuse(model)) is model
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
    irf.fuse(model[1])  # a part of a fused model: the whole's update serves it
    before = state_of(model)
    model(torch.randn(2, 3))
    assert not same_state(model, before)
    irf.unfuse(model)
    assert not is_fused(model)
    assert is_fused(model[1])
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == len(model._forward_hooks_always_called) == 0
    with pytest.raises(TypeError, match="fuse takes a module, got str"):
        irf.fuse("model")


def test_a_fused_part_of_a_fused_model_is_updated_once():
    model = nn.Sequential(irf.nn.SpectralLinear(3, 3), nn.Sequential(irf.nn.SpectralLinear(3, 3))).double().train()
    plain = copy.deepcopy(model)
    irf.fuse(model)
    irf.fuse(model[1])
    x = torch.randn(2, 3, dtype=torch.float64)
    for either in (model, plain):
        either(x)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)


def test_a_part_called_alone_and_an_error_in_the_middle(monkeypatch):
    model = irf.fuse(nn.Sequential(irf.nn.SpectralLinear(3, 3), nn.Linear(4, 4))).train()
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.randn(2, 3))
    calls = counted(monkeypatch)
    model[0](torch.randn(2, 3))
    assert len(calls) == 1
    assert weights._frame() is None


class SideBySide(nn.Module):
    """Layers that each take the input, in a dtype of their own."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        return [layer(x.to(layer.bias.dtype)) for layer in self.layers]


class Interrupt(nn.Module):
    def forward(self, x):
        raise KeyboardInterrupt


def test_an_interrupted_forward_leaves_no_stale_weight():
    """Torch calls no hook after Ctrl-C: what the update lent must serve nobody that it is not right for."""
    block = irf.nn.InvertibleResidualBlock(nn.Sequential(irf.nn.SpectralLinear(3, 3, coeff=3.0)))
    chain = irf.nn.InvertibleSequential(block)
    with torch.no_grad():
        block.g[0].parametrizations.weight.original.mul_(0.1)
    model = irf.fuse(nn.Sequential(chain, Interrupt())).train()
    with pytest.raises(KeyboardInterrupt):
        model(torch.randn(2, 3))
    assert weights._frame() is not None
    with torch.no_grad():
        block.g[0].parametrizations.weight.original.mul_(90)
    assert not irf.certify(chain.eval()).guaranteed
    assert dense_norm(block.g[0]) == pytest.approx(3.0, rel=1e-4)
    chain.train()
    assert float(torch.linalg.matrix_norm(block.g[0].weight.detach(), 2)) > 1
    irf.fuse(chain)(torch.randn(2, 3))
    del model[1]
    model(torch.randn(2, 3))
    assert weights._frame() is None


@pytest.mark.parametrize("nested", [False, True])
def test_the_next_forward_ends_an_interrupted_one(nested):
    inner = model = irf.fuse(nn.Sequential(irf.nn.SpectralLinear(3, 3), Interrupt())).train()
    if nested:
        model = irf.fuse(nn.Sequential(inner)).train()
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            model(torch.randn(2, 3))
    del inner[1]
    model(torch.randn(2, 3))
    assert weights._frame() is None


def test_weights_changed_between_update_and_use():
    model = irf.fuse(nn.Sequential(irf.nn.SpectralLinear(3, 3))).train()
    plain = irf.unfuse(copy.deepcopy(model))

    def change(module, args):
        with torch.no_grad():
            module[0].parametrizations.weight.original.mul_(7)

    x = torch.randn(2, 3)
    for either in (model, plain):
        either.register_forward_pre_hook(change)
    torch.testing.assert_close(model(x), plain(x), rtol=0.2, atol=0.1)


def test_hooks_of_others_are_seen_beside_ours():
    """Whatever number torch gives a hook in either list."""
    chain = irf.fuse(irf.nn.InvertibleSequential(irf.nn.ActNorm(2), irf.nn.ActNorm(2)))
    assert irf.certify(chain.eval()).guaranteed
    after = next(iter(chain._forward_hooks))
    chain._forward_pre_hooks[after] = lambda module, args: (0 * args[0],)
    assert not irf.certify(chain).guaranteed
    changed = irf.nn.InvertibleSequential(irf.nn.ActNorm(2)).eval()
    changed[0].forward = lambda x: 0 * x
    assert not irf.certify(changed).guaranteed


def test_frozen_and_unused_layers():
    model = irf.fuse(nn.Sequential(irf.nn.SpectralLinear(3, 3), irf.nn.SpectralLinear(3, 3))).train()
    model[0].requires_grad_(False)
    assert not model[0](torch.randn(2, 3)).requires_grad
    model(torch.randn(2, 3)).sum().backward()
    assert model[0].parametrizations.weight.original.grad is None

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(irf.nn.SpectralLinear(3, 3) for _ in range(2))

        def forward(self, x):
            return self.layers[0](x)

    first = irf.fuse(First()).train()
    first(torch.randn(2, 3)).sum().backward()
    assert first.layers[1].parametrizations.weight.original.grad is None


def test_foreign_parametrizations_and_a_surrounding_cache():
    other = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    model = irf.fuse(nn.Sequential(other, irf.nn.SpectralLinear(3, 3))).train()
    model(torch.randn(2, 3))
    with parametrize.cached():
        model(torch.randn(2, 3))
        before = state_of(model)
        model(torch.randn(2, 3))
    assert same_state(model, before)


def test_layers_added_and_removed_later(monkeypatch):
    model = irf.fuse(nn.Sequential(irf.nn.SpectralLinear(3, 3))).train()
    model.append(irf.nn.SpectralLinear(3, 3))
    x = torch.randn(2, 3)
    calls = counted(monkeypatch)
    model(x)
    assert not calls
    parametrize.remove_parametrizations(model[0], "weight")
    calls.clear()
    before = state_of(model[0])
    model(x)
    assert not calls
    assert same_state(model[0], before)


def test_copies_are_fused_on_their_own():
    model = irf.fuse(irf.nn.LipschitzMLP(3, (4,))).train()
    x = torch.randn(2, 3)
    twin = copy.deepcopy(model)
    assert is_fused(twin)
    before = state_of(model)
    twin(x)
    assert same_state(model, before)


def test_layers_that_update_themselves(monkeypatch):
    """``tol``, and low precision."""
    layers = [
        irf.nn.SpectralLinear(4, 4, tol=1e-3, n_power_iterations=50),
        irf.nn.SpectralLinear(4, 4).to(torch.bfloat16),
        irf.nn.SpectralLinear(4, 4),
    ]
    model = irf.fuse(SideBySide(layers)).train()
    calls = counted(monkeypatch)
    model(torch.randn(2, 4))
    alone = {id(irf.nn.find_spectral_norm(layer)) for layer in layers[:2]}
    assert {id(norm) for norm in calls} == alone


def test_different_numbers_of_iterations_and_dtypes(monkeypatch):
    layers = [irf.nn.SpectralLinear(4, 4, n_power_iterations=n) for n in (1, 2)] + [
        irf.nn.SpectralLinear(4, 4).double()
    ]

    model = SideBySide(layers).train()
    plain = copy.deepcopy(model)
    calls = counted(monkeypatch)
    irf.fuse(model)(torch.ones(2, 4))
    assert not calls
    plain(torch.ones(2, 4))
    for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value):
    model = irf.fuse(nn.Sequential(irf.nn.SpectralLinear(3, 3), irf.nn.SpectralLinear(3, 2))).train()
    with torch.no_grad():
        model[1].parametrizations.weight.original.fill_(value)
    with pytest.raises(ValueError, match=r"norm of the weight of shape \(2, 3\) is nan|inf"):
        model(torch.randn(2, 3))


def test_recomputation_and_inverse_see_the_fused_weights():
    x = torch.randn(3, 1, 8, 8)
    gradients = []
    for recompute in (None, "inverse"):
        torch.manual_seed(0)
        model = small_classifier(recompute=recompute).double().train()
        model(x.double()).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    z = model.eval().features(x.double())
    before = state_of(model)
    torch.testing.assert_close(model.train().inverse(z.detach(), tol=1e-12), x.double(), rtol=0, atol=1e-8)
    assert same_state(model, before)


def test_accumulation_autocast_and_functional_call():
    plain, fused, x = models()
    for model in (plain, fused):
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            for _ in range(2):
                model(x).float().square().mean().backward()
    for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 0.05 * a.grad.norm()
    parameters = {name: 1.5 * value.detach() for name, value in fused.named_parameters()}
    found = [torch.func.functional_call(model, parameters, (x,)) for model in (plain, fused)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_averaged_weights():
    """An average has u and v of its own, fitted to it when it is evaluated."""
    model = small_classifier().train()
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 1, 8, 8)).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
    assert is_fused(average.module.trunk)
    assert irf.enforce(average.module.eval()).guaranteed


def test_channels_last():
    plain, fused, x = models()
    fused = fused.to(memory_format=torch.channels_last)
    torch.testing.assert_close(fused(x.to(memory_format=torch.channels_last)), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.full
def test_compiled_training_step():
    plain, fused, x = models()
    compiled = torch.compile(fused, fullgraph=True)
    for _ in range(2):
        for model, parameters in ((plain, plain.parameters()), (compiled, fused.parameters())):
            model(x).square().mean().backward()
            with torch.no_grad():
                for parameter in parameters:
                    parameter.sub_(0.1 * parameter.grad)
                    parameter.grad = None
    for a, b in zip(plain.state_dict().values(), fused.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
