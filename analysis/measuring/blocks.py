"""How much each residual block changes the signal: the std of its branch over the std of its
shortcut's output.

    from analysis.measuring.blocks import recording_blocks
    with recording_blocks(model) as record:
        frame = analysis.measure(model, batches)
    blocks = record.to_frame("resnet-56")  # from the same forward passes

A residual block adds two things: its branch, the output of its last BN, and what the shortcut
gives. Both are reduced inside the hook to streamed moments; nothing is stored. Batches must fit
into memory: where one runs again in parts, `record.whole_pass()` around each attempt keeps what
failed from counting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from torch import Tensor, nn

from analysis.measuring.moments import Moments
from models.resnet import BasicBlock, Bottleneck

COLUMNS = ("network", "block", "name", "stage", "branch_std", "shortcut_std", "ratio")
ADDENDS = ("branch", "shortcut")


@dataclass
class Block:
    """The two addends of one residual block: their moments so far, and the size (H, W) of their
    maps.
    """

    name: str
    size: tuple[int, int] = (0, 0)
    moments: dict[str, Moments] = field(default_factory=dict)

    def add(self, addend: str, x: Tensor) -> None:
        """Take in one of the two addends (N, C, H, W) of a forward pass."""
        self.size = x.shape[2], x.shape[3]
        moments = Moments.of(x)
        before = self.moments.get(addend)
        self.moments[addend] = moments if before is None else before.merge(moments)


@dataclass
class Blocks:
    """The residual blocks of a network in forward order."""

    blocks: list[Block] = field(default_factory=list)

    @contextmanager
    def whole_pass(self) -> Iterator[None]:
        """Where the block raises, no residual block keeps what it took in."""
        before = [block.moments.copy() for block in self.blocks]
        try:
            yield
        except BaseException:
            for block, moments in zip(self.blocks, before, strict=True):
                block.moments = moments
            raise

    def to_frame(self, network: str) -> pd.DataFrame:
        """One row a block: network, block (1-based), name, stage, branch_std, shortcut_std and
        ratio.

        stage: 1-based; a new one begins where the size of the maps changes. ratio: branch_std over
        shortcut_std, empty where the shortcut gives a constant. No rows for a network without
        residual blocks, such as a plain one. Raises ValueError where no images were passed through
        the network, or for NaN or infinity in an addend.
        """
        rows: list[dict[str, object]] = []
        stage, size = 0, None
        for position, block in enumerate(self.blocks, start=1):
            stage += block.size != size
            size = block.size
            branch, shortcut = (self.std(block, addend) for addend in ADDENDS)
            rows.append(
                {"network": network, "block": position, "name": block.name, "stage": stage}
                | {
                    "branch_std": branch,
                    "shortcut_std": shortcut,
                    "ratio": branch / shortcut if shortcut else math.nan,
                }
            )
        return pd.DataFrame(rows, columns=list(COLUMNS))

    @staticmethod
    def std(block: Block, addend: str) -> float:
        if addend not in block.moments:
            raise ValueError(f"no image went through {block.name}: there is nothing to measure")
        std = block.moments[addend].std
        if not math.isfinite(std):
            raise ValueError(
                f"NaN or infinity in the {addend} of {block.name}: look at the weights and at the images"
            )
        return std


@contextmanager
def recording_blocks(model: nn.Module) -> Iterator[Blocks]:
    """Record both addends of every residual block of our networks in the forward passes inside the
    `with` block.

    The hooks are removed at its end, whatever happens. Other networks' blocks are not known, and
    give no rows.
    """
    record = Blocks()

    def taking(block: Block, addend: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            block.add(addend, output)

        return hook

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, BasicBlock | Bottleneck) and module.downsample is not None:
                record.blocks.append(Block(name))
                last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                for addend, source in zip(ADDENDS, (last, module.downsample), strict=True):
                    hooks.callback(
                        source.register_forward_hook(taking(record.blocks[-1], addend)).remove
                    )
        yield record
