"""Load checkpoint files: read once, narrow down what the network can be, choose by the images.

    from models.checkpoints.loading import read
    candidates = read("resnet20-12fca82f.th").candidates()
    checkpoint = candidates.choose(cifar10.load().images)
    checkpoint.model(checkpoint.preprocessing(images))  # logits (N, 10)

Depth, classes, the kind of blocks and shortcuts with weights show in the tensors. The kind (residual
networks with option A and plain ones have the same tensors), the stride of bottlenecks and the
preprocessing come from the caller or the file's card, or they are recognised by the images. What a
card says is checked by the images, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from models import zoo
from models.checkpoints.architectures import UnknownNetwork, candidates_for, mismatches
from models.checkpoints.cards import (
    MEAN,
    STD,
    check_card,
    read_card,
    save,
    stored_preprocessing,
)
from models.checkpoints.choosing import (
    Checkpoint,
    Known,
    has_open_stride,
    recognise,
    recognise_large,
)
from models.checkpoints.formats import EXPECTED, materialise, parse
from models.checkpoints.pickles import Unreadable
from models.checkpoints.state_dicts import (
    at_root,
    check_plain,
    check_tensors,
    choose_weights,
    rename,
)
from models.data.preprocessing import (
    PER_PIXEL,
    Preprocessing,
    mean_image,
    parse_normalize,
    per_pixel,
)
from models.resnet import OPTIONS, SIZES, ResNet, config_of

PROGRESS = ("step", "global_step", "iteration", "epoch")  # the finest first
__all__ = [
    "Candidates",
    "Checkpoint",
    "CheckpointFile",
    "Known",
    "load",
    "read",
    "save",
]


@dataclass(frozen=True)
class CheckpointFile:
    """A file that was read: its tensors, which own their memory, its card, its SHA-256.

    progress: whole numbers that training scripts keep beside the weights, such as `global_step`.
    """

    path: Path
    digest: str
    tensors: dict[str, Tensor]
    card: dict[str, Any]
    weights_note: str
    progress: dict[str, int]

    def candidates(
        self,
        *,
        kind: str | None = None,
        normalize: str | None = None,
        model: nn.Module | None = None,
        need_model: bool = True,
    ) -> Candidates:
        """Return what the network and its preprocessing can be.

        kind: `residual` or `plain`, and normalize: a name of `PRESETS`, `per-pixel` or numbers
        MEAN,MEAN,MEAN/STD,STD,STD, win over the card.
        model: a network that takes the tensors, if it is none of ours.
        need_model: raise if the network is none of ours.
        Raises ValueError, with the path, if the tensors are those of another network or impossible.
        """
        try:
            check_card(self.card)
            state = {name: x for name, x in self.tensors.items() if name not in (MEAN, STD)}
            models, renamed = self.find_models(state, kind, model, need_model)
            given = None if normalize is None else parse_normalize(normalize)
            stored = stored_preprocessing(self.tensors, self.card)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        known = Known.BUILT if model is not None else Known.UNKNOWN
        if models and model is None:
            known = self.how_known(models, kind)
        if given == PER_PIXEL and stored is not None and stored.name == PER_PIXEL:
            given = stored
        return Candidates(self, renamed, models, known, given, stored)

    def how_known(self, models: list[nn.Module], kind: str | None) -> Known:
        """Return how the first of the networks that a file can be is known to be the one."""
        config = config_of(models[0])
        if len(models) > 1 and config is not None and has_open_stride(config):
            return Known.ASSUMED
        if kind or self.card.get("kind"):
            return Known.GIVEN if kind else Known.CARD
        return Known.SHORTCUTS if len(models) == 1 else Known.ASSUMED

    def find_models(
        self, state: dict[str, Tensor], kind: str | None, model: nn.Module | None, needed: bool
    ) -> tuple[list[nn.Module], dict[str, Tensor]]:
        """Return the networks that this can be, the likeliest first, and the tensors of theirs."""
        if model is not None:
            return [adopt(model, state)], state
        try:
            found = candidates_for(rename(at_root(state)), self.card)
        except UnknownNetwork:
            if needed:
                raise
            check_tensors(state)
            return [], state
        said = {key: self.card[key] for key in OPTIONS if self.card.get(key) is not None}
        wanted = kind or said.get("kind")
        if wanted == "plain" and all(network.config.kind != wanted for network in found):
            raise ValueError(
                "it has shortcuts with weights (downsample), so it is residual, not plain"
            )
        for what in ("depth", "classes"):
            holds = getattr(found[0].config, what)
            if self.card.get(what) not in (None, holds):
                raise ValueError(f"its card says another {what} than {holds}, as its tensors have")
        if kind:
            found = [network for network in found if network.config.kind == kind]

        def distance(network: ResNet) -> tuple[bool, int]:
            config = asdict(network.config)
            return config["kind"] != wanted, sum(config[key] != said[key] for key in said)

        found.sort(key=distance if wanted else lambda network: (False, 0))
        return list(found), at_root(state)


@dataclass(frozen=True)
class Candidates:
    """What a file's network and preprocessing can be.

    models: the likeliest first; none if it is none of ours. kind_known: how the first one is known.
    given: the preprocessing that the caller named, or `per-pixel` for the mean of the images.
    stored: the preprocessing in the file, if any.
    """

    file: CheckpointFile
    state: dict[str, Tensor]
    models: list[nn.Module]
    kind_known: Known
    given: Preprocessing | str | None
    stored: Preprocessing | None

    @property
    def side(self) -> int | None:
        """Height and width in pixels of the images that the network takes, if it is one of ours."""
        config = config_of(self.models[0]) if self.models else None
        return None if config is None else SIZES[config.images]

    def choose(
        self, images: np.ndarray | None = None, *, likely_kind: str | None = None
    ) -> Checkpoint:
        """Return the checkpoint: what fits the images, or else the likeliest.

        images: (N, 32, 32, 3) or (N, 224, 224, 3), uint8. All that is known is checked by them.
        likely_kind: the kind to take if nothing else tells.
        """
        try:
            return self.choose_by(images, likely_kind)
        except ValueError as error:
            raise ValueError(f"{self.file.path}: {error}") from error

    def choose_by(self, images: np.ndarray | None, likely_kind: str | None) -> Checkpoint:
        models, known = self.models, self.kind_known
        likely = [m for m in models if getattr(config_of(m), "kind", None) == likely_kind]
        if known is Known.ASSUMED and likely:
            models = likely + [m for m in models if m not in likely]
            if images is None and config_of(models[0]) != config_of(self.models[0]):
                known = Known.GIVEN
        normalisations = self.normalisations(images)
        source = Known.GIVEN if self.given else Known.CARD
        checkpoint = Checkpoint(
            models[0] if models else None,
            self.state,
            normalisations[0] if normalisations else None,
            self.file.card.get("crop_padding"),
            [],
            self.file.card,
            self.file.path,
            self.file.digest,
            self.file.weights_note,
            known,
            source if normalisations else Known.UNKNOWN,
        )
        if images is None or not models:
            return checkpoint
        if images.shape[1:3] != (SIZES["cifar"],) * 2:
            return recognise_large(checkpoint, models, images)
        return recognise(checkpoint, models, normalisations, images)

    def normalisations(self, images: np.ndarray | None) -> list[Preprocessing]:
        """Return the preprocessing that is given, or else stored in the file, as a list."""
        if self.given != PER_PIXEL:
            found = self.given or self.stored
            return [found] if isinstance(found, Preprocessing) else []
        if images is not None and images.shape[1] != SIZES["cifar"]:
            raise ValueError(
                f"{PER_PIXEL} preprocessing is for 32x32 images: --normalize imagenet, or another"
            )
        return [per_pixel(mean_image(images))] if images is not None else []


@contextmanager
def gate(path: Path) -> Iterator[None]:
    """Make one ValueError of whatever raises while a stranger's bytes are read."""
    try:
        yield
    except MemoryError:
        raise
    except Unreadable as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:
        words = f"not a checkpoint, damaged or truncated; {EXPECTED}"
        raise ValueError(f"{path}: {words}") from error


