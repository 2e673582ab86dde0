"""What a network does to the shape of its input, and what that costs, stage by stage.

    >>> from models.resnet import parse_name
    >>> from models.summary import summarise
    >>> rows = summarise(parse_name("resnet-34"), (5, 3, 224, 224))
    >>> sum(row.multiply_adds for row in rows)  # Table 1 of He et al., CVPR 2016: 3.6e9
    3663761408

As in Table 1, multiply-adds are those of the convolutions and the classifier, for one image.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from models.messages import report
from models.resnet import OPTIONS, SIZES, Config, ResNet, parse_name

LARGEST = 2**40  # values in an input; torch's sizes overflow beyond


@dataclass
class Row:
    """One stage: the shape of its output, trained parameters, multiply-adds for one image."""

    stage: str
    shape: tuple[int, ...] = ()
    parameters: int = 0
    multiply_adds: int = 0


def summarise(config: Config, shape: Sequence[int]) -> list[Row]:
    """Return the stages of a network in forward order.

    shape: of the input, (N, 3, H, W). Raises ValueError for any other.
    """
    if min(shape) < 1 or shape[1] != 3 or math.prod(shape) > LARGEST:
        allowed = f"N 3 H W, each 1 or more, {LARGEST:,} values at most"
        raise ValueError(f"an input is {allowed}, not {' '.join(map(str, shape))}")
    with torch.device("meta"):  # shapes without numbers, so without memory
        network = ResNet(config).eval()
        x = torch.empty(*shape)
    names = ["conv1", "maxpool", *network.stages, "fc"]
    rows = [Row(name) for name in names if not isinstance(getattr(network, name), nn.Identity)]
    for row in rows:
        stage = getattr(network, row.stage)
        row.parameters = sum(p.numel() for p in stage.parameters())
        for module in stage.modules():
            module.register_forward_hook(partial(record, row))
    rows[0].parameters += sum(p.numel() for p in network.bn1.parameters())
    network(x)
    pooled = (shape[0], network.fc.in_features)
    return [*rows[:-1], Row("average pooling", (*pooled, 1, 1)), Row("flatten", pooled), rows[-1]]


def record(row: Row, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
    """Note the shape of an output, the stage's own last, and add up multiply-adds (a hook)."""
    row.shape = tuple(output.shape)
    if isinstance(module, nn.Conv2d | nn.Linear):
        row.multiply_adds += output[0].numel() * module.weight[0].numel()


def format_table(config: Config, shape: Sequence[int]) -> str:
    """Return the stages as a table to print."""
    rows = summarise(config, shape)
    parameters, adds = (sum(getattr(r, n) for r in rows) for n in ("parameters", "multiply_adds"))
    titles = ("stage", "output shape", "parameters", "multiply-adds per image")
    cells: list[tuple[str, ...]] = [titles]
    for row in [*rows, Row("total", (), parameters, adds)]:
        numbers = [f"{n:,}" if n else "" for n in (row.parameters, row.multiply_adds)]
        cells.append((row.stage, str(row.shape) if row.shape else "", *numbers))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [f"{config.name}, input {tuple(shape)}"]
    for stage, output, *numbers in cells:
        left = f"{stage:<{widths[0]}}  {output:<{widths[1]}}"
        right = f"{numbers[0]:>{widths[2]}}  {numbers[1]:>{widths[3]}}"
        lines.append(f"{left}  {right}".rstrip())
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m models.resnet NAME` and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m models.resnet",
        description="Print output shapes, parameters and multiply-adds of a network.",
    )
    add = parser.add_argument
    add("name", help="resnet-DEPTH or plain-DEPTH: 6n + 2 (CIFAR-10), 18 to 152 (ImageNet)")
    size = "default: 1 3 32 32 or 1 3 224 224"
    add("--input", type=int, nargs=4, metavar=("N", "C", "H", "W"), help=size)
    add("--shortcut", choices=OPTIONS["shortcut"], help="default: A for CIFAR-10, B for ImageNet")
    which = "the convolution of a bottleneck that downsamples (default: 1x1, as in the paper)"
    add("--stride", choices=OPTIONS["stride"], default="1x1", help=which)
    add("--classes", type=int, help="default: 10 or 1000")
    args = parser.parse_args(argv)
    given = {key: getattr(args, key) for key in ("shortcut", "stride", "classes")}
    try:
        config = parse_name(args.name)
        config = replace(config, **{k: v for k, v in given.items() if v is not None})
        side = SIZES[config.images]
        print(format_table(config, args.input or (1, 3, side, side)))
    except ValueError as error:
        return report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
