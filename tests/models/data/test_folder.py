"""Folders of images: read, resized, cropped and batched as usual for ImageNet."""

import re
import struct
import threading
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from models import data
from models.data.folder import CROP, RESIZE, SUFFIXES, ImageFolder, crop


def picture(width, height, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def classes(tmp_path):
    """Seven pictures in two class folders, and what is not to be read."""
    for name, seeds in (("1", (0, 1, 2, 3)), ("0", (4, 5, 6))):
        (tmp_path / name).mkdir()
        for seed in seeds:
            picture(40 + seed, 50, seed).save(tmp_path / name / f"{seed}.png")
    (tmp_path / "0" / "._4.png").write_bytes(b"of a Mac")
    (tmp_path / "0" / "notes.txt").write_text("no image")
    return tmp_path


def test_class_folders_are_sorted_and_give_labels(classes):
    folder = ImageFolder.open(classes)
    assert [file.stem for file in folder.files] == ["4", "5", "6", "0", "1", "2", "3"]
    assert folder.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert (len(folder), folder.classes) == (7, 2)
    assert folder.describe() == (
        f"7 images in 2 class folders ({classes}), shorter side to 256, central 224x224 pixels"
    )


def place(path, names):
    """An image in each of the folders."""
    for name in names:
        (path / name).mkdir()
        picture(8, 8).save(path / name / "a.png")
    return ImageFolder.open(path)


WORDS = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
WNIDS = [f"n{i:08}" for i in range(0, 9000, 9)]


@pytest.mark.parametrize("names", [[str(n) for n in range(12)], WORDS, WNIDS], ids=len)
def test_class_folders_are_labelled_by_what_they_are_called(names, tmp_path):
    folder = place(tmp_path, names)
    by_name = {f.parent.name: label for f, label in zip(folder.files, folder.labels, strict=True)}
    assert by_name == {name: label for label, name in enumerate(names)}
    assert (folder.classes, folder.labels_known) == (len(names), "")


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["0", "1", "2", "4"], "the class folders are not numbered from 0 on without a gap"),
        (["1", "2", "3"], "the class folders are not numbered from 0 on without a gap"),
        (WNIDS[:10], "there are 10 of ImageNet's 1,000 class folders"),
        (WORDS[:9], "the class of the folder 'bird' is not known"),
        (["cat", "lorry"], "the class of the folder 'lorry' is not known"),
        (["1", "n00000001"], "the class of the folder '1' is not known"),
    ],
)
def test_without_the_whole_set_of_classes_there_are_no_labels(names, why, tmp_path):
    folder = place(tmp_path, names)
    assert (folder.labels, folder.classes, folder.labels_known) == (None, 0, why)
    assert f"images in {len(names)} class folders" in folder.describe()


def test_images_are_loaded_by_name(classes):
    assert (data.load("probe").side, data.load(classes, side=224).side) == (32, 224)
    with pytest.raises(FileNotFoundError, match="no CIFAR-10 train images found"):
        data.load("cifar10", "train")
    with pytest.raises(ValueError, match="CIFAR-10's images have 32x32"):
        data.load(classes)


def test_a_flat_folder_has_no_labels(tmp_path):
    for suffix in (".png", ".JPG", ".jpeg", ".bmp", ".webp"):
        picture(30, 30).save(tmp_path / f"a{suffix}")
    folder = ImageFolder.open(tmp_path)
    assert (len(folder), folder.classes, folder.labels) == (5, 0, None)
    assert "5 images without labels" in folder.describe()
    [(images, labels)] = folder.batches(8)
    assert images.shape == (5, CROP, CROP, 3)
    assert labels is None


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_batches_hold_every_image_once_and_in_order(classes, size):
    folder = ImageFolder.open(classes)
    alone = [folder.decode(file) for file in folder.files]
    parts = list(folder.batches(size))
    assert [len(images) for images, _ in parts] == [
        min(size, 7 - start) for start in range(0, 7, size)
    ]
    assert np.array_equal(np.concatenate([images for images, _ in parts]), np.stack(alone))
    assert np.concatenate([labels for _, labels in parts]).tolist() == folder.labels.tolist()


def test_a_part_of_the_images(classes):
    folder = ImageFolder.open(classes)
    parts = list(folder.batches(2, 1, 4))
    assert [len(images) for images, _ in parts] == [2, 1]
    assert np.array_equal(parts[1][0][0], folder.decode(folder.files[3]))
    assert np.concatenate([labels for _, labels in parts]).tolist() == folder.labels[1:4].tolist()
    assert set(folder.digests) == set(folder.files[1:4])  # threads end in any order


