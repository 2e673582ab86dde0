"""Batches: every image once an epoch, augmented and normalised as in the paper."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from models.data.preprocessing import mean_image, per_pixel
from models.training import batches
from models.training.batches import CROP, STATISTICS, Batches, batch_indices
from models.training.recipe import Recipe
from tests.helpers import made_up

SMALL = Recipe("residual", 8, iterations=12, batch=32)
TRAIN, TEST = made_up(100), made_up(20, "test")


@pytest.mark.parametrize(("size", "epochs"), [(100, 8), (10, 80)])  # 10: less than a batch
def test_every_image_once_per_epoch_and_every_batch_full(size, epochs):
    found = [batch_indices(SMALL, size, iteration) for iteration in range(25)]
    assert {len(batch) for batch in found} == {32}
    orders = np.concatenate(found).reshape(epochs, size)
    assert (np.sort(orders) == np.arange(size)).all()
    assert len({tuple(order) for order in orders}) == epochs
    assert not np.array_equal(found[0], batch_indices(replace(SMALL, seed=1), size, 0))


def test_images_are_normalised_then_padded_cropped_and_flipped():
    x, y = Batches(SMALL, TRAIN, TEST).batch(0)
    indices = batch_indices(SMALL, 100, 0)
    assert np.array_equal(y, TRAIN.labels[indices])
    plain = per_pixel(mean_image(TRAIN.images))(TRAIN.images[indices])
    padded = torch.nn.functional.pad(plain, (4, 4, 4, 4))  # with zeros, after the normalisation
    for image, whole in zip(x, padded, strict=True):
        cuts = [whole[:, i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
        assert any(torch.equal(image, cut) or torch.equal(image, cut.flip(2)) for cut in cuts)


def test_augmentation_depends_on_seed_purpose_and_iteration_alone():
    data, indices = Batches(SMALL, TRAIN, TEST), batch_indices(SMALL, 100, 0)
    x = data.augmented(indices, CROP, 0)[0]
    assert torch.equal(x, data.augmented(indices, CROP, 0)[0])
    others = [data.augmented(indices, CROP, 1)[0], data.augmented(indices, STATISTICS, 0)[0]]
    data.recipe = replace(SMALL, seed=1)
    others.append(data.augmented(indices, CROP, 0)[0])
    assert not any(torch.equal(x, other) for other in others)


def test_the_statistics_batch_is_chosen_by_the_seed(monkeypatch):
    assert batches.STATISTICS_IMAGES == 10_000
    monkeypatch.setattr(batches, "STATISTICS_IMAGES", 40)
    data = Batches(SMALL, TRAIN, TEST)
    chosen = np.random.default_rng([0, STATISTICS]).permutation(100)[:40]
    expected = data.augmented(chosen, STATISTICS, 0)[0]
    assert torch.equal(data.statistics_batch(), expected)


def test_test_batches_hold_every_test_image_once(monkeypatch):
    monkeypatch.setattr(batches, "TEST_BATCH", 7)
    data = Batches(SMALL, TRAIN, TEST)
    parts = list(data.test_batches())
    assert [len(labels) for _, labels in parts] == [7, 7, 6]
    assert torch.equal(torch.cat([x for x, _ in parts]), data.preprocessing(TEST.images))
    assert torch.equal(torch.cat([labels for _, labels in parts]), torch.tensor(TEST.labels))


def test_the_digest_knows_images_labels_and_their_order():
    order = np.arange(100)[::-1]
    others = [
        replace(TRAIN, images=TRAIN.images[order], labels=TRAIN.labels[order]),
        replace(TRAIN, labels=(TRAIN.labels + 1) % 10),
    ]
    digests = {Batches(SMALL, train, TEST).digest for train in (TRAIN, *others)}
    assert len(digests) == 3
    same = replace(TRAIN, labels=TRAIN.labels.astype(np.int32))
    assert Batches(SMALL, same, TEST).digest in digests
