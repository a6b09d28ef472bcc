"""DDPM: the loss, the network inside, `sample` and its relatives, wrapped networks, save and load.

Closed forms of the samplers stand in test_process.py, refusals in test_bad_input.py.
"""

import numpy as np
import pytest
import torch
from tiny import MEAN, STD, gaussian, refused, same, tiny_ddpm, tiny_unet, truth

from diffusion import DDPM, SAMPLERS, SETTINGS
from likelihood import bound_term
from process import PREDICTIONS
from unet import UNet


class Own(torch.nn.Module):
    """A network of one's own: any function of (xt, t, y). It notes what it is called with."""

    def __init__(self, function, num_classes=None):
        super().__init__()
        self.function, self.num_classes, self.calls = function, num_classes, []

    def forward(self, xt, t, y):
        self.calls.append((xt, t, y))
        return self.function(xt, t, y)

    def labels(self):
        """The labels of each call."""
        return [y.tolist() for _, _, y in self.calls]  # None has no tolist


def own(function=lambda xt, t, y: 0 * xt, num_classes=None, **settings):
    """A DDPM of 4x4 images, whose network is a function; by default it says 0."""
    settings = dict(image_size=4) | settings
    return tiny_ddpm(network=Own(function, num_classes), **settings)


def batch(n=4, size=4, seed=0, channels=1):
    """Images and noise, (n, channels, size, size)."""
    return torch.randn(2, n, channels, size, size, generator=torch.Generator().manual_seed(seed))


# The loss


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_is_the_mean_error_from_what_should_be_predicted(prediction):
    ddpm = own(prediction=prediction, num_timesteps=1000)
    (x0, eps), t = batch(), torch.tensor([0, 10, 500, 999])
    a = ddpm.alphas_cumprod[t].view(-1, 1, 1, 1).float()
    true = truth(prediction, a, x0, eps)
    torch.testing.assert_close(ddpm.losses(x0, None, t, eps), true.square().mean((1, 2, 3)))
    ddpm.min_snr_gamma = 5.0
    expected = true.square().mean((1, 2, 3)) * ddpm.min_snr_weight(t, 5.0).float()
    torch.testing.assert_close(ddpm.losses(x0, None, t, eps), expected)
    ddpm.loss, ddpm.min_snr_gamma = "l1", 0.0
    torch.testing.assert_close(ddpm.losses(x0, None, t, eps), true.abs().mean((1, 2, 3)))
    ddpm.network.function = lambda xt, t, y: true
    assert ddpm.losses(x0, None, t, eps).max() < 1e-6
    xt = ddpm.network.calls[0][0]  # DDPM eq. 4
    torch.testing.assert_close(xt, a.sqrt() * x0 + (1 - a).sqrt() * eps, rtol=0, atol=1e-3)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_exact_predictor_reaches_the_least_possible_loss(prediction):
    """For pixels N(MEAN, STD^2) its error is the posterior variance, in units of the prediction."""
    ddpm, (x0, eps), t = gaussian(prediction=prediction), batch(4000), 400
    a = ddpm.alphas_cumprod[t].item()
    unit = {"x0": 1.0, "eps": a / (1 - a), "v": 1 / (1 - a)}[prediction]
    loss = ddpm.losses(MEAN + STD * x0, None, torch.full((4000,), t), eps).mean().item()
    assert loss == pytest.approx(unit * STD**2 * (1 - a) / (a * STD**2 + 1 - a), rel=0.02)


