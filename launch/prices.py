"""Offers: who sells the GPU, where, and for how much. Pure; the rows come from SkyPilot's catalog."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from job.contract.errors import BadInput
from job.contract.records import Part
from job.contract.submission import Offer

_GPU = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)(?::([1-9][0-9]{0,2}))?")


class Policy(StrEnum):
    """Which prices may be taken."""

    SPOT = "spot"
    """Spot, where it is cheaper than on demand anywhere; on demand, where it is not."""
    ON_DEMAND = "on-demand"
    SPOT_THEN_ON_DEMAND = "spot-then-on-demand"
    """Spot first; on demand when no spot machine can be had."""


@dataclass(frozen=True)
class Gpu:
    """A machine's GPUs, as a person asks for them."""

    name: str
    count: int = 1

    def __str__(self) -> str:
        return f"{self.name}:{self.count}"


@dataclass(frozen=True)
class Listed:
    """One row of the catalog: an instance type in a region. Dollars an hour, of the whole machine."""

    cloud: str
    region: str
    instance_type: str
    gpu: str
    gpus: float
    on_demand: float | None
    spot: float | None
    memory_gib: float | None = None
    """Of the machine, beside its GPUs'; None where the catalog does not say."""


class Choice(Part):
    """What is bought: the first offer, and then the others in this order."""

    order: tuple[Offer, ...]
    why: str
    notes: tuple[str, ...] = ()


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """ "H100,A100-80GB:8" -> what was asked for, any of which will do.

    Raises:
        BadInput: it cannot be read.
    """
    found = []
    for part in text.split(","):
        match = _GPU.fullmatch(part.strip())
        if match is None:
            raise BadInput(
                f"--gpu {text!r} cannot be read", hint="for example: --gpu H100, or --gpu H100:1,A100-80GB:8"
            )
        found.append(Gpu(match[1], int(match[2] or 1)))
    return tuple(dict.fromkeys(found))


def offers_of(listed: Iterable[Listed], gpus: Sequence[Gpu], *, region: str | None = None) -> tuple[Offer, ...]:
    """Every price at which one of the GPUs is sold, cheapest first. Names are compared without regard to case.

    A row with two prices is two offers; one without a price (a cloud that lists none) is no offer.
    """
    wanted = {(gpu.name.lower(), gpu.count) for gpu in gpus}
    offers = [
        Offer(
            cloud=row.cloud.lower(),
            region=row.region,
            instance_type=row.instance_type,
            gpu=row.gpu,
            gpus=int(row.gpus),
            spot=spot,
            usd_per_hour=price,
            on_demand_usd_per_hour=row.on_demand,
            memory_gib=row.memory_gib,
        )
        for row in listed
        if (row.gpu.lower(), row.gpus) in wanted and region in (None, row.region)
        for spot, price in ((False, row.on_demand), (True, row.spot))
        if price is not None
    ]
    cheapest: dict[tuple[object, ...], Offer] = {}
    for offer in sorted(offers, key=_by_price):
        # A place and a kind is one offer: of its instance types SkyPilot takes the cheapest by itself.
        cheapest.setdefault((offer.cloud, offer.region, offer.gpu, offer.gpus, offer.spot), offer)
    return tuple(cheapest.values())


def choose(offers: Sequence[Offer], policy: Policy) -> Choice:
    """Which offers are taken, and in which order.

    Spot is held against the cheapest on-demand offer anywhere: a spot machine that costs as much as one that is never
    taken away is no bargain. So listed for Azure's H100, RunPod, and some A100 of GCP (SkyPilot's catalog, 2026-11).

    Raises:
        BadInput: nothing is left.
    """
    spot = [offer for offer in sorted(offers, key=_by_price) if offer.spot]
    on_demand = [offer for offer in sorted(offers, key=_by_price) if not offer.spot]
    if policy is Policy.ON_DEMAND:
        if not on_demand:
            raise BadInput("nobody sells this on demand", hint="leave --no-spot out")
        return Choice(order=tuple(on_demand), why=f"the cheapest of {len(on_demand)} on-demand offers")
    ceiling = _price(on_demand[0]) if on_demand else float("inf")
    worth = [offer for offer in spot if _price(offer) < ceiling]
    notes = []
    if dear := len(spot) - len(worth):
        notes.append(
            f"{dear} of {len(spot)} spot offers are left out: they cost as much as {_named(on_demand[0])} or more"
        )
    if not worth:
        if not on_demand:
            raise BadInput("nobody sells this", hint="try another --gpu, --infra or --region")
        why = "no spot offer is cheaper than on demand" if spot else "nobody sells it as spot"
        return Choice(
            order=tuple(on_demand), why=f"{why}: the cheapest of {len(on_demand)} on-demand offers", notes=tuple(notes)
        )
    why = f"the cheapest of {len(worth)} spot offers"
    if on_demand:
        saved = 1 - _price(worth[0]) / ceiling
        why += f"; {saved:.0%} under the cheapest on-demand offer, {_named(on_demand[0])}"
    after = on_demand if policy is Policy.SPOT_THEN_ON_DEMAND else []
    return Choice(order=(*worth, *after), why=why, notes=tuple(notes))


def nobody_sells(gpus: Sequence[Gpu], listed: Sequence[Listed], *, where: str) -> BadInput:
    """The error for GPUs without any offer: says what comes nearest."""
    asked = ", ".join(map(str, gpus))
    counts = {
        row.gpu: sorted({int(other.gpus) for other in listed if other.gpu == row.gpu})
        for row in listed
        for gpu in gpus
        if row.gpu.lower() == gpu.name.lower()
    }
    if counts:
        sold = "; ".join(f"{name} by {', '.join(map(str, found))}" for name, found in counts.items())
        return BadInput(f"nobody sells {asked} ({where})", hint=f"sold there: {sold}")
    names = sorted({row.gpu for row in listed})
    by_lower = {name.lower(): name for name in names}
    near = [by_lower[n] for gpu in gpus for n in difflib.get_close_matches(gpu.name.lower(), by_lower, n=5, cutoff=0.5)]
    hint = f"did you mean {', '.join(dict.fromkeys(near))}?" if near else f"sold there: {', '.join(names)}"
    return BadInput(f"nobody sells {asked} ({where})", hint=hint)


def _price(offer: Offer) -> float:
    return 0.0 if offer.usd_per_hour is None else offer.usd_per_hour


def _by_price(offer: Offer) -> tuple[object, ...]:
    return (_price(offer), offer.cloud, offer.region or "", offer.gpu, offer.instance_type or "")


def _named(offer: Offer) -> str:
    return f"${_price(offer):.2f}/h on demand ({offer.infra})"
