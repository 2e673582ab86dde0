import json
import re
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

import analysis
import models
from analysis.probe import COLUMNS
from models import zoo
from models.data import probe
from models.files import sha256
from tests.test_project import README

CARD = {
    "count": 35,
    "networks": {
        "a": {"made_with": True, "mean": 0.011},
        "b": {"made_with": True, "mean": 0.004},
        "c": {"made_with": False, "mean": 0.042},
        "d": {"made_with": False, "mean": 0.031},
    },
}


@pytest.fixture
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
    assert [(part.shape[0], labels) for part, labels in data.batches(20)] == [(20, None), (15, None)]
    assert data.describe() == (
        "measured on the probe set (35 synthetic images in place of CIFAR-10): std within 1.1 % of the test set's in "
        "the mean over layers (networks not used for it: 4.2 %), the worst of those that were tried"
    )
    provenance = data.provenance()
    assert provenance == {"path": str(file), "layout": "probe set", "sha256": sha256(file), "note": data.note}
    assert max(len(line) for line in data.note.splitlines()) < 85  # what a figure of one column has room for


def test_the_shipped_one():
    data = probe.load()
    assert data.images.shape[1:] == (32, 32, 3)
    assert data.images.dtype == np.uint8
    assert probe.SHIPPED.stat().st_size <= 1.5e6
    networks = data.card["networks"]
    shipped = {name: sha256(zoo.find(name)) for name in zoo.shipped()}
    assert {name: networks[name]["sha256"] for name in shipped} == shipped  # measured again when they are replaced
    for name in shipped:
        assert networks[name]["made_with"]
        assert networks[name]["mean"] <= 0.02
        assert networks[name]["mean"] < networks[name]["closed_form_mean"]
    assert [name for name in shipped if networks[name]["largest"] > 0.08] == ["resnet-110"]  # models/PROBE.md says why
    assert networks["resnet-110"]["largest"] < 0.09
    others = {name: network for name, network in networks.items() if not network["made_with"]}
    assert len(others) >= 6
    assert max(network["mean"] for network in others.values()) <= 0.05
    far = {name for name, network in others.items() if network["r"] < 0.97}
    assert far == {"resnet-44-1000-e", "resnet-56-1000"}  # models/PROBE.md says so, and what follows
    assert {name for name, network in others.items() if network["mean"] >= network["closed_form_mean"]} == {
        "resnet-56-1000",
        "plain-56-1000",
    }
    for network in (others[name] for name in far):
        assert network["real_r"] < 0.97  # nor do as many real images do better
        assert network["mean"] < network["real_worst_mean"]
        assert network["r"] > network["real_worst_r"]
    assert {"count", "rounds", "seed", "versions"} <= data.card.keys()


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


def test_the_page_shows_its_errors_and_the_readme_some():
    page = (probe.SHIPPED.parent / "PROBE.md").read_text()
    networks = probe.load().card["networks"]
    rows = [line for line in page.splitlines() if re.match(r"\| [a-z]+-[0-9]", line)]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == list(networks)
    section = README[README.index("## Without CIFAR-10") : README.index("## Comparing networks")]
    shown = [line for line in section.splitlines() if re.match(r"\| [a-z]+-[0-9]", line)]
    assert set(shown) <= set(rows)
    assert {row.split(" | ")[0].removeprefix("| ") for row in shown} >= {
        *zoo.shipped(),
        "resnet-44-1000-e",
        "resnet-56-1000",
    }
    for row, (label, network) in zip(rows, networks.items(), strict=True):
        made_with = "yes" if network["made_with"] else "no"
        numbers = [
            f"{100 * network[key]:.1f}" if name.endswith("%") else f"{network[key]:.3f}"
            for key, name in COLUMNS.items()
        ]
        assert row == f"| {label} | {made_with} | {' | '.join(numbers)} |"


def write(path, images, card=CARD, size=None, **options):
    """A probe set, but for what is asked for."""
    with Image.open(BytesIO(probe.as_bytes(images, CARD))) as sheet:
        exif = Image.Exif()
        if card is not None:
            exif[probe.CARD] = card if isinstance(card, str) else json.dumps(card)
        sheet.resize(size or sheet.size).save(path, **{"format": "WEBP", "exif": exif, **options})


def missing(path, images):
    return path


def cut(path, images):
    path.write_bytes(probe.as_bytes(images, CARD)[:-1])


def text(path, images):
    path.write_text("images")


def no_card(path, images):
    write(path, images, card=None)


def broken_card(path, images):
    write(path, images, card="{")


def empty_card(path, images):
    write(path, images, card={})


def a_list(path, images):
    write(path, images, card=[])


def too_many(path, images):
    write(path, images, card=CARD | {"count": 61})


def none_at_all(path, images):
    write(path, images, card=CARD | {"count": 0})


def other_format(path, images):
    write(path, images, format="PNG")


def other_size(path, images):
    write(path, images, size=(960, 31))


def other_width(path, images):
    write(path, images, size=(480, 32))


@pytest.mark.parametrize(
    "make",
    [missing, cut, text, no_card, broken_card, empty_card, a_list, too_many, none_at_all, other_format, other_size,
     other_width],
)
def test_a_bad_file_is_refused(make, images, tmp_path):
    file = tmp_path / "mine.webp"
    make(file, images)
    with pytest.raises((ValueError, FileNotFoundError), match=r"mine.webp: no (such file|probe set)"):
        probe.load(file)