@pytest.mark.parametrize("loss", ["mse", "l1"])
def test_the_hybrid_loss_moves_the_mean_as_the_simple_loss_and_the_variance_as_the_bound(loss):
    output = 0.3 * torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    output.requires_grad_()
    (x0, eps), t = batch(6), torch.tensor([0, 1, 10, 300, 700, 999])

    def losses_and_gradient(outputs, **settings):
        ddpm = own(lambda xt, t, y: output[:, :outputs], num_timesteps=1000, **settings)
        losses = ddpm.losses(x0.clamp(-1, 1), None, t, eps)
        return losses.detach(), torch.autograd.grad(losses.sum(), output)[0]

    simple, of_simple = losses_and_gradient(1, loss=loss)
    hybrid, of_hybrid = losses_and_gradient(2, loss=loss, variance="learned")
    bound, of_bound = losses_and_gradient(2, loss="vlb", variance="learned")
    torch.testing.assert_close(hybrid, simple + 0.001 * bound)
    assert torch.equal(of_hybrid[:, :1], of_simple[:, :1])
    torch.testing.assert_close(of_hybrid[:, 1:], 0.001 * of_bound[:, 1:])
    assert (of_bound.flatten(2).abs().sum(2) > 0).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sign", [1, -1], ids=["right", "wrong"])
def test_the_clipped_bound_clips_as_bits_per_dim_does_and_mends_a_wrong_black(sign, prediction):
    (x0, eps), t = batch(), torch.arange(4)
    x0 = x0.sign()  # black or white; the prediction goes beyond that, or beyond the opposite
    ddpm = own(lambda *_: output, prediction=prediction, loss="clipped-vlb")
    xt, beyond = ddpm.q_sample(x0, t, eps), 1.5 * sign * x0
    output = ddpm.target(beyond, ddpm.eps_from_x0(beyond, xt, t), t).requires_grad_()
    losses = ddpm.losses(x0, None, t, eps)
    expected = 10 * bound_term(ddpm, x0, xt, t, sign * x0)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    moves = torch.autograd.grad(losses.sum(), output)[0].abs() > 1e-3
    assert moves.all() if sign < 0 else not moves.any()


# two labels, then two clusters of each, of which one is empty
OF_CLUSTERS = dict(num_classes=6, class_shares=[[0, 0.5], [0.1, 0.4]])


@pytest.mark.parametrize(
    "prediction, labelled, channels", [("eps", True, 1), ("v", True, 3), ("x0", False, 1)]
)
def test_an_averaged_target_is_the_likely_mean_of_candidates(prediction, labelled, channels):
    """Those of the image's own cluster, of any of its label, or all if it has none of them."""
    settings = OF_CLUSTERS if labelled else {}
    ddpm = own(prediction=prediction, channels=channels, **settings)
    (x0, eps), (images, _) = batch(6, channels=channels), batch(8, seed=1)
    x0 = x0[:, :1].expand_as(x0)  # grey, if it has three channels
    t, every = torch.arange(6), torch.cat([x0[:, :1], images])
    y = torch.tensor([0, 1, 2, 4, 5, 6])
    clusters = torch.arange(len(every)) % 4 + 2
    meant = {0: [2, 3], 1: [4, 5], 2: [2], 4: [4], 5: [5], 6: [2, 3, 4, 5]}  # 6 is 'no label'
    allowed = torch.tensor([[k in meant[i] for k in clusters.tolist()] for i in y.tolist()])
    a, xt = ddpm.alphas_cumprod[t][:, None, None, None], ddpm.q_sample(x0, t, eps)
    mean = ddpm.posterior_mean(xt, t, every, allowed=allowed if labelled else None)
    target = truth(prediction, a, mean, (xt - a.sqrt() * mean) / (1 - a).sqrt())
    candidates = (x0[:, :1], images), clusters if labelled else None
    with torch.autocast("cpu", torch.bfloat16):  # as in a training step
        losses = ddpm.losses(x0, y if labelled else None, t, eps, candidates)
    expected = target.square().mean((1, 2, 3)).float()
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-5)
    plain = ddpm.losses(x0, y if labelled else None, t, eps)
    assert not torch.allclose(losses, plain, rtol=0.01)


