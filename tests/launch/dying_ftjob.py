"""The `ftjob` command on a stand-in for SkyPilot, killed at its N-th change of a file.

dying_ftjob.py N FOLDER ARGUMENTS... prints nothing of its own. Only changes below FOLDER count; N = 0 never dies.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from launch.cli import cli
from tests.launch.fake_sky import FakeSky, cloud_maker


def die_at(number: int, folder: str) -> None:
    """Be killed just before the N-th file is created, replaced, linked or removed."""
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        path = str(arguments[0]) if arguments else ""
        if not path.startswith(folder):
            return
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_CREAT | os.O_WRONLY)
        if writes or event in ("os.rename", "os.link", "os.remove", "os.mkdir"):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


if __name__ == "__main__":
    root = Path(sys.argv[2])
    if number := int(sys.argv[1]):
        die_at(number, str(root))
    cli(args=sys.argv[3:], prog_name="ftjob", obj=cloud_maker(FakeSky(root / "sky")))
