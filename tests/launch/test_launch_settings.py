"""Where state lives and runs land, and what a broken settings file gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from job.contract.errors import BadInput, Damaged
from launch.home import Remembered, RunFolder, forget, recall, remember, remembered_runs
from launch.settings import read_settings


def test_the_default_bucket_is_a_folder_in_the_home(tmp_path: Path) -> None:
    settings = read_settings({"FTJOB_HOME": str(tmp_path / "my home")})
    assert settings.home == tmp_path / "my home"
    assert settings.bucket == (tmp_path / "my home/bucket").as_uri()
    assert not settings.home.exists()


def test_without_ftjob_home_it_is_the_users_data_directory() -> None:
    assert read_settings({"FTJOB_HOME": ""}).home.name == "ftjob"


def test_the_file_names_another_bucket(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text('bucket = "s3://mine/ftjob/"\n')
    assert read_settings({"FTJOB_HOME": str(tmp_path)}).bucket == "s3://mine/ftjob"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bucket = ", "is not TOML"),
        ("buckets = 's3://mine'", "buckets"),
        ("bucket = 3", "bucket"),
        ("bucket = ''", "bucket"),
        ("bucket = 'ftp://mine'", "ftp://mine"),
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "settings.toml").write_text(text)
    with pytest.raises(BadInput, match=said) as caught:
        read_settings({"FTJOB_HOME": str(tmp_path)})
    assert "settings.toml" in caught.value.message
    assert caught.value.hint


def test_a_home_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")
    with pytest.raises(BadInput, match="not a folder"):
        read_settings({"FTJOB_HOME": str(tmp_path / "home")})


def test_what_is_remembered_is_recalled_and_never_rewritten(tmp_path: Path) -> None:
    from job.contract.layout import Uri

    here = Remembered(run_id="one", bucket=Uri("s3://a"), backend="local")
    assert recall(tmp_path, "one") is None
    assert remember(tmp_path, here)
    assert not remember(tmp_path, here.model_copy(update={"bucket": "s3://b"}))
    assert recall(tmp_path, "one") == here
    assert list(remembered_runs(tmp_path)) == [here]
    forget(tmp_path, "one")
    assert recall(tmp_path, "one") is None
    assert not (tmp_path / "runs").exists()


def test_a_memory_that_is_broken_is_named(tmp_path: Path) -> None:
    path = RunFolder.of(tmp_path, "one").memory
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(Damaged, match=r"run\.json"):
        recall(tmp_path, "one")


@pytest.mark.parametrize("run_id", ["../up", "a/b", "", "A", "-a", "a" * 64])
def test_what_is_no_run_id_never_becomes_a_path(tmp_path: Path, run_id: str) -> None:
    with pytest.raises(BadInput, match="is not a run id"):
        RunFolder.of(tmp_path, run_id)
