import numpy as np
import pytest
import torch

from models.data.preprocessing import PRESETS, augment, mean_image, per_pixel, random_crop

IMAGES = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_presets_are_the_formula(preset):
    expected = (IMAGES / 255 - preset.mean.flatten().numpy()) / preset.std.flatten().numpy()
    x = preset(IMAGES)
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    np.testing.assert_allclose(x.permute(0, 2, 3, 1), expected, atol=1e-5)


@pytest.mark.parametrize("preset", [*PRESETS.values(), per_pixel(mean_image(IMAGES))], ids=[*PRESETS, "per-pixel"])
def test_images_in_other_units_and_left_as_they_are(preset):
    x = torch.from_numpy(IMAGES).permute(0, 3, 1, 2).float() / 255
    before = x.clone()
    torch.testing.assert_close(preset.scaled(x), preset(IMAGES))
    assert torch.equal(x, before)


def test_per_pixel_subtracts_the_mean_image():
    x = per_pixel(mean_image(IMAGES))(IMAGES)
    assert x.mean(0).abs().max() < 1e-6
    np.testing.assert_allclose(x[3, 1], IMAGES[3, :, :, 1] / 255 - IMAGES[..., 1].mean(0) / 255, atol=1e-6)


def crops(x):
    """Every possible crop of one image (C, H, W), unflipped and flipped, as a set of bytes."""
    padded = np.pad(x, ((0, 0), (4, 4), (4, 4)))
    for top in range(9):
        for left in range(9):
            cut = padded[:, top : top + 32, left : left + 32]
            yield cut.tobytes()
            yield np.ascontiguousarray(cut[:, :, ::-1]).tobytes()


def test_every_crop_is_one_of_the_162_possible_ones_and_each_of_them_occurs():
    image = torch.from_numpy(IMAGES[0]).permute(2, 0, 1).contiguous()
    cut = random_crop(image.expand(4000, 3, 32, 32), torch.Generator().manual_seed(0)).contiguous()
    possible = set(crops(image.numpy()))
    assert len(possible) == 162
    assert {crop.numpy().tobytes() for crop in cut} == possible


def test_black_padding_is_black_and_zero_padding_is_zero():
    preset = PRESETS["imagenet"]
    black = float(preset(np.zeros((1, 32, 32, 3), np.uint8))[0, 0, 0, 0])
    white = np.full((200, 32, 32, 3), 255, np.uint8)
    for padding, value in (("black", black), ("zero", 0.0)):
        corner = augment(white, preset, padding, torch.Generator().manual_seed(0))[:, 0, 0, 0]
        assert any(corner == value)
        assert set(corner.tolist()) == {value, float(preset(white[:1])[0, 0, 0, 0])}
    assert torch.equal(augment(white, preset, "none", torch.Generator()), preset(white))
