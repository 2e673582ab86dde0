"""The trained networks that are shipped: one .safetensors file each, with a card of how it was
trained.

    import models
    from models import zoo
    checkpoint = models.load(zoo.find("resnet-56"))
    checkpoint.card["training"]["test_error"]  # in %

They were made by `python -m models.train`; the README has their cards as a table.
"""

from __future__ import annotations

from pathlib import Path


def shipped() -> list[str]:
    """The names of the networks that are shipped: plain before residual, shallow before deep, as in
    the paper.
    """
    names = [path.stem for path in Path(__file__).parent.glob("*.safetensors")]
    return sorted(names, key=lambda name: (name.split("-")[0], int(name.rsplit("-", 1)[1])))


def find(name: str) -> Path:
    """The file of a shipped network. ValueError, naming those that are shipped, where it is not
    among them.
    """
    names = shipped()
    if name not in names:
        raise ValueError(f"{name} is not shipped; shipped: {', '.join(names) or 'none'}")
    return Path(__file__).parent / f"{name}.safetensors"
