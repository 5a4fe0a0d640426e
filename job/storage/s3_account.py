"""Whose S3 it is: server, region, profile, credentials. FTJOB_S3_* come first, then the places where AWS's tools look.

FTJOB_S3_* mean ftjob's buckets and nothing else. That is why the launcher passes its settings on by these names:
AWS_ENDPOINT_URL or AWS_PROFILE in its environment would also lead the purchases of machines to that server.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Final, Self
from urllib.parse import urlsplit

from job.contract.errors import BadInput
from job.storage.s3_errors import account_errors

if TYPE_CHECKING:
    from boto3.session import Session
    from botocore.config import Config
    from mypy_boto3_s3.client import S3Client

ENDPOINT: Final = "FTJOB_S3_ENDPOINT"
REGION: Final = "FTJOB_S3_REGION"
PROFILE: Final = "FTJOB_S3_PROFILE"
PATH_STYLE: Final = "FTJOB_S3_PATH_STYLE"

STANDS_FOR: Final = {
    ENDPOINT: ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    REGION: ("AWS_REGION", "AWS_DEFAULT_REGION"),
    PROFILE: ("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_ACCESS_KEY_ID"),
    PATH_STYLE: (),
}
"""The variables of AWS's tools that say the same, the first before the others. Keys say more than a profile's name."""

_ATTEMPTS: Final = 4
"""Of one request. The pauses between them are random, up to 1 + 2 + 4 = 7 s (botocore's "standard" mode)."""

_CONNECT_SECONDS: Final = 5
"""Four attempts at a host that does not answer: 20 s and the pauses. Whoever wants to wait longer calls again."""

_READ_SECONDS: Final = 30
"""Longest silence of a server that has taken a request."""

_TRUE: Final = frozenset({"true", "1", "yes", "on"})
_FALSE: Final = frozenset({"false", "0", "no", "off"})


@dataclass(frozen=True)
class S3Options:
    """What the environment says about ftjob's own buckets; None: whatever AWS's tools would take."""

    endpoint: str | None = None
    region: str | None = None
    profile: str | None = None
    path_style: bool | None = None

    @classmethod
    def read(cls, variables: Mapping[str, str]) -> Self:
        """From FTJOB_S3_*, and AWS_REGION, which AWS documents for all its tools and boto3 does not read.

        Raises:
            BadInput: FTJOB_S3_PATH_STYLE is neither true nor false.
        """
        style = variables.get(PATH_STYLE, "").lower()
        if style and style not in _TRUE | _FALSE:
            raise BadInput(f"environment variable {PATH_STYLE} is {style!r}", hint="it is true or false, or not set")
        return cls(
            endpoint=variables.get(ENDPOINT) or None,
            region=variables.get(REGION) or variables.get("AWS_REGION") or None,
            profile=variables.get(PROFILE) or None,
            path_style=style in _TRUE if style else None,
        )


@dataclass(frozen=True)
class Credentials:
    """AWS credentials as environment variables; none when there are none. They are never shown."""

    variables: dict[str, str] = field(default_factory=dict, repr=False)
    expires_at: datetime | None = None
    """In UTC; None for those that last, and where nobody says when they end."""

    @property
    def are_temporary(self) -> bool:
        """Whether they end some day, whether or not it is known when."""
        return "AWS_SESSION_TOKEN" in self.variables


def find_credentials() -> Credentials:
    """The credentials that boto3 finds here: variables, profile, single sign-on, or the machine's role.

    May ask the network (single sign-on, roles).

    Raises:
        AccessRefused: a profile that is named does not exist, or its credentials have expired.
    """
    with account_errors("S3"):
        found = _session(S3Options.read(os.environ)).get_credentials()
        if found is None:
            return Credentials()
        frozen = found.get_frozen_credentials()
    variables = {
        "AWS_ACCESS_KEY_ID": frozen.access_key,
        "AWS_SECRET_ACCESS_KEY": frozen.secret_key,
        "AWS_SESSION_TOKEN": frozen.token,
    }
    # botocore knows the end of those it can renew, and has no public name for it.
    expires_at: datetime | None = getattr(found, "_expiry_time", None)
    return Credentials({name: value for name, value in variables.items() if value}, expires_at)


def effective_variables() -> dict[str, str]:
    """FTJOB_S3_* that make another machine use the same server, region and style as this one. Nothing secret.

    Raises:
        AccessRefused: a profile that is named does not exist.
        BadInput: the endpoint is not a url.
    """
    options = S3Options.read(os.environ)
    with account_errors("S3"):
        client = _client(_session(options), options)
    told = options.endpoint or next((os.environ[name] for name in STANDS_FOR[ENDPOINT] if os.environ.get(name)), None)
    server = client.meta.endpoint_url
    values = {
        ENDPOINT: told or (None if is_aws(server) else server),
        REGION: client.meta.region_name,
        PATH_STYLE: None if options.path_style is None else str(options.path_style).lower(),
    }
    client.close()
    return {name: value for name, value in values.items() if value}


def make_client(bucket: str) -> S3Client:
    """A client for one bucket; it may be shared between threads. Contacts nobody.

    Raises:
        BadInput: the endpoint is not a url, or FTJOB_S3_PATH_STYLE is unusable.
    """
    from botocore.config import Config

    options = S3Options.read(os.environ)
    session = _session(options)
    client = _client(session, options)
    aws = is_aws(client.meta.endpoint_url)
    if options.path_style is not None:
        in_path = options.path_style
    elif aws and "." not in bucket:
        return client
    else:
        # Bucket names as host names need a DNS that S3-compatible servers seldom have, and a certificate for every
        # level of the name.
        in_path = True
    config = Config(s3={"addressing_style": "path" if in_path else "virtual"})
    if not aws:
        # Many of them refuse the checksum trailers that boto3 sends since 1.36. Ours are in the manifests.
        config = config.merge(
            Config(request_checksum_calculation="when_required", response_checksum_validation="when_required")
        )
    return _client(session, options, config)


def is_aws(endpoint: str) -> bool:
    """Whether an endpoint is AWS's own."""
    return ".amazonaws.com" in (urlsplit(endpoint).hostname or "")


def _session(options: S3Options) -> Session:
    import boto3

    return boto3.session.Session(profile_name=options.profile, region_name=options.region)


def _client(session: Session, options: S3Options, more: Config | None = None) -> S3Client:
    from botocore.config import Config
    from botocore.exceptions import InvalidRegionError

    config = Config(
        retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
        connect_timeout=_CONNECT_SECONDS,
        read_timeout=_READ_SECONDS,
        max_pool_connections=16,
        user_agent_extra="ftjob",
    )
    try:
        return session.client("s3", config=config.merge(more) if more else config, endpoint_url=options.endpoint)
    except InvalidRegionError as error:
        raise BadInput(f"the S3 region is none: {error}", hint="check AWS_REGION") from error
    except ValueError as error:
        raise BadInput(f"the S3 endpoint is not a url: {error}", hint="check AWS_ENDPOINT_URL") from error
