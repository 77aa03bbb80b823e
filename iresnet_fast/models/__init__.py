"""Models built from the invertible layers, and their named configurations."""

from .build import Model, build_model, config_of, load_pretrained
from .classifier import ClassifierConfig, IResNetClassifier
from .configuration import read_config
from .flow import BitsPerDim, FlowOutput, IResNetFlow
from .flow_config import FlowConfig
from .prior import NormalPrior

__all__ = [
    "BitsPerDim",
    "ClassifierConfig",
    "FlowConfig",
    "FlowOutput",
    "IResNetClassifier",
    "IResNetFlow",
    "Model",
    "NormalPrior",
    "build_model",
    "config_of",
    "load_pretrained",
    "read_config",
]
