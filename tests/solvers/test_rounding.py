"""Running error analysis: the bound holds of every operation, and what has no error model is refused.

The models are those of float64. Here the unit of float32 is put in their place, so that float64 shows the true error.
"""

import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import iresnet_fast as irf
from iresnet_fast.solvers import NoErrorModelError, WatchedFunction, key_of, rounding


@pytest.fixture
def in_float32(monkeypatch):
    monkeypatch.setattr(rounding, "_FLOAT64", torch.float32)
    monkeypatch.setattr(rounding, "UNIT", 1.001 * 2.0**-24)


def perceptron(activation):
    return nn.Sequential(nn.Linear(12, 40), activation, nn.Linear(40, 40), activation, nn.Linear(40, 12))


def convolution(**options):
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, **options), nn.ELU(), nn.Conv2d(8, 3, 1))


def statistics(module):
    """Batch normalization with statistics that are not those it begins with."""
    for _ in range(3):
        module.train()(torch.randn(50, 3, 4, 4) * 2 + 1)
    nn.init.normal_(module.weight)
    nn.init.normal_(module.bias)
    return module.eval()


def scaled_actnorm():
    layer = irf.nn.ActNorm(3)
    nn.init.normal_(layer.bias)
    nn.init.normal_(layer.log_scale)
    return layer.eval()


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(12))

    def forward(self, x):
        return self.function(x, self.weight)


ROWS = {
    **{
        f"perceptron {type(a).__name__}": lambda a=a: perceptron(a)
        for a in (
            nn.ReLU(),
            nn.ELU(1.5),
            nn.Softplus(2.0),
            nn.Tanh(),
            nn.Sigmoid(),
            nn.SiLU(),
            nn.GELU(),
            nn.Mish(),
            nn.Hardswish(),
            nn.LeakyReLU(-2.0),
            nn.Hardtanh(),
            nn.ReLU6(),
            irf.nn.MaxMin(),
        )
    },
    "perceptron LipSwish": lambda: perceptron(irf.nn.LipSwish()),
    "no bias": lambda: nn.Linear(12, 12, bias=False),
    "residual": lambda: Function(lambda x, w: x + 2 * torch.tanh(x) - w),
    "gate": lambda: Function(lambda x, w: x * torch.sigmoid(x * w)),
    "quotient": lambda: Function(lambda x, w: x / (1 + x.square()) + w / 3),
    "of parameters": lambda: Function(lambda x, w: x * w.exp() + F.softplus(w)),
    "exp and log": lambda: Function(lambda x, w: torch.log(2 + torch.sin(x)) + torch.exp(0.3 * x)),
    "root": lambda: Function(lambda x, w: torch.sqrt(1 + x.square()).reciprocal()),
    "parts": lambda: Function(lambda x, w: torch.cat([x[:, 3:], x[:, :3].abs()], 1)),
    "means": lambda: Function(lambda x, w: x - x.mean(1, keepdim=True) + x.sum(1, keepdim=True)),
    "pairs": lambda: Function(lambda x, w: torch.maximum(*x.chunk(2, 1))),
    "power": lambda: Function(lambda x, w: x.clamp(-1, 2) ** 3),
    "in place": lambda: Function(lambda x, w: torch.tanh(x).mul_(2).add_(w).relu_()),
}
IMAGES = {
    **{
        mode: lambda mode=mode: convolution(padding_mode=mode) for mode in ("zeros", "circular", "reflect", "replicate")
    },
    "grouped": lambda: nn.Conv2d(3, 6, 3, groups=3, stride=2, dilation=1),
    "transposed": lambda: nn.ConvTranspose2d(3, 5, 3, stride=2),
    "batch norm": lambda: statistics(nn.BatchNorm2d(3)),
    "actnorm": scaled_actnorm,
    "squeeze": irf.nn.Squeeze,
    "channels last": lambda: nn.Sequential(
        Function(lambda x, w: x.contiguous(memory_format=torch.channels_last)), convolution()
    ),
}


