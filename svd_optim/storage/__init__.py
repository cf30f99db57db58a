"""Files: checkpoints, which are written atomically and verified before use, and model files of other origin."""

from .checkpoint import export_dense, export_safetensors, load_checkpoint, load_model, save_checkpoint
from .files import CheckpointError
from .run_state import RunState

__all__ = [
    "CheckpointError",
    "RunState",
    "export_dense",
    "export_safetensors",
    "load_checkpoint",
    "load_model",
    "save_checkpoint",
]
