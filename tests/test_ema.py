"""Shadow weights: start, ramp, rate, taking their place and leaving it, going on exactly."""

import pytest
import torch

from ema import EMA


def module_at(value):
    module = torch.nn.Linear(2, 1, bias=False)
    set_to(module, value)
    return module


def set_to(module, value):
    with torch.no_grad():
        module.weight.fill_(value)


def test_the_shadow_equals_the_weights_until_start():
    module = module_at(0.0)
    ema = EMA(module, decay=0.9, start=3)
    for value in (1.0, 2.0, 3.0):
        set_to(module, value)
        ema.update()
        assert ema.shadow[0].unique().item() == value
    set_to(module, 4.0)
    ema.update()
    assert 3.0 < ema.shadow[0][0, 0] < 4.0


def test_the_decay_ramps_up_to_its_value():
    module, decay = module_at(1.0), 0.5
    ema = EMA(module, decay=decay, start=0)
    expected = 1.0
    for k in range(1, 30):
        set_to(module, float(k % 3))
        ema.update()
        d = min(decay, (1 + k) / (10 + k))
        expected = d * expected + (1 - d) * (k % 3)
        assert ema.shadow[0][0, 0].item() == pytest.approx(expected, rel=1e-5)
    assert d == decay


def test_a_short_run_is_not_left_behind():
    """A hundred steps with decay 0.999: without a ramp nine tenths of the shadow would still be the start."""
    module = module_at(0.0)
    ema = EMA(module, decay=0.999, start=0)
    set_to(module, 1.0)
    for _ in range(100):
        ema.update()
    assert ema.shadow[0][0, 0] > 0.99


def test_the_update_rate_skips_steps():
    module = module_at(0.0)
    ema = EMA(module, decay=0.9, start=0, update_rate=4)
    set_to(module, 1.0)
    values = []
    for _ in range(8):
        ema.update()
        values.append(ema.shadow[0][0, 0].item())
    assert values[:3] == [0, 0, 0] and values[3] > 0 and values[4:7] == [values[3]] * 3 and values[7] > values[3]


def test_applied_puts_the_shadow_in_place_and_takes_it_out_even_after_an_exception():
    module = module_at(1.0)
    ema = EMA(module, decay=0.9)
    set_to(module, 5.0)
    with ema.applied():
        assert module.weight[0, 0] == 1.0
    assert module.weight[0, 0] == 5.0
    with pytest.raises(KeyError), ema.applied():
        raise KeyError
    assert module.weight[0, 0] == 5.0 and ema.shadow[0][0, 0] == 1.0


def test_the_state_goes_on_exactly():
    torch.manual_seed(0)
    values = torch.randn(40).tolist()

    def go(ema, module, values):
        for value in values:
            set_to(module, value)
            ema.update()
        return ema.shadow[0].clone()

    module = module_at(0.0)
    whole = go(EMA(module, decay=0.9, start=5, update_rate=3), module, values)

    module = module_at(0.0)
    first = EMA(module, decay=0.9, start=5, update_rate=3)
    go(first, module, values[:17])
    state = {"step": first.state_dict()["step"],
             "shadow": {name: shadow.clone() for name, shadow in first.state_dict()["shadow"].items()}}
    other = module_at(9.0)
    second = EMA(other, decay=0.9, start=5, update_rate=3)
    second.load_state_dict(state)
    assert torch.equal(go(second, other, values[17:]), whole)


def test_another_modules_state_is_refused():
    with pytest.raises(ValueError, match="not those of this module"):
        EMA(module_at(0.0)).load_state_dict(EMA(torch.nn.Linear(2, 1)).state_dict())


@pytest.mark.parametrize("options", [dict(decay=1.0), dict(decay=-0.1), dict(start=-1), dict(update_rate=0)])
def test_values_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=f"ema_{next(iter(options))}"):
        EMA(module_at(0.0), **options)
