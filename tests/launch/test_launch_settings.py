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
        ("usd_per_hour = {local = inf}", "usd_per_hour.local"),
        ("usd_per_hour = {local = nan}", "usd_per_hour.local"),
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


# ------------------------------------------------------------------------------------------------------------- [s3]

S3 = """
bucket = "s3://mine/ftjob"

[s3]
endpoint = "https://minio.example.com:9000"
region = "eu-central-1"
profile = "minio"
path_style = true
"""


def s3_variables(home: Path, **variables: str) -> dict[str, str]:
    return read_settings({"FTJOB_HOME": str(home)}).s3_variables(variables)


def test_the_file_names_server_region_profile_and_style(tmp_path: Path) -> None:
    assert s3_variables(tmp_path) == {}
    (tmp_path / "settings.toml").write_text(S3)
    assert s3_variables(tmp_path) == {
        "FTJOB_S3_ENDPOINT": "https://minio.example.com:9000",
        "FTJOB_S3_REGION": "eu-central-1",
        "FTJOB_S3_PROFILE": "minio",
        "FTJOB_S3_PATH_STYLE": "true",
    }


@pytest.mark.parametrize(
    ("variable", "overruled"),
    [
        ("AWS_ENDPOINT_URL", "FTJOB_S3_ENDPOINT"),
        ("AWS_ENDPOINT_URL_S3", "FTJOB_S3_ENDPOINT"),
        ("FTJOB_S3_ENDPOINT", "FTJOB_S3_ENDPOINT"),
        ("AWS_REGION", "FTJOB_S3_REGION"),
        ("AWS_DEFAULT_REGION", "FTJOB_S3_REGION"),
        ("AWS_PROFILE", "FTJOB_S3_PROFILE"),
        ("AWS_ACCESS_KEY_ID", "FTJOB_S3_PROFILE"),
        ("FTJOB_S3_PATH_STYLE", "FTJOB_S3_PATH_STYLE"),
    ],
)
def test_a_variable_that_is_set_overrules_the_file_and_that_line_only(
    tmp_path: Path, variable: str, overruled: str
) -> None:
    (tmp_path / "settings.toml").write_text(S3)
    everything = s3_variables(tmp_path)
    assert s3_variables(tmp_path, **{variable: ""}) == everything
    del everything[overruled]
    assert s3_variables(tmp_path, **{variable: "something"}) == everything


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('endpoint = "minio.example.com"', "s3.endpoint"),
        ('endpoint = "https://me:secret@minio.example.com"', "s3.endpoint"),
        ('region = "Frankfurt am Main"', "s3.region"),
        ('profile = ""', "s3.profile"),
        ('path_style = "yes"', "s3.path_style"),
        ('secret_access_key = "x"', "s3.secret_access_key"),
    ],
)
def test_what_cannot_be_used_is_named_with_its_section(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "settings.toml").write_text(f"[s3]\n{text}\n")
    with pytest.raises(BadInput, match=said) as caught:
        read_settings({"FTJOB_HOME": str(tmp_path)})
    assert caught.value.hint == "keys are: endpoint, region, profile, path_style"
