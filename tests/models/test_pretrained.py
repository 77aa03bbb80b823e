"""Networks kept in folders."""

import json

import pytest
import torch

import iresnet_fast as irf
from benchmarks.blocks import saturated
from iresnet_fast.models import IResNetClassifier, IResNetFlow
from tests.helpers import small_classifier

pytest.importorskip("safetensors")


def test_classifiers_come_back(tmp_path):
    model = small_classifier(inject=3)
    irf.enforce(model)
    model.save_pretrained(tmp_path / "kept", title="Small digits", license="MIT")
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"model.safetensors", "config.json", "README.md"}
    found = IResNetClassifier.from_pretrained(tmp_path / "kept")
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(found(x), model(x))
    assert not found.training
    card = (tmp_path / "kept" / "README.md").read_text()
    assert "# Small digits" in card
    assert "license: MIT" in card
    assert "**Guaranteed inverse: yes**" in card
    assert irf.certify(found).guaranteed


def test_flows_come_back(tmp_path):
    flow = IResNetFlow.from_config({"in_shape": (2,), "fc_blocks": 2, "prior": "learned"})
    flow.train()(torch.randn(32, 2))
    saturated(flow).eval().save_pretrained(tmp_path)
    found = IResNetFlow.from_pretrained(str(tmp_path))
    x = torch.randn(5, 2)
    assert torch.equal(found.log_prob(x), flow.log_prob(x))
    assert found.sample(3).shape == (3, 2)


def test_the_dtype_is_kept(tmp_path):
    model = small_classifier().double()
    irf.enforce(model)
    model.save_pretrained(tmp_path)
    found = IResNetClassifier.from_pretrained(tmp_path)
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    assert torch.equal(found(x), model(x))
    model.head.float()
    with pytest.raises(ValueError, match="a network of torch.float32 and torch.float64. Remedy: model.to"):
        model.save_pretrained(tmp_path)


def test_other_coefficients_than_the_configuration_says(tmp_path):
    model = small_classifier()
    irf.nn.find_spectral_norm(model.trunk[1].g[0]).coeff = 0.97
    with pytest.raises(ValueError, match=r"holds its layer to 0.97, and the configuration says 0.9: .* Remedy: keep"):
        model.save_pretrained(tmp_path)


def test_bad_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no config.json and no model.safetensors. Remedy"):
        IResNetFlow.from_pretrained(tmp_path)
    model = small_classifier()
    with pytest.raises(ValueError, match=r"in training mode. Remedy: model.eval\(\) first"):
        small_classifier().train().save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the configuration of a classifier, not of a flow"):
        IResNetFlow.from_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "hidden": [8, 9]}))
    with pytest.raises(ValueError, match="(?s)cannot be read: .*size mismatch"):
        IResNetClassifier.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="cannot be read"):
        IResNetClassifier.from_pretrained(tmp_path)
