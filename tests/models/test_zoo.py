"""What is shipped: the files, their cards, and what the documentation says of them."""

import pytest
import torch

from models import zoo
from models.checkpoints import loading
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "reproduction.md").read_text()
SHIPPED = zoo.shipped()


def test_the_networks_of_fig_7_are_shipped():
    assert SHIPPED == ["plain-20", "plain-56", "resnet-20", "resnet-56", "resnet-110"]


def test_a_network_that_is_not_shipped():
    with pytest.raises(ValueError, match="resnet-32 is not shipped; shipped: plain-20, "):
        zoo.find("resnet-32")


def test_they_are_small():
    assert sum(zoo.find(name).stat().st_size for name in SHIPPED) < 25e6


@pytest.mark.parametrize("name", SHIPPED)
def test_a_card_says_how_the_network_was_trained(name):
    checkpoint = loading.load(zoo.find(name))
    card, training = checkpoint.card, checkpoint.card["training"]
    assert (card["network"], checkpoint.model.config.name) == (name, name)
    assert (checkpoint.how_kind(), checkpoint.how_preprocessing()) == ("card", "card")
    assert checkpoint.preprocessing.name == "per-pixel"
    assert training["decay"] == "weights"
    assert 0 < training["iteration"] <= training["iterations"]
    assert training["bn_statistics"] == "one batch of 10,000 augmented training images"
    facts = {"recipe", "seed", "device_name", "precision", "versions", "seconds", "images_per_s"}
    assert facts <= set(training)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_documentation_has_the_card(name):
    training = loading.load(zoo.find(name)).card["training"]
    length = f"{training['iteration']:,}"
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| {name} | {length} |"))
    assert f"| {training['test_error']:.2f} (" in row


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.slow
def test_the_test_error_is_the_cards(name, real_test):
    """On the first 1,000 of the images, within three standard errors; all of them are measured by
    the main job.
    """
    checkpoint = loading.load(zoo.find(name))
    with torch.no_grad():
        x = checkpoint.preprocessing(real_test.images[:1000])
        wrong = (checkpoint.model(x).argmax(1).numpy() != real_test.labels[:1000]).mean()
    error = checkpoint.card["training"]["test_error"] / 100
    assert wrong == pytest.approx(error, abs=3 * (error * (1 - error) / 1000) ** 0.5)
