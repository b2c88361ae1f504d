"""Exercise 7. The best answer that ignores the picture.   练习 7：不看图像的最好答案。

Write the body of most_frequent_tokens (data.py), then: python course/check.py 7
写出 most_frequent_tokens 的函数体 (data.py)，然后运行上面的命令（加 --zh 用中文）。

mixture.actions(d, rows)                 normalized actions of rows of dataset d, (R, action_chunk, action_dim)
                                         数据集 d 的这些行的归一化动作
mixture.action_tokenizer.encode(...)     numbers -> ids
"""

import numpy as np

from data import Mixture


def most_frequent_tokens(mixture: Mixture, dataset: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The most frequent id of each action token (T,) in the frames (dataset, row), (R,) each;
    T = action_chunk x action_dim.

    Hint: np.bincount counts how often each id occurs in a column.
    """
    raise NotImplementedError
