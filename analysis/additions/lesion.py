"""What a network loses if one residual branch is left out (Veit et al. 2016).

    frame = analysis.measure_branches(model, batches)
    frame = add_lesions(frame, model, batches, images=1000)  # batches with labels

No other column says how important an addition is. The network runs once whole, and once for each
addition without its branch. Modules that add, and that ended before the lesion, are not run again:
they return what they returned in the whole pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from analysis.additions.finding import AdditionRecord, Sum, recording_additions
from analysis.measuring.batches import count_images, labels_of, logits_of, run
from analysis.measuring.eval_mode import evaluation, replace_forward

Forward = Callable[[nn.Module, Any], Any]


def add_lesions(
    frame: pd.DataFrame,
    model: nn.Module,
    batches: Iterable[Any],
    *,
    images: int = 1000,
    forward: Forward | None = None,
    progress: Callable[[int], object] | None = None,
) -> pd.DataFrame:
    """Add the columns `lesion_accuracy` and `lesion_loss` to a frame of `measure_branches`.

    batches: with labels, as for `measure_branches`: of classes (N,), or of tokens (N, T), which are
        predicted one position ahead. The first `images` of them are used, in whole batches.
    progress: called with the number of additions that are done.

    lesion_accuracy is the accuracy of the whole network minus that without the branch;
    lesion_loss is the cross-entropy without the branch minus that of the whole network. Raises
    ValueError if there are no labels.
    """
    totals = torch.zeros(len(frame) + 1, 3, dtype=torch.float64)  # the last row: the whole network
    seen = 0
    with evaluation(model), recording_additions(model) as record:
        for batch in batches:
            if seen >= images:
                break
            seen += count_images(batch)
            run_batch = partial(forward or run, model, batch)
            if not record.passes:
                run_batch()
                record.end_pass()
            with caching(model, record) as memory:
                for position in [None, *range(len(record.additions))]:
                    memory.begin(position)
                    totals[-1 if position is None else position] += score(run_batch(), batch)
                    record.drop_pass()
                    if progress:
                        progress(1)
    if not seen or not totals[-1, 2]:
        raise ValueError(
            "--lesion: no labels, or no logits to compare them with: add them to the batches"
        )
    hits, loss, count = totals.unbind(1)
    accuracy, mean = hits / count, loss / count
    return frame.assign(
        lesion_accuracy=(accuracy[-1] - accuracy[:-1]).tolist(),
        lesion_loss=(mean[:-1] - mean[-1]).tolist(),
    )


def score(output: Any, batch: Any) -> Tensor:
    """Return the number of labels hit, the sum of cross-entropies, and the number of labels."""
    logits, labels = logits_of(output), labels_of(batch)
    if logits is None or labels is None or logits.dim() < 2:
        return torch.zeros(3, dtype=torch.float64)
    labels = labels.to(logits.device)
    if logits.dim() == 3 and logits.shape[:2] == labels.shape:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()  # (N * (T - 1), V)
    counted = labels >= 0
    logits, labels = logits[counted].float(), labels[counted]
    hits = (logits.argmax(1) == labels).sum()
    loss = functional.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([hits, loss, counted.sum()]).double().to("cpu")


class Memory:
    """What the modules that add returned in the whole pass, call by call."""

    def __init__(self, record: AdditionRecord) -> None:
        self.record = record
        self.calls: dict[tuple[str, int], tuple[Any, int, Counter[str]]] = {}
        self.count: Counter[str] = Counter()  # of calls in this pass, by module
        self.lesion: int | None = None
        self.done = 0  # additions that ran in this pass

    def begin(self, lesion: int | None) -> None:
        """Leave out the branch of one addition, or of none, in the pass that follows."""
        self.lesion, self.done = lesion, 0
        self.count.clear()

    def call(self, name: str, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a module, or return what it returned, if it ended before the lesion."""
        key = name, self.count[name]
        self.count[name] += 1
        if self.lesion is not None and self.calls[key][1] <= self.lesion:
            output, self.done, ran = self.calls[key]
            self.record.ran = ran.copy()
            return tree_map_only(Tensor, Tensor.clone, output)
        output = own(*args, **kwargs)
        if self.lesion is None:
            kept = tree_map_only(Tensor, Tensor.clone, output)
            self.calls[key] = kept, self.done, self.record.ran.copy()
        return output

    def without_branch(self, position: int, operands: Sum) -> Tensor | None:
        """Return the stream alone at the lesion."""
        self.done = position + 1
        if position != self.lesion:
            return None
        addition = self.record.additions[position]
        return operands.second if addition.swapped else operands.first


@contextmanager
def caching(model: nn.Module, record: AdditionRecord) -> Iterator[Memory]:
    """Let the modules that have additions remember what they return."""
    memory = Memory(record)
    names = {addition.name for addition in record.additions} - {""}
    with ExitStack() as stack:
        for module, name in record.names.items():
            if name in names:
                call = partial(memory.call, name, module.forward)
                replace_forward(module, call, stack)
        record.replace = memory.without_branch
        stack.callback(setattr, record, "replace", None)
        yield memory
