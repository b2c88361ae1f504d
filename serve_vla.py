"""Act over HTTP: a robot's computer posts what its camera sees and an instruction, and gets the action.

    python serve_vla.py --checkpoint runs/demo+n1+b32+x7          a run, a checkpoint, OpenVLA's, a hub id

    POST /act   {"image": ..., "instruction": "open the drawer", "unnorm_key": "bridge_orig"}  ->  the action
    GET /health {"status": "ok", "model": ..., "unnorm_keys": [...], "cameras": [...], "action": {...}, ...}
    websocket / {"observation/image": ..., "prompt": "open the drawer"}  ->  {"actions": ..., ...}

OpenVLA's clients (its vla-scripts/deploy.py) work unchanged. An image is any of
    {"__numpy__": base64, "dtype": "|u1", "shape": [H, W, 3]}      what json_numpy makes of an array
    [[[r, g, b], ...], ...]                                        plain lists of whole numbers, 0..255
    "..."                                                          base64 of a JPEG or PNG file
A model trained with several cameras takes `images`, {camera: image}, or, also where it looks at several
frames, a list (window_size x cameras, oldest first); one trained with the robot's state takes `proprio`, its
numbers. unnorm_key may be left out if the model knows one dataset. `prefix`, (k, A), is how the chunk begins,
where that is settled already (act.py). The reply is the action, (A,) or (action_chunk, A), in the form of the
request: as json_numpy has it if an array came so, else plain lists; and to a request {"encoded": "<all of
this as a string>"}, a string. /health names the cameras, and what each number of action and state is
(convention.py). Mistakes get status 4xx and {"error": what is wrong and what to do}.

openpi's clients (`openpi_client.websocket_client_policy`) work unchanged, too, by websocket: openpi_wire.py
has the names of what they send. First they are told what /health tells; a mistake is answered by text.

Read Batcher: while the model computes, requests queue, and then go through it together, whichever way they
came. wire.py reads them.
The server listens on this machine alone unless --host says otherwise, and then wants a password: --token FILE
or --token VARIABLE, which clients send as `Authorization: Bearer ...` (openpi's: api_key). Nothing is
encrypted; for a robot elsewhere, `ssh -L 8000:127.0.0.1:8000 this-machine` needs neither. Nothing that comes
in is ever unpickled.
"""

import argparse
import asyncio
import contextlib
import hmac
import ipaddress
import json
import queue
import signal
import socket
import threading
import time
import traceback
from collections.abc import Awaitable, Callable
from concurrent.futures import Future

import numpy as np
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from act import Policy, load_vla
from machinery.checkpoint import CheckpointError
from machinery.config import UserError, exit_with_one_line, read_secret
from machinery.openpi_wire import pack, pack_reply, parse_observation
from machinery.wire import MAX_BODY, Query, RequestError, encode_action, parse_request

BIG_BODY = 1 << 20  # bytes; longer ones are parsed one at a time, so that others get their turn
MAX_CONNECTIONS = 256  # more get status 503
HEAD_SECONDS = 10  # to send a request's first lines in, after connecting or after the reply before
BODY_SECONDS = 60  # to send a request in
MAX_FRAMES = 1000  # that a message over a websocket may come in; openpi's client sends one
STOP_SECONDS = 30  # to answer what is under way when told to stop
TOKEN_WANTED = "send the server's token in a header `Authorization: Bearer ...`"


# ---- The model's thread ------------------------------------------------------------------------------------


