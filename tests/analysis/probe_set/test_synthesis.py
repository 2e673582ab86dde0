import numpy as np
import pytest
import torch
from torch import nn

from analysis.measuring.measurement import measuring
from analysis.probe_set import synthesis
from analysis.probe_set.leaves import dead_leaves
from analysis.probe_set.synthesis import (
    Goal,
    Spectrum,
    Statistics,
    Synthesis,
    choose,
    fused,
    unusual,
)
from models import build
from models.data.preprocessing import PRESETS

NORMALISE = PRESETS["cifar10"]


@pytest.fixture(scope="module")
def photographs():
    """Stand-ins for a test set, (40, 32, 32, 3) uint8: smooth, in many colours."""
    coarse = torch.rand(40, 3, 4, 4, generator=torch.Generator().manual_seed(7))
    smooth = nn.functional.interpolate(coarse, size=32, mode="bilinear")
    return (255 * smooth).byte().permute(0, 2, 3, 1).numpy()


def small(name, images):
    """A network whose BN statistics are those of images."""
    torch.manual_seed(1)
    model = build(name)
    with torch.no_grad():
        for _ in range(20):
            model.train()(NORMALISE(images))
    return model.eval()


def measure(network, images):
    with measuring(network) as measurement:
        measurement.add(NORMALISE(images))
    return measurement.result()


@pytest.fixture
def network(photographs):
    return small("resnet-8", photographs)


@pytest.fixture
def result(network, photographs):
    return measure(network, photographs)


def misfit(network, result, images):
    """The mean relative difference of std on images (n, 32, 32, 3), uint8."""
    pairs = zip(measure(network, images).layers, result.layers, strict=True)
    return np.mean([abs(ours.moments.std / goal.moments.std - 1) for ours, goal in pairs])


def test_waves_of_the_usual_power(photographs):
    """Noise becomes images with the set's covariance of the colours at each frequency, and its mean
    image.
    """
    spectrum = Spectrum(photographs)
    noise = np.random.default_rng(0).standard_normal((4000, 32, 32, 3)).astype(np.float32)
    images = spectrum.render(spectrum.waves(noise)).permute(0, 2, 3, 1).numpy()
    assert images.mean(0) == pytest.approx(photographs.mean(0) / 255, abs=0.02)
    ours, theirs = (np.fft.fft2(x - x.mean(0), axes=(1, 2)) for x in (images, photographs / 255))
    for wave in ((0, 1), (3, 2), (8, 8)):
        covariances = [
            np.einsum("nc,nd->cd", x[:, *wave], x[:, *wave].conj()) / len(x) for x in (ours, theirs)
        ]
        assert covariances[0] == pytest.approx(covariances[1], abs=0.01 * abs(covariances[1]).max())


def test_images_of_their_own_waves(photographs):
    """Waves of the set itself give the set back: its power is the usual one."""
    spectrum = Spectrum(photographs)
    waves = spectrum.waves(photographs.astype(np.float32) / 255)
    assert spectrum.render(waves).permute(0, 2, 3, 1).numpy() == pytest.approx(
        photographs / 255, abs=1e-3
    )
    assert unusual(waves).item() < 0.2
    assert unusual(2 * waves).item() > 1


def test_the_distance_by_hand(network, result):
    goal = Goal(network, NORMALISE, result).statistics
    squares = goal.variances + goal.means**2
    assert goal.distance(goal.means, squares).item() == pytest.approx(0, abs=1e-8)
    layers, channels = len(result.layers), len(result.layers[0].moments.mean)
    shift = torch.zeros_like(goal.means)
    shift[0] = goal.variances[0].sqrt()  # of the first layer's first channel, its mean by one std
    found = goal.distance(goal.means + shift, goal.variances + (goal.means + shift) ** 2)
    assert found.item() == pytest.approx(1 / (layers * channels), rel=1e-2)
    wide = goal.variances.clone()
    wide[-1] *= 4
    expected = np.log(4) ** 2 / (layers * len(result.layers[-1].moments.mean))
    assert goal.distance(goal.means, wide + goal.means**2).item() == pytest.approx(
        expected, rel=1e-2
    )
    heavier = Goal(network, NORMALISE, result, weight=3.0).statistics
    assert heavier.distance(goal.means, wide + goal.means**2).item() == pytest.approx(
        3 * expected, rel=1e-2
    )


def test_a_dead_channel_is_no_infinity(network, result):
    goal = Goal(network, NORMALISE, result).statistics
    goal.means[3] = goal.variances[3] = 0
    squares = goal.variances + goal.means**2
    assert goal.distance(goal.means, squares).item() == pytest.approx(0, abs=1e-8)
    squares[3] = 1e-3
    assert 0 < goal.distance(goal.means, squares).item() < np.inf


