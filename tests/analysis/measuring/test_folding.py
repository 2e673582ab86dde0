import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import analysis
from analysis.baselines import two_pass
from analysis.measuring.measurement import measuring
from models import build


def conv(channels=4, kernel=3, inputs=4, **options):
    return nn.Conv2d(inputs, channels, kernel, padding=kernel // 2, **options)


def with_statistics(network):
    """BN numbers that are not the fresh ones, so that before and after BN differ."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 2)
                nn.init.normal_(module.bias)
            if module.running_mean is not None:
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2)
    return network.eval()


class Net(nn.Module):
    """Modules by name, and a function that runs them: small networks with a data flow of their own."""

    def __init__(self, flow, **modules):
        super().__init__()
        self.flow = flow
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.flow(self, x)


def pair(**options):
    return {"conv": conv(**options), "bn": nn.BatchNorm2d(4)}


def images(count=6, channels=4, size=8):
    return torch.randn(count, channels, size, size)


def check(network, batches, method="folded", rel=1e-6, **options):
    """The frame of a network, which is that of a two-pass in float64."""
    frame = analysis.measure(with_statistics(network), batches, **options)
    assert frame.attrs["method"] == method
    expected = two_pass(network, frame["norm"].tolist(), lambda: batches)
    assert frame["std"].tolist() == pytest.approx(expected, rel=rel)
    return frame


def test_our_networks_are_folded():
    for name in ("resnet-8", "plain-8"):
        frame = check(build(name), images(9, 3, 32).split(2))
        assert frame["images"].unique().tolist() == [9]


def test_a_bottleneck_with_all_its_kernels():
    """The convolutions that are not measured are folded, too."""
    network = with_statistics(build("resnet-50").layer1)
    network[0].downsample[0].bias = nn.Parameter(torch.randn(256))
    frame = check(network, images(5, 64, 16).split(2))
    assert len(frame) == 3
    with measuring(network) as meter:
        for x in images(4, 64, 16).split(2):
            meter.add(x)
    [pairs] = meter.folding.proven.values()
    assert len(pairs) == 10


@pytest.mark.parametrize(
    "options", [{"bias": False}, {"stride": 2}, {"groups": 2}, {"groups": 4}, {"dilation": 2}]
)
def test_any_convolution(options):
    check(
        nn.Sequential(conv(**options), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten()),
        images(7).split(3),
    )


def test_a_bn_without_weights_and_one_that_is_called_by_keyword():
    network = Net(
        lambda m, x: m.bn(input=m.conv(x)), conv=conv(), bn=nn.BatchNorm2d(4, affine=False, eps=0.1)
    )
    check(network, images(7).split(3))


def test_other_kernels_groups_and_sizes_of_images():
    network = nn.Sequential(
        conv(kernel=5), nn.BatchNorm2d(4), nn.ReLU(), conv(groups=2), nn.BatchNorm2d(4)
    )
    sizes = [images(), images(), images(3, size=12), images(3, size=12), images(2)]
    assert check(network, sizes, kernel_size=5)["name"].tolist() == ["0"]
    check(network, sizes[1:3], "hooks: one batch of each size only", kernel_size=5)
    assert check(network, images().split(2))["name"].tolist() == ["3"]


def test_a_network_that_takes_another_way_for_images_of_another_size():
    """There the convolution's output goes elsewhere, too; modules do not show it."""

    def flow(m, x):
        y = m.conv(x)
        z = m.bn(y)
        return m.bn2(m.conv2(z + y if x.shape[-1] > 8 else z))

    network = Net(flow, conv=conv(), bn=nn.BatchNorm2d(4), conv2=conv(), bn2=nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="batch 3 takes another path through the network than"):
        analysis.measure(network, [images(), images(), images(size=12)])


def test_in_any_layout_and_batches_with_labels():
    network = with_statistics(build("resnet-8"))
    x = images(8, 3, 32)
    labels = network(x).argmax(1)
    labels[:2] = (labels[:2] + 1) % 10
    parts = list(
        zip(x.to(memory_format=torch.channels_last).split(3), labels.split(3), strict=True)
    )
    frame = analysis.measure(network, parts)
    assert frame.attrs == {"accuracy": 0.75, "unpaired": {}, "unseen": {}, "method": "folded"}


def test_dicts_of_tensors():
    class Takes(nn.Sequential):
        def forward(self, pixels):
            return {"logits": super().forward(pixels).mean((2, 3))}

    frame = analysis.measure(Takes(conv(), nn.BatchNorm2d(4)), [{"pixels": images()}] * 3)
    assert frame.attrs["method"] == "folded"


@pytest.mark.filterwarnings("ignore:1 layer is not in the frame")
def test_unpaired_convolutions():
    network = Net(lambda m, x: m.last(m.bn(m.conv(x))), **pair(), last=conv())
    unpaired = check(network, images().split(2)).attrs["unpaired"]
    assert unpaired == {"last": "its output goes into no BN"}


@pytest.mark.parametrize("offset", [30.0, 1e3, 1e5])
def test_means_far_from_zero(offset):
    network = Net(
        lambda m, x: m.bn2(m.conv2(m.bn(m.conv(x)))), **pair(), conv2=conv(), bn2=nn.BatchNorm2d(4)
    )
    with_statistics(network)
    nn.init.constant_(network.bn.bias, offset)
    frame = analysis.measure(network, (batches := images(40).split(8)))
    assert frame.attrs["method"] == "folded"
    expected = [within_of(network, name, batches) for name in frame["norm"]]
    # the responses themselves are rounded to 6e-8 of the mean
    assert frame["within"].tolist() == pytest.approx(expected, rel=1e-5 + 1e-7 * offset)


@torch.no_grad()
def within_of(network, name, batches):
    responses = []
    with network.get_submodule(name).register_forward_hook(
        lambda m, args, y: responses.append(y.double())
    ):
        for x in batches:
            network(x)
    return torch.cat(responses).var((0, 2, 3), correction=0).mean().sqrt().item()


def test_dead_channels():
    network = nn.Sequential(conv(), nn.BatchNorm2d(4))
    nn.init.zeros_(network[0].weight[:3].detach())
    check(network, images(9).split(3))


def test_means_that_go_far_after_the_first_batch():
    network = nn.Sequential(conv(), nn.BatchNorm2d(4))
    nn.init.uniform_(network[0].weight, 0.5, 1)
    batches = [images(), *(images() + 1e3 for _ in range(3))]
    method = "hooks: from batch 2 on, means far from zero that were near it in the first batch"
    check(network, batches, method)


def test_bfloat16_is_near():
    network, batches = build("resnet-8"), images(16, 3, 32).split(4)
    exact = analysis.measure(network, batches)["std"]
    near = analysis.measure(network, batches, precision="bfloat16")
    assert near.attrs["method"] == "folded"
    assert not near["std"].equals(exact)
    assert near["std"].tolist() == pytest.approx(exact.tolist(), rel=0.02)


# What changes while a network is measured is seen


def responses_of(network, batches, change):
    """The stds of a network that changes after every batch: stored responses in float64."""
    stored = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            hook = lambda m, args, y, name=name: stored.setdefault(name, []).append(y.double())  # noqa: E731
            module.register_forward_hook(hook)
    with torch.no_grad():
        for x in batches:
            network(x)
            change(network)
    return [torch.cat(parts).std(correction=0).item() for parts in stored.values()]


def two_layers(**options):
    torch.manual_seed(0)
    modules = {"conv": conv(), "bn": nn.BatchNorm2d(4), "conv2": conv(), "bn2": nn.BatchNorm2d(4)}
    network = Net(lambda m, x: m.bn2(m.conv2(m.gain * F.relu(m.bn(m.conv(x))))), **modules)
    network.gain = 1.0
    return with_statistics(network)


def replaced_data(network):
    network.conv.weight.data = network.conv.weight.data * 1.2


def replaced_parameter(network):
    network.bn2.bias = nn.Parameter(network.bn2.bias + 0.5)


def replaced_module(network):
    network.conv.weight = nn.Parameter(network.conv.weight * 1.1)
    network.conv.bias = None


CHANGES = {
    "weight in place": lambda n: n.bn.weight.mul_(1.3),
    "convolution in place": lambda n: n.conv2.weight.mul_(1.3),
    "statistics in place": lambda n: n.bn.running_var.mul_(2),
    "weight.data replaced": replaced_data,
    "parameter replaced": replaced_parameter,
    "bias removed": replaced_module,
    "epsilon": lambda n: setattr(n.bn, "eps", n.bn.eps + 1),
    "padding": lambda n: setattr(n.conv, "padding_mode", "circular"),
    "an attribute": lambda n: setattr(n, "gain", n.gain + 1),
    "the flow": lambda n: setattr(n, "flow", lambda m, x: m.bn2(m.conv2(-m.bn(m.conv(x))))),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_network_that_changes_between_batches(change):
    batches = images(12).split(3)

    def changing(network):
        for x in batches:
            yield x
            with torch.no_grad():
                change(network)

    network = two_layers()
    frame = analysis.measure(network, changing(network))
    expected = responses_of(two_layers(), batches, change)
    fixed = responses_of(two_layers(), batches, lambda network: None)
    assert frame["std"].tolist() == pytest.approx(expected, rel=1e-6)
    assert frame["std"].tolist() != pytest.approx(fixed, rel=1e-3)


@pytest.mark.parametrize("fold", [True, False])
def test_a_forward_that_counts_its_calls_runs_once_a_batch(fold):
    def flow(m, x):
        m.calls += 1
        return m.bn(m.conv(x * m.calls))

    network, x = with_statistics(Net(flow, **pair())), images(9)
    network.calls = 0
    frame = analysis.measure(network, x.split(3), fold=fold)
    assert network.calls == 3
    y = network.bn(network.conv(torch.cat([x[:3], 2 * x[3:6], 3 * x[6:]]))).double()
    assert frame["std"].tolist() == pytest.approx([y.std(correction=0).item()], rel=1e-6)


def test_an_output_that_begins_to_go_elsewhere_is_noticed():
    """An attribute that the loader changes: the layer is no pair any more."""
    for use in (operator.add, lambda z, y: z + y.sum(), lambda z, y: z + y.view(-1)[0]):

        def flow(m, x, use=use):
            y = m.conv(x)
            z = m.bn2(m.conv2(m.bn(y)))
            return use(z, y) if m.skip else z

        network = Net(flow, **pair(), conv2=conv(), bn2=nn.BatchNorm2d(4))
        network.skip = False
        with measuring(with_statistics(network)) as meter:
            meter.add(images())
            meter.add(images())
            network.skip = True
            with pytest.raises(
                ValueError, match=r"batch 3 takes another path .*: conv2 -> bn2 ran"
            ):
                meter.add(images())
        assert meter.result().images == 12


def test_hooks_that_come_after_the_first_batches_see_every_batch():
    network, calls = two_layers(), []
    expected = analysis.measure(network, (batches := images(12).split(3)))
    with measuring(network) as meter:
        for number, batch in enumerate(batches):
            meter.add(batch)
            if number == 1:
                network.bn.register_forward_hook(lambda *args: calls.append(args))
    assert len(calls) == 2
    result = meter.result()
    assert result.method == "hooks: 1 of 2 layers, since bn has hooks of its own"
    found = result.to_frame("a")["std"].tolist()
    assert found == pytest.approx(expected["std"].tolist(), rel=1e-6)


def test_fold_is_an_option():
    network, batches = two_layers(), images(9).split(3)
    frame = analysis.measure(network, batches, fold=False)
    assert frame.attrs["method"] == "hooks: fold=False"
    folded = analysis.measure(network, batches)
    assert folded.attrs["method"] == "folded"
    assert frame["std"].tolist() == pytest.approx(folded["std"].tolist(), rel=1e-6)
    assert frame["count"].equals(folded["count"])


# Where folding is not right


def twice(m, x):
    return m.bn(m.conv(F.relu(m.bn(m.conv(x)))))


def cast(m, x):
    return m.bn(m.conv(x).double().float())


class Scaled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Padded(nn.BatchNorm2d):
    """A BN with a forward of its own, of which nothing is known."""

    def forward(self, x):
        return super().forward(x.clone())


class Frozen(nn.Module):
    """torchvision's FrozenBatchNorm2d in small."""

    def __init__(self):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(4) + 0.5)

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)  # (4,) -> (1, 4, 1, 1)


