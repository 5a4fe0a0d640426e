"""A quote as text, in the manner of a plan's."""

from __future__ import annotations

from typing import Final

from launch.bill import Item, Range
from launch.memory import Memory
from launch.quote import OfferQuote, Quote

_SHOWN: Final = 4
"""Other offers that are listed."""


def quote_lines(quote: Quote) -> list[str]:
    """What a run is expected to take: a fact a line, the basis of each beside it."""
    chosen = quote.chosen
    lines = []
    if quote.work is not None:
        work = quote.work
        cut = f", {work.cut_share:.0%} of the rows are cut" if work.cut_share else ""
        lines.append(f"tokens   {work.tokens_per_epoch:,} an epoch, {work.steps:,} steps{cut} ({work.basis})")
    if chosen.unknown:
        return [*lines, f"costs    not known: {chosen.unknown}"]
    lines.append(f"costs    {amount(chosen)}" if chosen.usd else f"takes    {amount(chosen)}")
    lines += [f"         {_item(item)}" for item in chosen.items]
    others = [other for other in quote.offers[1:] if other.seconds is not None and other.offer is not None]
    for other in others[:_SHOWN]:
        assert other.offer is not None  # noqa: S101 - chosen above
        memory = "" if other.memory.verdict == "fits" else f", memory: {other.memory.verdict}"
        lines.append(f"  else   {amount(other)} on {other.offer.gpu} {other.offer.kind} {other.offer.infra}{memory}")
    if chosen.memory.gib is not None:
        lines += _memory(chosen.memory)
    return lines


def amount(offer: OfferQuote) -> str:
    """What an offer costs and takes, both halves of it; empty where it is not known."""
    if offer.seconds is None:
        return ""
    seconds = f"{duration(offer.seconds.p50)} (p50) to {duration(offer.seconds.p90)} (p90)"
    if offer.usd is None:
        return seconds
    times = f"{duration(offer.seconds.p50)} to {duration(offer.seconds.p90)}"
    return f"${offer.usd.p50:.2f} (p50) to ${offer.usd.p90:.2f} (p90), {times}"


def duration(seconds: float) -> str:
    """ "14 s", "3:05 min", "2:05 h": as fine as matters."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        whole = round(seconds)
        return f"{whole // 60}:{whole % 60:02} min"
    return f"{minutes // 60}:{minutes % 60:02} h"


def _item(item: Item) -> str:
    dollars = f"${item.usd.p50:.2f} " if item.usd else ""
    return f"{item.name} {dollars}{_span(item.seconds)}: {item.basis}"


def _span(seconds: Range) -> str:
    low, high = duration(seconds.p50), duration(seconds.p90)
    return low if low == high else f"{low} to {high}"


def _memory(memory: Memory) -> list[str]:
    largest = ", ".join(f"{term.name} {term.gib:.1f}" for term in memory.largest)
    lines = [f"memory   {memory.gib:.1f} of {memory.of_gib:.1f} GiB: {memory.verdict}; largest: {largest}"]
    lines.append(f"         {memory.basis}")
    return lines + [f"         fits with {fix}" for fix in memory.fixes]
