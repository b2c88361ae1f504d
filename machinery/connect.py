"""Connecting the ranks of a job, on one machine or several, and showing which ranks are late.

Ranks meet at MASTER_ADDR and MASTER_PORT, in a store of PyTorch, which rank 0 keeps.
There they exchange addresses, which reveal the network between the machines, and where each of them
is in the program. So a rank that waits can name the ranks that it waits for.
"""

import contextlib
import functools
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from datetime import timedelta

import psutil
import torch.distributed as dist

from machinery.config import UserError

PATIENCE = 180  # seconds until a rank that waits prints a line, and between two such lines
BEAT = 10  # seconds between two reports of a rank to the store
SOON = 25  # seconds until a name is known, or a new file is seen through a network disk's cache
LONGEST = 1800  # seconds until a machine that starts later than others must be there


def print_line(text: str) -> None:
    """A line on stderr, below the progress bar."""
    print(f"\n{text}", file=sys.stderr, flush=True)


def wait_until(problem: Callable[[], str | None], limit: float) -> None:
    """Call `problem` until it returns None. Sometimes print what it returns, once per machine.

    Raises UserError with that text after `limit` seconds.
    """
    started = time.monotonic()
    due = 15
    while True:
        text = problem()
        if text is None:
            return
        waited = time.monotonic() - started
        if waited > limit:
            raise UserError(text)
        if waited > due and os.environ["LOCAL_RANK"] == "0":
            print_line(f"waiting {waited:.0f} s: {text}")
            due += PATIENCE
        time.sleep(0.3)


# ---- Where the ranks meet ------------------------------------------------------------------------


def connect() -> None:
    """Wait for all ranks, choose the network between them, and start to watch their progress.

    Uses the variables of config.set_rank_env. Raises UserError if rank 0 or others cannot be found.
    """
    world_size = int(os.environ["WORLD_SIZE"])
    if world_size == 1:
        return
    rank = int(os.environ["RANK"])
    store = find_rank_0(serve=rank == 0)
    address = local_address(os.environ["MASTER_ADDR"])
    store.set(f"at{rank}", "0|0|start")
    store.append("arrived", f"{rank} {socket.gethostname()} {address}\n")
    wait_until(lambda: missing(store, world_size), LONGEST)
    _, hosts, addresses = zip(*arrivals(store), strict=True)
    network = choose_network(address, addresses)
    progress.watch(store, list(hosts))
    progress.at(f"connect the ranks {network}")


def find_rank_0(serve: bool) -> dist.Store:
    """The store of rank 0. Waits until it answers. serve: this is rank 0, which keeps it."""
    host = os.environ["MASTER_ADDR"]
    port = os.environ["MASTER_PORT"]

    def unknown() -> str | None:
        try:
            socket.getaddrinfo(host, port)
        except OSError as error:
            return f"MASTER_ADDR {host}: {error}: set it to the name or address of rank 0's machine"

    def silent() -> str | None:
        try:
            socket.create_connection((host, port), timeout=5).close()
        except OSError as error:
            return (f"MASTER_ADDR {host} MASTER_PORT {port}: {error}: rank 0 answers there once it "
                    "has started: set them to its machine; this is rank "
                    f"{os.environ['RANK']} on {socket.gethostname()}")

    # torchrun keeps a store, in which restarted ranks would find the addresses of dead ones: use it
    # only to announce a new one
    torchruns = os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None) == "True"
    wait_until(unknown, SOON)
    if serve:
        store = open_store("127.0.0.1", 0 if torchruns else int(port), serve)
    wait_until(silent, SOON if serve else LONGEST)
    if torchruns:
        key = f"port{os.environ['TORCHELASTIC_RESTART_COUNT']}"
        agents = open_store(host, int(port), serve=False)
        agents.set_timeout(timedelta(seconds=LONGEST))
        if serve:
            agents.set(key, str(store.port))
        os.environ["MASTER_PORT"] = agents.get(key).decode()
    return store if serve else open_store(host, int(os.environ["MASTER_PORT"]), serve)


def open_store(host: str, port: int, serve: bool) -> dist.TCPStore:
    """A connection to a store. PyTorch makes its own one, and blocks that while it waits. Raises
    UserError."""
    try:
        return dist.TCPStore(host, port, None, serve, timedelta(seconds=60),
                             wait_for_workers=False, multi_tenant=True)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"MASTER_PORT: {reason}: is another program there? Set a free one "
                        "(deepspeed --master_port, torchrun --master-port)") from error


def missing(store: dist.Store, world_size: int) -> str | None:
    """Which ranks have not arrived yet, as text, or None. Raises UserError if some are doubled."""
    try:
        ranks = [rank for rank, *_ in arrivals(store)]
    except RuntimeError as error:
        raise UserError("rank 0 has ended: its own messages name the cause") from error
    if len(ranks) > len(set(ranks)):
        raise UserError(f"two processes have the same RANK: {ranks}: each machine needs its own "
                        "--node_rank")
    absent = [rank for rank in range(world_size) if rank not in ranks]
    if not absent:
        return None
    return (f"{len(ranks)} of {world_size} ranks have arrived, not {numbers(absent)}: start the "
            "job on all machines, each with its own ranks")


def arrivals(store: dist.Store) -> list[tuple[int, str, str]]:
    """(rank, host name, address towards MASTER_ADDR) of each rank that has arrived, by rank."""
    lines = [line.split() for line in store.get("arrived").decode().splitlines()]
    return sorted((int(rank), host, address) for rank, host, address in lines)


def numbers(ranks: list[int]) -> str:
    """[3, 7] -> "ranks 3, 7"."""
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}{more}"


