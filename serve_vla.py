"""Act over HTTP: a robot's computer posts camera images and an instruction and gets an action.

    python serve_vla.py --checkpoint runs/demo+n1+b32+x7   a run, a checkpoint, OpenVLA's, a hub id

    POST /act   {"image": ..., "instruction": "open the drawer", "unnorm_key": "bridge_orig"}
                -> the action
    GET /health {"status": "ok", "model": ..., "unnorm_keys": [...], "cameras": [...], ...}
    websocket / {"observation/image": ..., "prompt": "open the drawer"} -> {"actions": ..., ...}

Clients of OpenVLA (its vla-scripts/deploy.py) and of openpi
(`openpi_client.websocket_client_policy`) work unchanged. An image is any of

    {"__numpy__": base64, "dtype": "|u1", "shape": [H, W, 3]}      json_numpy's form of an array
    [[[r, g, b], ...], ...]                                        lists of integers 0..255
    "..."                                                          base64 of a JPEG or PNG file

A model trained with several cameras takes `images`: {camera: image}, or a list (window_size x
cameras, oldest first). A model trained with the robot's state takes `proprio`, a list of numbers.
unnorm_key may be left out if the model knows one dataset. `prefix`, (k, A), holds the first actions
of the chunk if they are settled already (act.py).

The reply is the action, (A,) or (action_chunk, A): a json_numpy object if the request held one,
else plain lists. A request {"encoded": "<all of this as a string>"} gets a string. /health labels
each number of action and state (machinery/convention.py). Mistakes get status 4xx and
{"error": the problem and its cure}. A websocket first sends the facts of /health, and answers a
mistake with text.

Read Batcher: requests that arrive while the model computes are answered together, whichever
protocol they use. machinery/wire.py parses them.

The server listens on 127.0.0.1. Any other --host requires a token: --token FILE or
--token VARIABLE, which clients send as `Authorization: Bearer ...` (openpi's: api_key). Web pages
are refused. Nothing is encrypted, and slow or silent clients are not disconnected. On a network
that you do not trust, put nginx in front or use `ssh -L 8000:127.0.0.1:8000 this-machine`, which
needs no token.
"""

import argparse
import asyncio
import contextlib
import hmac
import queue
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from act import Policy, load_vla
from machinery.checkpoint import CheckpointError
from machinery.config import UserError, exit_with_one_line, read_secret
from machinery.wire import MAX_BODY, Query, encode_action, pack, parse_observation, parse_request

BIG_BODY = 1 << 20  # bytes; longer requests are parsed one at a time, so as not to delay small ones
MAX_CLIENTS = 256  # requests and websockets at once; more get status 503
BODY_SECONDS = 60  # for a request's body to arrive
MAX_FRAMES = 1000  # per websocket message; openpi's client sends one
STOP_SECONDS = 30  # for open requests to finish after SIGTERM
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


# ---- The model's thread ------------------------------------------------------------------------


class Batcher(threading.Thread):
    """Runs the model on all requests that arrived during its previous run."""

    def __init__(self, policy: Policy, max_batch: int):
        super().__init__(daemon=True)
        self.policy = policy
        self.max_batch = max_batch
        self.waiting: queue.SimpleQueue[tuple[Query, Future]] = queue.SimpleQueue()

    def ask(self, query: Query) -> Future:
        """Queue a request. The result will be (action, number of requests in its batch)."""
        future: Future = Future()
        self.waiting.put((query, future))
        return future

    def run(self) -> None:
        """The thread's loop. It never ends."""
        while True:
            batch = [self.waiting.get()]
            while len(batch) < self.max_batch and not self.waiting.empty():
                batch.append(self.waiting.get())  # does not block: this is the only reader
            groups: dict[tuple, list] = {}  # one call of the model each
            for query, future in batch:
                if future.set_running_or_notify_cancel():
                    group = groups.setdefault((query.unnorm_key, len(query.prefix)), [])
                    group.append((query, future))
            for requests in groups.values():
                self.answer(requests)

    def answer(self, requests: list[tuple[Query, Future]]) -> None:
        """Run the model on requests of one unnorm_key and prefix length. If that fails, run each by
        itself, so that only the faulty ones get an error."""
        queries = [query for query, _ in requests]
        try:
            proprio = None
            if queries[0].proprio is not None:
                proprio = np.stack([query.proprio for query in queries])
            actions = self.policy.predict_action(
                [query.views for query in queries],
                [query.instruction for query in queries],
                queries[0].unnorm_key,
                proprio,
                np.stack([query.prefix for query in queries]))
        except Exception as error:
            if len(requests) == 1:
                requests[0][1].set_exception(error)
            else:
                for request in requests:
                    self.answer([request])
            return
        for (_, future), action in zip(requests, actions, strict=True):
            future.set_result((action, len(requests)))


# ---- HTTP and websockets -----------------------------------------------------------------------


