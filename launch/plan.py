"""The Plan: what a launch is about to do, decided before anything happens. A value that can be printed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal

from pydantic import Field

from job.contract.budget import Budget
from job.contract.errors import BadInput
from job.contract.layout import Uri
from job.contract.recipe import TINY_MODEL, Recipe
from job.contract.records import DatasetDigest, Part, RunRecord, Sha256
from job.contract.submission import Offer, Way
from launch.quote import Quote
from launch.settings import Settings

GUARD_SECONDS: Final = 60
"""The job ends itself first."""
_FOR_EVER: Final = 1e9
"""Seconds: thirty years. A sum that nobody ever spends may pay for more of them than a number holds."""
LOCAL: Final = "local"
DATA: Final = "/ftjob-data"
"""Where the job finds what SkyPilot brought; sky/train.yaml leads there from ~/ftjob-data."""
COPY_BYTES: Final = 20 * 10**9
"""Up to this size a dataset is copied to the machine before the job starts: the job reads it twice (digest, rows), and
a mount would fetch it twice. Beyond, the copy would need a larger disk than the image and the weights do."""
USUAL_DISK_GB: Final = 256
"""SkyPilot's default disk_size."""
MOST_OFFERS: Final = 24
"""Offers that SkyPilot gets: enough to find capacity, few enough to be looked through."""

_WAYS: Final[Mapping[str, Way]] = {
    "slurm": Way.HOST,
    "kubernetes": Way.INSIDE,
    "runpod": Way.INSIDE,
    "vast": Way.INSIDE,
}
"""Clouds that give no machine to run a container on. All others do (SkyPilot's documentation, "Containers")."""
_DIGEST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]*@sha256:[0-9a-f]{64}")


class Place(Part):
    """An offer, and how the job runs there."""

    offer: Offer
    way: Way


class Mount(Part):
    """A dataset that SkyPilot puts on the GPU's machine, read-only."""

    uri: Uri
    number: int
    how: Literal["copy", "mount"]
    """The file, or the whole bucket that it is in."""

    @property
    def folder(self) -> str:
        """Relative to DATA."""
        return str(self.number)

    @property
    def source(self) -> str:
        """What SkyPilot brings."""
        return self.uri if self.how == "copy" else "/".join(self.uri.split("/")[:3])

    @property
    def file(self) -> str:
        """Where the dataset is then, relative to DATA."""
        return f"{self.folder}/{'rows.jsonl' if self.how == 'copy' else '/'.join(self.uri.split('/')[3:])}"


class Upload(Part):
    """A dataset of this machine that is put into the bucket first, under its digest."""

    source: Uri
    uri: Uri
    sha256: Sha256
    """Of the bytes that were checked."""


class Plan(Part):
    """A launch, before it happens."""

    run_id: str
    backend: str
    recipe: Recipe
    train: DatasetDigest
    held_out: DatasetDigest | None
    bucket: Uri
    places: tuple[Place, ...] = ()
    """The one chosen, then the fallbacks in order. None where the backend buys nothing."""
    why: str = ""
    notes: tuple[str, ...] = ()
    image: str | None = None
    inside_image: str | None = None
    python: str | None = None
    uploads: tuple[Upload, ...] = ()
    mounts: tuple[Mount, ...] = ()
    variables: dict[str, str] = Field(default_factory=dict)
    """Forwarded to the job; nothing secret."""
    secrets: tuple[str, ...] = ()
    """Names of the variables that hold secrets; their values are in no plan."""
    disk_gb: int | None = None
    budget: Budget = Budget()
    spent_usd: float = 0.0
    """Before this launch."""
    quote: Quote | None = None
    """None for a run that is taken up without its recipe's file."""
    max_restarts: int

    @classmethod
    def of(cls, run: RunRecord, *, bucket: Uri, backend: str, max_restarts: int, **bought: Any) -> Plan:
        """The plan of a run: with what is `bought` for it, or, without, one that buys nothing."""
        return cls(
            run_id=run.run_id,
            backend=backend,
            recipe=run.recipe,
            train=run.train,
            held_out=run.held_out,
            bucket=bucket,
            max_restarts=max_restarts,
            **bought,
        )

    @property
    def buys(self) -> bool:
        """Whether it uses machines other than this one."""
        return any(place.offer.cloud != LOCAL for place in self.places)

    @property
    def max_seconds(self) -> int | None:
        """No attempt can live longer on what is left of the budget, even at the lowest price; None without a budget.

        A guard for a job that cannot stop itself: the job's own ceiling comes before it.
        """
        prices = [offer.usd_per_hour for offer in self.offers if offer.usd_per_hour]
        if self.budget.max_usd is None or not prices:
            return None
        seconds = max(self.budget.max_usd - self.spent_usd, 0.0) / min(prices) * 3600
        return math.ceil(min(seconds, _FOR_EVER)) + GUARD_SECONDS

    @property
    def chosen(self) -> Offer | None:
        return self.places[0].offer if self.places else None

    @property
    def offers(self) -> tuple[Offer, ...]:
        return tuple(place.offer for place in self.places)


