"""What a Recorder gives, that it leaves the training alone, and what it refuses."""

import copy
import os
import subprocess
import sys

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.utils._python_dispatch import TorchDispatchMode

import analysis
from analysis import Recorder
from analysis.measuring.frame import COLUMNS
from models import build, closed_form
from tests.conftest import ROOT

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def tiny():
    """One convolution and its BN, of known numbers."""
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2, eps=0.5))
    model[1].weight.data = torch.tensor([2.0, 3.0])
    model[1].bias.data = torch.tensor([-1.0, 1.0])
    model[1].running_var.copy_(torch.tensor([1.5, 0.5]))
    return model


class Noisy(nn.Module):
    """A network with dropout in training and random numbers in evaluation, too."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 10)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu_()
        x = F.dropout(x + 0.1 * torch.randn_like(x), 0.3, self.training)
        return self.fc(self.bn2(self.conv2(x)).mean((2, 3)))


def train(model, record, steps=12):
    """The losses of a short training, bit by bit."""
    torch.manual_seed(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(1, steps + 1):
        loss = F.cross_entropy(model(torch.randn(8, 3, 8, 8)), torch.arange(8))
        optimizer.zero_grad()
        loss.backward()
        record(step)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_record_is_the_closed_form_as_floats():
    recorder = Recorder(tiny(), every=10)
    assert recorder.record(9) == {}
    values = recorder.record(10)
    std = (((4 * 1.5 / 2 + 9 * 0.5 / 1) / 2) + 1) ** 0.5  # the BN's own epsilon is 0.5
    assert values == {"response_std/0": pytest.approx(std), "response_std/mean": pytest.approx(std)}
    assert {type(value) for value in values.values()} == {float}


def test_the_frame_has_a_row_a_layer_and_step():
    model = build("resnet-8")
    recorder = Recorder(model, every=2)
    for step in (2, 3, 4):
        recorder.record(step)
        model.layer1[0].bn1.weight.data.mul_(2)
    frame = recorder.frame()
    assert list(frame.columns) == ["step", *COLUMNS]
    assert frame["step"].tolist() == [2] * 7 + [4] * 7
    assert frame["name"].tolist() == closed_form(model)["name"].tolist() * 2
    assert frame.loc[frame["name"] == "layer1.0.conv1", "std"].tolist() == pytest.approx(
        [1, 4], rel=1e-4
    )
    assert frame.loc[0, ["network", "kind", "depth", "source"]].tolist() == [
        *("resnet-8", "residual", 8, "batchnorm")
    ]


def test_with_images_it_is_what_measure_gives():
    model = Noisy()
    values = Recorder(model, images=IMAGES).record(0)
    torch.manual_seed(0)  # as in the tests' fixture
    frame = analysis.measure(Noisy(), [IMAGES])
    assert values["response_std/conv1"] == frame["std"][0]
    assert values["response_std/mean"] != Recorder(model).record(0)["response_std/mean"]


@pytest.mark.parametrize("images", [None, IMAGES], ids=["closed form", "images"])
def test_the_training_is_the_same_to_the_bit(images):
    model = Noisy()
    other = copy.deepcopy(model)
    recorder = Recorder(other, every=3, images=images)
    assert train(model, lambda step: {}) == train(other, recorder.record)
    assert len(recorder.records) == 4
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(
            model.state_dict().values(), other.state_dict().values(), strict=True
        )
    )


@pytest.mark.parametrize("images", [None, IMAGES], ids=["closed form", "images"])
def test_a_record_leaves_nothing_behind(images, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    model = Noisy().train()
    model.bn2.eval()  # a frozen BN stays frozen
    hooks = [(module._forward_hooks, module._forward_pre_hooks) for module in model.modules()]
    before = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    Recorder(model, images=images).record(100)
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in before[0].items())
    assert torch.equal(before[1], torch.get_rng_state())
    assert [module.training for module in (model, model.bn1, model.bn2)] == [True, True, False]
    assert torch.backends.cudnn.benchmark is True
    assert not any(hook for pair in hooks for hook in pair)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_one_step_twice_is_one_record_and_an_earlier_one_goes_back():
    recorder = Recorder(tiny(), every=5)
    assert recorder.record(5)
    assert recorder.record(5) == {}  # gradient accumulation: several batches in one step
    recorder.record(10)
    recorder.record(15)
    recorder.record(10)
    assert list(recorder.records) == [5, 10]


def test_layers_takes_patterns():
    recorder = Recorder(build("resnet-8"), layers=["layer2.*", "conv1"])
    assert list(recorder.record(0)) == [
        f"response_std/{name}" for name in ("conv1", "layer2.0.conv1", "layer2.0.conv2", "mean")
    ]


def test_a_convolution_that_runs_twice_gets_two_numbers():
    class Twice(nn.Sequential):
        def forward(self, x):
            return super().forward(super().forward(x))

    model = Twice(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    values = Recorder(model, images=IMAGES).record(0)
    assert list(values) == ["response_std/0", "response_std/0:2", "response_std/mean"]


def test_save_writes_the_frame_with_the_step_first(tmp_path):
    recorder = Recorder(build("resnet-8"), every=1)
    recorder.record(1)
    recorder.record(2)
    recorder.save(tmp_path / "dynamics.csv")
    assert (tmp_path / "dynamics.csv").read_text().startswith("step,network,")
    read = pd.read_csv(tmp_path / "dynamics.csv")
    assert read["std"].tolist() == recorder.frame()["std"].tolist()


def test_plot_draws_every_recorded_step():
    recorder = Recorder(build("resnet-8"), every=1)
    recorder.record(1)
    recorder.record(3)
    assert recorder.plot().axes[1].lines[0].get_xdata().tolist() == [1, 3]


class Reads(TorchDispatchMode):
    """The operations that read the values of some tensors."""

    def __init__(self, tensors):
        super().__init__()
        self.places, self.names = {x.untyped_storage().data_ptr() for x in tensors}, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        inputs = torch.utils._pytree.tree_leaves(args)
        read = {
            x.untyped_storage().data_ptr() for x in inputs if isinstance(x, torch.Tensor)
        } & self.places
        if read and not torch._C._is_alias_of(inputs[0], function(*args, **(kwargs or {}))):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_record_reads_the_network_once():
    """One transfer, if the network is on a GPU."""
    model = build("resnet-20")
    recorder = Recorder(model)
    with Reads([x for x in model.state_dict().values() if x.ndim == 1]) as reads:
        recorder.record(0)
    assert reads.names == ["aten.cat.default"]


@pytest.mark.parametrize(
    ("model", "options", "line"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3)), {}, "Sequential has no BN, .*measure_branches"),
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), {}, "no 3x3 convolution"),
        (tiny(), {"layers": "conv*"}, r"layers: 'conv\*' matches none of Sequential's: 0"),
        (tiny(), {"every": 0}, "every=0: "),
    ],
)
def test_what_cannot_be_recorded_is_refused_at_once(model, options, line):
    with pytest.raises(ValueError, match=line):
        Recorder(model, **options)


def test_a_file_without_records_is_refused(tmp_path):
    recorder = Recorder(tiny(), every=100)
    recorder.record(50)
    with pytest.raises(ValueError, match="nothing is recorded yet; only multiples of 100"):
        recorder.save(tmp_path / "dynamics.csv")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("images", [None, IMAGES], ids=["closed form", "images"])
def test_a_diverged_training_goes_on(images):
    model = Noisy()
    recorder = Recorder(model, every=1, images=images)
    assert recorder.record(1)
    model.bn2.weight.data[0] = torch.nan
    with pytest.warns(UserWarning, match=r"step 2 is not recorded: .*(NaN|nan)"):
        assert recorder.record(2) == {}
    assert list(recorder.records) == [1]


class Crossed(nn.Module):
    """A network whose BNs are not called like their convolutions."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn2 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.bn1 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn1(self.conv2(self.bn2(self.conv1(x))))


