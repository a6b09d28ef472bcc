"""Which timesteps training sees: uniform (DDPM), logit-normal (2403.03206), by importance.

All three have one interface: `sample(n)` draws timesteps, int64, (n,), and the weights of their
losses, float32, (n,); `update(t, losses)` takes in the unweighted losses of these timesteps, both
(N,). Importance is that of Improved DDPM.
"""

import torch
from torch import nn

from support import checks


def make_timesteps(sampling, num_timesteps, std=1.0, device="cpu"):
    """The timestep sampler of this name. `std` is for 'logit-normal'.

    Raises:
        ValueError: an unknown name, or another value that does not fit.
    """
    checks.timesteps(sampling, TIMESTEP_SAMPLINGS, num_timesteps, std, device)
    return TIMESTEP_SAMPLINGS[sampling](num_timesteps, std).to(device)


class UniformSampler(nn.Module):
    """Every timestep is equally likely (DDPM alg. 1). It has no use for `std`."""

    def __init__(self, num_timesteps, std=None):
        super().__init__()
        self.num_timesteps = num_timesteps
        self.std = std
        self.register_buffer("one", torch.ones(1), persistent=False)  # knows the device

    def sample(self, n):
        """n timesteps and weights of 1."""
        t = torch.randint(self.num_timesteps, (n,), device=self.one.device)
        return t, self.one.expand(n)

    def update(self, t, losses):
        """Losses change nothing."""


class LogitNormalSampler(UniformSampler):
    """Mostly timesteps from the middle, where strokes take shape (2403.03206 sec. 3.1).

    t/T is the sigmoid of N(0, std^2). That hardly ever draws the clean end, which decides most of
    the likelihood, so one in fifty is drawn evenly in log(t + 1). The weights are 1, so the loss
    counts the middle more. Do not use it with the variational bound.
    """

    CLEAN_SHARE = 0.02

    def sample(self, n):
        """n timesteps and weights of 1."""
        middle = self.num_timesteps * (self.std * torch.randn(n, device=self.one.device)).sigmoid()
        clean, drawn = torch.rand(2, n, device=self.one.device)
        t = torch.where(drawn < self.CLEAN_SHARE, self.num_timesteps**clean - 1, middle)
        # a sigmoid may round to 1
        return t.long().clamp(max=self.num_timesteps - 1), self.one.expand(n)


class ImportanceSampler(nn.Module):
    """Timesteps in proportion to the root mean square of their losses (Improved DDPM eq. 18).

    It remembers ten losses of each timestep. It draws uniformly until it has them all, about 25
    draws for each timestep, and also if all are zero. One draw in a thousand stays uniform, so that
    no timestep is ever left out. The losses times the weights have the same mean as under uniform
    draws. It has no use for `std`.
    """

    HISTORY = 10
    UNIFORM_SHARE = 0.001

    def __init__(self, num_timesteps, std=None):
        super().__init__()
        losses = torch.zeros(num_timesteps, self.HISTORY, dtype=torch.float64)
        self.register_buffer("losses", losses)
        self.register_buffer("counts", torch.zeros(num_timesteps, dtype=torch.long))

    def probabilities(self):
        """Probability of each timestep, float64, (num_timesteps,)."""
        size = self.losses.square().mean(dim=1).sqrt()
        p = (1 - self.UNIFORM_SHARE) * size / size.sum() + self.UNIFORM_SHARE / len(size)
        complete = (self.counts >= self.HISTORY).all()
        return torch.where(complete & (size.sum() > 0), p, 1 / len(p))

    def sample(self, n):
        """n timesteps and the weights that keep the mean of the loss."""
        p = self.probabilities()
        t = torch.multinomial(p, n, replacement=True)
        return t, (1 / (len(p) * p[t])).float()

    @torch.no_grad()
    def update(self, t, losses):
        """Remember these losses; the oldest are forgotten. One that is not finite is skipped.

        Nothing here waits for the GPU.
        """
        finite = losses.isfinite()
        same = (t[:, None] == t) & finite  # how often t comes earlier and later in this batch
        earlier, later = same.tril(-1).sum(dim=1), same.triu(1).sum(dim=1)
        # Losses that are not kept go to a spare column, since two writes to one place have no
        # defined winner on a GPU.
        kept = finite & (later < self.HISTORY)
        column = torch.where(kept, (self.counts[t] + earlier) % self.HISTORY, self.HISTORY)
        losses_and_spare = nn.functional.pad(self.losses, (0, 1))
        losses_and_spare[t, column] = losses.double()
        self.losses.copy_(losses_and_spare[:, :-1])
        self.counts.index_add_(0, t, finite.long())


TIMESTEP_SAMPLINGS = {
    "uniform": UniformSampler,
    "logit-normal": LogitNormalSampler,
    "importance": ImportanceSampler,
}
