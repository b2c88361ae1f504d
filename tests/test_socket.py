"""serve_vla.py from the side of openpi's clients: a real websocket, and openpi's own client if it is installed
(`make .venv/dev` installs it)."""

import contextlib
import json
import re
import socket
import threading
import time
import tracemalloc
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import msgpack
import numpy as np
import pytest
import uvicorn
from starlette.requests import HTTPConnection
from test_model import tiny_policy
from test_serve import Client, file, picture, query
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

import serve_vla
from act import load_vla
from machinery import connections
from machinery.wire import RequestError, parse_array, parse_observation
from serve_vla import Batcher, Service

# ------------------------------------------------------------------------------------------------------------
# Servers and clients


@pytest.fixture(scope="module")
def server(colors, serving):
    with serving(colors) as (_, port, log):
        yield port, log


@pytest.fixture(scope="module")
def vla(colors):
    return load_vla(colors)


@pytest.fixture(scope="module")
def openpi():
    """openpi's client: a class."""
    name = "openpi_client.websocket_client_policy"
    return pytest.importorskip(name, reason="make .venv/dev installs it").WebsocketClientPolicy


@contextlib.contextmanager
def running(policy, token=None, started=True):
    """A server in this process, so that tests can change its limits -> (port, Batcher, uvicorn's server)."""
    batcher = Batcher(policy, 8)
    if started:
        batcher.start()
    config = connections.uvicorn_config(Service(batcher, "some", token).app())
    listener = socket.create_server(("127.0.0.1", 0))
    http = uvicorn.Server(config)
    thread = threading.Thread(target=http.run, args=([listener],))
    thread.start()
    try:
        yield listener.getsockname()[1], batcher, http
    finally:
        http.should_exit = True
        thread.join(60)
        listener.close()
    assert not thread.is_alive()


def array(value: np.ndarray) -> dict:
    """An array as openpi writes it."""
    return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}


def from_array(value: dict) -> np.ndarray:
    return np.frombuffer(value[b"data"], value[b"dtype"]).reshape(value[b"shape"])


def seen(image: np.ndarray, **changes) -> dict:
    return {"observation/image": array(image), "prompt": "hold it", "unnorm_key": "cold", **changes}


@contextlib.contextmanager
def talking(port: int, **headers):
    """One connection -> (a function that sends a message, packed unless it is bytes or text, and returns the
    answer; the server's facts; the connection)."""
    with connect(f"ws://127.0.0.1:{port}", max_size=None, additional_headers=headers) as connection:
        def ask(message):
            connection.send(message if isinstance(message, bytes | str) else msgpack.packb(message))
            answer = connection.recv(60)
            return answer if isinstance(answer, str) else msgpack.unpackb(answer)

        yield ask, msgpack.unpackb(connection.recv(60)), connection


# ------------------------------------------------------------------------------------------------------------
# Good observations


def test_openpis_client_gets_the_right_actions(openpi, server, vla):
    """1,000 calls by two clients at the same time."""
    cases = [(picture(red, blue, seed), words, key) for seed in range(2) for red in (0, 1) for blue in (0, 1)
             for words in ("let go", "hold it") for key in ("cold", "warmer")]
    expected = [vla.predict_action(*case)[None] for case in cases]
    assert len({actions.tobytes() for actions in expected}) >= 8

    def ask_many(seed: int) -> int:
        client, draw = openpi("127.0.0.1", server[0]), np.random.RandomState(seed)
        about = client.get_server_metadata()
        assert about["cameras"] == ["primary"] and about["unnorm_keys"] == ["cold", "warmer"]
        for i in draw.randint(len(cases), size=500):
            image, words, key = cases[i]
            got = client.infer({"observation/image": image, "prompt": words, "unnorm_key": key,
                                # as openpi's LIBERO client does; this model does not use them
                                "observation/wrist_image": image[::-1], "observation/state": np.zeros(8)})
            assert got["actions"].dtype == np.float64 and got["server_timing"]["infer_ms"] > 0
            np.testing.assert_array_equal(got["actions"], expected[i])
        return 500

    with ThreadPoolExecutor(2) as pool:
        assert sum(pool.map(ask_many, range(2))) == 1000
    assert server[1].read_text().count("warning: ignored") == 1  # once for all


