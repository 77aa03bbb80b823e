"""Tables in, tables out: every row is there, whatever becomes of it, and costs no other."""

import numpy as np
import pyarrow as pa
import pytest
import torch

import iresnet_fast as irf
from iresnet_fast import scale
from iresnet_fast.nn.residual.exact import exact_copy
from iresnet_fast.scale.columns import to_column, to_tensor
from tests.helpers import small_classifier
from tests.scale.conftest import table, tensors


def test_invert_table(network, pairs):
    x, z = pairs
    found = scale.invert_table(network, table(list(range(50)), z[:50]), batch_size=16)
    names = ["id", "x", "residual", "error_bound", "iterations", "converged", "certified", "block_certified"]
    names.append("reason")
    assert found.column_names == names
    assert found.column("id").to_pylist() == list(range(50))
    assert found.schema.field("x").type == pa.fixed_shape_tensor(pa.float32(), (1, 8, 8))
    result = network.solve_inverse(z[:16], tol=1e-6)
    assert torch.equal(tensors(found.column("x"))[:16], result.x)
    np.testing.assert_array_equal(found.column("residual").to_numpy()[:16], result.residual.numpy())
    np.testing.assert_array_equal(found.column("error_bound").to_numpy()[:16], result.error_bound.numpy())
    taken = sum(block.iterations for block in result.blocks)
    assert found.column("iterations").to_pylist()[:16] == taken.tolist()
    assert all(found.column("converged").to_pylist())
    assert all(found.column("certified").to_pylist())
    assert all(found.column("block_certified").to_pylist())
    exact = exact_copy(network.trunk).inverse(z[:50].double(), tol=1e-14)
    error = (tensors(found.column("x")).double() - exact).flatten(1).norm(dim=1)
    assert (error <= torch.tensor(found.column("error_bound").to_pylist(), dtype=torch.float64)).all()
    torch.testing.assert_close(tensors(found.column("x")), x[:50], rtol=0, atol=1e-5)


def test_a_sample_that_cannot_be_inverted_is_a_row_and_costs_no_other(network, pairs):
    x, z = pairs[0][:8], pairs[1][:8].clone()
    z[1], z[3], z[5] = float("nan"), 1.0, float("inf")
    given = table(list("abcdefgh"), z)
    storage = given.column("z").combine_chunks().storage
    values = pa.FixedSizeListArray.from_arrays(storage.values, z[0].numel(), mask=pa.array([i == 6 for i in range(8)]))
    missing = given.set_column(1, "z", pa.ExtensionArray.from_storage(given.column("z").type, values))
    found = scale.invert_table(network, missing)
    assert found.column("id").to_pylist() == list("abcdefgh")
    assert found.column("converged").to_pylist() == [row in (0, 2, 4, 7) for row in range(8)]
    reasons = found.column("reason").to_pylist()
    assert [reasons[row] for row in (0, 2, 4, 7)] == [None] * 4
    assert reasons[1] == reasons[5] == "NaN or infinite values"
    assert reasons[3] == "outside the domain or the range of the network"
    assert reasons[6] == "no value of shape (16, 4, 4)"
    good = [0, 2, 4, 7]
    torch.testing.assert_close(tensors(found.column("x"))[good], x[good], rtol=0, atol=1e-5)
    assert np.isnan(found.column("error_bound").to_numpy()[[1, 3, 5, 6]]).all()


def test_a_sample_that_does_not_converge_says_which_block(pairs):
    torch.manual_seed(0)
    model = small_classifier(coeff=None)
    with torch.no_grad():
        blocks = [part for part in model.trunk if isinstance(part, irf.nn.InvertibleResidualBlock)]
        for parameter in blocks[1].g.parameters():
            parameter.mul_(30)
    z = torch.randn(3, *model.latent_shape)
    found = scale.invert_table(model, table([1, 2, 3], z))
    assert found.column("converged").to_pylist() == [False] * 3
    assert all("block 2 of 3 did not reach tol=1e-06 in" in reason for reason in found.column("reason").to_pylist())
    assert not any(found.column("certified").to_pylist())


def test_encode_and_round_trip(network, pairs):
    x, z = pairs[0][:20], pairs[1][:20]
    given = table(list(range(20)), x, "x")
    found = scale.encode(network, given)
    torch.testing.assert_close(tensors(found.column("z")), z, rtol=0, atol=1e-5)
    assert found.column("converged").to_pylist() == [True] * 20
    back = scale.round_trip(network, given)
    assert back.column_names == [
        "id",
        "error",
        "residual",
        "error_bound",
        "iterations",
        "converged",
        "certified",
        "block_certified",
        "reason",
    ]
    error = torch.tensor(back.column("error").to_pylist())
    assert (error > 0).all()
    assert (error <= 1e-5).all()
    assert all(back.column("certified").to_pylist())
    with pytest.raises(ValueError, match="InjectivePad has no log-determinant"):
        scale.encode(network, given, log_det=True)


def test_log_determinants_of_a_flow_are_the_same_again():
    torch.manual_seed(0)
    flow = irf.models.IResNetFlow.from_config(
        {"in_shape": (4,), "fc_blocks": 2, "fc_hidden": (8,), "estimator": "roulette"}
    )
    flow.train()
    flow.log_prob(torch.randn(64, 4))
    flow.eval()
    x = torch.randn(30, 4)
    found = [scale.encode(flow, table(list(range(30)), x, "x"), log_det=True, seed=seed) for seed in (0, 0, 1)]
    assert found[0].column_names == ["id", "z", "log_det", "log_prob", "converged", "reason"]
    assert found[0].equals(found[1])
    assert not found[0].equals(found[2])
    torch.manual_seed(0)
    with torch.no_grad():
        output = flow(x)
    np.testing.assert_allclose(found[0].column("log_prob").to_numpy(), output.log_prob.numpy(), rtol=1e-5)


