from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations, prune

from analysis import measure
from models import build, closed_form, load


def randomise(network):
    """Give every BN other numbers than a fresh one has."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 2)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.01, 3)
    return network


def test_the_formula_on_numbers_worked_out_by_hand():
    norm = nn.BatchNorm2d(2, eps=1.0)
    network = nn.Sequential(nn.Conv2d(1, 2, 3), norm)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, 4.0]))
        norm.bias.copy_(torch.tensor([1.0, 3.0]))
        norm.running_var.copy_(torch.tensor([1.0, 3.0]))
    [row] = closed_form(network).to_dict("records")  # variances 4 * 1/2 = 2 and 16 * 3/4 = 12
    assert row == {
        "layer": 1,
        "name": "0",
        "norm": "1",
        "stage": 1,
        "channels": 2,
        "std": pytest.approx(8**0.5),
        "within": pytest.approx(7**0.5),
        "between": 1.0,
        "mean": 2.0,
    }


@torch.no_grad()
def adopt_statistics(network, x):
    """Layer by layer, in forward order and in evaluation mode: each BN takes the statistics of its
    input.
    """

    def adopt(norm, args):
        norm.running_var, norm.running_mean = torch.var_mean(args[0], dim=(0, 2, 3), correction=0)

    handles = [
        m.register_forward_pre_hook(adopt)
        for m in network.modules()
        if isinstance(m, nn.BatchNorm2d)
    ]
    network(x)
    for handle in handles:
        handle.remove()


def check_that_the_formula_is_exact(network, x):
    network = network.double().eval()
    adopt_statistics(network, x)
    formula, measured = closed_form(network), measure(network, x.split(20))
    for column in ("layer", "name", "norm", "stage", "channels"):
        assert formula[column].tolist() == measured[column].tolist()
    for column in ("mean", "std", "within", "between"):
        assert formula[column].to_numpy() == pytest.approx(
            measured[column].to_numpy(), rel=1e-9, abs=1e-12
        )
    return len(formula)


@pytest.mark.parametrize(
    ("name", "shortcut", "layers"), [("resnet-14", "B", 13), ("plain-8", None, 7)]
)
def test_it_is_what_hooks_measure_where_bn_has_the_statistics_of_the_images(name, shortcut, layers):
    network = randomise(build(name, shortcut=shortcut))
    assert (
        check_that_the_formula_is_exact(network, torch.randn(32, 3, 32, 32, dtype=torch.float64))
        == layers
    )


@pytest.mark.parametrize("depth", [20, 56])
def test_it_is_what_hooks_measure_of_the_public_checkpoints_with_such_statistics(
    depth, akamaster, real_test
):
    checkpoint = load(akamaster[depth], normalize="imagenet")
    x = checkpoint.preprocessing(real_test.images[:50]).double()
    assert check_that_the_formula_is_exact(checkpoint.model, x) == depth - 1


def test_a_state_dict_gives_the_same_as_its_network():
    network = randomise(build("plain-8"))
    assert closed_form(network.state_dict()).equals(closed_form(network))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("weight",), "bn1 has no bias beside its weight: its output is not known"),
        (("bias",), "bn1 has no weight beside its bias: "),
        (("gamma", "beta"), "bn1 has no weight and bias beside its gamma, beta: "),
    ],
)
def test_a_bn_without_what_it_is_computed_from(names, message):
    state = build("plain-8").state_dict()
    del state["bn1.weight"], state["bn1.bias"]
    assert len(closed_form(state)) == 7  # neither: a BN that only normalises
    with pytest.raises(ValueError, match=message):
        closed_form(state | {f"bn1.{name}": torch.ones(16) for name in names})


def test_other_kernels_are_left_out():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
    )
    assert closed_form(network)["name"].tolist() == ["2"]


def names(state, **options):
    frame = closed_form(state, **options)
    return list(zip(frame["name"], frame["norm"], strict=True)), frame.attrs["ambiguous"]


def module(**children):
    """A module with these children, registered in this order."""
    result = nn.Module()
    for name, child in children.items():
        result.add_module(name, child)
    return result


def conv(*channels, kernel=3, groups=1):
    return nn.Conv2d(*channels, kernel, groups=groups)


def conv_bn(channels=4, out=4):
    return module(conv=conv(channels, out), bn=nn.BatchNorm2d(out))


def test_a_sequence():
    state = nn.Sequential(
        conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 6), nn.BatchNorm2d(6)
    ).state_dict()
    assert names(state) == ([("0", "1"), ("3", "4")], [])


def test_convolutions_registered_before_all_bns_are_paired_by_name_and_called_ambiguous_where_order_says_otherwise():
    state = module(
        conv1=conv(3, 4), conv2=conv(4, 4), bn1=nn.BatchNorm2d(4), bn2=nn.BatchNorm2d(4)
    ).state_dict()
    assert names(state) == ([("conv1", "bn1"), ("conv2", "bn2")], ["conv1 -> bn1"])


def test_a_dense_layer_where_bn_comes_before_the_convolution_of_its_name():
    """DenseNet: norm1, conv1, norm2, conv2; only conv1's output goes into a BN."""
    layer = module(
        norm1=nn.BatchNorm2d(3), conv1=conv(3, 4), norm2=nn.BatchNorm2d(4), conv2=conv(4, 8)
    )
    assert names(layer.state_dict()) == ([("conv1", "norm2")], [])