def test_openpis_scalars_and_alpha():
    """It writes NumPy's scalars in a form of their own."""
    packer = pytest.importorskip("openpi_client.msgpack_numpy", reason="make .venv/dev installs it")
    state = [np.float32(0.5), np.float64(-1.5), 0.25, np.array(1)]
    with_alpha = np.dstack([IMAGE, IMAGE[..., 0]])
    message = packer.packb({"observation/image": with_alpha, "prompt": "push", "observation/state": state,
                            "episode": np.int64(3)})
    read = parse_observation(message, tiny_policy(use_proprio=True))
    np.testing.assert_array_equal(read.proprio, state)
    np.testing.assert_array_equal(read.views, [IMAGE])
    assert read.episode == 3


def test_after_a_restart_it_connects_again(openpi, colors, vla, serving):
    image = picture(1, 0)
    asked = {"observation/image": image, "prompt": "hold it", "unnorm_key": "warmer"}
    expected = vla.predict_action(image, "hold it", "warmer")[None]
    with serving(colors) as (_, port, _):
        before = openpi("127.0.0.1", port)
        np.testing.assert_array_equal(before.infer(asked)["actions"], expected)
    with pytest.raises(ConnectionClosed):
        before.infer(asked)
    with serving(colors, port=port):
        np.testing.assert_array_equal(openpi("127.0.0.1", port).infer(asked)["actions"], expected)


def test_a_token_is_an_api_key_for_openpi(openpi, vla):
    asked = {"observation/image": picture(0, 1), "prompt": "let go", "unnorm_key": "cold"}
    expected = vla.predict_action(picture(0, 1), "let go", "cold")[None]
    with running(vla, "open sesame") as (port, *_):
        client = openpi("127.0.0.1", port, "open sesame")
        np.testing.assert_array_equal(client.infer(asked)["actions"], expected)
        for wrong in (None, "sesame", "open sesame!"):
            with pytest.raises(InvalidStatus) as refused:
                openpi("127.0.0.1", port, wrong)
            assert refused.value.response.status_code == 401
            assert b"send the server's token" in refused.value.response.body
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as page:  # it asks for the token
            assert page.headers["content-type"].startswith("text/html")
            assert b"open sesame" not in (text := page.read()) and b"{{" not in text and b"--panel:" in text
        with talking(port, Authorization="Bearer open sesame") as (ask, *_):
            assert b"data" in ask(seen(picture(0, 1)))["actions"]


@pytest.mark.parametrize("changes", [{}, {"parallel_decoding": True, "max_prefix": 2}])
def test_cameras_state_chunk_and_prefix(changes):
    policy = tiny_policy(cameras=["primary", "wrist"], use_proprio=True, action_chunk=4, **changes)
    for stats in policy.norm_stats["a"].values():
        stats["mean"] = [0.0] * 4
    front, hand, state = picture(1, 0), picture(0, 1), np.array([0.3, -1.5, 0, 1])
    settled = np.array([[0.5, -0.5, 0.1, 1], [0.4, -0.4, 0.1, 1]])
    whole, rest = (policy.predict_action([front, hand], "push", None, state, prefix)
                   for prefix in (None, settled))
    assert whole.shape == rest.shape == (4, 4) and not np.array_equal(whole[2:], rest[2:])
    good = {"observation/image": array(front), "observation/wrist_image": array(hand), "prompt": "push",
            "observation/state": array(state)}
    with running(policy) as (port, *_), talking(port) as (ask, about, _):
        assert about["cameras"] == ["primary", "wrist"] and about["action_shape"] == [4, 4]
        assert about["max_prefix"] == (2 if changes else 3)
        for images in ({}, {"observation/image": None, "observation/primary": array(front)},
                       {"observation/wrist_image": None, "observation/wrist": array(hand)},
                       {"observation/image": file(front, "png")}, {"prefix": []},
                       {"prefix": array(settled[:0])},
                       {"observation/state": state.tolist()}):
            sent = {key: value for key, value in {**good, **images}.items() if value is not None}
            np.testing.assert_array_equal(from_array(ask(sent)["actions"]), whole)
        for prefix in (array(settled), settled.tolist(), array(settled.astype(np.float32))):
            np.testing.assert_array_equal(from_array(ask({**good, "prefix": prefix})["actions"]), rest)
        body = {"images": [front.tolist(), hand.tolist()], "instruction": "push", "proprio": state.tolist()}
        assert Client(port).send(body) == (200, whole.tolist())
        assert Client(port).send({**body, "prefix": settled.tolist()}) == (200, rest.tolist())

        several = {**good, "observation/primary_image": array(front)}
        for bad, key, cure in [
                (several, "observation/primary_image", "not permitted"),
                ({**good, "observation/head": array(front)}, "observation/head", "not permitted"),
                ({"prompt": "push"}, "observation/wrist_image", "required"),
                ({**good, "observation/state": array(state[:3])}, "proprio", r"expected .*4"),
                ({**good, "observation/state": None}, "proprio", "robot's state"),
                ({**good, "prefix": array(np.zeros((4, 4)))}, "prefix of 4 steps", "up to"),
                ({**good, "prefix": array(np.zeros(4))}, "prefix", r"expected \(k, 4\)"),
                ({**good, "prefix": array(np.full((1, 4), np.nan))}, "prefix", "finite"),
                ({**good, "prefix": "x"}, "prefix", "Array")]:
            answer = ask(bad)
            assert isinstance(answer, str) and key in answer and re.search(cure, answer), answer
            if "prefix" in bad:
                status, reply = Client(port).send({**body, "prefix": (
                    from_array(bad["prefix"]).tolist() if bad["prefix"] != "x" else "x")})
                assert status == 400 and key in reply["error"] and re.search(cure, reply["error"]), reply
        np.testing.assert_array_equal(from_array(ask(good)["actions"]), whole)


