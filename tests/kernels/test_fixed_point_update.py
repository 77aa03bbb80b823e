"""The Triton kernel without a GPU: values in the interpreter, resources of every configuration it can choose."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.conftest import SHARED_MEMORY, require_triton
from tests.tolerances import UPDATE

PROGRAM = """
import json, torch
from iresnet_fast.kernels.fixed_point_update import launch_fixed_point_update
from iresnet_fast.reference.fixed_point_update import fixed_point_update
torch.manual_seed(0)
errors = []
for dtype in (torch.float64, torch.float32, torch.float16):
    for shape in ((1, 1), (3, 7), (2, 1025), (2, 3, 33, 31), (60, 5)):
        tensors = [torch.randn(shape).to(dtype) for _ in range(3)]
        following, residual = launch_fixed_point_update(*tensors)
        exact = fixed_point_update(*tensors)
        assert following.dtype == dtype and residual.dtype == exact[1].dtype, (dtype, residual.dtype)
        error = float(((residual - exact[1]).abs() / exact[1]).max())
        errors.append([str(residual.dtype), error, bool(torch.equal(following, exact[0]))])
print(json.dumps(errors))
"""


def test_interpreter_agrees_with_reference(interpret):
    tolerances = {str(dtype): value for dtype, value in UPDATE.items()}
    results = interpret(PROGRAM)
    assert len(results) == 15
    for dtype, error, exact in results:
        assert exact
        assert error <= tolerances[dtype]


def configurations():
    from iresnet_fast.kernels.fixed_point_update import BLOCKS, choose_launch

    plans = {choose_launch(batch, numel) for batch in (1, 7, 100, 4096) for numel in (1, 64, 1024, 16384, 10**6)}
    return BLOCKS, {(plan.splits, plan.block, plan.num_warps) for plan in plans}


@given(st.integers(1, 10**6), st.integers(1, 10**7))
def test_launch_covers_every_element_once(batch, numel):
    require_triton()
    from iresnet_fast.kernels.fixed_point_update import BLOCKS, choose_launch

    plan = choose_launch(batch, numel)
    assert plan.block in BLOCKS
    assert plan.chunk % plan.block == 0
    assert (plan.splits - 1) * plan.chunk < numel <= plan.splits * plan.chunk
    assert 1 <= plan.splits <= 64
    assert plan.num_warps in (2, 8)


@pytest.mark.full
@pytest.mark.parametrize("architecture", SHARED_MEMORY)
@pytest.mark.parametrize("element", ["fp64", "fp32", "fp16", "bf16"])
def test_compiles_without_spills(compile_ahead, architecture, element):
    import triton.language as tl

    from iresnet_fast.kernels.fixed_point_update import fixed_point_update_kernel

    pointer, accumulate = f"*{element}", tl.float64 if element == "fp64" else tl.float32
    sums = "*fp64" if element == "fp64" else "*fp32"
    kinds = {"partial": sums, "partial_along": sums, "numel": "i32", "chunk": "i32"}
    kinds |= dict.fromkeys(("SPLITS", "BLOCK", "ACCUMULATE", "ALONG"), "constexpr")
    signature = {name: kinds.get(name, pointer) for name in fixed_point_update_kernel.arg_names}
    blocks, chosen = configurations()
    # Splits only scale an address; the ends of their range stand for all.
    for splits in (1, 64):
        for block, num_warps in {(block, num_warps) for _, block, num_warps in chosen}:
            for along in (True, False):
                constants = {"SPLITS": splits, "BLOCK": block, "ACCUMULATE": accumulate, "ALONG": along}
                used = compile_ahead(fixed_point_update_kernel, architecture, signature, constants, num_warps=num_warps)
                assert used.stack == 0
                assert used.shared <= SHARED_MEMORY[architecture]
    assert {block for _, block, _ in chosen} == set(blocks)


STEPS = """
import json, torch
from iresnet_fast.kernels.fixed_point_steps import FusedSteps
from iresnet_fast.solvers import invert_residual
torch.manual_seed(0)
first, second = (torch.linalg.qr(torch.randn(8, 8))[0] for _ in range(2))
branches = {
    "smooth": lambda x: 0.9 * torch.tanh(x.flatten(1) @ first.T).view_as(x),
    "kinks": lambda x: (0.6 * torch.abs(x.flatten(1) @ first.T) @ second.T).view_as(x),
}
found = []
for name, g in branches.items():
    for lipschitz in (0.9 if name == "smooth" else 0.6, None):
        for mixing in MIXING:
            y = 5 * torch.randn(SAMPLES, 2, 2, 2)
            y[5, 0, 1, 1] = float("nan")
            y = y.contiguous(memory_format=torch.channels_last)
            rule = {"tol": 1e-5, "lipschitz": lipschitz, "max_iterations": None}
            steps = FusedSteps(y, y.clone(), **rule, patience=20, mixing=mixing)
            seen = []
            while not bool(steps.all_done()):
                steps.advance(g(steps.x))
                seen.append(steps.solution.clone())
            x, residual, iterations, evaluations, converged = steps.results()
            method = "anderson" if mixing else "picard"
            expected = invert_residual(g, y, **rule, method=method, on_failure="return", compact=False)
            good = expected.converged
            early = int(torch.where(good, evaluations, 10**6).argmin())
            found.append({
                "converged": bool((converged == good).all()) and int(good.sum()) == SAMPLES - 1,
                "steps": float((iterations == expected.iterations)[good].float().mean()),
                "evaluations": float((evaluations == expected.evaluations)[good].float().mean()),
                "error": float((x - expected.x)[good].abs().max()),
                "frozen": bool(torch.equal(seen[int(evaluations[early]) - 1][early], x[early])),
                "residual": float(((x + g(x) - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1))[good].max()),
            })
