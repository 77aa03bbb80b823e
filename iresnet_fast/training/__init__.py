"""Training and evaluation."""

from .classification import classification_error, fit_classifier
from .density import UNLABELLED, FitReport, fit_flow, hybrid_loss

__all__ = ["UNLABELLED", "FitReport", "classification_error", "fit_classifier", "fit_flow", "hybrid_loss"]
