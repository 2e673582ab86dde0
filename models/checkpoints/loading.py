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
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as serialise
from torch import Tensor, nn

from models import zoo
from models.checkpoints.architectures import UnknownNetwork, candidates_for, mismatches
from models.checkpoints.formats import EXPECTED, Unreadable, materialise, parse
from models.checkpoints.recognition import (
    FAR,
    FITS,
    GOOD,
    Match,
    NothingRecorded,
    label,
    match_network,
    match_preprocessing,
    stem_variance,
)
from models.checkpoints.state_dicts import (
    at_root,
    check_plain,
    check_tensors,
    choose_weights,
    rename,
)
from models.data.preprocessing import (
    PADDINGS,
    PER_PIXEL,
    PRESETS,
    Preprocessing,
    mean_image,
    per_pixel,
    preset,
)
from models.files import replacing
from models.resnet import OPTIONS, SIZES, Config, ResNet, config_of

MEAN, STD = "preprocessing.mean", "preprocessing.std"  # tensors in our own files
CARD = {**OPTIONS, "preprocessing": (*PRESETS, PER_PIXEL), "crop_padding": PADDINGS}
OURS = {*CARD, "network", "depth", "classes", "training"}  # what a card of ours speaks of
CLASSES = 10  # of CIFAR-10
MOST_ITERATIONS = 10**9


class Known(StrEnum):
    """How something about a checkpoint is known."""

    GIVEN = "given"
    CARD = "card"
    SHORTCUTS = "shortcuts"
    RECOGNISED = "recognised"
    ASSUMED = "assumed"
    BUILT = "built by --model"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Checkpoint:
    """A network made from a file.

    model: in evaluation mode; None if it is none of ours and need not be.
    state: the tensors of the file by name.
    preprocessing: None if it is not known.
    crop_padding: how training images were padded, if known.
    warnings: what does not fit, in words.
    card: what the file says of itself.
    digest: SHA-256 of the file.
    weights_note: which copy of the weights this is, and which others the file holds.
    kind_known, preprocessing_known: how these are known. kind_fit, preprocessing_fit: how well they
    fit the images, if there were any to check them.
    """

    model: nn.Module | None
    state: dict[str, Tensor]
    preprocessing: Preprocessing | None
    crop_padding: str | None
    warnings: list[str]
    card: dict[str, Any]
    path: Path
    digest: str
    weights_note: str
    kind_known: Known
    preprocessing_known: Known
    kind_fit: Match[nn.Module] | None = None
    preprocessing_fit: Match[tuple[Preprocessing, str]] | None = None

    @property
    def config(self) -> Config | None:
        """Return which of our networks it is, if it is one."""
        return None if self.model is None else config_of(self.model)

    @property
    def iterations(self) -> int | None:
        """Return for how many iterations it was trained, if its card says it."""
        training = self.card.get("training")
        if not isinstance(training, dict):
            return None
        count = training.get("iteration", training.get("iterations"))
        return count if type(count) is int and 0 <= count <= MOST_ITERATIONS else None

    def how_kind(self) -> str:
        """Return how the kind is known, such as `card` or `recognised, misfit 0.01, ...`."""
        config = self.config
        if self.kind_known is Known.ASSUMED and config and has_open_stride(config):
            tells = "neither the tensors nor these images tell" if self.kind_fit else (
                "the tensors do not say; --data tells"
            )
            return f"assumed v1.5, stride on the {config.stride}: {tells}"
        return describe(self.kind_known, None if self.kind_known is Known.CARD else self.kind_fit)

    def how_preprocessing(self) -> str:
        """Return how the preprocessing is known, such as `card, misfit 0.03`."""
        return describe(self.preprocessing_known, self.preprocessing_fit)


def describe(known: Known, fit: Match[Any] | None) -> str:
    return f"{known}, {fit.describe()}" if fit and known is not Known.ASSUMED else str(known)


def has_open_stride(config: Config) -> bool:
    """Return whether the tensors leave open which convolution of a bottleneck has the stride."""
    return config.images == "imagenet" and config.shortcut in "BC"


@dataclass(frozen=True)
class CheckpointFile:
    """A file that was read: its tensors, which own their memory, its card, its SHA-256."""

    path: Path
    digest: str
    tensors: dict[str, Tensor]
    card: dict[str, Any]
    weights_note: str

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
            given = parse_normalize(normalize)
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


