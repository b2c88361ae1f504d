"""Connections of serve_vla.py, with limits that uvicorn lacks: no client can lock out others."""

import asyncio
import ipaddress
import urllib.parse
from typing import ClassVar

import uvicorn
from starlette.applications import Starlette
from starlette.requests import HTTPConnection
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from machinery.wire import MAX_BODY

MAX_FRAMES = 1000  # per websocket message; openpi's client sends one
MAX_SILENT = 1024  # connections without a request; beyond, the first is closed
HEAD_SECONDS = 10  # for a request's head to arrive
STOP_SECONDS = 30  # for open requests to finish after SIGTERM


class Socket(WebSocketsSansIOProtocol):
    """A websocket that closes if a message has more than MAX_FRAMES frames: uvicorn limits only the
    bytes of a message, but memory also grows with every empty frame."""

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if len(self.frames) > MAX_FRAMES:
            self.transport.close()


class Http(H11Protocol):
    """A connection that closes if it is silent: after HEAD_SECONDS, or as the first of more than
    MAX_SILENT. uvicorn waits forever."""

    silent: ClassVar[dict] = {}  # those that are silent, the first first

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.wait_for_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete:  # no further request was waiting
            self.wait_for_request()

    def wait_for_request(self) -> None:
        self.silent[self] = self.cycle
        self.loop.call_later(HEAD_SECONDS, self.close_if_silent, self.cycle)
        if len(self.silent) > MAX_SILENT:
            first = next(iter(self.silent))
            first.close_if_silent(self.silent.pop(first))

    def close_if_silent(self, previous) -> None:
        if self.cycle is previous and self.transport.get_protocol() is self:
            self.transport.close()

    def handle_events(self) -> None:
        super().handle_events()
        if self.silent.get(self, self.cycle) is not self.cycle:
            del self.silent[self]

    def handle_websocket_upgrade(self, event) -> None:
        self.silent.pop(self, None)
        super().handle_websocket_upgrade(event)

    def connection_lost(self, exc: Exception | None) -> None:
        self.silent.pop(self, None)
        super().connection_lost(exc)


def uvicorn_config(app: Starlette) -> uvicorn.Config:
    """uvicorn's settings. By default it closes HTTP connections that idle for 5 seconds after a
    reply, and websockets that do not answer pings."""
    return uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", http=Http,
                          ws=Socket, ws_max_size=MAX_BODY, ws_per_message_deflate=False,
                          timeout_graceful_shutdown=STOP_SECONDS)


def is_foreign(request: HTTPConnection, own_host: str) -> bool:
    """Does the request come from another server's web page? Any website may let a browser call
    127.0.0.1, and may point its own name there. Programs send no Origin."""
    origin = request.headers.get("origin")
    host = request.headers.get("host", "")
    if origin is None:
        return False
    try:
        name = urllib.parse.urlsplit(f"//{host}").hostname
        if name not in ("localhost", own_host):
            ipaddress.ip_address(name)
    except ValueError:
        return True
    return origin not in (f"http://{host}", f"https://{host}")
