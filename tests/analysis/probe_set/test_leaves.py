import numpy as np
import pytest

from analysis.probe_set import leaves
from analysis.probe_set.leaves import BEHIND, FINER, Picture, dead_leaves


@pytest.fixture
def photographs():
    """Four of one colour each, (4, 32, 32, 3) uint8."""
    colors = np.array([[255, 0, 0], [0, 0, 255], [128, 128, 128], [250, 240, 10]], np.uint8)
    return np.broadcast_to(colors[:, None, None], (4, 32, 32, 3))


def test_the_same_seed_gives_the_same_images(photographs):
    first = dead_leaves(photographs, 3, seed=1)
    assert first.shape == (3, 32, 32, 3)
    assert first.dtype == np.float32
    done = []
    assert np.array_equal(
        first, dead_leaves(photographs, 3, seed=1, progress=lambda: done.append(1))
    )
    assert len(done) == 3
    assert not np.array_equal(first, dead_leaves(photographs, 3, seed=2))


def test_each_image_has_the_colours_of_one_photograph(photographs):
    means = dead_leaves(photographs, 12, seed=0).mean(
        (1, 2)
    )  # shades change a leaf about its middle
    distances = abs(means[:, None] - photographs[:, 0, 0] / 255).max(-1)  # (images, photographs)
    assert (distances.min(1) < 0.1).all()
    assert len(set(distances.argmin(1))) == 4


def test_what_fell_first_hides_what_falls_later():
    black = np.zeros((64, 64, 3), np.float32)
    picture = Picture(np.random.default_rng(0), np.eye(3), black, np.zeros((64, 64), bool))
    picture.drop(32, 32, 10)
    first, covered = picture.pixels.copy(), picture.covered.copy()
    assert 50 < covered.sum() < 1000  # from a slim rectangle's area to a star's, of this radius
    assert (first[~covered] == 0).all()
    picture.drop(32, 32, 30)
    assert np.array_equal(picture.pixels[covered], first[covered])
    assert picture.covered.sum() > covered.sum()
    assert (picture.pixels[~picture.covered] == 0).all()


def test_images_have_edges_and_flat_parts():
    """Most neighbouring pixels hardly differ, and a few differ much."""
    noise = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    steps = np.diff(dead_leaves(noise, 16, seed=0), axis=1)
    assert np.mean(steps**4) / np.mean(steps**2) ** 2 > 5  # 3 for Gaussian noise


def test_one_leaf_may_lie_behind_those_in_front_as_a_sky(monkeypatch):
    """What those in front do not cover then has its colour."""
    two = np.array([[10, 20, 30], [240, 230, 220]], np.uint8)
    photograph = two[np.random.default_rng(0).integers(2, size=(1, 32, 32))]
    monkeypatch.setattr(leaves, "OPEN", 1)
    monkeypatch.setattr(leaves, "SHADE", 0)
    corners = dead_leaves(photograph, 8, seed=0)[:, ::31, ::31]  # too far out for those in front
    assert np.allclose(corners, corners[:, :1, :1], atol=1e-6)
    assert dead_leaves(photograph, 8, seed=0).std((1, 2)).max() > 0.1
    monkeypatch.setattr(leaves, "IN_FRONT", 0)
    skies = dead_leaves(photograph, 8, seed=0)
    assert np.allclose(skies, skies[:, :1, :1], atol=1e-6)
    monkeypatch.setattr(leaves, "OPEN", 0)
    assert dead_leaves(photograph, 8, seed=0).std((1, 2)).min() > 0.1


def test_a_leaf_behind_covers_the_whole_picture():
    side = FINER * 32
    for seed in range(100):  # of its angle, shape and slimness
        pixels, covered = np.zeros((side, side, 3), np.float32), np.zeros((side, side), bool)
        Picture(np.random.default_rng(seed), np.eye(3), pixels, covered).drop(
            side / 2, side / 2, BEHIND * side
        )
        assert covered.all()
