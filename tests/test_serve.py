"""serve_vla.py from its clients' side: its own process, real HTTP, a real checkpoint."""

import asyncio
import base64
import contextlib
import dataclasses
import http.client
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY, write_colors
from PIL import Image
from starlette.requests import HTTPConnection
from test_model import tiny_policy

import act
import serve_vla
from act import ModelError, load_vla
from machinery.causes_server import call, server_causes
from machinery.config import UserError
from machinery.examine import open_data
from machinery.images import decode_native
from machinery.wire import (
    Costly,
    RequestError,
    decode_picture,
    encode_action,
    parse_array,
    parse_image,
    parse_request,
)

# ------------------------------------------------------------------------------------------------------------
# A server and its clients


class Client:
    """One connection to a server, kept open."""

    def __init__(self, port: int):
        self.http = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def send(self, body, path="/act", method="POST") -> tuple[int, object]:
        """-> (status, the reply's JSON). body: bytes to send unmodified, or a value to send as JSON."""
        self.http.request(method, path, body if isinstance(body, bytes) else json.dumps(body).encode())
        reply = self.http.getresponse()
        data = reply.read()
        assert reply.headers["content-type"] == "application/json", data
        return reply.status, json.loads(data)


@pytest.fixture(scope="module")
def server(colors, serving):
    with serving(colors) as (_, port, log):
        yield port, log


@pytest.fixture(scope="module")
def vla(colors):
    return load_vla(colors)


def json_numpy(array: np.ndarray) -> dict:
    """An array as the json_numpy package encodes it."""
    return {"__numpy__": base64.b64encode(array.tobytes()).decode(), "dtype": array.dtype.str,
            "shape": list(array.shape)}


def from_json_numpy(value: dict) -> np.ndarray:
    return np.frombuffer(base64.b64decode(value["__numpy__"]), value["dtype"]).reshape(value["shape"])


def file(image: np.ndarray, kind: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, kind)
    return out.getvalue()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def picture(red: int, blue: int, seed: int = 0) -> np.ndarray:
    """An image that the model learned to act on (conftest.write_colors), of varying size."""
    draw = np.random.RandomState(seed)
    image = draw.randint(100, 150, (draw.randint(28, 60), draw.randint(40, 90), 3)).astype(np.uint8)
    quarter = image.shape[1] // 4
    image[:, :quarter] = image[:, -quarter:] = [30 + 200 * red, 30, 30 + 200 * blue]
    return image


def query(image, **changes) -> dict:
    return {"image": image, "instruction": "hold it", "unnorm_key": "cold", **changes}


# ------------------------------------------------------------------------------------------------------------
# Good requests


def test_openvla_clients(server, vla):
    """OpenVLA's deploy script answers json_numpy with json_numpy, and the encoded form with a string."""
    client, image = Client(server[0]), picture(1, 0)
    expected = vla.predict_action(image, "hold it", "cold")
    assert expected.dtype == np.float64 and expected.shape == (3,)
    np.testing.assert_allclose(expected, [0.1, -0.3, 1], atol=0.01)

    status, reply = client.send(query(json_numpy(image)))
    assert status == 200 and reply == json_numpy(expected) and reply["dtype"] == "<f8"
    np.testing.assert_array_equal(from_json_numpy(reply), expected)
    status, reply = client.send({"encoded": json.dumps(query(json_numpy(image)))})
    assert status == 200 and isinstance(reply, str) and json.loads(reply) == json_numpy(expected)


def test_plain_lists_and_files(server, vla):
    client, image = Client(server[0]), picture(0, 1)
    expected = vla.predict_action(image, "let go", "warmer").tolist()
    rest = {"instruction": "let go", "unnorm_key": "warmer"}
    png = text(file(image, "png"))
    for sent in ({"image": image.tolist()}, {"image": png}, {"images": [image.tolist()]}):
        assert client.send({**sent, **rest}) == (200, expected)
    jpeg = file(image, "jpeg")
    expected = vla.predict_action(decode_native(jpeg), "let go", "warmer").tolist()
    assert client.send(query(text(jpeg), **rest)) == (200, expected)


