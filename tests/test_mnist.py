"""What holds after training on real images: needs MNIST beside the checkout, in torchvision's layout."""

import gzip
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import iresnet_fast as irf
from tests.helpers import dense_norm
from tests.tolerances import ENFORCED

MNIST = Path(__file__).parents[2] / "shared" / "data" / "mnist" / "MNIST" / "raw"

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not MNIST.is_dir(), reason=f"no {MNIST}: MNIST is not here"),
]


def load(name, header):
    with gzip.open(MNIST / name) as file:
        return torch.frombuffer(bytearray(file.read()[header:]), dtype=torch.uint8)


def test_every_layer_is_within_its_coefficient_after_enforce():
    """Learning rate 0.1 and one power iteration a step: what training only estimates, enforce makes true."""
    torch.manual_seed(0)
    images = load("train-images-idx3-ubyte.gz", 16)[: 28 * 28 * 6400].view(-1, 1, 28, 28).float() / 255
    labels = load("train-labels-idx1-ubyte.gz", 8)[:6400].long()
    config = {"in_shape": (1, 28, 28), "n_classes": 10, "blocks": (2, 2), "hidden": (8, 8), "squeeze_input": True}
    model = irf.models.IResNetClassifier.from_config(config).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for x, y in zip(images.split(64), labels.split(64), strict=True):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert irf.enforce(model.eval()).guaranteed
    layers = [part for part in model.modules() if irf.nn.find_spectral_norm(part)]
    assert len(layers) == 12
    for layer in layers:
        assert dense_norm(layer) <= 0.9 * (1 + ENFORCED)
    with torch.no_grad():
        result = model.solve_inverse(model.features(images[:20]))
    assert result.certified.all()
