"""The images of a training run, and the random batches that a seed makes of them.

Every random choice depends only on the seed and the iteration (or epoch). The permutations of the
training images follow each other without a gap, so every batch is full; a batch that straddles two
epochs counts towards the earlier one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from models.data.cifar10 import Cifar10
from models.data.preprocessing import augment, mean_image, per_pixel
from models.training.recipe import Recipe

PERMUTATION, CROP, STATISTICS = range(3)  # purposes of random numbers, part of their seeds
STATISTICS_IMAGES = 10_000  # in the batch that the final BN statistics come from
TEST_BATCH = 1_000  # images


@lru_cache(maxsize=2)
def permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of the training images in an epoch, counted from 0."""
    return np.random.default_rng([seed, PERMUTATION, epoch]).permutation(size)


def batch_indices(recipe: Recipe, size: int, iteration: int) -> np.ndarray:
    """Return which of `size` training images are in the batch of an iteration."""
    start = iteration * recipe.batch
    epochs = range(start // size, (start + recipe.batch - 1) // size + 1)
    stream = np.concatenate([permutation(size, recipe.seed, epoch) for epoch in epochs])
    return stream[start - epochs[0] * size :][: recipe.batch]


class Batches:
    """Both splits of CIFAR-10 on the device of a run.

    preprocessing: the paper's, by the mean of the training images.
    digest: SHA-256 of the training images and labels, in their order.
    """

    def __init__(self, recipe: Recipe, train: Cifar10, test: Cifar10) -> None:
        self.recipe, self.size = recipe, len(train.images)
        self.train, self.test = on_device(train, recipe), on_device(test, recipe)
        labels = np.asarray(train.labels, np.int64).tobytes()
        self.digest = hashlib.sha256(train.images.tobytes() + labels).hexdigest()
        self.preprocessing = p = per_pixel(mean_image(train.images))
        self.normalise = replace(p, mean=p.mean.to(recipe.device), std=p.std.to(recipe.device))

    def batch(self, iteration: int) -> tuple[Tensor, Tensor]:
        """Return the images (N, 3, 32, 32) and labels (N,) of an iteration."""
        return self.augmented(batch_indices(self.recipe, self.size, iteration), CROP, iteration)

    def statistics_batch(self) -> Tensor:
        """Return the images (N, 3, 32, 32) that the final BN statistics come from."""
        order = np.random.default_rng([self.recipe.seed, STATISTICS]).permutation(self.size)
        return self.augmented(order[:STATISTICS_IMAGES], STATISTICS, 0)[0]

    def augmented(self, indices: np.ndarray, purpose: int, index: int) -> tuple[Tensor, Tensor]:
        """Return training images (N, 3, 32, 32), augmented at random, and their labels (N,).

        purpose, index: together with the seed they decide the random numbers.
        """
        seed = np.random.SeedSequence([self.recipe.seed, purpose, index]).generate_state(1)
        generator = torch.Generator(self.recipe.device).manual_seed(int(seed[0]))
        chosen = torch.from_numpy(indices).to(self.recipe.device)
        images, labels = (tensor[chosen] for tensor in self.train)
        return augment(images, self.normalise, "zero", generator), labels

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the test images (n, 3, 32, 32), normalised, with their labels (n,)."""
        for images, labels in zip(
            *(torch.split(part, TEST_BATCH) for part in self.test), strict=True
        ):
            yield self.normalise(images).contiguous(memory_format=torch.channels_last), labels


def on_device(split: Cifar10, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Return the images (N, 32, 32, 3), uint8, and labels (N,) of a split on a run's device."""
    images, labels = (torch.as_tensor(array) for array in (split.images, split.labels))
    return images.to(recipe.device), labels.to(recipe.device)