def test_doubtful_pairs_are_said_once_and_images_tell():
    with pytest.warns(UserWarning, match="Crossed: not recorded, or in doubt: .*images= tells"):
        recorder = Recorder(Crossed())
    assert recorder.record(0)
    frame = Recorder(Crossed(), images=IMAGES)
    frame.record(0)
    assert frame.frame()["norm"].tolist() == ["bn2", "bn1"]


def train_on_rank(rank, folder):
    """Train in one of two processes, without and with recorders, and save what they gave."""
    meet = f"file://{folder}/meet"
    distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    losses, values = [], []
    for recorded in (False, True):
        torch.manual_seed(0)
        model = nn.parallel.DistributedDataParallel(Noisy())
        formula = Recorder(model, every=6)
        merged = Recorder(model, every=6, images=IMAGES[4 * rank : 4 * rank + 4])

        def record(step, recorded=recorded, recorders=(formula, merged)):
            if recorded:
                values.append([recorder.record(step) for recorder in recorders])

        losses.append(train(model, record))
    assert losses[0] == losses[1]
    broken = Recorder(model, images=IMAGES / (1 - rank))  # infinity on rank 1: no rank waits
    with pytest.warns(UserWarning, match="step 0 is not recorded: "):
        assert broken.record(0) == {}
    formula.save(f"{folder}/formula-{rank}.csv")
    torch.save((values, merged.record(0), model.module.state_dict()), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.process
@pytest.mark.slow
def test_rank_0_records_for_all_ranks_of_a_ddp_training(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        for rank in (0, 1)
    ]
    assert [process.wait(timeout=300) for process in ranks] == [0, 0]
    (first, last, state), (second, others, _) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    assert [bool(a) and bool(b) for a, b in first] == [i % 6 == 5 for i in range(12)]
    assert [*second, others] == [[{}, {}]] * 12 + [{}]
    model = Noisy()
    model.load_state_dict(state)
    alone = Recorder(model, images=IMAGES).record(0)  # all images in one process
    assert last["response_std/conv1"] == pytest.approx(alone["response_std/conv1"], rel=1e-6)
    assert pd.read_csv(tmp_path / "formula-0.csv")["name"].tolist() == ["conv1", "conv2"] * 2
    assert not (tmp_path / "formula-1.csv").exists()


if __name__ == "__main__":
    train_on_rank(int(sys.argv[1]), sys.argv[2])