def test_the_readme_s_client(server, vla):
    code = next(block for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
                if "def act(" in block)
    assert len(code.splitlines()) <= 15
    names: dict = {}
    exec(code.replace(":8000", f":{server[0]}"), names)
    data = file(picture(1, 1), "png")
    expected = vla.predict_action(picture(1, 1), "hold it", "cold").tolist()
    assert names["act"](data, "hold it", "cold") == expected
    with pytest.raises(ValueError, match=r"'hot'.*'cold', 'warmer'"):
        names["act"](data, "hold it", "hot")


def test_openvla_ofts_clients():
    """They post the observation itself. Wrists are the model's further cameras: by name, else in the order sent."""
    images = [picture(i & 1, i >> 1, i) for i in range(3)]
    sent = dict(zip(("full_image", "left_wrist_image", "right_wrist_image"), map(json_numpy, images), strict=True))
    state = np.arange(4.0)
    sent |= {"instruction": "fold it", "state": json_numpy(state)}
    for cameras in (["primary", "left_wrist", "right_wrist"], ["primary", "a", "b"]):
        policy = tiny_policy(cameras=cameras, use_proprio=True, action_chunk=2)
        read = parse_request(json.dumps(sent).encode(), policy)
        assert [view.tobytes() for view in read.views] == [image.tobytes() for image in images]
        np.testing.assert_array_equal(read.proprio, state)
        assert read.ignored == ()
    swapped = tiny_policy(cameras=["primary", "right_wrist", "left_wrist"])
    read = parse_request(json.dumps(sent).encode(), swapped)
    assert read.views[1].tobytes() == images[2].tobytes() and read.ignored == ("state",)
    one = parse_request(json.dumps(sent).encode(), tiny_policy())
    assert len(one.views) == 1 and one.ignored == ("left_wrist_image", "right_wrist_image", "state")

    chunk = np.arange(8.0).reshape(2, 4)
    for action in (chunk, chunk[0]):  # a list of actions, even of one
        reply = json.loads(json.dumps(encode_action(action, read)))
        assert reply == [json_numpy(step) for step in action.reshape(-1, 4)]
    encoded = parse_request(json.dumps({"encoded": json.dumps(sent)}).encode(), swapped)
    assert json.loads(encode_action(chunk, encoded)) == [json_numpy(step) for step in chunk]


def test_names_of_other_clients():
    policy, (first, second) = tiny_policy(cameras=["primary", "wrist"]), (picture(1, 0), picture(0, 1))
    for names in (("image", "wrist_image"), ("observation.images.primary", "observation.images.wrist"),
                  ("observation/image", "observation/wrist"), ("full_image", "observation/wrist_image")):
        for text_key in ("instruction", "prompt", "task"):
            sent = {names[1]: second.tolist(), names[0]: first.tolist(), text_key: "go"}
            read = parse_request(json.dumps(sent).encode(), policy)
            assert [view.tobytes() for view in read.views] == [first.tobytes(), second.tobytes()]
    good = {"image": first.tolist(), "wrist_image": second.tolist(), "instruction": "go"}
    for changes, words in [({"observation.images.primary": first.tolist()}, "second image"),
                           ({"wrist_image": None, "hand_image": second.tolist()}, "hand_image"),
                           ({"wrist_image": None, "left_wrist_image": second.tolist()}, "left_wrist_image"),
                           ({"images": [first.tolist()] * 2}, "either"),
                           ({"prompt": "stop"}, "prompt"), ({"state": [0.0], "proprio": [0.0]}, "proprio")]:
        with pytest.raises(RequestError, match=words):
            parse_request(json.dumps({**good, **changes}).encode(), policy)


def test_json_numpys_scalars_and_lists_of_arrays(vla):
    """json_numpy writes a NumPy scalar as an array without dimensions."""
    scalars = [json_numpy(np.array(value, np.float32)) for value in (0.5, -1.5)]
    assert scalars[0]["shape"] == []
    np.testing.assert_array_equal(parse_array(scalars, "proprio"), np.array([0.5, -1.5], np.float32))
    np.testing.assert_array_equal(parse_array([0.25, scalars[1]], "proprio"), [0.25, -1.5])
    rows = [json_numpy(np.arange(3.0)), [1, 2, scalars[0]]]
    np.testing.assert_array_equal(parse_array(rows, "prefix"), [[0, 1, 2], [1, 2, 0.5]])
    for bad in ([*scalars, json_numpy(np.zeros(2))], [{}], scalars * 501, [{"__numpy__": scalars}]):
        with pytest.raises(RequestError, match="prefix"):
            parse_array(bad, "prefix")
    real = pytest.importorskip("json_numpy", reason="pip install json-numpy")
    sent = real.dumps({"proprio": [np.float32(0.5), np.float64(2)], "image": IMAGE})
    assert parse_array(json.loads(sent)["proprio"], "proprio").tolist() == [0.5, 2]
    np.testing.assert_array_equal(parse_image(json.loads(sent)["image"], "image"), IMAGE)


