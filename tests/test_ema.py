"""Shadow weights: start, ramp, rate, taking their place and leaving it, going on exactly."""

import numpy as np
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
    assert (
        values[:3] == [0, 0, 0]
        and values[3] > 0
        and values[4:7] == [values[3]] * 3
        and values[7] > values[3]
    )


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
    state = {
        "step": first.state_dict()["step"],
        "shadow": {name: shadow.clone() for name, shadow in first.state_dict()["shadow"].items()},
    }
    other = module_at(9.0)
    second = EMA(other, decay=0.9, start=5, update_rate=3)
    second.load_state_dict(state)
    assert torch.equal(go(second, other, values[17:]), whole)


class Net(torch.nn.Module):
    """A network with all kinds of buffers and memory layouts."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last)
        self.norm = torch.nn.BatchNorm2d(4)
        self.register_buffer("table", torch.arange(6.0).reshape(2, 3).T)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x):
        return self.norm(self.conv(x))


def everything(module):
    return {
        name: tensor.detach().clone()
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# States


OTHER = [
    ("step", -1),
    ("step", True),
    ("step", "3"),
    ("step", None),
    ("shadow", None),
    ("shadow", {}),
    ("buffers", {}),
    ("shadow", [1]),
    ("buffers", None),
    ("shadow.conv.bias", None),
    ("shadow.conv.bias", torch.zeros(5)),
    ("shadow.conv.bias", torch.zeros(())),
    ("shadow.more", torch.zeros(1)),
    ("buffers.table", torch.zeros(2, 3)),
    ("shadow.norm.bias", "text"),
    ("buffers.scratch", torch.zeros(2)),
]


@pytest.mark.parametrize(
    "key, value", OTHER, ids=[f"{key}={str(value)[:9]}" for key, value in OTHER]
)
def test_another_modules_state_is_refused(key, value):
    """A value of None removes the entry."""
    ema, net = EMA(Net()), Net()
    before = everything(net)
    other = EMA(net)
    state = ema.state_dict() | {"step": 7}
    part, _, name = key.partition(".")
    state[part] = {**state[part], name: value} if name else value
    if value is None:
        del (state[part] if name else state)[name or part]
    if key == "buffers" and value is None:  # a state from before buffers were kept
        other.load_state_dict(state)
        assert other.step == 7 and torch.equal(other.buffers[-1], net.norm.num_batches_tracked)
        return
    with pytest.raises(ValueError, match="^EMA state: ") as error:
        other.load_state_dict(state)
    assert "\n" not in str(error.value)
    assert other.step == 0 and same(everything(net), before)
    assert all(torch.equal(s, p) for s, p in zip(other.shadow, net.parameters()))


@pytest.mark.parametrize("state", [None, [], {}, torch.zeros(3)])
def test_what_is_no_state_is_refused(state):
    with pytest.raises(
        ValueError, match="^EMA state: expected a dictionary with 'step' and 'shadow'$"
    ):
        EMA(module_at(0.0)).load_state_dict(state)


def test_a_state_is_loaded_by_name():
    first, second = EMA(Net()), EMA(Net())
    state = first.state_dict()
    state["shadow"] = dict(reversed(state["shadow"].items()))
    second.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(first.shadow, second.shadow))


# Buffers


def test_persistent_buffers_are_copied_swapped_in_restored_and_kept():
    net = Net().train()
    ema = EMA(net, decay=0.9, start=1, update_rate=5)
    for _ in range(3):
        net(torch.randn(8, 2, 5, 5))
        ema.update()
    assert set(ema.state_dict()["buffers"]) == {
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
        "table",
    }
    kept = everything(net)
    net(torch.randn(8, 2, 5, 5))
    moved = everything(net)
    with pytest.raises(KeyError), ema.applied():
        assert torch.equal(net.norm.running_mean, kept["norm.running_mean"])
        assert net.norm.num_batches_tracked == 3
        net(torch.randn(8, 2, 5, 5))
        raise KeyError
    assert same(everything(net), moved) and net.norm.num_batches_tracked == 4
    other = EMA(Net())
    other.load_state_dict(ema.state_dict())
    assert same(other.state_dict()["buffers"], ema.state_dict()["buffers"])
    net.table = torch.ones(7)  # of another shape: a copy follows
    ema.update()
    assert torch.equal(ema.state_dict()["buffers"]["table"], torch.ones(7))


# Modules that change


MOVES = {
    "double": lambda net: net.double(),
    "bfloat16": lambda net: net.bfloat16(),
    "part": lambda net: net.norm.double(),
    "there and back": lambda net: net.double().float(),
    "contiguous": lambda net: net.to(memory_format=torch.contiguous_format),
    "cuda": lambda net: net.cuda(),
    "cuda, half": lambda net: net.cuda().half(),
}


@pytest.mark.parametrize("when", ["update", "applied", "state_dict", "load_state_dict"])
@pytest.mark.parametrize("start", [0, 1, 9])
@pytest.mark.parametrize(
    "move", [move for move in MOVES if torch.cuda.is_available() or "cuda" not in move]
)
def test_the_shadow_follows_a_module_that_is_moved_or_cast(move, start, when):
    net = Net()
    ema = EMA(net, decay=0.9, start=start)
    ema.update()
    state = EMA(Net()).state_dict()
    MOVES[move](net)
    if when == "update":
        ema.update()
        ema.update()
    elif when == "load_state_dict":
        ema.load_state_dict(state)
    if when != "update":
        before = everything(net)
        with ema.applied():
            pass
        assert same(everything(net), before)
    named = ema.state_dict()
    for name, tensor in (named["shadow"] | named["buffers"]).items():
        own = net.get_parameter(name) if name in named["shadow"] else net.get_buffer(name)
        assert (tensor.dtype, tensor.device, tensor.stride()) == (
            own.dtype,
            own.device,
            own.stride(),
        ), name
        assert when == "load_state_dict" or torch.allclose(tensor.double(), own.double(), atol=1e-2)


def test_a_module_cast_halfway_has_the_average_of_all_its_weights():
    values, shadows = [1.0, 0.0, 2.0, 5.0], []
    for cast in (False, True):
        module = module_at(0.0)
        ema = EMA(module, decay=0.9, start=0)
        for i, value in enumerate(values):
            if cast and i == 2:
                module.double()
            set_to(module, value)
            ema.update()
        shadows.append(ema.shadow[0].double())
    assert ema.shadow[0].dtype == torch.float64 and torch.allclose(*shadows, rtol=1e-6)


CHANGES = {
    "a layer exchanged": lambda net: setattr(net, "conv", torch.nn.Conv2d(2, 4, 3)),
    "a layer added": lambda net: setattr(net, "more", torch.nn.Linear(1, 1)),
    "a layer removed": lambda net: delattr(net, "conv"),
    "a parameter replaced": lambda net: setattr(
        net.norm, "bias", torch.nn.Parameter(torch.zeros(4))
    ),
    "a parameter removed": lambda net: setattr(net.norm, "bias", None),
    "a parameter reshaped": lambda net: setattr(net.norm.bias, "data", torch.zeros(1)),
    "to meta": lambda net: net.to("meta"),
    "a buffer added": lambda net: net.register_buffer("more", torch.zeros(1)),
    "a buffer removed": lambda net: delattr(net, "table"),
    "a buffer reshaped": lambda net: setattr(net, "table", torch.zeros(1)),
    "a layer of buffers exchanged": lambda net: setattr(
        net, "plain", torch.nn.BatchNorm2d(4, affine=False)
    ),
}


@pytest.mark.parametrize("call", ["applied", "state_dict", "load_state_dict"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_module_with_other_parameters_is_refused_in_one_line(change, call):
    net = Net()
    net.plain = torch.nn.BatchNorm2d(4, affine=False)
    ema = EMA(net)
    state = ema.state_dict()
    CHANGES[change](net)
    with pytest.raises(ValueError, match="^EMA: .*make a new EMA of the changed module$"):
        if call == "applied":
            with ema.applied():
                pass
        else:
            getattr(ema, call)(*([state] if call == "load_state_dict" else []))


def test_a_module_without_parameters_is_no_special_case():
    ema = EMA(torch.nn.ReLU(), start=1)
    for _ in range(3):
        ema.update()
    with ema.applied():
        ema.load_state_dict(ema.state_dict())


# Options


WRONG = [
    ("decay", x) for x in (1.0, -0.1, float("nan"), "0.9", None, True, [0.9], 1j, torch.ones(2, 2))
]
WRONG += [
    (name, x)
    for name in ("start", "update_rate")
    for x in (-1, 1.5, 2.0, True, "5", None, float("inf"), [5])
]


@pytest.mark.parametrize("name, value", [*WRONG, ("update_rate", 0)])
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(
        ValueError, match=f"^ema_{name} .*: expected a (number|whole number)"
    ) as error:
        EMA(module_at(0.0), **{name: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options", [dict(decay=0), dict(decay=np.float32(0.5)), dict(start=np.int64(3))]
)
def test_numbers_of_other_kinds_are_taken(options):
    EMA(module_at(0.0), **options).update()