def test_the_last_convolution_of_a_pre_activation_block_is_left_out():
    """The last convolution of a block feeds an addition, though a BN comes next in the file."""
    blocks = [
        module(bn1=nn.BatchNorm2d(4), conv1=conv(4, 4), bn2=nn.BatchNorm2d(4), conv2=conv(4, 4))
        for _ in range(2)
    ]
    frame = closed_form(nn.Sequential(*blocks).state_dict())
    assert frame["name"].tolist() == ["0.conv1", "1.conv1"]
    assert frame.attrs["unpaired"] == {
        "0.conv2": "the next BN, 1.bn1, is elsewhere",
        "1.conv2": "no BN follows it",
    }
    for stage in (blocks[0], module(last=blocks[0])):
        frame = closed_form(module(layer=stage, bn=nn.BatchNorm2d(4)).state_dict())
        assert [name.rpartition(".")[2] for name in frame["name"]] == ["conv1"]
        assert [*frame.attrs["unpaired"].values()] == ["the next BN, bn, is elsewhere"]


def test_a_module_whose_name_begins_like_the_bns_is_another():
    whole = module(stem1=module(conv=conv(3, 4)), stem=module(bn=nn.BatchNorm2d(4)), last=conv_bn())
    frame = closed_form(whole.state_dict())
    assert frame["name"].tolist() == ["last.conv"]
    assert frame.attrs["unpaired"] == {"stem1.conv": "the next BN, stem.bn, is elsewhere"}


def test_a_convolution_in_a_wrapper_of_its_own():
    state = module(conv1=module(conv=conv(3, 4)), bn1=nn.BatchNorm2d(4)).state_dict()
    assert names(state) == ([("conv1.conv", "bn1")], [])


def test_a_stem_of_three_convolutions():
    """timm's resnet50d: conv1 is a sequence with BNs of its own, and bn1 comes after it."""
    stem = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4))
    state = module(conv1=stem, bn1=nn.BatchNorm2d(4)).state_dict()
    assert names(state) == ([("conv1.0", "conv1.1"), ("conv1.3", "bn1")], [])


def test_other_channels_are_no_pair():
    state = module(conv1=conv(3, 4), bn1=nn.BatchNorm2d(5), last=conv_bn(5, 6)).state_dict()
    assert names(state) == ([("last.conv", "last.bn")], [])


def test_any_kernel_can_be_asked_for():
    state = module(
        conv1=conv(3, 4, kernel=7),
        bn1=nn.BatchNorm2d(4),
        conv2=conv(4, 6, groups=2),
        bn2=nn.BatchNorm2d(6),
    )
    assert names(state.state_dict(), kernel_size=(7, 7)) == ([("conv1", "bn1")], [])
    with pytest.raises(ValueError, match="no 5x5 convolution followed by a BN"):
        closed_form(state, kernel_size=(5, 5))


