"""Wrap your optimizer; see what training does to the weights; train on in fewer parameters.

    optimizer = SubspaceAwareOptimizer(torch.optim.Muon(matrices, lr=0.02), model)

Where what is documented, beside the docstrings of the names here: what each metric means in
:class:`svd_optim.records.LayerMetrics`, the states of a layer in :mod:`svd_optim.decisions.machine`, the kinds of
events in :data:`svd_optim.decisions.lifecycle.EVENTS`, alerts in :mod:`svd_optim.decisions.alerts`, the log in
:mod:`svd_optim.console.run_log`, saving in :mod:`svd_optim.storage.checkpoint`, which optimizers can train factors in
:mod:`svd_optim.factors.moments`, what a fault may do in :mod:`svd_optim.tracking.step`.
"""

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
