"""The float64 finish of a perceptron in C++ is that of its operations one by one."""

import math

import pytest
import torch
from torch import nn

import iresnet_fast as irf
from iresnet_fast.nn.residual.exact import ExactPerceptron, exact_branch
from iresnet_fast.ops.mlp_finish import finishes, mlp_finish
from iresnet_fast.solvers import ExactBranch

pytestmark = pytest.mark.skipif(not finishes(torch.device("cpu")), reason="needs the compiled extension")
ACTIVATIONS = ["relu", "elu", "softplus", "lipswish", "maxmin", "tanh"]


def certified_block(activation, d, before):
    """Layers and activations; one before the first, too, where that is asked for."""
    branch = irf.nn.LipschitzMLP(d, (16, 12), activation=activation, coeff=0.97)
    block = irf.nn.InvertibleResidualBlock(nn.Sequential(branch[1], *branch) if before else branch).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.mul_(3)
    irf.enforce(block)
    return block


def problem(activation="elu", n=33, d=5, before=False):
    """A branch, y and x near the solution, in float64."""
    block = certified_block(activation, d, before)
    x = 3 * torch.randn(n, d, dtype=torch.float64)
    with torch.no_grad():
        y = block(x.float()).double()
    lipschitz, branch = block.exact_branch(y)
    assert isinstance(branch, ExactPerceptron)
    return branch, y, x, lipschitz


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("before", [False, True])
def test_agrees_with_the_operations_one_by_one(activation, before):
    branch, y, x, lipschitz = problem(activation, d=6, before=before)
    found, expected = branch.measure(y, x, lipschitz), ExactBranch.measure(branch, y, x, lipschitz)
    torch.testing.assert_close(found.residual, expected.residual, rtol=1e-9, atol=1e-14)
    if activation in ("maxmin", "lipswish"):  # several operations there
        assert (found.rounding <= 1.2 * expected.rounding).all()
        assert (found.rounding >= 0.03 * expected.rounding).all()
    else:  # the same formulas, and the same constants in C++ and Python
        torch.testing.assert_close(found.rounding, expected.rounding, rtol=1e-9, atol=0)
    goal = torch.full((33,), 1e-10, dtype=torch.float64)
    found, expected = branch.finish(y, x, lipschitz, goal), ExactBranch.finish(branch, y, x, lipschitz, goal)
    torch.testing.assert_close(found.x, expected.x, rtol=0, atol=2e-10)
    assert ((found.evaluations - expected.evaluations).abs() <= 1).all()
    assert (found.error_bound <= goal).all()


def test_a_row_does_not_depend_on_the_others():
    branch, y, x, lipschitz = problem(n=50)
    y[7], x[9] = math.nan, math.inf
    goal = torch.full((50,), 1e-11, dtype=torch.float64)
    whole = branch.finish(y, x, lipschitz, goal)
    alone = [branch.finish(y[i : i + 1], x[i : i + 1], lipschitz, goal[:1]) for i in range(50)]
    torch.testing.assert_close(whole.x, torch.cat([part.x for part in alone]), rtol=0, atol=0, equal_nan=True)
    assert not torch.isfinite(whole.error_bound[7])
    assert torch.isfinite(whole.error_bound[[*range(7), 8, *range(10, 50)]]).all()


def test_steps_are_limited_and_the_best_is_kept():
    branch, y, x, lipschitz = problem()
    goal = torch.zeros(33, dtype=torch.float64)
    steps = torch.arange(33) % 4
    found = branch.finish(y, x, lipschitz, goal, steps=steps)
    assert torch.equal(found.evaluations, steps + 1)
    assert (found.error_bound <= branch.measure(y, x, lipschitz).error_bound).all()
    assert torch.equal(found.x[steps == 0], x[steps == 0])
    free = branch.finish(y, x, lipschitz, goal)
    assert (free.error_bound < 1e-11).all()


def test_empty_and_strided_batches():
    branch, y, x, lipschitz = problem()
    goal = torch.full((33,), 1e-10, dtype=torch.float64)
    found = branch.finish(y.T.contiguous().T, x.T.contiguous().T, lipschitz, goal)
    assert torch.equal(found.x, branch.finish(y, x, lipschitz, goal).x)
    assert branch.finish(y[:0], x[:0], lipschitz, goal[:0]).x.shape == (0, 5)


def arguments(**changes):
    given = {
        "y": torch.randn(4, 3, dtype=torch.float64),
        "x0": torch.randn(4, 3, dtype=torch.float64),
        "weights": [0.1 * torch.eye(3, dtype=torch.float64)],
        "biases": [None],
        "activations": ["identity", "identity"],
        "parameters": torch.zeros(2, 2, dtype=torch.float64),
        "norms": [0.1],
        "sums": [0.1],
        "lipschitz": 0.1,
        "goal": torch.zeros(4, dtype=torch.float64),
        "patience": 6,
    }
    return {**given, **changes}


@pytest.mark.parametrize(
    "changes",
    [
        {"y": torch.randn(4, 3)},
        {"x0": torch.randn(4, 2, dtype=torch.float64)},
        {"goal": torch.zeros(3, dtype=torch.float64)},
        {"goal": torch.zeros(4)},
        {"steps": torch.zeros(4)},
        {"steps": torch.zeros(5, dtype=torch.int64)},
        {"norms": []},
        {"sums": [0.1, 0.1]},
        {"weights": [torch.eye(2, dtype=torch.float64)]},
        {"weights": [torch.eye(3)]},
        {"biases": []},
        {"biases": [torch.zeros(2, dtype=torch.float64)]},
        {"parameters": torch.zeros(1, dtype=torch.float64)},
        {"lipschitz": 1.0},
        {"lipschitz": math.nan},
    ],
)
def test_bad_arguments(changes):
    with pytest.raises(RuntimeError):
        mlp_finish(**arguments(**changes))


def test_opcheck():
    given = arguments()
    positional = [*list(given.values())[:4], [0, 0], *list(given.values())[5:10], None, 6]
    torch.library.opcheck(torch.ops.iresnet_fast.mlp_finish, positional)


def test_only_perceptrons_take_it():
    assert not isinstance(exact_branch(nn.Sequential(nn.Linear(4, 4), nn.GELU()), {}, 4), ExactPerceptron)
    assert not isinstance(exact_branch(nn.Linear(4, 4), {}, None), ExactPerceptron)
    assert isinstance(exact_branch(nn.Linear(4, 4), {}, 4), ExactPerceptron)
