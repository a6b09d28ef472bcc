"""Which timesteps training sees: uniform (DDPM), logit-normal (arXiv 2403.03206), by importance (Improved DDPM).

All three have one interface: `sample(n)` draws timesteps, int64, (n,), and the weights of their losses, float32, (n,);
`update(t, losses)` takes in the unweighted losses of these timesteps, both (N,).
"""

import torch
from torch import nn

from support.checks import (
    FLOATS,
    check_choice,
    check_device,
    check_number,
    check_tensor,
    check_whole,
)

TIMESTEP_SAMPLINGS = ("uniform", "logit-normal", "importance")


def make_timesteps(sampling, num_timesteps, std=1.0, device="cpu"):
    """The timestep sampler of this name. `std` is for 'logit-normal'.

    Raises:
        ValueError: an unknown name, or another value that does not fit.
    """
    check_choice("timestep_sampling", sampling, TIMESTEP_SAMPLINGS)
    check_whole("num_timesteps", num_timesteps, 1)
    check_device(device)
    if sampling == "logit-normal":
        check_number("timestep_std", std, 0)
    if sampling == "importance":
        return ImportanceSampler(num_timesteps).to(device)
    return (
        UniformSampler(num_timesteps, device)
        if sampling == "uniform"
        else LogitNormalSampler(num_timesteps, std, device)
    )


class UniformSampler(nn.Module):
    """Every timestep is equally likely (DDPM alg. 1)."""

    def __init__(self, num_timesteps, device="cpu"):
        super().__init__()
        self.num_timesteps = num_timesteps
        self.device = device

    def sample(self, n):
        """n timesteps and weights of 1."""
        check_whole("n", n, 0)
        return torch.randint(self.num_timesteps, (n,), device=self.device), torch.ones(
            n, device=self.device
        )

    def update(self, t, losses):
        """Losses change nothing."""


class LogitNormalSampler(UniformSampler):
    """Mostly timesteps from the middle, where strokes take shape: t/T is the sigmoid of N(0, std^2) (2403.03206 3.1).

    The weights are 1, so the loss counts the middle more. Do not use it with the variational bound.
    """

    def __init__(self, num_timesteps, std=1.0, device="cpu"):
        super().__init__(num_timesteps, device)
        self.std = std

    def sample(self, n):
        """n timesteps and weights of 1."""
        check_whole("n", n, 0)
        t = (self.std * torch.randn(n, device=self.device)).sigmoid()
        t = (
            (self.num_timesteps * t).long().clamp(max=self.num_timesteps - 1)
        )  # a sigmoid may round to 1
        return t, torch.ones(n, device=self.device)


class ImportanceSampler(nn.Module):
    """Timesteps drawn in proportion to the root mean square of their losses (Improved DDPM eq. 18).

    It remembers ten losses of each timestep. It draws uniformly until it has them all, and also if all are zero. One
    draw in a thousand stays uniform, so that no timestep is ever left out. The losses times the weights have the same
    mean as under uniform draws.
    """

    HISTORY = 10
    UNIFORM_SHARE = 0.001

    def __init__(self, num_timesteps):
        super().__init__()
        self.register_buffer(
            "losses", torch.zeros(num_timesteps, self.HISTORY, dtype=torch.float64)
        )
        self.register_buffer("counts", torch.zeros(num_timesteps, dtype=torch.long))

    def probabilities(self):
        """Probability of each timestep, float64, (num_timesteps,)."""
        size = self.losses.square().mean(dim=1).sqrt()
        p = (1 - self.UNIFORM_SHARE) * size / size.sum() + self.UNIFORM_SHARE / len(size)
        return torch.where((self.counts >= self.HISTORY).all() & (size.sum() > 0), p, 1 / len(p))

    def sample(self, n):
        """n timesteps and the weights that keep the mean of the loss."""
        check_whole("n", n, 1)
        p = self.probabilities()
        t = torch.multinomial(p, n, replacement=True)
        return t, (1 / (len(p) * p[t])).float()

    @torch.no_grad()
    def update(self, t, losses):
        """Remember these losses; the oldest are forgotten. A loss that is not finite is skipped.

        Nothing here waits for the GPU.
        """
        check_tensor("t", t, (torch.int64,), (None,), 0, len(self.counts) - 1)
        check_tensor("losses", losses, FLOATS, t.shape, finite=False)
        finite = losses.isfinite()
        same = (t[:, None] == t) & finite
        earlier, later = (
            same.tril(-1).sum(dim=1),
            same.triu(1).sum(dim=1),
        )  # how often t comes in this batch
        # Losses that are not kept go to a spare column, since two writes to one place have no defined winner on a GPU.
        kept = finite & (later < self.HISTORY)
        column = torch.where(kept, (self.counts[t] + earlier) % self.HISTORY, self.HISTORY)
        losses_and_spare = nn.functional.pad(self.losses, (0, 1))
        losses_and_spare[t, column] = losses.double()
        self.losses.copy_(losses_and_spare[:, :-1])
        self.counts.index_add_(0, t, finite.long())
