"""The variational bound, what it trains, and the timesteps that it is trained at, held to closed forms.

The data are the independent normal pixels of test_diffusion.py, on 8-bit levels.
"""

import copy
import math

import pytest
import torch
from test_diffusion import MEAN, STD, Oracle, gaussian

from diffusion import DDPM, VLB_WEIGHT
from likelihood import discrete_log_likelihood
from process import make_betas
from unet import UNet

LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1


class Placed(torch.nn.Module):
    """A network, and beside it a constant place of the variance: -1 is fixed_small, 1 fixed_large."""

    def __init__(self, network, place):
        super().__init__()
        self.network, self.place, self.num_classes = network, place, network.num_classes

    def forward(self, xt, t, y=None):
        output = self.network(xt, t, y)
        return torch.cat([output, torch.full_like(output, self.place)], dim=1)


def learned(place, **settings):
    return DDPM(
        Placed(Oracle(**settings), place), image_size=8, channels=1, variance="learned", **settings
    )


def pixels(n, mean=MEAN, seed=0):
    x0 = mean + STD * torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return ((x0 + 1) * 127.5).round() / 127.5 - 1


def entropy_of(x0):
    """-log2 of the density of these very images times the width of a level, a dimension."""
    nats = ((x0.double() - MEAN) / STD).square().mean().item() / 2 + math.log(
        STD * math.sqrt(2 * math.pi)
    )
    return nats / math.log(2) - math.log2(2 / 255)


# Variances


@pytest.mark.parametrize("place, fixed", [(-1.0, "fixed_small"), (1.0, "fixed_large")])
def test_the_ends_of_a_learned_variance_are_the_fixed_ones(place, fixed):
    torch.manual_seed(0)
    xt = torch.randn(5, 1, 8, 8)
    for schedule in ("linear", "cosine"):
        ddpm, expected = (
            learned(place, beta_schedule=schedule),
            gaussian(variance=fixed, beta_schedule=schedule),
        )
        for t, s in (
            (torch.tensor([1, 2, 3, 500, 999]), None),
            (torch.tensor([9, 50, 100, 500, 999]), 5),
        ):
            s = t - 1 if s is None else torch.full_like(t, s)
            fraction = ddpm._network(xt, t)[1]
            torch.testing.assert_close(
                ddpm.log_variance(t, s, fraction), expected.log_variance(t, s).expand(xt.shape)
            )
        for a, b in zip(ddpm.p_mean_variance(xt, t), expected.p_mean_variance(xt, t)):
            torch.testing.assert_close(a, b.expand(xt.shape))
        a, b = (model.sample(3, steps=20, seed=1) for model in (ddpm, expected))
        torch.testing.assert_close(a, b)


def test_half_way_a_learned_variance_is_the_geometric_mean():
    ddpm, t = learned(0.0), torch.tensor([0, 1, 500, 999])
    small, large = (variance.exp() for variance in ddpm.log_variances(t, t - 1))
    _, variance, _ = ddpm.p_mean_variance(torch.zeros(4, 1, 8, 8), t)
    torch.testing.assert_close(variance, (small * large).sqrt().float().expand(4, 1, 8, 8))


def test_on_fewer_steps_the_variances_are_those_of_the_shorter_chain():
    ddpm, timesteps = gaussian(), torch.tensor([99, 299, 999])
    alpha_bar = ddpm.alphas_cumprod[timesteps]
    betas = 1 - alpha_bar / torch.cat([torch.ones(1), alpha_bar[:-1]])  # Improved DDPM sec. 4
    small, large = ddpm.log_variances(timesteps[1:], timesteps[:-1])
    torch.testing.assert_close(large.exp().flatten(), betas[1:])
    tilde = (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:]) * betas[1:]
    torch.testing.assert_close(small.exp().flatten(), tilde)


def test_at_the_first_timestep_the_small_variance_is_that_of_the_second():
    small, large = gaussian().log_variances(torch.tensor([0, 1]), torch.tensor([-1, 0]))
    assert small[0].item() == pytest.approx(small[1].item(), rel=1e-12)
    assert large.exp()[0].item() == pytest.approx(1e-4)
    t = torch.tensor([0, 1])
    fixed_large = gaussian(variance="fixed_large").log_variance(t, t - 1)
    assert fixed_large[0].item() == small[0].item() and fixed_large[1].item() == large[1].item()
    for place, expected in (
        (-1.0, small),
        (1.0, large),
    ):  # a learned one goes up to beta, at the first timestep too
        ddpm = learned(place)
        fraction = ddpm._network(torch.zeros(2, 1, 8, 8), t)[1]
        torch.testing.assert_close(
            ddpm.log_variance(t, t - 1, fraction), expected.expand(2, 1, 8, 8)
        )


