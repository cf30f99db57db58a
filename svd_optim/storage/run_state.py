"""A run of the wrapper in a distributed checkpoint, whose helpers carry parameters and the base optimizer's state only.

``torch.distributed.checkpoint.state_dict`` takes "state" and "param_groups" of an optimizer's state dict, by parameter
name, and leaves the rest out. What the wrapper has measured and decided goes beside them:

    dcp.save({"model": of_model, "optimizer": of_optimizer, "svd_optim": RunState(optimizer)}, checkpoint_id=folder)

    dcp.load({"svd_optim": RunState(optimizer)}, checkpoint_id=folder)  # first: now the layers have the saved structure
    of_model, of_optimizer = get_state_dict(model, optimizer)
    dcp.load({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer)
"""

from __future__ import annotations

from typing import Any

from ..optimizer import SubspaceAwareOptimizer
from ..tracking import loading


class RunState:
    """The wrapper's own state as a ``torch.distributed.checkpoint.stateful.Stateful``.

    Loading it changes layers to the saved structure, by truncating their present weights. :meth:`optimizer.step
    <svd_optim.SubspaceAwareOptimizer.step>` then raises until the model's saved factors are loaded too.
    """

    def __init__(self, optimizer: SubspaceAwareOptimizer) -> None:
        if not isinstance(optimizer, SubspaceAwareOptimizer):
            raise TypeError(f"RunState: optimizer must be a SubspaceAwareOptimizer, got {type(optimizer).__name__}")
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """One value, which a checkpoint keeps as it is: its keys and shapes change as layers do."""
        return {"run": (loading.save_run(self.optimizer._controller),)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of :meth:`state_dict`, or change nothing.

        Raises:
            ValueError: it has other layers or another version.
        """
        (saved,) = state_dict["run"]
        loading.restore_run(self.optimizer._controller, saved)
