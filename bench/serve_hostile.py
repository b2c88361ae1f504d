"""How much 1,000 hostile requests delay an honest client of serve_vla.py.

    python serve_vla.py --checkpoint runs/demo+n1+b32+x7 &
    python bench/serve_hostile.py --url http://127.0.0.1:8000

The honest client asks as fast as it is answered, for half of the time undisturbed. In the other
half, in turns of a few seconds, eight clients in a process of their own send requests that cost
much or never end: pictures of many pixels, scans and chunks, lists and maps, bodies beyond the
limit, foreign origins. All the time, hundreds of silent connections, unfinished requests and idle
websockets are open. Prints how long the honest client waited, and fails above twice the undisturbed
time. Where all run on the same processors, as here, the hostile clients take a part of them, too.
"""

import argparse
import base64
import collections
import http.client
import io
import itertools
import json
import multiprocessing
import os
import socket
import statistics
import struct
import sys
import threading
import time
import urllib.parse
import zlib

import msgpack
import numpy as np
from PIL import Image
from websockets.sync.client import connect

SIDE = 4096  # the largest that the server decodes
CLIENTS = 8
SILENT = 150  # connections of each kind that stay open


# ---- What they send ----------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    """A part of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(extra: bytes = b"", side: int = SIDE) -> bytes:
    """A valid picture of one color, with `extra` before its pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(side * (3 * side + 1)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def jpeg(scans: int) -> bytes:
    """A progressive picture of SIDE pixels, whose further scans change nothing."""
    def segment(kind, data):
        return bytes([0xFF, kind]) + struct.pack(">H", len(data) + 2) + data

    def scan(place, bits):
        bits += "1" * (-len(bits) % 8)
        data = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
        return segment(0xDA, bytes([1, 1, 0, place, place, 0])) + data

    def code(table, symbol):
        return segment(0xC4, bytes([table, 0, 1]) + bytes(14) + bytes([symbol]))

    blocks = (SIDE // 8) ** 2
    nothing = ("00" + "1" * 14) * (blocks // 32767) + "00" + "0" * 14
    return b"".join([b"\xff\xd8", segment(0xDB, b"\0" + b"\1" * 64),
                     segment(0xC2, b"\x08" + struct.pack(">HH", SIDE, SIDE) + b"\1\1\x11\0"),
                     code(0, 0), code(0x10, 0xE0), scan(0, "00" * blocks),
                     *(scan(1 + i % 63, nothing) for i in range(scans)), b"\xff\xd9"])


def other_format(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, kind)
    return file.getvalue()


def bodies(key: str) -> dict[str, bytes]:
    """{kind: what is sent to POST /act}"""
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(60 << 20), 9))
    pictures = {
        "png_of_16_megapixels": png(),
        "png_of_a_megapixel": png(side=1024),
        "png_with_comments": png(text * 3, 64),
        "png_of_a_million_chunks": png(chunk(b"tEXt", b"") * (1 << 20), 64),
        "jpeg_of_31_scans": jpeg(30),
        "jpeg_of_4000_scans": jpeg(4000),
        "jpeg_of_a_million_markers": b"\xff\xd8" + b"\xff\xe1\0\2" * (1 << 20),
        "gif": other_format("gif"), "tiff": other_format("tiff"), "webp": other_format("webp")}
    found = {}
    for kind, data in pictures.items():
        image = base64.b64encode(data).decode()
        found[kind] = json.dumps({"image": image, "instruction": "go", "unnorm_key": key}).encode()
    numbers = b"[" + b"[[1,2,3],[4,5,6]]," * 20_000 + b"[]]"
    found |= {
        "list_of_ragged_numbers": b'{"instruction": "go", "image": ' + numbers + b"}",
        "list_of_8_megabytes": b'{"instruction": "go", "image": [' + b"[[1,2,3]]," * 800_000 + b"[]]}",
        "deep_lists": b"[" * (8 << 20),
        "many_keys": json.dumps({str(i): i for i in range(300_000)}).encode(),
        "long_number": b"9" * (4 << 20),
        "too_long": b" " * (40 << 20),
        "scalars": json.dumps({"image": [[{"__numpy__": "AA==", "dtype": "|u1", "shape": []}] * 30_000],
                               "instruction": "go"}).encode(),
        "noise": os.urandom(100_000)}
    return found


MESSAGES = {  # over the websocket
    "msgpack_deep": b"\x91" * (1 << 20),
    "msgpack_sizes": b"\xdd\xff\xff\xff\xff" * 50,
    "msgpack_extension": b"\xc9\x7f\xff\xff\xff\x01",
    "msgpack_many_parts": msgpack.packb([[[]] * 1000] * 1000),
    "msgpack_of_16_megabytes": msgpack.packb({"prompt": "x" * (16 << 20)}),
}


# ---- Clients -----------------------------------------------------------------------------------


def honest_body(health: dict) -> bytes:
    """A request with JPEGs of a usual camera."""
    draw = np.random.RandomState(0)
    images = []
    for _ in range(health["images"]):
        file = io.BytesIO()
        small = Image.fromarray(draw.randint(0, 256, (12, 16, 3)).astype(np.uint8))
        small.resize((320, 240)).save(file, "jpeg", quality=95)
        images.append(base64.b64encode(file.getvalue()).decode())
    states = health.get("state", {})
    key = health["unnorm_keys"][0]
    state = {"proprio": [0.0] * len(states[key])} if states else {}
    return json.dumps({"images": images, "instruction": "pick up the red cup", "unnorm_key": key,
                       **state}).encode()


def waits(address: str, body: bytes, seconds: float) -> list[float]:
    """Milliseconds of each answer to the honest client."""
    connection = http.client.HTTPConnection(address, timeout=120)
    found = []
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop:
        started = time.perf_counter()
        connection.request("POST", "/act", body)
        reply = connection.getresponse()
        answer = reply.read()
        if reply.status != 200:
            sys.exit(f"error: the honest client was refused: {answer}")
        found.append(1000 * (time.perf_counter() - started))
    return found


def hostile(address: str, key: str, total: int, sending, under_way, statuses) -> None:
    """Send `total` requests while `sending` is set -> statuses, {kind and status: count}. under_way:
    how many have no answer yet."""
    kinds = bodies(key)
    names = itertools.cycle([*kinds, *MESSAGES, "origin", "websocket_origin", "token"])
    plan = iter([next(names) for _ in range(total)])
    lock = threading.Lock()
    counts: collections.Counter = collections.Counter()
    port = int(address.rpartition(":")[2])
    open_ones = []

    def stay_open():
        """Silent connections, requests that never end, idle websockets."""
        for i in range(3 * SILENT):
            if i % 3 == 2:
                open_ones.append(connect(f"ws://{address}", open_timeout=60))
                continue
            open_ones.append(socket.create_connection(("127.0.0.1", port)))
            if i % 3 == 1:
                start = b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n\r\n{"
                open_ones[-1].sendall(start[: 30 + i])

    def send(name: str) -> int | str:
        if name in MESSAGES or name == "websocket_origin":
            headers = {"Origin": "https://evil.example"} if name == "websocket_origin" else {}
            with connect(f"ws://{address}", max_size=None, additional_headers=headers) as connection:
                connection.recv(60)
                connection.send(MESSAGES[name])
                return "text" if isinstance(connection.recv(120), str) else "action"
        connection = http.client.HTTPConnection(address, timeout=120)
        headers = {"Origin": "https://evil.example"} if name == "origin" else {"Authorization": "Bearer x"}
        connection.request("POST", "/act", kinds.get(name, b"{}"), headers)
        return connection.getresponse().status

    def client() -> None:
        while True:
            sending.wait()
            with lock:
                name = next(plan, None)
                under_way.value += 1
            try:
                status = send(name) if name else 0
            except Exception as error:
                status = type(error).__name__
            with lock:
                under_way.value -= 1
                if not name:
                    return
                counts[f"{name} {status}"] += 1

    sending.wait()
    threads = [threading.Thread(target=each, daemon=True) for each in [stay_open, *[client] * CLIENTS]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statuses.put(dict(counts))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=5, help="of each turn")
    args = parser.parse_args()
    address = urllib.parse.urlsplit(args.url).netloc
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request("GET", "/health")
    health = json.load(connection.getresponse())
    body = honest_body(health)
    context = multiprocessing.get_context("spawn")
    sending, under_way, statuses = context.Event(), context.Value("i"), context.Queue()
    process = context.Process(target=hostile, daemon=True, args=(
        address, health["unnorm_keys"][0], args.requests, sending, under_way, statuses))
    process.start()
    time.sleep(15)  # it makes its requests
    waits(address, body, 2)
    quiet, disturbed = [], []
    while process.is_alive() and statuses.empty():
        sending.clear()
        while under_way.value:
            time.sleep(0.1)
        quiet += waits(address, body, args.seconds)
        sending.set()
        disturbed += waits(address, body, args.seconds)
    for name, count in sorted(statuses.get().items()):
        print(f"hostile {name} count {count}")
    ratios = []
    for percent in (50, 95):
        before, after = (float(np.percentile(times, percent)) for times in (quiet, disturbed))
        ratios.append(after / before)
        print(f"percentile {percent} undisturbed_ms {before:.1f} disturbed_ms {after:.1f} ratio {ratios[-1]:.2f}")
    print(f"answers undisturbed {len(quiet)} disturbed {len(disturbed)} "
          f"mean_ratio {statistics.mean(disturbed) / statistics.mean(quiet):.2f}")
    sys.exit(max(ratios) > 2)


if __name__ == "__main__":
    main()
