"""Evaluation mode: what `eval` does is done, all of it is undone, and Ctrl-C cannot part the two."""

import importlib
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as hooks_of_all
from torch.utils._python_dispatch import _get_current_dispatch_mode

import analysis
from analysis.measuring import eval_mode as tested
from analysis.measuring.eval_mode import evaluation, tf32_settings, without_tf32
from analysis.measuring.measurement import measuring


def conv():
    return nn.Conv2d(4, 4, 3, padding=1)


def images(count=6):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def with_statistics(network):
    """BN numbers that are not the fresh ones."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return network


def state_of(network):
    """Everything of a network that measuring could change, bit for bit."""
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    return {
        "names": list(dict(network.named_modules())),
        "identities": {name: (id(x), x.data_ptr()) for name, x in tensors.items()},
        "values": {name: x.detach().clone().numpy().tobytes() for name, x in tensors.items()},
        "shapes": {name: x.shape for name, x in tensors.items()},
        "flags": [module.training for module in network.modules()],
        "own": [sorted(vars(module)) for module in network.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules()],
        "merged": [getattr(module, "merged", None) for module in network.modules()],
    }


# Modules whose train() or eval() does more than set flags


class GhostBN(nn.BatchNorm2d):
    """Two ghost batches, whose statistics eval() averages."""

    def __init__(self):
        super().__init__(4)
        self.running_mean = torch.cat([torch.zeros(4), torch.ones(4)])
        self.running_var = torch.cat([torch.ones(4), torch.full((4,), 3.0)])

    def train(self, mode=True):
        if self.training and not mode:
            self.running_mean = self.running_mean.view(2, 4).mean(0).repeat(2)
            self.running_var = self.running_var.view(2, 4).mean(0).repeat(2)
        return super().train(mode)

    def forward(self, x):
        mean, var = self.running_mean[:4], self.running_var[:4]
        return F.batch_norm(x, mean, var, self.weight, self.bias, self.training)


class LowRank(nn.Conv2d):
    """A LoRA layer: eval() adds the update to the weights, train() subtracts it."""

    def __init__(self):
        super().__init__(4, 4, 3, padding=1)
        self.update = nn.Parameter(torch.randn(4, 4, 3, 3))
        self.merged = False

    def train(self, mode=True):
        if mode == self.merged:
            self.weight.data += -self.update if mode else self.update
            self.merged = not mode
        return super().train(mode)


class Fused(nn.Module):
    """A re-parametrised layer: eval() makes one convolution of two, and drops them."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.merged = conv(), conv(), False

    def train(self, mode=True):
        if not mode and not self.merged:
            self.one, self.merged = conv(), True
            self.one.weight = nn.Parameter(self.a.weight + self.b.weight)
            self.one.bias = nn.Parameter(self.a.bias + self.b.bias)
            del self.a, self.b
        return super().train(mode)

    def forward(self, x):
        return self.one(x) if self.merged else self.a(x) + self.b(x)


class Replacing(nn.Conv2d):
    """A layer whose eval() puts other memory under its weights."""

    def train(self, mode=True):
        if not mode:
            self.weight.data = self.weight.data * 0 + 0.5
        return super().train(mode)


class Whole(nn.Sequential):
    """A network that does it for its parts."""

    def eval(self):
        self[0].weight.data.mul_(0.1)
        return super().eval()


MAKES = {
    "ghost BN": lambda: nn.Sequential(conv(), GhostBN()),
    "low rank": lambda: nn.Sequential(LowRank(), nn.BatchNorm2d(4)),
    "fused": lambda: nn.Sequential(Fused(), nn.BatchNorm2d(4)),
    "other memory": lambda: nn.Sequential(Replacing(4, 4, 3), nn.BatchNorm2d(4)),
    "the network": lambda: Whole(conv(), nn.BatchNorm2d(4)),
}


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_what_eval_does_is_done_and_undone(make):
    torch.manual_seed(0)
    network = make()
    nn.init.normal_(network[1].bias)
    before = state_of(network)
    frame = analysis.measure(network, images().split(2))
    assert state_of(network) == before
    with torch.no_grad():
        expected = network.eval()(images()).double().std(correction=0).item()
    assert frame["std"].tolist() == pytest.approx([expected], rel=1e-6)
    network.train()


def test_attributes_that_change_later_stay():
    class Counting(nn.Sequential):
        calls = 0

        def train(self, mode=True):
            self.mode = mode
            return super().train(mode)

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    network = Counting(conv(), nn.BatchNorm2d(4))
    network.mode = True
    analysis.measure(network, images().split(2))
    assert (network.calls, network.mode) == (3, True)


def test_a_network_that_keeps_its_bn_in_training_is_measured_in_evaluation():
    class Stubborn(nn.Sequential):
        def train(self, mode=True):
            return self

    network = Stubborn(conv(), nn.BatchNorm2d(4))
    before = state_of(network)
    analysis.measure(network, images().split(2))
    assert state_of(network) == before


def test_flags_that_differ_come_back():
    network = nn.Sequential(nn.Sequential(conv(), nn.BatchNorm2d(4)), conv(), nn.BatchNorm2d(4))
    network[0].eval()
    before = state_of(network)
    with evaluation(network):
        assert not any(module.training for module in network.modules())
    assert state_of(network) == before


# Buffers that forward changes


