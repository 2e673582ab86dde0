import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import analysis
from analysis.baselines import two_pass
from analysis.measuring import folding
from analysis.measuring import measurement as hooks
from analysis.measuring.blocks import recording_blocks
from analysis.measuring.pairs import recording
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


def check(network, batches, path="folded", rel=1e-6, **options):
    """The frame of a network, which is that of a two-pass in float64."""
    frame = analysis.measure(with_statistics(network), batches, **options)
    assert frame.attrs["path"] == path
    expected = two_pass(network, frame["norm"].tolist(), lambda: batches)
    assert frame["std"].tolist() == pytest.approx(expected, rel=rel)
    return frame


def test_our_networks_are_folded():
    for name in ("resnet-8", "plain-8"):
        frame = check(build(name), images(9, 3, 32).split(2))
        assert frame["images"].unique().tolist() == [9]


def test_a_bottleneck_with_all_its_kernels():
    network = build("resnet-50").layer1
    network[0].downsample[0].bias = nn.Parameter(torch.randn(256))
    frame = check(network, images(5, 64, 16).split(2))
    assert len(frame) == 3
    with recording(network) as record, torch.no_grad():
        hooks.run(network, images(2, 64, 16))
        record.end_pass()
        folded = folding.fold(network, record, images(2, 64, 16), hooks.run)
    assert len(folded.pairs) == 10
    assert all(folding_is_in(pair) for pair in folded.pairs)


def folding_is_in(pair):
    return pair.conv.bias is not None and "forward" in vars(pair.norm)


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
    """There the convolution's output, which a folded copy does not have, goes elsewhere too:
    modules do not show it.
    """

    def flow(m, x):
        y = m.conv(x)
        z = m.bn(y)
        return m.bn2(m.conv2(z + y if x.shape[-1] > 8 else z))

    network = Net(flow, conv=conv(), bn=nn.BatchNorm2d(4), conv2=conv(), bn2=nn.BatchNorm2d(4))
    path = "hooks: the output of conv goes elsewhere too"
    check(network, [images(), images(), images(size=12), images(size=12), images()], path)


def test_in_any_layout_and_batches_with_labels():
    network = with_statistics(build("resnet-8"))
    x = images(8, 3, 32)
    labels = network(x).argmax(1)
    labels[:2] = (labels[:2] + 1) % 10
    parts = list(
        zip(x.to(memory_format=torch.channels_last).split(3), labels.split(3), strict=True)
    )
    frame = analysis.measure(network, parts)
    assert frame.attrs == {"accuracy": 0.75, "unpaired": [], "unseen": [], "path": "folded"}


def test_dicts_of_tensors():
    class Takes(nn.Sequential):
        def forward(self, pixels):
            return {"logits": super().forward(pixels).mean((2, 3))}

    frame = analysis.measure(Takes(conv(), nn.BatchNorm2d(4)), [{"pixels": images()}] * 3)
    assert frame.attrs["path"] == "folded"


def test_unpaired_convolutions():
    network = Net(lambda m, x: m.last(m.bn(m.conv(x))), **pair(), last=conv())
    assert check(network, images().split(2)).attrs["unpaired"] == ["last"]


@pytest.mark.parametrize("offset", [30.0, 1e3, 1e5])
def test_means_far_from_zero(offset):
    network = Net(
        lambda m, x: m.bn2(m.conv2(m.bn(m.conv(x)))), **pair(), conv2=conv(), bn2=nn.BatchNorm2d(4)
    )
    with_statistics(network)
    nn.init.constant_(network.bn.bias, offset)
    frame = analysis.measure(network, (batches := images(40).split(8)))
    assert frame.attrs["path"] == "folded"
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
    path = "hooks: from batch 2 on, means far from zero that were near it in the first batch"
    check(network, batches, path)