class Doubled(nn.BatchNorm2d):
    """A BN that leaves the work to another."""

    def __init__(self):
        super().__init__(4)
        self.inner = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.inner(x)


def hooked(network):
    network[0].register_forward_hook(lambda *args: None)
    return network


def with_own_forward(network, position):
    network[position].forward = type(network[position]).forward.__get__(network[position])
    return network


def simple(*modules):
    return nn.Sequential(*(modules or (conv(), nn.BatchNorm2d(4))))


NOT_FOLDED = {
    "called twice": (lambda: Net(twice, **pair()), "conv is called 2 times"),
    "shared BN": (
        lambda: Net(lambda m, x: m.bn(m.conv2(m.bn(m.conv(x)))), **pair(), conv2=conv()),
        "bn is called 2 times",
    ),
    "cast": (lambda: Net(cast, **pair()), "the output of conv is copied or cast before its BN"),
    "batch statistics": (
        lambda: simple(conv(), nn.BatchNorm2d(4, track_running_stats=False)),
        "1 has no running statistics",
    ),
    "convolution of its own": (
        lambda: simple(Scaled(4, 4, 3), nn.BatchNorm2d(4)),
        "0 (Scaled) is no plain Conv2d",
    ),
    "parametrised convolution": (
        lambda: simple(nn.utils.parametrizations.weight_norm(conv()), nn.BatchNorm2d(4)),
        "0 (ParametrizedConv2d) is no plain Conv2d",
    ),
    "BN of its own": (
        lambda: simple(conv(), Padded(4)),
        "1 (Padded) is no plain BatchNorm2d",
    ),
    "frozen": (lambda: simple(conv(), Frozen()), "1 (Frozen) is no plain BatchNorm2d"),
    "hooks": (lambda: hooked(simple()), "0 has hooks of its own"),
    "pruned": (
        lambda: simple(prune.l1_unstructured(conv(), "weight", 0.3), nn.BatchNorm2d(4)),
        "0 has hooks of its own",
    ),
    "forward of a convolution": (
        lambda: with_own_forward(simple(), 0),
        "0 has a forward of its own",
    ),
    "forward of a BN": (lambda: with_own_forward(simple(), 1), "1 has a forward of its own"),
}