def test_history_is_for_http():
    policy = tiny_policy(window_size=2)
    policy.norm_stats["a"]["action"]["mean"] = [0.0] * 4
    with running(policy) as (port, *_), talking(port) as (ask, *_):
        assert "window_size" in ask(seen(picture(0, 0), unnorm_key="a"))


def test_32_clients_at_once_get_what_one_would(server, vla):
    """Websocket and HTTP requests share batches."""
    port, log = server
    texts = ["let go", "hold it", "hold it, whatever happens, until somebody comes and says let go"]
    cases = [(picture(red, blue, seed), texts[seed % 3], key) for seed in range(4) for red in (0, 1)
             for blue in (0, 1) for key in ("cold", "warmer")]
    answers = [vla.predict_action(*case) for case in cases]

    def ask_many(seed: int) -> int:
        with contextlib.ExitStack() as stack:
            http, (ask, *_) = Client(port), stack.enter_context(talking(port))
            for i in np.random.RandomState(seed).randint(len(cases), size=20):
                image, words, key = cases[i]
                if seed % 4:
                    got = from_array(ask(seen(image, prompt=words, unnorm_key=key))["actions"])[0].tolist()
                else:
                    status, got = http.send(query(image.tolist(), instruction=words, unnorm_key=key))
                    assert status == 200
                assert got == answers[i].tolist()
        return 20

    before = len(log.read_text().splitlines())
    with ThreadPoolExecutor(32) as pool:
        assert sum(pool.map(ask_many, range(32))) == 640
    sizes = [int(re.search(r"status 200 .* batch (\d+) ", line)[1])
             for line in log.read_text().splitlines()[before:]]
    assert len(sizes) == 640 and max(sizes) > 4


# ------------------------------------------------------------------------------------------------------------
# Bad ones

IMAGE = picture(1, 0)
GOOD = seen(IMAGE)
JUNK = [None, True, 3.5, -1, 2**60, "", "?", [], {}, [[]], [None], {"a": 1}, [{}], [[["x"]]], b"", b"\xff",
        [b"x"]]


def wrong_type(draw):
    field = ("observation/image", "prompt", "unnorm_key")[draw.randint(3)]
    junk = JUNK[draw.randint(len(JUNK))]
    return {**GOOD, field: None if field == "prompt" and junk == "?" else junk}


def truncated(draw):
    body = msgpack.packb(GOOD)
    return body[: draw.randint(len(body))]


def noise(draw):
    return draw.bytes(draw.randint(1, 3000))


def text(draw):
    return ["", "{}", "hold it", "\x00" * 50, "é" * draw.randint(1, 5000)][draw.randint(5)]