class Batcher(threading.Thread):
    """Runs the model on all requests that came while it was busy with the ones before."""

    def __init__(self, policy: Policy, max_batch: int):
        super().__init__(daemon=True)
        self.policy, self.max_batch = policy, max_batch
        self.waiting: queue.SimpleQueue[tuple[Query, Future]] = queue.SimpleQueue()

    def ask(self, query: Query) -> Future:
        """Queue a request; the result will be (action, size of the batch it was in)."""
        future: Future = Future()
        self.waiting.put((query, future))
        return future

    def run(self) -> None:
        """The thread: for ever."""
        while True:
            batch = [self.waiting.get()]
            while len(batch) < self.max_batch and not self.waiting.empty():
                batch.append(self.waiting.get())  # nobody else takes any, so there is one
            alike: dict[tuple, list] = {}
            for query, future in batch:
                if future.set_running_or_notify_cancel():
                    alike.setdefault((query.unnorm_key, len(query.prefix)), []).append((query, future))
            for asked in alike.values():
                self.answer(asked)

    def answer(self, asked: list[tuple[Query, Future]]) -> None:
        """Requests of one unnorm_key and length of prefix. If they fail, each is tried on its own, so that
        none fails for another's sake."""
        queries = [query for query, _ in asked]
        try:
            proprio = None if queries[0].proprio is None else np.stack([query.proprio for query in queries])
            actions = self.policy.predict_action(
                [query.views for query in queries], [query.instruction for query in queries],
                queries[0].unnorm_key, proprio, np.stack([query.prefix for query in queries]))
        except Exception as error:
            if len(asked) == 1:
                asked[0][1].set_exception(error)
            else:
                for one in asked:
                    self.answer([one])
            return
        for (_, future), action in zip(asked, actions, strict=True):
            future.set_result((action, len(asked)))


# ---- HTTP --------------------------------------------------------------------------------------------------


