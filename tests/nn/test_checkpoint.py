"""Forwards that a backward runs again have the weights of the forward before, or raise."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import iresnet_fast as irf
from tests.helpers import small_chain, state_of
from tests.tolerances import CLOSE_TO_EAGER


class Checkpointed(nn.Module):
    def __init__(self, model, reentrant):
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x):
        if self.reentrant:
            x = x.requires_grad_()  # without it such a checkpoint has no gradient
        for block in self.model:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def gradients(function, model, state, loss):
    model.load_state_dict(state)
    model.zero_grad()
    loss(function).backward()
    return [parameter.grad.clone() for parameter in model.parameters()], state_of(model)


def branches():
    return {
        "mlp": (lambda: irf.nn.LipschitzMLP(4, (16,)), (8, 4)),
        "bottleneck": (lambda: irf.nn.Bottleneck(3, 8, input_size=(6, 6)), (4, 3, 6, 6)),
    }


@pytest.mark.parametrize("kind", branches())
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("fused", ["no", "whole", "blocks"])
def test_checkpointed_blocks_have_the_gradients_of_plain_ones(kind, reentrant, fused):
    make, shape = branches()[kind]
    model = irf.nn.InvertibleSequential(*[irf.nn.InvertibleResidualBlock(make()) for _ in range(3)]).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    wrapped = Checkpointed(model, reentrant)
    if fused == "whole":
        irf.fuse(wrapped)
    elif fused == "blocks":
        for block in model:
            irf.fuse(block)
    state, x = state_of(model), torch.randn(shape, dtype=torch.float64)

    def loss(function):
        return function(x.clone()).square().sum()

    plain, after = gradients(model, model, state, loss)
    found, also = gradients(wrapped, model, state, loss)
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=CLOSE_TO_EAGER, atol=CLOSE_TO_EAGER)
    for name, value in after.items():
        torch.testing.assert_close(also[name], value)  # the backward iterated nothing


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("second", ["trained", "not trained"])
def test_a_recomputation_of_an_earlier_forward_raises(reentrant, fused, second):
    wrapped = Checkpointed(small_chain().train(), reentrant)
    if fused:
        irf.fuse(wrapped)
    first = wrapped(torch.randn(8, 4))
    if second == "trained":
        total = first.sum() + wrapped(torch.randn(8, 4)).sum()
    else:
        with torch.no_grad():
            wrapped.model(torch.randn(8, 4)) if not fused else wrapped(torch.randn(8, 4))
        total = first.sum()
    with pytest.raises(RuntimeError, match="its u and v have changed since its forward"):
        total.backward()
    wrapped(torch.randn(8, 4)).sum().backward()


@pytest.mark.parametrize("fused", [False, True])
def test_steps_of_a_checkpointed_model(fused):
    """One forward a backward, as training does, over several steps; evaluation in between."""
    wrapped = Checkpointed(small_chain().double(), False)
    wrapped = irf.fuse(wrapped) if fused else wrapped
    plain = copy.deepcopy(wrapped.model)
    x = torch.randn(8, 4, dtype=torch.float64)
    for _ in range(3):
        for model in (wrapped.train(), plain.train()):
            model.zero_grad()
            model(x.clone()).square().sum().backward()
        for a, b in zip(wrapped.model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=CLOSE_TO_EAGER, atol=CLOSE_TO_EAGER)
        with torch.no_grad():
            torch.testing.assert_close(wrapped.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("what", ["eval", "settle", "thread", "part", "vmap"])
def test_vectors_that_change_between_a_forward_and_its_backward_raise(what, fused, reentrant):
    model = small_chain().train()
    wrapped = Checkpointed(model, reentrant)
    wrapped = irf.fuse(wrapped) if fused else wrapped
    x = torch.randn(8, 4)
    loss = wrapped(x.clone()).square().sum()
    if what == "eval":
        wrapped.eval()
        wrapped.train()
    elif what == "settle":
        irf.settle(wrapped)
    elif what == "thread":
        thread = threading.Thread(target=lambda: wrapped.model(x) if not fused else wrapped(x.clone()))
        thread.start()
        thread.join()
    elif what == "part":
        model[1](x)
    else:
        torch.func.vmap(lambda row: model(row[None])[0])(x)
    with pytest.raises(RuntimeError, match="its u and v have changed since its forward"):
        loss.backward()
    wrapped(x.clone()).square().sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_layer_that_a_checkpointed_forward_uses_twice(reentrant):
    layer = irf.nn.SpectralLinear(16, 16).double()
    layer.weight = torch.randn(16, 16, dtype=torch.float64)
    model = nn.Sequential(layer, nn.Tanh(), layer).train()
    x = torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="if one forward uses the layer several times"):
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    irf.fuse(model)
    plain = copy.deepcopy(model)
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    plain(x).square().sum().backward()
    a, b = layer.parametrizations.weight.original, plain[0].parametrizations.weight.original
    torch.testing.assert_close(a.grad, b.grad, rtol=CLOSE_TO_EAGER, atol=CLOSE_TO_EAGER)


def test_nested_checkpoints():
    model = small_chain().double().train()
    plain = copy.deepcopy(model)
    x = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    for inner, outer in ((False, False), (True, True), (True, False), (False, True)):
        for either in (model, plain):
            either.zero_grad()
        checkpoint(
            lambda x, inner=inner: checkpoint(model, x, use_reentrant=inner), x, use_reentrant=outer
        ).sum().backward()
        plain(x).sum().backward()
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=CLOSE_TO_EAGER, atol=CLOSE_TO_EAGER)


def test_checkpointed_steps_in_another_thread_and_another_process():
    model = Checkpointed(small_chain().train(), True)

    def step(model):
        model(torch.randn(8, 4)).sum().backward()
        return True

    for _ in range(3):
        step(model)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(step, model).result()
        assert pool.submit(step, pickle.loads(pickle.dumps(model))).result()
        assert pool.submit(step, copy.deepcopy(model)).result()


@pytest.mark.full
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_training_step_has_the_gradients_of_the_eager_one(backend, fused, checkpointed):
    model = small_chain().double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    plain = copy.deepcopy(model)
    wrapped = Checkpointed(model, False) if checkpointed else model
    wrapped = irf.fuse(wrapped) if fused else wrapped
    compiled = torch.compile(wrapped, backend=backend, fullgraph=True)
    x = torch.randn(8, 4, dtype=torch.float64)
    for _ in range(2):
        for either in (compiled, plain):
            either.zero_grad()
            either(x.clone()).square().sum().backward()
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-8)
    for a, b in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)