def test_clients_with_json_numpy_itself(server, vla):
    """OpenVLA's and OpenVLA-OFT's. The latter get a list of arrays; what the model does not use is left out."""
    real = pytest.importorskip("json_numpy", reason="pip install json-numpy")
    with_alpha = np.dstack([IMAGE, np.full(IMAGE.shape[:2], 7, np.uint8)])
    expected = vla.predict_action(IMAGE, "hold it", "cold")
    oft = {"full_image": with_alpha, "wrist_image": IMAGE[::-1], "state": np.zeros(8), "instruction": "hold it",
           "unnorm_key": "cold"}
    for sent, kind in ((query(with_alpha), np.ndarray), (oft, list)):
        status, reply = Client(server[0]).send(real.dumps(sent).encode())
        answer = real.loads(json.dumps(reply))
        assert status == 200 and isinstance(answer, kind)
        np.testing.assert_array_equal(answer, [expected] if kind is list else expected)


def test_alpha_is_dropped_and_other_shapes_are_refused():
    image = picture(1, 0)
    with_alpha = np.dstack([image, np.full(image.shape[:2], 7, np.uint8)])
    for sent in (json_numpy(with_alpha), with_alpha.tolist(), text(file(with_alpha, "png"))):
        np.testing.assert_array_equal(parse_image(sent, "image"), image)
    for wrong, cure in [(image.transpose(2, 0, 1), "transpose"), (image[..., 0], "height"),
                        (image[..., :1], "height"), (image / 255, "255"), (image.astype(np.float32), "integers")]:
        for sent in (json_numpy(np.ascontiguousarray(wrong)), wrong.tolist()):
            if wrong.dtype != np.float32 or isinstance(sent, dict):
                with pytest.raises(RequestError, match=cure):
                    parse_image(sent, "image")


def test_a_png_is_decoded_without_what_it_carries_besides():
    """Comments and profiles may inflate to gigabytes, and a million empty chunks take a minute."""
    image = picture(1, 0)
    data = file(image, "png")
    chunk = b"\0\0\0\0tEXt" + zlib.crc32(b"tEXt").to_bytes(4, "big")
    comment = b"Comment\0\0" + zlib.compress(bytes(1 << 20))
    comment = len(comment).to_bytes(4, "big") + b"zTXt" + comment + zlib.crc32(b"zTXt" + comment).to_bytes(4, "big")
    for extra, refused in ((100 * chunk, False), (100 * comment, False), (100_000 * chunk, True)):
        padded = data[:33] + extra + data[33:]
        if refused:
            with pytest.raises(RequestError, match="chunks"):
                decode_picture(padded, "image")
        else:
            np.testing.assert_array_equal(decode_picture(padded, "image"), image)
    with pytest.raises(RequestError, match="not a JPEG or PNG"):
        decode_picture(data[:-30], "image")  # cut short
    with pytest.raises(Costly):
        decode_picture(data, "image", most_pixels=100)


def test_health_reports_a_model_that_fails(vla, monkeypatch):
    """Kubernetes then restarts it. A request that fails does not count."""
    batcher = serve_vla.Batcher(vla, max_batch=8)
    service = serve_vla.Service(batcher, "some", None)
    query = parse_request(json.dumps(GOOD).encode(), vla)
    query.pixels = vla.prepare_views(query.views).numpy()
    batcher.start()

    def health() -> tuple[int, dict]:
        reply = asyncio.run(service.health(HTTPConnection({"type": "http", "headers": []})))
        return reply.status_code, json.loads(reply.body)

    bad = dataclasses.replace(query, pixels=query.pixels[:, :20])
    assert batcher.ask(bad).exception(60) is not None
    assert health()[0] == 200
    head = vla.vla.llm.get_output_embeddings().weight
    before = head.clone()
    with torch.no_grad():
        head.fill_(float("nan"))
        assert isinstance(batcher.ask(query).exception(60), ModelError)  # no action follows from NaN
        status, facts = health()
        assert status == 503 and facts["status"] == "failing" and "not finite" in facts["error"]
        head.copy_(before)
    assert batcher.ask(query).result(60) and health()[0] == 200
    batcher.started = time.monotonic() - 1000
    assert health()[0] == 503 and "1000 seconds" in health()[1]["error"]


