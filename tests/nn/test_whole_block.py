"""Which branches are inverted whole, and that the result says so, whatever the module looks like."""

import contextlib
import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import iresnet_fast as irf
from benchmarks.blocks import saturated
from iresnet_fast.nn import ACTIVATIONS, InvertibleResidualBlock, LipschitzMLP
from tests.helpers import same_state, state_of

WHOLE = "mlp_inverse"


def block_of(branch, dtype=torch.float64):
    return saturated(InvertibleResidualBlock(branch).to(torch.get_default_device(), dtype).eval())


def mlp(*hidden, **options):
    return LipschitzMLP(4, hidden or (8, 8), **options)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("hidden", [(8,), (6, 10), (4, 4, 4)])
def test_paths_agree(activation, hidden):
    block = block_of(mlp(*hidden, activation=activation))
    irf.enforce(block)
    with torch.no_grad():
        x = torch.randn(30, 4, dtype=torch.float64)
        y = block(x)
        results = {path: block.solve_inverse(y, path=path, tol=1e-11) for path in ("auto", "fused", "general")}
    assert [result.path for result in results.values()] == [WHOLE, WHOLE, "general"]
    assert results["general"].reason == "it was asked for"
    assert "a chain of 4" in results["auto"].reason
    for result in results.values():
        assert result.certified.all()
        assert ((result.x - x).norm(dim=1) <= result.error_bound).all()
        assert result.lipschitz == results["general"].lipschitz


@pytest.mark.parametrize(
    ("branch", "y", "reason"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.GELU()), (2, 4), "it has a GELU"),
        (nn.Sequential(nn.ReLU(), nn.ELU(), nn.Linear(4, 4)), (2, 4), "two activations in a row"),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)), (2, 4), "works in place"),
        (nn.Sequential(Doubled(4, 4)), (2, 4), "it has a Doubled"),
        (nn.Tanh(), (2, 4), "it has no layers"),
        (nn.Sequential(nn.Conv2d(4, 4, 1)), (2, 4, 3, 3), r"kernels are \[\(1, 1\)\]"),
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 4)), (2, 4), "it has a Flatten"),
        (nn.Linear(4, 4), (2, 3, 4), r"y has shape \(2, 3, 4\), not \(B, 4\)"),
    ],
)
def test_other_branches_take_the_general_path(branch, y, reason):
    block = InvertibleResidualBlock(branch.to(torch.get_default_device())).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.mul_(0.3)
        y = torch.randn(y)
        result = block.solve_inverse(y)
        assert result.path == "general"
        assert result.converged.all()
        with pytest.raises(ValueError, match=f"path='fused', but .*{reason}"):
            block.solve_inverse(y, path="fused")


def test_a_plain_chain_of_torch_modules_is_inverted_whole():
    branch = nn.Sequential(
        nn.Softplus(2.0, 30.0), nn.Sequential(nn.Linear(3, 5), nn.ELU(0.5)), nn.Identity(), nn.Linear(5, 3, bias=False)
    )
    block = InvertibleResidualBlock(nn.Sequential(branch, nn.Dropout(0.5))).to(torch.get_default_device()).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.mul_(0.5)
        y = torch.randn(20, 3)
        result = block.solve_inverse(y)
        assert result.path == WHOLE
        torch.testing.assert_close(block(result.x), y, rtol=0, atol=1e-5)


def override(block):
    block.g[0].forward = lambda x: x @ torch.eye(8, 4, dtype=x.dtype).T


