"""Files: checkpoints, which are written atomically and verified before use, and model files of other origin."""

from .checkpoint import export_dense, export_safetensors, load_checkpoint, load_model, save_checkpoint
from .files import CheckpointError

__all__ = [
    "CheckpointError",
    "export_dense",
    "export_safetensors",
    "load_checkpoint",
    "load_model",
    "save_checkpoint",
]