def test_a_network_without_a_variance_is_refused_where_one_is_to_be_learned():
    with pytest.raises(
        ValueError, match=r"its output of shape \(1, 1, 8, 8\): expected \(1, 2, 8, 8\)"
    ) as error:
        DDPM(Oracle(), image_size=8, channels=1, variance="learned").sample(1, steps=1)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="out_channels 6: expected 3"):
        DDPM(
            UNet(base_channels=32, channel_mult=(1,), attention_resolutions=()), variance="learned"
        )


def test_guidance_leaves_the_variance_alone():
    class Told(torch.nn.Module):
        num_classes = 2

        def forward(self, xt, t, y=None):
            label = torch.full_like(t, 2) if y is None else y
            return label[:, None, None, None].float().expand(len(xt), 2, 8, 8) / 10

    ddpm = DDPM(Told(), image_size=8, channels=1, prediction="x0", variance="learned")
    xt, t, y = torch.zeros(2, 1, 8, 8), torch.tensor([5, 5]), torch.tensor([0, 1])
    x0, fraction = ddpm._network(xt, t, y, guidance_scale=3.0)
    assert x0[:, 0, 0, 0].tolist() == pytest.approx([0.2 + 3 * -0.2, 0.2 + 3 * -0.1])
    assert fraction[:, 0, 0, 0].tolist() == pytest.approx([0.5, 0.55])


# The decoder


def test_the_decoder_is_the_normal_distribution_on_levels():
    mean, std = torch.tensor([-1.3, -1.0, 0.123, 0.999])[:, None].double(), 0.02
    log_p = discrete_log_likelihood(
        LEVELS.expand(4, 256), mean, torch.tensor(2 * math.log(std), dtype=torch.float64)
    )
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(4).double())
    upper, lower = (
        torch.special.ndtr((LEVELS + half - mean) / std) for half in (1 / 255, -1 / 255)
    )
    upper[:, -1], lower[:, 0] = 1, 0
    torch.testing.assert_close(log_p.exp(), upper - lower, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("level", [0, 64, 255])
@pytest.mark.parametrize("deviations", [140, 300, 2000])
def test_the_decoder_and_its_gradients_are_exact_where_float32_has_no_probability_left(
    level, deviations
):
    x0 = torch.tensor([level / 127.5 - 1])
    mean = torch.tensor([0.9 if level < 128 else -0.9], requires_grad=True)
    sign = mean.sign().item()
    near = abs(mean.item() - x0.item()) - 1 / 255  # the near edge decides
    log_variance = torch.tensor([2 * math.log(near / deviations)], requires_grad=True)
    std = math.exp(log_variance.item() / 2)
    z = near / std
    log_p = discrete_log_likelihood(x0, mean, log_variance)
    assert (
        log_p.dtype == torch.float32
    )  # and its value -z^2 / 2 - log(z sqrt(2 pi)) + log(1 - 1 / z^2 + 3 / z^4)
    assert log_p.item() == pytest.approx(
        -(z**2) / 2 - math.log(z * math.sqrt(2 * math.pi)) + math.log1p(-1 / z**2 + 3 / z**4),
        rel=1e-6,
    )
    log_p.sum().backward()
    assert mean.grad.item() == pytest.approx(-sign * (z + 1 / z - 2 / z**3) / std, rel=1e-5)
    assert log_variance.grad.item() == pytest.approx((z**2 + 1 - 2 / z**2) / 2, rel=1e-5)


def test_the_decoders_gradients_are_those_of_finite_differences():
    x0 = LEVELS[::15]
    mean = (
        x0 + 0.01 * torch.randn(18, generator=torch.Generator().manual_seed(0))
    ).requires_grad_()
    log_variance = torch.linspace(-11, -2, 18).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *of: discrete_log_likelihood(x0, *of), (mean, log_variance)
    )
    exact = discrete_log_likelihood(x0, mean, log_variance).detach().float()
    torch.testing.assert_close(
        discrete_log_likelihood(*(a.float() for a in (x0, mean, log_variance))),
        exact,
        rtol=2e-5,
        atol=2e-5,
    )


