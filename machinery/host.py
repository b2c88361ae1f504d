"""What this process may use of its machine: cores, memory, open files.

A container (Docker, Kubernetes, a SLURM job) is a Linux control group with limits of its own, in
version 1 or 2 of these files. os and psutil count the cores and the memory of the whole machine.
"""

import functools
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import psutil


def groups(controller: str) -> Iterator[Path]:
    """The folders of this process's control group and of all that contain it, innermost first."""
    paths = {}  # {controller: path of the group}; version 2 has one path, for the controller ""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), path)
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, kind = line.partition(" - ")
        root, folder = mount.split()[3:5]
        version = kind.split()[0]
        if version == "cgroup2":
            path = paths.get("", "/")
        elif version == "cgroup" and controller in kind.split()[-1].split(","):
            path = paths.get(controller, "/")
        else:
            continue
        inside = os.path.relpath(path, root)
        if inside.startswith(".."):  # a container that sees its own group only, as the mount
            inside = "."
        group = Path(folder) / inside
        yield from [group, *group.parents][: len(Path(inside).parts) + 1]


def read(group: Path, *names: str) -> list[str]:
    """The words of the first of these files that the group has, or []."""
    for name in names:
        if (group / name).exists():
            return (group / name).read_text().split()
    return []


def cores() -> int:
    """The number of cores that this process may use: those it is bound to, or a smaller quota."""
    count = len(os.sched_getaffinity(0))
    for group in groups("cpu"):
        quota = read(group, "cpu.max")  # microseconds of computing time in a period, and the period
        if not quota:
            quota = read(group, "cpu.cfs_quota_us") + read(group, "cpu.cfs_period_us")
        if quota and quota[0] not in ("max", "-1"):
            count = min(count, int(quota[0]) / int(quota[1]))
    return max(1, round(count))


def allow_open_files() -> None:
    """Raise this process's limit of open files as far as the system lets it."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@functools.cache  # of the job's start: later, its own memory would count as that of others
def memory() -> int:
    """Bytes of memory that this job may use: the machine's, or a smaller limit less the memory that
    the container's processes already hold."""
    free = psutil.virtual_memory().total
    for group in groups("memory"):
        limit = read(group, "memory.max", "memory.limit_in_bytes")
        if limit and limit != ["max"]:
            used = read(group, "memory.current", "memory.usage_in_bytes")
            words = read(group, "memory.stat")
            stat = dict(zip(words[::2], map(int, words[1::2]), strict=True))
            prefix = "total_" if "total_active_file" in stat else ""  # version 1: with subgroups
            cached = stat[f"{prefix}active_file"] + stat[f"{prefix}inactive_file"]
            free = min(free, int(limit[0]) - int(used[0]) + cached)  # cached files make room
    return free