print(json.dumps(found))
"""


@pytest.mark.parametrize(("samples", "mixing"), [(6, (True,)), pytest.param(37, (True, False), marks=pytest.mark.full)])
def test_fused_steps_follow_the_solvers_rule(interpret, samples, mixing):
    """Who stops when, and where: the general solver's iteration in tensors is the definition."""
    results = interpret(f"SAMPLES, MIXING = {samples}, {mixing}" + STEPS)
    assert len(results) == 4 * len(mixing)
    for result in results:
        assert result["converged"]
        assert result["frozen"]
        # Rounding decides close calls.
        assert min(result["steps"], result["evaluations"]) >= 0.75
        assert result["error"] <= 1e-3
        assert result["residual"] <= 1.01e-5


@pytest.mark.full
@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_fused_steps_compile_without_spills(compile_ahead, architecture):
    from iresnet_fast.kernels.fixed_point_steps import _TOGETHER, advance_kernel, decide_kernel
    from iresnet_fast.kernels.fixed_point_update import BLOCKS

    kinds = {"flags": "*i32", "iterations": "*i64", "evaluations": "*i64", "converged": "*i8"}
    kinds |= dict.fromkeys(("lipschitz", "factor", "gap", "log_lipschitz", "rounding"), "fp32")
    kinds |= dict.fromkeys(("places", "splits", "count", "max_iterations", "patience", "numel", "chunk"), "i32")
    _, chosen = configurations()
    launches = {(block, num_warps) for _, block, num_warps in chosen}
    assert {block for block, _ in launches} == set(BLOCKS)
    for proven in (True, False):
        for mixing in (True, False):
            for kernel, size, num_warps in [
                (decide_kernel, {"TOGETHER": _TOGETHER}, 1),
                *((advance_kernel, {"BLOCK": block}, num_warps) for block, num_warps in launches),
            ]:
                constants = {"PROVEN": proven, "MIXING": mixing, **size}
                signature = {
                    name: "constexpr" if name in constants else kinds.get(name, "*fp32") for name in kernel.arg_names
                }
                used = compile_ahead(kernel, architecture, signature, constants, num_warps=num_warps)
                assert used.stack == 0
                assert used.shared <= SHARED_MEMORY[architecture]