class Connection(H11Protocol):
    """A connection that is closed when it does not begin a request within HEAD_SECONDS: those that say
    nothing would take the places of others."""

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self.deadline = self.loop.call_later(HEAD_SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        upgraded = self.transport.get_protocol() is not self  # it is a Socket now
        if upgraded or (self.cycle and not self.cycle.response_complete):  # a request is being answered
            self.deadline.cancel()
        elif self.deadline.cancelled():
            self.deadline = self.loop.call_later(HEAD_SECONDS, self.transport.close)


class Socket(WebSocketsSansIOProtocol):
    """A websocket. It is closed when it does not answer pings (uvicorn's rule) or a message does not become
    whole within BODY_SECONDS; when the server stops, after the answer that is under way."""

    deadline, answering, stopping = None, False, False

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if len(self.frames) > MAX_FRAMES:
            self.transport.close()
        if self.deadline and not self.frames:  # the message is whole
            self.deadline.cancel()
            self.deadline = None
        elif self.frames and not self.deadline:  # one has begun
            self.deadline = self.loop.call_later(BODY_SECONDS, self.transport.close)

    async def receive(self) -> dict:
        self.answering = False
        if self.stopping:
            super().shutdown()
        message = await super().receive()
        self.answering = message["type"] == "websocket.receive"
        return message

    async def send(self, message: dict) -> None:
        await super().send(message)
        if message["type"] == "websocket.http.response.body":
            self.handshake_complete = True  # it is refused; uvicorn 0.54 would log that no answer was given

    def shutdown(self) -> None:
        self.stopping = True
        if not self.answering:
            super().shutdown()


class Service:
    """What the server does at each of its addresses. token: what clients must send, if anything."""

    def __init__(self, batcher: Batcher, model: str, token: str | None):
        self.batcher, self.policy, self.token = batcher, batcher.policy, token
        self.facts = describe(self.policy, model)
        self.one_at_a_time, self.sockets = asyncio.Semaphore(1), asyncio.Semaphore(MAX_CONNECTIONS)

    def app(self) -> Starlette:
        """The addresses."""
        async def not_found(request: Request, error: HTTPException) -> Response:
            return refusal(f"{error.detail}: POST /act or GET /health", error.status_code)

        routes = [Route("/act", self.act, methods=["POST"]), Route("/health", self.health),
                  WebSocketRoute("/", self.talk)]
        return Starlette(routes=routes, exception_handlers={HTTPException: not_found})

    def authorized(self, request: HTTPConnection) -> bool:
        """Did it send the token? Api-Key is how openpi's client says Bearer."""
        kind, _, sent = request.headers.get("authorization", "").partition(" ")
        return self.token is None or (kind in ("Bearer", "Api-Key")
                                      and hmac.compare_digest(sent.encode(), self.token.encode()))

    async def answer(self, arriving: Awaitable, parse: Callable
                     ) -> tuple[int, np.ndarray | str, Query | None]:
        """A request whose bytes are arriving -> (status, the action or what is wrong, the request)."""
        started, facts, query = time.perf_counter(), "", None
        try:
            body = await arriving
            async with self.one_at_a_time if len(body) > BIG_BODY else contextlib.nullcontext():
                query = await asyncio.to_thread(parse, body, self.policy)
            reply, size = await asyncio.wrap_future(self.batcher.ask(query))
            status = 200
            facts = f"batch {size} unnorm_key {query.unnorm_key} instruction {query.instruction!a}"
        except UserError as error:  # the model's own are about what it was sent, too
            status, reply, facts = getattr(error, "status", 400), str(error), f"error {str(error)!a}"
        except (asyncio.TimeoutError, ClientDisconnect):  # noqa: UP041 (another one, in Python 3.10)
            status, reply, facts = 408, "the request did not arrive", "error 'did not arrive'"
        except Exception:
            traceback.print_exc()
            status, facts = 500, "error 'see above'"
            reply = "the model failed on this request; the server's log says why"
        log(f"act status {status} ms {1000 * (time.perf_counter() - started):.0f} {facts}")
        return status, reply, query

    async def act(self, request: Request) -> Response:
        """POST /act."""
        async def arriving() -> bytes:
            if not self.authorized(request):
                raise RequestError(TOKEN_WANTED, 401)
            return await asyncio.wait_for(read_body(request), BODY_SECONDS)

        status, reply, query = await self.answer(arriving(), parse_request)
        if status != 200:
            return refusal(reply, status)
        return Response(encode_action(reply, query.form), media_type="application/json")

    async def health(self, request: Request) -> Response:
        """GET /health."""
        facts = self.facts if self.authorized(request) else {"status": "ok"}
        return Response(json.dumps(facts), media_type="application/json")

    async def talk(self, socket: WebSocket) -> None:
        """openpi's protocol: what the model is, then an action for each observation; a mistake is told as
        text, and does not end the connection."""
        wrong = None if self.authorized(socket) else (TOKEN_WANTED, 401)
        if self.sockets.locked():
            wrong = (f"there are {MAX_CONNECTIONS} connections: close some", 503)
        if wrong:
            log(f"talk status {wrong[1]} error {wrong[0]!a}")
            return await socket.send_denial_response(refusal(*wrong))
        with contextlib.suppress(WebSocketDisconnect):
            async with self.sockets:
                await socket.accept()
                await socket.send_bytes(pack(self.facts))
                while (message := await socket.receive())["type"] == "websocket.receive":
                    started = time.perf_counter()
                    sent = asyncio.sleep(0, message.get("bytes", message.get("text")))  # it has arrived
                    status, reply, _ = await self.answer(sent, parse_observation)
                    if status == 200:
                        await socket.send_bytes(pack_reply(reply, 1000 * (time.perf_counter() - started)))
                    else:
                        await socket.send_text(reply)


def describe(policy: Policy, model: str) -> dict:
    """What a client may want to know of the model."""
    robots = {key: policy.convention(key) for key in sorted(policy.norm_stats)}
    facts = {"status": "ok", "model": model, "unnorm_keys": [*robots], "cameras": policy.cfg.cameras,
             "images": policy.vla.num_images, "proprio": policy.cfg.use_proprio,
             "action_shape": [policy.cfg.action_chunk, len(next(iter(robots.values())).action)],
             "max_prefix": policy.max_prefix,
             "action": {key: robot.action for key, robot in robots.items()}}
    if policy.cfg.use_proprio:
        facts["state"] = {key: robot.state for key, robot in robots.items()}
    return facts


def refusal(message: str, status: int) -> Response:
    """What is wrong, and what to do, as JSON."""
    return Response(json.dumps({"error": message}), status, media_type="application/json")


async def read_body(request: Request) -> bytes:
    """The body of a request, if it is not too long."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise RequestError(f"the request: longer than {MAX_BODY} bytes: send a smaller image, or a JPEG",
                               413)
    return bytes(body)


def log(text: str) -> None:
    """One line of key value pairs."""
    print(text, flush=True)


def bind(host: str, port: int) -> socket.socket:
    """Take the address, before a model is loaded for minutes. Raises UserError."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {host} --port {port}: {error}: name another --port, or 0 for any free one"
                        ) from error
    return listener