def check(module, x):
    module = module.requires_grad_(False)
    found, bound = WatchedFunction(module, checks=True)(x)
    with torch.no_grad():
        exact = module.double()(x.double())
    error = (found.double() - exact).flatten(1).norm(dim=1)
    assert bound.shape == (len(x),)
    assert (error <= 1.01 * bound).all()  # the bound itself is computed in float32 here
    assert (bound <= 3e-2 * exact.flatten(1).norm(dim=1).clamp_min(1)).all()


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("name", ROWS)
def test_bound_holds_for_rows(name):
    for size in (0.1, 1.0, 10.0):
        check(ROWS[name](), size * torch.randn(12, 12))


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("name", IMAGES)
def test_bound_holds_for_images(name):
    module = IMAGES[name]()
    check(module, torch.randn(3, 3, 4, 4))


@pytest.mark.usefixtures("in_float32")
def test_bound_holds_of_logit():
    check(irf.nn.Logit(), torch.rand(5, 12))


def test_softplus_counts_the_jump_at_its_threshold():
    """PyTorch's softplus is the identity beyond the threshold, log(1 + exp(-threshold)) below what it stands for."""
    x = torch.tensor([[2.0, 2.9, -1.0], [3.1, 50.0, 0.0]], dtype=torch.float64)
    value, bound = WatchedFunction(nn.Softplus(1.0, 3.0))(x)
    error = (value - torch.log1p(x.exp())).norm(dim=1)
    assert (error <= bound).all()
    assert error[1] > 0.04


def test_softplus_of_a_negative_beta():
    x = torch.tensor([[-2.0, -10.5, 3.0]], dtype=torch.float64)
    value, bound = WatchedFunction(nn.Softplus(-2.0, 20.0))(x)
    assert bound > 0
    assert ((value + torch.log1p((-2 * x).exp()) / 2).norm(dim=1) <= bound).all()


def test_proven_norms_make_it_smaller():
    module = perceptron(nn.ReLU()).double().requires_grad_(False)
    norms = {key_of(layer.weight): float(torch.linalg.matrix_norm(layer.weight, 2)) for layer in module[::2]}
    x = torch.randn(5, 12, dtype=torch.float64)
    assert (WatchedFunction(module, norms)(x)[1] < WatchedFunction(module)(x)[1]).all()


OWN = torch.ones(4, dtype=torch.float64)


