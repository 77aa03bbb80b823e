"""Jobs from files to folders: whatever happens, every id is there exactly once, or what is missing is said."""

import copy
import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import iresnet_fast as irf
from benchmarks.jobs import results
from iresnet_fast import scale
from iresnet_fast.scale.folder import ResultFolder
from tests.scale.conftest import table, tensors

INVERT = scale.Operation("invert")
SIZES = {"shard_rows": 128, "batch_size": 50}


def plan_of(network, folder, **changes):
    return scale.make_plan(network, INVERT, [str(folder / "*.*")], **{**SIZES, **changes})


@pytest.fixture
def done(network, latents, tmp_path):
    """A job that is done: its plan and its folder."""
    plan = plan_of(network, latents)
    assert not scale.run(network, plan, tmp_path / "out").lost
    return plan, tmp_path / "out"


def same_files(one, other):
    names = sorted(path.name for path in (one / "data").iterdir())
    assert names == sorted(path.name for path in (other / "data").iterdir())
    for name in names:
        assert (one / "data" / name).read_bytes() == (other / "data" / name).read_bytes()


def test_a_job(done, network, pairs):
    plan, out = done
    found = results(out)
    assert found.column("id").to_pylist() == [f"sample {row}" for row in range(600)]
    torch.testing.assert_close(tensors(found.column("x")), pairs[0], rtol=0, atol=1e-5)
    manifest = json.loads((out / "manifest.json").read_text())
    assert {key: manifest[key] for key in ("rows", "converged", "failed", "shards")} == {
        "rows": 600,
        "converged": 600,
        "failed": 0,
        "shards": 6,
    }
    assert manifest["plan"]["dtype"] == "float32"
    assert manifest["plan"]["certificate"]["guaranteed"]
    assert manifest["plan"]["operation"]["tol"] == 1e-6
    assert set(manifest["plan"]["versions"]) == {"iresnet_fast", "torch"}
    assert [entry["rows"] for entry in manifest["files"]] == [128, 128, 44] * 2
    about = json.loads(pq.read_schema(out / "data" / "00000-000000000000.parquet").metadata[b"iresnet_fast"])
    assert about["model"] == plan.model == manifest["plan"]["model"]
    assert pq.read_table(out / "failures.parquet").num_rows == 0
    assert scale.verify(out) == []
    assert scale.Plan.from_dict(json.loads((out / "plan.json").read_text())) == plan


def test_samples_that_fail_are_rows_and_are_listed(network, tmp_path, pairs):
    z = pairs[1].clone()
    z[[3, 599]] = float("nan")
    z[300] = 1.0
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "z.npy", z.numpy())
    outcome = scale.run(network, plan_of(network, tmp_path / "in"), tmp_path / "out")
    assert (outcome.counts["rows"], outcome.counts["failed"]) == (600, 3)
    assert results(tmp_path / "out").column("id").to_pylist() == list(range(600))
    failures = pq.read_table(tmp_path / "out" / "failures.parquet").to_pylist()
    assert [row["id"] for row in failures] == [3, 300, 599]
    assert failures[1]["reason"].startswith("outside the domain")
    assert failures[2]["shard"] == "00000-000000000512"
    assert scale.verify(tmp_path / "out") == []


def test_no_rows(network, tmp_path, pairs):
    np.save(tmp_path / "z.npy", pairs[1][:0].numpy())
    plan = scale.make_plan(network, INVERT, [str(tmp_path / "z.npy")])
    assert scale.run(network, plan, tmp_path / "out").counts["rows"] == 0
    assert scale.verify(tmp_path / "out") == []
    with pytest.raises(ValueError, match="no samples to measure"):
        scale.estimate(network, plan)


def test_it_goes_on_where_it_was_stopped(done, network, tmp_path):
    plan, out = done
    whole = tmp_path / "whole"
    shutil.copytree(out, whole)
    (out / "records" / "00000-000000000128.json").unlink()  # killed between results and record
    (out / "data" / "00001-000000000256.parquet").unlink()
    (out / "data" / ".00001-000000000256.parquet.host.1.part").write_bytes(b"half")
    (out / "manifest.json").unlink()
    made = []
    began = {path.name: path.stat().st_mtime_ns for path in (out / "data").glob("*.parquet")}
    outcome = scale.run(network, plan, out, resume=True, report=made.append)
    assert len(made) == 6
    assert outcome.counts["rows"] == 600
    same_files(out, whole)
    kept = {path.name for path in (out / "data").iterdir() if path.stat().st_mtime_ns == began.get(path.name)}
    assert len(kept) == 4
    assert scale.verify(out) == []


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: data[:99] + bytes([data[99] ^ 1]) + data[100:]]
)
def test_a_damaged_shard_is_found_and_made_again(done, network, tmp_path, damage):
    plan, out = done
    whole = tmp_path / "whole"
    shutil.copytree(out, whole)
    path = out / "data" / "00000-000000000128.parquet"
    path.write_bytes(damage(path.read_bytes()))
    assert scale.verify(out) == [f"{path} is missing or damaged. Remedy: the same command with --resume"]
    scale.run(network, plan, out, resume=True)
    same_files(out, whole)
    assert scale.verify(out) == []


