"""Plain records that the other floors exchange: metrics, decisions, events, plans, summaries.

Nothing here imports torch or rich. Every record is frozen, contains only plain Python values and
round-trips through :func:`dataclasses.asdict`, so it can be logged, saved and compared.
"""

from .layers import (
    Action,
    Condition,
    Decision,
    LayerInfo,
    LayerMetrics,
    LayerState,
    PolicyInput,
    break_even_rank,
    largest_useful_rank,
    parameter_count,
)
from .run import (
    Event,
    Events,
    LayerReport,
    LayerReports,
    Plan,
    PlannedLayer,
    Records,
    Renderable,
    Renderer,
    Skipped,
    Summary,
)
from .text import clean, significant

__all__ = [
    "Action",
    "Condition",
    "Decision",
    "Event",
    "Events",
    "LayerInfo",
    "LayerMetrics",
    "LayerReport",
    "LayerReports",
    "LayerState",
    "Plan",
    "PlannedLayer",
    "PolicyInput",
    "Records",
    "Renderable",
    "Renderer",
    "Skipped",
    "Summary",
    "break_even_rank",
    "clean",
    "largest_useful_rank",
    "parameter_count",
    "significant",
]
