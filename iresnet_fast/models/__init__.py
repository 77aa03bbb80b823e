"""Models built from the invertible layers, and their named configurations."""

from .classifier import ClassifierConfig, IResNetClassifier

__all__ = ["ClassifierConfig", "IResNetClassifier"]
