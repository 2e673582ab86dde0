"""Networks whose BN statistics were recorded under every combination of what there is to recognise."""

import itertools
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import load, zoo
from models.checkpoints.recognition import (
    FITS,
    SAMPLE,
    STEM_SAMPLE,
    best_of,
    match_network,
    match_preprocessing,
    sample,
)
from models.data.preprocessing import PRESETS, augment, mean_image, per_pixel
from models.resnet import Config, ResNet


def blobs(count, seed):
    """Smooth coloured images (N, 32, 32, 3), uint8, bright in the middle like photographs of
    things.
    """
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 6, 6, generator=generator) * 0.5 + torch.randn(
        count, 1, 1, 1, generator=generator
    )
    fine = F.interpolate(coarse, size=32, mode="bicubic") + torch.hann_window(32)[:, None] * 0.8
    return (torch.sigmoid(fine) * 255).byte().permute(0, 2, 3, 1).numpy()


def record(network, x):
    """Let BN record the statistics of x, as after a training."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 1)
            nn.init.normal_(module.bias, std=0.3)
            module.momentum = None
            module.reset_running_stats()
    with torch.no_grad():
        network.train()(x)
    return network.eval()


@pytest.mark.parametrize("padding", ["black", "zero", "none"])
@pytest.mark.parametrize("preset", [*PRESETS, "per-pixel"])
def test_preprocessing_is_recognised(preset, padding):
    seen, images = blobs(600, seed=1), blobs(600, seed=2)
    candidates = [*PRESETS.values(), per_pixel(mean_image(images))]
    true = per_pixel(mean_image(seen)) if preset == "per-pixel" else PRESETS[preset]
    network = record(
        ResNet(Config("residual", 8)),
        augment(seen, true, padding, torch.Generator().manual_seed(5)),
    )
    match = match_preprocessing(network, images, candidates)
    found = match.best[0].name, match.best[1]
    # with [0,1] black is zero: the two paddings are the same
    assert found == (preset, padding) or (preset == "[0,1]" and found == ("[0,1]", "black"))
    assert match.misfit < FITS
    assert match.fits


CONFIGS = [Config("residual", 14), Config("residual", 14, padding="after"), Config("plain", 14)]


@pytest.mark.parametrize("true", CONFIGS, ids=lambda config: f"{config.kind} {config.padding}")
def test_the_network_is_recognised_among_those_with_the_same_tensors(true, tmp_path):
    seen, images = blobs(600, seed=1), blobs(600, seed=2)
    network = record(
        ResNet(true), augment(seen, PRESETS["cifar10"], "zero", torch.Generator().manual_seed(5))
    )
    torch.save(network.state_dict(), tmp_path / "a.pt")
    found = load(tmp_path / "a.pt", images=images)
    assert found.model.config == true
    assert (found.preprocessing.name, found.crop_padding) == ("cifar10", "zero")
    assert found.how_kind().startswith("recognised, misfit 0.0")
    assert found.warnings == []


def test_a_network_that_fits_nothing_is_reported(tmp_path):
    network = record(ResNet(Config("plain", 14)), torch.randn(64, 3, 32, 32))
    torch.save(network.state_dict(), tmp_path / "a.pt")
    found = load(
        tmp_path / "a.pt", kind="residual", normalize="imagenet", images=blobs(300, seed=2)
    )
    assert len(found.warnings) == 3
    assert found.warnings[0].startswith("no kind fits (with a misfit below 0.15): misfit ")
    assert found.warnings[1].startswith("no preprocessing fits (with a misfit below 0.15): misfit ")
    assert (
        found.warnings[2]
        == "the images, the preprocessing or the network are not those of the training"
    )


def test_the_public_checkpoints(akamaster, real_test):
    candidates = [*PRESETS.values(), per_pixel(mean_image(real_test.images))]
    for depth, path in akamaster.items():
        configs = [
            Config("residual", depth),
            Config("residual", depth, padding="after"),
            Config("plain", depth),
        ]
        state = load(path).model.state_dict()
        models = [ResNet(config).eval() for config in configs]
        for model in models:
            model.load_state_dict(state)
        inputs = match_preprocessing(models[0], real_test.images, candidates)
        assert (inputs.best[0].name, inputs.best[1]) == ("imagenet", "black")
        assert inputs.misfit < 0.06
        assert inputs.others[0][1] > 0.2
        networks = match_network(models, real_test.images, *inputs.best)
        assert networks.best is models[0]
        assert networks.misfit < 0.02
        misfits = dict(networks.others)
        assert misfits["residual, zeros after"] > 0.25
        assert misfits["plain"] > 2


@pytest.mark.parametrize("name", zoo.shipped())
def test_predictions_tell_the_shipped_networks_from_the_wrong_ones(name, real_test):
    shipped = load(zoo.find(name))
    true, state = shipped.model.config, shipped.model.state_dict()
    configs = [
        Config("residual", true.depth),
        Config("residual", true.depth, padding="after"),
        Config("plain", true.depth),
    ]
    x = augment(
        sample(real_test.images, SAMPLE),
        shipped.preprocessing,
        "zero",
        torch.Generator().manual_seed(0),
    )
    told = {}
    for config in configs:
        network = ResNet(config).eval()
        network.load_state_dict(state)
        with torch.no_grad():
            told[config] = information(network(x))
    assert told.pop(true) > 1.9
    assert max(told.values()) < 0.45


def test_predictions_decide_where_few_images_make_the_variance(real_test, tmp_path):
    """As in resnet-110, whose layers' variances 256 images do not repeat."""
    shipped = load(zoo.find("resnet-110"))
    torch.save(shipped.model.state_dict(), tmp_path / "a.pt")
    found = load(tmp_path / "a.pt", images=real_test.images)
    assert found.model.config == shipped.model.config
    assert (found.preprocessing.name, found.crop_padding) == ("per-pixel", "zero")
    assert re.match(r"recognised, misfit \d\.\d\d, ", found.how_kind())
    assert re.search(r"; its predictions tell most of an image \([12]\.\d+ nats", found.how_kind())
    assert len(found.warnings) == 2
    assert found.warnings[1].startswith(
        "BN's statistics are not those of these images: few images may make"
    )