def serve(policy: Policy, model: str, listener: socket.socket, max_batch: int, token: str | None) -> None:
    """Answer requests until SIGTERM or Ctrl-C; then finish those under way."""
    batcher = Batcher(policy, max_batch)
    config = uvicorn.Config(Service(batcher, model, token).app(), log_level="warning",
                            access_log=False, lifespan="off", limit_concurrency=MAX_CONNECTIONS,
                            http=Connection, ws=Socket, ws_max_size=MAX_BODY, ws_per_message_deflate=False,
                            timeout_graceful_shutdown=STOP_SECONDS)
    # a first action, before any robot asks: kernels are compiled, and a model that cannot act shows it
    key = next(iter(policy.norm_stats))
    state = np.zeros(len(policy.convention(key).state)) if policy.cfg.use_proprio else None
    policy.predict_action([np.zeros((224, 224, 3), np.uint8)] * policy.vla.num_images, "wait", key, state)
    batcher.start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn sends itself the signal once more after it stopped
    listener.listen()  # who reads the next line may connect
    host, port, *_ = listener.getsockname()
    for key in sorted(policy.norm_stats):
        robot = policy.convention(key)
        log(f"unnorm_key {key} cameras {','.join(policy.cfg.cameras)} action {','.join(robot.action)}"
            + f" state {','.join(robot.state)}" * policy.cfg.use_proprio)
    log(f"serving http://{host}:{port} model {model} unnorm_keys {','.join(sorted(policy.norm_stats))}")
    uvicorn.Server(config).run([listener])
    log("stopped")


def on_this_machine(host: str) -> bool:
    """Can only this machine reach an address to listen at? Raises UserError for one that is not known."""
    try:
        addresses = {address[0] for *_, address in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise UserError(f"--host {host}: {error}: name an address of this machine, or 0.0.0.0") from error
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="a run, a checkpoint, OpenVLA's, or a hub id")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen; 0.0.0.0: the whole network")
    parser.add_argument("--token", help="a file or environment variable with the password of the clients")
    parser.add_argument("--no_token", action="store_true", help="let everybody in who reaches --host")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one")
    parser.add_argument("--device", choices=["cuda", "cpu"],
                        default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--int8", action="store_true",
                        help="hold the language model's matrices in 8 bits: half the memory")
    parser.add_argument("--max_batch", type=int,
                        help="most requests the model sees at once; default: 16, with --speed_up 1")
    parser.add_argument("--speed_up", action="store_true",
                        help="on a GPU: compile for minutes whenever a size of batch or length of prompt is "
                        "new, then answer several times as fast")
    args = parser.parse_args()
    if args.speed_up and args.device == "cpu":
        parser.error("--speed_up records what a GPU does: it needs --device cuda")
    dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    with exit_with_one_line():
        token = read_secret(args.token, "--token") if args.token else None
        if token == "":
            raise UserError(f"--token: {args.token!r} is empty: write a long random text there")
        if not on_this_machine(args.host) and not (token or args.no_token):
            raise UserError(f"--host {args.host} lets others in than this machine: give a password with "
                            "--token FILE or --token VARIABLE, or say --no_token")
        listener = bind(args.host, args.port)
        policy = load_vla(args.checkpoint, args.device, torch.bfloat16 if dtype == "bf16" else torch.float32,
                          args.int8)
        if not policy.norm_stats:
            raise CheckpointError(f"{args.checkpoint}: has no dataset statistics, so it cannot act: a VLA "
                                  "has them, a plain VLM does not")
        if args.speed_up:
            policy.speed_up()
        serve(policy, args.checkpoint, listener, args.max_batch or (1 if args.speed_up else 16), token)


if __name__ == "__main__":
    main()
