"""What of the machine is used: in a container, bound to a few cores, or asked for otherwise."""

import gc
import os
import subprocess
import sys

import pytest

from conftest import plain, write_photos
from finetune import build
from finetune.machine import (
    collect_from_now_on,
    collect_later,
    free_memory,
    let_threads_sleep,
    num_threads,
    num_workers,
    quota,
    total_memory,
    usable_cores,
)

GB = 2**30


def container(folder, own, **files):
    """A tree of control groups, and the file that says where in it this process is."""
    for name, text in files.items():
        path = folder / "cgroup" / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    (folder / "own").write_text(own)
    return folder / "cgroup", folder / "own"


def test_without_control_groups_the_cores_are_those_the_process_is_bound_to(tmp_path):
    nowhere = (tmp_path / "cgroup", tmp_path / "own")
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert usable_cores(*nowhere) == bound
    assert quota(*nowhere) is None
    assert total_memory(*nowhere, tmp_path / "none") is None


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/a/b", {"a__cpu.max": "300000 100000", "a__b__cpu.max": "max 100000"}, 3.0),
        ("0::/gone", {"cpu.max": "50000 100000"}, 0.5),
        ("4:cpu,cpuacct:/a", {"cpu__a__cpu.cfs_quota_us": "400000",
                              "cpu__a__cpu.cfs_period_us": "100000"}, 4.0),
        ("4:cpu,cpuacct:/a", {"cpu__a__cpu.cfs_quota_us": "-1",
                              "cpu__a__cpu.cfs_period_us": "100000"}, None),
        ("4:memory:/a", {"cpu__a__cpu.cfs_quota_us": "1"}, None),
    ],
)  # fmt: skip
def test_a_container_gets_the_cores_of_its_quota(tmp_path, own, files, expected):
    places = container(tmp_path, own, **files)
    assert quota(*places) == expected
    assert usable_cores(*places) == max(1, min(usable_cores(), int(expected or usable_cores())))


def test_memory_is_that_of_the_container_where_it_has_less_than_the_machine(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n")
    meminfo = tmp_path / "meminfo"
    places = container(tmp_path, "0::/", **{"memory.max": 4 * GB, "memory.current": 3 * GB})
    assert total_memory(*places, meminfo) == 4 * GB
    assert free_memory(*places, meminfo) == GB
    read_files = {"memory.stat": f"anon {GB}\ninactive_file {GB // 2}"}  # they make room
    assert free_memory(*container(tmp_path, "0::/", **read_files), meminfo) == GB + GB // 2
    places = container(tmp_path, "0::/", **{"memory.max": "max", "memory.current": 3 * GB})
    assert total_memory(*places, meminfo) == 16 * GB
    assert free_memory(*places, meminfo) == 8 * GB


@pytest.mark.parametrize(
    ("cores", "in_memory", "on_gpu", "expected"),
    [(1, False, True, 0), (2, False, False, 1), (2, False, True, 1), (16, False, True, 15),
     (64, False, True, 16), (16, False, False, 4), (64, False, False, 8), (16, True, True, 0)],
)  # fmt: skip
def test_workers_are_as_many_as_the_work_needs(cores, in_memory, on_gpu, expected):
    assert num_workers(cores, in_memory, on_gpu) == expected


def test_threads_are_shared_by_ranks_and_can_be_asked_for(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert num_threads() == usable_cores()
    assert num_threads(10**6) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert num_threads() == num_threads(2) == 3


def test_workers_are_for_files_and_not_for_images_in_memory(tmp_path):
    root = write_photos(tmp_path / "photos")
    for data in (["data=fake"], ["data=image_folder", f"data.root={root}"]):
        cfg = plain("model=tiny", "trainer.accelerator=cpu", *data)
        splits = build.build_splits(cfg)
        expected = num_workers(usable_cores(), data == ["data=fake"], on_gpu=False)
        assert build.choose_workers(cfg, splits) == expected
        cfg.num_workers = 3
        assert build.choose_workers(cfg, splits) == 3


def test_how_the_cores_are_used_is_told(caplog, monkeypatch):
    caplog.set_level("INFO", "finetune.build")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    build.tell_of_cores(plain("data=fake", "trainer.accelerator=cpu"), workers=2)
    assert "1 threads compute, 2 workers read images" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc's malloc")
@pytest.mark.parametrize(("set_outside", "fewer"), [({}, True), ({"MALLOC_ARENA_MAX": "2"}, False)])
def test_what_a_step_frees_serves_the_next(set_outside, fewer):
    code = """if True:
        import resource
        import torch
        from finetune.machine import keep_freed_memory
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(20):
                torch.ones(20_000_000)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        before = faults()
        keep_freed_memory()
        faults()  # takes it once
        print(faults() < before / 10)
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=kept | set_outside, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(fewer)


def test_threads_wait_as_is_asked_for_outside(monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.setenv(name, "")  # put back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    let_threads_sleep()
    assert "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setenv("KMP_BLOCKTIME", "5")
    let_threads_sleep()
    assert (os.environ["GOMP_SPINCOUNT"], os.environ["KMP_BLOCKTIME"]) == ("1000", "5")


def test_no_garbage_is_collected_while_a_command_starts_and_it_is_afterwards():
    try:
        collect_from_now_on()  # of a process that did not begin as a command does
        assert gc.get_freeze_count() == 0
        collect_later()
        assert not gc.isenabled()
        collect_from_now_on()
        frozen = gc.get_freeze_count()
        assert gc.isenabled()
        assert frozen > 10_000
        collect_from_now_on()  # the next job of a sweep: what the first left is collected
        assert gc.get_freeze_count() <= frozen
    finally:
        gc.enable()
        gc.unfreeze()