class Predicts(nn.Module):
    """A BN that recorded `times` the variance that it gets, and predictions of classes, sure (1),
    faint or none (0).
    """

    def __init__(self, images, times, sure):
        super().__init__()
        self.bn, self.sure = nn.BatchNorm2d(3), sure
        x = PRESETS["[0,1]"](torch.as_tensor(images))
        self.bn.running_var.copy_(times * x.var(dim=(0, 2, 3), correction=0))
        self.eval()

    def forward(self, x):
        self.bn(x)
        return 100.0 * self.sure * torch.eye(10)[torch.arange(len(x)) % 10]


@pytest.mark.parametrize(
    ("of", "best"),
    [
        ([(10, 1), (2, 0), (4, 0)], 0),  # not the smallest misfit
        ([(10, 1), (1.02, 0)], 1),  # which is a fit
        ([(10, 1), (2, 1)], 1),  # whose predictions tell as much
        ([(10, 0.01), (2, 0)], 1),  # whose predictions tell less, but hardly
    ],
)
def test_predictions_decide_where_no_misfit_is_a_fit(of, best):
    images = blobs(60, seed=0)
    models = [Predicts(images, times, sure) for times, sure in of]
    match = match_network(models, images, PRESETS["[0,1]"], "none")
    assert match.best is models[best]
    assert match.misfit == pytest.approx(np.log(of[best][0]), abs=1e-4)
    others = sorted(abs(np.log(times)) for times, _ in of[:best] + of[best + 1 :])
    assert [misfit for _, misfit in match.others] == pytest.approx(others, abs=1e-4)
    assert bool(match.by) == (best == 0)
    assert match.clear == (best == 0 or match.misfit < others[0] / 2)


@pytest.mark.parametrize(
    ("logits", "nats"),
    [
        (100 * torch.eye(10), np.log(10)),  # each image is of another class, and surely
        (torch.randn(10, 1).expand(10, 10), 0),  # no image is of any class
        (torch.arange(100.0).expand(10, 100), 0),  # all are of one class
        (torch.full((10, 10), float("nan")), 0),
        (torch.full((10, 10), float("inf")), 0),
        (torch.zeros(10, 10, 2, 2), 0),  # no predictions of classes
        ([torch.zeros(10, 10)], 0),
    ],
)
def test_information_of_predictions(logits, nats):
    assert information(logits) == pytest.approx(nats, abs=1e-6)


def test_the_best_is_the_smallest_and_nan_is_the_worst():
    match = best_of([("a", "A", float("nan")), ("b", "B", 0.3), ("c", "C", 0.2)])
    assert (match.best, match.misfit, match.others[0]) == ("c", 0.2, ("B", 0.3))
    assert not match.fits
    assert match.describe() == "misfit 0.20, next best 0.30 (B)"
    assert best_of([("a", "A", 0.1)]).describe() == "misfit 0.10"


@pytest.mark.parametrize(
    ("misfits", "clear"),
    [
        ((0.1, 0.21), True),
        ((0.1, 0.19), False),
        ((0.1, float("nan")), True),
        ((float("nan"),) * 2, False),
    ],
)
def test_the_best_is_clear_where_it_is_twice_as_good(misfits, clear):
    assert best_of([("a", "A", misfits[0]), ("b", "B", misfits[1])]).clear == clear


def test_samples_are_spread_evenly():
    images = np.arange(10_000)
    assert sample(images, 4).tolist() == [0, 3333, 6666, 9999]
    assert sample(images[:3], STEM_SAMPLE).tolist() == [0, 1, 2]
    assert len(set(sample(images, SAMPLE).tolist())) == SAMPLE


def test_the_samples_are_spread_over_sorted_data_sets(akamaster, real_test):
    by_class = real_test.images[np.argsort(real_test.labels, kind="stable")]
    found = load(akamaster[20], images=by_class)
    assert (found.model.config.kind, found.preprocessing.name, found.warnings) == (
        "residual",
        "imagenet",
        [],
    )


class Head(nn.Module):
    """A BN that takes its input by keyword, and one of vectors: as in VGGs."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.vectors = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.vectors(self.bn(input=self.conv(x)).mean((2, 3)))


def test_bns_of_vectors_tell_nothing():
    network, images = Head().eval(), blobs(64, seed=0)
    normalise = PRESETS["[0,1]"]
    network.bn.momentum = 1.0
    network.bn.train()(network.conv(normalise(images)))
    network.eval()
    assert match_preprocessing(network, images, [normalise], ("none",)).misfit < 0.2
    assert match_network([network], images, normalise, "none").misfit < 0.1


def test_recognition_leaves_no_hooks_behind():
    network = ResNet(CONFIGS[0]).eval()
    match_network([network], blobs(4, seed=0), PRESETS["[0,1]"], "none")
    hooks = [
        len(m._forward_pre_hooks) + len(m._forward_hooks)
        for m in itertools.islice(network.modules(), 100)
    ]
    assert sum(hooks) == 0