def test_bfloat16_is_near():
    network, batches = build("resnet-8"), images(16, 3, 32).split(4)
    exact = analysis.measure(network, batches)["std"]
    near = analysis.measure(network, batches, precision="bfloat16")
    assert near.attrs["path"] == "folded"
    assert not near["std"].equals(exact)
    assert near["std"].tolist() == pytest.approx(exact.tolist(), rel=0.02)


# Where folding is not right


def twice(m, x):
    return m.bn(m.conv(F.relu(m.bn(m.conv(x)))))


def elsewhere(m, x):
    y = m.conv(x)
    return m.bn(y) + y


def seen_by_a_function(m, x):
    y = m.conv(x)
    return m.bn(y) * torch.sigmoid(y.mean())


class Scaled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class NoCopy(nn.Sequential):
    def __deepcopy__(self, memo):
        raise TypeError("not I")


def hardly_elsewhere(m, x):
    """So little that responses and output are much the same: a layer scale."""
    y = m.conv(x)
    return m.bn2(m.conv2(m.bn(y) + 1e-6 * y))


class Shares(nn.Sequential):
    def __deepcopy__(self, memo):
        return self


class NewWeights(nn.Sequential):
    def __deepcopy__(self, memo):
        return NewWeights(conv(), nn.BatchNorm2d(4)).eval()


class Doubled(nn.BatchNorm2d):
    """A BN that leaves the work to another."""

    def __init__(self):
        super().__init__(4)
        self.inner = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.inner(x)


ELSEWHERE = "the output of conv goes elsewhere too"
NOT_FOLDED = {
    "called twice": (lambda: Net(twice, **pair()), "conv is called 2 times"),
    "output elsewhere": (lambda: Net(elsewhere, **pair()), ELSEWHERE),
    "output into a function": (lambda: Net(seen_by_a_function, **pair()), ELSEWHERE),
    "output hardly elsewhere": (
        lambda: Net(hardly_elsewhere, **pair(), conv2=conv(), bn2=nn.BatchNorm2d(4)),
        ELSEWHERE,
    ),
    "output into two BNs": (
        lambda: Net(
            lambda m, x: (y := m.conv(x), m.bn(y) + m.bn2(y))[1], **pair(), bn2=nn.BatchNorm2d(4)
        ),
        ELSEWHERE,
    ),
    "BN in a BN": (lambda: Net(lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=Doubled()), ELSEWHERE),
    "copy that shares": (
        lambda: Shares(conv(), nn.BatchNorm2d(4)),
        "a copy of it shares tensors with it, or has others",
    ),
    "copy of other weights": (
        lambda: NewWeights(conv(), nn.BatchNorm2d(4)),
        "a copy of it shares tensors with it, or has others",
    ),
    "shared BN": (
        lambda: Net(lambda m, x: m.bn(m.conv2(m.bn(m.conv(x)))), **pair(), conv2=conv()),
        "bn is called 2 times",
    ),
    "batch statistics": (
        lambda: nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=False)),
        "1 has no running statistics",
    ),
    "convolution of its own": (
        lambda: nn.Sequential(Scaled(4, 4, 3), nn.BatchNorm2d(4)),
        "0 (Scaled) is no plain Conv2d",
    ),
    "wrapper": (
        lambda: nn.DataParallel(nn.Sequential(conv(), nn.BatchNorm2d(4))),
        "DataParallel around the network",
    ),
    "no copy": (
        lambda: NoCopy(conv(), nn.BatchNorm2d(4)),
        "a copy of it does not run (TypeError: not I)",
    ),
    "no output": (
        lambda: Net(lambda m, x: str(m.bn(m.conv(x))), **pair()),
        "its output holds no tensors to compare",
    ),
    "noise": (
        lambda: Net(lambda m, x: m.bn(m.conv(x)) + torch.rand(1), **pair()),
        "it has another output when it is folded",
    ),
}


