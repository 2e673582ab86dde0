"""Which convolution feeds which BN, and the hooks that feed the moments.

    import analysis
    frame = analysis.measure(model, batches)  # batches: image tensors, or (images, labels)

A pair is proven by data flow: BN's input IS the convolution's output, unchanged since. Each response is reduced inside
the hook, before an in-place ReLU can overwrite it; nothing is stored.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from analysis.frame import make_frame
from analysis.moments import Moments

Batch = Tensor | tuple[Tensor, Tensor] | list[Tensor]
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Layer:
    """One call of a convolution and its BN: qualified names, the shape of a response, and its moments so far."""

    name: str
    norm: str
    height: int
    width: int
    moments: Moments


@dataclass
class Recording:
    """The layers of a network in forward order, as they were met in the passes so far."""

    layers: list[Layer] = field(default_factory=list)
    batch: int = 0  # passes finished
    position: int = 0  # layers met in this pass
    seen: dict[str, None] = field(default_factory=dict)  # modules met, for messages

    def add(self, name: str, norm: str, response: Tensor) -> None:
        """Take in the response (N, C, H, W) of the next layer of this pass."""
        moments = Moments.of(response)
        if not (torch.isfinite(moments.mean).all() and torch.isfinite(moments.m2).all()):
            raise ValueError(
                f"NaN or infinity in the response of layer {self.position + 1} ({name}) in batch {self.batch + 1}: "
                "look at the weights and at the images"
            )
        if self.batch == 0:
            self.layers.append(Layer(name, norm, response.shape[2], response.shape[3], moments))
        else:
            layer = self.layers[self.position] if self.position < len(self.layers) else None
            if layer is None or (layer.name, layer.norm) != (name, norm):
                raise ValueError(
                    f"batch {self.batch + 1} takes another path through the network than the first: {name}"
                )
            layer.moments = layer.moments.merge(moments)
        self.position += 1

    def end_pass(self) -> None:
        """A forward pass is over."""
        if not self.layers:
            raise ValueError(
                "no 3x3 convolution whose output goes unchanged into a BN; the network ran "
                + (", ".join(self.seen) or "no convolution and no BN that hooks could see")
            )
        if self.position < len(self.layers):
            raise ValueError(
                f"batch {self.batch + 1} takes another path through the network than the first: "
                f"{self.layers[self.position].name} did not run"
            )
        self.batch, self.position = self.batch + 1, 0


@contextmanager
def recording(model: nn.Module, kernel_size: tuple[int, int] = (3, 3)) -> Iterator[Recording]:
    """Record the responses of every forward pass inside the block; hooks are removed at its end, whatever happens."""
    record = Recording()
    outputs: dict[int, tuple[str, weakref.ref[Tensor], int]] = {}  # id of a tensor -> its convolution, itself, version

    def after_conv(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            record.seen[f"{name} ({type(module).__name__})"] = None
            outputs[id(output)] = (name, weakref.ref(output), output._version)

        return hook

    def after_norm(norm: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            record.seen[f"{norm} ({type(module).__name__})"] = None
            source: Tensor = args[0] if args else kwargs["input"]
            if id(source) in outputs:
                name, reference, version = outputs[id(source)]
                if reference() is source and source._version == version:
                    record.add(name, norm, output)

        return hook

    def after_model(module: nn.Module, args: Any, output: Any) -> None:
        outputs.clear()
        record.end_pass()

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == kernel_size:
                hooks.callback(module.register_forward_hook(after_conv(name)).remove)
            elif isinstance(module, _BatchNorm):
                hooks.callback(module.register_forward_hook(after_norm(name), with_kwargs=True).remove)
        hooks.callback(model.register_forward_hook(after_model).remove)
        yield record


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients and TF32; every module's own training flag comes back at the end."""
    training = [(module, module.training) for module in model.modules()]
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    tf32 = matmul.allow_tf32, cudnn.allow_tf32
    try:
        model.eval()
        matmul.allow_tf32 = cudnn.allow_tf32 = False
        with torch.no_grad():
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = tf32
        for module, flag in training:
            module.training = flag


def measure(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    network: str = "network",
    precision: str = "float32",
    progress: Callable[[int], object] = lambda images: None,
) -> pd.DataFrame:
    """The std of every layer's response over all images: the frame, one row a layer (see analysis.frame).

    model: any network, on any device; it is left as it was. batches: image tensors (N, C, H, W), or (images, labels),
    already normalised. precision: `float32`, or `bfloat16` for autocast. progress: called with the number of images
    after each batch. `frame.attrs["accuracy"]` is the share of labels hit, where there are labels. Raises ValueError
    where there are no batches, no pairs of convolution and BN, or where a response holds NaN or infinity.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: one of {', '.join(PRECISIONS)}")
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    images = labelled = correct = 0
    autocast = torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "float32")
    with evaluation(model), autocast, recording(model) as record:
        for batch in batches:
            x, labels = (batch, None) if isinstance(batch, Tensor) else batch
            output = model(x.to(device))
            images += len(x)
            if labels is not None:
                labelled += len(labels)
                correct += int((output.argmax(1) == labels.to(device)).sum())
            progress(len(x))
    if images == 0:
        raise ValueError("no images: there is nothing to measure")
    config = getattr(model, "config", None)
    frame = make_frame(
        describe_layers(record.layers),
        network=network,
        kind=getattr(config, "kind", "other"),
        depth=getattr(config, "depth", None),
        images=images,
        source="hooks",
    )
    frame.attrs["accuracy"] = correct / labelled if labelled else None
    return frame


def describe_layers(layers: list[Layer]) -> list[dict[str, object]]:
    """The rows of a frame."""
    rows: list[dict[str, object]] = []
    stage, size = 0, None
    for position, layer in enumerate(layers, start=1):
        stage += (layer.height, layer.width) != size
        size = layer.height, layer.width
        moments = layer.moments
        channels = len(moments.mean)
        rows.append(
            {"layer": position, "name": layer.name, "norm": layer.norm, "stage": stage, "channels": channels}
            | {"height": layer.height, "width": layer.width, "count": moments.count * channels}
            | {"mean": moments.mean.mean().item(), "std": moments.std}
            | {"within": moments.within, "between": moments.between}
        )
    return rows