class Socket(WebSocketsSansIOProtocol):
    """A websocket that closes if a message has more than MAX_FRAMES frames: uvicorn limits only the
    bytes of a message, but memory also grows with every empty frame."""

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if len(self.frames) > MAX_FRAMES:
            self.transport.close()


class Service:
    """The server's addresses. token: clients must send it, unless None."""

    def __init__(self, batcher: Batcher, model: str, token: str | None):
        self.batcher = batcher
        self.policy = batcher.policy
        self.token = token
        self.facts = describe(self.policy, model)
        self.big_bodies = asyncio.Semaphore(1)
        self.clients = asyncio.Semaphore(MAX_CLIENTS)

    def app(self) -> Starlette:
        return Starlette(routes=[Route("/act", self.act, methods=["POST"]),
                                 Route("/health", self.health),
                                 WebSocketRoute("/", self.websocket)])

    def authorized(self, request: HTTPConnection) -> bool:
        """Did the client send the token? openpi's client calls it Api-Key."""
        if self.token is None:
            return True
        kind, _, sent = request.headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(sent.encode(), self.token.encode())
        return kind in ("Bearer", "Api-Key") and same

    def refusal(self, request: HTTPConnection) -> Response | None:
        """The reply to a client that is not authorized, or is one too many."""
        if "origin" in request.headers:  # a browser: any website may let it call 127.0.0.1
            return refuse("web pages are not served: call from a program that sends no Origin", 403)
        if not self.authorized(request):
            return refuse("send the server's token in a header `Authorization: Bearer ...`", 401)
        if self.clients.locked():
            return refuse(f"there are {MAX_CLIENTS} clients: close some connections", 503)
        return None

    async def health(self, request: Request) -> Response:
        """GET /health."""
        return JSONResponse(self.facts if self.authorized(request) else {"status": "ok"})

    async def act(self, request: Request) -> Response:
        """POST /act."""
        if refused := self.refusal(request):
            return refused
        async with self.clients:
            try:
                body = await asyncio.wait_for(read_body(request), BODY_SECONDS)
            except (asyncio.TimeoutError, ClientDisconnect):  # noqa: UP041 (not one in Python 3.10)
                return refuse("the request did not arrive", 408)
            if len(body) > MAX_BODY:
                return refuse(f"more than {MAX_BODY} bytes: send a smaller image, or a JPEG", 413)
            status, reply, query = await self.answer(body, parse_request)
        if status != 200:
            return JSONResponse({"error": reply}, status)
        return JSONResponse(encode_action(reply, query.form))

    async def websocket(self, socket: WebSocket) -> None:
        """openpi's protocol: the facts of /health, then actions for each observation. A mistake is
        answered with text and does not end the connection."""
        if refused := self.refusal(socket):
            return await socket.send_denial_response(refused)
        with contextlib.suppress(WebSocketDisconnect):
            async with self.clients:
                await socket.accept()
                await socket.send_bytes(pack(self.facts))
                while (message := await socket.receive())["type"] == "websocket.receive":
                    started = time.perf_counter()
                    body = message.get("bytes", message.get("text"))
                    status, reply, _ = await self.answer(body, parse_observation)
                    if status != 200:
                        await socket.send_text(reply)
                        continue
                    chunk = reply.reshape(-1, reply.shape[-1])  # (action_chunk, A) or (1, A)
                    timing = {"infer_ms": 1000 * (time.perf_counter() - started)}
                    await socket.send_bytes(pack({"actions": chunk, "server_timing": timing}))

    async def answer(
        self, body: bytes | str, parse: Callable
    ) -> tuple[int, np.ndarray | str, Query | None]:
        """A request's bytes -> (status, the action or an error message, the request)."""
        started = time.perf_counter()
        query = None
        try:
            async with self.big_bodies if len(body) > BIG_BODY else contextlib.nullcontext():
                query = await asyncio.to_thread(parse, body, self.policy)
            reply, size = await asyncio.wrap_future(self.batcher.ask(query))
            status = 200
            facts = f"batch {size} unnorm_key {query.unnorm_key} instruction {query.instruction!a}"
        except UserError as error:  # from parsing, or from predict_action about its arguments
            status = 400
            reply = str(error)[:2000]
            facts = f"error {reply!a}"
        except Exception:
            traceback.print_exc()
            status = 500
            reply = "the model failed on this request: see the server's log"
            facts = "error 'see above'"
        log(f"act status {status} ms {1000 * (time.perf_counter() - started):.0f} {facts}")
        return status, reply, query


