"""Processes for test_storage: racers and victims. `python -m tests.job.storage_worker race|victims ...`

A process of its own that forks: it has no threads, so forking is safe, and its children start in milliseconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import boto3  # noqa: F401  (once here instead of once in each child)

from job.contract.errors import AlreadyExists
from job.contract.layout import Key
from job.storage import Store, open_store

WON, LOST = 0, 10


def sealed(size: int) -> bytes:
    """Bytes that tell whether they are whole."""
    body = random.randbytes(size)
    return hashlib.sha256(body).digest() + body


def is_whole(data: bytes) -> bool:
    return hashlib.sha256(data[32:]).digest() == data[:32]


def race(uri: str, key: str, racers: int) -> None:
    """Prints how many racers won, lost, and did anything else."""
    start, go = os.pipe()
    children = []
    for number in range(racers):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.close(go)
                store = open_store(uri)
                list(store.list("warm/"))
                os.read(start, 1)  # returns when the parent closes its end, for all at once
                try:
                    store.put_new(Key(key), f"racer {number}".encode())
                    code = WON
                except AlreadyExists:
                    code = LOST
            finally:
                os._exit(code)
        children.append(child)
    os.close(start)
    time.sleep(0.3)  # makes the race closer, decides nothing
    os.close(go)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps({"won": codes.count(WON), "lost": codes.count(LOST), "all": len(codes)}))  # noqa: T201


def victims(uri: str, report: str, rounds: int, longest: float, size: int) -> None:
    """Writers, one after the other, each killed at a random moment. `report` gets the keys whose put returned."""
    killed = 0
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.write_bytes(sealed(size))
        for number in range(rounds):
            ready, tell = os.pipe()
            child = os.fork()
            if child == 0:
                try:
                    store = open_store(uri)
                    list(store.list("none/"))
                    os.write(tell, b".")
                    with Path(report).open("a", encoding="utf-8", buffering=1) as done:
                        write_for_ever(store, number, source, done.write)
                finally:
                    os._exit(1)
            os.read(ready, 1)
            time.sleep(random.uniform(0, longest))
            os.kill(child, signal.SIGKILL)
            killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
            os.close(ready)
            os.close(tell)
    print(json.dumps({"killed": killed}))  # noqa: T201


def write_for_ever(store: Store, number: int, source: Path, say: object) -> None:
    assert callable(say)
    turn = 0
    while True:
        key = Key(f"victims/{number:03d}/{turn:05d}")
        if turn % 2:
            store.put_new(key, sealed(50_000))
        else:
            store.put_file(key, source)
        say(key + "\n")
        turn += 1


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["race", uri, key, racers]:
            race(uri, key, int(racers))
        case ["victims", uri, report, rounds, longest, size]:
            victims(uri, report, int(rounds), float(longest), int(size))
        case _:
            raise SystemExit(__doc__)
