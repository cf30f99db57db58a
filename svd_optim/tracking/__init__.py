"""The tracked layers of a model during training: measuring, refreshing, descents, switches, protection, guards.

For users: :class:`Listener`, whose methods are called during a run.
"""

from .listeners import Listener, Monitored

__all__ = ["Listener", "Monitored"]
