"""Figures that the papers print, to stand beside ours."""

from __future__ import annotations

# Behrmann, Duvenaud, Jacobsen 2018, Table 1: by network, error in %, reconstruction error.
TABLE1: dict[str, dict[str, tuple[float, float]]] = {
    "mnist": {
        "vanilla": (0.61, 2.5e-7),
        "BN": (0.65, 1.0),
        "c = 0.9": (0.64, 2.2e-7),
        "c = 0.7": (0.61, 1.9e-7),
        "c = 0.5": (1.12, 1.6e-7),
        "c = 0.3": (1.65, 7.3e-8),
    },
    "cifar10": {
        "vanilla": (6.95, 1.4),
        "BN": (6.00, float("inf")),
        "c = 0.9": (6.30, 1.3e-7),
        "c = 0.7": (8.23, 9.5e-8),
        "c = 0.5": (17.71, 1.9e-8),
        "c = 0.3": (24.66, 7.2e-9),
    },
}
# Behrmann et al. 2019 (slides), classification error in %: ResNet-164, vanilla, c = 0.9.
CLASSIFICATION: dict[str, tuple[float | None, float, float]] = {
    "mnist": (None, 0.38, 0.40),
    "cifar10": (5.50, 6.69, 6.78),
    "cifar100": (24.30, 23.97, 24.58),
}
# Behrmann et al. 2019 (slides), bits per dimension on MNIST and CIFAR-10, after each method's paper.
BITS_PER_DIM: dict[str, tuple[float, float]] = {
    "NICE": (4.36, 4.48),
    "MADE": (2.04, 5.67),
    "MAF": (1.89, 4.31),
    "Real NVP": (1.06, 3.49),
    "Glow": (1.05, 3.35),
    "FFJORD": (0.99, 3.40),
    "i-ResNet": (1.06, 3.45),
}
