"""Load a running serve_vla.py with many clients, and compare every answer with the one given
without load.

    python serve_vla.py --checkpoint runs/demo+n1+b32+x7 --dtype fp32 &
    python bench/serve_load.py --url http://127.0.0.1:8000 --clients 32 --seconds 60

First makes 24 requests one at a time (images of random colors, instructions, all of the model's
datasets). Then the clients repeat them in random order until the time is up. In float32 no answer
may change. In bf16 a batch rounds differently from a single request, so some answers move to a
neighboring bin and also count as different.
"""

import argparse
import http.client
import itertools
import json
import random
import sys
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

import numpy as np


def ask(connection: http.client.HTTPConnection, path: str, body: bytes | None = None):
    """POST, or GET without a body -> (status, the reply's JSON)."""
    connection.request("POST" if body else "GET", path, body)
    reply = connection.getresponse()
    return reply.status, json.loads(reply.read())


def requests(health: dict, count: int) -> list[bytes]:
    """Bodies of different requests for the model described by /health."""
    draw, keys = np.random.RandomState(0), itertools.cycle(health["unnorm_keys"])
    images = [np.clip(draw.randint(0, 256, 3) + draw.randint(-20, 21, (96, 128, 3)), 0, 255).tolist()
              for _ in range(count * health["images"])]
    words = "pick up the red cup and put it into the drawer next to the stove".split()
    return [json.dumps({
        "images": images[i :: count],
        "instruction": " ".join(words[: draw.randint(2, len(words))]), "unnorm_key": next(keys),
    }).encode() for i in range(count)]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    args = parser.parse_args()
    address = urllib.parse.urlsplit(args.url).netloc
    alone = http.client.HTTPConnection(address, timeout=60)
    bodies = requests(ask(alone, "/health")[1], 24)
    answers = [ask(alone, "/act", body) for body in bodies]
    if bad := [reply for status, reply in answers if status != 200]:
        sys.exit(f"error: the server rejected a valid request: {bad[0]}")
    different = len({json.dumps(reply) for _, reply in answers})

    def client(seed: int) -> list[tuple[float, str]]:
        connection, choose, found = http.client.HTTPConnection(address, timeout=60), random.Random(seed), []
        while time.perf_counter() < until:
            i, started = choose.randrange(len(bodies)), time.perf_counter()
            try:
                right = ask(connection, "/act", bodies[i]) == answers[i]
                found.append((time.perf_counter() - started, "same" if right else "different"))
            except (OSError, http.client.HTTPException, ValueError):
                found.append((time.perf_counter() - started, "lost"))
                connection.close()
        return found

    started = time.perf_counter()
    until = started + args.seconds
    with ThreadPoolExecutor(args.clients) as pool:
        found = [item for items in pool.map(client, range(args.clients)) for item in items]
    seconds = time.perf_counter() - started
    counts = {kind: sum(kind == k for _, k in found) for kind in ("same", "different", "lost")}
    p50, p99 = np.percentile([1000 * took for took, _ in found], [50, 99])
    print(f"clients {args.clients} seconds {seconds:.1f} distinct_answers {different} requests {len(found)} "
          + " ".join(f"{kind} {count}" for kind, count in counts.items())
          + f" requests_per_second {len(found) / seconds:.1f} ms_p50 {p50:.0f} ms_p99 {p99:.0f}")
    sys.exit(1 if counts["lost"] else 0)


if __name__ == "__main__":
    main()
