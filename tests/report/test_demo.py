"""The demonstration, shortened, and its report."""

import base64
import json
import re

import pytest
import torch

from iresnet_fast.data import load_digits
from iresnet_fast.report.convergence import block_convergence
from iresnet_fast.report.demo import run_demo, write_results
from iresnet_fast.report.page import write_demo_page
from iresnet_fast.solvers import relative_errors
from iresnet_fast.training import DivergedError, classification_error, fit_classifier
from tests.helpers import small_classifier


@pytest.fixture(scope="module")
def result():
    return run_demo(epochs=1)


@pytest.mark.full
def test_certified_network_is_proven_and_inverted(result):
    certified, plain = result.networks
    assert certified.guaranteed
    assert certified.certified == certified.converged == 1
    assert certified.worst_reconstruction_error < 1e-5
    assert certified.largest_lipschitz < 1
    assert not plain.guaranteed
    assert plain.certified == 0
    assert certified.test_error < 0.6


@pytest.mark.full
def test_inverses_are_compared_at_equal_error(result):
    certified, ours, papers, once, fewest = result.timings
    assert certified.reconstruction_error < 1e-6
    assert certified.seconds < papers.seconds
    assert ours.reconstruction_error < 1e-6
    assert papers.reconstruction_error < 1e-6
    assert fewest.reconstruction_error <= 1.1 * ours.reconstruction_error
    assert once.reconstruction_error == pytest.approx(papers.reconstruction_error)
    assert papers.seconds > 3 * ours.seconds


@pytest.mark.full
def test_one_flow_classifies_is_certified_and_samples(result):
    hybrid = result.hybrid
    assert hybrid.guaranteed
    assert hybrid.worst_reconstruction_error < 1e-5
    assert hybrid.test_error < 0.6
    assert hybrid.bits_per_dim + 3 * hybrid.standard_error < hybrid.uniform_bits
    assert result.samples.shape == (36, 1, 8, 8)
    assert result.samples.isfinite().all()


@pytest.mark.full
def test_writes_a_report_that_needs_no_other_file(result, tmp_path):
    write_results(result, tmp_path)
    page = write_demo_page(result, tmp_path).read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    images = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    assert len(images) == 4
    assert {base64.b64decode(image) for image in images} == {path.read_bytes() for path in tmp_path.glob("*.png")}
    assert "guaranteed inverse" in page
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["networks"][0]["guaranteed"] is True
    assert stored["hybrid"]["bits_per_dim"] == result.hybrid.bits_per_dim
    assert "yes" in (tmp_path / "certificate.md").read_text()


def test_convergence_stays_below_its_bound():
    model = small_classifier()
    curves = block_convergence(model, torch.randn(8, 1, 8, 8), n_iterations=15)
    assert len(curves) == 3
    for curve in curves:
        assert all(error <= bound + 1e-15 for error, bound in zip(curve.errors, curve.bounds, strict=True))


def test_errors_count_nan_as_infinite():
    found, images = torch.full((2, 1, 2, 2), float("nan")), torch.ones(2, 1, 2, 2)
    assert relative_errors(found, images).isinf().all()


def test_digits():
    split = load_digits(test_share=0.25, seed=1)
    assert len(split.train_images) + len(split.test_images) == 1797
    assert split.train_images.dtype == torch.uint8
    assert (split.train_images.min(), split.train_images.max(), split.n_levels) == (0, 16, 17)
    centered = split.centered().train_images
    assert (centered.min(), centered.max(), centered.dtype) == (-0.5, 0.5, torch.float32)
    again = load_digits(test_share=0.25, seed=1)
    assert torch.equal(split.test_images, again.test_images)
    assert (split.test_labels.bincount() >= 40).all()


def test_training_is_repeatable():
    split = load_digits().centered()
    errors = []
    for _ in range(2):
        torch.manual_seed(3)
        model = small_classifier()
        fit_classifier(model, split.train_images[:256], split.train_labels[:256], epochs=1)
        errors.append(classification_error(model, split.test_images, split.test_labels))
    assert errors[0] == errors[1]


def test_training_bad_input():
    model = small_classifier()
    with pytest.raises(ValueError, match="0 images, 0 labels"):
        fit_classifier(model, torch.empty(0, 1, 8, 8), torch.empty(0), epochs=1)
    with pytest.raises(ValueError, match="epochs"):
        fit_classifier(model, torch.ones(1, 1, 8, 8), torch.ones(1), epochs=0)
    nothing = torch.full((4, 1, 8, 8), float("nan")), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(DivergedError, match="none of 1 steps had a finite loss and gradient. Remedy: a smaller lr"):
        fit_classifier(model, *nothing, epochs=1)
    with pytest.raises(DivergedError, match=r"10 steps in a row had a loss \(nan\)"):
        fit_classifier(model, *nothing, epochs=11)