# The bound


def test_the_bound_comes_down_to_the_entropy_as_steps_grow():
    x0 = pixels(300)
    entropy = entropy_of(x0)
    assert entropy == pytest.approx(
        math.log2(STD * math.sqrt(2 * math.pi * math.e)) - math.log2(2 / 255), abs=0.02
    )
    gaps = []
    for num_timesteps in (20, 100, 1000):
        bits = gaussian(num_timesteps=num_timesteps, variance="fixed_large").bits_per_dim(
            x0, seed=1, batch_size=300, terms=min(num_timesteps, 300)
        )
        gaps.append(bits.total - entropy)
        assert gaps[-1] > -4 * 0.01  # the noise of the estimate; below the entropy there is nothing
    assert gaps[0] > 0.9 and gaps[1] < 0.35 and 0.01 < gaps[2] < 0.15, (
        gaps
    )  # the decoder takes the small variance
    best = learned(0.95).bits_per_dim(
        x0, seed=1, batch_size=300, terms=100
    )  # the true variance lies near beta
    assert -0.04 < best.total - entropy < 0.1


def test_the_bound_is_the_sum_of_its_parts_and_the_curve_of_their_sums():
    x0 = pixels(100)
    ddpm = gaussian(num_timesteps=50)
    bits = ddpm.bits_per_dim(x0, seed=1)
    assert bits.total == pytest.approx(bits.prior + bits.kl + bits.decoder, rel=1e-9)
    a = ddpm.alphas_cumprod[-1].item()
    prior = (a * x0.square().mean().item() + (1 - a) - 1 - math.log(1 - a)) / 2 / math.log(2)
    assert bits.prior == pytest.approx(prior, rel=1e-3, abs=1e-12)
    assert bits.rate.shape == bits.rmse.shape == (50,)
    assert bits.rate[0].item() == bits.prior and bits.rate[-1].item() == pytest.approx(
        bits.prior + bits.kl
    )
    assert (bits.rate.diff() >= 0).all()
    for i, t in ((0, 49), (25, 24), (49, 0)):  # the best guess is off by the posterior deviation
        a = ddpm.alphas_cumprod[t].item()
        deviation = STD * math.sqrt((1 - a) / (a * STD**2 + 1 - a))
        assert bits.rmse[i].item() == pytest.approx(127.5 * deviation, rel=0.04)


def test_a_chain_of_one_and_of_two_steps_by_hand():
    x0 = pixels(400)
    for num_timesteps in (1, 2):
        ddpm = gaussian(num_timesteps=num_timesteps)
        a = ddpm.alphas_cumprod.tolist()
        generator = torch.Generator().manual_seed(3)
        terms = []
        for t in reversed(range(num_timesteps)):
            torch.randint(t, t + 1, (400,), generator=generator)
            xt = math.sqrt(a[t]) * x0.double() + math.sqrt(1 - a[t]) * torch.randn(
                x0.shape, generator=generator
            )
            guess = ddpm.network(xt, torch.full((400,), t))
            guess = (xt - math.sqrt(1 - a[t]) * guess) / math.sqrt(a[t])
            if t == 1:
                snr = [b / (1 - b) for b in a]
                terms.append(
                    (snr[0] - snr[1]) / 2 * (x0 - guess).square().mean().item()
                )  # KL at one variance
            else:
                b = ddpm.betas.tolist()
                std = math.sqrt(b[0] if num_timesteps == 1 else b[0] * b[1] / (1 - a[1]))
                edges = [(x0 + sign / 255 - guess) / std for sign in (1, -1)]
                p = torch.special.ndtr(edges[0]) - torch.special.ndtr(edges[1])
                terms.append(-p.log().mean().item())
        bits = ddpm.bits_per_dim(x0, seed=3, batch_size=400)
        assert bits.kl + bits.decoder == pytest.approx(sum(terms) / math.log(2), rel=2e-3)
        assert bits.kl == pytest.approx(sum(terms[:-1]) / math.log(2), rel=2e-3)


