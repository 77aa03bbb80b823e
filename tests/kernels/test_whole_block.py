"""The whole-block kernels without a GPU: values in the interpreter, resources of every configuration there is."""

import pytest

from tests.kernels.conftest import SHARED_MEMORY, require_triton

COMMON = """
import json, torch
from iresnet_fast.reference.branches import ACTIVATIONS, chain
torch.manual_seed(0)
results = []

def check(name, launch, shapes, activations, y, circular=(), options=((True, True, False),)):
    weights = [torch.randn(shape) for shape in shapes]
    taps = [weight.flatten(2) if weight.dim() > 2 else weight[..., None] for weight in weights]
    norms = [torch.linalg.matrix_norm(part, 2, dim=(0, 1)).sum() for part in taps]
    weights = [0.9 * weight / norm for weight, norm in zip(weights, norms)]
    biases = [torch.randn(len(weight)) for weight in weights]
    biases[0] = None
    numbers = {"elu": (0.7, 0.0), "softplus": (2.0, 6.0), "lipswish": (1.3, 0.0)}
    parameters = torch.tensor([numbers.get(activation, (0.0, 0.0)) for activation in activations])
    codes = [ACTIVATIONS.index(activation) for activation in activations]
    L = 0.9 ** len(weights)

    def residual(x):
        doubles = [None if bias is None else bias.double() for bias in biases]
        image = chain(x.double(), [w.double() for w in weights], doubles, activations, parameters.double(), *circular)
        return (x.double() + image - y.double()).flatten(1).norm(dim=1) / y.double().flatten(1).norm(dim=1).clamp_min(1)

    for proven, mixing, low in options:
        rule = (1e-2 if low else 1e-6, L if proven else -1.0, 0, 20, mixing)
        found = launch(y, y, weights, biases, codes, parameters, *circular, *rule, low=low)
        x, _, iterations, evaluations, converged = found
        assert x.is_contiguous() and x.shape == y.shape
        results.append(
            {
                "name": name,
                "low": low,
                "residual": residual(x).tolist(),
                "converged": converged.tolist(),
                "steps": iterations.tolist(),
                "evaluations": evaluations.tolist(),
            }
        )

OPTIONS = [(proven, mixing, low) for proven in (True, False) for mixing in (True, False) for low in (True, False)]
"""

PERCEPTRONS = """
from iresnet_fast.kernels.mlp_inverse import launch_mlp_inverse
y = torch.randn(5, 6) * torch.logspace(-1, 1, 5)[:, None]
y[3, 1] = float("nan")
for activations in [("identity", "lipswish", "elu", "identity"), ("maxmin", "softplus", "maxmin", "maxmin")]:
    check(activations, launch_mlp_inverse, ((34, 6), (18, 34), (6, 18)), activations, y)
print(json.dumps(results))
"""

MORE_PERCEPTRONS = """
from iresnet_fast.kernels.mlp_inverse import launch_mlp_inverse
y = torch.randn(35, 70)
y[3, 1] = float("nan")
for name in ACTIVATIONS:
    check(name, launch_mlp_inverse, ((6, 70), (70, 6)), (name, name, "identity"), y)
check("one layer", launch_mlp_inverse, ((70, 70),), ("tanh", "elu"), y, options=OPTIONS)
print(json.dumps(results))
"""

BOTTLENECKS = """
from iresnet_fast.kernels.bottleneck_inverse import launch_bottleneck_inverse
y = torch.randn(3, 4, 5, 7) * torch.logspace(-1, 1, 3)[:, None, None, None]
y[1, 2, 3, 1] = float("nan")
shapes = ((6, 4, 3, 3), (34, 6, 1, 1), (4, 34, 3, 3))
check("zeros", launch_bottleneck_inverse, shapes, ("elu", "elu", "relu", "identity"), y, (False,))
print(json.dumps(results))
"""

MORE_BOTTLENECKS = """
from iresnet_fast.kernels.bottleneck_inverse import launch_bottleneck_inverse
y = torch.randn(2, 34, 3, 4)
y[1, 2, 1, 1] = float("nan")
shapes = ((6, 34, 3, 3), (10, 6, 1, 1), (34, 10, 3, 3))
for activations in [("maxmin",) * 4, ("identity", "lipswish", "softplus", "relu")]:
    check(activations, launch_bottleneck_inverse, shapes, activations, y, (False,))
check("circular", launch_bottleneck_inverse, shapes, ("elu",) * 4, y, (True,))
one = torch.randn(2, 34, 1, 1)
check("one pixel", launch_bottleneck_inverse, shapes, ("tanh",) * 4, one, (True,), OPTIONS)
print(json.dumps(results))
"""


def judge(results, broken):
    for result in results:
        for sample, (residual, converged) in enumerate(zip(result["residual"], result["converged"], strict=True)):
            assert converged == (sample != broken or "one pixel" in result["name"]), result
            if converged:
                assert residual <= (2e-2 if result["low"] else 2e-6), result
        assert all(a <= b for a, b in zip(result["steps"], result["evaluations"], strict=True))


@pytest.mark.parametrize(
    ("program", "count", "broken"),
    [
        (PERCEPTRONS, 2, 3),
        pytest.param(BOTTLENECKS, 1, 1, marks=pytest.mark.full),
        pytest.param(MORE_PERCEPTRONS, 15, 3, marks=pytest.mark.full),
        pytest.param(MORE_BOTTLENECKS, 11, 1, marks=pytest.mark.full),
    ],
    ids=["perceptrons", "bottlenecks", "more perceptrons", "more bottlenecks"],
)
def test_in_the_interpreter(interpret, program, count, broken):
    results = interpret(COMMON + program)
    assert len(results) == count
    judge(results, broken)


@pytest.mark.full
@pytest.mark.parametrize("architecture", SHARED_MEMORY)
@pytest.mark.parametrize("name", ["mlp", "bottleneck"])
def test_compiles_without_spills(compile_ahead, architecture, name):
    """Every kernel that dispatch can launch: there is one tile, and all sizes and activations are arguments."""
    require_triton()
    import importlib

    from iresnet_fast.kernels.tiles import LAUNCH, TILE

    kernel = getattr(importlib.import_module(f"iresnet_fast.kernels.{name}_inverse"), f"{name}_inverse_kernel")
    kinds = dict.fromkeys(("y", "x0", "weights", "biases", "parameters", "workspace", "x_out", "residual_out"), "*fp32")
    kinds |= dict.fromkeys(("table", "flags"), "*i32") | dict.fromkeys(("iterations_out", "evaluations_out"), "*i64")
    kinds |= {"converged_out": "*i8"} | dict.fromkeys(
        ("tol", "lipschitz", "factor", "gap", "log_lipschitz", "rounding"), "fp32"
    )
    free = {"PROVEN", "MIXING", "LOW"}
    assert {kernel.arg_names[index] for index in kernel.constexprs} == {*TILE, *free}
    for proven in (True, False):
        for mixing in (True, False):
            for low in (True, False):
                constants = {**TILE, "PROVEN": proven, "MIXING": mixing, "LOW": low}
                signature = {
                    argument: kinds.get(argument, "constexpr" if argument in constants else "i32")
                    for argument in kernel.arg_names
                }
                for aligned in (False, True) if mixing else (False,):
                    used = compile_ahead(kernel, architecture, signature, constants, aligned=aligned, **LAUNCH)
                    assert used.stack == 0, (proven, mixing, low, aligned)
                    assert used.shared <= SHARED_MEMORY[architecture]