def test_training_minimises_the_mean_of_the_losses_at_random_timesteps_and_noise():
    ddpm, (x0, _) = tiny_ddpm(), batch(4, size=8)
    torch.manual_seed(3)
    loss = ddpm(x0)
    torch.manual_seed(3)
    t, eps = torch.randint(10, (4,)), torch.randn(4, 1, 8, 8)
    assert loss.shape == () and torch.equal(loss, ddpm.losses(x0, None, t, eps).mean())
    loss.backward()
    assert all(parameter.grad is not None for parameter in ddpm.parameters())


def test_labels_are_dropped_in_training_as_often_as_the_setting_says_and_never_else():
    torch.manual_seed(0)
    x0, y = torch.zeros(4000, 1, 4, 4), torch.arange(4000) % 10
    for label_dropout in (0.0, 0.1, 1.0):
        ddpm = own(num_classes=10, label_dropout=label_dropout).train()
        ddpm(x0, y)
        seen = ddpm.network.calls[0][2]
        dropped = seen == 10
        assert dropped.float().mean().item() == pytest.approx(label_dropout, abs=0.02)
        assert torch.equal(seen[~dropped], y[~dropped])
    assert DDPM(Own(None)).label_dropout == 0.1  # 2207.12598
    ddpm.eval()(x0, y)
    assert torch.equal(ddpm.network.calls[1][2], y)
    ddpm.train()(x0[:2])
    assert ddpm.network.labels()[2] == [10, 10]


# The network


def test_x0_is_clipped_and_in_float32_and_eps_explains_x_t_with_it():
    """Under bf16 and channels-last too, and in one layout: torch.compile makes a graph for each."""

    def network(xt, t, y):
        return (0 * xt - 7).to(torch.bfloat16, memory_format=torch.channels_last)

    ddpm = own(network, channels=3, prediction="x0")
    (xt, _), t = batch(2, channels=3), torch.tensor([5, 5])
    x0, eps = ddpm.predict(xt, t)
    assert (x0 == -1).all() and x0.is_contiguous()
    torch.testing.assert_close(ddpm.q_sample(x0, t, eps), xt)  # of the same precision


@pytest.mark.parametrize(
    "scale, expected", [(0, [0.3, 0.3]), (0.5, [0.2, 0.25]), (1.0, [0.1, 0.2]), (3.0, [-0.3, 0.0])]
)
def test_guidance_is_uncond_plus_s_times_the_difference_but_not_of_a_variance(scale, expected):
    def network(xt, t, y):  # 0.1, 0.2, ..., as y is 0, 1, ...
        return (y / 10 + 0.1)[:, None, None, None].expand(-1, 2, 4, 4)

    ddpm = own(network, num_classes=2, prediction="x0", variance="learned")
    xt, t, y = torch.zeros(2, 1, 4, 4), torch.tensor([5, 5]), torch.tensor([0, 1])
    x0, eps, fraction = ddpm.denoise(xt, t, y, scale)
    assert x0[:, 0, 0, 0].tolist() == pytest.approx(expected)
    place = [0.3, 0.3] if scale == 0 else [0.1, 0.2]
    assert fraction[:, 0, 0, 0].tolist() == pytest.approx([(p + 1) / 2 for p in place])
    assert ddpm.network.labels() == [{0: [2, 2], 1: [0, 1]}.get(scale, [0, 1, 2, 2])]  # one batch
    assert same(ddpm.predict(xt, t, [0, 1], scale), (x0, eps))


def test_without_a_network_it_is_a_unet_that_fits(monkeypatch):
    monkeypatch.setattr("diffusion.UNet", lambda **settings: tiny_unet(**settings))
    ddpm = DDPM(image_size=16, channels=3, variance="learned", num_timesteps=4)
    assert ddpm.network.config["out_channels"] == 6
    assert ddpm.sample(2).shape == (2, 3, 16, 16)


# Samplers and their arguments


