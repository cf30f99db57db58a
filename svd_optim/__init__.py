"""Wrap an optimizer, monitor the singular subspaces of the weights, and continue training with fewer parameters."""

from ._version import __version__
from .config import LayerOverride, SubspaceConfig, Thresholds
from .console import ConsoleReport, LiveView, RunLog
from .optimizer import SubspaceAwareOptimizer
from .storage import export_dense, load_checkpoint, load_model, save_checkpoint
from .tracking import Listener

__all__ = [
    "ConsoleReport",
    "LayerOverride",
    "Listener",
    "LiveView",
    "RunLog",
    "SubspaceAwareOptimizer",
    "SubspaceConfig",
    "Thresholds",
    "__version__",
    "export_dense",
    "load_checkpoint",
    "load_model",
    "save_checkpoint",
]
