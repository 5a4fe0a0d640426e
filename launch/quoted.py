"""A plan with its quote: what it is expected to take, and whether that fits into the GPU's memory and the budget."""

from __future__ import annotations

from job.contract.errors import BadInput
from job.contract.submission import Offer
from launch.here import Here
from launch.plan import Plan
from launch.quote import Quote, make_quote, refusal
from launch.resolve import Resolved


def with_quote(plan: Plan, resolved: Resolved, here: Here) -> tuple[Plan, BadInput | None]:
    """The plan with what it is expected to take; and why it will not fit into the GPU's memory, or into the budget.

    Fallbacks whose memory is too small are left out: to be offered them would be no help.
    """
    offers: tuple[Offer | None, ...] = plan.offers if plan.buys else (None,)
    quote = make_quote(plan.recipe, resolved.facts, offers, threads=here.settings.threads)
    left = None if plan.budget.max_usd is None else plan.budget.max_usd - plan.spent_usd
    refused = refusal(quote, max_usd=left) or _too_little_here(plan, quote, left)
    notes = plan.notes if refused is None else (*plan.notes, refused.message)
    fits = [index for index, each in enumerate(quote.offers) if not index or each.memory.verdict != "does not fit"]
    if dropped := len(quote.offers) - len(fits):
        notes = (*notes, f"{dropped} fallbacks are left out: their GPU's memory is too small")
    kept = {
        "places": tuple(plan.places[index] for index in fits),
        "quote": quote.model_copy(update={"offers": tuple(quote.offers[index] for index in fits)}),
    }
    return plan.model_copy(update={**kept, "notes": notes}), refused


def _too_little_here(plan: Plan, quote: Quote, left: float | None) -> BadInput | None:
    """As `refusal`, for this machine, of which the quote knows the hours and not the price."""
    price = plan.chosen.usd_per_hour if plan.chosen is not None and not plan.buys else None
    if left is None or price is None or quote.chosen.seconds is None:
        return None
    expected = quote.chosen.seconds.p50 / 3600 * price
    if expected <= left:
        return None
    return BadInput(
        f"${left:.2f} will not do: the run is expected to cost ${expected:.2f} (p50) here",
        hint=f"--budget {expected * 1.5:.2f}, or --anyway: it lands when the budget ends, and more of it goes on",
    )