def test_what_is_left_out_comes_from_the_models_settings():
    settings = dict(sampler="dpm++", sample_steps=4, guidance_scale=2.0)
    ddpm = own(num_classes=2, timestep_spacing="linspace", **settings)
    images = ddpm.sample(2, y=[0, 1], seed=0)
    assert [t[0].item() for _, t, _ in ddpm.network.calls] == [9, 6, 3, 0]
    assert ddpm.network.labels() == [[0, 1, 2, 2]] * 4
    ddpm.sampler = "ddpm"
    assert torch.equal(images, ddpm.sample(2, y=[0, 1], seed=0, sampler="dpm++"))
    assert not torch.equal(images, ddpm.sample(2, y=[0, 1], seed=0))
    ddpm = own()
    ddpm.sample(1)
    assert [t.item() for _, t, _ in ddpm.network.calls] == list(range(9, -1, -1))  # all of them


def test_a_chain_can_start_anywhere():
    ddpm, (xT, _) = own(num_timesteps=1000, sample_steps=500), batch(2)
    calls = ddpm.network.calls
    ddpm.sample(2, xT=xT, start=97)  # the same share of the steps: 49 of 98
    assert [t[0].item() for _, t, _ in calls] == list(range(97, -1, -2))
    assert torch.equal(calls[0][0], xT)
    calls.clear()
    ddpm.sample(2, xT=xT.double(), start=4, steps=5)
    assert [t.tolist() for _, t, _ in calls] == [[4, 4], [3, 3], [2, 2], [1, 1], [0, 0]]
    assert calls[0][0].dtype == torch.float32
    calls.clear()
    ddpm.sample(2, xT=xT, start=0)
    assert len(calls) == 1  # at least one step


def test_the_sequence_is_every_predicted_x0_or_every_noisy_image_and_ends_in_the_image():
    # a network that tells when it was asked
    ddpm = own(lambda xt, t, y: (t / 10)[:, None, None, None].expand_as(xt), prediction="x0")
    for sampler in SAMPLERS:
        options = dict(sampler=sampler, steps=5, seed=0)
        images = ddpm.sample(3, **options)
        predicted = ddpm.sample(3, return_sequence=True, **options)
        assert predicted.shape == (5, 3, 1, 4, 4) and torch.equal(predicted[-1], images)
        assert predicted[:, 0, 0, 0, 0].tolist() == pytest.approx([0.9, 0.7, 0.5, 0.3, 0.1])
        ddpm.network.calls.clear()
        noisy = ddpm.sample(3, return_sequence="xt", **options)
        inputs = torch.stack([xt for xt, _, _ in ddpm.network.calls])
        assert torch.equal(noisy[:-1], inputs[1:]) and torch.equal(noisy[-1], images)


def test_a_progress_bar_counts_the_network_calls_of_all_images(capsys):
    ddpm = own()
    ddpm.sample(3, steps=5)
    assert not capsys.readouterr().err
    ddpm.sample(3, steps=5, progress=True)
    assert "/15" in capsys.readouterr().err
    ddpm.bits_per_dim(torch.ones(3, 1, 4, 4), progress=True)
    assert "/1" in capsys.readouterr().err


# Seeds and batches


