"""Exercise 1. A number becomes a token id.   练习 1：一个数变成一个词元 id。

Write the body of ActionTokenizer.encode (`self` is an ActionTokenizer), then: python course/check.py 1
写出 ActionTokenizer.encode 的函数体（self 就是一个 ActionTokenizer），然后运行上面的命令（加 --zh 用中文）。

self.bins has the n_bins edges from -1 to 1; self.vocab_size - 1 is the id of -1.0.
self.bins 是 -1 到 1 的 n_bins 条边界；-1.0 的 id 是 self.vocab_size - 1。
"""

import numpy as np

from machinery.config import UserError


def encode(self, actions: np.ndarray) -> np.ndarray:
    """Normalized actions of any shape -> token ids of the same shape, int64.

    Clips to [-1, 1]. Raises UserError if a number is not finite.
    Hint: np.digitize(x, edges) counts the edges that are <= x.
    """
    raise NotImplementedError
