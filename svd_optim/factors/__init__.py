"""Layers in factors: the module, turning layers into it and back, and the base optimizer's step inside.

For users: :func:`factorize_` and :func:`merge_` turn single modules of a model that no optimizer of this library
wraps; :func:`restore_on_load_` lets such a model load what was saved with factorized layers.
"""

from .linear import FactorizedLinear
from .surgery import factorize_, merge_, restore_on_load_, restore_structure_

__all__ = ["FactorizedLinear", "factorize_", "merge_", "restore_on_load_", "restore_structure_"]