def recognise(
    checkpoint: Checkpoint,
    models: list[nn.Module],
    normalisations: list[Preprocessing],
    images: np.ndarray,
) -> Checkpoint:
    """Return the checkpoint with that of the candidates which fits images (N, 32, 32, 3)."""
    candidates = normalisations or [*PRESETS.values(), per_pixel(mean_image(images))]
    paddings = (checkpoint.crop_padding,) if checkpoint.crop_padding else PADDINGS
    try:
        inputs = match_preprocessing(models[0], images, candidates, paddings)
    except NothingRecorded:
        if not normalisations:
            raise
        return checkpoint
    preprocessing, padding = inputs.best
    known, warnings = checkpoint.kind_known, list[str]()
    first = [m for m in models if getattr(config_of(m), "shortcut", "") != "pool"] or models
    tried = models[:1] if known is Known.CARD else first
    network = match_network(tried, images, preprocessing, padding)
    if known is Known.CARD and not network.fits and len(models) > 1:
        others = match_network(first, images, preprocessing, padding)
        if others.best is not models[0] and others.clear:
            warnings.append(
                f"its card says {label(models[0])}, and the images show {label(others.best)}, which "
                f"is taken: {others.describe()}; as the card says {network.misfit:.2f}"
            )
            network, known = others, Known.RECOGNISED
    elif known is not Known.CARD and network.misfit >= GOOD / 2 and len(first) < len(models):
        network = match_network(models, images, preprocessing, padding)
    if known is Known.ASSUMED:
        known = Known.RECOGNISED
    source = checkpoint.preprocessing_known
    checkpoint = replace(
        checkpoint,
        model=network.best,
        preprocessing=preprocessing,
        crop_padding=padding,
        kind_known=known,
        kind_fit=network,
        preprocessing_known=Known.RECOGNISED if source is Known.UNKNOWN else source,
        preprocessing_fit=inputs,
    )
    return replace(checkpoint, warnings=warnings + doubts(checkpoint))


def doubts(checkpoint: Checkpoint) -> list[str]:
    """Return what does not fit, in words, for a checkpoint that was recognised by images."""
    warnings = []
    fits = {"kind": checkpoint.kind_fit, "preprocessing": checkpoint.preprocessing_fit}
    for what, match in fits.items():
        if match is None or (what == "kind" and checkpoint.kind_known is Known.CARD):
            continue
        if not match.fits:
            warnings.append(f"no {what} fits (with a misfit below {FITS}): {match.describe()}")
        elif not match.good:
            warnings.append(
                f"the {what} fits roughly, so it may be another one: {match.describe()}, and the "
                f"right one has below {GOOD}"
            )
    rough = [match for match in fits.values() if match is not None and not match.fits]
    if warnings and rough == [checkpoint.kind_fit] and rough[0].clear and rough[0].others:
        warnings.append(
            "BN's statistics are not those of these images: few images may make most of the variance"
        )
    elif warnings and rough:
        warnings.append(
            "the images, the preprocessing or the network are not those of the training"
        )
    config = checkpoint.config
    if config is not None and config.classes != CLASSES:
        warnings.append(
            f"it tells {config.classes} classes apart, and these images have {CLASSES}: it was trained "
            "on others, and its accuracy means nothing"
        )
    return warnings


def recognise_large(
    checkpoint: Checkpoint, models: list[nn.Module], images: np.ndarray
) -> Checkpoint:
    """Return the checkpoint with that network which fits images (N, H, W, 3) clearly best.

    ImageNet's training images are crops of random sizes, and there are few images here: the size of
    a misfit tells nothing, and neither does a small difference.
    """
    preprocessing = checkpoint.preprocessing or PRESETS["imagenet"]
    model, known, match, warnings = models[0], checkpoint.kind_known, None, list[str]()
    if len(models) > 1 and known is not Known.CARD:
        match = match_network(models, images, preprocessing, "none")
        if match.clear:
            model = match.best
            known = Known.RECOGNISED if known is Known.ASSUMED else known
        else:
            warnings.append(
                f"BN's statistics do not tell which network it is: {label(match.best)}, "
                f"{match.describe()}; taken for {label(model)}; --model builds the other"
            )
    times = stem_variance(model, images, preprocessing)
    if not 1 / FAR < times < FAR:
        warnings.append(
            f"the first BN gets {times:.2g} times the variance that it recorded: in training images "
            "were others, or normalised otherwise (--normalize)"
        )
    source = checkpoint.preprocessing_known
    return replace(
        checkpoint,
        model=model,
        preprocessing=preprocessing,
        preprocessing_known=Known.ASSUMED if source is Known.UNKNOWN else source,
        kind_known=known,
        kind_fit=match,
        warnings=warnings,
    )


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
    return CheckpointFile(path, hashlib.sha256(data).hexdigest(), tensors, card, chosen.note)


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
    named = {re.sub(r"\W", "", name): name for name in zoo.shipped()}
    name = named.get(re.sub(r"[\W_]", "", str(path)).lower())
    if name is not None and not Path(path).exists():
        path = zoo.find(name)
    file = read(path, weights=weights, ema=ema)
    options: dict[str, Any] = {"kind": kind, "normalize": normalize, "need_model": need_model}
    return file.candidates(model=model, **options).choose(images)