def local_address(host: str) -> str:
    """This machine's address on the way to `host`. Sends nothing."""
    family, *_, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return probe.getsockname()[0]


def choose_network(address: str, everyones: Iterable[str]) -> str:
    """On several machines, let gloo and NCCL use the network that leads to MASTER_ADDR.

    gloo would use the address of the machine's own name, which Debian sets to 127.0.1.1. Users may
    set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME. address: this rank's, one of everyone's.
    """
    if len(set(everyones)) == 1:
        return "on this machine"
    if address == "::1" or address.startswith("127."):  # here is rank 0: ask the way to another
        address = local_address(next(other for other in everyones if other != address))
    found = psutil.net_if_addrs()
    for name, addresses in found.items():
        if address in [entry.address.partition("%")[0] for entry in addresses]:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            if not any(other.startswith("ib") for other in found):  # NCCL prefers InfiniBand
                os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
    return f"through GLOO_SOCKET_IFNAME {os.environ.get('GLOO_SOCKET_IFNAME')}"


# ---- Waiting -------------------------------------------------------------------------------------


@functools.cache
def patient_group() -> dist.ProcessGroup:
    """All ranks, over TCP and without a timeout: for waiting on disks, beside NCCL's traffic."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=365))


def gather(value) -> list:
    """The values of all ranks, on all ranks. Waits as long as it takes (see Progress)."""
    progress.at(progress.place)
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=patient_group())
    return values


def agree(facts: dict) -> dict:
    """Return the facts. Raise UserError on all ranks, naming the first one that differs.

    Otherwise they would train on different batches or wait for each other in different collectives.
    """
    hosts, ranks = zip(*gather((socket.gethostname(), facts)), strict=True)
    for name in facts:
        values = [theirs.get(name) for theirs in ranks]
        others = [rank for rank, value in enumerate(values) if value != values[0]]
        if others:
            raise UserError(f"{name} is {values[0]!r} on rank 0 ({hosts[0]}) and "
                            f"{values[others[0]]!r} on {numbers(others)} ({hosts[others[0]]}): all "
                            "machines need the same code, packages, YAML, JSON, data and weights")
    return facts


class Progress:
    """Where this rank is in the program and, if it does not proceed, which ranks are late.

    count: how many places it has reached. All ranks reach the same ones, so a late rank has a
    smaller count. A thread sends both to the store.
    """

    def __init__(self):
        self.place = "start"
        self.count = 0
        self.since = time.monotonic()
        self.ended = threading.Event()
        self.watcher = None

    def at(self, place: str) -> None:
        """Call it on all ranks."""
        self.place = place
        self.count += 1
        self.since = time.monotonic()

    def watch(self, store: dist.Store, hosts: list[str]) -> None:
        """Print a line whenever this rank has been at one place for PATIENCE seconds, if it is the
        first of those that wait. hosts: the machine of each rank."""
        self.store = store
        self.hosts = hosts
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.watcher.start()

    def stop(self) -> None:
        """Before the store ends."""
        self.ended.set()
        if self.watcher:
            self.watcher.join()

    def _watch(self) -> None:
        rank = int(os.environ["RANK"])
        # one rank of each machine reports that rank 0 does not answer
        speaks = rank == 1 or os.environ["LOCAL_RANK"] == "0"
        views = deque(maxlen=3)  # of all ranks' reports
        reader = None
        beat = 0
        due = PATIENCE
        while not self.ended.wait(BEAT):
            beat += 1
            waited = time.monotonic() - self.since
            silent = reader and reader.is_alive()
            if not silent:
                with contextlib.suppress(RuntimeError):  # rank 0 has ended; Neighbor ends this one
                    self.store.set(f"at{rank}", f"{self.count}|{beat}|{self.place}")
            if waited < PATIENCE - 5 * BEAT:
                due = PATIENCE
                views.clear()
            elif not silent:  # in a thread: if rank 0's machine is frozen, it never answers
                reader = threading.Thread(target=self._read, args=[views], daemon=True)
                reader.start()
            if waited > due:
                due += PATIENCE
                late = None
                if silent and speaks:
                    late = f"for rank 0 on {self.hosts[0]}: no answer"
                elif not silent and len(views) == views.maxlen:
                    late = late_ranks(rank, views[0], views[-1], self.hosts)
                if late:
                    print_line(f"waiting {waited:.0f} s {late}")

    def _read(self, views: deque) -> None:
        with contextlib.suppress(RuntimeError):
            reports = self.store.multi_get([f"at{rank}" for rank in range(len(self.hosts))])
            views.append([report.decode().split("|", 2) for report in reports])


def late_ranks(rank: int, before: list, now: list, hosts: list[str]) -> str | None:
    """What `rank` waits for, as text. None if another rank will print it.

    before, now: what each rank has reported, (count, beat, place). Frozen ranks repeat themselves.
    """
    counts = [int(count) for count, *_ in now]
    frozen = [old == new for old, new in zip(before, now, strict=True)]
    furthest = max(count for count, ice in zip(counts, frozen, strict=True) if not ice)
    groups: dict[str, list[int]] = {}
    for other, (_, _, place) in enumerate(now):
        if frozen[other]:
            where = f"on {hosts[other]}: no answer since {place!r}"
        elif counts[other] < furthest:
            where = f"on {hosts[other]}, at {place!r}"
        elif other < rank:
            return None
        else:
            continue
        groups.setdefault(where, []).append(other)
    if counts[rank] < furthest:
        return None
    if not groups:
        return f"at {now[rank][2]!r}, as all ranks"
    return "; ".join(f"for {numbers(ranks)} {where}" for where, ranks in groups.items())


progress = Progress()
