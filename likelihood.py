"""How likely are images: the variational bound, bits per dimension, rate and distortion.

DDPM: arXiv 2006.11239, sec. 3.3, 3.4 and 4.3. Improved DDPM: 2102.09672, sec. 3.1. "Per dimension"
means divided by pixels times channels.
"""

import math
from typing import NamedTuple

import torch


class BitsPerDim(NamedTuple):
    """The variational bound in bits per dimension: mean over images, its standard error, parts.

    `prior + kl` is DDPM's rate and `decoder` its distortion. Two tensors, float64, (terms,), from
    noise to image, are its progressive coding (sec. 4.3): `rate`, the bits used before x_t is
    known, and `rmse`, the error of the x0 predicted from x_t, in grey levels from 0 to 255.
    """

    total: float
    standard_error: float
    prior: float
    kl: float
    decoder: float
    rate: torch.Tensor
    rmse: torch.Tensor


@torch.no_grad()
def bound_terms(ddpm, x0, y=None, terms=None, generator=None):
    """Terms of the variational bound on -log2 p(x0 | y), per image and dimension (DDPM eq. 5).

    Args:
        ddpm: a `DDPM` in evaluation mode.
        x0: images of 256 levels in [-1, 1], (N, C, H, W).
        y: labels, int64, (N,); None means no label.
        terms: number of terms to compute, of the bound's `num_timesteps`: the decoder, and one at
            random from each of terms - 1 intervals of the others. The intervals are short where the
            terms are large; the estimate is unbiased. None computes all.
        generator: decides noise and timesteps; None draws from torch's global state.

    Returns:
        bits: the prior, then the terms from noise to image, the decoder last, each times the length
            of its interval, float64, (1 + terms, N). Their sum is the bound.
        errors: mean squared error of the x0 predicted at each term, float64, (terms, N).
    """
    terms = ddpm.num_timesteps if terms is None else terms
    bits, errors = [prior_term(ddpm, x0)], []
    for low, high in _intervals(ddpm.num_timesteps, terms):
        t = torch.randint(low, high, (len(x0),), generator=generator, device=ddpm.device)
        eps = torch.randn(x0.shape, generator=generator, device=ddpm.device)
        xt = ddpm.q_sample(x0, t, eps)
        predicted, _, variance_fraction = ddpm.denoise(xt, t, y)
        term = bound_term(ddpm, x0, xt, t, predicted, variance_fraction)
        bits.append((high - low) * term.double())
        errors.append((x0 - predicted).square().flatten(1).mean(dim=1).double())
    return torch.stack(bits), torch.stack(errors)


def _intervals(num_timesteps, terms):
    """Ranges of timesteps, [low, high), from noise to the decoder, which is the range (0, 1)."""
    cube = (num_timesteps - 1) * torch.linspace(0, 1, terms, dtype=torch.float64) ** 3
    edges = torch.maximum(1 + cube.round(), 1.0 + torch.arange(terms)).long().tolist()
    return list(zip([0, *edges], edges))[::-1]


def summarise(bits, errors):
    """A `BitsPerDim` of what `bound_terms` gave, (1 + terms, N) and (terms, N)."""
    mean, total = bits.mean(dim=1), bits.sum(dim=0)
    n = len(total)
    return BitsPerDim(
        total=total.mean().item(),
        standard_error=(total.std() / math.sqrt(n)).item() if n > 1 else math.nan,
        prior=mean[0].item(),
        kl=mean[1:-1].sum().item(),
        decoder=mean[-1].item(),
        rate=mean[:-1].cumsum(0).cpu(),
        rmse=127.5 * errors.mean(dim=1).sqrt().cpu(),
    )


def bound_term(process, x0, xt, t, x0_predicted, variance_fraction=None):
    """The term of the variational bound of timestep t, in bits per dimension, (N,) (DDPM eq. 5).

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and for t = 0 the discrete decoder,
    -log p(x_0 | x_1).
    """
    true_mean, mean = (process.q_posterior(image, xt, t)[0] for image in (x0, x0_predicted))
    true_log_variance = process.log_variances(t, t - 1)[0]
    log_variance = process.log_variance(t, t - 1, variance_fraction)
    difference = true_log_variance - log_variance
    squared_error = (true_mean - mean).square() * (-log_variance).exp()
    kl = (difference.exp() - 1 - difference + squared_error) / 2
    nll = -discrete_log_likelihood(x0, mean, log_variance)
    terms = torch.where((t == 0)[:, None, None, None], nll, kl.to(nll.dtype))
    return terms.flatten(1).mean(dim=1) / math.log(2)


def prior_term(process, x0):
    """KL(q(x_T | x_0) || N(0, 1)), in bits per dimension, float64, (N,)."""
    alpha_bar = process.alphas_cumprod[-1]
    kl = (alpha_bar * (x0.double().square() - 1) - torch.log1p(-alpha_bar)) / 2
    return kl.flatten(1).mean(1) / math.log(2)


def discrete_log_likelihood(x0, mean, log_variance):
    """log of the probability that N(mean, variance) gives the 8-bit level x0 (DDPM eq. 13).

    In nats, shaped like x0. Levels are 2/255 apart in [-1, 1]; the two outermost take the tails.
    Differences of the distribution function are taken in logarithms on its lower side, so they are
    exact however unlikely the level is. They are taken in float64: in float32 the gradient of
    log_ndtr is off by 1 % at 300 standard deviations and by 27 % at 2000.
    """
    scale = (-log_variance.double() / 2).exp()
    off = x0.double() - mean.double()
    # mirrored, so that both are on the lower side
    upper = torch.special.log_ndtr((1 / 255 - off.abs()) * scale)
    lower = torch.special.log_ndtr((-1 / 255 - off.abs()) * scale)
    inside = upper + torch.log1p(-torch.exp(lower - upper))
    darkest = torch.special.log_ndtr((off + 1 / 255) * scale)
    brightest = torch.special.log_ndtr((1 / 255 - off) * scale)
    log_likelihood = torch.where(x0 > 0.999, brightest, inside)
    return torch.where(x0 < -0.999, darkest, log_likelihood).to(x0.dtype)
