"""Training and evaluation."""

from .classification import classification_error, fit_classifier
from .density import UNLABELLED, FitReport, fit_flow, hybrid_loss
from .evaluate import Evaluation, evaluate
from .folder import load_run
from .run import InterruptedRunError, RunResult, train
from .settings import TrainingConfig
from .stepping import DivergedError

__all__ = [
    "UNLABELLED",
    "DivergedError",
    "Evaluation",
    "FitReport",
    "InterruptedRunError",
    "RunResult",
    "TrainingConfig",
    "classification_error",
    "evaluate",
    "fit_classifier",
    "fit_flow",
    "hybrid_loss",
    "load_run",
    "train",
]
