"""Training by maximum likelihood."""

import math

import pytest
import torch
import torch.nn.functional as F

from iresnet_fast.data import density2d
from iresnet_fast.models import IResNetFlow
from iresnet_fast.training import UNLABELLED, fit_flow, hybrid_loss
from tests.helpers import dense_norm, state_of


def planar(**options):
    torch.manual_seed(0)
    return IResNetFlow.from_config({"in_shape": (2,), "fc_blocks": 3, "fc_hidden": (16, 16), **options})


def test_learns_and_reports():
    """A correlated normal distribution, to near its entropy."""
    mixing = torch.tensor([[1.0, 0.0], [0.9, math.sqrt(1 - 0.81)]])
    entropy = math.log(2 * math.pi * math.e) + math.log(1 - 0.81) / 2
    flow = planar()
    seen = []
    report = fit_flow(
        flow, lambda n: torch.randn(n, 2) @ mixing.T, steps=150, lr=2e-2, on_step=lambda *step: seen.append(step)
    )
    assert (report.steps, report.skipped) == (150, 0)
    assert [step for step, _ in seen] == list(range(1, 151))
    assert sum(report.losses[-20:]) / 20 < entropy / 2 + 0.05 < report.losses[0]


def test_same_seed_same_flow():
    states = []
    for _ in range(2):
        flow = planar()
        fit_flow(flow, density2d("rings").sample(500), steps=5, seed=3)
        states.append(state_of(flow))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_steps_that_are_not_finite_are_skipped_and_counted():
    """One bad batch changes no parameter; ten in a row end the training."""
    flow = planar()
    calls = []

    def poisoned(n):
        calls.append(n)
        x = torch.randn(n, 2)
        return x * 1e30 if len(calls) == 3 else x

    report = fit_flow(flow, poisoned, steps=6)
    assert (report.steps, report.skipped) == (5, 1)
    assert all(torch.isfinite(value).all() for value in state_of(flow).values())
    with pytest.raises(RuntimeError, match=r"10 steps in a row .* the last of them step 10. Remedy: a smaller lr"):
        fit_flow(flow, lambda n: torch.randn(n, 2) * 1e30, steps=20)


def test_a_skipped_first_step_leaves_nothing():
    """What ActNorm made of a bad first batch is taken back; the next one initialises it."""
    calls = []

    def draw(n):
        calls.append(n)
        return torch.randn(n, 2) + (100 if len(calls) == 1 else 0)

    flow = planar()
    flow.trunk[0].bias.register_hook(lambda gradient: gradient * math.inf if len(calls) == 1 else gradient)
    report = fit_flow(flow, draw, steps=3)
    assert (report.steps, report.skipped) == (2, 1)
    assert float(flow.trunk[0].bias.detach().abs().max()) < 1


def test_a_gradient_that_is_not_finite_is_no_step():
    flow = planar()
    calls = []

    def poison(gradient):
        calls.append(1)
        return gradient * math.inf if len(calls) == 2 else gradient

    flow.trunk[0].bias.register_hook(poison)
    report = fit_flow(flow, density2d("moons").sample(500), steps=4)
    assert (report.steps, report.skipped) == (3, 1)
    assert all(map(math.isfinite, report.losses))
    assert all(torch.isfinite(value).all() for value in state_of(flow).values())


def test_leaves_the_generators_of_others_alone():
    torch.manual_seed(5)
    expected = torch.randn(3)
    flow = planar()
    torch.manual_seed(5)
    fit_flow(flow, density2d("moons").sample(500), steps=2)
    assert torch.equal(torch.randn(3), expected)


def test_learns_from_a_data_loader():
    x = density2d("8gaussians").sample(100)
    labels = (x[:, 0] > 0).long()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), batch_size=30, shuffle=True)
    flow = planar(n_classes=2)
    before = flow.head.weight.detach().clone()
    assert fit_flow(flow, loader, steps=6).steps == 6
    assert (flow.head.weight - before).abs().sum() > 0
    alone = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=30)
    assert fit_flow(planar(), alone, steps=2).steps == 2
    with pytest.raises(ValueError, match="has no batches|has none"):
        fit_flow(planar(), [], steps=1)
    with pytest.raises(ValueError, match="none after its first pass"):
        fit_flow(planar(), iter([x]), steps=2)


