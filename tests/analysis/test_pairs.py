"""Pairs by data flow: many small networks, the norms and wrappers that people have, and the memory that it takes."""

import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import distributed, nn

import analysis
from analysis.pairs import recording
from models import build
from tests.conftest import ROOT


def conv(kernel=3, stride=1, **options):
    """Four channels to four, so that any of them can follow any other."""
    size = (kernel, kernel) if isinstance(kernel, int) else kernel
    return nn.Conv2d(4, 4, size, stride, (size[0] // 2, size[1] // 2), **options)


class Net(nn.Module):
    """Three convolutions, three BNs and any other `modules`, and a flow that runs those that it wants."""

    def __init__(self, flow, **modules):
        super().__init__()
        self.flow = flow
        own = {f"{name}{number}": make for number in (1, 2, 3) for name, make in (("conv", conv), ("bn", bn))}
        for name, make in own.items():
            self.add_module(name, modules.pop(name) if name in modules else make())
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args, **kwargs):
        return self.flow(self, *args, **kwargs)


def bn(**options):
    return nn.BatchNorm2d(4, **options)


def with_statistics(network):
    """BN numbers that are not the fresh ones, with variances so small that epsilon counts; evaluation mode."""
    for module in network.modules():
        for name, low, high in (
            ("weight", 0.5, 2), ("bias", -1, 1), ("running_mean", -0.1, 0.1), ("running_var", 1e-5, 1e-3)
        ):  # fmt: skip
            tensor = getattr(module, name, None)
            if hasattr(module, "running_var") and tensor is not None:
                nn.init.uniform_(tensor, low, high)
    return network.eval()


def record_of(network, *args, passes=1, forward=None, kernel_size=(3, 3), grouped=True):
    """What is recorded of a network, and no hook is left."""
    args = args or (torch.randn(2, 4, 8, 8),)
    with_statistics(network)
    before = hooks_of(network)
    with torch.no_grad(), recording(network, kernel_size, grouped=grouped) as record:
        for _ in range(passes):
            (forward or network)(*args)
            record.end_pass()
    assert hooks_of(network) == before
    return record


def hooks_of(network):
    return [list(module._forward_hooks.values()) for module in network.modules()]


def pairs_of(record):
    return [(layer.name, layer.norm) for layer in record.layers]


# Which pairs a network has


@dataclass
class Case:
    """A network, and what must be found in it."""

    network: nn.Module
    pairs: list
    unpaired: list = field(default_factory=list)
    options: dict = field(default_factory=dict)


def in_place_on_the_output(m, x):
    y = m.conv1(x)
    z = m.bn1(y)
    y.relu_()  # after bn1 has read it
    return m.bn2(y) + m.bn3(m.conv3(z))


def elsewhere(m, x):
    y = m.conv1(x)
    return m.bn1(y) + F.relu(y)


def both_before(m, x):
    a, b = m.conv1(x), m.conv2(x)
    return m.bn2(b) + m.bn1(a)


def two_norms(m, x):
    y = m.conv1(x)
    return m.bn1(y) + m.bn2(y)


def shortcut(m, x):
    y = F.relu(m.bn1(m.conv1(x)))
    return F.relu(m.bn2(m.conv2(y)) + m.bn3(m.conv3(x)))


def preactivation(m, x):
    y = m.conv2(F.relu(m.bn2(m.conv1(F.relu(m.bn1(x))))))
    return x + y


def dense(m, x):
    x = torch.cat([x[:, :2], m.conv1(F.relu(m.bn1(x)))[:, 2:]], 1)
    return m.bn3(m.conv2(F.relu(m.bn2(x))))


def twice_once_paired(m, x):
    return m.bn1(m.conv1(x)) + m.conv1(x)


def slot(m, x):
    """The first output is gone when the second is made, in its memory maybe."""
    m.conv1(x)
    y = m.conv1(x).add(1)
    return m.bn1(y) + m.bn2(m.conv2(x))


class Backwards(nn.Module):
    """Registered from the last to the first."""

    def __init__(self):
        super().__init__()
        self.bn2, self.second, self.bn1, self.first = bn(), conv(), bn(), conv()

    def forward(self, x):
        return self.bn2(self.second(F.relu(self.bn1(self.first(x)))))


def chain(*names):
    """A flow that runs the named modules one after another."""

    def flow(m, x):
        for name in names:
            x = getattr(m, name)(x)
        return x

    return flow


def branches(count):
    """The same conv-BN pair on each of several scales of the input: RetinaNet's heads."""
    return lambda m, x: [m.bn1(m.conv1(F.avg_pool2d(x, 2**i))) for i in range(count)]


class Subclass(nn.Conv2d):
    """Some networks' own convolution, such as timm's Conv2dSame."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


ONE, TWO = [("conv1", "bn1")], [("conv1", "bn1"), ("conv2", "bn2")]
STEM = nn.Sequential(conv(), bn(), nn.ReLU(inplace=True))
CASES = {
    "a sequence": Case(nn.Sequential(*STEM, conv(), bn()), [("0", "1"), ("3", "4")]),
    "nested names": Case(Net(lambda m, x: m.stem(x), stem=STEM), [("stem.0", "stem.1")]),
    "functional glue": Case(
        Net(lambda m, x: m.bn2(m.conv2(F.max_pool2d(F.leaky_relu(m.bn1(m.conv1(x))), 2)).contiguous())), TWO
    ),
    "registered in another order": Case(Backwards(), [("first", "bn1"), ("second", "bn2")]),
    "names that mislead": Case(Net(chain("conv1", "bn2", "conv2", "bn1")), [("conv1", "bn2"), ("conv2", "bn1")]),
    "two convolutions, then their BNs": Case(Net(both_before), [("conv2", "bn2"), ("conv1", "bn1")]),
    "a shared BN": Case(Net(chain("conv1", "bn1", "conv2", "bn1")), [*ONE, ("conv2", "bn1")]),
    "a shared convolution": Case(Net(chain("conv1", "bn1", "conv1", "bn2")), [*ONE, ("conv1", "bn2")]),
    "a pair called three times": Case(Net(chain(*["conv1", "bn1"] * 3)), ONE * 3),
    "a pair called on three scales": Case(Net(branches(3)), ONE * 3),
    "a module under two names": Case(nn.Sequential(STEM[0], STEM[1], STEM[0], STEM[1]), [("0", "1")] * 2),
    "two BNs on one output": Case(Net(two_norms), [("conv1", "bn1"), ("conv1", "bn2")]),
    "an output that also goes elsewhere": Case(Net(elsewhere), ONE),
    "in place after BN": Case(Net(in_place_on_the_output), [("conv1", "bn1"), ("conv3", "bn3")]),
    "in place between": Case(Net(lambda m, x: m.bn2(m.conv2(m.bn1(m.conv1(x).relu_())))), TWO[1:], ["conv1"]),
    "no BN at the end": Case(Net(chain("conv1", "bn1", "conv2")), ONE, ["conv2"]),
    "one call of two is paired": Case(Net(twice_once_paired), ONE, ["conv1"]),
    "an output that is dropped": Case(Net(slot), [("conv2", "bn2")], ["conv1"]),
    "1x1 on the shortcut": Case(Net(shortcut, conv3=conv(1)), TWO),
    "3x3 on the shortcut": Case(Net(shortcut), [*TWO, ("conv3", "bn3")]),
    "a bottleneck": Case(
        Net(chain("conv1", "bn1", "conv2", "bn2", "conv3", "bn3"), conv1=conv(1), conv3=conv(1)), TWO[1:]
    ),
    "pre-activation": Case(Net(preactivation), [("conv1", "bn2")], ["conv2"]),
    "dense, by concatenation": Case(Net(dense), [("conv2", "bn3")], ["conv1"]),
    "stride": Case(Net(chain("conv1", "bn1"), conv1=conv(stride=2)), ONE),
    "dilation": Case(Net(chain("conv1", "bn1"), conv1=conv(dilation=2)), ONE),
    "no bias, reflected borders": Case(Net(chain("conv1", "bn1"), conv1=conv(bias=False, padding_mode="reflect")), ONE),
    "a subclass of Conv2d": Case(Net(chain("conv1", "bn1"), conv1=Subclass(4, 4, 3)), ONE),
    "grouped": Case(Net(chain("conv1", "bn1", "conv2", "bn2"), conv1=conv(groups=2)), TWO),
    "depthwise": Case(Net(chain("conv1", "bn1", "conv2", "bn2"), conv1=conv(groups=4)), TWO),
    "grouped, left out": Case(
        Net(chain("conv1", "bn1", "conv2", "bn2", "conv3"), conv1=conv(groups=2), conv3=conv(groups=4)),
        TWO[1:], options={"grouped": False},
    ),
    "dropout and identity do nothing": Case(
        Net(chain("conv1", "drop", "same", "bn1"), drop=nn.Dropout2d(), same=nn.Identity()), ONE
    ),
    "5x5 is not 3x3": Case(Net(chain("conv1", "bn1", "conv2", "bn2"), conv1=conv(5)), TWO[1:]),
    "1x1 asked for": Case(Net(shortcut, conv3=conv(1)), [("conv3", "bn3")], options={"kernel_size": (1, 1)}),
    "5x5 asked for": Case(
        Net(chain("conv1", "bn1", "conv2", "bn2"), conv1=conv(5)), ONE, options={"kernel_size": 5}
    ),
    "1x3 asked for, 3x1 not": Case(
        Net(chain("conv1", "bn1", "conv2", "bn2", "conv3"), conv1=conv((1, 3)), conv2=conv((3, 1)), conv3=conv((1, 3))),
        ONE, ["conv3"], {"kernel_size": (1, 3)},
    ),
    "BN without parameters": Case(Net(chain("conv1", "bn1"), bn1=bn(affine=False)), ONE),
    "BN with the batch's statistics": Case(Net(chain("conv1", "bn1"), bn1=bn(track_running_stats=False)), ONE),
    "BN by keyword": Case(Net(lambda m, x: m.bn1(input=m.conv1(input=x))), ONE),
    "SyncBatchNorm in evaluation": Case(Net(chain("conv1", "bn1"), bn1=nn.SyncBatchNorm(4)), ONE),
    "lazy modules": Case(nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()), [("0", "1")]),
    "GroupNorm is no BN": Case(Net(chain("conv1", "gn", "conv2", "bn2"), gn=nn.GroupNorm(2, 4)), TWO[1:], ["conv1"]),
    "outputs in a dict": Case(Net(lambda m, x: {"out": m.bn1(m.conv1(x)), "aux": m.conv2(x)}), ONE, ["conv2"]),
    "outputs in a tuple": Case(Net(lambda m, x: (m.bn1(m.conv1(x)), [m.bn2(m.conv2(x))])), TWO),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_pairs(case):
    record = record_of(case.network, passes=2, **case.options)
    assert pairs_of(record) == case.pairs
    assert record.unpaired == case.unpaired