def test_a_bn_without_affine_parameters():
    [row] = closed_form(nn.Sequential(conv(3, 4), nn.BatchNorm2d(4, affine=False))).to_dict(
        "records"
    )
    assert (row["std"], row["between"]) == (pytest.approx(1, rel=1e-4), 0)


def test_nothing_to_compute_names_the_keys():
    with pytest.raises(
        ValueError, match=r"no 3x3 convolution followed by a BN .* keys: 0.weight, 0.bias"
    ):
        closed_form(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("name", ["resnet-20", "plain-20", "resnet-110", "resnet-34", "resnet-50"])
def test_tensors_sorted_by_name_as_in_safetensors_files(name):
    """bn1 stands before conv1 there, and layer1.10 before layer1.2."""
    state = randomise(build(name)).state_dict()
    found = closed_form(dict(sorted(state.items())))
    assert found.attrs["sorted"]
    assert (found.attrs["ambiguous"], found.attrs["unpaired"]) == ([], {})
    expected = closed_form(state)
    assert not expected.attrs["sorted"]
    assert found.equals(expected)


def test_the_order_in_which_safetensors_loads_a_file(tmp_path):
    """Counters of BN first, and then the other tensors by name."""
    state = randomise(build("resnet-8")).state_dict()
    save_file(state, tmp_path / "a.safetensors")
    loaded = load_file(tmp_path / "a.safetensors")
    assert list(loaded) not in (list(state), sorted(state))
    found = closed_form(loaded)
    assert found.attrs["sorted"]
    assert found.equals(closed_form(state))


@pytest.mark.parametrize("order", [list, sorted])
def test_names_of_transformers(order):
    """resnet.encoder.stages.0.layers.0.layer.1.convolution and .normalization, as in
    microsoft/resnet-50.
    """

    def layer(*channels, kernel=3):
        return module(
            convolution=conv(*channels, kernel=kernel), normalization=nn.BatchNorm2d(channels[1])
        )

    def block(channels, width, out):
        parts = {"shortcut": layer(channels, out, kernel=1)} if channels != out else {}
        branch = layer(channels, width, kernel=1), layer(width, width), layer(width, out, kernel=1)
        return module(**parts, layer=nn.Sequential(*branch))

    stages = nn.Sequential(
        nn.Sequential(block(4, 4, 8), block(8, 4, 8)), nn.Sequential(block(8, 8, 16))
    )
    state = randomise(
        module(embedder=layer(3, 4, kernel=7), encoder=module(stages=stages))
    ).state_dict()
    layers = [
        "encoder.stages.0.0.layer.1",
        "encoder.stages.0.1.layer.1",
        "encoder.stages.1.0.layer.1",
    ]
    pairs = [(f"{name}.convolution", f"{name}.normalization") for name in layers]
    assert names({name: state[name] for name in order(state)}) == (pairs, [])


@pytest.mark.parametrize("order", [list, sorted])
def test_lists_of_convolutions_and_of_bns(order):
    """Res2Net: convs.0 to convs.2, then bns.0 to bns.2."""
    convs, bns = (
        nn.Sequential(*(make() for _ in range(3)))
        for make in (lambda: conv(4, 4), lambda: nn.BatchNorm2d(4))
    )
    state = module(
        conv1=conv(3, 4, kernel=1), bn1=nn.BatchNorm2d(4), convs=convs, bns=bns
    ).state_dict()
    assert names({name: state[name] for name in order(state)})[0] == [
        (f"convs.{i}", f"bns.{i}") for i in range(3)
    ]


@pytest.mark.parametrize("order", [list, sorted])
def test_a_bn_in_the_module_of_its_convolution(order):
    """detectron2: conv2 and conv2.norm."""
    layers = {f"conv{i}": conv(4, 4) for i in (1, 2)}
    for layer in layers.values():
        layer.norm = nn.BatchNorm2d(4)
    state = module(**layers).state_dict()
    assert names({name: state[name] for name in order(state)}) == (
        [("conv1", "conv1.norm"), ("conv2", "conv2.norm")],
        [],
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
    ],
)
def test_pruned_and_re_parametrised_convolutions(change):
    network = randomise(nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), conv(4, 6), nn.BatchNorm2d(6)))
    expected = closed_form(network)
    change(network[2])
    assert "2.weight" not in network.state_dict()
    assert closed_form(network.state_dict()).equals(expected)