def test_fewer_terms_estimate_the_same_bound_and_know_their_error():
    ddpm, x0 = gaussian(num_timesteps=200, variance="fixed_large"), pixels(60)
    whole = (
        torch.tensor([ddpm.bits_per_dim(x0, seed=seed).total for seed in range(1, 6)]).mean().item()
    )
    some = [ddpm.bits_per_dim(x0, terms=6, seed=seed) for seed in range(1, 61)]
    totals = torch.tensor([bits.total for bits in some])
    stated = torch.tensor([bits.standard_error for bits in some]).mean().item()
    assert totals.mean().item() == pytest.approx(whole, abs=4 * totals.std().item() / math.sqrt(60))
    # Stated is over images too, which are the same here: an upper end of the spread over noise and timesteps.
    assert 0.7 * stated < totals.std().item() < 1.3 * stated
    assert len(some[0].rate) == 6 and math.isnan(ddpm.bits_per_dim(x0[:1], terms=2).standard_error)
    for terms in (0, 1, 201):
        with pytest.raises(ValueError, match=f"terms {terms}: expected from 2 to 200"):
            ddpm.bits_per_dim(x0, terms=terms)


def test_the_bound_uses_labels_and_goes_in_batches_that_do_not_matter():
    ddpm, y = gaussian(means=(-0.4, MEAN), num_timesteps=50), torch.ones(40, dtype=torch.long)
    x0 = pixels(40)
    right, wrong = (ddpm.bits_per_dim(x0, y=labels, seed=1) for labels in (y, 0 * y))
    assert right.total < wrong.total - 1
    split = ddpm.bits_per_dim(x0, y, seed=1, batch_size=7)
    assert (
        split.total == pytest.approx(right.total, abs=4 * right.standard_error)
        and ddpm.network.largest == 40
    )


def test_the_bound_takes_one_label_for_all_and_gives_tensors_to_compute_with():
    ddpm, x0 = gaussian(means=(-0.4, MEAN), num_timesteps=5), pixels(4)
    one, many = (ddpm.bits_per_dim(x0, y, seed=1) for y in (1, [1] * 4))
    assert one.total == many.total
    factor = torch.ones(5, dtype=torch.float64, requires_grad=True)
    (factor * one.rate + factor * one.rmse).sum().backward()
    torch.testing.assert_close(factor.grad, one.rate + one.rmse)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(y=[0, 1]), "y of 2 labels: expected 3, one an image"),
        (dict(y=[0, 1, 2]), "y from 0 to 2: expected labels"),
        (dict(y=-1), "y from -1 to -1: expected labels from 0 to 1"),
        (dict(y=[0.5, 1, 1]), "y of torch.float32"),
        (dict(batch_size=0), "batch_size 0: expected at least 1"),
        (dict(batch_size=-1), "batch_size -1"),
        (dict(x0=torch.zeros(0, 1, 8, 8)), "x0 of 0 images: expected at least 1"),
    ],
)
def test_a_bound_of_what_does_not_fit_is_one_clear_line(arguments, words):
    with pytest.raises(ValueError, match=words) as error:
        gaussian(means=(-0.4, MEAN), num_timesteps=5).bits_per_dim(**dict(x0=pixels(3)) | arguments)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="y: this model is unconditional"):
        gaussian(num_timesteps=5).bits_per_dim(pixels(3), 1)


# Losses


def test_the_vlb_loss_is_on_average_the_bound():
    ddpm, x0 = gaussian(num_timesteps=20, loss="vlb"), pixels(400)
    bits = ddpm.bits_per_dim(x0, seed=1)
    torch.manual_seed(2)  # not the images' own seed
    losses = [ddpm(x0, t=torch.full((400,), t)).item() for t in range(20)]
    assert sum(losses) / 20 == pytest.approx(bits.kl + bits.decoder, rel=0.01)


