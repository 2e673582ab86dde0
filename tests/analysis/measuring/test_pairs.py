"""Pairs by data flow: many small networks, the norms and wrappers that people have, and the memory
that it takes.
"""

import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.nn.modules import module as hooks_of_all
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode

import analysis
from analysis.measuring.pairs import UNKNOWN, Recording
from models import build


def conv(kernel=3, stride=1, **options):
    """Four channels to four, so that any of them can follow any other."""
    size = (kernel, kernel) if isinstance(kernel, int) else kernel
    return nn.Conv2d(4, 4, size, stride, (size[0] // 2, size[1] // 2), **options)


class Net(nn.Module):
    """Three convolutions, three BNs and any other `modules`, and a flow that runs those that it
    wants.
    """

    def __init__(self, flow, **modules):
        super().__init__()
        self.flow = flow
        own = {
            f"{name}{number}": make
            for number in (1, 2, 3)
            for name, make in (("conv", conv), ("bn", bn))
        }
        for name, make in own.items():
            self.add_module(name, modules.pop(name) if name in modules else make())
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args, **kwargs):
        return self.flow(self, *args, **kwargs)


def bn(**options):
    return nn.BatchNorm2d(4, **options)


def record_of(network, *args, batches=1, forward=None, kernel_size=(3, 3), grouped=True):
    """What is recorded of a network in evaluation mode; its hooks are left alone."""
    args = args or (torch.randn(2, 4, 8, 8),)
    network.eval()
    before = hooks_of(network), dict(hooks_of_all._global_forward_hooks)
    record = Recording(network, kernel_size, grouped=grouped)
    with torch.no_grad():
        for parts in zip(*(x.chunk(batches) for x in args), strict=True):
            record.images = len(parts[0])
            with record.watching():
                (forward or network)(*parts)
            record.end_pass()
            record.position += record.images
    assert (hooks_of(network), dict(hooks_of_all._global_forward_hooks)) == before
    return record


def measured(network, batches, **options):
    """The frame of a network, of which some layers may be missing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* not in the frame: ")
        return analysis.measure(network, batches, **options)


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
    return m.bn2(m.conv2(m.bn1(y) + F.relu(y)))


def both_before(m, x):
    a, b = m.conv1(x), m.conv2(x)
    return m.bn2(b) + m.bn1(a)


def two_norms(m, x):
    y = m.conv1(x)
    return m.bn1(y) + m.bn2(y) + m.bn3(m.conv3(x))


def one_norm_twice(m, x):
    y = m.conv1(x)
    return m.bn1(y) + m.bn1(y) + m.bn3(m.conv3(x))


def in_a_view(m, x):
    y = m.conv1(x)
    return m.bn2(m.conv2(m.bn1(y) + y.flatten(1).sum(1).view(-1, 1, 1, 1)))


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


ONE, TWO, THREE = [("conv1", "bn1")], [("conv1", "bn1"), ("conv2", "bn2")], [("conv3", "bn3")]
STEM = nn.Sequential(conv(), bn(), nn.ReLU(inplace=True))
CASES = {
    "a sequence": Case(nn.Sequential(*STEM, conv(), bn()), [("0", "1"), ("3", "4")]),
    "nested names": Case(Net(lambda m, x: m.stem(x), stem=STEM), [("stem.0", "stem.1")]),
    "functional glue": Case(
        Net(
            lambda m, x: m.bn2(
                m.conv2(F.max_pool2d(F.leaky_relu(m.bn1(m.conv1(x))), 2)).contiguous()
            )
        ),
        TWO,
    ),
    "registered in another order": Case(Backwards(), [("first", "bn1"), ("second", "bn2")]),
    "names that mislead": Case(
        Net(chain("conv1", "bn2", "conv2", "bn1")), [("conv1", "bn2"), ("conv2", "bn1")]
    ),
    "two convolutions, then their BNs": Case(
        Net(both_before), [("conv2", "bn2"), ("conv1", "bn1")]
    ),
    "a shared BN": Case(Net(chain("conv1", "bn1", "conv2", "bn1")), [*ONE, ("conv2", "bn1")]),
    "a shared convolution": Case(
        Net(chain("conv1", "bn1", "conv1", "bn2")), [*ONE, ("conv1", "bn2")]
    ),
    "a pair called three times": Case(Net(chain(*["conv1", "bn1"] * 3)), ONE * 3),
    "a pair called on three scales": Case(Net(branches(3)), ONE * 3),
    "a module under two names": Case(
        nn.Sequential(STEM[0], STEM[1], STEM[0], STEM[1]), [("0", "1")] * 2
    ),
    "two BNs on one output": Case(Net(two_norms), THREE, ["conv1"]),
    "one BN twice on one output": Case(Net(one_norm_twice), THREE, ["conv1"]),
    "an output that also goes elsewhere": Case(Net(elsewhere), TWO[1:], ["conv1"]),
    "an output that goes elsewhere in a view": Case(Net(in_a_view), TWO[1:], ["conv1"]),
    "in place after BN": Case(Net(in_place_on_the_output), THREE, ["conv1"]),
    "in place between": Case(
        Net(lambda m, x: m.bn2(m.conv2(m.bn1(m.conv1(x).relu_())))), TWO[1:], ["conv1"]
    ),
    "no BN at the end": Case(Net(chain("conv1", "bn1", "conv2")), ONE, ["conv2"]),
    "one call of two is paired": Case(Net(twice_once_paired), ONE, ["conv1"]),
    "an output that is dropped": Case(Net(slot), [("conv2", "bn2")], ["conv1"]),
    "1x1 on the shortcut": Case(Net(shortcut, conv3=conv(1)), TWO),
    "3x3 on the shortcut": Case(Net(shortcut), [*TWO, ("conv3", "bn3")]),
    "a bottleneck": Case(
        Net(chain("conv1", "bn1", "conv2", "bn2", "conv3", "bn3"), conv1=conv(1), conv3=conv(1)),
        TWO[1:],
    ),
    "pre-activation": Case(Net(preactivation), [("conv1", "bn2")], ["conv2"]),
    "dense, by concatenation": Case(Net(dense), [("conv2", "bn3")], ["conv1"]),
    "stride": Case(Net(chain("conv1", "bn1"), conv1=conv(stride=2)), ONE),
    "dilation": Case(Net(chain("conv1", "bn1"), conv1=conv(dilation=2)), ONE),
    "no bias, reflected borders": Case(
        Net(chain("conv1", "bn1"), conv1=conv(bias=False, padding_mode="reflect")), ONE
    ),
    "a subclass of Conv2d": Case(Net(chain("conv1", "bn1"), conv1=Subclass(4, 4, 3)), ONE),
    "grouped": Case(Net(chain("conv1", "bn1", "conv2", "bn2"), conv1=conv(groups=2)), TWO),
    "depthwise": Case(Net(chain("conv1", "bn1", "conv2", "bn2"), conv1=conv(groups=4)), TWO),
    "grouped, left out": Case(
        Net(
            chain("conv1", "bn1", "conv2", "bn2", "conv3"),
            conv1=conv(groups=2),
            conv3=conv(groups=4),
        ),
        TWO[1:],
        options={"grouped": False},
    ),
    "dropout and identity do nothing": Case(
        Net(chain("conv1", "drop", "same", "bn1"), drop=nn.Dropout2d(), same=nn.Identity()), ONE
    ),
    "5x5 is not 3x3": Case(Net(chain("conv1", "bn1", "conv2", "bn2"), conv1=conv(5)), TWO[1:]),
    "1x1 asked for": Case(
        Net(shortcut, conv3=conv(1)), [("conv3", "bn3")], options={"kernel_size": (1, 1)}
    ),
    "5x5 asked for": Case(
        Net(chain("conv1", "bn1", "conv2", "bn2"), conv1=conv(5)), ONE, options={"kernel_size": 5}
    ),
    "1x3 asked for, 3x1 not": Case(
        Net(
            chain("conv1", "bn1", "conv2", "bn2", "conv3"),
            conv1=conv((1, 3)),
            conv2=conv((3, 1)),
            conv3=conv((1, 3)),
        ),
        ONE,
        ["conv3"],
        {"kernel_size": (1, 3)},
    ),
    "BN without parameters": Case(Net(chain("conv1", "bn1"), bn1=bn(affine=False)), ONE),
    "BN with the batch's statistics": Case(
        Net(chain("conv1", "bn1"), bn1=bn(track_running_stats=False)), ONE
    ),
    "BN by keyword": Case(Net(lambda m, x: m.bn1(input=m.conv1(input=x))), ONE),
    "SyncBatchNorm in evaluation": Case(Net(chain("conv1", "bn1"), bn1=nn.SyncBatchNorm(4)), ONE),
    "GroupNorm is no BN": Case(
        Net(chain("conv1", "gn", "conv2", "bn2"), gn=nn.GroupNorm(2, 4)), TWO[1:], ["conv1"]
    ),
    "outputs in a dict": Case(
        Net(lambda m, x: {"out": m.bn1(m.conv1(x)), "aux": m.conv2(x)}), ONE, ["conv2"]
    ),
    "outputs in a tuple": Case(Net(lambda m, x: (m.bn1(m.conv1(x)), [m.bn2(m.conv2(x))])), TWO),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_pairs(case):
    record = record_of(case.network, batches=2, **case.options)
    assert pairs_of(record) == case.pairs
    assert list(record.unpaired) == case.unpaired


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_measuring_gives_the_same_layers_and_numbers(case):
    batches = torch.randn(3, 2, 4, 8, 8).unbind()
    case.network.eval()
    record = record_of(case.network, torch.cat(batches), **case.options)
    warning = pytest.warns(UserWarning, match="not in the frame: ")
    with warning if case.unpaired or record.unseen else nullcontext():
        frame = analysis.measure(case.network, batches, **case.options)
    assert list(zip(frame["name"], frame["norm"], strict=True)) == case.pairs
    assert list(frame.attrs["unpaired"]) == case.unpaired
    assert frame["std"].tolist() == pytest.approx(
        [layer.moments.std for layer in record.layers], rel=1e-5
    )
    assert frame["count"].tolist() == [layer.moments.count * 4 for layer in record.layers]


class Twice(Net):
    """A network that calls itself, on the mirrored images too."""

    def forward(self, x, mirror=True):
        return self(x, False) + self(x.flip(3), False) if mirror else self.bn1(self.conv1(x))


def test_a_network_that_calls_itself_or_is_called_twice_for_a_batch():
    assert pairs_of(record_of(Twice(None), batches=2)) == ONE * 2
    network = Net(chain("conv1", "bn1"))
    record = record_of(network, batches=2, forward=lambda x: network(x) + network(x.flip(3)))
    assert pairs_of(record) == ONE * 2
    assert [layer.moments.count for layer in record.layers] == [2 * 8 * 8] * 2  # images, pixels


def test_several_inputs_and_a_part_of_the_network():
    x = torch.randn(2, 4, 8, 8)
    network = Net(lambda m, a, b, *, c: m.bn1(m.conv1(a)) + m.bn2(m.conv2(b)) + c)
    assert pairs_of(record_of(network, x, x, forward=lambda a, b: network(a, b, c=1))) == TWO
    network = Net(None, stem=STEM)
    assert pairs_of(record_of(network, forward=network.stem)) == [("stem.0", "stem.1")]


@pytest.mark.filterwarnings(
    "ignore:Lazy modules are a new feature:UserWarning"
)  # says an older torch
def test_lazy_modules_before_their_first_pass():
    """They become what they are, and another class, as the first batch runs."""
    make = lambda: nn.Sequential(  # noqa: E731
        nn.LazyConv2d(5, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.LazyConv2d(4, 3)
    )
    record = record_of(make(), batches=2)
    assert (pairs_of(record), list(record.unpaired)) == ([("0", "1")], ["3"])
    network, batches = make(), torch.randn(3, 2, 4, 8, 8).unbind()
    frame = measured(network, batches)
    assert list(zip(frame["name"], frame["norm"], frame["count"], strict=True)) == [
        ("0", "1", 6 * 5 * 6 * 6)
    ]
    with torch.no_grad():
        response = network.eval()[:2](torch.cat(batches)).double()
    assert frame["std"][0] == pytest.approx(response.std(correction=0).item(), rel=1e-6)
    norms = nn.Sequential(
        nn.LazyConv2d(5, 3), nn.LazyBatchNorm2d(), nn.LazyInstanceNorm2d(affine=True)
    )
    assert len(analysis.measure(norms, batches)) == 1


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        *[
            ("resnet-18", 16),
            ("resnet-34", 32),
            ("resnet-50", 16),
            ("resnet-101", 33),
            ("resnet-152", 50),
        ],
        *[("plain-18", 16), ("plain-34", 32)],
    ],
)
def test_table_1(name, layers):
    network = build(name)
    record = record_of(network, torch.randn(1, 3, 64, 64))
    expected = [
        (name, name.replace("conv", "bn"))
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)
    ]
    assert len(expected) == layers
    assert pairs_of(record) == expected  # our blocks are registered in the order in which they run
    assert record.unpaired == {}


# No pair


CHANGES = {
    "relu": (F.relu, "relu"),
    "relu in place": (lambda y: y.relu_(), "relu_"),
    "factor in place": (lambda y: y.mul_(2), "mul_"),
    "in place through a view": (lambda y: (y.view(-1)[0].zero_(), y)[1], "zero_"),
    "in place through .data": (lambda y: (y.data.mul_(2), y)[1], "mul_"),
    "transposed in place": (lambda y: y.transpose_(2, 3), "transpose_"),
    "sum": (lambda y: y + 1, "add"),
    "a part": (lambda y: y[:, :, 1:].clone(), "clone"),
    "turned": (lambda y: y.transpose(2, 3), "native_batch_norm"),
    "rounded to integers": (lambda y: y.int().float(), "_to_copy"),
}


@pytest.mark.parametrize(("change", "operation"), CHANGES.values(), ids=CHANGES)
def test_no_pair_if_something_comes_between(change, operation):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        record_of(Net(lambda m, x: m.bn1(change(m.conv1(x)))))
    start = "no 3x3 convolution whose output goes unchanged into a BN and nowhere else: conv1 (its "
    assert str(error.value).startswith(f"{start}output goes into {operation}")


SAME = {
    "clone": torch.clone,
    "view": lambda y: y.view(len(y), 4, 8, 8),
    "reshape": lambda y: y.reshape(len(y), 4, 8, 8),
    "another shape and back": lambda y: y.flatten(1).view(y.shape),
    "detach": torch.detach,
    "contiguous": lambda y: y.contiguous(),
    "channels_last": lambda y: y.contiguous(memory_format=torch.channels_last),
    "slice": lambda y: y[:],
    "float": lambda y: y.float(),
    "bfloat16 and back": lambda y: y.bfloat16().float(),
    "double": lambda y: y.double().float(),
    "several": lambda y: y.detach().clone().view(len(y), 4, 8, 8),
}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_views_copies_and_casts_leave_the_values_as_they_are(change, precision):
    flow = lambda m, x: m.bn2(m.conv2(m.bn1(change(m.conv1(x)))))  # noqa: E731
    network, x = with_statistics(Net(flow)), torch.randn(9, 4, 8, 8)
    network.conv3 = network.bn3 = None
    frame = analysis.measure(network, x.split(3), precision=precision)
    assert list(zip(frame["name"], frame["norm"], strict=True)) == TWO
    stored = []
    network.bn1.register_forward_hook(lambda m, args, y: stored.append(y))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, precision == "bfloat16"):
        network(x)
    expected = stored[0].double().std(correction=0).item()
    assert frame["std"][0] == pytest.approx(expected, rel=1e-6 if precision == "float32" else 5e-3)


PREACTIVATION = """
conv1: its output goes into blocks.0.bn1 and also into add
blocks.0.conv2: its output goes into add, not unchanged into a BN
blocks.1.conv2: its output goes into add, not unchanged into a BN
"""


class PreactivationBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn1, self.conv1, self.bn2, self.conv2 = bn(), conv(), bn(), conv()

    def forward(self, x):
        return x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))


def test_a_pre_activation_network_gives_the_first_convolution_of_each_block():
    """Its stem feeds the first block's BN and its shortcut: no pair."""
    network = nn.Sequential()
    network.conv1 = conv()
    network.blocks = nn.Sequential(PreactivationBlock(), PreactivationBlock())
    network.bn = bn()
    with pytest.warns(UserWarning, match=r"^3 layers are not in the frame: conv1 \(its output"):
        frame = analysis.measure(network, torch.randn(3, 2, 4, 8, 8))
    assert frame["name"].tolist() == ["blocks.0.conv1", "blocks.1.conv1"]
    lines = [f"{name}: {reason}" for name, reason in frame.attrs["unpaired"].items()]
    assert sorted(lines) == sorted(PREACTIVATION.split("\n")[1:-1])
    assert frame.attrs["method"] == "folded"


MESSAGES = {
    "grouped, left out": (
        Net(chain("conv1", "bn1", "conv2"), conv1=conv(groups=2), conv2=conv((1, 3))),
        {"grouped": False},
        "no 3x3 ungrouped convolution whose output goes unchanged into a BN and nowhere else: the "
        "network ran conv1 (Conv2d 3x3, 2 groups), bn1 (BatchNorm2d), conv2 (Conv2d 1x3); look at",
    ),
    "another kernel": (
        Net(chain("conv1", "bn1")),
        {"kernel_size": (5, 1)},
        "no 5x1 convolution whose output goes unchanged into a BN and nowhere else: the network ran "
        "conv1 (Conv2d 3x3), bn1 (",
    ),
    "many": (
        nn.Sequential(*[conv(1) for _ in range(14)], bn()),
        {},
        "10 (Conv2d 1x1), 11 (Conv2d 1x1) and 3 more; look at",
    ),
    "a convolution without BN": (
        nn.Sequential(conv(), nn.ReLU()),
        {},
        "the network has no BN: analysis.measure_branches measures its residual additions",
    ),
    "functions": (
        Net(
            lambda m, x: F.batch_norm(
                F.conv2d(x, m.conv1.weight), m.bn1.running_mean, m.bn1.running_var
            )
        ),
        {},
        "hooks saw no convolution and no BN, since they see modules, no functions",
    ),
    "kernel_size": (
        Net(chain("conv1", "bn1")),
        {"kernel_size": (3, 0)},
        "kernel_size must be one or two positive integers, such as 3 or (3, 3), not (3, 0)",
    ),
}


@pytest.mark.parametrize(("network", "options", "message"), MESSAGES.values(), ids=MESSAGES)
def test_messages(network, options, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        record_of(network, **options)
    assert message in str(error.value)


# Norms that are not torch's own, and what they respond


class Frozen(nn.Module):
    """The four tensors of a BN as buffers; subclasses say epsilon in the ways of their libraries."""

    def __init__(self):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(4))

    def scaled(self, x, eps):
        scale = self.weight * (self.running_var + eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)  # (4,) -> (1, 4, 1, 1)


class TorchvisionFrozen(Frozen):
    eps = 3e-4  # a parameter there

    def forward(self, x):
        return self.scaled(x, self.eps)


class DetrFrozen(Frozen):
    def forward(self, x):
        return self.scaled(x, 1e-5)


class TensorFlowFrozen(Frozen):
    def forward(self, x):
        return self.scaled(x, 1e-3)


class MaskrcnnFrozen(Frozen):
    def forward(self, x):
        return self.scaled(x, 0)


class BatchNormAct(nn.BatchNorm2d):
    """timm's BatchNormAct2d in small: dropout and activation are its submodules."""

    def __init__(self, act, eps=1e-5):
        super().__init__(4, eps=eps)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class FrozenAct(DetrFrozen):
    """timm's FrozenBatchNormAct2d in small."""

    def __init__(self):
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(super().forward(x))


def with_statistics(network):
    """BN numbers that are not the fresh ones, with variances so small that epsilon counts;
    evaluation mode.
    """
    for module in network.modules():
        for name, low, high in (
            ("weight", 0.5, 2),
            ("bias", -1, 1),
            ("running_mean", -0.1, 0.1),
            ("running_var", 1e-5, 1e-3),
        ):
            tensor = getattr(module, name, None)
            if hasattr(module, "running_var") and tensor is not None:
                nn.init.uniform_(tensor, low, high)
    return network.eval()


NORMS = {
    "BatchNorm2d": (bn(eps=1e-4), 1e-4),
    "a subclass": (type("Subclass", (nn.BatchNorm2d,), {})(4, eps=1e-4), 1e-4),
    "SyncBatchNorm": (nn.SyncBatchNorm(4), 1e-5),
    "InstanceNorm2d with statistics": (
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        1e-5,
    ),
    "torchvision's frozen": (TorchvisionFrozen(), 3e-4),
    "DETR's frozen": (DetrFrozen(), 1e-5),
    "frozen, of TensorFlow": (TensorFlowFrozen(), 1e-3),
    "maskrcnn-benchmark's frozen": (MaskrcnnFrozen(), 0),
    "with ReLU": (BatchNormAct(nn.ReLU()), 1e-5),
    "with ReLU in place": (BatchNormAct(nn.ReLU(inplace=True), eps=1e-3), 1e-3),
    "with SiLU": (BatchNormAct(nn.SiLU()), 1e-5),
    "with PReLU": (BatchNormAct(nn.PReLU(4)), 1e-5),
    "with nothing": (BatchNormAct(nn.Identity()), 1e-5),
    "frozen, with ReLU": (FrozenAct(), 1e-5),
}


@pytest.mark.parametrize(("norm", "eps"), NORMS.values(), ids=NORMS)
def test_the_response_is_what_the_four_tensors_make_of_it(norm, eps):
    network = with_statistics(nn.Sequential(conv(), norm))
    batches = torch.randn(3, 4, 4, 8, 8).unbind()
    outputs = [network(x) for x in batches]
    record = record_of(network, torch.cat(batches), batches=3)
    y = network[0](torch.cat(batches)).double()
    mean, var, weight, bias = (
        getattr(norm, name).double().reshape(1, 4, 1, 1)
        for name in ("running_mean", "running_var", "weight", "bias")
    )
    response = (y - mean) / (var + eps).sqrt() * weight + bias
    [layer] = record.layers
    assert layer.moments.std == pytest.approx(response.std(correction=0).item(), rel=1e-6)
    assert layer.moments.mean.tolist() == pytest.approx(
        response.mean((0, 2, 3)).tolist(), rel=1e-5, abs=1e-5
    )
    assert all(torch.equal(network(x), output) for x, output in zip(batches, outputs, strict=True))


def test_the_response_under_the_batch_statistics_is_standardised():
    network = nn.Sequential(conv(), BatchNormAct(nn.ReLU())).eval()
    network[1].running_mean = network[1].running_var = None
    network[1].track_running_stats = False
    [layer] = record_of(network).layers
    assert layer.moments.std == pytest.approx(1, rel=1e-3)
    assert layer.moments.between == pytest.approx(0, abs=1e-6)


class Doubled(nn.BatchNorm2d):
    """A BN that leaves the work to another."""

    def __init__(self):
        super().__init__(4)
        self.inner = bn()

    def forward(self, x):
        return self.inner(x)


def test_a_bn_in_a_bn_gives_one_layer_that_of_the_inner():
    network = with_statistics(Net(chain("conv1", "bn1", "conv2", "bn2"), bn1=Doubled()))
    record = record_of(network)
    assert pairs_of(record) == [("conv1", "bn1.inner"), ("conv2", "bn2")]
    assert record.unpaired == {}


def test_in_bfloat16_rounding_is_no_activation():
    network = with_statistics(nn.Sequential(conv(), BatchNormAct(nn.ReLU())))
    with torch.autocast("cpu", torch.bfloat16):
        assert pairs_of(record_of(network)) == [("0", "1")]


def test_an_activation_that_nothing_names_is_an_error():
    class Activated(nn.BatchNorm2d):
        def forward(self, x):
            return F.relu(super().forward(x))

    with pytest.raises(ValueError) as error:  # noqa: PT011
        record_of(Net(chain("conv1", "bn1"), bn1=Activated(4)))
    assert str(error.value) == (
        "bn1 (Activated) has the tensors of a BN, but its output is neither what they "
        "make of its input nor that after its submodules: put its activation into a submodule or behind it, or use nn.BatchNorm2d"
    )


def test_an_activation_in_a_forward_that_was_set_on_a_bn_is_an_error():
    norm = with_statistics(bn())
    norm.forward = lambda x: F.relu(nn.BatchNorm2d.forward(norm, x))
    with pytest.raises(
        ValueError,
        match=r"bn1 \(BatchNorm2d\) has the tensors of a BN, but its output is neither what",
    ):
        record_of(Net(chain("conv1", "bn1"), bn1=norm))
    norm.forward = lambda x: nn.BatchNorm2d.forward(norm, x)
    assert pairs_of(record_of(Net(chain("conv1", "bn1"), bn1=norm))) == ONE


def test_submodules_that_do_not_run_on_the_response():
    class Branched(nn.BatchNorm2d):
        def __init__(self):
            super().__init__(4)
            self.branches = nn.ModuleList([nn.ReLU()])

        def forward(self, x):
            return self.branches[0](super().forward(x))

    with pytest.raises(
        ValueError,
        match=r"bn1 \(Branched\) has the tensors of a BN, but its output is neither what",
    ):
        record_of(Net(chain("conv1", "bn1"), bn1=Branched()))


def test_the_activation_is_looked_at_without_its_hooks():
    norm, calls = BatchNormAct(nn.ReLU()), []
    norm.act.register_forward_hook(lambda *args: calls.append(1))
    record_of(nn.Sequential(conv(), norm), batches=2)
    assert calls == [1, 1]


def test_a_response_that_is_not_finite():
    network = nn.Sequential(conv(), BatchNormAct(nn.ReLU()))
    nn.init.constant_(network[1].running_var, -1)
    with pytest.raises(
        ValueError,
        match=r"^NaN or infinity in the response of layer 1 \(0\) in batch 1: look at the w",
    ):
        record_of(network)


# Hooks, modes and wrappers of the user's


def doubled(module, args, output):
    return output * 2


def doubled_in_place(module, args, output):
    output.mul_(2)


def test_hooks_that_change_what_a_convolution_puts_out_part_it_from_its_bn():
    for hook in (doubled, doubled_in_place):
        network = Net(chain("conv1", "bn1", "conv2", "bn2"))
        network.conv1.register_forward_hook(hook)
        record = record_of(network)
        assert (pairs_of(record), list(record.unpaired)) == (TWO[1:], ["conv1"])
    network = Net(chain("conv1", "bn1", "conv2", "bn2"))
    network.bn1.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    record = record_of(network)
    assert (pairs_of(record), list(record.unpaired)) == (TWO[1:], ["conv1"])


@pytest.mark.parametrize("hook", [doubled, doubled_in_place])
@pytest.mark.parametrize("norm", [bn(), BatchNormAct(nn.Identity())])
def test_hooks_that_change_what_a_bn_puts_out_come_after_its_response(norm, hook):
    network, x = nn.Sequential(conv(), norm), torch.randn(2, 4, 8, 8)
    expected = record_of(network, x).layers[0].moments.std
    handle = norm.register_forward_hook(hook)
    [layer] = record_of(network, x).layers
    assert layer.moments.std == expected
    handle.remove()


def test_hooks_of_all_modules_that_change_what_a_bn_puts_out_are_an_error():
    """They run before those of a module."""
    network = nn.Sequential(conv(), bn())
    expected = record_of(network).layers[0].norm
    with register_module_forward_hook(lambda module, args, output: None):
        assert record_of(network).layers[0].norm == expected
    double = lambda module, args, output: output * 2 if isinstance(module, nn.BatchNorm2d) else None  # noqa: E731
    with (
        register_module_forward_hook(double),
        pytest.raises(ValueError, match="its output is neither what they make of"),
    ):
        record_of(network)


def test_convolutions_that_do_not_run_as_modules_are_named():
    network = Net(lambda m, x: m.bn2(m.conv2.forward(m.bn1(m.conv1(x)))), conv3=conv(kernel=1))
    reasons = {"conv2": "it did not run as a module", "bn2": UNKNOWN}
    assert record_of(network, batches=2).unseen == reasons
    with pytest.warns(UserWarning, match=r"^2 layers are not in the frame: conv2 \(it did not run"):
        frame = analysis.measure(network, torch.randn(2, 2, 4, 8, 8))
    assert (frame["name"].tolist(), frame.attrs["unseen"]) == (["conv1"], reasons)
    assert record_of(Net(chain("conv1", "bn1", "conv2", "bn2", "conv3", "bn3"))).unseen == {}


class OwnConv(_ConvNd):
    """A convolution that is written on torch's private base class."""

    def __init__(self):
        super().__init__(
            *(4, 4, (3, 3), (1, 1), (1, 1), (1, 1)), False, (0, 0), 1, True, padding_mode="zeros"
        )

    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, padding=1)


