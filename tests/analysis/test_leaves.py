import numpy as np
import pytest

from analysis.leaves import Picture, dead_leaves


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
    assert np.array_equal(first, dead_leaves(photographs, 3, seed=1, progress=lambda: done.append(1)))
    assert len(done) == 3
    assert not np.array_equal(first, dead_leaves(photographs, 3, seed=2))


def test_each_image_has_the_colours_of_one_photograph(photographs):
    means = dead_leaves(photographs, 12, seed=0).mean((1, 2))  # shades change a leaf about its middle
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
