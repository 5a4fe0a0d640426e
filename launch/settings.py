"""The person's defaults: where ftjob keeps its state on this machine, and where runs land unless told otherwise."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError

from job.contract.errors import BadInput
from job.storage import open_store
from job.storage.s3_account import ENDPOINT, PATH_STYLE, PROFILE, REGION, STANDS_FOR
from launch.home import from_home

HOME_VARIABLE: Final = "FTJOB_HOME"
CACHE_VARIABLE: Final = "FTJOB_CACHE"
FILE_NAME: Final = "settings.toml"


class S3Settings(BaseModel):
    """[s3] of settings.toml: the server of this person's buckets. What is absent is as AWS's own tools have it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    endpoint: str | None = Field(
        default=None,
        pattern=r"^https?://[^/\s@]+/?$",
        description='Url of the server: "https://minio.example.com:9000".',
    )
    region: str | None = Field(default=None, pattern=r"^[a-z0-9-]+$", description='"eu-central-1".')
    profile: str | None = Field(default=None, min_length=1, description="Of ~/.aws/config and ~/.aws/credentials.")
    path_style: StrictBool | None = Field(
        default=None,
        description="Name the bucket in the path of the url, not in the host. Absent: so for every server but AWS's.",
    )


class Settings(BaseModel):
    """What holds for every command of this person on this machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    home: Path
    """Absolute folder of ftjob's own state."""
    bucket: str
    """Uri of the bucket that runs land in when neither the recipe nor the command names one."""
    threads: int = 1
    """CPU threads of local runs."""
    image: str | None = None
    """name@sha256:... that machines of one's own run."""
    inside_image: str | None = None
    """The same for clouds that rent containers."""
    slurm_python: str | None = None
    """Path of the prepared Python on the cluster."""
    slurm_secrets: bool = True
    """Whether a job on Slurm is sent this machine's credentials."""
    usd_per_hour: dict[str, float] = Field(default_factory=dict)
    """What an hour of one's own machines costs: "local", "slurm", "kubernetes"."""
    s3: S3Settings = S3Settings()
    cache_folder: Path | None = None
    """Absolute; None for a folder in `home`."""

    @property
    def cache(self) -> Path:
        """Folder of what need not be fetched or computed twice: it may be emptied at any time."""
        return self.cache_folder or self.home / "cache"

    def s3_variables(self, variables: Mapping[str, str]) -> dict[str, str]:
        """The environment variables that say what [s3] says; without those that something in `variables` overrules.

        They are ftjob's own (FTJOB_S3_*), because AWS_* would also lead the purchase of machines to that server.
        """
        style = None if self.s3.path_style is None else str(self.s3.path_style).lower()
        told = {ENDPOINT: self.s3.endpoint, REGION: self.s3.region, PROFILE: self.s3.profile, PATH_STYLE: style}
        return {
            name: value
            for name, value in told.items()
            if value is not None and not any(variables.get(other) for other in (name, *STANDS_FOR[name]))
        }


class SettingsFile(BaseModel):
    """settings.toml: every key may be absent."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bucket: str | None = Field(default=None, min_length=1, description="s3://bucket/prefix or file:///folder.")
    threads: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="CPU threads of local runs. A run keeps the number it began with: CPU sums depend on it.",
    )
    image: str | None = Field(default=None, min_length=1, description="Image of the job, by digest: name@sha256:...")
    inside_image: str | None = Field(
        default=None, min_length=1, description="The same, of the target `inside`: for RunPod and Kubernetes."
    )
    slurm_python: str | None = Field(
        default=None, pattern="^/", description="Python on the Slurm cluster that has ftjob[job] installed."
    )
    slurm_secrets: StrictBool = Field(
        default=True, description="Send this machine's credentials to jobs on Slurm, where other users may see them."
    )
    usd_per_hour: dict[Literal["local", "slurm", "kubernetes"], Annotated[float, Field(gt=0, allow_inf_nan=False)]] = (
        Field(
            default_factory=dict, description="Dollars an hour of one's own machines, so that a budget can bound them."
        )
    )
    s3: S3Settings = S3Settings()


def read_settings(variables: Mapping[str, str]) -> Settings:
    """The settings of this person, from the environment and `settings.toml`.

    Raises:
        BadInput: FTJOB_HOME is no folder, or the file is unreadable, not TOML, or has an unknown or unusable key.
    """
    home = _home(variables)
    if home.exists() and not home.is_dir():
        raise BadInput(f"{HOME_VARIABLE} {home} is not a folder", hint=f"set {HOME_VARIABLE} to a folder")
    file = _read_file(home / FILE_NAME)
    bucket = file.bucket or (home / "bucket").as_uri()
    told = variables.get(CACHE_VARIABLE)
    return Settings(
        home=home,
        bucket=str(open_store(bucket).uri),
        cache_folder=from_home(told).absolute() if told else None,
        **file.model_dump(exclude={"bucket"}),
    )


def ftjob_version() -> str:
    """The version of ftjob that runs."""
    try:
        return version("ftjob")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "0+unknown"


def _home(variables: Mapping[str, str]) -> Path:
    if told := variables.get(HOME_VARIABLE):
        return from_home(told).absolute()
    import platformdirs

    return Path(platformdirs.user_data_dir("ftjob")).absolute()


def _read_file(path: Path) -> SettingsFile:
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return SettingsFile()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"settings {path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise BadInput(
            f"settings {path} is not TOML: {error}", hint='for example: bucket = "s3://mine/ftjob"'
        ) from error
    try:
        file = SettingsFile.model_validate(data)
        if file.bucket is not None:
            open_store(file.bucket)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        known = ", ".join(S3Settings.model_fields if first["loc"][:1] == ("s3",) else SettingsFile.model_fields)
        raise BadInput(f"settings {path}: {key}: {first['msg']}", hint=f"keys are: {known}") from error
    except BadInput as error:
        raise BadInput(f"settings {path}: bucket: {error.message}", hint=error.hint) from error
    return file
