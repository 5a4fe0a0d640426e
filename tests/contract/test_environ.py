"""The variables from launcher to job."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.contract.environ import PREFIX, JobEnviron
from job.contract.errors import BadInput
from job.contract.layout import Uri

LEAST = {"FTJOB_RUN_ID": "my-run", "FTJOB_BUCKET": "s3://b", "FTJOB_WORKDIR": "/work"}
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
SECONDS = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
ENVIRONS = st.builds(
    JobEnviron,
    run_id=st.from_regex(r"[a-z0-9]{1,20}", fullmatch=True),
    bucket=TEXTS.map(Uri),
    workdir=TEXTS,
    heartbeat_seconds=SECONDS,
    grace_seconds=SECONDS,
    final_retry_seconds=SECONDS,
    threads=st.integers(1, 10**6),
    image_digest=st.none() | TEXTS,
    git_commit=st.none() | TEXTS,
    infra=st.dictionaries(TEXTS, st.text(st.characters(exclude_categories=["Cs"]))),
)


@given(ENVIRONS)
def test_what_the_launcher_sets_is_what_the_job_reads(environ: JobEnviron) -> None:
    variables = environ.variables()
    assert all(name.startswith(PREFIX) and "\0" not in value for name, value in variables.items())
    assert JobEnviron.read({**variables, "PATH": "/bin", "FTJOB_HOME": "/home"}) == environ


def test_absent_and_empty_variables_are_the_defaults() -> None:
    least = JobEnviron.read(LEAST)
    assert least == JobEnviron(run_id="my-run", bucket=Uri("s3://b"), workdir="/work")
    assert JobEnviron.read({**LEAST, "FTJOB_THREADS": "", "FTJOB_GIT_COMMIT": "", "FTJOB_INFRA": ""}) == least


@pytest.mark.parametrize("name", LEAST)
@pytest.mark.parametrize("value", [None, ""])
def test_a_missing_variable_is_named(name: str, value: str | None) -> None:
    variables = {key: text for key, text in LEAST.items() if key != name}
    if value is not None:
        variables[name] = value
    with pytest.raises(BadInput) as caught:
        JobEnviron.read(variables)
    assert caught.value.message == f"environment variable {name} is not set"
    assert caught.value.hint == "the job is started by `ftjob launch`"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FTJOB_THREADS", "two"),
        ("FTJOB_THREADS", "0"),
        ("FTJOB_THREADS", "1.5"),
        ("FTJOB_HEARTBEAT_SECONDS", "0"),
        ("FTJOB_HEARTBEAT_SECONDS", "nan"),
        ("FTJOB_GRACE_SECONDS", "inf"),
        ("FTJOB_FINAL_RETRY_SECONDS", "-1"),
        ("FTJOB_INFRA", "not json"),
        ("FTJOB_INFRA", "[]"),
        ("FTJOB_INFRA", '{"a": 1}'),
        ("FTJOB_INFRA", "1" * 5000),
        ("FTJOB_INFRA", "[" * 100_000),
        ("FTJOB_RUN_ID", "../../etc"),
        ("FTJOB_RUN_ID", "My Run"),
    ],
)
def test_an_unusable_variable_is_named(name: str, value: str) -> None:
    with pytest.raises(BadInput) as caught:
        JobEnviron.read({**LEAST, name: value})
    assert caught.value.message.startswith(f"environment variable {name}")
