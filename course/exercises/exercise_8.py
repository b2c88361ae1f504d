"""Exercise 8. Is it really better?   练习 8：真的更好吗？

Write the body of wilson (examples/closed_loop.py), then: python course/check.py 8
写出 wilson 的函数体 (examples/closed_loop.py)，然后运行上面的命令（加 --zh 用中文）。

For s successes of n, with p = s / n and z = 1.96   n 次里成功 s 次：
    center      p + z² / 2n                         half the width   z √(p (1 - p) / n + z² / 4n²)
    and both are divided by 1 + z² / n              两者都除以 1 + z² / n
"""

import math


def wilson(successes: int, trials: int) -> list[float]:
    """The 95% interval of a success rate (Wilson, 1927): [low, high], both in 0..1, rounded to four
    digits.

    Hint: rounding may give -0.0 or 1.0001: keep both ends within 0 and 1.
    """
    raise NotImplementedError
