"""What several tests need to build or to measure."""

import gzip
import struct

import numpy as np
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


def small_chain(n_blocks=3, features=4, coeff=0.9):
    """Residual blocks with perceptrons."""
    blocks = [
        irf.nn.InvertibleResidualBlock(irf.nn.LipschitzMLP(features, (16,), coeff=coeff)) for _ in range(n_blocks)
    ]
    return irf.nn.InvertibleSequential(*blocks)


def state_of(module):
    """A copy of every parameter and buffer."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def same_state(module, state):
    return all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def jacobians(function, x):
    """The dense Jacobian of each sample, (B, D, D), of a function that treats them independently."""
    size = x[0].numel()
    dense = [torch.autograd.functional.jacobian(lambda z: function(z[None])[0], one) for one in x]
    return torch.stack(dense).reshape(-1, size, size)


def idx(array, code=8):
    """The bytes of an IDX file."""
    return bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder, compress=False, train=5, test=3):
    """Random images in MNIST's files."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for part, count in (("train", train), ("t10k", test)):
        for name, shape in ((f"{part}-images-idx3-ubyte", (count, 28, 28)), (f"{part}-labels-idx1-ubyte", (count,))):
            content = idx(generator.integers(10, size=shape, dtype=np.uint8))
            if compress:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)