def describe(policy: Policy, model: str) -> dict:
    """The model's facts for clients."""
    robots = {key: policy.convention(key) for key in sorted(policy.norm_stats)}
    facts = {
        "status": "ok",
        "model": model,
        "unnorm_keys": list(robots),
        "cameras": policy.cfg.cameras,
        "images": policy.vla.num_images,
        "proprio": policy.cfg.use_proprio,
        "action_shape": [policy.cfg.action_chunk, len(next(iter(robots.values())).action)],
        "max_prefix": policy.max_prefix,
        "action": {key: robot.action for key, robot in robots.items()}}
    if policy.cfg.use_proprio:
        facts["state"] = {key: robot.state for key, robot in robots.items()}
    return facts


def refuse(message: str, status: int) -> Response:
    """Log an error and reply with it."""
    log(f"act status {status} error {message!a}")
    return JSONResponse({"error": message}, status)


async def read_body(request: Request) -> bytes:
    """A request's body, or its beginning if it is longer than MAX_BODY."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            break
    return bytes(body)


def log(text: str) -> None:
    print(text, flush=True)


# ---- The program -------------------------------------------------------------------------------


def uvicorn_config(app: Starlette) -> uvicorn.Config:
    """uvicorn's settings. By default it closes HTTP connections that idle for 5 seconds after a
    reply, and websockets that do not answer pings."""
    return uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", http="h11",
                          ws=Socket, ws_max_size=MAX_BODY, ws_per_message_deflate=False,
                          timeout_graceful_shutdown=STOP_SECONDS)


def serve(
    policy: Policy, model: str, listener: socket.socket, max_batch: int, token: str | None
) -> None:
    """Answer requests until SIGTERM or Ctrl-C, then finish open ones."""
    batcher = Batcher(policy, max_batch)
    config = uvicorn_config(Service(batcher, model, token).app())
    # a first action before any robot asks compiles kernels, and fails here if the model cannot act
    key = next(iter(policy.norm_stats))
    state = np.zeros(len(policy.convention(key).state)) if policy.cfg.use_proprio else None
    black = np.zeros((224, 224, 3), np.uint8)
    policy.predict_action([black] * policy.vla.num_images, "wait", key, state)
    batcher.start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn raises the signal again after stopping
    listener.listen()  # before the next line invites clients
    keys = sorted(policy.norm_stats)
    cameras = ",".join(policy.cfg.cameras)
    for key in keys:
        robot = policy.convention(key)
        state = f" state {','.join(robot.state)}" if policy.cfg.use_proprio else ""
        log(f"unnorm_key {key} cameras {cameras} action {','.join(robot.action)}{state}")
    host, port, *_ = listener.getsockname()
    log(f"serving http://{host}:{port} model {model} unnorm_keys {','.join(keys)}")
    uvicorn.Server(config).run([listener])
    log("stopped")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="a run, a checkpoint, or a hub id")
    parser.add_argument("--center_crop", choices=["yes", "no"],
                        help="show the middle of each image; default: as the checkpoint says")
    parser.add_argument("--host", default="127.0.0.1",
                        help="address to listen on; 0.0.0.0: reachable from the network")
    parser.add_argument("--token", help="a file or environment variable with the clients' token")
    parser.add_argument("--no_token", action="store_true", help="answer everyone who reaches it")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one")
    parser.add_argument("--device", choices=["cuda", "cpu"],
                        default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES),
                        help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--int8", action="store_true",
                        help="hold the language model's matrices in 8 bits: half the memory")
    parser.add_argument("--max_batch", type=int,
                        help="most requests the model sees at once; default: 16, with --speed_up 1")
    parser.add_argument("--speed_up", action="store_true",
                        help="on a GPU: compile for minutes whenever a batch size or prompt length "
                        "is new, then answer several times as fast")
    args = parser.parse_args()
    if args.speed_up and args.device == "cpu":
        parser.error("--speed_up records CUDA graphs: it needs --device cuda")
    dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    with exit_with_one_line():
        token = read_secret(args.token, "--token") if args.token else None
        if token == "":  # which every client would send
            raise UserError(f"--token: {args.token!r} is empty: write a long random text there")
        if args.host not in ("127.0.0.1", "::1", "localhost") and not (token or args.no_token):
            raise UserError(f"--host {args.host} is reachable from other machines: set a token "
                            "with --token FILE or --token VARIABLE, or pass --no_token")
        # fail on a bad address before loading the model for minutes
        listener = socket.socket(socket.AF_INET6 if ":" in args.host else socket.AF_INET)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((args.host, args.port))
        crop = args.center_crop and args.center_crop == "yes"
        policy = load_vla(args.checkpoint, args.device, DTYPES[dtype], args.int8,
                          crop)
        if not policy.norm_stats:
            raise CheckpointError(f"{args.checkpoint}: no dataset statistics, so it cannot act: "
                                  "give a VLA, not a plain VLM")
        if args.speed_up:
            policy.speed_up()
        max_batch = args.max_batch or (1 if args.speed_up else 16)
        serve(policy, args.checkpoint, listener, max_batch, token)


if __name__ == "__main__":
    main()