def elsewhere(call):
    """Its result, from another thread, which is not watched."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


REFUSED = {
    "another dtype": (lambda x: x.float().tanh().double(), "computes in float32, not in float64"),
    "float16 inside": (lambda x: x.half().double(), "computes in float16"),
    "transposed": (lambda x: x.T.contiguous(), "moves samples"),
    "permuted": (lambda x: x.permute(1, 0), "moves samples"),
    "other samples": (lambda x: x.flip(0), "no error model"),
    "rolled": (lambda x: torch.roll(x, 1, 0), "moves samples|no error model|side by side"),
    "sum over samples": (lambda x: x - x.sum(0), "over samples"),
    "mean over samples": (lambda x: x - x.mean(0), "over samples"),
    "reshaped": (lambda x: x.reshape(-1, 2).tanh().reshape(4, 4), "moves samples"),
    "samples as features": (lambda x: x.reshape(1, -1) * 2, "moves samples"),
    "mask": (lambda x: torch.where(x > 0, x, 0 * x), "depends on a comparison"),
    "mask as a factor": (lambda x: (x > 0).double() * x, "depends on a comparison"),
    "rounding": (lambda x: x.round(), "no error model"),
    "chosen": (lambda x: x.gather(1, x.argsort(1)), "no error model|comparison"),
    "product of two": (lambda x: x @ x.T, "moves samples|of two intermediates"),
    "number": (lambda x: x * float(x[0, 0]), "moves samples|makes a Python number"),
    "branch on values": (lambda x: x / 2 if bool((x / 3 > 0).all()) else x / 4, "makes a Python number"),
    "list": (lambda x: torch.tensor(x.tolist(), dtype=x.dtype), "does not own"),
    "numpy": (lambda x: x + torch.from_numpy(x.numpy() / 3), "does not own"),
    "another thread": (lambda x: x + elsewhere(lambda: x / 3), "does not own"),
    "constant of Python": (lambda x: torch.tensor([2.0], dtype=x.dtype) * x, "does not own"),
    "random": (lambda x: x + torch.rand(4, dtype=x.dtype), "no error model"),
    "quotient rounded": (lambda x: torch.div(x, 0.3, rounding_mode="floor"), "rounding_mode"),
    "samples as another axis": (lambda x: x + x.mean(1), "another axis"),
    "own tensor changed": (lambda x: x * OWN.mul_(1.0), "changes a tensor of the function's own"),
    "statistics computed": (
        lambda x: F.batch_norm(x, OWN * 0, OWN * 0 + 1, None, None, False, 0.0, 0.0),
        "computed statistics",
    ),
    "unknown": (torch.special.erf, "no error model"),
    "stacked": (lambda x: torch.cat([x, x]), "side by side"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_error_model_is_refused(name):
    function, message = REFUSED[name]
    with pytest.raises(NoErrorModelError, match=message):
        WatchedFunction(function)(torch.randn(4, 4, dtype=torch.float64))


def test_what_an_operation_in_place_overwrites_is_known_before():
    """The error of h·h grows with h, not with h², and that of a part does not replace that of the whole."""

    def squared(x):
        h = (torch.tanh(x) * 1e-6 + 1e3) - 1e3
        h *= h
        return h

    def part(x):
        h = (x + 1e8) - 1e8
        h[:, :1].mul_(0.0)
        return h

    x = torch.randn(5, 3, dtype=torch.float64)
    pure = WatchedFunction(lambda x: ((torch.tanh(x) * 1e-6 + 1e3) - 1e3).square())(x)[1]
    assert (WatchedFunction(squared)(x)[1] >= 0.5 * pure).all()
    assert (WatchedFunction(part)(x)[1] >= 1e-8).all()


def test_a_part_of_a_weight_has_other_sums_and_norms_than_the_weight():
    weight = torch.zeros(8, 8, dtype=torch.float64)
    weight[1] = 1.0
    x = 1e8 * torch.ones(2, 8, dtype=torch.float64)
    whole = WatchedFunction(lambda x: F.linear(x, weight))(x)[1]
    after = WatchedFunction(lambda x: F.linear(x, weight) + 0 * F.linear(x, weight[:1]))
    before = WatchedFunction(lambda x: 0 * F.linear(x, weight[:1]) + F.linear(x, weight))
    assert (after(x)[1] >= whole).all()
    assert (before(x)[1] >= whole).all()
    proven = {key_of(weight): 1e-6}
    reshaped = WatchedFunction(lambda x: F.linear(x[:, :1] + 1e8, weight.reshape(-1, 1)), proven)(x)[1]
    assert (reshaped >= 1e-8).all()


def test_inference_mode_hides_nothing():
    module = convolution().double().requires_grad_(False)
    with torch.inference_mode():
        x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
        found = WatchedFunction(module)(x)[1]
    assert torch.equal(found, WatchedFunction(module)(x.clone())[1])


def test_tensors_of_partial_functions_methods_and_attributes_are_its_own():
    class Holder:
        def __init__(self):
            self.weight = torch.eye(3, dtype=torch.float64)

        def call(self, x, scale=OWN[:3]):
            return x @ self.weight * scale

    x = torch.randn(2, 3, dtype=torch.float64)
    for function in (Holder().call, functools.partial(Holder.call, Holder())):
        assert (WatchedFunction(function)(x)[1] < 1e-14).all()


def test_no_samples():
    value, bound = WatchedFunction(perceptron(nn.ELU()).double())(torch.zeros(0, 12, dtype=torch.float64))
    assert value.shape == (0, 12)
    assert bound.shape == (0,)
