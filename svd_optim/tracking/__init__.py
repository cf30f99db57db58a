"""The layers of a model as they are trained: measured, refreshed, faded, switched, protected, guarded.

For users: :class:`Listener`, to be told of a run while it goes on.
"""

from .listeners import Listener, Monitored

__all__ = ["Listener", "Monitored"]
