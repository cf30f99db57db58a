"""Wrap your optimizer; see what training does to the weights; train on in fewer parameters."""

from .alerts import Alert
from .checkpoint import export_dense, export_safetensors, load_checkpoint, load_model, save_checkpoint
from .config import LayerOverride, SubspaceConfig, Thresholds
from .factorization import factorize_, merge_, restore_on_load_, restore_structure_
from .layers import FactorizedLinear
from .listeners import Listener
from .live import LiveView
from .log import Run, RunLog, read_log
from .optimizer import SubspaceAwareOptimizer
from .policy import Policy, ThresholdPolicy
from .records import Action, Condition, Decision, Event, LayerInfo, LayerMetrics, LayerReport, LayerState, Plan, Summary
from .report import ConsoleReport
from .storage import CheckpointError

__version__ = "0.1.0"

__all__ = [
    "Action",
    "Alert",
    "CheckpointError",
    "Condition",
    "ConsoleReport",
    "Decision",
    "Event",
    "FactorizedLinear",
    "LayerInfo",
    "LayerMetrics",
    "LayerOverride",
    "LayerReport",
    "LayerState",
    "Listener",
    "LiveView",
    "Plan",
    "Policy",
    "Run",
    "RunLog",
    "SubspaceAwareOptimizer",
    "SubspaceConfig",
    "Summary",
    "ThresholdPolicy",
    "Thresholds",
    "export_dense",
    "export_safetensors",
    "factorize_",
    "load_checkpoint",
    "load_model",
    "merge_",
    "read_log",
    "restore_on_load_",
    "restore_structure_",
    "save_checkpoint",
]
