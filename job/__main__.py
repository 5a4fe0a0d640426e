"""`python -m job`: the process edge. Logs, one attempt, its exit code."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from job.notice import Notice


def make_workdir(path: Path) -> None:
    """Make the job's folder. Raises BadInput when it cannot be made or written to."""
    from job.contract.errors import BadInput

    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise BadInput(
            f"FTJOB_WORKDIR {path} cannot be used: {error.strerror or error}",
            hint=f"it must belong to the job's user, which is {os.getuid()} here",
        ) from error


def main() -> int:
    """Live one attempt; returns the exit code of its outcome."""
    notice = Notice()
    notice.listen()  # before anything else: until then a SIGTERM is the default death
    # imported only now, so that the notice is listened to as early as can be
    from job import logs
    from job.attempt import Attempt
    from job.contract.environ import JobEnviron
    from job.contract.errors import FtjobError
    from job.contract.outcome import EXIT_CODES
    from job.ending import ending_of
    from job.metadata import cloud_named, watch

    logs.configure(quiet=lambda: notice.unanswered)  # no printing before an emergency save
    logs.capture_libraries()
    log = logs.get_logger()
    log.info("job.started", pid=os.getpid())
    try:
        environ = JobEnviron.read(os.environ)
        make_workdir(Path(environ.workdir))
        cloud = cloud_named(environ.infra.get("cloud"), os.environ)
        if cloud is not None:
            watch(cloud, notice)
        ending = Attempt(environ, notice).live()
    except FtjobError as error:
        ending = ending_of(error)
    notice.answer()
    log.info("job.ended", outcome=ending.outcome.value, message=ending.message, hint=ending.hint, step=ending.step)
    return EXIT_CODES[ending.outcome]


if __name__ == "__main__":
    # Not sys.exit: the interpreter would wait for boto3's threads, and they for a network that may never answer.
    os._exit(main())
