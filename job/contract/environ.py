"""The variables a launcher sets for the job. Names and meaning here; nobody else reads FTJOB_* in the job,
but for FTJOB_S3_* (job/storage/s3_account.py)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from job.contract.errors import BadInput
from job.contract.layout import Uri, check_run_id

PREFIX: Final = "FTJOB_"


class JobEnviron(BaseModel):
    """What the job is told. Field `run_id` travels as FTJOB_RUN_ID, and so on."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    run_id: str
    bucket: Uri
    workdir: str = Field(description="Local folder of the run: spool of checkpoints, caches. Survives on one machine.")
    heartbeat_seconds: float = Field(default=15.0, gt=0, description="Longest silence of a live attempt.")
    grace_seconds: float = Field(
        default=25.0, gt=0, description="From a notice to the kill: GCP gives 30 s, SkyPilot 30 s, AWS 120 s."
    )
    final_retry_seconds: float = Field(
        default=300.0, gt=0, description="How long the end of a run waits for a store that is out of reach."
    )
    threads: int = Field(
        default=1,
        ge=1,
        description="CPU threads of torch. Sums depend on it, so a run keeps one number for life.",
    )
    last_attempt: int | None = Field(
        default=None,
        ge=1,
        description="Number of the last attempt that may train, for backends that restart for ever.",
    )
    mounts: dict[str, str] = Field(
        default_factory=dict, description="Local path of each dataset that is mounted, by its uri; JSON."
    )
    submission: int = Field(default=0, ge=0, description="Number of the submission that started the job; 0 for none.")
    gpu: bool = Field(default=False, description="A GPU was paid for: do not train without one.")
    image_digest: str | None = None
    code_commit: str | None = Field(
        default=None, description="Of the checkout that the image was built from; set in the image. For the passport."
    )
    git_commit: str | None = Field(default=None, description="Of the folder the recipe came from; for the passport.")
    infra: dict[str, str] = Field(default_factory=dict, description="Where the attempt runs, for the records; JSON.")

    @classmethod
    def read(cls, variables: Mapping[str, str]) -> Self:
        """What these variables say.

        Raises:
            BadInput: one is missing or unusable, by its name.
        """
        data: dict[str, object] = {
            field: variables[name]
            for field in cls.model_fields
            if (name := PREFIX + field.upper()) in variables and variables[name] != ""
        }
        for field in ("infra", "mounts"):
            if field in data:
                data[field] = _parse_json(str(data[field]), PREFIX + field.upper())
        try:
            environ = cls.model_validate(data)
            check_run_id(environ.run_id)
        except ValidationError as error:
            first = error.errors()[0]
            name = PREFIX + str(first["loc"][0]).upper()
            why = "is not set" if first["type"] == "missing" else f"cannot be used: {first['msg']}"
            raise BadInput(f"environment variable {name} {why}", hint="the job is started by `ftjob launch`") from error
        except BadInput as error:
            raise BadInput(f"environment variable {PREFIX}RUN_ID: {error.message}", hint=error.hint) from error
        return environ.model_copy(update={"infra": environ.infra | place(variables)})

    def variables(self) -> dict[str, str]:
        """The same as environment variables; absent values are left out."""
        dumped = self.model_dump(mode="json", exclude_none=True)
        return {
            PREFIX + field.upper(): json.dumps(value) if isinstance(value, dict) else str(value)
            for field, value in dumped.items()
        }


def place(variables: Mapping[str, str]) -> dict[str, str]:
    """Where SkyPilot says this machine is: cluster, cloud, region, zone; whatever of it is known.

    Source: SkyPilot's documentation, "Environment variables": SKYPILOT_CLUSTER_INFO is a JSON object. A strange value
    is no reason to fail: it is for the records.
    """
    try:
        told = json.loads(variables.get("SKYPILOT_CLUSTER_INFO", "{}"))
    except (ValueError, RecursionError):
        return {}
    if not isinstance(told, dict):
        return {}
    names = {"cluster_name": "cluster", "cloud": "cloud", "region": "region", "zone": "zone"}
    return {ours: str(told[theirs]) for theirs, ours in names.items() if told.get(theirs)}


def _parse_json(text: str, name: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also for numbers of more than 4300 digits
        raise BadInput(f"environment variable {name} is not JSON: {error}") from error
