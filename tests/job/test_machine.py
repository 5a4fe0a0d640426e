"""Promise: which machine this is, for how long it has been paid for and what memory is left; never an error, whatever
/proc holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from job.machine import Machine, free_memory, this_machine

BOOT: Final = "6b1c4a0e-4f0c-4b9c-8f0e-111111111111"
TICKS: Final = os.sysconf("SC_CLK_TCK")


def proc(
    folder: Path, *, up: float = 5000.0, first_began: float = 0.0, name: str = "systemd", boot: str = BOOT
) -> Path:
    """A /proc: seconds since the boot, and when after it process 1 began."""
    (folder / "sys/kernel/random").mkdir(parents=True)
    (folder / "1").mkdir()
    (folder / "sys/kernel/random/boot_id").write_text(f"{boot}\n")
    (folder / "uptime").write_text(f"{up:.2f} 9999.99\n")
    fields = [f"1 ({name}) S 0 1 1 0 -1 4194560", *["0"] * 12, str(int(first_began * TICKS)), "170000000 3000"]
    (folder / "1/stat").write_text(" ".join(fields) + "\n")
    return folder


def test_on_a_machine_of_its_own_the_bill_begins_with_its_boot(tmp_path: Path) -> None:
    assert this_machine(proc(tmp_path, first_began=0.05), pid=777) == Machine(f"{BOOT}/0.05", 5000 - 0.05)


def test_a_second_job_on_it_is_on_the_same_machine(tmp_path: Path) -> None:
    folder = proc(tmp_path)
    first = this_machine(folder, pid=777)
    (folder / "uptime").write_text("6000.00 9999.99\n")
    second = this_machine(folder, pid=888)
    assert (second.id, second.up_seconds - first.up_seconds) == (first.id, 1000)


def test_docker_run_makes_us_process_1_and_the_machine_under_the_container_is_what_is_paid_for(tmp_path: Path) -> None:
    assert this_machine(proc(tmp_path, first_began=4990, name="python"), pid=1) == Machine(BOOT, 5000)


def test_a_second_container_on_it_is_on_the_same_machine(tmp_path: Path) -> None:
    first = this_machine(proc(tmp_path / "a", first_began=4990, name="python"), pid=1)
    second = this_machine(proc(tmp_path / "b", up=6000, first_began=5990, name="python"), pid=1)
    assert (first.id, second.up_seconds) == (second.id, 6000)


def test_in_a_rented_container_the_bill_begins_with_its_first_process(tmp_path: Path) -> None:
    assert this_machine(proc(tmp_path, up=9e6, first_began=9e6 - 120), pid=777).up_seconds == pytest.approx(120)


def test_two_containers_rented_on_one_machine_are_two(tmp_path: Path) -> None:
    ids = {this_machine(proc(tmp_path / str(began), first_began=began), pid=7).id for began in (100, 4000)}
    assert len(ids) == 2


def test_another_boot_is_another_machine(tmp_path: Path) -> None:
    ids = {this_machine(proc(tmp_path / boot, boot=boot), pid=7).id for boot in ("one", "two")}
    assert len(ids) == 2


@pytest.mark.parametrize("name", ["a b", ") S 1 2 3 (", "(((", "日本", ""])
def test_process_1_may_have_any_name(tmp_path: Path, name: str) -> None:
    assert this_machine(proc(tmp_path, first_began=1000, name=name), pid=7).up_seconds == pytest.approx(4000)


def test_a_name_that_is_no_text_is_a_name(tmp_path: Path) -> None:
    folder = proc(tmp_path, first_began=1000, name="NAME")
    stat = folder / "1/stat"
    stat.write_bytes(stat.read_bytes().replace(b"NAME", b"\xff\xfe"))
    assert this_machine(folder, pid=7).up_seconds == pytest.approx(4000)


def test_a_first_process_from_the_future_makes_no_negative_bill(tmp_path: Path) -> None:
    assert this_machine(proc(tmp_path, up=10, first_began=10.5), pid=7).up_seconds == 0


@pytest.mark.parametrize("file", ["sys/kernel/random/boot_id", "uptime", "1/stat"])
@pytest.mark.parametrize("content", [None, b"", b"\n", b"nonsense", b"\xff\xfe\x00"])
def test_of_a_strange_proc_nothing_is_known(tmp_path: Path, file: str, content: bytes | None) -> None:
    folder = proc(tmp_path)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    found = this_machine(folder, pid=7)
    if file.endswith("boot_id") and content == b"nonsense":
        assert found.id.startswith("nonsense/")  # any text is as good a name
    else:
        assert found == Machine()


@pytest.mark.parametrize("up", ["nan", "inf", "-5.00"])
def test_an_uptime_that_is_none_is_not_billed(tmp_path: Path, up: str) -> None:
    folder = proc(tmp_path)
    (folder / "uptime").write_text(f"{up} 1.00\n")
    for pid in (1, 7):
        assert this_machine(folder, pid=pid) == Machine()


def test_without_proc_nothing_is_known(tmp_path: Path) -> None:
    assert this_machine(tmp_path / "none") == Machine()
    (tmp_path / "file").write_text("")
    assert this_machine(tmp_path / "file") == Machine()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_this_very_machine_is_the_same_for_another_process_and_grows_older() -> None:
    here = this_machine()
    code = "from job.machine import this_machine as t; m = t(); print(m.id, m.up_seconds)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert here.id == told[0] != ""
    assert 0 < here.up_seconds <= float(told[1]) < here.up_seconds + 300


GIB: Final = 2**30


def memory(folder: Path, *, free: int, share: str = "max", used: int = 0, cached: int = 0) -> tuple[Path, Path]:
    """A /proc and a container's share of the memory, GiB."""
    (folder / "meminfo").write_text(f"MemTotal:  {99 * GIB // 1024} kB\nMemAvailable:  {free * GIB // 1024} kB\n")
    (folder / "memory.max").write_text(share if share == "max" else f"{int(share) * GIB}\n")
    (folder / "memory.current").write_text(f"{used * GIB}\n")
    (folder / "memory.stat").write_text(f"anon 5\nactive_file {cached * GIB}\ninactive_file 0\n")
    return folder, folder


def test_the_memory_that_is_left_is_the_machines_or_what_the_containers_share_leaves_of_it(tmp_path: Path) -> None:
    assert free_memory(*memory(tmp_path, free=40)) == 40 * GIB
    assert free_memory(*memory(tmp_path, free=40, share="16", used=10)) == 6 * GIB
    assert free_memory(*memory(tmp_path, free=40, share="16", used=15, cached=9)) == 10 * GIB
    assert free_memory(*memory(tmp_path, free=4, share="16", used=10)) == 4 * GIB
    assert free_memory(*memory(tmp_path, free=4, share="16", used=17)) == 0


def test_the_memory_of_a_machine_that_does_not_tell_is_unknown(tmp_path: Path) -> None:
    assert free_memory(tmp_path, tmp_path) is None
    (tmp_path / "meminfo").write_text("MemAvailable: much\n")
    assert free_memory(tmp_path, tmp_path) is None
    assert (free_memory() or 1) > 0