def wrong_array(draw):
    good = GOOD["observation/image"]
    shapes = [[3, 40, 40], [40, 40], [4800], [1, 40, 40, 3], [0, 40, 3], [-1, 40, 3], [40.0, 40, 3],
              [2**40, 2**40, 3], [], 4800, None, "40", [[40], 40, 3]]
    dtypes = ["|O", "O", "|V8", "<U4", "|S3", "|b1", "<M8[s]", "<c8", "f16", "", 7, None, [], "<f8", "object",
              [["a", "<i4"]], "|u1, |u1", b"|u1"]
    datas = [b"", b"x" * 4801, "text", 5, None, [1], good[b"data"][:-1]]
    change = [{b"shape": shapes[draw.randint(len(shapes))]}, {b"dtype": dtypes[draw.randint(len(dtypes))]},
              {b"data": datas[draw.randint(len(datas))]}, {b"more": 1}, {"data": 1}][draw.randint(5)]
    return {**GOOD, "observation/image": {**good, **change}}


def missing_part(draw):
    good = GOOD["observation/image"]
    gone = [*good][draw.randint(len(good))]
    return {**GOOD, "observation/image": {key: value for key, value in good.items() if key != gone}}


def wrong_image(draw):
    images = [np.full((40, 40, 3), value) for value in (0.5, -1.0, 256.0, np.nan, np.inf)]
    images += [np.full((40, 40, 3), value) for value in (-1, 256)]
    images += [np.zeros(shape, np.uint8)
               for shape in ((3, 40, 40), (15, 40, 3), (40, 40, 1), (40, 40), (5000, 20, 3))]
    return {**GOOD, "observation/image": array(images[draw.randint(len(images))])}


