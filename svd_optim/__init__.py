"""Wrap your optimizer; see what training does to the weights; train on in fewer parameters."""

from .config import LayerOverride, SubspaceConfig, Thresholds
from .console.live import LiveView
from .console.run_log import Run, RunLog, read_log
from .console.tables import ConsoleReport
from .decisions.alerts import Alert
from .decisions.policy import Policy, ThresholdPolicy
from .factors.linear import FactorizedLinear
from .factors.surgery import factorize_, merge_, restore_on_load_, restore_structure_
from .optimizer import SubspaceAwareOptimizer
from .records import Action, Condition, Decision, Event, LayerInfo, LayerMetrics, LayerReport, LayerState, Plan, Summary
from .storage.checkpoint import export_dense, export_safetensors, load_checkpoint, load_model, save_checkpoint
from .storage.files import CheckpointError
from .tracking.listeners import Listener

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
