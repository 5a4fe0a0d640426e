"""What boto3 and S3 servers say went wrong, as errors of ours. Pure: it asks nobody, and boto3 is imported when used.

The codes are those of "Error responses" in the Amazon S3 API reference, which other servers follow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from job.contract.errors import AccessRefused, BadInput, Garbled, NotFound, StorageError, Unreachable
from job.storage.store import translate_os_error

MISSING: Final = frozenset({"NoSuchKey", "404", "NotFound"})
EXISTS: Final = frozenset({"PreconditionFailed", "412"})

_SKEWED: Final = ("this machine's clock is too far from the server's", "set this machine's clock")
_EXPIRED: Final = ("the credentials have expired", "get new ones, for example with `aws sso login`")

_CREDENTIALS: Final = {
    "InvalidAccessKeyId": (
        "this server knows no such access key",
        "check AWS_ACCESS_KEY_ID or the profile, and whether AWS_ENDPOINT_URL is the server that they are for",
    ),
    "SignatureDoesNotMatch": (
        "the secret key is not the one of this access key",
        "check AWS_SECRET_ACCESS_KEY or the profile: one letter too many or too few is enough",
    ),
    "InvalidToken": (
        "the session token does not belong to these keys",
        "check AWS_SESSION_TOKEN; keys that last need none",
    ),
    "ExpiredToken": _EXPIRED,
    "ExpiredTokenException": _EXPIRED,
    "RequestExpired": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "RequestTimeTooSkewed": _SKEWED,
}

_ELSEWHERE: Final = frozenset(
    {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"}
)
_TRANSIENT_STATUS: Final = frozenset({408, 409, 425, 429})
_TRANSIENT: Final = frozenset({"RequestTimeout", "SlowDown", "Throttling", "IncompleteBody", "BadDigest"})

_ACTIONS: Final = {
    "ListObjectsV2": "s3:ListBucket",
    "GetObject": "s3:GetObject",
    "HeadObject": "s3:GetObject",
    "PutObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "DeleteObject": "s3:DeleteObject",
}
"""What a policy has to allow for an operation."""


@dataclass(frozen=True)
class Place:
    """What a call was about: a bucket's uri, the key in it, and the server that was asked."""

    uri: str
    key: str
    server: str = ""

    @property
    def bucket(self) -> str:
        return self.uri.removeprefix("s3://").partition("/")[0]

    @property
    def what(self) -> str:
        return f"{self.uri}/{self.key}"

    @property
    def where(self) -> str:
        return f" at {self.server}" if self.server else ""


def code_of(error: Any) -> str:
    """The code of a ClientError; the status where the answer had no body."""
    return str(error.response.get("Error", {}).get("Code", ""))


@contextlib.contextmanager
def account_errors(uri: str) -> Iterator[None]:
    """Errors in finding out who asks: credentials and profiles, before any server has answered."""
    import botocore.exceptions as core

    try:
        yield
    except core.ProfileNotFound as error:
        raise AccessRefused(str(error), hint="`aws configure list-profiles` shows the profiles there are") from error
    except (core.SSOError, core.LoginError, core.TokenRetrievalError) as error:
        raise AccessRefused(f"no usable AWS credentials for {uri}: {error}", hint="`aws sso login` first") from error
    except (
        core.NoCredentialsError,
        core.PartialCredentialsError,
        core.CredentialRetrievalError,
        core.InvalidConfigError,
        core.ConfigParseError,
    ) as error:
        raise AccessRefused(
            f"no usable AWS credentials for {uri}: {error}",
            hint="set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run `aws configure`",
        ) from error


@contextlib.contextmanager
def s3_errors(place: Place, path: Path | None = None) -> Iterator[None]:
    """Errors of the account, the server, the network, and of the caller's own file at `path`."""
    import boto3.exceptions as transfer
    import botocore.exceptions as core
    from botocore.parsers import ResponseParserError

    try:
        with account_errors(place.uri):
            yield
    except core.ClientError as error:
        raise translate(error, place) from error
    except core.ParamValidationError as error:
        raise BadInput(f"{place.uri} is not a usable bucket: {error}") from error
    except transfer.S3UploadFailedError as error:
        cause = error.__context__
        if isinstance(cause, core.ClientError):
            raise translate(cause, place) from error
        raise Unreachable(f"{place.what}: {error}") from error
    except (ResponseParserError, RecursionError) as error:
        # botocore takes a redirection for a bucket in another region and asks for that, for ever if need be.
        raise garbled(place) from error
    except (core.BotoCoreError, transfer.Boto3Error) as error:
        raise Unreachable(
            f"{place.what} is out of reach: {error}", hint="check the network and AWS_ENDPOINT_URL"
        ) from error
    except OSError as error:
        # boto3 wraps what the network says, so this is about a file.
        if isinstance(error, FileNotFoundError) and path is not None:
            raise
        raise translate_os_error(error, str(path or place.key)) from error


def garbled(place: Place) -> Garbled:
    """The error for an answer that no S3 server would give."""
    return Garbled(
        f"{place.what}: the server{place.where} does not answer as S3 servers do",
        hint="check AWS_ENDPOINT_URL (http or https?), and whether a network wants a login first",
    )


def translate(error: Any, place: Place) -> StorageError:
    """What a server answered (a botocore ClientError), as an error of ours."""
    code = code_of(error)
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    what = place.what + place.where
    if code == "NoSuchBucket":
        return AccessRefused(
            f"bucket {place.bucket} does not exist{place.where}",
            hint=f"create it (`aws s3 mb s3://{place.bucket}`), or correct its name or AWS_ENDPOINT_URL",
        )
    if not code or (code in MISSING and error.operation_name == "ListObjectsV2"):
        # An error without a code is a web page. A listing of nothing is empty, a missing bucket has its own code.
        return garbled(place)
    if code in MISSING:
        return NotFound(f"{place.what} does not exist")
    if code in _CREDENTIALS:
        why, hint = _CREDENTIALS[code]
        return AccessRefused(f"{what}: {why} ({code})", hint=hint)
    if code in _ELSEWHERE:
        return _elsewhere(error, place)
    if status in (401, 403):
        action = _ACTIONS.get(error.operation_name, error.operation_name)
        said = error.response["Error"].get("Message") or "no reason given"
        return AccessRefused(
            f"{what}: {action} is not allowed ({code}: {said})",
            hint=f"allow {action} in the policy of the bucket or of the user, or use other credentials",
        )
    if status == 501:
        return AccessRefused(f"{what}: {error}", hint="this server lacks what ftjob needs; use another one")
    if 400 <= status < 500 and status not in _TRANSIENT_STATUS and code not in _TRANSIENT:
        return AccessRefused(f"{what}: {error}", hint="the server would answer the same again")
    return Unreachable(f"{what}: {error}")


def _elsewhere(error: Any, place: Place) -> StorageError:
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    region = error.response["Error"].get("Region") or headers.get("x-amz-bucket-region")
    if region:
        return AccessRefused(
            f"bucket {place.bucket} lies in region {region}, which is not the one that was asked{place.where}",
            hint=f"set AWS_REGION={region}, or `region` under [s3] of settings.toml",
        )
    target = error.response["Error"].get("Endpoint") or headers.get("location")
    sent = f" and sends on to {target}" if target else ""
    return AccessRefused(
        f"{place.what}{place.where}: the server will not answer there{sent} ({code_of(error)})",
        hint="check AWS_ENDPOINT_URL (http or https?) and AWS_REGION",
    )
