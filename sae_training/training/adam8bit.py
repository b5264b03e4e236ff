"""Adam with its two moments in 8 bits: 2 bytes a weight in place of 8. It needs bitsandbytes, an extra.

The moments are quantised in blocks of 256 numbers of one weight matrix, each with its own scale (Dettmers et al. 2022,
arXiv 2110.02861). Parameters of fewer than 4,096 numbers keep 32 bits. bitsandbytes waits for the device in every step.
"""

from __future__ import annotations

from typing import Any

import torch

TABLES = {"qmap1": "dynamic", "qmap2": "udynamic"}
"""The two tables of 256 numbers that the bytes stand for. All parameters share them, so they are not saved."""


def make_adam8bit(parameters: Any, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """bitsandbytes' Adam8bit, whose moments can be saved and set like those of torch's Adam (`optim.moments`)."""
    from bitsandbytes.optim.adam import Adam8bit as BitsAndBytesAdam8bit  # here, because few machines have it

    class Adam8bit(BitsAndBytesAdam8bit):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            """Do one step, or none if `found_inf` is 1."""
            found_inf = getattr(self, "found_inf", None)
            if found_inf is not None and found_inf.item():
                return
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.complete_state(parameter)
            super().step(closure)

        def complete_state(self, parameter: torch.Tensor) -> None:
            """After moments were set: make the step an int, as bitsandbytes counts, and add the tables."""
            state = self.state[parameter]
            if "step" not in state or isinstance(state["step"], int):
                return
            state["step"] = int(state["step"])
            if state["state1"].dtype == torch.uint8:
                self.fill_qmap()
                state.update({name: self.name2qmap[table].to(parameter.device) for name, table in TABLES.items()})

    return Adam8bit(parameters, lr=lr, betas=betas)