@pytest.mark.parametrize("loss", ["mse", "l1"])
def test_the_hybrid_loss_moves_the_mean_by_the_simple_loss_alone_and_the_variance_by_the_bound(
    loss,
):
    torch.manual_seed(0)
    output = torch.randn(6, 2, 8, 8).mul(0.3).requires_grad_()
    network = torch.nn.Identity()
    network.forward = lambda xt, t, y=None: output
    t, x0, eps = torch.tensor([0, 1, 10, 300, 700, 999]), pixels(6), torch.randn(6, 1, 8, 8)

    def losses(**settings):
        return DDPM(network, image_size=8, channels=1, **settings)(
            x0, t=t, eps=eps, reduction="none"
        )

    simple_network = copy.copy(network)
    simple_network.forward = lambda xt, t, y=None: output[:, :1]
    simple = DDPM(simple_network, image_size=8, channels=1, loss=loss)(
        x0, t=t, eps=eps, reduction="none"
    )
    hybrid, bound = losses(loss=loss, variance="learned"), losses(loss="vlb", variance="learned")
    torch.testing.assert_close(hybrid, simple + VLB_WEIGHT * bound)
    gradients = [
        torch.autograd.grad(value.sum(), output, retain_graph=True)[0]
        for value in (simple, hybrid, bound)
    ]
    torch.testing.assert_close(gradients[1][:, :1], gradients[0][:, :1], rtol=0, atol=0)
    torch.testing.assert_close(gradients[1][:, 1:], VLB_WEIGHT * gradients[2][:, 1:])
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert (gradients[1][:, 1:].flatten(1).abs().sum(1) > 0).all() and gradients[2][
        :, :1
    ].abs().sum() > 0


def test_min_snr_weighs_the_error_of_x0_alike_whatever_is_predicted():
    torch.manual_seed(0)
    t, x0, eps = torch.tensor([20, 200, 400, 999]), torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
    guess = x0 + 0.1 * torch.randn(4, 1, 8, 8)
    for prediction in ("x0", "eps", "v"):
        ddpm = DDPM(
            torch.nn.Identity(), image_size=8, channels=1, prediction=prediction, min_snr_gamma=5.0
        )
        a = ddpm.alphas_cumprod[t][:, None, None, None].float()
        xt = ddpm.q_sample(x0, t, eps)
        noise = (xt - a.sqrt() * guess) / (1 - a).sqrt()
        said = {"x0": guess, "eps": noise, "v": a.sqrt() * noise - (1 - a).sqrt() * guess}[
            prediction
        ]
        ddpm.network.forward = lambda xt, t, y=None, said=said: said
        snr = (a / (1 - a)).flatten()
        assert snr[0] > 5 > snr[1]
        expected = snr.clamp(max=5) * (x0 - guess).square().mean((1, 2, 3))
        torch.testing.assert_close(
            ddpm(x0, t=t, eps=eps, reduction="none"), expected, rtol=2e-3, atol=1e-7
        )
    for settings in (dict(min_snr_gamma=-1.0), dict(min_snr_gamma=5.0, loss="vlb")):
        with pytest.raises(ValueError, match="min_snr_gamma"):
            DDPM(torch.nn.Identity(), **settings)


def test_zero_terminal_snr_ends_in_noise_begins_as_before_and_is_refused_for_eps():
    for schedule in ("linear", "cosine"):
        plain = torch.cumprod(1 - make_betas(schedule, 1000), 0)
        ddpm = gaussian("v", beta_schedule=schedule, zero_terminal_snr=True)
        assert (
            ddpm.alphas_cumprod[-1] == 0
            and ddpm.betas[-1] == 1
            and (ddpm.alphas_cumprod.diff() < 0).all()
        )
        assert ddpm.alphas_cumprod[0].item() == pytest.approx(plain[0].item(), rel=1e-9)
        t = torch.full((2,), 999)
        for prediction in ("v", "x0"):
            ddpm = gaussian(prediction, beta_schedule=schedule, zero_terminal_snr=True)
            assert torch.isfinite(ddpm(pixels(2), t=t))
            assert torch.isfinite(ddpm.predict(torch.randn(2, 1, 8, 8), t)[1]).all()
            with pytest.raises(
                ValueError, match="min_snr_gamma 5.0 with zero_terminal_snr"
            ):  # weight 0 at t = 999
                gaussian(
                    prediction, beta_schedule=schedule, zero_terminal_snr=True, min_snr_gamma=5.0
                )
    with pytest.raises(ValueError, match="zero_terminal_snr with prediction 'eps'"):
        gaussian("eps", zero_terminal_snr=True)
    with pytest.raises(ValueError, match="num_timesteps 1: expected at least 2"):
        make_betas("linear", 1, zero_terminal_snr=True)


