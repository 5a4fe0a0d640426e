"""What a person asks for: the options of `plan` and `launch`, as a value."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launch.backend import DEFAULT_MAX_RESTARTS
from launch.cloud import CloudBackend
from launch.local import LocalBackend
from launch.prices import Policy


@dataclass(frozen=True)
class Wish:
    """What a person asks for."""

    recipe: Path | None = None
    run_id: str | None = None
    """A run to go on with."""
    name: str | None = None
    """Of a new run."""
    infra: str | None = None
    gpu: str | None = None
    region: str | None = None
    policy: Policy = Policy.SPOT
    image: str | None = None
    budget: str | None = None
    """Dollars: "40", or "+20"."""
    by: str | None = None
    bucket: str | None = None
    anyway: bool = False
    """Launch although the quote speaks against it."""
    max_restarts: int = DEFAULT_MAX_RESTARTS

    @property
    def backend(self) -> str:
        """This machine, unless something else is named or a GPU is to be bought."""
        local = self.infra == LocalBackend.name or (self.infra is None and self.gpu is None)
        return LocalBackend.name if local else CloudBackend.name

    @property
    def clouds(self) -> tuple[str, ...]:
        if self.infra is None or self.backend == LocalBackend.name:
            return ()
        return tuple(dict.fromkeys(part.strip().lower() for part in self.infra.split(",") if part.strip()))
