"""A small network, its latents, and files of them."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import iresnet_fast as irf
from tests.helpers import small_classifier


@pytest.fixture(scope="session")
def network():
    """A certified classifier with injective padding, whose parameters nobody changes."""
    torch.manual_seed(0)
    model = small_classifier(inject=3)
    irf.certify(model)
    return model


@pytest.fixture(scope="session")
def pairs(network):
    """Images (600, 1, 8, 8), and their latents."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(600, 1, 8, 8, generator=generator) / 4
    with torch.no_grad():
        return x, network.features(x)


def table(ids, values, name="z"):
    return pa.table({"id": ids, name: pa.FixedShapeTensorArray.from_numpy_ndarray(values.numpy())})


@pytest.fixture
def latents(tmp_path, pairs):
    """Two files with the latents, with text as ids, in groups of 150 rows."""
    folder = tmp_path / "latents"
    folder.mkdir()
    for part in range(2):
        rows = slice(300 * part, 300 * (part + 1))
        ids = [f"sample {row}" for row in range(rows.start, rows.stop)]
        pq.write_table(table(ids, pairs[1][rows]), folder / f"{part}.parquet", row_group_size=150)
    return folder


def tensors(column):
    return torch.from_numpy(column.combine_chunks().to_numpy_ndarray().copy())