@pytest.mark.parametrize("case", NOT_FOLDED)
def test_plain_hooks_measure_what_is_not_folded(case):
    make, reason = NOT_FOLDED[case]
    network, batches = with_statistics(make()), images(9).split(3)
    frame = analysis.measure(network, batches)
    assert frame.attrs["method"] == f"hooks: {reason}"
    assert frame.equals(analysis.measure(network, batches, fold=False))
    assert len(frame) > 0


def test_a_bn_in_a_bn_is_folded_into_the_inner_one():
    assert check(simple(conv(), Doubled()), images(9).split(3))["norm"].tolist() == ["1.inner"]


@pytest.mark.parametrize("kind", [Frozen, lambda: Padded(4)])
def test_the_other_layers_are_folded(kind):
    network = simple(conv(), nn.BatchNorm2d(4), nn.ReLU(inplace=True), conv(), kind())
    frame = analysis.measure(with_statistics(network), (batches := images(9).split(3)))
    reason = f"4 ({type(network[4]).__name__}) is no plain BatchNorm2d"
    assert frame.attrs["method"] == f"hooks: 1 of 2 layers, since {reason}"
    expected = two_pass(network, ["1", "4"], lambda: batches)
    assert frame["std"].tolist() == pytest.approx(expected, rel=1e-6)


