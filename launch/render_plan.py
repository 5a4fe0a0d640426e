"""A plan as text: what will be trained, where, for how much, and what will be brought there."""

from __future__ import annotations

from typing import Final

from job.contract.records import utc
from job.contract.submission import Way
from launch.plan import DATA, Place, Plan
from launch.render_quote import quote_lines

_SHOWN: Final = 8
"""Fallbacks that are listed; more only hide the first."""
_WAYS: Final = {Way.DOCKER: "docker run", Way.INSIDE: "inside the image", Way.HOST: "prepared Python"}


def plan_text(plan: Plan) -> str:
    """What a launch is about to do, a fact a line."""
    recipe, training = plan.recipe, plan.recipe.training
    held_out = "nothing held out"
    if plan.held_out is not None:
        held_out = f"{plan.held_out.rows} held out"
    elif isinstance(recipe.dataset.held_out, float):
        held_out = f"{recipe.dataset.held_out:.0%} of them held out"
    shape = f"{recipe.method}, rank {recipe.lora.rank}{', DoRA' if recipe.lora.dora else ''}"
    model = recipe.base_model.id + (f"@{recipe.base_model.revision[:12]}" if recipe.base_model.revision else "")
    batch = training.batch_size * training.gradient_accumulation
    lines = [
        f"run      {plan.run_id} on {plan.backend}",
        f"trains   {model} ({shape})",
        f"on       {plan.train.uri} ({plan.train.rows} rows, {held_out})",
        f"for      {training.epochs} epochs, {batch} sequences a step, up to {training.max_length} tokens each",
        f"lands in {plan.bucket}/runs/{plan.run_id}",
    ]
    if plan.buys:
        lines += _bought(plan)
    lines += _bounds(plan)
    if plan.quote is not None:
        lines += quote_lines(plan.quote)
    lines += [f"note     {note}" for note in plan.notes]
    return "\n".join(lines)


def _bought(plan: Plan) -> list[str]:
    first, *others = plan.places
    lines = [f"buys     {_place(first)}", f"         {plan.why}"]
    for place in others[:_SHOWN]:
        lines.append(f"  else   {_place(place)}")
    if len(others) > _SHOWN:
        lines.append(f"  else   {len(others) - _SHOWN} more, up to {_price(others[-1])}")
    ways = {place.way for place in plan.places}
    images = ((Way.DOCKER, plan.image), (Way.INSIDE, plan.inside_image), (Way.HOST, plan.python))
    lines += [f"runs     {_WAYS[way]}: {what}" for way, what in images if way in ways]
    lines += [f"uploads  {upload.source} to {upload.uri}" for upload in plan.uploads]
    for mount in plan.mounts:
        how = "copied" if mount.how == "copy" else "mounted read-only"
        lines.append(f"brings   {mount.uri}, {how} by SkyPilot to {DATA}/{mount.file}")
    brought = {mount.uri for mount in plan.mounts}
    for digest in (plan.train, plan.held_out):
        if digest is not None and digest.uri not in brought:
            lines.append(f"fetches  {digest.uri}, by the job itself")
    if plan.secrets:
        lines.append(f"secrets  {', '.join(plan.secrets)} (by name; their values are in no file of ftjob's)")
    lines.append(f"retries  up to {plan.max_restarts} new attempts after interruptions")
    return lines


def _bounds(plan: Plan) -> list[str]:
    """What the run may cost, and until when."""
    budget, lines = plan.budget, []
    if budget.max_usd is not None:
        lines.append(
            f"budget   ${budget.max_usd:.2f} over all attempts; before them the best adapter so far is published"
        )
    if budget.deadline is not None:
        lines.append(f"by       {utc(budget.deadline)}; before then the best adapter so far is published")
    return lines


def _place(place: Place) -> str:
    offer = place.offer
    machine = f"{offer.instance_type}, " if offer.instance_type else ""
    return f"{offer.gpu}:{offer.gpus} {offer.kind} {_price(place)} {offer.infra} ({machine}{_WAYS[place.way]})"


def _price(place: Place) -> str:
    price = place.offer.usd_per_hour
    return "" if price is None else f"${price:.2f}/h"