def test_a_client_cannot_make_it_compile(monkeypatch):
    """On a GPU, speed_up records graphs for some shapes. Requests are rounded up to them; other requests are
    computed without. The stand-in for a CUDA graph computes anew."""
    pytest.importorskip("triton")
    policy = tiny_policy(vision_backbone={"a": TINY["vision_backbone"]["dino"]}, arch_specifier="gelu-mlp",
                         action_chunk=3)
    policy.norm_stats["a"]["action"]["mean"] = [0.0] * 4
    image, long = np.full((28, 28, 3), 90, np.uint8), "open the drawer and then " * 20
    asked = [([image] * count, [words] * count, None, None, prefix) for count in (2, 3, 5)
             for words in ("open it", "open the drawer " * 9, long)
             for prefix in (None, np.full((count, 1, 4), 0.1), np.full((count, 2, 4), 0.1))]
    expected = [policy.predict_action(*request) for request in asked]
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(pool=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda forward, dynamic: compiled.append(forward) or forward)
    policy.speed_up([2, 4], [0, 2])
    assert len(policy.graphs) == 8 and len(compiled) == len(policy.vla.blocks)
    replayed = []
    for shape, (graph, fixed, tokens, cache) in policy.graphs.items():
        def replay(shape=shape, fixed=fixed, tokens=tokens, cache=cache):
            replayed.append(shape)
            tokens.copy_(policy.tokens_of(*fixed, cache))

        graph.replay = replay
    for request, action in zip(asked, expected, strict=True):
        np.testing.assert_array_equal(policy.predict_action(*request), action)
    # not for five at once, the long text, and a prefix of 1
    assert len(policy.graphs) == 8 and sorted(replayed) == sorted(policy.graphs)


def test_speed_up_needs_a_gpu(colors, commands):
    arguments = ["--checkpoint", colors, "--device", "cpu", "--speed_up"]
    ((status, text),) = commands(("", {}, "serve_vla.py", arguments))
    assert status == 1 and "it needs --device cuda" in text, text


def test_health(server, colors):
    status, facts = Client(server[0]).send(b"", "/health", "GET")
    statistics = json.loads((colors / "dataset_statistics.json").read_text())
    for key, (low, high) in facts.pop("action_q01_q99").items():
        assert (low, high) == tuple(statistics[key]["action"][name] for name in ("q01", "q99"))
    assert (status, facts) == (200, {
        "status": "ok", "model": str(colors), "unnorm_keys": ["cold", "warmer"], "cameras": ["primary"],
        "images": 1, "proprio": False, "action_shape": [1, 3], "max_prefix": 0, "center_crop": False,
        "action": {key: ["action[0]", "action[1]", "action[2]"] for key in ("cold", "warmer")},
        "gripper": {key: [1, 0] for key in ("cold", "warmer")}})


def test_what_the_model_saw(server, vla):
    status, reply = Client(server[0]).send(GOOD, "/act?seen")
    assert (status, reply["action"]) == (200, json_numpy(vla.predict_action(IMAGE, "hold it", "cold")))
    assert (from_json_numpy(reply["seen"][0]) == vla.prepare_image(IMAGE)).all() and len(reply["seen"]) == 1


def test_32_clients_at_once_get_what_one_would(server, vla):
    """Waiting requests share a batch. No answer changes, and none reaches another client."""
    port, log = server
    texts = ["let go", "hold it", "hold it, whatever happens, until somebody comes and says let go"]
    cases = [(picture(red, blue, seed), texts[seed % 3], key) for seed in range(4) for red in (0, 1)
             for blue in (0, 1) for key in ("cold", "warmer")]
    answers = [vla.predict_action(*case).tolist() for case in cases]
    assert len({tuple(answer) for answer in answers}) >= 8
    bodies = [json.dumps(query(json_numpy(image), instruction=words, unnorm_key=key)).encode()
              for image, words, key in cases]

    def ask_many(seed: int) -> int:
        client, draw = Client(port), np.random.RandomState(seed)
        for i in draw.randint(len(cases), size=20):
            status, reply = client.send(bodies[i])
            assert status == 200 and from_json_numpy(reply).tolist() == answers[i]
        return 20

    before = len(log.read_text().splitlines())
    with ThreadPoolExecutor(32) as pool:
        assert sum(pool.map(ask_many, range(32))) == 640
    lines = log.read_text().splitlines()[before:]
    sizes = [int(re.search(r"status 200 .* batch (\d+) ", line)[1]) for line in lines]
    assert len(sizes) == 640 and max(sizes) > 4


