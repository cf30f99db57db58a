"""The linear algebra: tensors in, tensors out. Independent of modules and optimizers.

Every function takes float32 or float64 matrices, with leading batch dimensions where the shape comments show ``...``,
and never draws from the global random generator. Only :mod:`.fallback` and :mod:`.protection` synchronize host and
device, where their docstrings say so. Energies (squared Frobenius norms) are summed in float64: squares of float32
numbers overflow from 1e19 on and underflow below 1e-23.

Notation: W weight and G gradient (m, n); U (m, k), S (k,), V (n, k) with W ~ U diag(S) V^T.
"""

from .bases import (
    OVERSAMPLING,
    Basis,
    exact_basis,
    first_basis,
    left_residual,
    reconstruction_error,
    refresh_basis,
    ritz_basis,
    subspace_change,
    truncation_error,
)
from .energies import (
    GradientEnergies,
    alignments,
    chance_corrected,
    factored_gradient_energies,
    gradient_energies,
    projection_energies,
    projections,
)
from .loss_metric import (
    DIAGONAL_ABOVE,
    LossBasis,
    Projectors,
    dual,
    fade_minor_,
    loss_basis,
    minor_block,
    predicted_increases,
    projectors,
    second_moment,
    truncated,
)
from .matrices import complement, compute_bytes, energy, finite, portions, project_off, to_compute_dtype
from .precision import full_precision
from .retraction import (
    Retraction,
    diagonalized,
    gram_factor,
    orthonormalizer,
    retract,
    retract_columns,
    triangular_inverse,
)

__all__ = [
    "DIAGONAL_ABOVE",
    "OVERSAMPLING",
    "Basis",
    "GradientEnergies",
    "LossBasis",
    "Projectors",
    "Retraction",
    "alignments",
    "chance_corrected",
    "complement",
    "compute_bytes",
    "diagonalized",
    "dual",
    "energy",
    "exact_basis",
    "factored_gradient_energies",
    "fade_minor_",
    "finite",
    "first_basis",
    "full_precision",
    "gradient_energies",
    "gram_factor",
    "left_residual",
    "loss_basis",
    "minor_block",
    "orthonormalizer",
    "portions",
    "predicted_increases",
    "project_off",
    "projection_energies",
    "projections",
    "projectors",
    "reconstruction_error",
    "refresh_basis",
    "retract",
    "retract_columns",
    "ritz_basis",
    "second_moment",
    "subspace_change",
    "to_compute_dtype",
    "triangular_inverse",
    "truncated",
    "truncation_error",
]