def test_a_pre_activation_network_sorted_by_name():
    """Where BN has other channels than the convolution that is called alike, it comes before it."""

    def block(channels, out):
        norm1, norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(out)
        return module(norm1=norm1, conv1=conv(channels, out), norm2=norm2, conv2=conv(out, out))

    whole = module(
        conv0=conv(3, 4), layer=nn.Sequential(block(4, 4), block(4, 8)), norm=nn.BatchNorm2d(8)
    )
    with pytest.raises(ValueError, match="no 3x3 convolution followed by a BN"):
        closed_form(dict(sorted(whole.state_dict().items())))


def test_convolutions_that_no_bn_follows_are_listed():
    state = module(
        conv1=conv(3, 4), bn1=nn.BatchNorm2d(4), conv2=conv(4, 6), head=conv(6, 3, kernel=1)
    ).state_dict()
    assert closed_form(state).attrs["unpaired"] == {"conv2": "no BN follows it"}


def trained(network):
    """A network whose BNs all counted batches and recorded statistics."""
    for name, buffer in randomise(network).named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer += 1
    return network


@pytest.mark.parametrize("eps", [1e-3, 1e-5, 0.0])
def test_eps_is_assumed_and_said_or_given(eps):
    """The case of the issue: small variances, eps 1e-3."""
    network = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4, eps=eps))
    network[1].running_var.fill_(5e-4)
    network[1].bias.data.zero_()
    right = (5e-4 / (5e-4 + eps)) ** 0.5
    for frame in (closed_form(network), closed_form(network.state_dict(), eps=eps)):
        assert frame["std"].tolist() == pytest.approx([right], rel=1e-6)
    assumed = closed_form(network.state_dict())
    assert assumed["std"].tolist() == pytest.approx([(5e-4 / 5.1e-4) ** 0.5], rel=1e-6)
    change = 1 - (1 / 3) ** 0.5 / (5e-4 / 5.1e-4) ** 0.5
    assert (assumed.attrs["eps"], assumed.attrs["eps_effect"]) == (1e-5, pytest.approx(change))
    assert closed_form(network).attrs["eps"] is None
    assert closed_form(network.state_dict(), eps=eps).attrs["eps"] == eps


def test_a_dead_channel_without_eps_has_no_variance():
    network = nn.Sequential(conv(3, 2), nn.BatchNorm2d(2))
    network[1].running_var[0] = 0
    assert closed_form(network.state_dict(), eps=0.0)["std"].tolist() == pytest.approx([0.5**0.5])


def never(norm):
    norm.num_batches_tracked.zero_()


def as_new(norm):
    norm.running_mean.zero_()
    norm.running_var.fill_(1)


def without_counters(norm):
    as_new(norm)
    del norm.num_batches_tracked


@pytest.mark.parametrize("change", [never, as_new, without_counters])
def test_modules_that_never_ran_are_left_out(change):
    network = trained(build("resnet-8"))
    right = closed_form(network)
    template = trained(build("resnet-8")).layer1
    whole = module(template=template, network=network)
    for norm in template.modules():
        if isinstance(norm, nn.BatchNorm2d):
            change(norm)
    for frame in (closed_form(whole), closed_form(whole.state_dict())):
        assert frame["std"].tolist() == right["std"].tolist()
        assert frame.attrs["idle"] == ["template.0.bn1", "template.0.bn2"]
        assert frame.attrs["unpaired"] == {}


@pytest.mark.parametrize("change", [lambda norm: None, never])
def test_a_new_network_and_one_without_counters_are_computed_whole(change):
    network = trained(build("resnet-8")) if change is never else build("resnet-8")
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            change(norm)
    assert (len(closed_form(network)), closed_form(network).attrs["idle"]) == (7, [])


