"""The held-out loss: mean nats per trained token over all held-out rows, each token counted once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from job.dataset.render import IGNORED
from job.notice import Notice
from job.randomness import undisturbed


def held_out_loss(trainer: Any, batches: Iterable[dict[str, Any]], notice: Notice) -> float | None:
    """The loss of the trainer's model on collated batches, dropout off.

    Leaves the random state and the model's mode as they were: a run that is interrupted and evaluates elsewhere must
    not differ from one that is not.

    Args:
        trainer: an SFTTrainer; its `compute_loss` gives the mean over a batch's trained tokens.
        batches: input_ids, labels and the rest, each of shape (rows, tokens).

    Returns:
        The loss, or None when a notice came before the end: the machine's last seconds are for saving.
    """
    model = trainer.model
    total, tokens = 0.0, 0
    was_training = model.training
    model.eval()
    try:
        with undisturbed(), torch.no_grad(), trainer.compute_loss_context_manager():
            for batch in batches:
                if notice.given:
                    return None
                inputs = trainer._prepare_inputs({name: value for name, value in batch.items() if name != "ledger"})
                # Labels are shifted by one: the first token of a sequence is never predicted.
                count = int((inputs["labels"][:, 1:] != IGNORED).sum())
                total += float(trainer.compute_loss(model, inputs)) * count
                tokens += count
    finally:
        model.train(was_training)
    return total / tokens
