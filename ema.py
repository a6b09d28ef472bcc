"""EMA: an exponential moving average of the weights. Samples are drawn with it (DDPM, app. B)."""

import copy
from contextlib import contextmanager

import torch

from support import checks


class EMA:
    """Exponential moving average of a module's parameters, in a copy of it: the shadow.

    Up to step `start`, the shadow equals the module. After that, the decay at the k-th update is
    (1 + k) / (10 + k), until it reaches `decay`. So the shadow does not lag behind on a short run.
    Buffers, such as the running statistics of BatchNorm, are copied, not averaged. Make the EMA
    when the module is on its device.

    Args:
        module: its parameters are averaged.
        decay: weight of the past at each update, from 0 to 1.
        start: number of steps before averaging begins.
        update_rate: number of steps from one update to the next.

    Raises:
        ValueError: for values of another type or outside these ranges.
    """

    def __init__(self, module, decay=0.999, start=5000, update_rate=1):
        checks.ema(module, decay, start, update_rate)
        self.decay = decay
        self.start = start
        self.update_rate = update_rate
        self.step = 0
        self.module = module
        self.shadow = copy.deepcopy(module).requires_grad_(False)
        self.pair = list(self.shadow.parameters()), list(module.parameters())

    @torch.no_grad()
    def update(self):
        """Call this after every optimiser step."""
        self.step += 1
        if self.step == self.start:
            self._copy()
        elif self.step > self.start and self.step % self.update_rate == 0:
            k = (self.step - self.start) // self.update_rate
            decay = min(self.decay, (1 + k) / (10 + k))
            torch._foreach_lerp_(*self.pair, 1 - decay)

    @contextmanager
    def applied(self):
        """Inside, the module has the shadow's values; outside its own, even after an exception.

        The values change places tensor by tensor, so no second copy of all weights is needed.
        """
        self._follow()
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self):
        """All that `load_state_dict` needs to resume exactly. Not to be called in `applied()`."""
        self._follow()
        return {"step": self.step, "shadow": self.shadow.state_dict()}

    def load_state_dict(self, state):
        """Go on from a `state_dict`; RuntimeError if it is that of another module."""
        self.shadow.load_state_dict(state["shadow"])
        self.step = state["step"]

    @torch.no_grad()
    def _follow(self):
        """Bring the shadow up to date in what is copied, not averaged."""
        if self.step < self.start:
            self._copy()
        for buffer, copied in zip(self.module.buffers(), self.shadow.buffers()):
            copied.copy_(buffer)

    def _copy(self):
        torch._foreach_copy_(*self.pair)

    @torch.no_grad()
    def _swap(self):
        for value, other in zip(self.module.parameters(), self.shadow.parameters()):
            kept = value.clone()
            value.copy_(other)
            other.copy_(kept)
