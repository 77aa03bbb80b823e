"""What several tests need to build or to measure."""

import torch

import iresnet_fast as irf


def dense_norm(module, norm=None):
    """Norm of a spectrally normalised layer's operator in use, from its dense matrix in float64."""
    norm = norm or irf.nn.find_spectral_norm(module)
    with torch.no_grad(), irf.nn.frozen_state(module):
        weight = module.weight.detach().double()
    if norm.geometry is None:
        return float(torch.linalg.matrix_norm(weight.flatten(1), 2))
    from iresnet_fast.reference.conv_operator import conv_matrix

    return float(torch.linalg.matrix_norm(conv_matrix(weight, norm.geometry), 2))


def small_classifier(**overrides):
    """A digits network that is quick to build, with ActNorm initialised."""
    model = irf.models.IResNetClassifier.from_config("digits", **{"blocks": (1, 2), "hidden": (8, 8), **overrides})
    model.train()
    channels, height, width = model.config.in_shape
    model(torch.randn(16, channels, height, width))
    return model.eval()


def state_of(module):
    """A copy of every parameter and buffer."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def same_state(module, state):
    return all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def saturated(module, factor=4.0):
    """The module with weights far above their coefficient, so that every layer's norm is at it; changed in place."""
    with torch.no_grad():
        for part in module.modules():
            if irf.nn.find_spectral_norm(part):
                part.parametrizations.weight.original.mul_(factor)
    return module


def jacobians(function, x):
    """The dense Jacobian of each sample, (B, D, D), of a function that treats them independently."""
    size = x[0].numel()
    dense = [torch.autograd.functional.jacobian(lambda z: function(z[None])[0], one) for one in x]
    return torch.stack(dense).reshape(-1, size, size)
