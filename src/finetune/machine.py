"""What of the machine this process may use: cores and memory, also inside a container."""

import ctypes
import gc
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path

CGROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
MEMINFO = Path("/proc/meminfo")
USEFUL_WORKERS = 16  # for one device; num_workers= may ask for more
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def usable_cores(cgroups: Path = CGROUPS, own: Path = OWN) -> int:
    """Cores that this process may keep busy: those it is bound to, and its container's quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores, limit = bound or 1, quota(cgroups, own)
    return cores if limit is None else max(1, min(cores, math.floor(limit)))


@contextmanager
def threads(num: int) -> Iterator[None]:
    """So many threads of torch compute, and as many as before afterwards."""
    import torch  # --help does without

    before = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def process_rank() -> int:
    """Which rank of a run this is, as torchrun, SLURM or the launcher number them."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def num_threads(processes: int = 1) -> int:
    """Threads that compute in each of so many processes; what OMP_NUM_THREADS asks for stands.

    It knows nothing of workers: sums over threads round by their number, and a run that is resumed
    with other workers ends with the same bytes.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) else max(1, usable_cores() // processes)


def num_workers(cores: int, in_memory: bool, on_gpu: bool) -> int:
    """Processes that read images for one that trains on so many cores.

    in_memory: transformed faster than they are sent between processes. on_gpu: the cores have
    nothing else to do; a network on the CPU needs several times what its images need.
    """
    if in_memory or cores < 2:
        return 0
    return min(USEFUL_WORKERS, cores - 1) if on_gpu else min(8, max(1, cores // 4))


def let_threads_sleep() -> None:
    """Have threads that wait for others soon give up their core; before torch is imported.

    They would spin instead, for a millisecond at the end of each operation, against workers and
    other processes: a plain loop with two workers on two cores fell to a tenth by that. Some 30 µs
    of it are kept, as most operations follow each other faster.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # GNU's
        os.environ.setdefault("KMP_BLOCKTIME", "0")  # Intel's and LLVM's


def keep_freed_memory() -> None:
    """Have malloc keep what is freed for the next step, where it is glibc's and nothing was set.

    It would give large tensors back to the system and take them anew, page by page, in every step:
    a tenth of the time on a CPU. It comes in pages of 2 MB, if torch is not imported yet.
    Source: PyTorch's performance tuning guide, which says so of other allocators.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    asked = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if asked or sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has none
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def collect_later() -> None:
    """Collect no garbage while a command starts: a fifth of the time that importing torch takes.

    What is made meanwhile stays, and would be looked through again and again.
    """
    gc.disable()


def collect_from_now_on() -> None:
    """The start is over: collect garbage again, but none of what is there."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def quota(cgroups: Path = CGROUPS, own: Path = OWN) -> float | None:
    """Cores' worth of time that the container may take; None without a limit."""
    quotas = []
    for text in _limits("cpu", "cpu.max", cgroups, own):  # "200000 100000", "max 100000"
        most, _, period = text.partition(" ")
        if most.isdigit() and period.isdigit():
            quotas.append(int(most) / int(period))
    periods = [*_limits("cpu", "cpu.cfs_period_us", cgroups, own)]  # version 1
    for most, period in zip(
        _limits("cpu", "cpu.cfs_quota_us", cgroups, own), periods, strict=False
    ):
        if most.isdigit() and period.isdigit():  # -1: no limit
            quotas.append(int(most) / int(period))
    return min(quotas, default=None)


def total_memory(cgroups: Path = CGROUPS, own: Path = OWN, meminfo: Path = MEMINFO) -> int | None:
    """Bytes that this process can have at most; None where that cannot be told."""
    limits = [*_limits("memory", "memory.max", cgroups, own)]
    limits += _limits("memory", "memory.limit_in_bytes", cgroups, own)
    found = [int(limit) for limit in limits if limit.isdigit()]
    return min([*found, *_meminfo("MemTotal", meminfo)], default=None)


def free_memory(cgroups: Path = CGROUPS, own: Path = OWN, meminfo: Path = MEMINFO) -> int | None:
    """Bytes that can be taken now without anything being pushed out; None if not known."""
    left = []
    # files that were read stay in memory, and count as used, until somebody needs it
    stats = [_reclaimable(stat) for stat in _limits("memory", "memory.stat", cgroups, own)]
    for most, used in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        groups = zip_longest(
            _limits("memory", most, cgroups, own), _limits("memory", used, cgroups, own), stats,
            fillvalue="",
        )  # fmt: skip
        left += [
            int(m) - int(u) + int(files or 0)
            for m, u, files in groups
            if m.isdigit() and u.isdigit()
        ]
    return min([*left, *_meminfo("MemAvailable", meminfo)], default=None)


def _limits(controller: str, name: str, cgroups: Path, own: Path) -> Iterator[str]:
    """What a file says in each group that this process is in, the innermost first."""
    try:
        lines = own.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # version 1 has a tree for each controller; in a container its root may be our group
        root = cgroups / controller if controllers else cgroups
        inner = root / path.lstrip("/")
        for group in (
            inner,
            *(parent for parent in inner.parents if root in (parent, *parent.parents)),
        ):
            try:
                yield (group / name).read_text().strip()
            except OSError:
                continue


def _reclaimable(stat: str) -> str:
    """Bytes of files that nobody used lately, of memory.stat in either version."""
    found = dict(line.split() for line in stat.splitlines())
    return str(found.get("total_inactive_file", found.get("inactive_file", "0")))


def _meminfo(name: str, meminfo: Path) -> list[int]:
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return []
    return [int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")]
