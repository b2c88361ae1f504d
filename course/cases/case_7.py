"""Exercise 7: the best answer that ignores the picture (see check.py)."""

import copy
import functools

import numpy as np

import data
from action_tokenizer import load_tokenizer
from machinery.config import load_config

OWNER, NAME = data, "most_frequent_tokens"


@functools.cache
def mixture(chunk: int = 1) -> data.Mixture:
    """The demo's dataset, and a robot with the same actions in other units."""
    cfg = load_config("configs/demo.yaml", [f"action_chunk={chunk}", "balance_weights=false"])
    ((name, _, recipe, table),) = data.open_tables(cfg)
    slow = copy.copy(table)
    stats = dict(table.statistics["action"])
    for key in ("q01", "q99"):
        stats[key] = 3 * np.array(stats[key]) + 0.05
    slow.statistics = {**table.statistics, "action": stats}
    tables = [(name, 0.5, recipe, table), ("slow_robot", 0.5, recipe, slow)]
    return data.Mixture(cfg, tables, load_tokenizer(cfg.tokenizer, cfg.add_action_tokens))


def frequent(datasets: tuple, count: int, chunk: int = 1, others: bool = False) -> np.ndarray:
    """For `count` frames of each of these datasets: the same of each, or others."""
    one = mixture(chunk)
    dataset = np.repeat(datasets, count)
    index = np.tile(np.linspace(0, one.sizes[0] - 1, count).astype(int), len(datasets))
    if others:
        index = np.linspace(0, one.sizes[0] - 1, len(dataset)).astype(int)
    return data.most_frequent_tokens(one, dataset, one.rows(dataset, index))


def probes() -> list:
    return [("100 frames of the demo", "演示数据的 100 帧", lambda: frequent((0,), 100)),
            ("1,000 frames of the demo", "演示数据的 1,000 帧", lambda: frequent((0,), 1000)),
            ("chunks of three steps", "三步的动作块", lambda: frequent((0,), 500, 3)),
            ("two robots", "两种机器人", lambda: frequent((1, 0), 40)),
            ("two robots, other shares", "两种机器人，另一种份额", lambda: frequent((0, 1, 1), 60)),
            ("two robots, most frames of the first", "两种机器人，第一种的帧最多", lambda: frequent((0, 0, 0, 1), 60)),
            ("other frames of each robot", "每种机器人的帧各不相同", lambda: frequent((0, 1), 100, others=True))]


COUNT = "np.array([np.bincount(column).argmax() for column in tokens.T])"


def one_for_all(got: dict) -> bool:
    found, one = got["100 frames of the demo"], mixture()
    rows = one.rows(np.zeros(100, int), np.linspace(0, one.sizes[0] - 1, 100).astype(int))
    ids = one.action_tokenizer.encode(one.actions(0, rows))
    return found.size in (1, 4) and bool((found == np.bincount(ids.ravel()).argmax()).all())


MISTAKES = [
    (one_for_all, "one id for the whole action: each of its numbers has its own most frequent id (count column by column)",
     "整个动作只用了一个 id：每个数都有自己最常见的 id（逐列计数）"),
    (COUNT, "np.rint(tokens.mean(0)).astype(int)",
     "the mean id instead of the most frequent one: between 'left' and 'right' the mean is 'straight on'",
     "取了 id 的平均，而不是最常见的：“左”和“右”的平均是“直走”"),
    (COUNT, "np.median(tokens, axis=0).astype(int)",
     "the median id instead of the most frequent one: count how often each id occurs",
     "取了 id 的中位数，而不是最常见的：要数每个 id 出现的次数"),
    (COUNT, "np.array([np.unique(column, return_counts=True)[1].argmax() for column in tokens.T])",
     "the place in a list of ids instead of the id: look the id up, or use np.bincount",
     "返回的是它在 id 列表里的位置，而不是 id：要查出 id，或者用 np.bincount"),
    (COUNT, "np.array([np.bincount(column).max() for column in tokens.T])",
     "how often instead of which: use argmax",
     "返回的是次数，而不是哪一个 id：用 argmax"),
    (COUNT, "tokens[0]", "the first frame's action instead of the most frequent one",
     "返回的是第一帧的动作，而不是最常见的"),
    ("mixture.actions(d, rows[dataset == d])", "mixture.actions(dataset[-1], rows[dataset == d])",
     "statistics of another dataset: each frame must be normalized with its own dataset's (mixture.actions(d, rows of d))",
     "用了另一个数据集的统计量：每一帧都要用自己数据集的来归一化（mixture.actions(d, d 的各行)）"),
    ("mixture.actions(d, rows[dataset == d])", "mixture.actions(dataset[0], rows[dataset == d])",
     "statistics of another dataset: each frame must be normalized with its own dataset's (mixture.actions(d, rows of d))",
     "用了另一个数据集的统计量：每一帧都要用自己数据集的来归一化（mixture.actions(d, d 的各行)）"),
    ("mixture.actions(d, rows[dataset == d])", "mixture.actions(0, rows[dataset == d])",
     "statistics of another dataset: each frame must be normalized with its own dataset's (mixture.actions(d, rows of d))",
     "用了另一个数据集的统计量：每一帧都要用自己数据集的来归一化（mixture.actions(d, d 的各行)）"),
    ("np.concatenate(actions).reshape(len(rows), -1)", "actions[0].reshape(len(actions[0]), -1)",
     "only the first dataset is counted: put the actions of all datasets together first",
     "只数了第一个数据集：先把所有数据集的动作放在一起"),
    ("np.concatenate(actions).reshape(len(rows), -1)", "actions[-1].reshape(len(actions[-1]), -1)",
     "only the last dataset is counted: put the actions of all datasets together first",
     "只数了最后一个数据集：先把所有数据集的动作放在一起"),
]