@pytest.mark.parametrize(
    "disturb",
    [
        lambda block: block.g[1].register_forward_hook(lambda module, args, output: 0.5 * output),
        lambda block: block.g[2].register_forward_pre_hook(lambda module, args: (0.5 * args[0],)),
        lambda block: block.g.register_forward_hook(lambda module, args, output: 0.5 * output),
        override,
    ],
)
def test_what_is_not_as_its_type_says_is_not_inverted_whole(disturb):
    block = block_of(mlp())
    with torch.no_grad():
        y = torch.randn(5, 4, dtype=torch.float64)
        before = block.solve_inverse(y)
        disturb(block)
        after = block.solve_inverse(y)
        assert (before.path, after.path) == (WHOLE, "general")
        torch.testing.assert_close(block(after.x), y, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda block: block.g[0].parametrizations.weight.original.mul_(-0.5),
        lambda block: block.g[0].parametrizations.weight.original.data.mul_(-0.5),
        lambda block: block.g[4].bias.add_(1),
        lambda block: block.g[1].beta.add_(3),
        lambda block: setattr(block.g, "1", nn.Tanh()),
        lambda block: setattr(block.g, "3", nn.ELU(0.1)),
        lambda block: setattr(block.g[0].parametrizations.weight[0], "coeff", 0.2),
        lambda block: block.float(),
    ],
)
def test_what_was_read_lapses_with_any_change(change):
    """The weights that a first inverse read are not those that a second one uses, where anything is another."""
    block = block_of(mlp())
    with torch.no_grad():
        y = torch.randn(5, 4, dtype=torch.float64)
        block.inverse(y)
        before = block.solve_inverse(y).x
        change(block)
        y = y.to(block.g[4].bias.dtype)
        result = block.solve_inverse(y)
        assert result.path == WHOLE
        torch.testing.assert_close(block(result.x), y, rtol=0, atol=1e-5)
        if y.dtype == torch.float64:
            assert not torch.allclose(result.x, before, atol=1e-3)


def test_a_setting_of_an_activation_counts():
    block = block_of(mlp(activation="elu"))
    y = torch.randn(5, 4, dtype=torch.float64)
    with torch.no_grad():
        block.inverse(y)
        block.g[1].alpha = 0.1
        torch.testing.assert_close(block(block.inverse(y)), y, rtol=0, atol=1e-5)


