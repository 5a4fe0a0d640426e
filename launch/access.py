"""Whether a bucket can be used as a run will use it, found out before anything is created; and how a job elsewhere
gets to it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

from job.contract.errors import AccessRefused, AlreadyExists, BadInput, Garbled, NotFound, StorageError
from job.contract.layout import PROBES, Key
from job.contract.records import RunRecord, utc
from job.storage import S3Store, Store
from job.storage.s3_account import Credentials, effective_variables, find_credentials
from launch.hub import Hub


def check_bucket(store: Store) -> None:
    """List, create, read and delete a small object, with the rights that a run will need; nothing of it stays.

    Folders (file://) are taken as they are: what they refuse, they refuse at once.

    Raises:
        BadInput: the bucket is missing, the credentials are wrong or may not do what a run does, the endpoint is no
            S3 server, or one that replaces objects that it was asked to create.
        Unreachable: the server is out of reach for now.
    """
    if not isinstance(store, S3Store):
        return
    key = Key(f"{PROBES}{secrets.token_hex(8)}")
    try:
        next(store.list(PROBES), None)
        try:
            _create_and_read(store, key)
        except BaseException:
            with contextlib.suppress(StorageError):
                store.delete(key)
            raise
        store.delete(key)
    except (AccessRefused, Garbled) as error:
        raise BadInput(f"bucket {store.uri} cannot be used: {error.message}", hint=error.hint) from error


def job_credentials() -> Credentials:
    """The credentials that this machine uses for S3, for a job elsewhere; secret. None in it when there are none.

    Raises:
        BadInput: a profile that is named does not exist, or its credentials have expired.
    """
    try:
        return find_credentials()
    except AccessRefused as error:
        raise BadInput(error.message, hint=error.hint) from error


def job_variables() -> dict[str, str]:
    """The variables that lead a job elsewhere to the same server and region as this machine; nothing secret.

    Raises:
        BadInput: the endpoint, the region or the profile that is named is none.
    """
    try:
        return effective_variables()
    except AccessRefused as error:
        raise BadInput(error.message, hint=error.hint) from error


@dataclass(frozen=True)
class Given:
    """What a job elsewhere gets along. The values of secrets are printed nowhere."""

    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    variables: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """Warnings about the secrets."""


def given_to_the_job(record: RunRecord, store: Store) -> Given:
    """What a job elsewhere needs to reach buckets and hub.

    Raises:
        BadInput: as `job_credentials` and `job_variables`.
    """
    secret: dict[str, str] = {}
    notes: tuple[str, ...] = ()
    variables: dict[str, str] = {}
    places = (store.uri, record.train.uri, record.recipe.base_model.id)
    if any(place.startswith("s3://") for place in places):
        credentials = job_credentials()
        secret |= credentials.variables
        variables = job_variables()
        if credentials.are_temporary:
            end = utc(credentials.expires_at) if credentials.expires_at else "a time that nobody tells"
            notes = (
                f"the credentials for S3 end at {end}: a run that is not over by then stops; "
                "long-lived ones, of a user of its own, do not",
            )
    if hub := os.environ.get("HF_ENDPOINT"):
        if "@" in hub:  # user:password@ of a mirror: no plan and no task may show it
            secret["HF_ENDPOINT"] = hub
        else:
            variables = variables | {"HF_ENDPOINT": hub}
    token = Hub.of(os.environ).token if record.recipe.base_model.is_on_hub else None
    if token:
        secret["HF_TOKEN"] = token
    return Given(secret, variables, notes)


def _create_and_read(store: Store, key: Key) -> None:
    first, second = b"ftjob asks whether it can write here\n", b"ftjob asks whether this replaces what it wrote\n"
    store.put_new(key, first)
    try:
        store.put_new(key, second)
    except AlreadyExists:
        pass
    else:
        raise BadInput(
            f"bucket {store.uri} cannot be used: its server replaces objects that it was told to create only "
            "(it ignores If-None-Match), so that two attempts could destroy each other's work",
            hint="use an S3 server that honours `If-None-Match: *`: AWS, Ceph and MinIO do",
        )
    try:
        found = store.get(key)
    except NotFound:
        found = b""
    if found != first:
        raise BadInput(
            f"bucket {store.uri} cannot be used: its server does not give back what was just written",
            hint="use an S3 server that is consistent: AWS, Ceph and MinIO are",
        )
