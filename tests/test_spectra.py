"""Spectra of a model's layers beside their bounds."""

import pytest
import torch
from torch import nn

import iresnet_fast as irf
from tests.helpers import dense_norm, same_state, small_classifier, state_of


def test_every_layer_of_a_model():
    model = small_classifier()
    irf.enforce(model)
    before = state_of(model)
    spectra = irf.layer_spectra(model)
    assert same_state(model, before)
    layers = {name: part for name, part in model.named_modules() if irf.nn.find_spectral_norm(part)}
    assert [layer.name for layer in spectra] == list(layers)
    for layer in spectra:
        module = layers[layer.name]
        assert layer.within
        assert layer.bound >= dense_norm(module) * (1 - 1e-12)
        assert (layer.values.diff() <= 0).all()
        if module.weight[0, 0].numel() == 1:
            torch.testing.assert_close(layer.norm, dense_norm(module), rtol=1e-9, atol=0)
    table = irf.spectra_to_markdown(spectra)
    assert table.count("proven |") == len(layers)
    assert f"| {spectra[0].name} |" in table


def test_counts_of_values():
    conv = irf.nn.SpectralConv2d(3, 8, 3, padding=1, coeff=0.9, input_size=(6, 5))
    strided = irf.nn.SpectralConv2d(3, 8, 3, padding=1, stride=2, coeff=0.9, input_size=(6, 5))
    linear = irf.nn.SpectralLinear(7, 4)
    model = nn.Sequential(conv, strided, linear)
    assert [len(layer.values) for layer in irf.layer_spectra(model)] == [6 * 5 * 3, 6 * 5 * 3, 4]


def test_layers_beyond_their_coeff_are_marked():
    linear = irf.nn.SpectralLinear(6, 6, coeff=0.5).train()
    with torch.no_grad():
        linear.parametrizations.weight.original.add_(torch.randn(6, 6))
    (layer,) = irf.layer_spectra(linear)
    assert not layer.within
    assert "| no |" in irf.spectra_to_markdown((layer,))


def test_bad_input():
    with pytest.raises(ValueError, match=r"Linear has no spectrally normalised layer.*spectral_norm"):
        irf.layer_spectra(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="got str"):
        irf.layer_spectra("model")


def test_certify_reports_progress():
    model = small_classifier()
    seen = []
    irf.certify(model, progress=lambda *step: seen.append(step))
    assert [done for done, _, _ in seen] == list(range(1, len(model.trunk) + 1))
    assert {total for _, total, _ in seen} == {len(model.trunk)}
    assert seen[0][2] == "trunk.0"


def test_figure(tmp_path):
    pytest.importorskip("matplotlib")
    from iresnet_fast.report.figures import draw_spectra

    draw_spectra(irf.layer_spectra(small_classifier()), tmp_path / "spectra.png")
    assert (tmp_path / "spectra.png").stat().st_size > 10_000
