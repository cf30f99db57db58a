"""Factorized layers: the module, the conversion of layers, and the base optimizer's step on the factors.

For users: :func:`factorize_` and :func:`merge_` convert single modules of a model without a
:class:`~svd_optim.SubspaceAwareOptimizer`; :func:`restore_on_load_` lets such a model load state dicts with factorized
layers. :class:`AveragedModel` and :func:`dense_view` are for moving averages of weights.
"""

from .averaging import AveragedModel, dense_view
from .linear import FactorizedLinear
from .surgery import factorize_, merge_, restore_on_load_, restore_structure_

__all__ = [
    "AveragedModel",
    "FactorizedLinear",
    "dense_view",
    "factorize_",
    "merge_",
    "restore_on_load_",
    "restore_structure_",
]