class BatchNormAct(nn.BatchNorm2d):
    """timm's BatchNormAct2d in small: dropout and activation are its submodules."""

    def __init__(self, act):
        super().__init__(4)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


@pytest.mark.parametrize("act", [nn.ReLU(inplace=True), nn.SiLU(), nn.PReLU(4)])
def test_norms_with_their_activation_are_folded(act):
    network = with_statistics(simple(conv(), BatchNormAct(act), conv(), BatchNormAct(nn.ReLU())))
    batches, calls = images(9).split(3), []
    act.register_forward_hook(lambda *args: calls.append(1))
    frame = analysis.measure(network, batches)
    assert frame.attrs["method"] == "folded"
    assert len(calls) == 3
    plain = simple(network[0], nn.BatchNorm2d(4), act, network[2], nn.BatchNorm2d(4)).eval()
    for ours, theirs in ((plain[1], network[1]), (plain[4], network[3])):
        ours.load_state_dict(theirs.state_dict(), strict=False)
    expected = two_pass(plain, ["1", "4"], lambda: batches)
    assert frame["std"].tolist() == pytest.approx(expected, rel=1e-6)


def test_an_unmeasured_pair_that_cannot_be_folded_stays_as_it_is():
    def flow(m, x):
        return m.last(m.bn(m.conv(m.last(x))))

    network = Net(flow, **pair(), last=simple(conv(kernel=1), nn.BatchNorm2d(4)))
    check(network, images(9).split(3))


