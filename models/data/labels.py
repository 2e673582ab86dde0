"""Which class a folder of images stands for."""

from __future__ import annotations

import re
from collections.abc import Collection

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
ALIASES = {"plane": "airplane", "aeroplane": "airplane", "car": "automobile", "auto": "automobile"}
IMAGENET = 1000  # classes


def label_folders(names: Collection[str], classes: int = 0) -> tuple[dict[str, int], str]:
    """Return the label of every class folder, or no labels and the reason.

    The position among the folders that happen to be there is not a label: it is only known if the
    whole set of classes is.

    names: of the folders.
    classes: 10 if the images are known to be CIFAR-10's; 0 if the folders must tell.

    >>> label_folders(["cat", "Car", "planes"], classes=10)[0]
    {'cat': 3, 'Car': 1, 'planes': 0}
    """
    words = {name: name.lower().removesuffix("s") for name in names}
    words = {name: ALIASES.get(word, word) for name, word in words.items()}
    found = set(words.values())
    if found <= set(CLASSES) and (classes or found == set(CLASSES)):
        return {name: CLASSES.index(word) for name, word in words.items()}, ""
    if all(name.isdecimal() for name in names):
        numbers = {name: int(name) for name in names}
        if set(numbers.values()) <= set(range(classes or len(set(numbers.values())))):
            return numbers, ""
        end = f"from 0 to {classes - 1}" if classes else "from 0 on without a gap"
        return {}, f"the class folders are not numbered {end}"
    if all(re.fullmatch(r"n\d{8}", name) for name in names):
        if len(names) == IMAGENET:
            return {name: label for label, name in enumerate(sorted(names))}, ""
        return {}, f"there are {len(names):,} of ImageNet's {IMAGENET:,} class folders"
    unknown = min([name for name in names if words[name] not in CLASSES] or names)
    return {}, f"the class of the folder {unknown!r} is not known"
