"""How likely are images: the variational bound, bits per dimension, rate and distortion.

DDPM: arXiv 2006.11239, sec. 3.3, 3.4 and 4.3. Improved DDPM: 2102.09672, sec. 3.1. "Per dimension" means divided by
pixels times channels.
"""

import math
from typing import NamedTuple

import torch
from tqdm import tqdm

from process import check_images, check_labels, check_whole
from support.checks import check_switch, check_values


class BitsPerDim(NamedTuple):
    """The variational bound in bits per dimension: mean over images, standard error of that mean, and parts.

    `prior + kl` is DDPM's rate and `decoder` its distortion. Two tensors, float64, (terms,), from noise to image, are
    its progressive coding (sec. 4.3): `rate`, the bits used before x_t is known, and `rmse`, the error of the x0
    predicted from x_t, in grey levels from 0 to 255.
    """

    total: float
    standard_error: float
    prior: float
    kl: float
    decoder: float
    rate: torch.Tensor
    rmse: torch.Tensor


def bits_per_dim(
    ddpm,
    x0,
    y=None,
    *,
    terms=None,
    generator=None,
    rows=None,
    gather=None,
    progress=False,
    batch_size=256,
):
    """The variational bound on -log2 p(x0) of 8-bit images, per dimension (DDPM sec. 3.3 and 4.1).

    Args:
        ddpm: a `DDPM` in evaluation mode.
        x0: images of 256 levels in [-1, 1], (N, C, H, W).
        y: labels, N integers or one for all. With them it is the bound on -log2 p(x0 | y). None means no label.
        terms: number of terms to compute for each image, of the bound's `num_timesteps`: the decoder, and one at random
            from each of terms - 1 intervals of the others. The intervals are short where the terms are large; the
            estimate is unbiased. None computes all terms.
        generator: decides noise and timesteps; None draws from torch's global state.
        rows, gather: a slice of the images to compute, and what makes the whole, (N,), of these and of those that other
            processes compute. Noise is drawn for all.
        progress: show a progress bar.
        batch_size: images that the network sees at once. It does not change the noise.

    Returns:
        BitsPerDim: the bound, its standard error, its parts, and the rate-distortion curve.

    Raises:
        ValueError: no images, or another argument does not fit.
    """
    check_whole("batch_size", batch_size, 1, note=" image")
    check_switch("progress", progress)
    check_images("x0", x0, (None, None, None, None))
    check_values("x0", x0, -1, 1)
    x0 = x0.float()  # as `sample` does: the noise, and a network, are float32
    if not len(x0):
        raise ValueError("x0 of 0 images: expected at least 1")
    y = check_labels(y, len(x0), ddpm.num_classes, ddpm.device)
    T = ddpm.num_timesteps
    terms = T if terms is None else terms
    check_whole("terms", terms, min(2, T), T, ", the number of timesteps")
    cube = (T - 1) * torch.linspace(0, 1, terms, dtype=torch.float64) ** 3
    edges = [0, *torch.maximum(1 + cube.round(), 1.0 + torch.arange(terms)).long().tolist()]
    intervals = list(zip(edges, edges[1:]))[
        ::-1
    ]  # from noise to the decoder, which is the interval (0, 1)
    bits, errors = [prior_term(ddpm, x0.to(ddpm.device))], []
    start, stop, _ = slice(rows.start, rows.stop).indices(len(x0)) if rows else (0, len(x0), 1)
    with (
        torch.no_grad(),
        tqdm(
            total=(stop - start) * terms, unit="call", disable=not progress, leave=False
        ) as progress_bar,
    ):
        for low, high in intervals:
            # For all images at once, so that batches do not change the noise.
            t = torch.randint(low, high, (len(x0),), generator=generator, device=ddpm.device)
            noise = torch.randn(x0.shape, generator=generator, device=ddpm.device)
            parts = []
            for first in range(start, stop, batch_size):
                part = slice(first, min(first + batch_size, stop))
                x = x0[part].to(ddpm.device)
                xt = ddpm.q_sample(x, t[part], noise[part])
                predicted, _, variance_fraction = ddpm.denoise(
                    xt, t[part], None if y is None else y[part]
                )
                parts.append(
                    (
                        (high - low)
                        * bound_term(ddpm, x, xt, t[part], predicted, variance_fraction).double(),
                        (x - predicted).square().flatten(1).mean(dim=1).double(),
                    )
                )
                progress_bar.update(len(x))
            for found, values in zip((bits, errors), zip(*parts)):
                found.append(torch.cat(values) if gather is None else gather(torch.cat(values)))
    bits, errors = torch.stack(bits), torch.stack(errors)  # (1 + terms, N), (terms, N)
    mean, total = bits.mean(dim=1), bits.sum(dim=0)
    error = (total.std() / math.sqrt(len(x0))).item() if len(x0) > 1 else math.nan
    return BitsPerDim(
        total.mean().item(),
        error,
        mean[0].item(),
        mean[1:-1].sum().item(),
        mean[-1].item(),
        mean[:-1].cumsum(0).cpu(),
        127.5 * errors.mean(dim=1).sqrt().cpu(),
    )


def bound_term(process, x0, xt, t, x0_predicted, variance_fraction=None):
    """The term of the variational bound of timestep t, in bits per dimension, (N,) (DDPM eq. 5).

    It is KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and for t = 0 -log p(x_0 | x_1), the discrete decoder.
    """
    true_mean, mean = (process.q_posterior(image, xt, t)[0] for image in (x0, x0_predicted))
    true_log_variance = process.log_variances(t, t - 1)[0]
    log_variance = process.log_variance(t, t - 1, variance_fraction)
    difference = true_log_variance - log_variance
    kl = (
        difference.exp() - 1 - difference + (true_mean - mean).square() * (-log_variance).exp()
    ) / 2
    nll = -discrete_log_likelihood(x0, mean, log_variance)
    terms = torch.where((t == 0)[:, None, None, None], nll, kl.to(nll.dtype))
    return terms.flatten(1).mean(dim=1) / math.log(2)


def prior_term(process, x0):
    """KL(q(x_T | x_0) || N(0, 1)), in bits per dimension, float64, (N,)."""
    alpha_bar = process.alphas_cumprod[-1]
    return ((alpha_bar * (x0.double().square() - 1) - torch.log1p(-alpha_bar)) / 2).flatten(1).mean(
        1
    ) / math.log(2)


def discrete_log_likelihood(x0, mean, log_variance):
    """log of the probability that N(mean, variance) gives the 8-bit level x0, in nats, shaped like x0 (DDPM eq. 13).

    Levels are 2/255 apart in [-1, 1]; the two outermost take the tails. Differences of the distribution function are
    taken in logarithms on its lower side, so they are exact however unlikely the level is. They are taken in float64:
    in float32 the gradient of log_ndtr is off by 1 % at 300 standard deviations and by 27 % at 2000.
    """
    scale = (-log_variance.double() / 2).exp()
    off = x0.double() - mean.double()
    upper, lower = (
        (1 / 255 - off.abs()) * scale,
        (-1 / 255 - off.abs()) * scale,
    )  # mirrored: both on the lower side
    upper, lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    inside = upper + torch.log1p(-torch.exp(lower - upper))
    darkest = torch.special.log_ndtr((off + 1 / 255) * scale)
    brightest = torch.special.log_ndtr((1 / 255 - off) * scale)
    return torch.where(x0 < -0.999, darkest, torch.where(x0 > 0.999, brightest, inside)).to(
        x0.dtype
    )