def test_a_part_is_spread_over_the_files_and_says_so(classes):
    folder = ImageFolder.open(classes)
    part = folder.some(3)
    assert part.describe().startswith(f"3 of 7 images in 2 class folders ({classes})")
    assert (len(part), part.total, part.labels.tolist()) == (3, 7, [0, 1, 1])
    expected = [folder.decode(folder.files[i]) for i in (0, 3, 6)]
    assert np.array_equal(folder.sample(3), np.stack(expected))
    assert folder.sample(99).shape == (7, CROP, CROP, 3)


def test_no_thread_is_left_behind(classes):
    before = set(threading.enumerate())
    batches = ImageFolder.open(classes).batches(1)
    next(batches)
    batches.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=10)
        assert not thread.is_alive()


@pytest.mark.parametrize(
    "size", [(256, 256), (300, 256), (256, 400), (512, 512), (500, 375), (100, 80)]
)
def test_the_crop_is_that_of_resizing_first(size):
    """In two steps: the shorter side to 256, then the central 224x224. Smooth images, as
    interpolation rounds.
    """
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    image = Image.fromarray((np.stack([x, y, x * y], 2) * 255).astype(np.uint8))
    scale = RESIZE / min(size)
    resized = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR)
    left, top = (resized.width - CROP) / 2, (resized.height - CROP) / 2
    expected = np.asarray(
        resized.crop((round(left), round(top), round(left) + CROP, round(top) + CROP)), np.int64
    )
    assert np.abs(crop(image) - expected).max() <= 2


def test_an_image_of_256_pixels_is_only_cropped():
    image = picture(256, 256)
    assert np.array_equal(crop(image), np.asarray(image)[16:240, 16:240])


def test_other_modes_become_rgb(tmp_path):
    grey = np.tile(np.linspace(0, 255, 256).astype(np.uint8), (256, 1))
    sixteen = Image.fromarray(grey.astype(np.uint16) * 257)
    transparent = Image.fromarray(np.dstack([grey] * 3 + [np.full_like(grey, 255)]))
    expected = np.dstack([grey[16:240, 16:240]] * 3)
    images = {"grey": Image.fromarray(grey), "sixteen": sixteen, "alpha": transparent}
    for name, image in images.items():
        image.save(tmp_path / f"{name}.png")
        decoded = ImageFolder.open(tmp_path).decode(tmp_path / f"{name}.png")
        assert np.array_equal(decoded, expected), name


def test_an_animation_is_its_first_image(tmp_path):
    frames = [Image.new("RGB", (256, 256), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    [(images, _)] = ImageFolder.open(tmp_path).batches(1)
    assert images[0, 100, 100].tolist() == [255, 0, 0]


def test_a_very_narrow_image_needs_little_memory(tmp_path):
    picture(60_000, 2).save(tmp_path / "line.png")
    assert ImageFolder.open(tmp_path).sample(1).shape == (1, CROP, CROP, 3)


def test_the_digest_does_not_depend_on_names(tmp_path):
    digests = []
    for names in (("a", "b"), ("z", "c")):
        folder = tmp_path / names[0]
        folder.mkdir()
        for seed, name in enumerate(names):
            picture(30, 30, seed).save(folder / f"{name}.png")
        opened = ImageFolder.open(folder)
        list(opened.batches(2))
        digests.append(opened.provenance()["sha256"])
    assert digests[0] == digests[1]


def header(side):
    """The beginning of a PNG of side x side pixels; no pixel is needed to refuse it."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    end = struct.pack(">I", zlib.crc32(chunk)) + b"\0\0\0\0IDAT" + struct.pack(">I", 0x35AF061E)
    return b"\x89PNG\r\n\x1a\n\0\0\0\r" + chunk + end


def png():
    content = BytesIO()
    picture(64, 64).save(content, "PNG")
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xd8\xff" + bytes(50), "of no known format"),
        (png()[:3000], "image file is truncated"),
        (b"", "of no known format"),
        (header(40_000), "Image size (1600000000 pixels) exceeds"),
        (header(10_000), "Image size (100000000 pixels) exceeds limit"),  # Pillow only warns of it
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_an_image_that_cannot_be_read(content, reason, tmp_path):
    picture(30, 30).save(tmp_path / "b.png")
    (tmp_path / "a.png").write_bytes(content)
    words = f"{tmp_path}/a.png: damaged, too large or no image ({reason}"
    with pytest.raises(ValueError, match=f"^{re.escape(words)}.*; remove it from the folder$") as e:
        list(ImageFolder.open(tmp_path).batches(2))
    assert "0x" not in str(e.value)


def test_no_folder_and_no_images(tmp_path):
    with pytest.raises(ValueError, match=r"gone: no such folder; --data takes a folder of images"):
        ImageFolder.open(tmp_path / "gone")
    (tmp_path / "a.txt").touch()
    with pytest.raises(
        ValueError,
        match=re.escape(f"{tmp_path}: no images here; looked for {', '.join(SUFFIXES)} files"),
    ):
        ImageFolder.open(tmp_path)
