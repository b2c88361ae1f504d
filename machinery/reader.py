"""Processes that read requests: parse them, decode their pictures, resize them for the model.

Reading in the server's own process would delay the model: Python runs one thread at a time, and a
request may be 32 MB of JSON. A reader that crashes, or is killed for its memory, fails only the
request that it was reading.
"""

import asyncio
import contextlib
import os
import signal
import traceback
from multiprocessing import get_context
from multiprocessing.connection import Connection

import torch

from act import Policy
from machinery import wire
from machinery.config import UserError
from machinery.frames import end_with_parent

LANES = (  # most bytes of a request and pixels of a picture, and the reader's niceness
    (1 << 18, 1 << 19, 0),
    (1 << 20, 1 << 21, 5),
    (4 * wire.MAX_BODY, wire.MAX_PIXELS, 15))


class Reader:
    """One process. facts: of read_requests."""

    def __init__(self, *facts):
        self.facts = facts
        self.pipe: Connection | None = None  # None: there is no process yet, or it has died
        self.turn = asyncio.Semaphore(1)

    def start(self) -> None:
        context = get_context("fork")  # it needs the policy, but no copy of the weights
        self.pipe, end = context.Pipe()
        context.Process(target=read_requests, args=(end, *self.facts), daemon=True).start()
        end.close()

    async def read(self, parse: str, body: bytes | str) -> wire.Query:
        """Run one of wire's functions. Raises UserError, or wire.Costly."""
        async with self.turn:
            reply = await asyncio.to_thread(self.exchange, parse, body)
        if isinstance(reply, Exception):
            raise reply
        return reply

    def exchange(self, *request):
        if self.pipe is None:
            self.start()
        try:
            self.pipe.send(request)
            return self.pipe.recv()
        except (EOFError, OSError):
            self.pipe = None
            return RuntimeError("the process that read this request died: out of memory?")


class Readers:
    """A reader for each of LANES: costly requests do not delay others."""

    def __init__(self, policy: Policy, keep_views: bool):
        self.lanes = []
        for most_bytes, most_pixels, nice in LANES:
            self.lanes.append((most_bytes, Reader(policy, keep_views, most_pixels, nice)))

    def start(self) -> None:
        for _, reader in self.lanes:
            reader.start()

    async def read(self, parse: str, body: bytes | str) -> wire.Query:
        """Run one of wire's functions. Raises UserError."""
        for most_bytes, reader in self.lanes:
            if len(body) <= most_bytes:
                with contextlib.suppress(wire.Costly):
                    return await reader.read(parse, body)
        raise wire.RequestError(f"more than {wire.MAX_BODY} bytes")


def read_requests(
    pipe: Connection, policy: Policy, keep_views: bool, most_pixels: int, nice: int
) -> None:
    """A reader's process. It ends with the server.

    keep_views: does the server need them? most_pixels: of a picture that it decodes; nice: how much
    to lower its priority
    """
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the server still finishes requests
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # a copy of a client's connection would keep it open
    for file in os.listdir("/proc/self/fd"):
        if int(file) not in (0, 1, 2, pipe.fileno()):
            with contextlib.suppress(OSError):
                os.close(int(file))
    os.nice(nice)
    torch.set_num_threads(1)  # OpenMP hangs in a fork
    with contextlib.suppress(EOFError):
        while True:
            parse, body = pipe.recv()
            try:
                reply = getattr(wire, parse)(body, policy, most_pixels)
                reply.pixels = policy.prepare_views(reply.views).numpy()
                if not keep_views:
                    reply.views = reply.files = []
            except (UserError, wire.Costly) as error:
                reply = error
            except Exception:
                reply = RuntimeError(traceback.format_exc())
            pipe.send(reply)
