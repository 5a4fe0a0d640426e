"""The Quote: what a run will take, in hours and dollars, on each offer; and whether it fits. Pure, and printable.

Each number says what it rests on; launch/bill.py has the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from job.contract.errors import BadInput
from job.contract.recipe import Recipe
from job.contract.records import Part
from job.contract.submission import Offer
from launch.bill import INTERRUPTED, ONCE, WORTH_A_LINE, Bill, Item, Range, dollars
from launch.cards import card_of
from launch.interruptions import rate_of, saving
from launch.memory import Memory, memory_of
from launch.shape import Shape
from launch.speeds import pace, pace_on_cpu
from launch.startup import startup_of
from launch.steps import Lengths, Work, work_of


@dataclass(frozen=True)
class Facts:
    """What is known of a run's base model and rows.

    Args:
        shape: or why it is not known.
        base_bytes: to download; 0 where nothing is, None where nobody knows.
        train: or why it is not known.
        held_out: of a file of its own.
    """

    shape: Shape | str
    base_bytes: int | None
    train: Lengths | str
    held_out: Lengths | None = None


class OfferQuote(Part):
    """What the run takes on one offer. `offer` is None for this machine."""

    offer: Offer | None
    memory: Memory
    seconds: Range | None = None
    """None where it is not known; `unknown` says why."""
    usd: Range | None = None
    tokens_per_second: float | None = None
    items: tuple[Item, ...] = ()
    interruptions: float = 0.0
    """Expected number."""
    save_every_seconds: float | None = None
    unknown: str = ""


class Quote(Part):
    """What a run will take, offer by offer in the plan's order; the first is the one chosen."""

    offers: tuple[OfferQuote, ...]
    work: Work | None
    parameters: int | None = None
    """Of the base model."""
    unknown: str = ""
    """Why there is no more to say; empty where there is."""

    @property
    def chosen(self) -> OfferQuote:
        return self.offers[0]


def make_quote(recipe: Recipe, facts: Facts, offers: Sequence[Offer | None], *, threads: int = 1) -> Quote:
    """The quote of a recipe.

    Args:
        offers: in the plan's order, at least one; None is this machine, without a GPU.
        threads: of this machine, where the job runs on it.
    """
    if isinstance(facts.train, str) or isinstance(facts.shape, str):
        why = facts.train if isinstance(facts.train, str) else str(facts.shape)
        nothing = Memory(verdict="unknown", basis=why)
        known = None if isinstance(facts.train, str) else work_of(recipe, facts.train, facts.held_out)
        told = tuple(OfferQuote(offer=offer, memory=nothing, unknown=why) for offer in offers)
        return Quote(offers=told, work=known, unknown=why)
    work, shape = work_of(recipe, facts.train, facts.held_out), facts.shape
    found = tuple(_quote_offer(recipe, shape, facts.base_bytes, work, offer, threads) for offer in offers)
    return Quote(offers=found, work=work, parameters=shape.parameters)


def refusal(quote: Quote, *, max_usd: float | None = None) -> BadInput | None:
    """Why the chosen offer should not be bought; None where nothing speaks against it.

    Args:
        max_usd: what the person allows; None for no limit.
    """
    chosen = quote.chosen
    memory = chosen.memory
    if memory.verdict == "does not fit" and memory.gib is not None and memory.of_gib is not None and chosen.offer:
        if not memory.is_short_of_gpu:
            return BadInput(
                f"it does not fit on {chosen.offer.instance_type or chosen.offer.infra}: {memory.host_gib:.1f} GiB of "
                f"inputs wait in the machine's own memory, beside the GPU's, and it has {memory.host_of_gib:.0f}",
                hint="any of: " + "; ".join((*memory.fixes, "--anyway to try it nevertheless")),
            )
        return BadInput(
            f"it does not fit on {chosen.offer.gpu}: it needs about {memory.gib:.1f} GiB of GPU memory, and there are "
            f"{memory.of_gib:.1f}; the largest: {', '.join(f'{t.name} {t.gib:.1f}' for t in memory.largest)}",
            hint="any of: " + "; ".join((*memory.fixes, *_where_it_fits(quote), "--anyway to try it nevertheless")),
        )
    if max_usd is not None and chosen.usd is not None and max_usd < chosen.usd.p50:
        return BadInput(
            f"${max_usd:.2f} will not do: the run is expected to cost ${chosen.usd.p50:.2f} (p50), and up to "
            f"${chosen.usd.p90:.2f} (p90)",
            hint="any of: " + "; ".join((*_within(quote, max_usd, chosen), "--anyway to start nevertheless")),
        )
    return None


def _where_it_fits(quote: Quote) -> Iterable[str]:
    for other in quote.offers[1:]:
        if other.memory.verdict == "fits" and other.offer is not None:
            yield f"--gpu {other.offer.gpu} ({other.memory.of_gib:.0f} GiB)"
            return


def _within(quote: Quote, max_usd: float, chosen: OfferQuote) -> Iterable[str]:
    assert chosen.usd is not None  # noqa: S101 - the caller looked
    yield f"--budget {math.ceil(chosen.usd.p90 * 100) / 100:.2f}"
    for other in quote.offers[1:]:
        if other.usd is not None and other.usd.p50 <= max_usd and other.offer is not None:
            yield f"{other.offer.gpu} {other.offer.kind} at {other.offer.infra} (${other.usd.p50:.2f})"
            return
    fixed = sum(item.usd.p50 for item in chosen.items if item.usd is not None and item.name in ONCE)
    share = (max_usd - fixed) / max(chosen.usd.p50 - fixed, 1e-9)
    if share > 0:
        yield f"{share:.0%} of the rows or of the epochs"


def _quote_offer(
    recipe: Recipe, shape: Shape, base_bytes: int | None, work: Work, offer: Offer | None, threads: int
) -> OfferQuote:
    if offer is None:
        memory = Memory(verdict="unknown", basis="this machine's memory is not looked at")
        speed = pace_on_cpu(shape, recipe, work.batch, threads=threads)
    else:
        card = card_of(offer.gpu, offer.cloud)
        if isinstance(card, str):
            return OfferQuote(offer=offer, memory=Memory(verdict="unknown", basis=card), unknown=card)
        memory = memory_of(shape, recipe, card, longest=work.longest, host_of_gib=offer.memory_gib)
        speed = pace(shape, recipe, card, work.batch, longest=work.longest)
    minutes = recipe.checkpoints.minutes
    every, blocking = saving(shape.adapter_parameters(recipe.lora), None if minutes == "auto" else minutes)
    weights = base_bytes if base_bytes is not None else 2 * shape.parameters
    base, cloud = recipe.base_model, offer.cloud if offer else "local"
    fetched = base.is_on_hub or base.is_in_bucket
    start = startup_of(cloud, weights, fetched=fetched, guessed=base_bytes is None)
    rate = rate_of(cloud, spot=offer is not None and offer.spot)
    bill = Bill(recipe, work, speed, start, rate, every, blocking, offer)
    total, interrupted, expected = bill.totals()
    price = bill.price
    return OfferQuote(
        offer=offer,
        memory=memory,
        seconds=total,
        usd=dollars(total, price),
        tokens_per_second=work.batch_tokens * recipe.training.gradient_accumulation / speed.step,
        items=tuple(
            Item(name=name, seconds=seconds, usd=dollars(seconds, price), basis=basis)
            for name, seconds, basis in (*bill.lines(), (INTERRUPTED, interrupted, bill.why_interrupted(expected)))
            if seconds.p90 >= WORTH_A_LINE
        ),
        interruptions=expected,
        save_every_seconds=every,
    )
