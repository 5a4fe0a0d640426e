"""The adapter: PEFT's own files, the tokenizer's, the passport and a model card; then the manifest, create-only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Final

from job.checkpoints import digest_folder
from job.contract.base_model import TOKENIZER_FILES
from job.contract.errors import AlreadyExists
from job.contract.layout import RunLayout
from job.contract.passport import Passport
from job.contract.recipe import TINY_MODEL
from job.contract.records import AdapterManifest
from job.logs import get_logger
from job.storage import Store

PASSPORT: Final = "passport.json"
CARD: Final = "README.md"


def write_papers(passport: Passport, base_folder: Path, folder: Path) -> None:
    """Complete an adapter's folder: the tokenizer as it was trained with, the passport, the model card."""
    for name in TOKENIZER_FILES:
        if (base_folder / name).is_file():
            shutil.copyfile(base_folder / name, folder / name)
    (folder / PASSPORT).write_bytes(passport.to_bytes())
    (folder / CARD).write_text(model_card(passport), encoding="utf-8")


def publish(store: Store, layout: RunLayout, passport: Passport, folder: Path, *, attempt: int) -> bool:
    """Upload an adapter's folder and create its manifest; whether it was this attempt that published.

    Of two overlapping attempts one publishes, and exact resume makes them equal; the other's files are never read. An
    adapter that is not complete has a manifest of its own, and is never in the way of the final one.

    Raises:
        StorageError: not everything could be written. Nothing is published then; it may be tried again.
    """
    files = digest_folder(folder)
    for file in files:
        store.put_file(layout.adapter_file(attempt, file), folder / file)
    manifest = AdapterManifest(
        attempt=attempt,
        complete=passport.complete,
        created_at=passport.created_at,
        step=passport.chosen.step,
        epoch=passport.chosen.epoch,
        held_out_loss=passport.chosen.held_out_loss,
        files=files,
    )
    key = layout.adapter_manifest if passport.complete else layout.landed_manifest(attempt)
    try:
        store.put_new(key, manifest.to_bytes())
    except AlreadyExists:
        get_logger().warning("adapter.published_by_another_attempt")
        return False
    get_logger().info("adapter.published", step=manifest.step, complete=manifest.complete)
    return True


def model_card(passport: Passport) -> str:
    """README.md: front matter that the hub reads, and what a person wants to know first."""
    recipe, data, chosen = passport.recipe, passport.dataset, passport.chosen
    held_out = "none" if chosen.held_out_loss is None else f"{chosen.held_out_loss:.4f} nats per token"
    epochs = "\n".join(
        f"| {e.epoch} | {e.step} | {'' if e.held_out_loss is None else f'{e.held_out_loss:.4f}'} |"
        for e in passport.epochs
    )
    tiny = recipe.base_model.id == TINY_MODEL
    # A path may hold anything; a text of JSON is one of YAML and of Python too.
    name, base = (
        json.dumps(n, ensure_ascii=False) for n in (recipe.base_model.id, "tiny" if tiny else recipe.base_model.id)
    )
    first = "The base model is built in: `python -m job.tiny tiny` writes it to the folder `tiny`.\n\n" if tiny else ""
    at = f", revision={json.dumps(recipe.base_model.revision)}" if recipe.base_model.revision else ""
    revision = f" at revision `{recipe.base_model.revision}`" if recipe.base_model.revision else ""
    dora = ", DoRA" if recipe.lora.dora else ""
    landed = (
        ""
        if passport.complete
        else f"**Not complete**: its budget, of money or of time, ended. `ftjob launch --run {passport.run_id}` with "
        "`--budget +USD` or `--by TIME` goes on.\n\n"
    )
    repeated = sum(attempt.steps_repeated for attempt in passport.attempts)
    return f"""---
base_model: {name}
library_name: peft
pipeline_tag: text-generation
tags:
- lora
- {recipe.method}
- ftjob
---

# {passport.run_id}

A LoRA adapter for `{recipe.base_model.id}`{revision}, trained by ftjob.

{landed}{first}```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base}{at})
model = PeftModel.from_pretrained(model, "THIS_FOLDER")
```

| | |
|---|---|
| method | {recipe.method}, rank {recipe.lora.rank}, alpha {recipe.lora.alpha}, dropout {recipe.lora.dropout}{dora} |
| dataset | {data.train_rows} rows trained, {data.held_out_rows} held out, sha256 `{data.train.sha256}` |
| trained tokens | {data.trained_tokens} ({data.trained_tokens_per_epoch} an epoch) |
| learning rate | {passport.learning_rate:g}, {recipe.training.scheduler} |
| chosen | step {chosen.step}, epoch {chosen.epoch:g}: {chosen.why} |
| held-out loss | {held_out} |
| attempts | {len(passport.attempts)}, {repeated} steps repeated |

| epoch | step | held-out loss |
|---|---|---|
{epochs}

`passport.json` holds everything that produced it: the resolved recipe, every digest and version, every attempt, every
loss.
"""
