"""Ray, where a pipeline of one's own uses it already."""

import pyarrow.parquet as pq
import pytest

import iresnet_fast as irf
from benchmarks.jobs import results
from iresnet_fast import scale
from tests.scale.conftest import tensors

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.full, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def connected():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", "0" * 64)
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


class Invert:
    """As the documents show it."""

    def __init__(self, folder):
        self.model = irf.models.load_pretrained(folder)
        irf.certify(self.model)

    def __call__(self, table):
        return scale.invert_table(self.model, table)


def test_a_pipeline_of_ones_own(connected, network, latents, pairs, tmp_path):
    network.save_pretrained(tmp_path / "net")
    found = ray.data.read_parquet(str(latents)).map_batches(
        Invert, fn_constructor_args=(str(tmp_path / "net"),), batch_format="pyarrow", batch_size=128, concurrency=1
    )
    found.write_parquet(str(tmp_path / "out"))
    table = pq.read_table(tmp_path / "out").sort_by("residual")
    assert sorted(table.column("id").to_pylist()) == sorted(f"sample {row}" for row in range(600))
    rows = [int(name.split()[1]) for name in table.column("id").to_pylist()]
    assert (tensors(table.column("x")) - pairs[0][rows]).abs().max() < 1e-5
    assert all(table.column("certified").to_pylist())


def test_a_job_leaves_rays_connection_as_it_was(connected, network, latents, tmp_path):
    network.save_pretrained(tmp_path / "net")
    folder = str(tmp_path / "net")
    plan = scale.make_plan(network, scale.Operation("invert"), [str(latents / "*.parquet")], shard_rows=64)
    outcome = scale.run_with_ray(lambda: irf.models.load_pretrained(folder), plan, tmp_path / "out", workers=1)
    assert outcome.counts["rows"] == 600
    assert ray.is_initialized()
    assert results(tmp_path / "out").num_rows == 600
    assert scale.verify(tmp_path / "out") == []
