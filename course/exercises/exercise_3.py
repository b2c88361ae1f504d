"""Exercise 3. Which frame comes when?   练习 3：什么时候轮到哪一帧？

Write the body of Mixture.draw (`self` is a Mixture), then: python course/check.py 3
写出 Mixture.draw 的函数体（self 就是一个 Mixture），然后运行上面的命令（加 --zh 用中文）。

What you need is there already    可以直接用：
    interleave(self.shares, first, count)   -> which dataset, and how many of its samples came before (its visit)
                                               轮到哪个数据集，以及它此前出现过多少次
    self.sizes                              frames of each dataset   每个数据集的帧数
    permute(index, n, key)                  element `index` of a random order of 0..n-1   随机顺序里的第 index 个
                                            (index must be below n, or it may never end)   index 必须小于 n，否则可能停不下来
    mix_bits(a, b, ...)                     a key made of several integers   由几个整数得到一个密钥
    self.rows(dataset, index)               -> rows in the frame table   帧表里的行号

The key of the project's own is mix_bits(seed, dataset, epoch), in this order.
项目里的密钥是 mix_bits(seed, dataset, epoch)，按这个次序。
"""

import numpy as np

from data import interleave, mix_bits, permute


def draw(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Samples first .. first+count-1 of the run -> (dataset, frame row, epoch), (count,) each.

    Hint: a visit of a dataset is epoch * size + index: np.divmod. Everything works on arrays.
    """
    raise NotImplementedError
