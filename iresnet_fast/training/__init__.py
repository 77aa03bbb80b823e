"""Training and evaluation."""

from .classification import classification_error, fit_classifier

__all__ = ["classification_error", "fit_classifier"]