def test_cameras_history_state_and_chunks(tmp_path, plain_run, serving):
    write_colors(tmp_path, "arm", 0.2, cameras=2)
    config = {**TINY, "data_root_dir": str(tmp_path), "data_mix": "arm", "use_proprio": True,
              "datasets": {"arm": {"primary": "image", "wrist": "wrist"}}, "cameras": ["primary", "wrist"],
              "window_size": 2, "action_chunk": 2, "max_steps": 60, "learning_rate": 3e-3,
              "per_device_batch_size": 16,
              "run_root_dir": str(tmp_path / "runs"), "run_id": "arm"}
    (tmp_path / "arm.yaml").write_text(yaml.safe_dump(config))
    done = plain_run(tmp_path / "arm.yaml", "--deepspeed_config", "ds_configs/cpu.json")
    assert done.returncode == 0, done.text
    vla = load_vla(tmp_path / "runs/arm")
    views, state = [picture(i & 1, i >> 1, i) for i in range(4)], np.array([0.3, -1.5])
    expected = vla.predict_action(views, "hold it", None, state)
    assert expected.shape == (2, 3)
    good = {"images": [view.tolist() for view in views], "instruction": "hold it", "proprio": state.tolist()}
    bad = [({"images": good["images"][:3]}, "images", "list of 4"),
           ({"images": good["images"][0]}, "images", "list of 4"),
           ({"images": [*good["images"][:3], [[1]]]}, "images[3]", "[height, width, 3]"),
           ({"proprio": None}, "proprio", "robot's state"),
           ({"proprio": [1.0]}, "proprio", "expected"),
           ({"proprio": [1.0, float("nan")]}, "proprio", "finite"),
           ({"proprio": [1e300, 0]}, "proprio", "finite"),
           ({"proprio": "12"}, "proprio", "Array"),
           ({"proprio": ["1", 2]}, "proprio", "numbers")]
    with serving(tmp_path / "runs/arm") as (process, port, log):
        client = Client(port)
        for changes, key, cure in bad:
            status, reply = client.send({**good, **changes})
            assert status == 400 and key in reply["error"] and cure in reply["error"], reply
        status, reply = client.send({"image": good["images"][0], "instruction": "hold it"})
        assert status == 400 and "list of 4" in reply["error"]
        assert client.send(good) == (200, expected.tolist())
        sent = {**good, "proprio": json_numpy(state), "unnorm_key": "arm"}
        assert client.send(sent) == (200, json_numpy(expected))
        stop_while_a_request_is_under_way(process, port, log, json.dumps(good).encode(), expected)


