"""Hook points of transformer_lens."""

from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

__all__ = ["HookPoint", "HookedRootModule"]
