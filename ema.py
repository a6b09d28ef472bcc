"""Shadow weights: the exponential moving average of the weights in training, with which one samples (DDPM, app. B)."""

from contextlib import contextmanager

import torch


class EMA:
    """Exponential moving average of a module's parameters.

    Until step `start` the shadow equals the weights. After it the decay ramps up as (1 + k) / (10 + k) over the k-th
    update to `decay`, so that on a short run the shadow does not lag behind.

    Args:
        module: whose parameters to average.
        decay: weight of the past at each update, from 0 to below 1.
        start: steps before averaging begins.
        update_rate: steps from one update to the next.

    Raises:
        ValueError: for values outside these ranges.
    """

    def __init__(self, module, decay=0.999, start=5000, update_rate=1):
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay {decay}: expected from 0 to below 1")
        if start < 0:
            raise ValueError(f"ema_start {start}: expected 0 or more steps")
        if update_rate < 1:
            raise ValueError(f"ema_update_rate {update_rate}: expected at least 1 step")
        self.decay = decay
        self.start = start
        self.update_rate = update_rate
        self.step = 0
        self.names = [name for name, _ in module.named_parameters()]
        self.parameters = list(module.parameters())
        self.shadow = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self):
        """Call after every optimiser step."""
        self.step += 1
        if self.step <= self.start:
            torch._foreach_copy_(self.shadow, self.parameters)
        elif self.step % self.update_rate == 0:
            k = (self.step - self.start) // self.update_rate
            decay = min(self.decay, (1 + k) / (10 + k))
            torch._foreach_lerp_(self.shadow, self.parameters, 1 - decay)

    @contextmanager
    def applied(self):
        """The shadow in the module's place inside, the weights again outside, even after an exception."""
        weights = [p.detach().clone() for p in self.parameters]
        try:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.shadow)
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, weights)

    def state_dict(self):
        """What `load_state_dict` needs to go on exactly: the step and the shadow by parameter name."""
        return {"step": self.step, "shadow": dict(zip(self.names, self.shadow))}

    def load_state_dict(self, state):
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: for the shadow of another module.
        """
        if list(state["shadow"]) != self.names:
            raise ValueError("EMA state: its parameters are not those of this module")
        self.step = state["step"]
        for shadow, saved in zip(self.shadow, state["shadow"].values()):
            shadow.copy_(saved)
