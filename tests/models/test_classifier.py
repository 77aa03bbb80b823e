"""The classifier and its configurations."""

import pytest
import torch

import iresnet_fast as irf
from tests.helpers import small_classifier
from tests.tolerances import ROUND_TRIP


def test_round_trip_of_a_bijection(device):
    model = small_classifier().to(device).double()
    irf.enforce(model)
    x = torch.randn(6, 1, 8, 8, dtype=torch.float64, device=device)
    with torch.no_grad():
        z = model.features(x)
    assert z[0].numel() == x[0].numel()
    result = model.solve_inverse(z, tol=1e-13)
    assert ((result.x - x).flatten(1).norm(dim=1) <= ROUND_TRIP[torch.float64] * x.flatten(1).norm(dim=1)).all()
    coarser = model.solve_inverse(z, tol=1e-9)
    assert coarser.certified.all()
    assert ((coarser.x - x).flatten(1).norm(dim=1) <= coarser.error_bound).all()


def test_round_trip_with_injective_padding():
    model = small_classifier(inject=3).double()
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        z = model.features(x)
    assert z.shape[1] == 16
    torch.testing.assert_close(model.inverse(z, tol=1e-12), x, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="outside the range"):
        model.inverse(torch.randn_like(z), tol=1e-12)


def test_channels_last_and_empty_batch():
    model = small_classifier()
    x = torch.randn(3, 1, 8, 8)
    z = model.features(x)
    torch.testing.assert_close(model.features(x.to(memory_format=torch.channels_last)), z)
    assert model(torch.empty(0, 1, 8, 8)).shape == (0, 10)
    assert model.inverse(z[:0]).shape == (0, 1, 8, 8)


def test_plain_twin_has_the_same_shape():
    certified, plain = small_classifier(), small_classifier(coeff=None)
    count = [sum(parameter.numel() for parameter in model.parameters()) for model in (certified, plain)]
    assert count[0] == count[1]
    assert not any(irf.nn.find_spectral_norm(module) for module in plain.modules())


def test_named_configurations():
    model = irf.models.IResNetClassifier.from_config("iresnet-64")
    assert model.latent_shape == (256, 8, 8)
    blocks = [part for part in model.trunk if isinstance(part, irf.nn.InvertibleResidualBlock)]
    assert len(blocks) == 21


def test_configuration_from_a_file_and_a_mapping(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text("in_shape = [1, 4, 4]\nn_classes = 3\nblocks = [1]\nhidden = [4]\n")
    for config in (path, str(path), {"in_shape": (1, 4, 4), "n_classes": 3, "blocks": (1,), "hidden": (4,)}):
        model = irf.models.IResNetClassifier.from_config(config, coeff=0.5)
        assert model.config.coeff == 0.5
        assert model(torch.randn(2, 1, 4, 4)).shape == (2, 3)


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        ("digit", {}, "unknown configuration 'digit': did you mean 'digits'?"),
        ("digits", {"coef": 0.5}, "unknown setting 'coef': did you mean 'coeff'?"),
        ("digits", {"coeff": 1.0}, r"coeff must be in \(0, 1\)"),
        ("digits", {"blocks": (1,)}, "one entry per stage, got 1 and 2"),
        ("digits", {"in_shape": (1, 7, 8)}, "divisible by 2"),
        ("digits", {"in_shape": (1, 8)}, r"\(C, H, W\)"),
        ("digits", {"n_classes": 1}, "at least 2"),
        ("digits", {"hidden": (0, 4)}, "must be positive"),
        ("digits", {"activation": "gelu"}, "activation must be one of"),
    ],
)
def test_bad_configurations(config, overrides, message):
    with pytest.raises(ValueError, match=message):
        irf.models.IResNetClassifier.from_config(config, **overrides)


def test_bad_input():
    model = small_classifier()
    with pytest.raises(ValueError, match=r"takes \(B, 1, 8, 8\), got \(2, 3, 8, 8\)"):
        model(torch.randn(2, 3, 8, 8))
    with pytest.raises(TypeError, match="torch.uint8; scale them"):
        model(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"latents have shape \(B, 4, 4, 4\)"):
        model.inverse(torch.randn(2, 1, 8, 8))