def test_held_weights_are_those_that_are_inverted():
    """Inside a surrounding cache of parametrizations the weights are the cached ones."""
    block = block_of(mlp())
    y = torch.randn(5, 4, dtype=torch.float64)
    with torch.no_grad():
        block.inverse(y)
        with parametrize.cached():
            block(y)
            block.g[0].parametrizations.weight.original.mul_(0.5)
            torch.testing.assert_close(block(block.inverse(y)), y, rtol=0, atol=1e-5)
        torch.testing.assert_close(block(block.inverse(y)), y, rtol=0, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_no_state_changes(training, grad):
    block = block_of(mlp()).train(training)
    y = torch.randn(5, 4, dtype=torch.float64)
    block(y)
    before = state_of(block)
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            result = block.solve_inverse(y)
            assert result.path == WHOLE
            assert result.x.requires_grad == grad
    assert same_state(block, before)
    with torch.no_grad(), irf.nn.frozen_state(block):
        torch.testing.assert_close(block(result.x), y, rtol=0, atol=1e-5)


def test_copies_and_pickles_do_not_carry_what_was_read():
    block = block_of(mlp())
    y = torch.randn(5, 4, dtype=torch.float64)
    with torch.no_grad():
        empty = len(pickle.dumps(block.state_dict()))
        expected = block.inverse(y)
        twin = copy.deepcopy(block)
        assert len(pickle.dumps(twin.state_dict())) == empty
        assert twin._known is None
        twin.g[4].bias.add_(1)
        torch.testing.assert_close(twin(twin.inverse(y)), y, rtol=0, atol=1e-5)
        assert torch.equal(block.inverse(y), expected)


def test_a_chain_reports_the_path_of_every_block():
    chain = irf.nn.InvertibleSequential(
        InvertibleResidualBlock(mlp()), irf.nn.ActNorm(4), InvertibleResidualBlock(nn.Sequential(nn.Linear(4, 4)))
    )
    chain.append(InvertibleResidualBlock(nn.Sequential(nn.Linear(4, 4), nn.GELU())))
    chain = chain.to(torch.get_default_device())
    with torch.no_grad():
        chain(torch.randn(20, 4))
        for module in (*chain[2].parameters(), *chain[3].parameters()):
            module.mul_(0.5)
        result = chain.eval().solve_inverse(torch.randn(5, 4))
        assert [block.path for block in result.blocks] == [WHOLE, WHOLE, "general"]
        with pytest.raises(ValueError, match="it has a GELU") as caught:
            chain.inverse(torch.randn(5, 4), path="fused")
        assert caught.value.__notes__ == ["in block 3"]


def test_on_a_cpu_bottlenecks_take_the_general_path_and_keep_no_weights():
    block = InvertibleResidualBlock(irf.nn.Bottleneck(4, 6, input_size=(5, 5))).cpu().train()
    block(torch.randn(2, 4, 5, 5, device="cpu"))
    before = state_of(block)
    with torch.no_grad():
        result = block.solve_inverse(torch.randn(2, 4, 5, 5, device="cpu"), tol=1e-4)
    assert (result.path, result.reason) == ("general", "bottleneck_inverse has no kernel for cpu tensors")
    assert block._known[1] == result.reason
    assert same_state(block, before)


@pytest.mark.gpu
def test_bottlenecks_on_a_gpu():
    block = InvertibleResidualBlock(irf.nn.Bottleneck(4, 6, input_size=(5, 7))).cuda().eval()
    irf.enforce(block)
    with torch.no_grad():
        x = torch.randn(9, 4, 5, 7, device="cuda")
        y = block(x)
        fused, general = (block.solve_inverse(y, path=path) for path in ("fused", "general"))
        mixed = block.solve_inverse(y, iterate_in=torch.float16)
    assert (fused.path, mixed.path) == ("bottleneck_inverse", "bottleneck_inverse")
    for result in (fused, mixed):
        assert result.certified.all()
        assert ((result.x - x).flatten(1).norm(dim=1) <= result.error_bound).all()
        torch.testing.assert_close(result.x, general.x, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"its norms are those of inputs of \[\(5, 7\)\]"):
        block.inverse(torch.randn(2, 4, 6, 6, device="cuda"), path="fused")


def test_weights_read_in_inference_mode_serve_outside():
    block = block_of(mlp())
    y = torch.randn(5, 4, dtype=torch.float64)
    with torch.inference_mode():
        expected = block.inverse(y).clone()
    with torch.no_grad():
        torch.testing.assert_close(block.inverse(y), expected)
    assert block.inverse(y.requires_grad_()).requires_grad


def test_a_shared_activation_that_is_used_once_more():
    """The same module at another place: neither the proof nor what was read holds."""
    act = nn.Tanh()
    block = InvertibleResidualBlock(nn.Sequential(nn.Linear(3, 3), act, nn.Linear(3, 3))).eval().double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.mul_(0.8)
        irf.certify(block)
        y = torch.randn(4, 3, dtype=torch.float64)
        block.inverse(y)
        block.g.append(act)
        assert block.proven_lipschitz() is None
        torch.testing.assert_close(block(block.inverse(y)), y, rtol=0, atol=1e-5)


class Scaled(nn.Module):
    """A parametrization with a state that no fingerprint sees."""

    def __init__(self):
        super().__init__()
        self.state = {"scale": 0.5}

    def forward(self, weight):
        return self.state["scale"] * weight


def test_weights_of_unknown_parametrizations_are_read_anew():
    layer = nn.Linear(3, 3, dtype=torch.float64)
    parametrize.register_parametrization(layer, "weight", Scaled())
    block = InvertibleResidualBlock(nn.Sequential(layer)).eval()
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(torch.eye(3))
        y = torch.randn(4, 3, dtype=torch.float64)
        assert block.solve_inverse(y).path == WHOLE
        layer.parametrizations.weight[0].state["scale"] = -0.4
        torch.testing.assert_close(block(block.inverse(y)), y, rtol=0, atol=1e-5)


class Bjorck(nn.Module):
    def forward(self, weight):
        return 1.5 * weight - 0.5 * (weight @ weight.T) @ weight


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_weights_of_low_precision_do_not_last(grad, cached):
    layer = nn.Linear(16, 16, bias=False)
    layer.weight = nn.Parameter(0.5 * torch.linalg.qr(torch.randn(16, 16))[0])
    parametrize.register_parametrization(layer, "weight", Bjorck())
    block = InvertibleResidualBlock(nn.Sequential(layer)).to(torch.get_default_device()).eval()
    y = torch.randn(4, 16)
    with torch.set_grad_enabled(grad), parametrize.cached() if cached else contextlib.nullcontext():
        x = block.solve_inverse(y, iterate_in=torch.bfloat16, lipschitz=0.7).x.detach()
    with torch.no_grad():
        torch.testing.assert_close(block(x), y, rtol=0, atol=1e-5)


def test_global_hooks_and_replaced_methods_take_the_general_path():
    block = block_of(mlp())
    y = torch.randn(4, 4, dtype=torch.float64)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: 0.9 * output)
    try:
        with torch.no_grad():
            assert block.solve_inverse(y).path == "general"
    finally:
        handle.remove()
    conv = nn.Conv2d(2, 2, 3, padding=1)
    conv._conv_forward = lambda x, weight, bias: x
    block = InvertibleResidualBlock(nn.Sequential(conv)).eval()
    assert "_conv_forward of its own" in irf.certify(block).obstacles[0]


