"""A receipt as people read it."""

from __future__ import annotations

import io
import json
from typing import Any, Final

from rich.console import Console

from job.contract.ledger import Charge, Ledger
from job.contract.receipt import KINDS, Receipt, receipt_of
from job.contract.submission import Offer
from launch.render import as_json
from launch.render_receipt import receipt_table, summary_line
from tests.contract.examples import at

SPOT: Final = Offer(
    cloud="aws",
    region="us-east-1",
    gpu="A100-80GB",
    gpus=8,
    spot=True,
    usd_per_hour=12.34,
    on_demand_usd_per_hour=32.77,
)
DEAR: Final = SPOT.model_copy(
    update={"cloud": "gcp", "region": "asia-northeast-1", "spot": False, "usd_per_hour": 32.0}
)


def charge(attempt: int, offer: Offer | None, ended: str = "killed", **seconds: float) -> Charge:
    return Charge(
        attempt=attempt,
        offer=offer,
        usd_per_hour=offer.usd_per_hour if offer else None,
        started_at=at(attempt * 7200),
        ended=ended,
        **{f"{kind}_seconds": seconds.get(kind, 0.0) for kind in KINDS},
    )


FIRST: Final = charge(1, SPOT, provisioning=300, loading=60, useful=3000, repeated=240)
LAST: Final = charge(2, DEAR, "out_of_budget", provisioning=360, loading=60, useful=1800, other=120)


def receipt(*charges: Charge, max_usd: float | None = 40.0) -> Receipt:
    return receipt_of(Ledger(charges=charges), max_usd=max_usd)


def shown(told: Receipt, width: int = 100) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width).print(receipt_table(told))
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_the_tables_say_where_for_how_long_and_for_what() -> None:
    assert shown(receipt(FIRST, LAST), width=160) == [
        "ATTEMPT  WHERE                 GPU          KIND         $/H  STARTED (UTC)     TIME  ENDED           COST",
        "1        aws/us-east-1         A100-80GB:8  spot       12.34  01-02 05:04    1:00:00  killed         12.34",
        "2        gcp/asia-northeast-1  A100-80GB:8  on demand  32.00  01-02 07:04      39:00  out_of_budget  20.80",
        "total                                                                        1:39:00                 33.14",
        "",
        "$      USEFUL  REPEATED  PROVISIONING  IDLE  LOADING  OTHER  TOTAL",
        "1       10.28      0.82          1.03  0.00     0.21   0.00  12.34",
        "2       16.00      0.00          3.20  0.00     0.53   1.07  20.80",
        "total   26.28      0.82          4.23  0.00     0.74   1.07  33.14",
        "",
        "spent $33.14 of $40.00 on 2 attempts, 1:39:00 in all: 81% useful, 4% repeated, 11% provisioning, 2% loading, "
        "2% other; on demand would have cost about $48",
    ]


def test_a_hundred_columns_are_enough() -> None:
    lines = shown(receipt(FIRST, LAST))
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    assert "…" not in text
    for told in ("aws/us-east-1", "12.34", "01-02 05:04", "1:00:00", "20.80", "33.14"):
        assert told in text


def test_an_unknown_price_is_named_and_time_is_told_instead_of_money() -> None:
    lines = shown(receipt(FIRST, charge(2, None, useful=60), charge(3, None, useful=60)), width=160)
    assert lines[2].split()[:3] == ["2", "unknown", "unknown"]
    assert lines[4].split()[-1] == "unknown"
    assert lines[6].split()[0] == "TIME"
    assert lines[7].split() == ["1", "50:00", "4:00", "5:00", "0:00", "1:00", "0:00", "1:00:00"]
    assert lines[-1].endswith("the price of attempts 2, 3 is unknown, so what was spent is too")


def test_the_line_says_nothing_of_a_ceiling_or_of_on_demand_where_there_is_none() -> None:
    assert summary_line(receipt(LAST, max_usd=None)) == (
        "spent $20.80 on 1 attempt, 39:00 in all: 77% useful, 15% provisioning, 3% loading, 5% other"
    )


def test_an_on_demand_price_that_nobody_knows_is_said_to_be_unknown() -> None:
    alone = SPOT.model_copy(update={"on_demand_usd_per_hour": None})
    assert summary_line(receipt(charge(1, alone, useful=60))).endswith("; what on demand would have cost is unknown")


def test_before_the_first_attempt_nothing_is_spent() -> None:
    assert shown(receipt()) == ["no attempt has begun: nothing is spent"]


def test_an_attempt_of_no_seconds_is_no_division_by_zero() -> None:
    assert summary_line(receipt(charge(1, SPOT))).startswith("spent $0.00 of $40.00 on 1 attempt, 0:00 in all: no time")


def test_names_from_records_are_shown_as_they_are() -> None:
    odd = SPOT.model_copy(update={"region": "[red]x", "gpu": "[bold]G"})
    text = "\n".join(shown(receipt(charge(1, odd, "[/]", useful=60)), width=160))
    for told in ("aws/[red]x", "[bold]G:8", "[/]"):
        assert told in text


def test_as_json_it_is_the_receipt() -> None:
    told: Any = json.loads(as_json(receipt(FIRST, LAST)))
    assert told["cents"] == 3314
    assert sum(row["cents"] for row in told["rows"]) == 3314
    assert told["rows"][0]["cents_by"]["useful"] == 1028
