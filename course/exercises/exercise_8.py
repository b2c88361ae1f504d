"""Exercise 8. Better than its group.   练习 8：比同组好多少。

Write the body of with_advantages (examples/rl/rl.py), then: python course/check.py 8
写出 with_advantages 的函数体 (examples/rl/rl.py)，然后运行上面的命令（加 --zh 用中文）。

episode["success"]          True or False: the reward is 1 or 0          奖励是 1 或 0
episode["executed"]         steps executed in the whole episode          整个回合执行了多少步
episode["decisions"]        its chunks, one dict each; len(decision["old"]) is the number of tokens in a chunk
                            各个动作块，每块一个 dict；len(decision["old"]) 是一块里词元的个数
args.execute                steps of a chunk that are executed           一块里执行几步
args.method                 "grpo", or "cloning": then the advantage is the reward itself   后者：优势就是奖励
"""

import numpy as np


def with_advantages(episodes: list[dict], args, action_dim: int) -> list[dict]:
    """The decisions of a group's episodes, in order, each as a new dict with two more keys:

    "advantage"  (1,) float32: (reward - mean of the group) / (standard deviation of the group + 1e-6)
    "weight"     (tokens of a chunk,) float32: 1 if its step was executed, else 0

    Of an episode with advantage 0 all weights are 0.

    Hint: {**decision, "advantage": ..., "weight": ...}. A step has action_dim tokens. The chunk with
    number n begins at step n * args.execute.
    """
    raise NotImplementedError
