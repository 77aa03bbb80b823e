"""The papers' tables and figures, at the scale that shows that they work."""

import json
import math
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from iresnet_fast.cli import app
from iresnet_fast.data import ImageSplit, load_digits
from iresnet_fast.reference.conv_spectrum import conv_singular_values
from iresnet_fast.reproduce import SCALES, TARGETS, Job, Record, Table, plane_flows, published
from iresnet_fast.reproduce.job import NETWORKS
from iresnet_fast.reproduce.singular_values import largest_singular_values
from tests.helpers import small_classifier

pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")


def job(out, **changes):
    return Job(**{"scale": SCALES["smoke"], "data": load_digits(), "out": out, **changes})


def test_fig1_shows_that_paths_of_the_invertible_network_do_not_cross(tmp_path):
    done = []
    record = TARGETS["fig1"](
        job(tmp_path, data=None, report=lambda what, step, total: done.append((what, step, total)))
    )
    plain, invertible = record.tables[0].rows
    assert (plain[0], invertible[0]) == ("plain ResNet", "i-ResNet")
    assert (plain[5], invertible[5]) == ("no", "yes")
    assert invertible[3] == 0
    assert invertible[4] > 0
    assert done[-1] == ("training the i-ResNet", 30, 30)
    assert (tmp_path / "fig1.png").stat().st_size > 10_000


def test_records_come_back_and_print(tmp_path):
    table = Table("Errors", ("network", "error"), (("c = 0.9", 1.23456e-7), ("BN", math.inf), ("vanilla", None)))
    record = Record(
        "table1", "Errors", "iresnet-fast reproduce table1", "smoke", {"seed": 0}, (table,), (), ("A note.",)
    )
    path = record.write(tmp_path / "new")
    text = path.read_text()
    assert text.startswith("# Errors\n\n`iresnet-fast reproduce table1`, scale `smoke`.")
    assert "| c = 0.9 | 1.23e-07 |\n| BN | inf |\n| vanilla | – |" in text
    assert "- A note." in text
    found = Record.from_dict(json.loads(path.with_suffix(".json").read_text()))
    assert found.to_markdown() == record.to_markdown()


def test_published_tables_have_every_network():
    assert all(set(table) == set(NETWORKS) for table in published.TABLE1.values())


def test_largest_singular_values_are_those_of_the_dense_operator():
    model = small_classifier().eval()
    [first, *_] = largest_singular_values(model, torch.randn(1, 1, 8, 8))
    layer = model.trunk[1].g[0]
    values = conv_singular_values(layer.weight.detach().double(), (8, 8), (1, 1), (1, 1), 1, "svd")
    assert first == pytest.approx(float(values.max()), rel=1e-5)


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="needs images. Remedy: --data PATH"):
        TARGETS["table1"](job(tmp_path, data=None))
    gray_and_alpha = torch.zeros(4, 2, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"images of one or three channels, got \(2, 8, 8\)"):
        TARGETS["table1"](job(tmp_path, data=ImageSplit(*gray_and_alpha, *gray_and_alpha)))


def test_the_paper_scale_is_the_workshop_network(tmp_path):
    images = torch.zeros(200, 3, 32, 32, dtype=torch.uint8), torch.arange(200) % 10
    settings, training = job(tmp_path, scale=SCALES["paper"], data=ImageSplit(*images, *images)).classifier()
    assert settings["blocks"] == [18, 18, 19]
    assert (settings["inject"], settings["hidden"], training.epochs, training.flip) == (9, [3, 12, 48], 200, True)
    digits = torch.zeros(200, 1, 28, 28, dtype=torch.uint8), images[1]
    settings, training = job(tmp_path, scale=SCALES["paper"], data=ImageSplit(*digits, *digits)).classifier()
    assert (settings["inject"], settings["hidden"], training.shift, training.flip) == (3, [1, 4, 16], 4, False)


@pytest.mark.full
def test_colour_images_and_networks_that_pad(tmp_path):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (140, 3, 16, 16), generator=generator, dtype=torch.uint8), torch.arange(140) % 10
    padded = job(tmp_path, data=ImageSplit(*images, *images))
    for target in ("fig3", "fig4"):
        TARGETS[target](padded).write(tmp_path)
    curve = json.loads((tmp_path / "fig4.json").read_text())["tables"][0]["rows"]
    bounded = [row for row in curve if row[3] is not None]
    assert len(bounded) > len(curve) / 2
    # The bound is that of the distance to the exact inverse of the latents, which float32 has rounded by an eps or two.
    rounding = 2 * torch.finfo(torch.float32).eps
    assert all(error <= bound + rounding for _, _, error, bound in bounded)


def test_flows_in_the_plane_are_trained_once(tmp_path, monkeypatch):
    pytest.importorskip("zuko")
    pytest.importorskip("normflows")
    few = replace(SCALES["smoke"], steps=3, samples=50)
    chosen = {name: make for name, make in plane_flows._flows().items() if name in ("MAF", "Glow", plane_flows.OURS)}
    monkeypatch.setattr(plane_flows, "_flows", lambda: chosen)
    first = plane_flows.compare(job(tmp_path, data=None, scale=few))
    picture = (tmp_path / "plane.png").read_bytes()
    assert [row[1] for row in first.rows[:3]] == list(chosen)
    (tmp_path / "plane.png").unlink()
    again = plane_flows.compare(job(tmp_path, data=None, scale=few, report=lambda *step: pytest.fail(f"{step}")))
    assert again == first
    assert (tmp_path / "plane.png").read_bytes() == picture
    with pytest.raises(ValueError, match="MAF-8gaussians.safetensors was trained with .*'steps': 3.*not.*'steps': 4"):
        plane_flows.compare(job(tmp_path, data=None, scale=replace(few, steps=4)))


@pytest.mark.full
def test_every_target_by_command(tmp_path):
    pytest.importorskip("zuko")
    pytest.importorskip("normflows")
    for target in TARGETS:
        command = ["reproduce", target, "--data", "digits", "--scale", "smoke", "--out", str(tmp_path)]
        found = CliRunner().invoke(app, command)
        assert found.exit_code == 0, found.output
        record = Record.from_dict(json.loads((tmp_path / f"{target}.json").read_text()))
        assert record.tables
        assert all((tmp_path / name).stat().st_size > 5_000 for name, _ in record.figures)
    table = json.loads((tmp_path / "table1.json").read_text())["tables"][0]["rows"]
    assert [row[0] for row in table] == list(NETWORKS)
    assert [row[5] for row in table] == ["no", "no", "yes", "yes", "yes", "yes"]
    assert all(row[3] < 1e-5 for row in table[2:])
    curve = json.loads((tmp_path / "fig4.json").read_text())["tables"][0]["rows"]
    assert all(error <= bound for _, _, error, bound in curve)
    steps = [json.loads(path.read_text())["steps"] for path in tmp_path.glob("runs-smoke/*/result.json")]
    assert len(steps) == len(NETWORKS) + 1
    assert min(steps) > 0


@pytest.mark.full
def test_couplings_of_nice_are_additive_and_those_of_real_nvp_are_not():
    flows = plane_flows._flows()
    jacobians = {}
    for name in ("NICE", "Real NVP"):
        torch.manual_seed(0)
        transform = flows[name]()().transform
        jacobians[name] = transform.log_abs_det_jacobian(x := torch.randn(50, 2), transform(x))
    assert jacobians["NICE"].std() < 1e-6 < jacobians["Real NVP"].std()