def depthwise(first, second):
    """Two convolutions before one BN, as in the issue: right is 1 layer, the stem."""
    return lambda: module(
        **{first: conv(4, 4, groups=4), second: conv(4, 4, kernel=1)}, bn=nn.BatchNorm2d(4)
    )


@pytest.mark.parametrize(
    "block",
    [
        depthwise("conv", "pointwise"),
        depthwise("depthwise", "pointwise"),
        depthwise("conv_dw", "conv_pw"),
        lambda: nn.Sequential(conv(4, 4, groups=4), conv(4, 4, kernel=1), nn.BatchNorm2d(4)),
        lambda: nn.Sequential(conv(4, 4, kernel=1), conv(4, 4), nn.BatchNorm2d(4))[::2],
    ],
)
@pytest.mark.parametrize("order", [list, sorted])
def test_two_convolutions_before_one_bn(block, order):
    network = trained(module(stem=conv_bn(3), blocks=nn.Sequential(*(block() for _ in range(3)))))
    state = {name: network.state_dict()[name] for name in order(network.state_dict())}
    frame = closed_form(state)
    assert frame["name"].tolist() == ["stem.conv"]
    threes = [name for name, x in state.items() if x.ndim == 4 and x.shape[-1] == 3]
    assert {"stem.conv.weight"} | {f"{name}.weight" for name in frame.attrs["unpaired"]} == set(
        threes
    )


def pre_activation(first, channels, out):
    norm, convolution = nn.BatchNorm2d(channels), conv(channels, out)
    second = {"conv2": conv(out, out), "bn2": nn.BatchNorm2d(out)}
    children = {"conv1": convolution, "bn1": norm} if first else {"bn1": norm, "conv1": convolution}
    return module(**children, **(second if first else dict(reversed(second.items()))))


@pytest.mark.parametrize("widths", [(4, 8, 8), (4, 4, 4), (4, 4, 8)])
@pytest.mark.parametrize("first", [True, False])
def test_pre_activation_whatever_is_registered_first(first, widths):
    """Run as bn1, conv1, bn2, conv2: only conv1's output goes into a BN, bn2."""
    blocks = [pre_activation(first, 4, widths[0])]
    blocks += [pre_activation(first, *pair) for pair in pairwise(widths)]
    parts = {"layers": nn.Sequential(*blocks), "bn": nn.BatchNorm2d(widths[-1])}
    network = trained(module(conv1=conv(3, 4), **parts, other=conv_bn()))
    frame = closed_form(network.state_dict())
    right = [] if first else [f"layers.{i}.conv1" for i in range(3)]
    assert frame["name"].tolist() == [*right, "other.conv"]


def test_squeeze_and_excitation_does_not_stand_between():
    def block():
        gate = nn.Sequential(conv(4, 2, kernel=1), conv(2, 4, kernel=1))
        return module(conv1=conv(4, 4), bn1=nn.BatchNorm2d(4), se=gate)

    network = trained(nn.Sequential(block(), block()))
    assert closed_form(network.state_dict())["name"].tolist() == ["0.conv1", "1.conv1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"1.weight": torch.ones(3)}, "1.weight is no vector like its running_var"),
        ({"1.running_mean": torch.ones(4, 1)}, "1.running_mean is no vector like its running_var"),
        ({"1.running_var": torch.full((4,), -1.0)}, "1.running_var is no vector of variances"),
        ({"1.bias": torch.full((4,), torch.nan)}, "NaN or infinity in 1, or too large numbers"),
        (
            {"1.weight": torch.full((4,), 1e200, dtype=torch.float64)},
            "NaN or infinity in 1, or too large",
        ),
    ],
)
def test_impossible_tensors(changes, message):
    state = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4)).state_dict() | changes
    with pytest.raises(ValueError, match=message):
        closed_form(state)


def test_the_public_checkpoints(akamaster):
    means = [closed_form(load(akamaster[depth]).model)["std"].mean() for depth in (20, 56)]
    assert means == pytest.approx([0.7318, 0.4536], abs=5e-5)
