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
    for shape in ((1, 1), (3, 7), (2, 1025), (2, 3, 33, 31), (600, 5)):
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
    signature = dict.fromkeys(("y", "image", "x", "following"), pointer)
    signature |= {"partial": "*fp64" if element == "fp64" else "*fp32", "numel": "i32", "chunk": "i32"}
    signature |= dict.fromkeys(("SPLITS", "BLOCK", "ACCUMULATE"), "constexpr")
    blocks, chosen = configurations()
    # Splits only scale an address; the ends of their range stand for all.
    for splits in (1, 64):
        for block, num_warps in {(block, num_warps) for _, block, num_warps in chosen}:
            constants = {"SPLITS": splits, "BLOCK": block, "ACCUMULATE": accumulate}
            used = compile_ahead(fixed_point_update_kernel, architecture, signature, constants, num_warps=num_warps)
            assert used.stack == 0
            assert used.shared <= SHARED_MEMORY[architecture]
    assert {block for _, block, _ in chosen} == set(blocks)