@pytest.mark.parametrize("case", NOT_FOLDED)
def test_plain_hooks_where_folding_is_not_right(case):
    make, reason = NOT_FOLDED[case]
    network = with_statistics(make())
    batches = images(9).split(3)
    frame = analysis.measure(network, batches)
    assert frame.attrs["path"] == f"hooks: {reason}"
    assert frame.equals(analysis.measure(network, batches, forward=hooks.run))


def test_an_unmeasured_pair_that_cannot_be_folded_stays_as_it_is():
    def flow(m, x):
        return m.last(m.bn(m.conv(m.last(x))))

    network = Net(flow, **pair(), last=nn.Sequential(conv(kernel=1), nn.BatchNorm2d(4)))
    check(network, images(9).split(3))


def test_one_batch_forward_and_hooks_of_all_modules():
    network = nn.Sequential(conv(), nn.BatchNorm2d(4))
    check(network, [images()], "hooks: one batch only")
    frame = analysis.measure(network, images().split(2), forward=lambda model, x: model(x))
    assert frame.attrs["path"] == "hooks: forward= runs the network"
    with nn.modules.module.register_module_forward_hook(lambda *args: None):
        frame = analysis.measure(network, images().split(2))
    assert frame.attrs["path"] == "hooks: there are hooks of all modules"


@pytest.mark.parametrize("position", [0, 1])
def test_a_forward_that_was_set_on_a_module_runs_in_every_batch(position):
    network = with_statistics(nn.Sequential(conv(), nn.BatchNorm2d(4)))
    own, sizes = network[position].forward, []
    network[position].forward = lambda x: (sizes.append(len(x)), own(x))[1]
    frame = analysis.measure(network, [images(7), images(6), images(1)])
    assert frame.attrs["path"] == f"hooks: {position} has a forward of its own"
    assert [size for size in sizes if size != folding.FEW] == [7, 6, 1]


def test_a_lambda_that_holds_the_network():
    """Its copy runs modules of the network itself, where the record's hooks are."""
    network = nn.Sequential(conv(), nn.BatchNorm2d(4))
    holder = Net(lambda m, x: m.bn(network(x)), **pair())
    holder.inner = network
    frame = check(holder, images(9).split(3), "hooks: a copy of it runs other layers")
    assert frame["count"].tolist() == [9 * 4 * 8 * 8]


def test_blocks_are_recorded_in_the_same_passes():
    network = with_statistics(build("resnet-8"))
    with recording_blocks(network) as record:
        analysis.measure(network, images(9, 3, 32).split(3))
    assert [moments.count for moments in record.blocks[0].moments.values()] == [9 * 32 * 32] * 2


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


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_folded_bn_that_takes_in_something_else(kernel):
    """What plain hooks do not mind is measured by them."""

    def flow(m, x):
        y = m.bn(m.conv(x))
        return m.bn2(m.conv2(y)) if len(x) > 1 else m.bn2(F.relu(m.conv2(y)))

    network = Net(flow, **pair(), conv2=conv(kernel=1), bn2=nn.BatchNorm2d(4))
    batches = [images(), images(), images(1), images()]
    path = "hooks: from batch 3 on, what comes into the BN of conv2 is not its output"
    frame = check(network, batches, path)
    assert frame["images"].tolist() == [19]


def test_a_folded_convolution_that_goes_into_no_bn():
    def flow(m, x):
        y = m.conv2(m.bn(m.conv(x)))
        return m.bn2(y) if len(x) > 1 else y

    network = Net(flow, **pair(), conv2=conv(kernel=1), bn2=nn.BatchNorm2d(4))
    check(
        network,
        [images(), images(), images(1)],
        "hooks: from batch 3 on, it takes another path through the network",
    )


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


