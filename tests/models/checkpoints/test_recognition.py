"""Networks whose BN statistics were recorded under every combination of what there is to recognise."""

import itertools
import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from models import load
from models.checkpoints import loading
from models.checkpoints.recognition import (
    FITS,
    SAMPLE,
    STEM_SAMPLE,
    best_of,
    match_network,
    match_preprocessing,
    sample,
)
from models.data.preprocessing import PRESETS, augment, mean_image, per_channel, per_pixel
from models.resnet import Config, ResNet
from tests.helpers import blobs, record


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


@pytest.mark.parametrize("padding", ["both", "after"])
@pytest.mark.slow
def test_shortcuts_with_average_pooling_are_recognised(padding, tmp_path):
    seen, images = blobs(600, seed=1), blobs(600, seed=2)
    config = Config("residual", 14, shortcut="pool", padding=padding)
    x = augment(seen, PRESETS["cifar10"], "zero", torch.Generator().manual_seed(5))
    torch.save(record(ResNet(config), x).state_dict(), tmp_path / "a.pt")
    found = load(tmp_path / "a.pt", images=images)
    assert found.model.config == config
    assert found.warnings == []


@pytest.mark.slow
def test_between_a_good_fit_and_none_there_is_a_warning(tmp_path):
    """The case of the issue: mean 0.5 and std 0.25 passed as cifar10. Numbers of one's own fit."""
    seen, images = blobs(600, seed=1), blobs(600, seed=2)
    own = per_channel("own", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    x = augment(seen, own, "zero", torch.Generator().manual_seed(5))
    torch.save(record(ResNet(Config("residual", 14)), x).state_dict(), tmp_path / "a.pt")
    for given, words in (
        ("0.5,0.5,0.5/0.25,0.25,0.25", []),
        ("0.52,0.52,0.52/0.265,0.265,0.265", ["the preprocessing fits roughly, so it may be"]),
        ("imagenet", ["no preprocessing fits", "the images, the preprocessing or the network are"]),
    ):
        found = load(tmp_path / "a.pt", normalize=given, kind="residual", images=images)
        said = [warning for warning in found.warnings if "kind" not in warning]
        assert len(said) == len(words)
        assert all(line.startswith(start) for line, start in zip(said, words, strict=True)), said
        assert found.preprocessing.name == given


CARDS = [
    ({"kind": "plain"}, "its card says plain, and the images show residual, which is taken"),
    ({"padding": "after"}, "its card says residual, zeros after, and the images show residual,"),
    ({"kind": "plain", "padding": "after"}, "its card says plain, and the images show residual"),
    ({"kind": None}, None),
    ({}, None),
]


@pytest.mark.parametrize(("change", "words"), CARDS)
def test_a_card_is_checked_by_the_forward_pass(change, words, tmp_path):
    seen, images = blobs(600, seed=1), blobs(600, seed=2)
    true = Config("residual", 14)
    x = augment(seen, PRESETS["cifar10"], "zero", torch.Generator().manual_seed(5))
    path = tmp_path / "a.safetensors"
    loading.save(
        path, record(ResNet(true), x), PRESETS["cifar10"], crop_padding="zero", training={}
    )
    file = loading.read(path)
    save_file(file.tensors, path, metadata={"card": json.dumps(file.card | change)})
    found = load(path, images=images)
    assert found.config == true
    assert found.kind_known == ("recognised" if change else "card")
    assert [warning.startswith(words or "") for warning in found.warnings] == [True] * (
        words is not None
    )


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_deepest_shipped_network_is_recognised_though_it_fits_badly(real_test, tmp_path):
    """In resnet-110 few images make most of the variance, and 256 do not repeat it."""
    shipped = load("resnet-110")
    torch.save(shipped.model.state_dict(), tmp_path / "a.pt")
    found = load(tmp_path / "a.pt", images=real_test.images)
    assert found.model.config == shipped.model.config
    assert (found.preprocessing.name, found.crop_padding) == ("per-pixel", "zero")
    assert re.match(r"recognised, misfit 0\.3\d, next best 0\.4", found.how_kind())
    assert len(found.warnings) == 2
    assert found.warnings[1].startswith("BN's statistics are not those of these images: few images")


@pytest.mark.parametrize("name", ["plain-20", "resnet-20"])
def test_the_shipped_networks_are_recognised_without_their_cards(name, real_test, tmp_path):
    shipped = load(name)
    torch.save(shipped.model.state_dict(), tmp_path / "a.pt")
    found = load(tmp_path / "a.pt", images=real_test.images)
    assert found.model.config == shipped.model.config
    assert (found.kind_known, found.kind_fit.good, found.warnings) == ("recognised", True, [])


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