def test_one_batch_forward_wrappers_and_hooks_of_all_modules():
    network = simple()
    check(network, [images()], "hooks: one batch only")
    frame = analysis.measure(network, images().split(2), forward=lambda model, x: model(x))
    assert frame.attrs["method"] == "folded"
    assert analysis.measure(nn.DataParallel(network), images().split(2)).attrs["method"] == "folded"
    with nn.modules.module.register_module_forward_hook(lambda *args: None):
        frame = analysis.measure(network, images().split(2))
    assert frame.attrs["method"] == "hooks: there are hooks of all modules"


@pytest.mark.filterwarnings("ignore:1 layer is not in the frame")
def test_a_lambda_that_holds_another_part_of_the_network():
    network = simple()
    holder = Net(lambda m, x: m.bn(network(x)), **pair())
    holder.inner = network
    check(holder, images(9).split(3))


def test_additions_are_measured_in_the_same_folded_passes():
    network, batches = with_statistics(build("resnet-8")), images(9, 3, 32).split(3)
    with measuring(network, additions=True) as meter:
        for batch in batches:
            meter.add(batch)
    result = meter.result()
    frame = analysis.measure_branches(network, batches)
    assert result.method == "folded"
    assert result.ratios() == pytest.approx(frame["ratio"].to_numpy(), rel=1e-6)


# Batches that are not like the first


def test_another_path_is_an_error_that_says_where():
    def flow(m, x):
        return m.bn(m.b(x)) if len(x) == 1 else m.bn(m.conv(x))

    network = with_statistics(Net(flow, **pair(), b=conv()))
    with pytest.raises(
        ValueError,
        match="batch 3 takes another path through the network than the first: b -> bn ran",
    ):
        analysis.measure(network, [images(), images(), images(1)])


def test_a_folded_bn_that_takes_in_something_else():
    """What plain hooks do not mind is measured by them, and no image counts twice."""

    def flow(m, x):
        y = m.bn(m.conv(x))
        return m.bn2(m.conv2(y)) if len(x) > 1 else m.bn2(F.relu(m.conv2(y)))

    network = Net(flow, **pair(), conv2=conv(kernel=1), bn2=nn.BatchNorm2d(4))
    batches = [images(), images(), images(1), images()]
    method = "hooks: from batch 3 on, the output of conv2 goes elsewhere too"
    frame = check(network, batches, method)
    assert frame["images"].tolist() == [19]
    assert frame["count"].tolist() == [19 * 4 * 64]


def test_a_folded_convolution_that_goes_into_no_bn():
    def flow(m, x):
        y = m.conv2(m.bn(m.conv(x)))
        return m.bn2(y) if len(x) > 1 else y

    network = Net(flow, **pair(), conv2=conv(kernel=1), bn2=nn.BatchNorm2d(4))
    method = "hooks: from batch 3 on, the output of conv2 went into no BN"
    check(network, [images(), images(), images(1)], method)


def test_a_change_in_place_in_a_later_batch_is_an_error():
    def flow(m, x):
        y = m.conv(x)
        return m.bn(y.relu_() if len(x) == 1 else y)

    network = with_statistics(Net(flow, **pair()))
    with pytest.raises(
        ValueError,
        match="batch 3 takes another path through the network than the first: conv did not",
    ):
        analysis.measure(network, [images(), images(), images(1)])


@pytest.mark.parametrize("paired", [True, False])
def test_a_layer_that_runs_in_a_later_batch_only_is_not_left_out(paired):
    def flow(m, x):
        y = m.bn(m.conv(x))
        return y if len(x) > 1 else m.bn2(m.conv2(y)) if paired else m.conv2(y)

    modules = {**pair(), "conv2": conv(), "bn2": nn.BatchNorm2d(4)}
    network, batches = with_statistics(Net(flow, **modules)), [images(), images(), images(1)]
    if paired:
        with pytest.raises(ValueError, match=r"batch 3 takes another path .*: conv2 -> bn2 ran"):
            analysis.measure(network, batches)
    else:
        with pytest.warns(UserWarning, match=r"1 layer is not in the frame: conv2 \(its output"):
            check(network, batches)


