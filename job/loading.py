"""Everything an attempt holds in memory once it can train: base, tokenizer, rows, model; and who it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
import transformers

from job.callbacks import Reason
from job.contract.base_model import TOKENIZER_FILES
from job.contract.environ import JobEnviron
from job.contract.passport import BaseModelPassport, Chosen, DatasetPassport, Passport
from job.contract.records import CheckpointManifest, Identity, RunRecord
from job.dataset.split import tokens_digest
from job.journal import now
from job.memory import loading
from job.model import check_gpu, hardware, load_tokenizer, parameters
from job.model import load as load_model
from job.notice import Notice
from job.passport import Story, ftjob_commit, versions
from job.rows import Files, Rows, prepare
from job.train import Training
from job.weights import Base, locate


@dataclass(frozen=True)
class Loaded:
    """Ready to train."""

    training: Training
    rows: Rows
    base: Base
    identity: Identity

    def manifest(self, attempt: int, reason: Reason) -> CheckpointManifest:
        """The manifest of a checkpoint of the training as it is now; its files come later."""
        progress = self.training.progress
        return CheckpointManifest(
            step=progress.step,
            attempt=attempt,
            epoch=progress.epoch,
            reason=reason,
            created_at=now(),
            finished=progress.finished is not None,
            held_out_loss=progress.epochs[-1].held_out_loss if reason == "epoch" else None,
            identity=self.identity,
            files={},
        )

    def passport(
        self,
        record: RunRecord,
        story: Story,
        *,
        running: int,
        environ: JobEnviron,
        landed: Chosen | None = None,
    ) -> Passport:
        """Everything that produced the adapter.

        Args:
            running: this attempt.
            landed: which state is delivered early, because the budget ended; None for the final one.
        """
        progress, recipe = self.training.progress, record.recipe
        return Passport(
            run_id=record.run_id,
            created_at=now(),
            recipe=recipe,
            recipe_sha256=record.recipe_digest,
            learning_rate=self.training.learning_rate,
            seed=recipe.training.seed,
            base_model=BaseModelPassport(
                id=recipe.base_model.id,
                revision=recipe.base_model.revision,
                parameters=parameters(self.training.model),
                files=self.base.files,
            ),
            dataset=DatasetPassport(
                train=record.train,
                held_out=record.held_out,
                train_rows=len(self.rows.train),
                held_out_rows=len(self.rows.held_out),
                trained_tokens_per_epoch=sum(row.trained_tokens for row in self.rows.train),
                trained_tokens=progress.trained_tokens,
                tokens_sha256=self.identity.tokens,
                chat_template_sha256=self.base.chat_template_digest,
                tokenizer_sha256=self.base.digest_of(*TOKENIZER_FILES),
            ),
            versions=self.identity.versions,
            git_commit=environ.git_commit,
            ftjob_commit=environ.code_commit or ftjob_commit(),
            image_digest=environ.image_digest,
            hardware=self.identity.hardware,
            threads=self.identity.threads,
            attempts=story.attempts(running=running),
            epochs=progress.epochs,
            losses=progress.losses,
            chosen=landed or progress.chosen(),
            complete=landed is None,
            receipt=story.receipt(running=running),
            exact=story.is_exact(reproducible=recipe.training.reproducible),
        )


def load(
    record: RunRecord,
    files: Files,
    *,
    workdir: Path,
    threads: int,
    notice: Notice,
    go_on: Callable[[], None],
    say: Callable[[str], None],
    retry_seconds: float,
    needs_gpu: bool,
) -> Loaded:
    """Load all of it.

    Args:
        go_on: called between the long parts, and all through a download; raises when a notice was given, since nothing
            is worth saving yet.
        say: told what is done from now on, while there is a download.
        retry_seconds: how long the base model's place may be out of reach.
        needs_gpu: refuse to train on the CPU.

    Raises:
        ModelInvalid, DatasetInvalid: what a person named cannot be trained.
        IdentityMismatch: the rows are not the tokens that were checked at the launch.
        Unreachable, TrainingFailed, Damaged: the base model could not be brought here.
    """
    torch.set_num_threads(threads)
    if needs_gpu:
        check_gpu()
    _quiet_libraries()
    recipe = record.recipe
    prepared: list[Rows] = []

    def before_weights(folder: Path) -> None:
        say("rendering the dataset")
        prepared.append(prepare(record, files, folder, go_on=go_on))
        say("loading the model")

    base = locate(
        recipe.base_model, workdir, go_on=go_on, say=say, before_weights=before_weights, retry_seconds=retry_seconds
    )
    [rows] = prepared
    go_on()
    tokenizer = load_tokenizer(base)
    with loading(recipe, base.weights_size):
        model = load_model(recipe, base)
        go_on()
        training = Training(recipe, model, tokenizer, rows, workdir=workdir, notice=notice)
        training.prove_isolation()
    identity = Identity(
        recipe=record.recipe_digest,
        train=record.train.sha256,
        held_out=record.held_out.sha256 if record.held_out else None,
        tokens=tokens_digest(rows.train, rows.held_out),
        base_model=base.digest,
        world_size=1,
        threads=threads,
        versions=versions(),
        hardware=hardware(),
    )
    return Loaded(training, rows, base, identity)


def _quiet_libraries() -> None:
    """Their progress bars redraw a terminal's line, and our log is read by machines; their messages go through ours."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()
    datasets.utils.logging.disable_progress_bar()