def test_another_job_in_the_folder_is_refused(done, network, latents, tmp_path):
    plan, out = done
    with pytest.raises(FileExistsError, match="has a job's results. Remedy: --resume"):
        scale.run(network, plan, out)
    other = plan_of(network, latents, batch_size=49)
    with pytest.raises(ValueError, match="is another: batch_size was 50, and now is 49. Remedy"):
        scale.run(network, other, out, resume=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years")
    with pytest.raises(FileExistsError, match=r"is not empty: it has thesis.tex"):
        scale.run(network, plan, tmp_path / "full")


def test_inputs_that_changed_are_another_job(done, network, latents, pairs):
    _, out = done
    pq.write_table(table([f"n{row}" for row in range(10)], pairs[1][:10]), latents / "1.parquet")
    assert "1.parquet is not what it was: it had 300 rows" in scale.verify(out)[0]
    with pytest.raises(ValueError, match="is another: .*1.parquet changed"):
        scale.run(network, plan_of(network, latents), out, resume=True)


def test_damage_and_several_processes(done, network, tmp_path):
    """None concludes on a record whose results nobody has read again."""
    plan, out = done
    whole = tmp_path / "whole"
    shutil.copytree(out, whole)
    first, second = (out / "data" / f"00000-{start:012d}.parquet" for start in (0, 128))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-9])
    places = [scale.Place(rank, 2, rank, "job") for rank in range(2)]
    assert scale.run(network, plan, out, resume=True, place=places[1]).counts is None
    assert not (out / "manifest.json").exists()
    assert scale.verify(out)
    assert scale.run(network, plan, out, resume=True, place=places[0]).counts["rows"] == 600
    same_files(out, whole)
    assert scale.verify(out) == []
    shutil.copy(first, out / "data" / "copy.parquet")
    assert scale.verify(out) == [f"{out / 'data' / 'copy.parquet'} is none of the job's files. Remedy: remove it"]


def test_threads_make_no_other_job(latents, tmp_path):
    torch.manual_seed(0)
    model = irf.models.IResNetClassifier.from_config("digits", inject=3, blocks=(1, 2), hidden=(8, 8)).train()
    model(torch.randn(16, 1, 8, 8))
    model.eval()  # its power iterations are not settled
    before = torch.get_num_threads()
    try:
        plans = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            plans.append(plan_of(copy.deepcopy(model), latents))
    finally:
        torch.set_num_threads(before)
    other = replace(plans[1], certificate={**plans[1].certificate, "largest_lipschitz": 0.5})
    assert other.difference(json.loads(json.dumps(plans[0].to_dict()))) is None


def test_killed_before_it_had_begun(network, latents, tmp_path):
    plan, out = plan_of(network, latents), tmp_path / "out"
    out.mkdir()
    (out / ".plan.json.host.1.part").write_text("{")
    (out / ".ids.abc").mkdir()
    (out / ".ids.abc" / "0").write_bytes(b"12345678")
    assert scale.run(network, plan, out).counts["rows"] == 600
    assert not [path.name for path in out.iterdir() if path.name[0] == "."]


