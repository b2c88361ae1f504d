"""Exercise 8: the interval of a success rate (see check.py)."""

import math

from examples import closed_loop

OWNER, NAME = closed_loop, "wilson"


def probes() -> list:
    return [(f"{s} of {n}", f"{n} 次成功 {s} 次", lambda s=s, n=n: closed_loop.wilson(s, n))
            for s, n in ((60, 100), (300, 1000), (3, 4), (0, 10), (10, 10))]


def percent(got: dict) -> bool:
    return bool(got["60 of 100"][1] > 10)


def plain(got: dict) -> bool:
    half = 1.96 * math.sqrt(0.6 * 0.4 / 100)
    return bool(abs(got["60 of 100"] - [0.6 - half, 0.6 + half]).max() < 2e-3)


def one_sided(got: dict) -> bool:
    return bool(abs(got["60 of 100"] - [0.518, 0.6766]).max() < 2e-3)


def reversed_ends(got: dict) -> bool:
    return bool(got["60 of 100"][0] > got["60 of 100"][1])


def one_deviation(got: dict) -> bool:
    return bool(abs(got["60 of 100"] - [0.5502, 0.6478]).max() < 2e-3)


MISTAKES = [
    (percent, "percent instead of a share: the ends lie between 0 and 1",
     "返回的是百分数：两端应在 0 和 1 之间"),
    (plain, "p ± z √(p (1 - p) / n) is the plain interval: for 10 of 10 it has width 0; Wilson's has terms with z² / n",
     "p ± z √(p (1 - p) / n) 是最简单的区间：10 次全成功时宽度为 0；Wilson 的公式里还有 z² / n 的项"),
    (reversed_ends, "the upper end comes first: return [low, high]", "上端放在前面了：应返回 [下端, 上端]"),
    (one_sided, "z is 1.645, which is the 90% interval: 95% needs 1.96", "z 用了 1.645，那是 90% 的区间：95% 要用 1.96"),
    (one_deviation, "z is missing (1 instead of 1.96): one standard deviation is the 68% interval",
     "漏了 z（用了 1 而不是 1.96）：一个标准差是 68% 的区间"),
    ("(1 + z * z / trials)", "1.0", "not divided by 1 + z² / n: an end can lie above 1",
     "没有除以 1 + z² / n：端点可能超过 1"),
    ("p + z * z / (2 * trials)", "p", "the center is p: Wilson's is p + z² / 2n, nearer to one half",
     "中心用了 p：Wilson 的中心是 p + z² / 2n，更靠近二分之一"),
    ("z * z / (4 * trials**2)", "z * z / (4 * trials)", "z² / 4n under the root: it is z² / 4n²",
     "根号里用了 z² / 4n：应该是 z² / 4n²"),
]
