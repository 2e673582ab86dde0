"""What a network does to the shape of its input, and what that costs: stage by stage.

    >>> from models.resnet import parse_name
    >>> from models.summary import summarise
    >>> sum(row.multiply_adds for row in summarise(parse_name("resnet-34"), (5, 3, 224, 224)))  # 3.6e9 in Table 1
    3663761408

Multiply-adds are those of convolutions and of the classifier, for one image, as the paper counts
them in Table 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from models.resnet import Config, ResNet

LARGEST = 2**40  # values in an input; sizes of tensors overflow beyond


@dataclass
class Row:
    """One stage. shape: of its output. parameters: all that are trained. multiply_adds: for one
    image.
    """

    stage: str
    shape: tuple[int, ...] = ()
    parameters: int = 0
    multiply_adds: int = 0


def summarise(config: Config, shape: Sequence[int]) -> list[Row]:
    """The stages of a network for an input (N, 3, H, W), in forward order. ValueError for another
    input.
    """
    if min(shape) < 1 or shape[1] != 3 or math.prod(shape) > LARGEST:
        given = " ".join(map(str, shape))
        raise ValueError(
            f"an input is N 3 H W, each 1 or more, {LARGEST:,} values at most, not {given}"
        )
    with torch.device("meta"):  # shapes without numbers, so without memory
        network = ResNet(config).eval()
        x = torch.empty(*shape)
    rows = [Row(name) for name in ("conv1", "maxpool", *network.stages, "fc")]
    for row in rows:
        stage = getattr(network, row.stage)
        stage.register_forward_hook(partial(note, row))
        row.parameters = sum(p.numel() for p in stage.parameters())
        for module in stage.modules():
            module.register_forward_hook(partial(count, row))
    rows[0].parameters += sum(p.numel() for p in network.bn1.parameters())
    network(x)
    *before, classifier = [
        row for row in rows if not isinstance(getattr(network, row.stage), nn.Identity)
    ]
    pooled = (shape[0], network.fc.in_features)
    return [*before, Row("average pooling", (*pooled, 1, 1)), Row("flatten", pooled), classifier]


def note(row: Row, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
    """A hook: the shape that comes out."""
    row.shape = tuple(output.shape)


def count(row: Row, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
    """A hook: the multiply-adds of a convolution or of the classifier, for one image."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        row.multiply_adds += output[0].numel() * module.weight[0].numel()


def table(config: Config, shape: Sequence[int]) -> str:
    """The stages as a table to print."""
    rows = summarise(config, shape)
    total = Row(
        "total", (), sum(row.parameters for row in rows), sum(row.multiply_adds for row in rows)
    )
    cells: list[tuple[str, ...]] = [
        ("stage", "output shape", "parameters", "multiply-adds per image")
    ]
    for row in [*rows, total]:
        numbers = (
            f"{number:,}" if number else "" for number in (row.parameters, row.multiply_adds)
        )
        cells.append((row.stage, str(row.shape) if row.shape else "", *numbers))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        f"{stage:<{widths[0]}}  {output:<{widths[1]}}  {parameters:>{widths[2]}}  {adds:>{widths[3]}}".rstrip()
        for stage, output, parameters, adds in cells
    ]
    return "\n".join([f"{config.name}, input {tuple(shape)}", *lines])