def read(path: str | Path, *, weights: str | None = None, ema: bool = False) -> CheckpointFile:
    """Read a checkpoint file, once and without running code from it.

    weights: which copy of the weights to take, by its name in the file.
    ema: take the average of the weights.
    Raises FileNotFoundError or ValueError, with the path, if there is no such file, if it is not a
    checkpoint, or if it holds no such copy.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {EXPECTED}")
    data = path.read_bytes()
    with gate(path):
        content = parse(data, path.suffix)
        chosen = choose_weights(content.tree, weights, ema)
        tensors = materialise(chosen.tensors, content, len(data))
        check_plain(tensors)
        card = read_card(content.metadata, tensors)
        progress = progress_in(content.tree)
    digest = hashlib.sha256(data).hexdigest()
    return CheckpointFile(path, digest, tensors, card, chosen.note, progress)


def progress_in(tree: Any) -> dict[str, int]:
    """Return how far a training was, as far as its script keeps it beside the weights."""
    found = {key: tree.get(key) for key in PROGRESS} if isinstance(tree, dict) else {}
    return {key: value for key, value in found.items() if type(value) is int and value >= 0}


def load(
    path: str | Path,
    *,
    kind: str | None = None,
    normalize: str | None = None,
    images: np.ndarray | None = None,
    model: nn.Module | None = None,
    weights: str | None = None,
    ema: bool = False,
    need_model: bool = True,
) -> Checkpoint:
    """Make a network of a checkpoint file, or of a shipped network's name if there is no such file.

    The options are those of `read`, `CheckpointFile.candidates` and `Candidates.choose`.

    >>> checkpoint = load("resnet-20")
    >>> checkpoint.config.name, checkpoint.preprocessing.name, checkpoint.how_kind()
    ('resnet-20', 'per-pixel', 'card')
    """
    if not Path(path).exists() and (name := zoo.spelling(str(path))):
        path = zoo.find(name)
    file = read(path, weights=weights, ema=ema)
    options: dict[str, Any] = {"kind": kind, "normalize": normalize, "need_model": need_model}
    return file.candidates(model=model, **options).choose(images)


def adopt(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Return the user's network with the tensors of a state dict, in evaluation mode.

    Raises ValueError unless all match.
    """
    candidates = [state]
    while prefix := common_prefix(candidates[-1]):
        candidates.append({name.removeprefix(prefix): x for name, x in candidates[-1].items()})
    candidates.append(at_root(state))
    fitting = [candidate for candidate in candidates if not mismatches(model, candidate)]
    if not fitting:
        faults = mismatches(model, candidates[-1])
        raise ValueError(f"the tensors are not those of the network that --model builds: {faults}")
    check_tensors(fitting[0])
    model.load_state_dict(fitting[0], strict=False)
    if not any(parameter.is_meta for parameter in model.parameters()):
        model.cpu()  # as the images are
    return model.eval()


def common_prefix(state: dict[str, Tensor]) -> str:
    """Return the first part of all names, with its dot, or nothing if they do not begin alike."""
    firsts = {name.partition(".")[0] + name.partition(".")[1] for name in state}
    return firsts.pop() if len(firsts) == 1 and "." in min(firsts) else ""
