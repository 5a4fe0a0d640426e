"""`python -m job`: the process edge. Logs, one attempt, its exit code."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from job.notice import Notice


def main() -> int:
    """Live one attempt; returns the exit code of its outcome."""
    notice = Notice()
    notice.listen()  # before anything else: until then a SIGTERM is the default death
    # imported only now, so that the notice is listened to as early as can be
    from job import logs
    from job.attempt import Attempt, Ending
    from job.contract.environ import JobEnviron
    from job.contract.errors import BadInput, FtjobError, Unreachable
    from job.contract.outcome import EXIT_CODES, Outcome

    logs.configure()
    logs.capture_libraries()
    log = logs.get_logger()
    log.info("job.started", pid=os.getpid())
    try:
        environ = JobEnviron.read(os.environ)
        Path(environ.workdir).mkdir(parents=True, exist_ok=True)
        ending = Attempt(environ, notice).live()
    except BadInput as error:
        ending = Ending(Outcome.BAD_INPUT, error.message, error.hint)
    except Unreachable as error:
        ending = Ending(Outcome.PREEMPTED, error.message, error.hint)
    except FtjobError as error:
        ending = Ending(Outcome.FAILED, error.message, error.hint)
    log.info("job.ended", outcome=ending.outcome.value, message=ending.message, hint=ending.hint, step=ending.step)
    return EXIT_CODES[ending.outcome]


if __name__ == "__main__":
    exit_code = main()
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    # Not sys.exit: the interpreter would wait for boto3's threads, and they for a network that may never answer.
    os._exit(exit_code)
