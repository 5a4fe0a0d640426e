"""Promise: bench/check.py measures the check itself, on rows of which it knows what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "bench" / "check.py"


@pytest.mark.parametrize("processes", ["1", "2"])
def test_it_prints_what_was_found_and_how_fast(processes: str) -> None:
    command = [sys.executable, str(SCRIPT), "--rows", "2000", "--processes", processes, "--json"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=SCRIPT.parents[1])
    found = json.loads(shown.stdout)
    assert found["counts"] == {"duplicate": 2, "json": 2}
    assert (found["lines"], found["rows"]) == (2000, 1998)
    assert found["rows_per_second"] * found["seconds"] == pytest.approx(1998)
    assert found["cpu_seconds"] > 0
    assert 20 * int(processes) < found["rss_mib"] < 500