def stop_while_a_request_is_under_way(process, port, log, body, expected):
    """The request is still answered. Then the server ends with status 0."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(b"POST /act HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
                           b"Content-Length: %d\r\n\r\n" % len(body))
        assert connection.recv(1000).startswith(b"HTTP/1.1 100")  # it has begun to read
        connection.sendall(body[:100])
        process.send_signal(signal.SIGTERM)
        time.sleep(1)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=60)
        connection.sendall(body[100:])
        reply = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert reply.startswith(b"HTTP/1.1 200") and json.loads(reply.split(b"\r\n\r\n")[1]) == expected.tolist()
    assert process.wait(30) == 0 and log.read_text().endswith("stopped\n")


def test_what_cannot_be_served_is_an_error(tmp_path, monkeypatch, capsys):
    for where in ("prism-dinosiglip-224px+8b", str(tmp_path)):
        monkeypatch.setattr(sys, "argv", ["serve_vla.py", "--checkpoint", where])
        with pytest.raises(SystemExit, match=f"error: .*{re.escape(where)}"):
            serve_vla.main()


# ------------------------------------------------------------------------------------------------------------
# Bad requests

JUNK = [None, True, 3.5, -1, 10**30, "", "?", [], {}, [[]], [None], {"a": 1}, [{}], "\ud800", [[["x"]]]]
IMAGE = picture(1, 0)
GOOD = query(json_numpy(IMAGE))


def wrong_type(draw):
    field = ("image", "instruction", "unnorm_key", "images")[draw.randint(4)]
    junk = JUNK[draw.randint(len(JUNK))]
    if field == "images" and junk is None:
        junk = 5
    if field == "instruction" and isinstance(junk, str) and junk.strip() and junk != "\ud800":
        junk = None
    return {**GOOD, field: junk}


def truncated(draw):
    body = json.dumps(GOOD).encode()
    return body[: draw.randint(len(body))]


def noise(draw):
    return draw.bytes(draw.randint(1, 3000))


def wrong_shape(draw):
    shapes = [[3, 40, 40], [40, 40], [4800], [40, 40, 1], [1, 40, 40, 3], [15, 40, 3], [40, 2, 3], [0, 40, 3],
              [-1, 40, 3], [40.0, 40, 3], [40, 40, 3, 1, 1], [2**40, 2**40, 3], [], 4800, None, "40"]
    shape = shapes[draw.randint(len(shapes))]
    data = np.zeros(draw.choice([4800, 1600, 100]), np.uint8)
    return {**GOOD, "image": {**json_numpy(data), "shape": shape}}


def wrong_dtype(draw):
    kinds = ["|O", "O", "|V8", "<U4", "|S3", "|b1", "<M8[s]", "<c8", "f16", "u3", "", "uint7", 7, None, [],
             [["a", "<i4"]], "<f4", "<f8", "object", "|u1, |u1"]
    kind = kinds[draw.randint(len(kinds))]
    sizes = {"<f4": 4, "<f8": 8, "|O": 8, "O": 8, "<M8[s]": 8, "<c8": 8}
    data = np.full(4800 * sizes.get(str(kind), 1), 7, np.uint8)
    return {**GOOD, "image": {**json_numpy(data), "dtype": kind, "shape": [40, 40, 3]}}


def wrong_number(draw):
    image = IMAGE.tolist()
    numbers = [float("nan"), float("inf"), -float("inf"), -1, 256, 1.5, 10**30, "7", None, [1]]
    image[draw.randint(28)][draw.randint(40)][draw.randint(3)] = numbers[draw.randint(10)]
    return {**GOOD, "image": image}


def ragged(draw):
    image = IMAGE.tolist()
    del image[draw.randint(28)][draw.randint(40)]
    return {**GOOD, "image": image} if draw.randint(2) else b"[" * draw.randint(2000, 200000)


def broken_file(draw):
    kind = ["png", "jpeg"][draw.randint(2)]
    data = file(IMAGE, kind)
    cmyk, small = io.BytesIO(), file(IMAGE[:8], kind)
    Image.fromarray(IMAGE).convert("CMYK").save(cmyk, "jpeg")
    header = bytearray(file(IMAGE, "png"))
    header[16:24] = (60000).to_bytes(4, "big") * 2  # a PNG header of 60,000 x 60,000 pixels
    choices = [data[: draw.randint(len(data) // 2)], file(IMAGE, "gif"), file(IMAGE, "bmp"), small,
               cmyk.getvalue(), bytes(header), draw.bytes(500), data[: len(data) // 2] + draw.bytes(50)]
    return {**GOOD, "image": text(choices[draw.randint(len(choices))])}


def broken_base64(draw):
    value = [*GOOD["image"]["__numpy__"]]
    value[draw.randint(len(value) - 8)] = ["!", "é", "\n", "=", "\ud800", ""][draw.randint(6)]
    return {**GOOD, "image": {**GOOD["image"], "__numpy__": "".join(value)}}


def unknown_key(draw):
    name = "".join(map(chr, draw.randint(32, 0xD7FF, draw.randint(1, 9))))
    return [{**GOOD, name: 1}, {**GOOD, "unnorm_key": name}, {**GOOD, "\udfff": 1},
            {**GOOD, "image": {**GOOD["image"], name: 1}}, {**GOOD, "proprio": [0.0]}][draw.randint(5)]


def missing_key(draw):
    gone = ["image", "instruction", "unnorm_key"][draw.randint(3)]  # two datasets: unnorm_key is required
    return {key: value for key, value in GOOD.items() if key != gone}


def wrongly_encoded(draw):
    return [{"encoded": GOOD}, {"encoded": json.dumps(GOOD), "image": 1}, {"encoded": json.dumps(GOOD)[:-9]},
            {"encoded": json.dumps({"encoded": json.dumps(GOOD)})}, {"encoded": "[1]"},
            {"encoded": json.dumps(wrong_type(draw))}][draw.randint(6)]


def too_long(draw):
    return {**GOOD, "instruction": "é" * draw.randint(1001, 20000)}


def no_object(draw):
    return [b"", b"1", b"[]", b'"act"', b"null", b"\xff\xfe{}", b"{]", b"9" * 5000][draw.randint(8)]


KINDS = [wrong_type, truncated, noise, wrong_shape, wrong_dtype, wrong_number, ragged, broken_file,
         broken_base64, unknown_key, missing_key, wrongly_encoded, too_long, no_object]


@pytest.mark.parametrize("count", [400, pytest.param(2000, marks=pytest.mark.slow)])
def test_bad_requests_get_a_message_then_a_good_one_its_action(count, server, vla):
    port, log = server
    client, draw = Client(port), np.random.RandomState(11)
    messages = set()
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        bad = kind(draw)
        status, reply = client.send(bad)
        assert status in (400, 413) and reply.keys() == {"error"}, (kind, bad, status, reply)
        assert 10 < len(reply["error"]) < 2100 and "Traceback" not in reply["error"]
        messages.add(re.sub(r"\d+", "0", reply["error"])[:40])
    assert len(messages) > 30  # each names its problem
    assert client.send(GOOD) == (200, json_numpy(vla.predict_action(IMAGE, "hold it", "cold")))
    assert " status 500 " not in log.read_text() and "Traceback" not in log.read_text()


def test_huge_and_broken_connections_and_other_addresses(server, vla):
    port, _ = server
    huge = Client(port)
    for size in (serve_vla.MAX_BODY + 1, 3 * serve_vla.MAX_BODY):
        status, reply = huge.send(b" " * size)
        assert status == 413 and "33554432 bytes" in reply["error"]
    status, reply = huge.send(query([[[0, 0, 0]] * 40] * 5000))
    assert status == 400 and "image" in reply["error"] and "5000 x 40" in reply["error"]
    status, reply = huge.send({str(number): 0 for number in range(100000)})
    assert status == 400 and "100 fields" in reply["error"]
    for method, path in (("GET", "/act"), ("PUT", "/act"), ("POST", "/health"), ("POST", "/")):
        other = Client(port).http
        other.request(method, path, b"{}")
        assert other.getresponse().status in (404, 405)
    for start in (b"\x00\xff" * 500, b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n", b"GET",
                  b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n{\"ima"):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(start)  # and hang up in the middle
    assert Client(port).send(GOOD)[0] == 200


def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded():
    """A scan of a few bytes can cost libjpeg a pass over all pixels."""
    out = io.BytesIO()
    Image.fromarray(IMAGE).save(out, "jpeg", progressive=True)
    data = out.getvalue()
    assert data.count(b"\xff\xda") > 5  # an honest one
    decode_picture(data, "image")
    start = data.rindex(b"\xff\xda")
    with pytest.raises(RequestError, match=r"image.* scans.*baseline"):
        decode_picture(data[:start] + 50 * data[start:-2] + data[-2:], "image")


def test_one_failing_request_does_not_fail_its_batch(vla):
    """The model's errors reach only the client that caused them."""
    batcher = serve_vla.Batcher(vla, max_batch=8)
    queries = [parse_request(json.dumps(GOOD).encode(), vla) for _ in range(3)]
    for each in queries:
        each.pixels = vla.prepare_views(each.views).numpy()
    queries[1].pixels = np.zeros((1, 28, 28, 1), np.uint8)  # which a reader would refuse
    futures = [batcher.ask(each) for each in queries]
    gone = batcher.ask(queries[0])
    gone.cancel()  # its client has hung up
    batcher.start()
    expected = vla.predict_action(IMAGE, "hold it", "cold").tolist()
    for i in (0, 2):
        assert futures[i].result(60)[0].tolist() == expected
    assert futures[1].exception(60) is not None
    assert batcher.ask(queries[0]).result(60)[0].tolist() == expected and threading.active_count() > 1


