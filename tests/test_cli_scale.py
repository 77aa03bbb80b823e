"""Jobs as a user runs them."""

import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import iresnet_fast as irf
from iresnet_fast.cli import main
from tests.helpers import small_classifier


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """The console script's function, in this process, in a folder with a network, images and their latents."""
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = small_classifier()
    model.save_pretrained("net")
    x = torch.randn(100, 1, 8, 8) / 4
    np.save("x.npy", x.numpy())
    with torch.no_grad():
        z = model.features(x)
    np.save("z.npy", z.numpy())
    z[7] = float("nan")
    np.save("bad.npy", z.numpy())

    def call(*arguments, expect=0):
        monkeypatch.setattr(sys, "argv", ["iresnet-fast", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        text = capsys.readouterr()
        code = ended.value.code
        assert (code or 0) == expect or (expect == 1 and isinstance(code, str)), (code, text)
        return text.out + text.err + (code if isinstance(code, str) else "")

    return call


def test_there_and_back(run, tmp_path):
    assert "100 samples: 100 converged, 0 failed. Results: latents/data" in run(
        "encode", "net", "--input", "x.npy", "--output", "latents"
    )
    assert "100 converged" in run(
        "invert", "net", "--input", "latents/data/*.parquet", "--output", "images", "--shard-rows", 30
    )
    verified = run("verify", "images")
    assert "images is whole" in verified
    assert "certified end to end: 100 of 100; every block's own solve: 100" in verified
    assert "proven error of 100 samples: median at most" in verified
    found = [
        pq.read_table(path).column("x").combine_chunks().to_numpy_ndarray()
        for path in sorted((tmp_path / "images" / "data").iterdir())
    ]
    assert [len(part) for part in found] == [30, 30, 30, 10]
    np.testing.assert_allclose(np.concatenate(found), np.load("x.npy"), atol=1e-5)
    assert "100 converged" in run(
        "round-trip", "net", "--input", "x.npy", "--output", "errors", "--strict", "--dtype", "float64"
    )
    errors = pq.read_table("errors/data/00000-000000000000.parquet").column("error").to_numpy()
    assert errors.dtype == np.float64
    assert errors.max() < 1e-6
    assert "--resume" in run("encode", "net", "--input", "x.npy", "--output", "latents", expect=1)
    assert "100 converged" in run("encode", "net", "--input", "x.npy", "--output", "latents", "--resume")


def test_samples_that_fail_are_an_error_where_that_is_asked_for(run):
    assert "99 converged, 1 failed (out/failures.parquet has the reasons)" in run(
        "invert", "net", "--input", "bad.npy", "--output", "out"
    )
    assert "1 failed" in run("invert", "net", "--input", "bad.npy", "--output", "out", "--resume", "--strict", expect=1)


def test_a_dry_run_writes_nothing(run, tmp_path):
    text = run("invert", "net", "--input", "z.npy", "--output", "out", "--dry-run")
    assert "samples/s" in text
    assert "measured on cpu, on 100 samples, of which 0 did not converge" in text
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_is_one_line(run):
    for arguments, said in (
        (("--input", "none*.npy"), "there is no file none*.npy"),
        (("--input", "x.npy"), "column z has samples of shape (1, 8, 8), (4, 4, 4) is needed"),
        (("--input", "z.npy", "--tol", "0"), "tol must be positive"),
        (("--input", "z.npy", "--engine", "torchrun"), "Remedy: torchrun"),
    ):
        assert said in run("invert", "net", *arguments, "--output", "out", expect=1)
    assert "No such option" in run("invert", "net", "--input", "z.npy", "--output", "out", "--log-det", expect=2)
    assert "has no job's results" in run("verify", "net", expect=1)
    assert "is not the folder of a training run" in run(
        "encode", "nothing", "--input", "x.npy", "--output", "out", expect=1
    )


def test_a_network_without_a_proof_says_so(run):
    model = small_classifier(coeff=None)
    with torch.no_grad():
        for parameter in model.trunk.parameters():
            parameter.mul_(3)
    model.save_pretrained("plain")
    text = run("round-trip", "plain", "--input", "x.npy", "--output", "out")
    assert "the network's inverse is not proven, and no result is certified" in text
    assert not any(pq.read_table("out/data").column("certified").to_pylist())


def test_either_kind_of_network_is_read_from_its_folder(run, tmp_path):
    flow = irf.models.IResNetFlow.from_config(
        {"in_shape": (2,), "fc_blocks": 1, "fc_hidden": (4,), "actnorm": False}
    ).eval()
    flow.save_pretrained("flow")
    np.savez("points.npz", x=np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32), id=np.arange(20) * 3)
    run("encode", "flow", "--input", "points.npz", "--output", "latents", "--log-det")
    found = pq.read_table("latents/data/00000-000000000000.parquet")
    assert found.column_names == ["id", "z", "log_det", "log_prob", "converged", "reason"]
    assert found.column("id").to_pylist() == list(range(0, 60, 3))
    (tmp_path / "flow" / "config.json").write_text('{"kind": "neither"}')
    assert "is of the kind 'neither'; classifier and flow are known" in run(
        "encode", "flow", "--input", "points.npz", "--output", "o", expect=1
    )