def test_a_seed_decides_the_images_and_leaves_the_global_state_alone():
    ddpm = tiny_ddpm()
    state = torch.get_rng_state()
    a, b, c = (ddpm.sample(3, steps=2, seed=seed) for seed in (1, np.int64(1), 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    first, second = ddpm.sample(3, steps=2), ddpm.sample(3, steps=2)
    torch.manual_seed(5)
    assert torch.equal(first, ddpm.sample(3, steps=2)) and not torch.equal(first, second)
    generator = torch.Generator().manual_seed(1)  # in the place of a seed; it goes on
    first, second = (ddpm.sample(3, steps=2, seed=generator) for _ in range(2))
    assert torch.equal(first, a) and not torch.equal(first, second)


@pytest.mark.parametrize(
    "call",
    [
        lambda ddpm, x: ddpm.sample(4, seed=3, steps=3, sampler="ddpm"),
        lambda ddpm, x: ddpm.interpolate(x, x, [0.5, 0.7], t=8, seed=3, steps=2, sampler="ddpm"),
        lambda ddpm, x: ddpm.bits_per_dim(x, seed=3, terms=5),
    ],
)
def test_no_noise_is_drawn_twice_from_a_seed(call, monkeypatch):
    drawn, randn = [], torch.randn

    def noted(*size, **options):
        drawn.append(randn(*size, **options))
        return drawn[-1]

    monkeypatch.setattr("diffusion.BATCH", 3)
    monkeypatch.setattr("torch.randn", noted)
    call(own(), torch.ones(4, 1, 4, 4))
    rows = torch.cat([noise.view(-1, 16) for noise in drawn])  # one an image
    assert len(rows) >= 8 and len(rows.unique(dim=0)) == len(rows)


def test_the_network_sees_at_most_256_images_at_once():
    ddpm = own()
    images = ddpm.sample(300, steps=2, sampler="ddpm")
    assert [len(xt) for xt, _, _ in ddpm.network.calls] == [256, 256, 44, 44]
    assert images.shape == (300, 1, 4, 4) and len(images.unique(dim=0)) == 300
    ddpm, y, x0 = own(num_classes=300), torch.arange(300), torch.ones(300, 1, 4, 4)
    x0[256:] = -1
    ddpm.bits_per_dim(x0, y, terms=2)
    assert ddpm.network.calls[-1][0].mean() < 0  # at t = 0, nearly the images
    assert ddpm.network.labels() == [part.tolist() for part in y.split(256) for _ in range(2)]


def test_batches_do_not_change_an_image_where_the_steps_draw_no_noise(monkeypatch):
    ddpm = tiny_ddpm(num_classes=3, prediction="x0")
    x0, other = batch(5, size=8)
    options = dict(sampler="dpm++", steps=3, seed=0, return_sequence=True, guidance_scale=2.0)

    def draw():
        mixed = ddpm.interpolate(x0, other, [0.2, 0.7], 7, y=1, **options)
        return [ddpm.sample(5, **options), ddpm.sample(5, [0, 1, 2, 1, 0], **options), mixed]

    whole = draw()
    monkeypatch.setattr("diffusion.BATCH", 2)
    for in_batches, at_once in zip(draw(), whole):
        torch.testing.assert_close(in_batches, at_once, rtol=0, atol=1e-4)


# Labels


@pytest.mark.parametrize(
    "y, expected",
    [
        ([0, 2], [0, 2]),
        (1, [1, 1]),
        (torch.tensor([2, 1], dtype=torch.uint8), [2, 1]),
        (np.arange(1, 3), [1, 2]),
        (None, [3, 3]),  # 'no label'
    ],
)
def test_labels_are_whole_numbers_of_any_kind_one_an_image_or_one_for_all(y, expected):
    ddpm, x0 = own(num_classes=3), torch.ones(2, 1, 4, 4)
    ddpm(x0, y)
    ddpm.predict(x0, torch.tensor([5, 5]), y)
    ddpm.bits_per_dim(x0, y, terms=2)
    ddpm.interpolate(x0, x0, [0.2, 0.8], 3, y, steps=1)
    assert ddpm.network.labels() == [expected] * 4 + [2 * expected]
    assert all(y.dtype == torch.int64 for _, _, y in ddpm.network.calls)


@pytest.mark.parametrize(
    "settings, y, expected",
    [
        (dict(num_classes=3), None, [1 / 3] * 3),
        (dict(num_classes=3, class_shares=[(0, 3, 1)]), None, [0, 0.75, 0.25]),
        (OF_CLUSTERS, None, [0, 0, 0, 0.5, 0.1, 0.4]),
        (OF_CLUSTERS, 0, [0, 0, 0, 1, 0, 0]),
        (OF_CLUSTERS, 1, [0, 0, 0, 0, 0.2, 0.8]),
    ],
)
def test_classes_are_drawn_by_their_shares(settings, y, expected):
    ddpm = own(**settings, image_size=1)
    ddpm.sample(4000, y, steps=1, seed=0)
    drawn = torch.cat([y for _, _, y in ddpm.network.calls]).bincount(minlength=len(expected))
    assert torch.allclose(drawn / 4000, torch.tensor(expected).float(), atol=0.03)
    assert (drawn == 0).tolist() == [share == 0 for share in expected]


def test_half_of_the_dropped_clusters_become_their_label():
    ddpm = own(**OF_CLUSTERS)
    assert (ddpm.num_labels, ddpm.label_of.tolist()) == (2, [0, 1, 0, 0, 1, 1, 6])
    refused(lambda: ddpm.sample(1, y=2), "y with values from 2 to 2: expected from 0 to 1")
    torch.manual_seed(0)
    drawn = ddpm.drop_labels(torch.full((9000,), 4)).bincount(minlength=7) / 9000
    assert torch.allclose(drawn, torch.tensor([0, 0.05, 0, 0, 0.9, 0, 0.05]), atol=0.01)
    assert (ddpm.drop_labels(torch.full((9,), 6)) == 6).all()  # 'no label' stays so


def test_the_skip_is_in_every_prediction_and_its_noise_in_the_loss():
    ddpm = own(lambda xt, t, y: 0 * xt + 0.5, prediction="x0", skip_std=0.2, clean_weight=0.3)
    (x0, eps), t = batch(2), torch.tensor([0, 5])
    xt, snr = ddpm.q_sample(x0, t, eps), ddpm.snr(t).float()
    expected = ddpm.with_skip(torch.full_like(xt, 0.5), xt, t)
    assert torch.equal(ddpm.predict(xt, t)[0], expected.clamp(-1, 1))
    error, clipped = expected - x0, expected.clamp(-1, 1) - x0
    true = (error**2 + 0.3 * snr * clipped**2).mean((1, 2, 3))
    torch.testing.assert_close(ddpm.losses(x0, None, t, eps), true)


def test_interpolation_mixes_two_noisy_images_and_denoises_the_mixture():
    ddpm, (a, b) = tiny_ddpm(), batch(2, size=8)
    options = dict(sampler="ddim", steps=3)
    images = ddpm.interpolate(a, b, torch.tensor([0.0, 0.25, 1.0]), t=6, seed=4, **options)
    generator, at = torch.Generator().manual_seed(4), torch.full((2,), 6)
    noise = torch.randn(2, 2, 1, 8, 8, generator=generator)
    xt, other = ddpm.q_sample(a, at, noise[0]), ddpm.q_sample(b, at, noise[1])
    assert images.shape == (3, 2, 1, 8, 8)
    for weight, mixed in zip((0.0, 0.25, 1.0), images):
        xT = (1 - weight) * xt + weight * other
        expected = ddpm.sample(2, xT=xT, start=6, **options)
        torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-4)
    sequence = ddpm.interpolate(a, b, [0.0, 0.25, 1.0], 6, seed=4, return_sequence=True, **options)
    assert sequence.shape == (3, 3, 2, 1, 8, 8)
    torch.testing.assert_close(sequence[-1], images)


def test_sampling_and_the_bound_are_without_dropout_and_gradients_and_leave_the_mode():
    ddpm, (x0, _) = tiny_ddpm(network=tiny_unet(dropout=0.9)), batch(2, size=8)

    def draw():
        bits = ddpm.bits_per_dim(x0.sign(), terms=2, seed=0)
        return [ddpm.sample(2, steps=2, seed=0), bits.rate, bits.rmse]

    expected = draw()
    ddpm.train()
    ddpm.network.middle.eval()  # a frozen part
    modes = [part.training for part in ddpm.modules()]
    assert same(found := draw(), expected)
    walk = ddpm.walk(x0, [9, 5, 1])
    found += next(walk)  # and whoever walks step by step can train between steps
    assert not any(value.requires_grad for value in found)
    assert [part.training for part in ddpm.modules()] == modes and torch.is_grad_enabled()


# Wrapped networks


def compiled_inside(network):
    network.middle[0] = torch.compile(network.middle[0], backend="eager")
    return network


WRAPPERS = {
    "compiled inside": compiled_inside,
    "both": lambda network: torch.compile(torch.nn.DataParallel(network), backend="eager"),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_network_is_saved_as_what_is_inside(tmp_path, wrap):
    def draw(ddpm):
        with torch.compiler.set_stance("force_eager"):  # wrapped, but not compiled
            return ddpm.sample(2, y=[0, 1], steps=2, seed=0)

    plain, path = tiny_unet(num_classes=3), tmp_path / "model.pt"
    expected = draw(tiny_ddpm(network=plain))
    ddpm = tiny_ddpm(network=wrap(plain))
    assert ddpm.num_classes == 3 and torch.equal(draw(ddpm), expected)
    ddpm.save(path)
    weights = torch.load(path, weights_only=True)["weights"]
    assert list(weights) == list(tiny_unet(num_classes=3).state_dict())
    for network in (None, wrap(UNet(**plain.config))):
        assert torch.equal(draw(DDPM.load(path, "cpu", network)), expected)


# Save and load


@pytest.mark.parametrize(
    "some",
    [
        dict(loss="mse", min_snr_gamma=np.float32(5), zero_terminal_snr=np.bool_(False)),
        dict(loss="l1", prediction="v", skip_std=0.0, zero_terminal_snr=True, variance="learned"),
    ],
)
def test_a_saved_model_comes_back_whole(tmp_path, some):
    settings = dict(num_timesteps=np.int64(50), beta_schedule="cosine", prediction="x0")
    settings |= dict(image_size=8, channels=1, timestep_spacing="linspace", variance="fixed_large")
    settings |= dict(skip_std=0.3, label_dropout=0.2, min_snr_gamma=0.0, sampler="ddim")
    settings["clean_weight"] = 0.0
    settings |= dict(sample_steps=4, guidance_scale=2.0, class_shares=[[1.0, 0.0, 2.0]]) | some
    info = {"epoch": 3, "config": {"epochs": 5, "channel_mult": (1, 2)}}
    ddpm = tiny_ddpm(num_classes=3, **settings)
    ddpm.save(tmp_path / "model.pt", **info)
    again = DDPM.load(tmp_path / "model.pt", device="cpu")
    assert not any(part.training for part in again.modules()) and again.info == info
    assert {name: getattr(again, name) for name in SETTINGS} == settings  # every one of them
    assert again.network.config == ddpm.network.config
    assert same(dict(again.state_dict()), dict(ddpm.state_dict()))
    assert torch.equal(again.sample(2, seed=0), ddpm.sample(2, seed=0))


class Changed(UNet):
    """A UNet that may compute something else with the same weights."""


def test_any_network_but_a_unet_is_given_to_load(tmp_path):
    network, path = Changed(**tiny_unet().config), tmp_path / "model.pt"
    tiny_ddpm(network=network).save(path)
    refused(lambda: DDPM.load(path, "cpu"), path, "no UNet", "give load() the network")
    again = DDPM.load(path, "cpu", other := Changed(**network.config))
    assert again.network is other and same(dict(other.state_dict()), dict(network.state_dict()))
    refused(lambda: DDPM.load(path, "cpu", torch.nn.Conv2d(3, 3, 1)), path, "another")


def test_an_output_of_another_shape_is_an_error_and_is_not_broadcast():
    ddpm = own(lambda xt, t, y: xt[:, :1], channels=3)
    for call in (ddpm, lambda x0: ddpm.sample(2, xT=x0, steps=1)):
        with pytest.raises(RuntimeError, match="shape"):
            call(torch.zeros(2, 3, 4, 4))
