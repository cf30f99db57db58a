"""From metrics to decisions: the rules, the plan over all layers, the state machine. No torch, no rich.

For users: :class:`ThresholdPolicy`, a base for a policy of their own (:class:`svd_optim.config.Policy`), and
:class:`Alert`, which listeners receive.
"""

from .alerts import Alert, Level
from .machine import LayerStatus, Protection, Trigger
from .policy import RULES, ThresholdPolicy

__all__ = ["RULES", "Alert", "LayerStatus", "Level", "Protection", "ThresholdPolicy", "Trigger"]