def test_a_fused_copy_gives_the_responses(network, photographs):
    responses = []
    pairs = [("conv1", "bn1"), ("layer1.0.conv1", "layer1.0.bn1")]
    twin = fused(network, pairs, responses)
    x = NORMALISE(photographs[:4])
    with torch.no_grad():
        torch.testing.assert_close(twin(x), network(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            responses[0], network.bn1(network.conv1(x)), rtol=1e-4, atol=1e-4
        )
    assert len(responses) == 2
    assert isinstance(network.bn1, nn.BatchNorm2d)  # the network itself is as it was


def test_the_loss_of_the_test_set_itself_is_zero_in_whatever_parts(network, result, photographs):
    x = torch.from_numpy(photographs).permute(0, 3, 1, 2).float() / 255
    goal = Goal(network, NORMALISE, result)
    for part, images in enumerate(x.split(16)):
        loss = goal.loss(part, images, len(x))
    assert loss.item() < 1e-6
    assert goal.loss(1, 1 - x[16:32], len(x)).item() > 1e-3


def test_those_are_chosen_that_fit_together(network, result, photographs):
    """Among the test set and many others, the test set: nothing else fits as well."""
    others = np.random.default_rng(1).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    images = np.concatenate([others, photographs])
    goals = [Goal(network, NORMALISE, result)]
    chosen = choose(goals, images, 40, seed=0)
    assert len(set(chosen.tolist())) == 40
    assert (chosen >= 60).mean() > 0.9
    assert np.array_equal(chosen, choose(goals, images, 40, seed=0))
    assert sorted(choose(goals, images[:5], 5, seed=0).tolist()) == [0, 1, 2, 3, 4]


def test_one_try_along_the_slope_is_enough(network, result, photographs, monkeypatch):
    """With nothing but the distance's slope to go by, those that fit are found: one of 60 at random
    would not be.
    """
    monkeypatch.setattr(synthesis, "TRIED", 1)
    monkeypatch.setattr(synthesis, "EXCHANGES", 5)
    others = np.random.default_rng(1).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    chosen = choose(
        [Goal(network, NORMALISE, result)], np.concatenate([others, photographs]), 40, seed=0
    )
    assert (chosen >= 60).mean() > 0.9


class RedAndGreen:
    """A goal of one channel: of an image its first pixel's red is the mean, and its green that of
    squares.
    """

    statistics = Statistics(
        *(torch.tensor([value]) for value in (0.5, 0.25, 1e-3, 1.0))
    )  # squares of 0.5

    def respond(self, images):
        return images[:, 0, 0, :1], images[:, 1, 0, :1]


@pytest.mark.parametrize("color", [0, 1])
def test_the_slope_is_that_of_means_and_of_squares(monkeypatch, color):
    """Where the images differ in one of them only, one try still finds those that fit."""
    monkeypatch.setattr(synthesis, "TRIED", 1)
    monkeypatch.setattr(synthesis, "EXCHANGES", 5)
    images = np.full((100, 1, 1, 3), 128, np.uint8)
    images[:60, :, :, color] = 180
    chosen = choose([RedAndGreen()], images, 40, seed=0)
    assert (chosen >= 60).mean() > 0.9


@pytest.mark.parametrize("among", [2, 30])
def test_those_that_fit_are_found_among_a_few_at_a_time(
    network, result, photographs, monkeypatch, among
):
    """Also where some of these few, or all, are chosen already."""
    monkeypatch.setattr(synthesis, "AMONG", among)
    monkeypatch.setattr(synthesis, "EXCHANGES", 150)
    others = np.random.default_rng(1).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    chosen = choose(
        [Goal(network, NORMALISE, result)], np.concatenate([others, photographs]), 40, seed=0
    )
    assert len(set(chosen.tolist())) == 40
    assert (chosen >= 60).mean() > 0.9


def test_those_chosen_fit_every_network(network, result, photographs):
    """Of two networks that want other images, the heavier one has its way, also where it comes
    second.
    """
    pale = 255 - photographs // 3
    other = small("plain-14", photographs)
    images = np.concatenate([photographs, pale])
    first = Goal(network, NORMALISE, result)
    for weight, share in ((0.01, 0), (100.0, 1)):
        second = Goal(other, NORMALISE, measure(other, pale), weight)
        chosen = choose([first, second], images, 40, seed=0)
        assert (chosen >= len(photographs)).mean() == pytest.approx(share, abs=0.1)


def test_the_responses_become_those_of_the_test_set(network, result, photographs):
    spectrum = Spectrum(photographs)
    waves = spectrum.waves(dead_leaves(photographs, 70, seed=3))
    synthesis = Synthesis([Goal(network, NORMALISE, result)], spectrum, waves, rounds=6, seed=0)
    before = misfit(network, result, spectrum.pixels(synthesis.waves))
    losses = list(synthesis.go_on())
    assert len(losses) == 6 * 2  # two parts, of 64 and 6 images
    images = spectrum.pixels(synthesis.waves)
    assert images.shape == (70, 32, 32, 3)
    assert images.dtype == np.uint8
    assert misfit(network, result, images) < 0.7 * before


def test_it_goes_on_bit_for_bit(network, result, photographs):
    spectrum = Spectrum(photographs)
    waves = spectrum.waves(dead_leaves(photographs, 66, seed=3))

    def begin():
        return Synthesis([Goal(network, NORMALISE, result)], spectrum, waves, rounds=2, seed=0)

    whole, first, second = begin(), begin(), begin()
    for _ in whole.go_on():
        pass
    steps = first.go_on()
    next(steps), next(steps), next(steps)
    second.restore(first.state())
    assert len(list(second.go_on())) == 1
    assert torch.equal(second.waves, whole.waves)
