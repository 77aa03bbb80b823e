"""Models built from the invertible layers, and their named configurations."""

from .classifier import ClassifierConfig, IResNetClassifier
from .flow import BitsPerDim, FlowConfig, FlowOutput, IResNetFlow
from .prior import NormalPrior

__all__ = [
    "BitsPerDim",
    "ClassifierConfig",
    "FlowConfig",
    "FlowOutput",
    "IResNetClassifier",
    "IResNetFlow",
    "NormalPrior",
]