def test_ids_that_are_there_twice_stop_it_before_it_begins(network, latents, tmp_path, pairs):
    pq.write_table(table(["new", "sample 7", "sample 7"], pairs[1][:3]), latents / "2.parquet")
    with pytest.raises(scale.InputError, match=r"duplicate ids: 'sample 7' \(3 times\)"):
        scale.run(network, plan_of(network, latents), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["lock"]


def test_files_that_cannot_be_read_are_all_named(network, latents):
    for name in ("0.parquet", "1.parquet"):
        (latents / name).write_bytes((latents / name).read_bytes()[:1000])
    with pytest.raises(scale.InputError, match="0.parquet cannot be read: .*; .*1.parquet cannot be read"):
        plan_of(network, latents)


def test_a_file_that_breaks_later_loses_its_shards_and_no_others(network, latents, tmp_path):
    plan = plan_of(network, latents)
    data = (latents / "0.parquet").read_bytes()

    def stop(found):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scale.run(network, plan, tmp_path / "out", report=stop)
    (latents / "0.parquet").write_bytes(data[: len(data) // 2])
    outcome = scale.run(network, plan, tmp_path / "out", resume=True)
    assert outcome.counts is None
    assert [shard.name for shard in outcome.lost] == [f"00000-{start:012d}" for start in (128, 256)]
    assert "0.parquet cannot be read" in outcome.lost[0].reason
    assert results(tmp_path / "out").num_rows == 428
    assert not (tmp_path / "out" / "manifest.json").exists()
    (latents / "0.parquet").write_bytes(data)
    assert scale.run(network, plan, tmp_path / "out", resume=True).counts["rows"] == 600
    assert scale.verify(tmp_path / "out") == []


def test_processes_share_the_units_and_the_last_concludes(done, network, latents, tmp_path):
    plan, whole = done
    parts = [scale.Place(rank, 3, rank, "job") for rank in range(3)]
    outcomes = [scale.run(network, plan, tmp_path / "parts", place=place) for place in parts]
    assert [outcome.counts is None for outcome in outcomes] == [True, True, False]
    same_files(whole, tmp_path / "parts")
    assert scale.verify(tmp_path / "parts") == []


def test_a_place_is_what_torchrun_says():
    environment = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "2"}
    with pytest.raises(ValueError, match="needs the environment variable TORCHELASTIC_RUN_ID. Remedy: torchrun"):
        scale.Place.of_torchrun(environment)
    place = scale.Place.of_torchrun({**environment, "TORCHELASTIC_RUN_ID": "r"})
    assert (place.rank, place.count, place.local, place.job) == (3, 8, 1, "a:2:r")


def test_shards_that_share_a_large_group_are_read_together(network, latents, tmp_path, pairs):
    (tmp_path / "in").mkdir()
    pq.write_table(table(list(range(600)), pairs[1]), tmp_path / "in" / "a.parquet")
    plan = plan_of(network, tmp_path / "in", shard_rows=20)
    assert [len(unit) for unit in plan.units()] == [7, 7, 7, 7, 2]
    assert [shard for unit in plan.units() for shard in unit] == list(plan.shards())
    folder = tmp_path / "out"
    scale.run(network, plan, folder)
    assert results(folder).column("id").to_pylist() == list(range(600))
    (folder / "records" / "00000-000000000060.json").unlink()
    scale.run(network, plan, folder, resume=True)
    assert scale.verify(folder) == []
    assert [len(unit) for unit in plan_of(network, latents).units()] == [1] * 6


def test_what_verify_finds(done, latents):
    plan, out = done
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, "failed": 2}))
    assert scale.verify(out) == ["manifest.json counts 600 rows and 2 failed, there are 600 and 0"]
    (out / "manifest.json").unlink()
    assert scale.verify(out)[0].startswith("the job is not concluded")
    folder = ResultFolder(out)
    shard = next(plan.shards())
    other = pq.read_table(folder.data(shard.name))
    ids = pa.array([*other.column("id").to_pylist()[:-1], "another"])
    with folder.writer(shard, other.schema) as writer:
        writer.write_table(other.set_column(0, "id", ids))
    folder.commit(shard, 0, 1.0)
    assert scale.verify(out) == [f"{folder.data(shard.name)} has other ids than {latents / '0.parquet'}"]
    with pytest.raises(FileNotFoundError, match="has no job's results: there is no plan.json"):
        scale.verify(latents)


def test_an_estimate_measures_and_writes_nothing(network, latents, tmp_path):
    found = scale.estimate(network, plan_of(network, latents))
    assert (found.n_rows, found.n_measured, found.failed) == (600, 50, 0)
    assert found.seconds == pytest.approx(600 / found.samples_per_second)
    assert 600 * 64 * 4 < found.output_bytes < 3 * 600 * 64 * 4
    assert found.peak_bytes > 1e8
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]


def test_a_disk_that_is_full(network, latents, tmp_path, monkeypatch):
    """What was written before stays, the half that was not goes, and the job goes on."""
    plan = plan_of(network, latents)
    write, written = pq.ParquetWriter.write_table, []

    def until_full(self, batch):
        written.append(batch)
        if len(written) > 8:
            raise OSError(28, "No space left on device")
        write(self, batch)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", until_full)
    with pytest.raises(OSError, match="No space left"):
        scale.run(network, plan, tmp_path / "out")
    assert len(list((tmp_path / "out" / "records").iterdir())) == 3
    assert len(list((tmp_path / "out" / "data").iterdir())) == 3
    monkeypatch.undo()
    assert scale.run(network, plan, tmp_path / "out", resume=True).counts["rows"] == 600
    assert scale.verify(tmp_path / "out") == []
