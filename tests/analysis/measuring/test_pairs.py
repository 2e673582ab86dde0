"""Pairs by data flow: many small networks, the norms and wrappers that people have, and the memory
that it takes.
"""

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.nn.modules.module import register_module_forward_hook

import analysis
from analysis.measuring.pairs import recording
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


def record_of(network, *args, passes=1, forward=None, kernel_size=(3, 3), grouped=True):
    """What is recorded of a network, and no hook is left."""
    args = args or (torch.randn(2, 4, 8, 8),)
    network.eval()
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
    "two BNs on one output": Case(Net(two_norms), [("conv1", "bn1"), ("conv1", "bn2")]),
    "an output that also goes elsewhere": Case(Net(elsewhere), ONE),
    "in place after BN": Case(Net(in_place_on_the_output), [("conv1", "bn1"), ("conv3", "bn3")]),
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
    record = record_of(case.network, passes=2, **case.options)
    assert pairs_of(record) == case.pairs
    assert record.unpaired == case.unpaired


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_measuring_gives_the_same_layers_and_numbers(case):
    batches = torch.randn(3, 2, 4, 8, 8).unbind()
    case.network.eval()
    with torch.no_grad(), recording(case.network, **case.options) as record:
        for x in batches:
            case.network(x)
            record.end_pass()
    frame = analysis.measure(case.network, batches, **case.options)
    assert list(zip(frame["name"], frame["norm"], strict=True)) == case.pairs
    assert frame.attrs["unpaired"] == case.unpaired
    assert frame["std"].tolist() == pytest.approx(
        [layer.moments.std for layer in record.layers], rel=1e-5
    )
    assert frame["count"].tolist() == [layer.moments.count * 4 for layer in record.layers]


class Twice(Net):
    """A network that calls itself, on the mirrored images too."""

    def forward(self, x, mirror=True):
        return self(x, False) + self(x.flip(3), False) if mirror else self.bn1(self.conv1(x))


def test_a_network_that_calls_itself_or_is_called_twice_for_a_batch():
    assert pairs_of(record_of(Twice(None), passes=2)) == ONE * 2
    network = Net(chain("conv1", "bn1"))
    record = record_of(network, passes=2, forward=lambda x: network(x) + network(x.flip(3)))
    assert pairs_of(record) == ONE * 2
    assert [layer.moments.count for layer in record.layers] == [
        2 * 2 * 8 * 8
    ] * 2  # passes, images, pixels


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
    record = record_of(make(), passes=2)
    assert (pairs_of(record), record.unpaired) == ([("0", "1")], ["3"])
    network, batches = make(), torch.randn(3, 2, 4, 8, 8).unbind()
    frame = analysis.measure(network, batches)
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
    assert record.unpaired == []


# No pair


