"""The averaged weights: when the average begins, its law, changing places, going on exactly."""

import copy

import pytest
import torch
from tiny import same
from torch import nn

from ema import EMA


def module_at(value):
    module = nn.Linear(2, 1, bias=False)
    set_to(module, value)
    return module


def set_to(module, value):
    with torch.no_grad():
        module.weight.fill_(value)


def go(module, ema, values):
    """One step for each value of the weights. Returns the shadow after each."""
    shadows = []
    for value in values:
        set_to(module, value)
        ema.update()
        shadows.append(ema.state_dict()["shadow"]["weight"][0, 0].item())
    return shadows


@torch.no_grad()
def change(network):
    for value in (*network.parameters(), *network.buffers()):
        value += 1


def values(module):
    return [value.clone() for value in module.parameters()]


@pytest.mark.parametrize("start, update_rate", [(0, 1), (4, 3)])
def test_up_to_start_the_shadow_is_the_weights_then_its_decay_ramps_up(start, update_rate):
    module, decay, expected = module_at(1.0), 0.5, 1.0
    weights = [float(step**2 % 7) for step in range(1, 41)]
    shadows = go(module, EMA(module, decay, start, update_rate), weights)
    for step in range(1, 41):
        if step <= start:
            expected = weights[step - 1]
        elif step % update_rate == 0:
            k = (step - start) // update_rate
            d = min(decay, (1 + k) / (10 + k))
            expected = d * expected + (1 - d) * weights[step - 1]
        assert shadows[step - 1] == pytest.approx(expected, rel=1e-5)
    assert d == decay


def test_weights_change_places_to_the_bit_even_after_an_exception_and_buffers_do_not():
    """They change places: the module's are kept in the shadow, and no tensor is a new one."""
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4))
    network.to(memory_format=torch.channels_last)
    ema = EMA(network, start=0)
    change(network)
    tensors = [*network.parameters(), *ema.shadow.parameters()]
    memory = [value.data_ptr() for value in tensors]
    weights, averages = values(network), values(ema.shadow)
    buffers = copy.deepcopy(dict(network.named_buffers()))
    assert not same(weights, averages)
    with pytest.raises(KeyError), ema.applied():
        assert same(values(network), averages) and same(values(ema.shadow), weights)
        assert same(dict(network.named_buffers()), buffers)
        raise KeyError
    assert same(values(network), weights) and same(values(ema.shadow), averages)
    assert same(dict(network.named_buffers()), buffers)
    change(network)  # the state has those of now
    state = ema.state_dict()["shadow"]
    assert state.keys() == network.state_dict().keys()
    assert all(same(state[name], value) for name, value in network.named_buffers())
    now = [*network.parameters(), *ema.shadow.parameters()]
    assert all(a is b for a, b in zip(now, tensors))
    assert [value.data_ptr() for value in now] == memory


@pytest.mark.parametrize("steps", [2, 17])
def test_a_run_goes_on_exactly_from_a_state_before_start_and_after(steps):
    torch.manual_seed(0)
    weights, settings = torch.randn(40).tolist(), dict(decay=0.9, start=5, update_rate=3)
    module = module_at(0.0)
    whole = go(module, EMA(module, **settings), weights)
    module = module_at(0.0)
    first = EMA(module, **settings)
    go(module, first, weights[:steps])
    state = copy.deepcopy(first.state_dict())
    module = module_at(weights[steps - 1])
    second = EMA(module, **settings)
    second.load_state_dict(state)
    assert same(second.state_dict(), state)
    assert go(module, second, weights[steps:]) == whole[steps:]
