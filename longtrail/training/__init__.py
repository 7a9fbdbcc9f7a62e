"""Training with Lightning: `train` turns features and settings into a module with its best epoch's weights."""

from longtrail.training.fitting import Trained, is_main_process, train
from longtrail.training.learners import DivergedError

__all__ = ["DivergedError", "Trained", "is_main_process", "train"]
