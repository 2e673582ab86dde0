"""Record responses in a training by transformers.Trainer."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from analysis.measuring.recorder import Recorder


class RecorderCallback(TrainerCallback):
    """Record after optimizer steps: trainer.add_callback(RecorderCallback(trainer, every=100)).

    The numbers go where the trainer's other logs go. `callback.recorder` holds the records.
    options: arguments of `Recorder` except for the model.
    """

    def __init__(self, trainer: Trainer, **options: Any) -> None:
        self.log, self.recorder = trainer.log, Recorder(trainer.model, **options)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if values := self.recorder.record(state.global_step):
            due = control.should_log
            self.log(values)  # sets should_log to False
            control.should_log = due