@pytest.mark.parametrize(
    "last", [{"conv2": nn.Conv2d(4, 4, 3), "bn2": nn.BatchNorm2d(4)}, {"conv2": conv()}]
)
def test_a_layer_that_runs_in_a_later_batch_only_is_not_left_out(last):
    def flow(m, x):
        y = m.bn(m.conv(x))
        return y if len(x) > 1 else m.bn2(m.conv2(y)) if "bn2" in last else m.conv2(y)

    network, batches = with_statistics(Net(flow, **pair(), **last)), [images(), images(), images(1)]
    if "bn2" in last:
        with pytest.raises(
            ValueError,
            match="batch 3 takes another path through the network than the first: conv2 ->",
        ):
            analysis.measure(network, batches)
    else:
        path = "hooks: from batch 3 on, it takes another path through the network"
        assert check(network, batches, path).attrs["unpaired"] == ["conv2"]


def test_what_the_network_keeps_can_be_trained_with():
    """A grid by shape, made in a batch of the folded copy: no inference tensor."""
    kept = {}
    network = Net(
        lambda m, x: m.bn(m.conv(x)) * kept.setdefault(x.shape, torch.ones(len(x), 1, 1, 1)),
        **pair(),
    )
    check(network, [images(), images(), images(1)])
    network.train()(images(1)).sum().backward()


def test_an_error_of_the_folded_copy_alone():
    """A view that the layout of the copy does not allow."""

    def flow(m, x):
        y = m.bn(m.conv(x))
        return y.view(len(x), -1).mean(1) if len(x) > 4 else y.mean((1, 2, 3))

    network, batches = with_statistics(Net(flow, **pair())), [images(4), images(4), images(6)]
    frame = analysis.measure(network, batches)
    assert frame.attrs["path"].startswith(
        "hooks: from batch 3 on, a folded copy of it does not run (RuntimeError: view"
    )
    assert frame["std"].tolist() == pytest.approx(
        two_pass(network, ["bn"], lambda: batches), rel=1e-6
    )


def test_hooks_that_come_after_the_first_batches_see_every_batch():
    network, calls = with_statistics(nn.Sequential(conv(), nn.BatchNorm2d(4))), []
    with analysis.measuring.measurement.measuring(network) as measurement:
        for batch in images(12).split(3):
            measurement.add(batch)
            if len(calls) == 0 and measurement.images == 6:
                network[1].register_forward_hook(lambda *args: calls.append(args))
    assert len(calls) == 2
    result = measurement.result()
    assert result.path == "hooks: from batch 3 on, it has hooks of its own"
    assert result.to_frame("a")["count"].tolist() == [12 * 4 * 8 * 8]


def test_a_result_in_between():
    with analysis.measuring.measurement.measuring(
        nn.Sequential(conv(), nn.BatchNorm2d(4))
    ) as measurement:
        for batch in images(9).split(3):
            measurement.add(batch)
            assert measurement.result().to_frame("a")["count"].tolist() == [
                measurement.images * 4 * 8 * 8
            ]


def test_images_that_the_network_changes_are_changed_once():
    x = torch.rand(6, 4, 8, 8)
    expected = (x - 0.5) / 0.3
    network = Net(lambda m, x: m.bn(m.conv(x.sub_(0.5).div_(0.3))), **pair())
    analysis.measure(network, [x, torch.rand(6, 4, 8, 8)])
    assert torch.equal(x, expected)


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


def failing(batches, error):
    yield from batches
    raise error


def test_errors_of_the_images_pass_and_no_thread_is_left():
    threads = threading.active_count()
    with pytest.raises(OSError, match="the disk is gone"):
        analysis.measure(
            build("resnet-8"), failing(images(9, 3, 32).split(3), OSError("the disk is gone"))
        )
    assert threading.active_count() == threads


def test_a_buffer_that_is_used_for_every_batch():
    parts = images(12, 3, 32).split(2)
    buffer = torch.empty_like(parts[0])
    network = with_statistics(build("resnet-8"))
    frame = analysis.measure(network, (buffer.copy_(part) for part in parts))
    assert frame["std"].tolist() == analysis.measure(network, parts)["std"].tolist()
