"""The Gaussian process without DDPM around it: as a student uses it, with a network and a loop of their own."""

from itertools import pairwise

import pytest
import torch
from test_diffusion import final_moments

from process import GaussianProcess


def test_a_network_of_ones_own_trains_and_samples_in_ten_lines():
    """One-pixel images N(0.3, 0.1^2), and a straight line from x_t to the prediction for each timestep: it is exact."""
    torch.manual_seed(0)
    process = GaussianProcess(20)
    network = torch.nn.Embedding(20, 2)
    optimizer = torch.optim.Adam(network.parameters(), 0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)

    def predict(xt, t):
        slope, offset = network(t).T[..., None, None, None]
        return slope * xt + offset

    for _ in range(1500):
        x0, eps = 0.3 + 0.1 * torch.randn(4000, 1, 1, 1), torch.randn(4000, 1, 1, 1)
        t = torch.randint(20, (4000,))
        loss = (
            (predict(process.q_sample(x0, t, eps), t) - process.target(x0, eps, t)).square().mean()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    xt = torch.randn(20_000, 1, 1, 1)
    with torch.no_grad():
        for i, j in pairwise([*process.timesteps(20), -1]):
            t, s = torch.full((20_000,), i), torch.full((20_000,), j)
            x0 = process.x0_from_output(predict(xt, t), xt, t)
            xt = process.step(
                x0, process.eps_from_x0(x0, xt, t), t, s, eta=1.0, noise=torch.randn(xt.shape)
            )
    mean, variance = final_moments(process.timesteps(20), process, 1.0)  # of the exact network
    assert mean == pytest.approx(0.3, abs=0.01)
    assert xt.mean().item() == pytest.approx(mean, abs=0.005)
    assert xt.std().item() == pytest.approx(variance**0.5, rel=0.1)


def test_its_step_is_the_mean_and_the_variance_of_the_posterior():
    process, t = GaussianProcess(), torch.tensor([700])
    x0, xt, noise = torch.randn(3, 1, 3, 8, 8)
    mean, variance = process.q_posterior(x0, xt, t)
    step = process.step(x0, process.eps_from_x0(x0, xt, t), t, t - 1, eta=1.0, noise=noise)
    torch.testing.assert_close(step, mean + variance.sqrt() * noise)


def test_its_tables_are_float64_follow_the_device_and_are_not_saved():
    process = GaussianProcess()
    assert (
        process.betas.dtype == process.alphas_cumprod.dtype == torch.float64
        and process.state_dict() == {}
    )
    assert process.to("meta").device.type == "meta"
