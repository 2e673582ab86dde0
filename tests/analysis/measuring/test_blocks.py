"""Branch and shortcut of every residual block, from the same passes as the layers' responses."""

import pandas as pd
import pytest
import torch
from torch import nn

import analysis
from analysis.measuring.blocks import COLUMNS, recording_blocks
from models import build

X = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def network(name, **options):
    """A network whose BN statistics are not those of a fresh one."""
    torch.manual_seed(3)
    model = build(name, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def measured(model, *batches):
    with recording_blocks(model) as record:
        analysis.measure(model, batches or [X])
    return record.to_frame("mine")


def hooks_of(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def basic(block, x):
    """The two addends, written out."""
    branch = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
    return branch, block.downsample(x)


def bottleneck(block, x):
    y = torch.relu(block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x))))))
    return block.bn3(block.conv3(y)), block.downsample(x)


def reference(model, x, addends):
    """Slow and obvious: every addend whole, in float64."""
    rows = []
    x = model.maxpool(torch.relu(model.bn1(model.conv1(x))))
    for stage, name in enumerate(model.stages, start=1):
        for position, block in enumerate(getattr(model, name)):
            branch, shortcut = addends(block, x)
            stds = [tensor.double().std(correction=0).item() for tensor in (branch, shortcut)]
            rows.append(
                ("mine", len(rows) + 1, f"{name}.{position}", stage, *stds, stds[0] / stds[1])
            )
            x = torch.relu(branch + shortcut)
    return pd.DataFrame(rows, columns=list(COLUMNS))


@pytest.mark.parametrize(
    "options", [{}, {"padding": "after"}, {"shortcut": "B"}, {"shortcut": "C"}], ids=str
)
def test_basic_blocks_against_the_addends_written_out(options):
    model = network("resnet-14", **options)
    with torch.no_grad():
        expected = reference(model, X, basic)
    pd.testing.assert_frame_equal(measured(model), expected, rtol=1e-6)
    assert expected["stage"].tolist() == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("stride", ["1x1", "3x3"])
def test_bottlenecks_against_the_addends_written_out(stride):
    model = network("resnet-50", stride=stride)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = reference(model, x, bottleneck)
    found = measured(model, x)
    pd.testing.assert_frame_equal(found, expected, rtol=1e-5)
    assert found["stage"].value_counts(sort=False).tolist() == [3, 4, 6, 3]


def test_a_tiny_block_by_hand():
    """Branch 0 but for its beta, shortcut the ReLU of the input: both stds are known."""
    model = network("resnet-8")
    block = model.layer1[0]
    with torch.no_grad():
        block.bn2.weight.zero_()
        block.bn2.bias.copy_(torch.tensor([1.0, 3.0] * 8))  # std 1 over channels
        model.bn1.weight.zero_()
        model.bn1.bias.copy_(torch.tensor([0.0, 4.0] * 8))  # std 2
    first = measured(model).iloc[:1]
    expected = pd.DataFrame([("mine", 1, "layer1.0", 1, 1.0, 2.0, 0.5)], columns=list(COLUMNS))
    pd.testing.assert_frame_equal(first, expected)


def test_batches_are_merged():
    model = network("resnet-8")
    pd.testing.assert_frame_equal(measured(model, X[:1], X[1:4], X[4:]), measured(model), rtol=1e-6)


def test_the_responses_are_the_same_with_and_without():
    model = network("resnet-8")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    alone = analysis.measure(model, [X])
    with recording_blocks(model):
        pd.testing.assert_frame_equal(analysis.measure(model, [X]), alone)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_plain_and_other_networks_have_no_rows():
    for model in (network("plain-8"), nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))):
        frame = measured(model)
        assert frame.empty
        assert list(frame.columns) == list(COLUMNS)


def test_hooks_are_removed_whatever_happens():
    model = network("resnet-8")
    with recording_blocks(model):
        assert hooks_of(model) == 6  # 3 blocks, 2 addends each
    assert hooks_of(model) == 0
    with pytest.raises(KeyboardInterrupt), recording_blocks(model):
        raise KeyboardInterrupt
    assert hooks_of(model) == 0


def test_no_images_and_no_numbers():
    model = network("resnet-8")
    with recording_blocks(model) as record:
        pass
    with pytest.raises(
        ValueError, match=r"^no image went through layer1\.0: there is nothing to measure$"
    ):
        record.to_frame("mine")
    with torch.no_grad():
        model.layer3[0].bn2.weight.fill_(torch.inf)
    with recording_blocks(model) as record:
        model(X)
    message = r"^NaN or infinity in the branch of layer3\.0: look at the weights and at the images$"
    with pytest.raises(ValueError, match=message):
        record.to_frame("mine")


def test_a_constant_shortcut_has_no_ratio():
    model = network("resnet-8")
    with torch.no_grad():
        model.bn1.weight.zero_()
        model.bn1.bias.fill_(-1)  # ReLU makes it 0 everywhere
    first = measured(model).iloc[0]
    assert first["shortcut_std"] == 0
    assert pd.isna(first["ratio"])
