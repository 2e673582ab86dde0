"""Record responses in a Lightning training: Trainer(callbacks=[RecorderCallback(every=100)])."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from analysis.measuring.recorder import Recorder


class RecorderCallback(Callback):
    """Record after optimizer steps and send the numbers to the trainer's loggers.

    options: arguments of `Recorder` except for the model. `callback.recorder` holds the records.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.recorder = Recorder(pl_module, **self.options)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        step = trainer.global_step  # 0 while the gradients of the first step are accumulated
        if step and (values := self.recorder.record(step)):
            for logger in trainer.loggers:
                logger.log_metrics(values, step=step)
