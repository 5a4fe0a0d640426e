"""A receipt as text: one table of the attempts, one of what was paid for, and a line that says it all."""

from __future__ import annotations

from datetime import UTC
from typing import Final

from rich.console import Group
from rich.table import Table
from rich.text import Text

from job.contract.receipt import KINDS, Receipt, ReceiptRow
from job.contract.submission import OWN
from launch.render import duration

_UNKNOWN: Final = "unknown"
_NAMES: Final = ("WHERE", "GPU", "KIND", "STARTED (UTC)", "ENDED")
_WORTH_SAYING: Final = 0.005
"""Shares below it would be told as 0%."""


def receipt_table(receipt: Receipt) -> Group:
    """The whole receipt: both tables and the line."""
    if not receipt.rows:
        return Group(Text(summary_line(receipt)))
    blank = Text("")
    return Group(attempts_table(receipt), blank, kinds_table(receipt), blank, Text(summary_line(receipt)))


def attempts_table(receipt: Receipt) -> Table:
    """One line an attempt: where, at what price, for how long, and how it ended."""
    table = _table("ATTEMPT", "WHERE", "GPU", "KIND", "$/H", "STARTED (UTC)", "TIME", "ENDED", "COST")
    for row in receipt.rows:
        table.add_row(
            str(row.attempt),
            Text(_where(row)),
            Text(f"{row.gpu}:{row.gpus}" if row.gpu else _UNKNOWN),
            "" if row.spot is None else "your own" if row.cloud in OWN else "spot" if row.spot else "on demand",
            _UNKNOWN if row.usd_per_hour is None else f"{row.usd_per_hour:.2f}",
            f"{row.started_at.astimezone(UTC):%m-%d %H:%M}",
            duration(row.seconds),
            Text(row.ended),
            _dollars(row.cents),
        )
    table.add_section()
    table.add_row("total", "", "", "", "", "", duration(receipt.seconds), "", _dollars(receipt.cents))
    return table


def kinds_table(receipt: Receipt) -> Table:
    """One line an attempt: what each kind of its seconds cost; where a price is unknown, how long they were."""
    by_time = receipt.cents is None
    table = _table("TIME" if by_time else "$", *(kind.upper() for kind in KINDS), "TOTAL")

    def add(name: str, of: ReceiptRow | Receipt) -> None:
        if by_time or of.cents_by is None:
            table.add_row(name, *(duration(getattr(of.seconds_by, kind)) for kind in KINDS), duration(of.seconds))
        else:
            table.add_row(name, *(_dollars(getattr(of.cents_by, kind)) for kind in KINDS), _dollars(of.cents))

    for row in receipt.rows:
        add(str(row.attempt), row)
    table.add_section()
    add("total", receipt)
    return table


def summary_line(receipt: Receipt) -> str:
    """ "spent $12.34 of $40.00 on 3 attempts, 8:12:05 in all: 91% useful; on demand would have cost about $24"."""
    if not receipt.rows:
        return "no attempt has begun: nothing is spent"
    number = len(receipt.rows)
    attempts = f"{number} attempt{'' if number == 1 else 's'}, {duration(receipt.seconds)} in all: {_shares(receipt)}"
    if receipt.cents is None:
        unknown = [str(row.attempt) for row in receipt.rows if row.usd_per_hour is None]
        which = f"attempt{'' if len(unknown) == 1 else 's'} {', '.join(unknown)}"
        return f"{attempts}; the price of {which} is unknown, so what was spent is too"
    limit = "" if receipt.max_usd is None else f" of ${receipt.max_usd:.2f}"
    return f"spent ${_dollars(receipt.cents)}{limit} on {attempts}{_on_demand(receipt)}"


def _shares(receipt: Receipt) -> str:
    """Of the time, the useful first."""
    if receipt.seconds <= 0:
        return "no time has passed"
    shares = {kind: getattr(receipt.seconds_by, kind) / receipt.seconds for kind in KINDS}
    told = [f"{share:.0%} {kind}" for kind, share in shares.items() if share >= _WORTH_SAYING or kind == "useful"]
    return ", ".join(told)


def _on_demand(receipt: Receipt) -> str:
    if not any(row.spot for row in receipt.rows):
        return ""
    cents = receipt.on_demand_cents
    if cents is None:
        return "; what on demand would have cost is unknown"
    about = f"{cents / 100:,.0f}" if cents >= 1000 else _dollars(cents)
    return f"; on demand would have cost about ${about}"


def _where(row: ReceiptRow) -> str:
    if row.cloud is None:
        return _UNKNOWN
    return f"{row.cloud}/{row.region}" if row.region else row.cloud


def _dollars(cents: int | None) -> str:
    return _UNKNOWN if cents is None else f"{cents // 100:,}.{cents % 100:02}"


def _table(first: str, *columns: str) -> Table:
    """Names to the left; what is compared to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, no_wrap=True)
    for column in columns:
        if column in _NAMES:
            table.add_column(column, overflow="fold")
        else:
            table.add_column(column, justify="right", no_wrap=True)
    return table
