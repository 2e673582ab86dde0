import json
import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import analysis
import models
from models import zoo
from models.data import probe
from models.files import sha256
from tests.helpers import ROOT

CARD = {
    "count": 35,
    "networks": {
        "a": {"sha256": "made", "made_with": True, "mean": 0.011},
        "b": {"sha256": "better", "made_with": True, "mean": 0.004},
        "c": {"sha256": "held out", "made_with": False, "mean": 0.042},
        "d": {"sha256": "better held out", "made_with": False, "mean": 0.031},
    },
}


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (35, 32, 32, 3), dtype=np.uint8)


def test_what_is_written_is_read(images, tmp_path):
    file = tmp_path / "mine.webp"
    file.write_bytes(probe.as_bytes(images, CARD))
    data = probe.load(file)
    assert np.array_equal(data.images, images)
    assert data.card == CARD
    assert data.labels is None
    assert len(data) == 35
    assert [(part.shape[0], labels) for part, labels in data.batches(20)] == [
        (20, None),
        (15, None),
    ]
    assert data.describe() == (
        "measured on the probe set (35 synthetic images in place of CIFAR-10): std within 1.1 % of the test set's in "
        "the mean over layers (networks not used for it: 4.2 %), the worst of those that were tried"
    )
    provenance = data.provenance()
    assert provenance == {
        "path": str(file),
        "layout": "probe set",
        "sha256": sha256(file),
        "note": data.note,
    }
    assert (
        max(len(line) for line in data.note.splitlines()) < 85
    )  # what a figure of one column has room for


@pytest.mark.parametrize(
    ("digests", "words"),
    [
        (["better"], "0.4 %"),
        (["better", "made"], "1.1 %"),
        (["better held out"], "3.1 %"),
        (["better", "x"], "0.4 % (networks not used for it: 4.2 %)"),
        (["x"], "4.2 % (networks not used for it, the worst)"),
        (["x", "y"], "4.2 % (networks not used for it, the worst)"),
    ],
)
def test_the_note_quotes_the_errors_of_the_networks_that_are_drawn(digests, words, images):
    note = probe.Probe(images, None, CARD, Path("mine.webp")).note_for(digests)
    first, second = note.splitlines()
    assert first.endswith("(35 synthetic images in place of CIFAR-10): std within")
    assert second.replace(" of the test set's in the mean over layers", "") == words
    assert max(map(len, note.splitlines())) < 88  # a figure of one column has room for it


def test_the_note_of_the_shipped_networks():
    data = probe.load()
    for name in zoo.shipped():
        error = 100 * data.card["networks"][name]["mean"]
        assert f"\n{error:.1f} % of" in data.note_for([sha256(zoo.find(name))])


def test_a_part_says_so(images):
    data = probe.Probe(images, None, CARD, Path("mine.webp"))
    assert "measured on the probe set (5 of 35 synthetic images" in data.some(5).describe()


def test_the_shipped_one():
    data = probe.load()
    assert data.images.shape[1:] == (32, 32, 3)
    assert (data.images.dtype, data.labels) == (np.uint8, None)
    assert data.labels_known == "the probe set has no labels"
    assert probe.SHIPPED.stat().st_size <= 1.5e6
    assert {"count", "rounds", "seed", "versions"} <= data.card.keys()
    networks = data.card["networks"]
    shipped = {name: sha256(zoo.find(name)) for name in zoo.shipped()}
    assert {name: networks[name]["sha256"] for name in shipped} == shipped  # made anew with them
    for network in map(networks.get, shipped):
        assert network["made_with"]
        assert network["mean"] <= min(0.02, network["closed_form_mean"])
        assert network["largest"] < 0.09
    others = [network for network in networks.values() if not network["made_with"]]
    assert len(others) >= 6
    assert max(network["mean"] for network in others) <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain-20", "resnet-20"])
def test_its_images_have_the_errors_of_its_card(name, real_test):
    network = models.load(zoo.find(name))

    def measure(images):
        batches = map(network.preprocessing, np.array_split(images, 10))
        return analysis.measure(network.model, batches, network=name)["std"]

    data = probe.load()
    std, truth = measure(data.images), measure(real_test.images)
    card = data.card["networks"][name]
    assert (std / truth - 1).abs().mean() == pytest.approx(card["mean"], abs=1e-4)
    assert (std / truth - 1).abs().max() == pytest.approx(card["largest"], abs=1e-4)
    assert np.corrcoef(std, truth)[0, 1] == pytest.approx(card["r"], abs=1e-4)


COLUMNS = (
    *("mean", "largest", "r", "closed_form_mean", "closed_form_largest", "closed_form_r"),
    *("real_mean", "real_worst_mean", "real_r", "real_worst_r"),
)


def test_the_page_shows_the_errors_of_its_card():
    page = (ROOT / "docs" / "probe-set.md").read_text()
    rows = [line for line in page.splitlines() if re.match(r"\| [a-z]+-[0-9]", line)]
    networks = probe.load().card["networks"]
    for row, (label, network) in zip(rows, networks.items(), strict=True):
        percent = {key: not key.endswith("r") for key in COLUMNS}
        numbers = [
            f"{100 * network[key]:.1f}" if percent[key] else f"{network[key]:.3f}"
            for key in COLUMNS
        ]
        made_with = "yes" if network["made_with"] else "no"
        assert row == f"| {label} | {made_with} | {' | '.join(numbers)} |"


FILES = []  # the sound one: it is packed once, as that takes a second


def as_file(images):
    FILES[:] = FILES or [probe.as_bytes(images, CARD)]
    return FILES[0]


def file_of(images, card=CARD, size=None, **options):
    """The bytes of a probe set with something wrong in it."""
    content = BytesIO()
    with Image.open(BytesIO(as_file(images))) as sheet:
        exif = Image.Exif()
        exif[probe.CARD] = card if isinstance(card, str) else json.dumps(card)
        picture = sheet.resize(size or sheet.size)
        picture.save(content, **{"format": "WEBP", "exif": exif, **options})
    return content.getvalue()


DAMAGED = {
    "cut": lambda images: as_file(images)[:-1],
    "text": lambda images: b"images",
    "no card": lambda images: file_of(images, exif=Image.Exif()),
    "broken card": lambda images: file_of(images, "{"),
    "empty card": lambda images: file_of(images, {}),
    "a list": lambda images: file_of(images, []),
    "a card without networks": lambda images: file_of(images, CARD | {"networks": {}}),
    "too many": lambda images: file_of(images, CARD | {"count": 61}),
    "none": lambda images: file_of(images, CARD | {"count": 0}),
    "another format": lambda images: file_of(images, format="PNG"),
    "another height": lambda images: file_of(images, size=(960, 31)),
    "another width": lambda images: file_of(images, size=(480, 32)),
}


@pytest.mark.parametrize("make", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_refused(make, images, tmp_path):
    (tmp_path / "mine.webp").write_bytes(make(images))
    with pytest.raises(ValueError, match=r"mine.webp: no probe set, or a damaged one \("):
        probe.load(tmp_path / "mine.webp")


def test_a_missing_file(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"mine.webp: no such file; python -m analysis.probe"
    ):
        probe.load(tmp_path / "mine.webp")
