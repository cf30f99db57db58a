"""What is on the disk: checkpoints, written whole or not at all and verified before use, and model files."""

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