# ------------------------------------------------------------------------------------------------------------
# doctor.py --server


def wrong_colors(policy):
    prepare = policy.prepare_image
    policy.prepare_image = lambda image: prepare(image[..., ::-1])


def other_statistics(policy):
    for stats in policy.norm_stats.values():
        stats["action"] |= {key: (0.5 * np.array(stats["action"][key])).tolist() for key in ("q01", "q99")}


def another_head(policy):
    head = policy.vla.llm.get_output_embeddings().weight
    head.requires_grad_(False).copy_(head.roll(40, 0))


def rounding(policy):
    policy.vla.to(torch.bfloat16)


def crop(policy):
    policy.cfg.image_aug = True


def other_units(policy):
    policy.actions = lambda *given: 2 * act.Policy.actions(policy, *given)


def two_steps(policy):
    policy.cfg.action_chunk = 2


@pytest.mark.parametrize("change, kind, words", [
    (lambda policy: None, None, None), (rounding, None, None),
    (wrong_colors, "pictures", "pictures that are red and blue swapped"),
    (crop, "pictures", "center_crop is False, this checkpoint's True"),
    (other_statistics, "statistics", "action_q01_q99"), (other_units, "statistics", "0.5 times this policy's"),
    (another_head, "model", "another model.*serve this checkpoint"),
    (two_steps, "model", "action_shape is .1, 3., this checkpoint's .2, 3.")])
