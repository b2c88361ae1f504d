"""Exercise 6. From the model's numbers back to the robot's.   练习 6：从模型的数变回机器人的数。

Write the body of unnormalize (action_tokenizer.py), then: python course/check.py 6
写出 unnormalize 的函数体 (action_tokenizer.py)，然后运行上面的命令（加 --zh 用中文）。

stats   {"q01": [...], "q99": [...], "min": ..., "max": ..., "mean": ..., "std": ..., perhaps "mask": [...]}
kind    "bounds_q99" or "bounds": BOUNDS[kind] names the two keys that became -1 and +1; "normal": mean and std
        BOUNDS[kind] 是对应 -1 和 +1 的两个键；"normal" 用 mean 和 std
"""

from collections.abc import Mapping

import numpy as np

from action_tokenizer import BOUNDS


def unnormalize(actions: np.ndarray, stats: Mapping, kind: str) -> np.ndarray:
    """Undo normalize for actions (..., D) float64. Dimensions whose mask is false pass unchanged;
    without a mask, all are scaled.

    Hint: -1 must become `low`, +1 must become `high`, and all between lies on a straight line.
    """
    raise NotImplementedError