def test_a_short_hybrid_run_lowers_the_bound_and_leaves_the_simple_loss():
    """Stripes of random brightness: the same network and batches, with fixed and with learned variances."""

    def stripes(n, seed):
        generator = torch.Generator().manual_seed(seed)
        grey = (
            torch.randint(40, 216, (n, 1, 1, 4), generator=generator)
            .repeat_interleave(4, 3)
            .expand(n, 1, 16, 16)
        )
        return (grey + torch.randint(-8, 9, (n, 1, 16, 16), generator=generator)) / 127.5 - 1

    bounds, simple = {}, {}
    held_out, t = stripes(50, 1), torch.arange(50) * 20 + 5
    eps = torch.randn(held_out.shape, generator=torch.Generator().manual_seed(2))
    for variance in ("fixed_small", "learned"):
        torch.manual_seed(0)
        ddpm = DDPM(
            UNet(
                image_size=16,
                channels=1,
                base_channels=32,
                channel_mult=(1,),
                num_res_blocks=1,
                attention_resolutions=(),
                time_emb_dim=64,
                patch_size=2,
                out_channels=2 if variance == "learned" else 1,
            ),
            image_size=16,
            channels=1,
            beta_schedule="cosine",
            prediction="v",
            variance=variance,
        )
        optimizer = torch.optim.Adam(ddpm.parameters(), 2e-3)
        for step in range(60):
            torch.manual_seed(step)
            optimizer.zero_grad()
            ddpm(stripes(16, 100 + step)).backward()
            optimizer.step()
        ddpm.eval()
        with torch.no_grad():
            said, _ = ddpm._network(ddpm.q_sample(held_out, t, eps), t)
            simple[variance] = (said - ddpm.target(held_out, eps, t)).square().mean().item()
        bounds[variance] = ddpm.bits_per_dim(held_out, terms=20, seed=0).total
    for parameter in ddpm.network.conv_out.parameters():
        parameter.data[4:] = 0  # the variance goes back to where it began, half way
    bounds["half way"] = ddpm.bits_per_dim(held_out, terms=20, seed=0).total
    assert bounds["learned"] < bounds["half way"] < bounds["fixed_small"], bounds
    assert simple["learned"] < 1.02 * simple["fixed_small"], simple


def test_a_learned_variance_finds_the_true_one_and_bounds_better_than_either_fixed_one():
    """The exact mean, and a place of the variance for each timestep, learned by the hybrid loss."""

    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network, self.places = Oracle(num_timesteps=20), torch.nn.Embedding(20, 1)

        def forward(self, xt, t, y=None):
            output = self.network(xt, t)
            return torch.cat([output, self.places(t)[:, :, None, None].expand(output.shape)], dim=1)

    torch.manual_seed(0)
    ddpm = DDPM(Head(), image_size=8, channels=1, num_timesteps=20, variance="learned")
    torch.nn.init.zeros_(ddpm.network.places.weight)
    optimizer = torch.optim.Adam(ddpm.parameters(), 0.05)
    for step in range(200):
        optimizer.zero_grad()
        ddpm(pixels(64, seed=step)).backward()
        optimizer.step()

    t = torch.arange(1, 20)  # the decoder's has no closed form
    small, large = (log_variance.flatten() for log_variance in ddpm.log_variances(t, t - 1))
    a, before = ddpm.alphas_cumprod[t], ddpm.alphas_cumprod[t - 1]
    of_x0 = STD**2 * (1 - a) / (a * STD**2 + 1 - a)  # variance of x_0 given x_t
    true = small.exp() + (before.sqrt() * large.exp() / (1 - a)) ** 2 * of_x0
    learned_log_variance = small + (large - small) * (ddpm.network.places.weight[1:, 0] + 1) / 2
    torch.testing.assert_close(learned_log_variance, true.log(), rtol=0, atol=0.1)

    x0 = pixels(100, seed=1000)
    fixed = [
        gaussian(num_timesteps=20, variance=variance) for variance in ("fixed_small", "fixed_large")
    ]
    bits, of_small, of_large = (model.bits_per_dim(x0, seed=1).total for model in (ddpm, *fixed))
    by_hand = [
        ((true.log() - log_variance).expm1() - (true.log() - log_variance)).sum().item()
        / 2
        / math.log(2)
        for log_variance in (small, large)
    ]
    assert by_hand == pytest.approx(
        [0.467, 0.969], abs=1e-3
    )  # bits a dimension lost in the KL terms
    assert bits < of_small - 0.4 and bits < of_large - 0.9, (bits, of_small, of_large)