def test_fault_11_averaged_weights_keep_their_bound():
    """After averaging, u and v belong to other weights; evaluation fits them again."""
    flow = planar(coeff=0.7)
    fit_flow(flow, density2d("8gaussians").sample(1000), steps=60, lr=2e-2, average=0.9)
    flow.eval()
    flow(torch.randn(4, 2))
    for block in flow.trunk:
        for layer in getattr(block, "g", ()):
            if hasattr(layer, "parametrizations"):
                assert dense_norm(layer) <= 0.7 * (1 + 1e-3)


def test_averaged_parameters_differ_from_the_last():
    plain, averaged = planar(), planar()
    fit_flow(plain, density2d("moons").sample(500), steps=20, lr=1e-2)
    fit_flow(averaged, density2d("moons").sample(500), steps=20, lr=1e-2, average=0.9)
    assert not torch.equal(plain.trunk[0].bias, averaged.trunk[0].bias)


@pytest.mark.full
def test_compiled_training_is_training():
    x = density2d("8gaussians").sample(1000)
    losses = []
    for compiled in (False, True):
        flow = planar(fc_blocks=1)
        losses.append(fit_flow(flow, x, steps=40, lr=1e-2, compile=compiled).losses)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-3)


def test_hybrid_loss_is_its_definition():
    flow = planar(n_classes=3).eval()
    x = torch.randn(6, 2)
    labels = torch.tensor([0, 2, UNLABELLED, 1, UNLABELLED, 0])
    output = flow(x)
    known = labels >= 0
    expected = 0.5 * F.cross_entropy(output.logits[known], labels[known]) - 2 * output.log_prob.mean() / 2
    torch.testing.assert_close(hybrid_loss(output, labels, density_weight=2.0, class_weight=0.5), expected)
    hybrid_loss(flow(x), labels, class_weight=0.0).backward()
    assert all(parameter.grad is not None for parameter in flow.parameters())  # as data-parallel training needs
    none = torch.full((6,), UNLABELLED)
    torch.testing.assert_close(hybrid_loss(output, none), hybrid_loss(output))


def test_hybrid_training_classifies():
    x = density2d("8gaussians").sample(1500)
    labels = (x[:, 0] > 0).long()
    hidden = torch.where(torch.arange(len(x)) % 2 == 0, labels, UNLABELLED)
    flow = planar(n_classes=2)
    fit_flow(flow, x, hidden, steps=150, lr=1e-2)
    flow.eval()
    assert float((flow.logits(x).argmax(1) == labels).float().mean()) > 0.95


def test_integers_are_dequantised_anew():
    flow = IResNetFlow.from_config({"in_shape": (3,), "fc_blocks": 1, "preprocessing": "center"})
    report = fit_flow(flow, torch.randint(256, (64, 3)), steps=3, batch_size=32)
    assert all(map(math.isfinite, report.losses))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.randn(4, 2), torch.zeros(3, dtype=torch.int64)), {"steps": 1}, "need data, and as many labels"),
        ((torch.randn(0, 2),), {"steps": 1}, "got 0 samples"),
        ((torch.randn(4, 2),), {"steps": 0}, "steps and batch_size must be at least 1"),
        ((torch.randn(4, 2), torch.zeros(4, dtype=torch.int64)), {"steps": 1}, "labels need a flow with a head"),
        ((lambda n: torch.randn(n, 2), torch.zeros(4)), {"steps": 1}, "labels belong to data that is a tensor"),
    ],
)
def test_bad_arguments(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        fit_flow(planar(), *arguments, **options)
    with pytest.raises(ValueError, match="must not be negative"):
        hybrid_loss(planar().eval()(torch.randn(2, 2)), density_weight=-1)
