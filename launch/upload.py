"""Datasets of this machine, put where a rented one can read them: into the run's bucket, under their digest."""

from __future__ import annotations

from job.contract.errors import DatasetInvalid
from job.contract.layout import Uri, dataset_key
from job.contract.records import DatasetDigest, RunRecord
from job.dataset.source import local_path, sha256_of
from job.storage import Store, open_object
from launch.plan import Upload
from launch.transfer import transfer_bar


def into_bucket(record: RunRecord, store: Store) -> tuple[RunRecord, tuple[Upload, ...]]:
    """The record with every dataset in the bucket, and what has to be put there for that to be true.

    Nothing is uploaded yet. A bucket that is a folder of this machine is of no use to another, and left to be refused.
    """
    if not store.uri.startswith("s3://"):
        return record, ()
    uploads = []
    moved: dict[str, DatasetDigest] = {}
    for name, digest in (("train", record.train), ("held_out", record.held_out)):
        if digest is not None and local_path(digest.uri) is not None:
            uri = Uri(f"{store.uri}/{dataset_key(digest.sha256)}")
            uploads.append(Upload(source=Uri(digest.uri), uri=uri, sha256=digest.sha256))
            moved[name] = digest.model_copy(update={"uri": uri})
    dataset = record.recipe.dataset.model_copy(update={name: digest.uri for name, digest in moved.items()})
    recipe = record.recipe.model_copy(update={"dataset": dataset})
    return record.model_copy(update={**moved, "recipe": recipe}), tuple(uploads)


def put_dataset(upload: Upload) -> None:
    """Upload it, with a progress bar in a terminal, unless it is there already.

    The key says which bytes it holds, so whoever finds it there need not send them again; the job verifies them.

    Raises:
        DatasetInvalid: it was changed since it was checked, while a person was asked perhaps. Other bytes would lie
            under that key for good, and a machine would be bought to find them.
        StorageError: the bucket refuses, or is out of reach for now.
    """
    path = local_path(upload.source)
    assert path is not None  # noqa: S101 - only files of this machine are uploaded
    if sha256_of(path, upload.source) != upload.sha256:
        raise DatasetInvalid(f"dataset {upload.source} was changed after it was checked", hint="launch again")
    store, key = open_object(upload.uri)
    size = path.stat().st_size
    if any(info.key == key and info.size == size for info in store.list(key)):
        return
    with transfer_bar(f"uploading {path.name}", size) as progress:
        store.put_file(key, path, progress)