def test_what_the_network_keeps_can_be_trained_with():
    """A grid by shape, made in a folded batch, is no inference tensor."""
    kept = {}
    network = Net(
        lambda m, x: m.bn(m.conv(x)) * kept.setdefault(x.shape, torch.ones(len(x), 1, 1, 1)),
        **pair(),
    )
    check(network, [images(), images(), images(1)])
    network.train()(images(1)).sum().backward()


def test_an_error_of_the_folded_pass_alone():
    """A view that channels_last does not allow."""

    def flow(m, x):
        y = m.bn(m.conv(x))
        return y.view(len(x), -1).mean(1) if len(x) > 4 else y.mean((1, 2, 3))

    network, batches = with_statistics(Net(flow, **pair())), [images(4), images(4), images(6)]
    frame = analysis.measure(network, batches)
    assert frame.attrs["method"].startswith("hooks: from batch 3 on, RuntimeError: view")
    expected = two_pass(network, ["bn"], lambda: batches)
    assert frame["std"].tolist() == pytest.approx(expected, rel=1e-6)


def test_a_result_in_between():
    with measuring(simple()) as meter:
        for batch in images(9).split(3):
            meter.add(batch)
            frame = meter.result().to_frame("a")
            assert frame["count"].tolist() == [meter.images * 4 * 8 * 8]


def test_images_that_the_network_changes_are_changed_once():
    x = torch.rand(6, 4, 8, 8)
    expected = (x - 0.5) / 0.3
    network = Net(lambda m, x: m.bn(m.conv(x.sub_(0.5).div_(0.3))), **pair())
    again = x.clone()
    analysis.measure(network, [x, again])
    assert torch.equal(x, expected)
    assert torch.equal(again, expected)


def test_nan_is_reported_with_layer_and_batch():
    network = with_statistics(build("resnet-8"))
    batches = [*images(6, 3, 32).split(2), torch.full((2, 3, 32, 32), torch.nan)]
    with pytest.raises(
        ValueError, match=r"NaN or infinity in the response of layer 1 \(conv1\) in batch 4: "
    ):
        analysis.measure(network, batches)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_one_value_that_is_not_finite_is_not_averaged_away(value, batch):
    """Of 2,048 values a channel, in the batch that runs through the network itself and in those of
    the folded copy.
    """
    network = Net(lambda m, x: m.bn(m.conv(x)), conv=conv(kernel=1), bn=nn.BatchNorm2d(4))
    batches = list(torch.randn(4, 8, 4, 16, 16))
    batches[batch - 1][3, 2, 5, 7] = value
    with pytest.raises(
        ValueError,
        match=rf"^NaN or infinity in the response of layer 1 \(conv\) in batch {batch}: ",
    ):
        analysis.measure(network, batches, kernel_size=1)


@pytest.mark.parametrize("scale", [1e-30, 5e-22, 1e-19, 1e19, 1e30])
def test_responses_whose_squares_float32_does_not_hold(scale):
    network = with_statistics(nn.Sequential(conv(), nn.BatchNorm2d(4)))
    network[1].weight.data *= scale
    nn.init.zeros_(network[1].bias)  # means far from zero would be noticed
    batches = torch.randn(3, 4, 4, 8, 8)
    frame = analysis.measure(network, batches)
    with torch.no_grad():
        expected = torch.cat([network(x) for x in batches]).double().std(correction=0).item()
    assert frame["std"].tolist() == pytest.approx([expected], rel=1e-6, abs=0)


# What is left behind: nothing


def test_the_network_is_left_as_it_was():
    network = build("resnet-8").train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    analysis.measure(network, images(9, 3, 32).split(3))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    for module in network.modules():
        assert module.training
        assert not module._forward_hooks
        assert "forward" not in vars(module)
    assert network.conv1.bias is None
    assert network.conv1.weight.is_contiguous()


def test_a_buffer_that_is_used_for_every_batch():
    parts = images(12, 3, 32).split(2)
    buffer = torch.empty_like(parts[0])
    network = with_statistics(build("resnet-8"))
    frame = analysis.measure(network, (buffer.copy_(part) for part in parts))
    assert frame["std"].tolist() == analysis.measure(network, parts)["std"].tolist()
