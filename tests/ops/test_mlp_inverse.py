"""The whole-block inverse of perceptrons: values of every activation and shape, bit for bit whatever the batch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import iresnet_fast as irf
from iresnet_fast.ops.block_inverse import _DEFAULTS
from iresnet_fast.ops.block_inverse import MLP as OP
from iresnet_fast.reference.branches import ACTIVATIONS, activate, chain
from iresnet_fast.reference.fixed_point import iterate_to_tolerance
from tests.tolerances import WHOLE_BLOCK


def reference(y, x0, weights, biases, activations, parameters, **options):
    return iterate_to_tolerance(lambda x: chain(x, weights, biases, activations, parameters), y, x0, **options)


PARAMETERS = {"elu": (0.7, 0.0), "softplus": (2.0, 6.0), "lipswish": (1.3, 0.0)}


def perceptron(widths, activations, dtype=torch.float64, device="cpu", bias=True):
    """Layers of norm 0.9 as the op takes them."""
    weights = [torch.randn(b, a, dtype=torch.float64) for a, b in zip(widths, widths[1:], strict=False)]
    weights = [(0.9 * w / torch.linalg.matrix_norm(w, 2)).to(device, dtype) for w in weights]
    biases = [torch.randn(len(w), dtype=dtype, device=device) if bias else None for w in weights]
    numbers = torch.tensor([PARAMETERS.get(name, (0.0, 0.0)) for name in activations]).to(device, dtype)
    return weights, biases, activations, numbers


def solve(y, branch, **options):
    *layers, numbers = branch
    return irf.ops.mlp_inverse(y, *layers, parameters=numbers, **options)


def check(found, y, branch, dtype):
    """Against x + g(x) = y, evaluated in float64 by the reference."""
    weights, biases, activations, numbers = branch
    exact = [part if part is None else part.double() for part in biases]
    image = chain(found.x.double(), [w.double() for w in weights], exact, activations, numbers.double())
    residual = (found.x.double() + image - y.double()).norm(dim=1) / y.double().norm(dim=1).clamp_min(1)
    assert (residual <= WHOLE_BLOCK[dtype]).all()
    assert found.converged.all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values(device, activation, dtype):
    branch = perceptron((6, 10, 8, 6), (activation, activation, activation, "identity"), dtype, device)
    y = 3 * torch.randn(40, 6, device=device).to(dtype)
    found = solve(y, branch, tol=1e-12 if dtype == torch.float64 else 1e-6)
    check(found, y, branch, dtype)
    assert (found.x.dtype, found.residual.dtype) == (dtype, dtype)


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.integers(0, 60),
    st.integers(0, 1000),
    st.booleans(),
    st.booleans(),
)
def test_any_shape(widths, rows, seed, bias, single):
    torch.manual_seed(seed)
    dtype = torch.float32 if single else torch.float64
    branch = perceptron((*widths, widths[0]), ("elu",) * (len(widths) + 1), dtype, bias=bias)
    y = torch.randn(rows, widths[0]).to(dtype)
    check(solve(y, branch, tol=1e-6), y, branch, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_accuracy_of_activations(device, activation, dtype):
    """g = activation after a layer of zeros but for its bias: y − x shows the activation itself."""
    z = torch.cat([torch.logspace(-8, 2.5, 200), -torch.logspace(-8, 2.5, 200), torch.zeros(2)]).to(device, dtype)
    branch = perceptron((2, 2), ("identity", activation), dtype, device)
    branch[0][0].zero_()
    for pair in z.view(-1, 2)[:: 1 if dtype == torch.float32 else 7]:
        branch[1][0].copy_(pair)
        found = solve(torch.zeros(1, 2, device=device, dtype=dtype), branch, lipschitz=0.0)
        exact = activate(activation, pair.double()[None], branch[3][1].double())
        # Rounding of an exponent is a relative error as large as the exponent.
        rtol = 4 * torch.finfo(dtype).eps * (1 + 2 * float(pair.abs().max()))
        torch.testing.assert_close(-found.x.double(), exact, rtol=rtol, atol=1e-30)


def test_a_row_does_not_depend_on_the_others(device):
    branch = perceptron((5, 17, 5), ("identity", "lipswish", "identity"), torch.float32, device)
    y = torch.randn(301, 5, device=device) * torch.logspace(-3, 3, 301, device=device).unsqueeze(1)
    together = solve(y, branch)
    assert together.iterations.unique().numel() > 1
    order = torch.randperm(301, device=device)
    for found, rows in ((solve(y[order], branch), order), (solve(y[100:117], branch), torch.arange(100, 117))):
        for a, b in zip(found, together, strict=True):
            assert torch.equal(a, b[rows.to(device)])


def test_threads_change_nothing():
    branch = perceptron((8, 32, 8), ("identity", "elu", "identity"), torch.float32)
    y = torch.randn(5000, 8)
    threads = torch.get_num_threads()
    together = solve(y, branch)
    torch.set_num_threads(1)
    try:
        alone = solve(y, branch)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_defaults_are_those_of_the_modules():
    modules = {"elu": torch.nn.ELU(), "softplus": torch.nn.Softplus(), "lipswish": irf.nn.LipSwish()}
    x = 30 * torch.randn(50, 4)
    for name, module in modules.items():
        numbers = torch.tensor(_DEFAULTS[name])
        torch.testing.assert_close(activate(name, x, numbers), module(x).detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(device, dtype):
    """By the reference, to what the dtype resolves."""
    branch = perceptron((4, 8, 4), ("identity", "tanh", "identity"), dtype, device)
    y = torch.randn(6, 4, device=device).to(dtype)
    found = solve(y, branch, tol=0.05)
    assert found.converged.all()
    assert (found.x.dtype, found.residual.dtype) == (dtype, torch.float32)


def test_layouts_and_empty_batch(device):
    branch = perceptron((6, 9, 6), ("identity", "elu", "identity"), torch.float32, device)
    y = torch.randn(6, 11, device=device).T
    expected = solve(y.contiguous(), branch)
    weights = [weight.T.contiguous().T for weight in branch[0]]
    found = solve(y, (weights, *branch[1:]))
    assert torch.equal(found.x, expected.x)
    assert all(len(part) == 0 for part in solve(y[:0], branch))


def test_agrees_with_its_reference(monkeypatch):
    branch = perceptron((6, 9, 6), ("identity", "elu", "identity"))
    y = torch.randn(20, 6, dtype=torch.float64)
    y[3, 2] = torch.nan
    for lipschitz in (0.85, None):
        found = solve(y, branch, lipschitz=lipschitz, method="picard", tol=1e-9)
        exact = reference(y, y, *branch, tol=1e-9, lipschitz=lipschitz, max_iterations=None, patience=20)
        monkeypatch.setenv("IRESNET_FAST_BACKEND", "reference")
        served = solve(y, branch, lipschitz=lipschitz, method="picard", tol=1e-9)
        monkeypatch.delenv("IRESNET_FAST_BACKEND")
        for a, b, c in zip(found, exact, served, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12, equal_nan=True)
            torch.testing.assert_close(b, c, rtol=0, atol=0, equal_nan=True)


def test_opcheck(device):
    weights, biases, activations, numbers = perceptron((4, 6, 4), ("identity", "elu", "maxmin"), torch.float32, device)
    codes = [ACTIVATIONS.index(name) for name in activations]
    y = torch.randn(5, 4, device=device)
    for offsets, start in ((biases, y), ([biases[0], None], torch.zeros_like(y))):
        arguments = (y, start, weights, offsets, codes, numbers, 1e-5, 0.9, 0, 20, True, False)
        torch.library.opcheck(torch.ops.iresnet_fast.mlp_inverse.default, arguments)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_fullgraph_compile(device, backend):
    branch = perceptron((4, 6, 4), ("identity", "elu", "identity"), torch.float32, device)
    y = torch.randn(5, 4, device=device)

    @torch.compile(fullgraph=True, backend=backend)
    def generate(z):
        return 2 * solve(z + 1, branch, lipschitz=0.9).x

    torch.testing.assert_close(generate(y), 2 * solve(y + 1, branch, lipschitz=0.9).x)


def test_self_test(device):
    assert OP.self_test(device) <= OP.self_test_tolerance


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (lambda y, w, b, a: (y.long(), w, b, a), {}, TypeError, "floating point, got torch.int64"),
        (lambda y, w, b, a: (y[0], w, b, a), {}, ValueError, r"\(B, ...\)"),
        (lambda y, w, b, a: (y[..., None], w, b, a), {}, ValueError, r"y must have shape \(B, D\), got \(3, 4, 1\)"),
        (lambda y, w, b, a: (y, [w[0][None], w[1]], b, a), {}, ValueError, r"weight 0 must have shape \(out, in\)"),
        (lambda y, w, b, a: (y[:, :3], w, b, a), {}, ValueError, r"weight 0 must take 3 channels.*got \(6, 4\)"),
        (lambda y, w, b, a: (y, w[:1], b[:1], a[:2]), {}, ValueError, "keeps its channels, but maps 4 to 6"),
        (lambda y, w, b, a: (y, [], [], a[:1]), {}, ValueError, "a branch has layers"),
        (lambda y, w, b, a: (y, w, b[:1], a), {}, ValueError, "a bias or None for each, got 2 and 1"),
        (lambda y, w, b, a: (y, w, [b[0][:5], b[1]], a), {}, ValueError, r"bias 0 must be \(6,\).*got \(5,\)"),
        (lambda y, w, b, a: (y, w, b, a[:2]), {}, ValueError, "2 layers need 3 activations.*got 2"),
        (lambda y, w, b, a: (y, w, b, ["gelu", *a[1:]]), {}, ValueError, "activations must be one of .*got 'gelu'"),
        (lambda y, w, b, a: (y.double(), w, b, a), {}, ValueError, "in torch.float64 on cpu.*got .*torch.float32"),
        (lambda y, w, b, a: (y, w, b, a), {"tol": 1e-9}, ValueError, "the floor is"),
        (lambda y, w, b, a: (y, w, b, a), {"lipschitz": 1.0}, ValueError, r"in \[0, 1\), got 1.0"),
        (lambda y, w, b, a: (y, w, b, a), {"method": "newton"}, ValueError, "'anderson', 'picard', got 'newton'"),
        (lambda y, w, b, a: (y, w, b, a), {"x0": torch.zeros(1, 4)}, ValueError, "x0 must match y"),
        (lambda y, w, b, a: (y, w, b, a), {"parameters": torch.zeros(2, 2)}, ValueError, r"\(3, 2\), two of each"),
    ],
)
def test_bad_input(change, options, error, message):
    weights, biases, activations, _ = perceptron((4, 6, 4), ("identity", "elu", "identity"), torch.float32)
    with pytest.raises(error, match=message):
        irf.ops.mlp_inverse(*change(torch.randn(3, 4), weights, biases, list(activations)), **options)


def test_odd_channels_under_maxmin():
    weights, biases, _, _ = perceptron((3, 5, 3), ("identity",) * 3, torch.float32)
    for place, width in enumerate((3, 5, 3)):
        activations = ["identity"] * 3
        activations[place] = "maxmin"
        with pytest.raises(ValueError, match=f"got {width} in activation {place}"):
            irf.ops.mlp_inverse(torch.randn(2, 3), weights, biases, activations)