def test_convolutions_of_other_classes_are_measured():
    network = with_statistics(Net(chain("conv1", "bn1"), conv1=OwnConv()))
    x = torch.randn(6, 4, 8, 8)
    frame = measured(network, x.split(2))
    expected = network(x).double().std(correction=0).item()
    assert frame["std"].tolist() == pytest.approx([expected], rel=1e-6)


class Weights(nn.Module):
    """A convolution of no class that is known."""

    def __init__(self, size=3):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 4, size, size))

    def forward(self, x):
        return F.conv2d(x, self.kernel, padding=self.kernel.shape[-1] // 2)


def test_a_norm_after_a_convolution_that_is_no_known_module_is_named():
    make = lambda size: Net(  # noqa: E731
        chain("own", "bn1", "conv2", "bn2", "conv3", "bn3"), conv1=None, own=Weights(size)
    )
    assert record_of(make(3)).unseen == {"bn1": UNKNOWN}
    assert record_of(make(1)).unseen == {}
    frame = measured(make(3), torch.randn(3, 2, 4, 8, 8))
    assert (frame["norm"].tolist(), frame.attrs["method"]) == (["bn2", "bn3"], "folded")


class Hidden(Net):
    """A network with modules in a plain list, which torch does not see."""

    def __init__(self, *hidden):
        super().__init__(chain("conv1", "bn1"), conv2=None, bn2=None, conv3=None, bn3=None)
        self.hidden = list(hidden)

    def forward(self, x):
        x = super().forward(x)
        for module in self.hidden:
            x = module(x)
        return x


def test_a_bn_in_a_plain_list_is_not_changed():
    network = Hidden(conv(), bn())
    before = {name: x.clone() for name, x in network.hidden[1].state_dict().items()}
    with pytest.raises(ValueError, match="a BatchNorm2d that is not registered in the network wou"):
        analysis.measure(network, torch.randn(3, 2, 4, 8, 8))
    after = network.hidden[1].state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    assert network.training
    network.hidden[1].eval()
    assert list(record_of(network).unseen) == [
        "a BatchNorm2d that is not registered in the network"
    ]


def test_a_convolution_in_a_plain_list_before_a_known_bn():
    network = Hidden(conv())
    network.last = bn()
    network.hidden.append(network.last)
    assert record_of(network).unseen == {"last": UNKNOWN}


class Heads(Net):
    """A detector: its second stage runs on what the first one found."""

    def __init__(self):
        super().__init__(lambda m, x: m.bn2(m.conv2(m.bn1(m.conv1(x))[x.mean((1, 2, 3)) > 0])))


@pytest.mark.parametrize("norm", [bn, lambda: BatchNormAct(nn.Identity())])
def test_a_layer_to_which_nothing_comes_in_some_batches(norm):
    network = Heads()
    network.bn2 = norm()
    some, none = (torch.randn(3, 4, 8, 8) + offset for offset in (5, -5))
    for batches in ([some, none, some], [none, some], [some, some, none, some]):
        found, few = (
            measured(network, images) for images in (batches, [b for b in batches if b is not none])
        )
        assert found["std"][1] == pytest.approx(few["std"][1], rel=1e-6)
        assert found["count"].tolist() == [len(batches) * 3 * 4 * 64, few["count"][1]]
    with pytest.raises(ValueError, match="no image gave a response of conv2: use other images"):
        measured(network, [none, none])


def test_backward_hooks_do_not_part_a_pair():
    network = Net(chain("conv1", "bn1"))
    for module in (network, network.conv1, network.bn1):
        module.register_full_backward_hook(lambda *args: None)
        module.register_full_backward_pre_hook(lambda *args: None)
    assert pairs_of(record_of(network)) == ONE


def in_inference_mode(m, x):
    with torch.inference_mode():
        return m.bn1(m.conv1(x))


def test_inference_mode():
    with torch.inference_mode():
        network, x = Net(chain("conv1", "bn1")), torch.randn(2, 4, 8, 8)
        frame = measured(network, [x])
    assert frame["name"].tolist() == ["conv1"]
    assert pairs_of(record_of(network, x)) == ONE  # its tensors were made in inference mode
    with pytest.raises(ValueError) as error:  # noqa: PT011
        record_of(Net(in_inference_mode))
    assert str(error.value) == (
        "conv1 runs in torch.inference_mode, where a change in place leaves no trace: use torch.no_grad instead"
    )


@pytest.fixture
def one_process():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "one in the other": lambda network: nn.DataParallel(
        nn.parallel.DistributedDataParallel(network)
    ),
    "a part": lambda network: Net(lambda m, x: m.part(x), part=nn.DataParallel(network)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_are_not_in_the_names_and_work_as_before(wrap, one_process):
    network = nn.Sequential(conv(), bn())
    wrapped, x = wrap(network), torch.randn(2, 4, 8, 8)
    before = [set(vars(module)) for module in wrapped.modules()]
    prefix = "part." if isinstance(wrapped, Net) else ""
    assert pairs_of(record_of(wrapped, x)) == [(f"{prefix}0", f"{prefix}1")]
    assert [set(vars(module)) for module in wrapped.modules()] == before
    assert torch.equal(wrapped(x), network(x))


def test_a_wrapper_runs_in_one_process_and_keeps_a_forward_that_was_set_on_it():
    wrapped = nn.DataParallel(Net(chain("conv1", "bn1")))
    ran = []
    own = wrapped.forward = lambda x: ran.append(x)
    assert pairs_of(record_of(wrapped)) == ONE
    assert wrapped.forward is own
    assert ran == []


def test_what_a_wrapper_of_the_users_does_is_done():
    class Scaling(nn.DataParallel):
        def forward(self, x):
            return self.module(10 * x)

    network, x = Net(chain("conv1", "bn1")), torch.randn(2, 4, 8, 8)
    [expected], [layer] = record_of(network, 10 * x).layers, record_of(Scaling(network), x).layers
    assert layer.moments.std == expected.moments.std


def compiled_in_place(network, **options):
    network.compile(**options)
    return network


def compiled_part(network, **options):
    return nn.Sequential(nn.Identity(), torch.compile(network, **options))


COMPILED = {
    "torch.compile": torch.compile,
    "module.compile": compiled_in_place,
    "a part": compiled_part,
    "in DataParallel": lambda network, **options: nn.DataParallel(
        torch.compile(network, **options)
    ),
    "of DataParallel": lambda network, **options: torch.compile(
        nn.DataParallel(network), **options
    ),
}


@pytest.mark.parametrize("wrap", COMPILED.values(), ids=COMPILED)
def test_compiled_networks_run_eagerly_while_they_are_recorded(wrap):
    calls, x = [], torch.randn(2, 4, 8, 8)

    def backend(graph, inputs):
        return lambda *args: (calls.append(1), graph.forward(*args))[1]

    network = wrap(
        Net(chain("conv1", "bn1")).eval(), backend=backend
    ).eval()  # torch does not compile its Sequential
    expected = network(x)
    assert calls
    calls.clear()
    record = record_of(network, x, batches=2)
    assert pairs_of(record) == ([("1.conv1", "1.bn1")] if wrap is compiled_part else ONE)
    assert calls == []
    assert torch.equal(network(x), expected)
    assert calls


# Several passes


def record_two(flow):
    network, x = Net(flow), torch.randn(2, 4, 8, 8)
    record = Recording(network)
    with torch.no_grad():
        for batch in (x, x[:1]):
            with record.watching():
                network(batch)
            record.end_pass()


@pytest.mark.parametrize(
    ("first", "second", "what"),
    [
        (("conv1", "bn1"), ("conv2", "bn1"), "conv2 -> bn1 ran"),
        (("conv1", "bn1"), ("conv1", "bn2"), "conv1 -> bn2 ran"),
        (("conv1", "bn1"), ("conv1", "bn1", "conv2", "bn2"), "conv2 -> bn2 ran"),
        (("conv1", "bn1", "conv2", "bn2"), ("conv1", "bn1"), "conv2 did not run"),
    ],
)
def test_a_batch_on_another_path(first, second, what):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        record_two(lambda m, x: chain(*(first if len(x) == 2 else second))(m, x))
    assert str(error.value) == (
        f"batch 2 takes another path through the network than the first: {what}; "
        "all batches of a measurement must run the same layers"
    )


def test_outputs_of_the_pass_before_are_forgotten():
    kept = []

    def flow(m, x):
        kept.append(m.conv1(x))
        return m.bn1(kept[0])

    with pytest.raises(ValueError, match="the first: conv1 did not run"):
        record_two(flow)


def test_hooks_and_forwards_are_taken_back_after_an_error():
    network = nn.DataParallel(Net(lambda m, x: m.bn1(m.conv1(x)) / "zero"))
    own, record = set(vars(network)), Recording(network)
    with pytest.raises(TypeError), record.watching():
        network(torch.randn(2, 4, 8, 8))
    assert not hooks_of_all._global_forward_hooks
    assert not hooks_of_all._global_forward_pre_hooks
    assert _get_current_dispatch_mode() is None
    assert set(vars(network)) == own