def test_the_doctor_compares_a_server_with_a_checkpoint(change, kind, words, server, colors, capsys):
    """The server answers soundly, and it is the checkpoint that differs from it."""
    policy = load_vla(colors)
    train, _ = open_data(policy, "cold", None, None)
    change(policy)
    found = server_causes(policy, train, f"http://127.0.0.1:{server[0]}", None)
    assert [cause.kind for cause in found] == ([kind] if kind else [])
    assert all(re.search(words, f"{cause.text}: {cause.cure}") for cause in found)
    assert f"model {colors} cameras ['primary'] action_shape [1, 3]" in capsys.readouterr().out


def test_the_doctor_and_a_server_that_does_not_answer(server, colors, vla):
    train, _ = open_data(vla, "cold", None, None)
    for url, cure in (("http://127.0.0.1:9", "does serve_vla.py listen there"),
                      (f"http://127.0.0.1:{server[0]}/other", "does serve_vla.py listen there")):
        with pytest.raises(UserError, match=f"--server {url}.*{cure}"):
            server_causes(vla, train, url, None)
    with pytest.raises(UserError, match=r"--server .*'hot'.*'cold', 'warmer'"):
        call(f"http://127.0.0.1:{server[0]}/act", None, {**query(GOOD["image"]), "unnorm_key": "hot"})


@pytest.mark.slow
def test_the_doctor_s_program_with_a_token_cameras_states_and_chunks(tmp_path, plain_run, serving):
    """Another checkpoint of the same run is another model; its own server has no causes."""
    write_colors(tmp_path, "cold", 0.1, cameras=2)
    recipe = {"primary": "image", "wrist": "wrist", "state": "state"}
    config = {**TINY, "data_root_dir": str(tmp_path), "data_mix": "cold", "datasets": {"cold": recipe},
              "cameras": ["primary", "wrist"], "use_proprio": True, "window_size": 2, "action_chunk": 2,
              "learning_rate": 3e-3, "max_steps": 40, "save_interval": 20, "run_root_dir": str(tmp_path),
              "per_device_batch_size": 16,
              "run_id": "run"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    done = plain_run(tmp_path / "run.yaml", "--deepspeed_config", "ds_configs/cpu.json")
    assert done.returncode == 0, done.text
    (tmp_path / "token").write_text("secret")
    first, last = sorted((tmp_path / "run/checkpoints").iterdir())
    with serving(last, "--token", tmp_path / "token") as (_, port, _):
        for policy, options, words in (
                (last, ["--token", tmp_path / "token"], "examined: .*; a server"),
                (first, ["--token", tmp_path / "token"], "cause model"),
                (last, [], "error: --server http.*: add --token")):
            command = [sys.executable, ROOT / "doctor.py", policy, "--server", f"http://127.0.0.1:{port}/",
                       "--out", tmp_path / "page.html", *options]
            done = subprocess.run(command, capture_output=True, text=True, timeout=100)
            assert re.search(words, done.stdout + done.stderr), done.stdout + done.stderr
            assert ("the server:" in done.stdout) == (policy == first)
