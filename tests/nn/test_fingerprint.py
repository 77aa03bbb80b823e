"""What must, and what must not, count as a change of a module."""

import copy

import pytest
import torch
from torch import nn

import iresnet_fast as irf
from iresnet_fast import _extension
from iresnet_fast.nn.inspection import fingerprint


def module():
    part = irf.nn.LipschitzMLP(3, (5,))
    part.append(nn.BatchNorm1d(3))
    part.register_buffer("flags", torch.tensor([True, False, True]))
    part.register_buffer("low", torch.randn(4, 3).bfloat16().T)
    part.register_buffer("scalar", torch.tensor(2))
    part.register_buffer("empty", torch.empty(0))
    return part.to(torch.get_default_device()).eval()


@pytest.fixture(params=["extension", "torch"])
def backend(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(_extension, "serves", lambda op, device: False)


@pytest.mark.usefixtures("backend")
def test_every_bit_of_every_tensor_counts():
    part = module()
    seen = {fingerprint(part)}
    assert fingerprint(part) in seen
    tensors = [*part.parameters(), *part.buffers()]
    for tensor in tensors:
        for index in range(min(tensor.numel(), 7)):
            place = tensor.data.view(-1) if tensor.is_contiguous() else tensor.data.T.view(-1)
            place[index] = ~place[index] if tensor.dtype == torch.bool else place[index] + 1
            found = fingerprint(part)
            assert found not in seen
            seen.add(found)
    swapped = part[0].bias.data
    swapped[:2] = torch.tensor([1.0, 2.0])
    before = fingerprint(part)
    swapped[:2] = torch.tensor([2.0, 1.0])
    assert fingerprint(part) != before


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_flipped_signs_count(dtype):
    """An even number of flipped sign bits vanishes in a plain sum of weighted words."""
    part = nn.Linear(8, 8, device=torch.get_default_device(), dtype=dtype)
    seen = {fingerprint(part)}
    for flip in (slice(0, 2), slice(1, None, 2), slice(0, None, 2)):
        part.weight.data[0, flip].neg_()
        assert fingerprint(part) not in seen
        seen.add(fingerprint(part))


def test_structure_counts_where_modules_are_shared():
    act, one = nn.Tanh(), nn.Linear(3, 3)
    part = nn.Sequential(one, act, nn.Linear(3, 3))
    before = fingerprint(part)
    for change in (
        lambda: part.append(act),
        lambda: part.append(one),
        lambda: part.__delitem__(-1),
        lambda: part.insert(0, act),
    ):
        change()
        assert fingerprint(part) != before
        before = fingerprint(part)


def test_plain_tensors_and_global_hooks_count():
    part = nn.Linear(3, 3)
    weight = part.weight.detach().clone()
    del part.weight
    part.weight = weight
    before = fingerprint(part)
    weight.mul_(2)
    after = fingerprint(part)
    assert after != before
    handle = nn.modules.module.register_module_forward_hook(lambda *arguments: None)
    try:
        assert fingerprint(part) != after
    finally:
        handle.remove()
    assert fingerprint(part) == after


@pytest.mark.parametrize(
    "change",
    [
        lambda part: part.train(),
        lambda part: part.double(),
        lambda part: setattr(part[3], "eps", 1e-2),
        lambda part: part[1].register_forward_hook(lambda *arguments: None),
        lambda part: setattr(part[1], "forward", torch.tanh),
        lambda part: part.append(nn.Identity()),
        lambda part: part.__setitem__(1, irf.nn.LipSwish()),
    ],
)
def test_settings_count(change):
    part = module()
    before = fingerprint(part)
    change(part)
    assert fingerprint(part) != before


def test_evaluation_does_not_count():
    part = module()
    part(torch.randn(4, 3))
    before = fingerprint(part)
    part(torch.randn(4, 3))
    with irf.nn.frozen_state(part):
        part(torch.randn(4, 3))
    assert fingerprint(part) == before
    assert fingerprint(copy.deepcopy(part)) != before


def test_torch_compile_beside_a_module_changes_nothing_of_it():
    """``torch.compile(g)`` is another module that calls g, and leaves a mark on g."""
    block = irf.nn.InvertibleResidualBlock(irf.nn.LipschitzMLP(2, (4,))).eval()
    irf.certify(block)
    torch.compile(block.g)
    assert block.proven_lipschitz() is not None