def way_of(cloud: str) -> Way:
    """How a job runs on a cloud."""
    return _WAYS.get(cloud, Way.DOCKER)


def check_image(image: str) -> str:
    """The image itself, if it is named by its digest. Raises BadInput: a tag can be moved to another image."""
    if not _DIGEST.fullmatch(image):
        raise BadInput(
            f"image {image!r} is not named by its digest",
            hint="name@sha256:...; `docker buildx imagetools inspect NAME` or `skopeo inspect docker://NAME` prints it",
        )
    return image


def usable(
    offers: Iterable[Offer], settings: Settings, *, image: str | None
) -> tuple[tuple[Offer, ...], tuple[str, ...]]:
    """The offers where the job can run with what the person has; and what was left out, and why.

    Raises:
        BadInput: none can be used.
    """
    has = {
        Way.DOCKER: (image, "an image: --image, or `image` in settings.toml"),
        Way.INSIDE: (settings.inside_image, "an image of the target `inside`: `inside_image` in settings.toml"),
        Way.HOST: (settings.slurm_python, "a prepared Python: `slurm_python` in settings.toml"),
    }
    found: list[Offer] = []
    missing: dict[str, str] = {}
    for offer in offers:
        given, what = has[way_of(offer.cloud)]
        if given:
            found.append(offer)
        else:
            missing.setdefault(offer.cloud, what)
    notes = tuple(f"{cloud} is left out: it needs {what}" for cloud, what in sorted(missing.items()))
    if not found:
        raise BadInput(f"no offer can be used: {'; '.join(notes)}", hint='see "The image" in the README')
    return tuple(found), notes


def affordable(offers: Sequence[Offer], budget: Budget) -> tuple[Offer, ...]:
    """The offers that cost no more an hour than the budget allows. Raises BadInput when all cost more."""
    most = budget.max_hourly_usd
    found = tuple(offer for offer in offers if most is None or (offer.usd_per_hour or 0.0) <= most)
    if not found:
        cheapest = min(offer.usd_per_hour or 0.0 for offer in offers)
        raise BadInput(
            f"the cheapest offer costs ${cheapest:.2f} an hour, and the budget allows ${most:.2f}",
            hint="raise budget.max_hourly_usd, or choose another --gpu",
        )
    return found


def check_priced(offers: Sequence[Offer], budget: Budget) -> None:
    """Refuse a ceiling in dollars over a machine whose price nobody knows.

    Raises:
        BadInput: names it.
    """
    unknown = next((offer for offer in offers if offer.usd_per_hour is None), None)
    if budget.max_usd is not None and unknown is not None:
        raise BadInput(
            f"the budget is ${budget.max_usd:.2f}, and nobody knows what an hour on {unknown.cloud} costs",
            hint=f"say so in settings.toml: [usd_per_hour] {unknown.cloud} = 2.50; or leave the budget out",
        )


def mounts_of(
    datasets: Iterable[DatasetDigest], places: Iterable[Place], *, custom_endpoint: bool
) -> tuple[Mount, ...]:
    """The datasets that SkyPilot is to bring. What it cannot, the job fetches itself.

    Args:
        custom_endpoint: SkyPilot mounts s3:// from AWS only.
    """
    if custom_endpoint or any(place.way is Way.HOST for place in places):
        return ()
    mounts = []
    for number, digest in enumerate(datasets):
        if not digest.uri.startswith("s3://"):
            continue
        how: Literal["copy", "mount"] = "copy" if digest.size <= COPY_BYTES else "mount"
        mounts.append(Mount(uri=Uri(digest.uri), number=number, how=how))
    return tuple(mounts)


def shares_files(clouds: Iterable[str]) -> bool:
    """Whether machines there may see this one's files: a Slurm cluster mostly has a file system of its own."""
    return set(clouds) == {"slurm"}


def check_reachable(run: RunRecord, bucket: str, clouds: Iterable[str]) -> None:
    """Refuse what another machine cannot read: files of this one.

    Raises:
        BadInput: names what is only here.
    """
    if shares_files(clouds):
        return
    only_here = [
        (name, uri)
        for name, uri in (
            ("dataset.train", run.train.uri),
            ("dataset.held_out", run.held_out.uri if run.held_out else ""),
            ("output.bucket", bucket),
        )
        if uri.startswith("file:")
    ]
    model = run.recipe.base_model.id
    if model != TINY_MODEL and (model.startswith(("/", "file:"))):
        only_here.append(("base_model.id", model))
    if only_here:
        name, uri = only_here[0]
        raise BadInput(
            f"{name} {uri} is on this machine, and a rented one cannot read it",
            hint="put it into a bucket (`aws s3 cp`), and name it s3://...",
        )


def disk_gb(base_bytes: int | None) -> int | None:
    """Disk that the machine needs, GB: 100 for system, image and checkpoints, and the weights with a tenth to spare.

    Weights of unknown size are taken for those of a 70B model in 16 bits, twice. None where SkyPilot's own 256 GB do,
    since not every cloud lets one choose.
    """
    needed = 100 + int((2 * 140 * 10**9 if base_bytes is None else base_bytes) * 1.1 / 10**9)
    return needed if needed > USUAL_DISK_GB else None