def save(
    path: str | Path,
    model: ResNet,
    preprocessing: Preprocessing,
    *,
    crop_padding: str,
    training: dict[str, Any],
) -> None:
    """Write a network with its preprocessing and its card as .safetensors, whole or not at all.

    crop_padding: how training images were padded, `black`, `zero` or `none`.
    training: what else the card shall say (recipe, seed, test error, ...), as JSON can hold it.
    """
    tensors = {name: x.detach().cpu().contiguous() for name, x in model.state_dict().items()}
    tensors |= {MEAN: preprocessing.mean.contiguous(), STD: preprocessing.std.contiguous()}
    card = {"network": model.config.name, **asdict(model.config)}
    card |= {"preprocessing": preprocessing.name, "crop_padding": crop_padding, "training": training}
    text = json.dumps(card)
    with replacing(path) as temporary:
        # not save_file, which has temporary files of its own that a killed process would leave
        metadata = {"card": text, "sha256": digest_of(text, tensors)}
        temporary.write_bytes(serialise(tensors, metadata=metadata))


def digest_of(card: str, tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of a card and of tensors with their names, dtypes and shapes."""
    digest = hashlib.sha256(card.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_card(metadata: dict[str, str], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return what our own files say of themselves; nothing of other files' metadata.

    Raises ValueError if a file of ours is damaged, as far as its digest or its card shows it.
    """
    text = metadata.get("card", "{}")
    if "sha256" in metadata and MEAN in tensors and metadata["sha256"] != digest_of(text, tensors):
        raise Unreadable("damaged: its tensors or its card are not those that were saved")
    try:
        card = json.loads(text)
        json.dumps(card, allow_nan=False)
    except (ValueError, RecursionError) as error:
        if MEAN in tensors:
            raise Unreadable("damaged: its card cannot be read") from error
        return {}
    return card if isinstance(card, dict) and OURS & card.keys() else {}


def check_card(card: dict[str, Any]) -> None:
    """Raise ValueError if a card says what none of ours does."""
    for key, known in CARD.items():
        if card.get(key) is not None and card[key] not in known:
            raise ValueError(
                f"its card says {key} {str(card[key])[:80]!r}, which is none of {', '.join(known)}"
            )


def stored_preprocessing(tensors: dict[str, Tensor], card: dict[str, Any]) -> Preprocessing | None:
    """Return the preprocessing that a file holds, if it holds one. ValueError if it is impossible."""
    if MEAN not in tensors or STD not in tensors:
        return None
    mean, std = tensors[MEAN], tensors[STD]
    if not all(x.is_floating_point() and x.isfinite().all() for x in (mean, std)):
        raise ValueError("NaN or infinity in the preprocessing: the file is damaged")
    return Preprocessing(card.get("preprocessing") or PER_PIXEL, mean.float(), std.float())


def parse_normalize(text: str | None) -> Preprocessing | str | None:
    """Return the preprocessing that a name or numbers mean; the name itself if it is `per-pixel`."""
    if text is None or text == PER_PIXEL:
        return text
    if text in PRESETS:
        return PRESETS[text]
    number = r"-?\d+(?:\.\d+)?"
    if re.fullmatch(rf"{number}(,{number}){{2}}/{number}(,{number}){{2}}", text):
        mean, std = (tuple(map(float, part.split(","))) for part in text.split("/"))
        return preset(text, mean, std)  # type: ignore[arg-type]
    raise ValueError(
        f"unknown preprocessing {text!r}: one of {', '.join([*PRESETS, PER_PIXEL])}, or numbers "
        "MEAN,MEAN,MEAN/STD,STD,STD"
    )


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
