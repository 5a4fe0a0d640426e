from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.kit import Desk


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """A desk with one run, `done`, that succeeded in its second attempt. Tests only read it."""
    made = Desk(tmp_path_factory.mktemp("finished"))
    made.plan = {"steps": 5, "ends": {"1": [3, "kill"]}}
    result = made.ftjob("launch", "--json", "--name", "done", "--bucket", made.settings.bucket, made.recipe)
    assert result.exit_code == 0, result.stderr
    yield made
    made.close()