def test_fields_of_the_result_have_no_graph():
    block = block_of(mlp())
    irf.enforce(block)
    y = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    for path in ("fused", "general"):
        result = block.solve_inverse(y, path=path)
        assert result.x.requires_grad
        assert not any(part.requires_grad for part in (result.error_bound, result.residual))


def test_unusual_parameters_are_a_reason_not_an_error():
    block = block_of(mlp(activation="lipswish"))
    block.g[1].beta = nn.Parameter(torch.full((8,), 0.5, dtype=torch.float64))
    with torch.no_grad():
        result = block.solve_inverse(torch.randn(4, 4, dtype=torch.float64))
    assert (result.path, result.reason) == ("general", "a LipSwish has 8 parameters")


def test_weights_that_are_no_parameters():
    layer = nn.Linear(3, 3, bias=False)
    del layer.weight
    layer.weight = torch.diag(torch.tensor([0.5, -0.3, 0.1]))
    block = InvertibleResidualBlock(nn.Sequential(layer)).eval()
    y = torch.randn(4, 3)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(block(block.inverse(y)), y, rtol=0, atol=1e-5)
        layer.weight = -layer.weight


def test_an_unknown_path():
    with pytest.raises(ValueError, match="path must be one of 'auto', 'general', 'fused', got 'fast'"):
        block_of(mlp()).inverse(torch.randn(2, 4, dtype=torch.float64), path="fast")


def test_without_the_extension_the_general_path_serves(monkeypatch):
    block = block_of(mlp())
    y = torch.randn(5, 4, dtype=torch.float64)
    with torch.no_grad():
        expected = block.inverse(y)
        monkeypatch.setenv("IRESNET_FAST_BACKEND", "reference")
        result = block.solve_inverse(y)
    assert (result.path, result.reason) == ("general", "IRESNET_FAST_BACKEND=reference")
    torch.testing.assert_close(result.x, expected, rtol=0, atol=1e-5)


def test_autocast_takes_the_general_path():
    block = block_of(mlp(), torch.float32)
    with torch.no_grad(), torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        result = block.solve_inverse(torch.randn(3, 4), tol=1e-2)
    assert result.path == "general"
    assert result.reason == "g is evaluated as PyTorch does in autocast to bfloat16"


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("path", ["auto", "general"])
def test_iterating_in_low_precision_first(low, path):
    """The last evaluations are of the block's own precision: the same x, certified as ever, and named."""
    block = block_of(mlp(), torch.float32)
    irf.enforce(block)
    with torch.no_grad():
        x = torch.randn(30, 4)
        y = block(x)
        plain = block.solve_inverse(y, path=path)
        mixed = block.solve_inverse(y, path=path, iterate_in=low)
        coarse = block.solve_inverse(y, path=path, iterate_in=low, tol=1e-2)
    assert mixed.certified.all()
    assert ((mixed.x - x).norm(dim=1) <= mixed.error_bound).all()
    assert mixed.precision == f"float32, after {str(low).removeprefix('torch.')}"
    assert mixed.path == plain.path
    assert (mixed.evaluations > plain.evaluations.min()).all()
    assert coarse.precision == "float32"
    with pytest.raises(ValueError, match="iterate_in must be torch.float16, torch.bfloat16 or None, got torch.int8"):
        block.inverse(y, iterate_in=torch.int8)


def test_low_precision_that_overflows_starts_again():
    """A branch whose values exceed float16's: nothing is lost."""
    block = InvertibleResidualBlock(nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))).eval()
    block = block.to(torch.get_default_device())
    with torch.no_grad():
        block.g[0].weight.copy_(1e6 * torch.eye(2))
        block.g[1].weight.copy_(0.5e-6 * torch.eye(2))
        y = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
        result = block.solve_inverse(y, iterate_in=torch.float16)
    torch.testing.assert_close(result.x, y / 1.5, rtol=1e-5, atol=1e-6)
