"""The trained networks that are shipped: one .safetensors file each, with a card of its training.

    import models
    checkpoint = models.load("resnet-56")
    checkpoint.card["training"]["test_error"]  # in %

`python -m models.train` made them; docs/reproduction.md has their cards as a table.
"""

from __future__ import annotations

import re
from pathlib import Path


def shipped() -> list[str]:
    """Return the names of the shipped networks: plain before residual, shallow before deep."""
    names = [path.stem for path in Path(__file__).parent.glob("*.safetensors")]
    return sorted(names, key=lambda name: (name.split("-")[0], int(name.rsplit("-", 1)[1])))


def spelling(name: str) -> str | None:
    """Return the name of the shipped network that is meant, if there is one.

    >>> spelling("ResNet20"), spelling("resnet_56"), spelling("resnet-21")
    ('resnet-20', 'resnet-56', None)
    """
    found = re.fullmatch(r"(resnet|plain)[-_ ]?([0-9]+)", name.lower())
    meant = f"{found[1]}-{found[2]}" if found else ""
    return meant if meant in shipped() else None


def find(name: str) -> Path:
    """Return the file of a shipped network. Raise ValueError, with the shipped names, for others."""
    meant = spelling(name)
    if meant is None:
        raise ValueError(f"{name} is not shipped; shipped: {', '.join(shipped()) or 'none'}")
    return Path(__file__).parent / f"{meant}.safetensors"