class Observing(nn.Sequential):
    """A fresh observer: its buffer has no size until the first batch comes."""

    def __init__(self, change):
        super().__init__(conv(), nn.BatchNorm2d(4))
        self.register_buffer("range", torch.zeros(0))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.change = change

    def forward(self, x):
        self.calls += 1
        self.change(self, x)
        return super().forward(x)


def resize(network, x):
    network.range.resize_(4).copy_(x.amax((0, 2, 3)))


def reassign(network, x):
    network.range = x.amax((0, 2, 3))


def replace_data(network, x):
    network.range.data = x.amax((0, 2, 3))


@pytest.mark.parametrize("change", [resize, reassign, replace_data])
def test_buffers_that_change_their_size_in_forward_come_back(change):
    network = Observing(change)
    before = state_of(network)
    frame = analysis.measure(network, images().split(2))
    assert frame["images"].tolist() == [6]
    assert state_of(network) == before
    with torch.no_grad():
        network.eval()(images())
    assert network.range.shape == (4,)


def test_a_fresh_observer_of_torch():
    pytest.importorskip("torch.ao.quantization")
    from torch.ao.quantization.observer import PerChannelMinMaxObserver

    network = with_statistics(nn.Sequential(PerChannelMinMaxObserver(ch_axis=1)))
    network.extend([conv(), nn.BatchNorm2d(4)])
    shapes = {name: buffer.shape for name, buffer in network.named_buffers()}
    analysis.measure(network, images().split(2))
    assert {name: buffer.shape for name, buffer in network.named_buffers()} == shapes


# TF32 and torch's modes


def test_tf32_is_off_inside_and_comes_back_after_an_error():
    before = [getattr(backend, name) for backend, name, _ in tf32_settings()]

    def work():
        with without_tf32():
            assert [(b, n, getattr(b, n)) for b, n, _ in tf32_settings()] == tf32_settings()
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        work()
    assert [getattr(backend, name) for backend, name, _ in tf32_settings()] == before


def test_gradients_are_off_inside():
    with evaluation(nn.Sequential(conv())):
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


# Ctrl-C at every line

FILES = {str(path) for path in Path(tested.__file__).parent.glob("*.py")}


class Interrupter:
    """Send SIGINT as the n-th line of the engine is about to run. lines: how many have run."""

    def __init__(self, number=-1, only=None):
        self.number, self.lines, self.only = number, 0, only

    def __call__(self, frame, event, argument):
        if frame.f_code.co_filename not in FILES:
            return None
        if self.only is not None and frame.f_code.co_name not in self.only:
            return self
        if event == "line":
            self.lines += 1
            if self.lines - 1 == self.number:
                signal.raise_signal(signal.SIGINT)
        return self


def leftovers():
    """What of the process a measurement could leave behind."""
    return {
        "hooks": len(hooks_of_all._global_forward_pre_hooks),
        "mode": _get_current_dispatch_mode(),
        "gradients": torch.is_grad_enabled(),
        "tf32": [getattr(backend, name) for backend, name, _ in tf32_settings()],
        "stance": torch._dynamo.eval_frame._stance.stance if "torch._dynamo" in sys.modules else 0,
        "handler": signal.getsignal(signal.SIGINT),
    }


def interrupted(work, interrupter):
    """Whether an interrupt has reached the caller of `work`."""
    sys.settrace(interrupter)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def every_line(work, network, only=None):
    """Interrupt `work` at every line, and look whether everything is as it was."""
    before, process = state_of(network), leftovers()
    counter = Interrupter(only=only)
    assert not interrupted(work, counter)
    assert (state_of(network), leftovers()) == (before, process)
    for number in range(counter.lines):
        caught = interrupted(work, Interrupter(number, only))
        assert (number, caught) == (number, True)
        assert (number, state_of(network)) == (number, before)
        assert (number, leftovers()) == (number, process)
    return counter.lines


@pytest.fixture
def plain_handler():
    """Python's own handler, whatever the test runner has set."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_an_interrupt_at_any_line_of_evaluation_leaves_everything_as_it_was(plain_handler):
    network = with_statistics(nn.Sequential(LowRank(), nn.BatchNorm2d(4)))

    def work():
        with evaluation(network):
            network(images(2))

    assert every_line(work, network) > 50


@pytest.mark.slow
def test_an_interrupt_at_any_line_of_measuring_leaves_everything_as_it_was(plain_handler):
    importlib.import_module("torch._dynamo")  # for the stance of compiled networks
    network = with_statistics(nn.Sequential(conv(), nn.BatchNorm2d(4)))
    batches = images(4).split(2)

    def work():
        with measuring(network) as meter:
            for batch in batches:
                meter.add(batch)

    assert every_line(work, network) > 300


def test_an_interrupt_while_state_is_taken_comes_when_that_is_done(plain_handler):
    done = []

    def setup(stack):
        stack.callback(done.append, "undone")
        signal.raise_signal(signal.SIGINT)
        done.append("set up")

    with pytest.raises(KeyboardInterrupt), tested.restoring(setup):
        done.append("inside")
    assert done == ["set up", "undone"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_in_another_thread_signals_are_left_alone(plain_handler):
    from concurrent.futures import ThreadPoolExecutor

    network = nn.Sequential(conv(), nn.BatchNorm2d(4))
    with ThreadPoolExecutor(1) as pool:
        frame = pool.submit(analysis.measure, network, images().split(2)).result()
    assert frame["images"].tolist() == [6]