def test_data_that_a_flow_refuses_is_found_among_the_others():
    torch.manual_seed(0)
    flow = irf.models.IResNetFlow.from_config("digits-flow", blocks=(1, 1), hidden=(4, 4))
    flow.train()
    flow.log_prob(torch.rand(16, 1, 8, 8))
    flow.eval()
    x = torch.rand(9, 1, 8, 8)
    x[4] = 7.0
    found = scale.encode(flow, table(list(range(9)), x, "x"), log_det=True)
    assert found.column("converged").to_pylist() == [row != 4 for row in range(9)]
    assert "7" in found.column("reason").to_pylist()[4]
    assert np.isnan(found.column("log_prob").to_numpy()[4])


def test_memory_that_runs_out_makes_smaller_batches(network, pairs, monkeypatch):
    solve, sizes = type(network).solve_inverse, []

    def small_only(self, z, **options):
        sizes.append(len(z))
        if len(z) > 5:
            raise torch.OutOfMemoryError("no more")
        return solve(self, z, **options)

    monkeypatch.setattr(type(network), "solve_inverse", small_only)
    evaluator = scale.Evaluator(network, scale.Operation("invert"))
    found = evaluator(table(list(range(18)), pairs[1][:18]))
    assert sizes == [0, 18, 9, 4, 4, 4, 4, 2]
    evaluator(table(list(range(6)), pairs[1][:6]))
    assert sizes[8:] == [4, 2]
    torch.testing.assert_close(tensors(found.column("x")), pairs[0][:18], rtol=0, atol=1e-5)


def test_no_rows(network, pairs):
    empty = table(["a"], pairs[1][:1]).slice(0, 0)
    found = scale.invert_table(network, empty)
    assert found.num_rows == 0
    assert found.schema == scale.invert_table(network, table(["a"], pairs[1][:1])).schema


@pytest.mark.parametrize("chunks", [1, 3])
def test_columns_of_every_kind(chunks):
    values = torch.randn(6, 2, 3, dtype=torch.float64)
    lists = [row.flatten().tolist() for row in values]
    fixed = pa.FixedShapeTensorArray.from_numpy_ndarray(values.numpy())
    for array in (
        fixed,
        pa.array(lists, pa.list_(pa.float64(), 6)),
        pa.array(lists),
        pa.array(lists, pa.large_list(pa.float64())),
    ):
        column = pa.chunked_array([array.slice(start, 6 // chunks) for start in range(0, 6, 6 // chunks)])
        found, present = to_tensor(column, "x", (2, 3))
        assert torch.equal(found, values)
        assert present.all()
    assert torch.equal(tensors(pa.chunked_array([to_column(values[:, ::2])])), values[:, ::2])
    half, _ = to_tensor(pa.chunked_array([pa.FixedShapeTensorArray.from_numpy_ndarray(values.half().numpy())]), "x")
    assert half.dtype == torch.float16
    assert to_column(values.bfloat16()).type.value_type == pa.float32()
    short, present = to_tensor(pa.chunked_array([pa.array([[1.0], [1.0, 2.0], None, [3.0, None]])]), "x", (2,))
    assert present.tolist() == [False, True, False, True]
    assert short[3].isnan().tolist() == [False, True]


def test_what_is_wrong_with_a_table_is_said(network, pairs):
    good = table([1, 2], pairs[1][:2])
    with pytest.raises(ValueError, match="has the columns z, and none is 'id'"):
        scale.invert_table(network, good.drop_columns("id"))
    with pytest.raises(ValueError, match="has the columns id, z, and none is 'latent'"):
        scale.invert_table(network, good, column="latent")
    with pytest.raises(ValueError, match=r"column z has samples of shape \(1, 8, 8\), \(16, 4, 4\) is needed"):
        scale.invert_table(network, table([1, 2], pairs[0][:2]))
    with pytest.raises(TypeError, match="column x has uint8.*images / 255 - 0.5"):
        scale.encode(network, table([1, 2], torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "x"))
    with pytest.raises(TypeError, match="column z is of type int64; fixed-shape tensors"):
        scale.invert_table(network, pa.table({"id": [1], "z": [1]}))
    with pytest.raises(ValueError, match=r"training mode. Remedy: model.eval\(\)"):
        scale.invert_table(small_classifier().train(), good)
    for wrong, match in ((("sample",), "one of invert, encode, round-trip"), (("invert", 0.0), "tol must be positive")):
        with pytest.raises(ValueError, match=match):
            scale.Operation(*wrong)
    with pytest.raises(ValueError, match="log_det is of encode, not of invert"):
        scale.Operation("invert", log_det=True)


def test_any_chain_will_do(pairs):
    torch.manual_seed(0)
    chain = irf.nn.InvertibleSequential(irf.nn.InvertibleResidualBlock(irf.nn.LipschitzMLP(3))).eval()
    irf.certify(chain)
    x = torch.randn(10, 3)
    latents = scale.encode(chain, table(list(range(10)), x, "x"), log_det=True)
    back = scale.invert_table(chain, latents)
    torch.testing.assert_close(tensors(back.column("x")), x, rtol=0, atol=1e-5)