def broken_file(draw):
    data = file(IMAGE, ["png", "jpeg"][draw.randint(2)])
    broken = [data[: draw.randint(len(data) // 2)], file(IMAGE, "gif"), draw.bytes(500),
              file(IMAGE[:8], "png")]
    return {**GOOD, "observation/image": broken[draw.randint(4)]}


def deep(draw):
    """Nested lists, and sizes larger than the message."""
    kinds = [b"\x91" * draw.randint(2, 5000), b"\x81\xa1a" * draw.randint(2, 5000),
             b"\xdd\xff\xff\xff\xff" * draw.randint(1, 50), b"\xdf\x7f\xff\xff\xff",
             b"\xc6\xff\xff\xff\xff12",
             b"\xdd\x00\x00\x04\x00" * 500 + b"\xc0" * 9000]
    return kinds[draw.randint(len(kinds))]


def many_parts(draw):
    return {**GOOD, "prefix": [[[]] * 500, [{}] * 600][draw.randint(2)] * draw.randint(2, 9)}


def extension(draw):
    kinds = [msgpack.ExtType(draw.randint(128), b"x" * draw.randint(20)),
             msgpack.Timestamp(draw.randint(10**9))]
    return {**GOOD, "prompt": kinds[draw.randint(2)]}


def no_map(draw):
    return [b"\xc0", b"\x05", b"\x90", b"\x80", b"\xc1", msgpack.packb("act"), msgpack.packb([GOOD]),
            msgpack.packb(GOOD) + b"\x00", msgpack.packb({1: 2}), msgpack.packb({None: 2}), b"",
            ][draw.randint(11)]


def wrong_key(draw):
    name = "".join(map(chr, draw.randint(32, 0xD7FF, draw.randint(1, 9))))
    gone = [*GOOD][draw.randint(3)]  # two datasets: unnorm_key is required
    return [{**GOOD, name: 1}, {**GOOD, "unnorm_key": name}, {**GOOD, b"prompt": 1},
            {**GOOD, "instruction": "x"}, {**GOOD, "observation/head_image": array(IMAGE)},
            {**GOOD, "observation/primary": array(IMAGE)},
            {**GOOD, "prompt": "é" * draw.randint(1001, 20000)}, {**GOOD, "prefix": [[0.0, 0.0, 0.0]]},
            {key: value for key, value in GOOD.items() if key != gone}][draw.randint(9)]


KINDS = [wrong_type, truncated, noise, text, wrong_array, missing_part, wrong_image, broken_file, deep,
         many_parts, extension, no_map, wrong_key]


@pytest.mark.parametrize("count", [400, pytest.param(2000, marks=pytest.mark.slow)])
def test_bad_observations_get_a_message_then_a_good_one_its_action(count, server, vla):
    port, log = server
    messages, draw = set(), np.random.RandomState(11)
    expected = vla.predict_action(IMAGE, "hold it", "cold").tolist()
    with talking(port) as (ask, *_):
        for number in range(count):
            kind = KINDS[number % len(KINDS)]
            bad = kind(draw)
            answer = ask(bad)
            assert isinstance(answer, str) and 10 < len(answer) < 2100, (kind, bad, answer)
            assert "Traceback" not in answer and "the model failed" not in answer, (kind, bad)
            messages.add(re.sub(r"\d+", "0", answer)[:40])
        assert len(messages) > 30  # each names its problem
        assert from_array(ask(GOOD)["actions"]).tolist() == [expected]
    assert " status 500 " not in log.read_text() and "Traceback" not in log.read_text()


@pytest.mark.parametrize("message, why", [
    (b"\xdd\x00\x10\x00\x00" * 500 + b"\xc0" * (1 << 20), "exceeds max_array_len"),  # each announces a million items
    (msgpack.packb([[[]] * 1000] * 1000), "more than 1000 lists"),  # 72 bytes of memory per byte sent
    (msgpack.packb([{}] * (1 << 20)), "exceeds max_array_len"),
    (msgpack.packb({"prompt": ["x" * (1 << 18), *[""] * 1000]}), None)])
def test_a_message_takes_no_more_memory_than_its_bytes(message, why, vla):
    tracemalloc.start()
    try:
        with pytest.raises(RequestError, match=why):
            parse_observation(message, vla)
        with pytest.raises(RequestError):  # NumPy would give each text the memory of the longest
            parse_array(["x" * (1 << 18), *[""] * 1000], "image")
        assert tracemalloc.get_traced_memory()[1] < 2 * len(message) + (4 << 20)
    finally:
        tracemalloc.stop()


def test_huge_and_broken_connections(server):
    port, log = server
    for start in (b"\x00\xff" * 500, b"\x82\xfe\xff", b"\x02\x81abcdx", b"\x82\x05hello", b"\x8f\x80abcd"):
        with talking(port) as (_, _, connection):
            connection.socket.sendall(start)  # broken, unmasked or partial frames; then hang up
    for path, status in (("nowhere", 403), ("act", 403)):
        with pytest.raises(InvalidStatus) as refused:
            connect(f"ws://127.0.0.1:{port}/{path}")
        assert refused.value.response.status_code == status
    with talking(port) as (ask, _, connection):
        with pytest.raises(ConnectionClosed) as closed:
            ask(b" " * (serve_vla.MAX_BODY + 1))
        assert closed.value.rcvd is None or closed.value.rcvd.code == 1009
    with socket.create_connection(("127.0.0.1", port)) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        assert raw.recv(1000).startswith(b"HTTP/1.1 4")  # no key, no version
    with talking(port) as (ask, *_):
        assert "actions" in ask(GOOD)
    assert "Traceback" not in log.read_text()


def test_a_message_in_parts(vla, monkeypatch):
    monkeypatch.setattr(connections, "MAX_FRAMES", 20)
    whole = msgpack.packb(GOOD)
    with running(vla) as (port, *_):
        with talking(port) as (ask, _, connection):
            connection.send(whole[i : i + 1000] for i in range(0, len(whole), 1000))
            assert "actions" in msgpack.unpackb(connection.recv(60))
            assert "actions" in ask(GOOD)

        def too_many():
            for _ in range(1000):
                yield b""
                time.sleep(0.01)

        with talking(port) as (_, _, connection), pytest.raises(ConnectionClosed):
            connection.send(too_many())
            connection.recv(60)


def test_websites_are_refused(vla):
    """A browser lets any website open a websocket to 127.0.0.1, and names the site as Origin."""
    with running(vla) as (port, *_):
        with pytest.raises(InvalidStatus) as refused:
            connect(f"ws://127.0.0.1:{port}", origin="https://evil.example")
        assert refused.value.response.status_code == 403
        for origin, host, status in [
                ("https://evil.example", None, 403), ("null", None, 403), ("http://127.0.0.1:1", None, 403),
                ("http://evil.example:80", "evil.example:80", 403),  # its name points to 127.0.0.1
                ("http://127.0.0.1.evil.example", "127.0.0.1.evil.example", 403),
                (f"http://127.0.0.1:{port}", None, 200), ("http://[::1]:80", "[::1]:80", 200),
                ("http://localhost", "localhost", 200), ("http://robot:80", "robot:80", 403)]:
            client = Client(port)
            headers = {"Origin": origin} | ({"Host": host} if host else {})
            client.http.request("POST", "/act", json.dumps(query(IMAGE.tolist())), headers)
            assert client.http.getresponse().status == status, (origin, host)
        with connect(f"ws://127.0.0.1:{port}", origin=f"http://127.0.0.1:{port}") as own:
            assert b"unnorm_keys" in own.recv(60)
        assert Client(port).send(query(IMAGE.tolist()))[0] == 200
    assert not connections.is_foreign(page("http://robot:80", "robot:80"), "robot")


def page(origin: str, host: str) -> HTTPConnection:
    return HTTPConnection({"type": "http", "headers": [(b"origin", origin.encode()), (b"host", host.encode())]})


def test_one_client_too_many(vla, monkeypatch):
    """A new websocket takes the place of the one whose last action is longest ago. Idle ones and connections that
    send nothing do not keep others out."""
    monkeypatch.setattr(serve_vla, "MAX_CLIENTS", 2)
    with running(vla) as (port, *_), socket.create_connection(("127.0.0.1", port)):
        with talking(port) as (ask, *_), talking(port) as (_, _, idle):
            assert "actions" in ask(GOOD)
            with talking(port) as (other, *_):
                with pytest.raises(ConnectionClosed) as closed:
                    idle.recv(60)
                assert closed.value.rcvd.code == 1013
                assert Client(port).send(query(IMAGE.tolist()))[0] == 200
                assert "actions" in other(GOOD) and "actions" in ask(GOOD)


def test_busy_clients_keep_their_places(vla, monkeypatch):
    monkeypatch.setattr(serve_vla, "MAX_CLIENTS", 1)
    with running(vla, started=False) as (port, batcher, _), talking(port) as (_, _, busy):
        busy.send(msgpack.packb(GOOD))
        while batcher.waiting.empty():
            time.sleep(0.01)
        with pytest.raises(InvalidStatus) as refused:
            connect(f"ws://127.0.0.1:{port}")
        assert refused.value.response.status_code == 503
        batcher.start()
        assert "actions" in msgpack.unpackb(busy.recv(60))


def test_silent_connections_are_closed(vla, monkeypatch):
    """Those that send half a request, and those that are too many."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 1)
    monkeypatch.setattr(connections, "MAX_SILENT", 3)
    with running(vla) as (port, *_), talking(port) as (ask, *_), contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 60)) for _ in range(6)]
        for each in silent:
            each.sendall(b"POST /act HTTP/1.1\r\nHost: x\r\n")
            time.sleep(0.05)
        assert all(map(is_closed, silent))
        assert "actions" in ask(GOOD) and Client(port).send(query(IMAGE.tolist()))[0] == 200
        monkeypatch.setattr(connections, "HEAD_SECONDS", 60)
        silent = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 60)) for _ in range(4)]
        assert is_closed(silent[0])


def is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:  # because what it sent was not read
        return True


def test_slow_bodies_make_room(vla, monkeypatch):
    monkeypatch.setattr(serve_vla, "MAX_CLIENTS", 1)
    with running(vla) as (port, *_), socket.create_connection(("127.0.0.1", port), 60) as slow:
        slow.sendall(b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n{")
        time.sleep(0.3)
        assert Client(port).send(query(IMAGE.tolist()))[0] == 200
        assert slow.recv(1000).startswith(b"HTTP/1.1 408")


def test_stopping_closes_websockets(vla):
    """A client that waits for an answer is disconnected."""
    with running(vla, started=False) as (port, batcher, http):
        with talking(port) as (_, _, asking), talking(port) as (_, _, idle):
            asking.send(msgpack.packb(GOOD))
            while batcher.waiting.empty():
                time.sleep(0.01)
            http.should_exit = True
            for connection in (idle, asking):
                with pytest.raises(ConnectionClosed) as closed:
                    connection.recv(60)
                assert closed.value.rcvd.code == 1012  # service restart
            batcher.start()