CHANGES = {
    "relu": F.relu,
    "relu in place": lambda y: y.relu_(),
    "factor in place": lambda y: y.mul_(2),
    "in place through a view": lambda y: (y.view(-1)[0].zero_(), y)[1],
    "transposed in place": lambda y: y.transpose_(2, 3),
    "sum": lambda y: y + 1,
    "clone": torch.clone,
    "view": lambda y: y.view(2, 4, 8, 8),
    "reshape": lambda y: y.reshape(2, 4, 8, 8),
    "detach": torch.detach,
    "channels_last": lambda y: y.contiguous(memory_format=torch.channels_last),
    "slice": lambda y: y[:],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_no_pair_where_something_comes_between(change):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        record_of(Net(lambda m, x: m.bn1(change(m.conv1(x)))))
    assert str(error.value) == (
        "no 3x3 convolution whose output goes unchanged into a BN; the network ran conv1 (Conv2d 3x3), "
        "bn1 (BatchNorm2d): look at the kernels, and at what comes between the two"
    )


MESSAGES = {
    "grouped, left out": (
        Net(chain("conv1", "bn1", "conv2"), conv1=conv(groups=2), conv2=conv((1, 3))),
        {"grouped": False},
        "no 3x3 ungrouped convolution whose output goes unchanged into a BN; the network ran conv1 (Conv2d 3x3, "
        "2 groups), bn1 (BatchNorm2d), conv2 (Conv2d 1x3): look at",
    ),
    "another kernel": (
        Net(chain("conv1", "bn1")),
        {"kernel_size": (5, 1)},
        "no 5x1 convolution whose output goes unchanged into a BN; the network ran conv1 (Conv2d 3x3), bn1 (",
    ),
    "many": (
        nn.Sequential(*[conv(1) for _ in range(14)]),
        {},
        "10 (Conv2d 1x1), 11 (Conv2d 1x1) and 2 more: look at",
    ),
    "the network is a convolution": (conv(), {}, "the network ran (Conv2d 3x3): look at"),
    "nothing": (
        Net(
            lambda m, x: F.batch_norm(
                F.conv2d(x, m.conv1.weight), m.bn1.running_mean, m.bn1.running_var
            )
        ),
        {},
        "the network ran no convolution and no BN that hooks could see: they see modules that are called, not functions",
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
    with torch.no_grad(), recording(network) as record:
        for x in batches:
            network(x)
            record.end_pass()
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
    assert record.unpaired == []


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
        "bn1 (Activated) has the tensors of a BN, but its output is not what they make of its input, nor that after "
        "its submodules: put its activation into a submodule or behind it, or use nn.BatchNorm2d"
    )


def test_an_activation_in_a_forward_that_was_set_on_a_bn_is_an_error():
    norm = with_statistics(bn())
    norm.forward = lambda x: F.relu(nn.BatchNorm2d.forward(norm, x))
    with pytest.raises(
        ValueError, match=r"bn1 \(BatchNorm2d\) has the tensors of a BN, but its output is not what"
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
        ValueError, match=r"bn1 \(Branched\) has the tensors of a BN, but its output is not what"
    ):
        record_of(Net(chain("conv1", "bn1"), bn1=Branched()))


def test_the_activation_is_looked_at_without_its_hooks():
    norm, calls = BatchNormAct(nn.ReLU()), []
    norm.act.register_forward_hook(lambda *args: calls.append(1))
    record_of(nn.Sequential(conv(), norm), passes=2)
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
        assert (pairs_of(record), record.unpaired) == (TWO[1:], ["conv1"])
    network = Net(chain("conv1", "bn1", "conv2", "bn2"))
    network.bn1.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    record = record_of(network)
    assert (pairs_of(record), record.unpaired) == (TWO[1:], ["conv1"])


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
        pytest.raises(ValueError, match="its output is not what they make of"),
    ):
        record_of(network)


def test_convolutions_of_which_hooks_see_no_call_are_named():
    network = Net(lambda m, x: m.bn2(m.conv2.forward(m.bn1(m.conv1(x)))), conv3=conv(kernel=1))
    assert record_of(network, passes=2).unseen == ["conv2"]
    frame = analysis.measure(network, torch.randn(2, 2, 4, 8, 8))
    assert (frame["name"].tolist(), frame.attrs["unseen"]) == (["conv1"], ["conv2"])
    assert record_of(Net(chain("conv1", "bn1", "conv2", "bn2", "conv3", "bn3"))).unseen == []


def test_one_bn_twice_on_one_output():
    assert (
        pairs_of(record_of(Net(lambda m, x: torch.add(m.bn1(y := m.conv1(x)), m.bn1(y)))))
        == ONE * 2
    )


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
            analysis.measure(network, images)
            for images in (batches, [b for b in batches if b is not none])
        )
        assert found["std"][1] == pytest.approx(few["std"][1], rel=1e-6)
        assert found["count"].tolist() == [len(batches) * 3 * 4 * 64, few["count"][1]]
    with pytest.raises(ValueError, match="no image gave a response of conv2: take others"):
        analysis.measure(network, [none, none])


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
        frame = analysis.measure(network, [x])
    assert frame["name"].tolist() == ["conv1"]
    assert pairs_of(record_of(network, x)) == ONE  # its tensors were made in inference mode
    with pytest.raises(ValueError) as error:  # noqa: PT011
        record_of(Net(in_inference_mode))
    assert str(error.value) == (
        "conv1 runs in torch.inference_mode, where a change in place leaves no trace: use torch.no_grad in its place"
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
    record = record_of(network, x, passes=2)
    assert pairs_of(record) == ([("1.conv1", "1.bn1")] if wrap is compiled_part else ONE)
    assert calls == []
    assert torch.equal(network(x), expected)
    assert calls


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # people have such files
def test_torch_jit_is_an_error():
    scripted = torch.jit.trace(nn.Sequential(conv(), bn()).eval(), torch.randn(2, 4, 8, 8))
    for network, name in (
        (scripted, "the network"),
        (Net(chain("conv1", "bn1"), head=scripted), "head"),
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            record_of(network)
        assert str(error.value) == (
            f"{name} is a torch.jit module, and hooks see nothing of what runs inside it: "
            "measure the network that it was made from"
        )


# Several passes


def record_two(flow):
    network, x = Net(flow), torch.randn(2, 4, 8, 8)
    with torch.no_grad(), recording(network) as record:
        for batch in (x, x[:1]):
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
        return m.bn1(kept[-1]) + m.bn2(kept[0])

    with pytest.raises(ValueError, match="the first: conv1 did not run"):
        record_two(flow)


def test_hooks_and_forwards_are_taken_back_after_an_error():
    network = nn.DataParallel(Net(lambda m, x: m.bn1(m.conv1(x)) / "zero"))
    hooks, own = hooks_of(network), set(vars(network))
    with pytest.raises(TypeError), recording(network):
        network(torch.randn(2, 4, 8, 8))
    assert hooks_of(network) == hooks
    assert set(vars(network)) == own
