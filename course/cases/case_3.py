"""Exercise 3: which frame comes when (see check.py)."""

import copy
import functools

import numpy as np

import data
from machinery.config import load_config

OWNER, NAME = data.Mixture, "draw"
FRAMES = 2480  # of the demo's training split


@functools.cache
def mixture(seed: int, two: bool, train: bool, half: bool = False) -> data.Mixture:
    """The demo's dataset, or a mixture of it with itself, or with its second half (3/4 and 1/4)."""
    cfg = load_config("configs/demo.yaml", [f"seed={seed}"])
    ((name, _, recipe, table),) = data.open_tables(cfg)
    tables = [(name, 1.0, recipe, table)]
    if two:
        cfg = cfg.model_copy(update={"balance_weights": False})
        tables = [(name, 0.75, recipe, table), ("copy", 0.25, recipe, copy.copy(table))]
    found = data.Mixture(cfg, tables, train=train)
    if half:
        first, count, _ = found.stretches[1]
        first, count = first[len(first) // 2 :], count[len(count) // 2 :]
        found.stretches[1] = first, count, np.cumsum(count)
        found.sizes[1] = count.sum()
    return found


def drawn(seed: int, first: int, count: int, two: bool = False, train: bool = True, half: bool = False) -> np.ndarray:
    """(3, count): dataset, row, epoch."""
    return np.stack(mixture(seed, two, train, half).draw(first, count))


def probes() -> list:
    return [
        ("16 samples", "16 个样本", lambda: drawn(7, 0, 16)),
        ("one epoch", "一个 epoch", lambda: drawn(7, 0, FRAMES)),
        ("the next epoch", "下一个 epoch", lambda: drawn(7, FRAMES, FRAMES)),
        ("from sample 1,000,000 on", "从第 1,000,000 个样本开始", lambda: drawn(7, 1_000_000, 8)),
        ("held-out frames", "留出的帧", lambda: drawn(7, 0, 16, train=False)),
        ("another seed", "另一个种子", lambda: drawn(8, 0, FRAMES)),
        ("two datasets", "两个数据集", lambda: drawn(7, 0, 4 * 64, two=True)),
        ("a large dataset and a small one", "一大一小两个数据集", lambda: drawn(7, 0, 2 * FRAMES, two=True, half=True)),
    ]


def in_order(got: dict) -> bool:
    return bool((np.diff(got["one epoch"][1]) >= 0).all())


def seed_unused(got: dict) -> bool:
    return np.array_equal(got["one epoch"], got["another seed"])


def same_every_epoch(got: dict) -> bool:
    same = np.array_equal(got["one epoch"][1], got["the next epoch"][1])
    return same and bool((got["the next epoch"][2] == 1).all())


def repeats(got: dict) -> bool:
    _, row, epoch = got["one epoch"]
    return len(row) == FRAMES and len(np.unique(row)) < FRAMES and not epoch.any()


def same_in_all_datasets(got: dict) -> bool:
    dataset, row, _ = got["two datasets"]
    return np.array_equal(row[dataset == 0][:64], row[dataset == 1][:64])


MISTAKES = [
    (in_order, "the frames come in the order of the file: give `index` to permute",
     "帧按文件里的顺序出来了：要用 permute 打乱 `index`"),
    (seed_unused, "another seed gives the same order: self.cfg.seed must be in the key",
     "换一个种子，顺序还是一样：self.cfg.seed 必须在密钥里"),
    (same_every_epoch, "each epoch has the same order: the epoch must be in the key",
     "每个 epoch 的顺序都一样：epoch 必须在密钥里"),
    (same_in_all_datasets, "all datasets have the same order: the dataset must be in the key",
     "各个数据集的顺序都一样：dataset 必须在密钥里"),
    (repeats, "frames repeat before all have been seen: within an epoch, permute the numbers 0..size-1, each once",
     "还没看完所有帧就有重复：一个 epoch 之内要排列 0..size-1，每个数一次"),
    ("self.rows(dataset, index)", "self.rows(0 * dataset, index)",
     "the rows of the first dataset for all: give self.rows the dataset of each sample",
     "所有样本都用了第一个数据集的行号：要把每个样本的数据集交给 self.rows"),
    ("self.rows(dataset, index)", "index",
     "the frame's number within the split is not its row in the table: use self.rows(dataset, index)",
     "帧在这一划分里的序号不是它在表里的行号：请用 self.rows(dataset, index)"),
    ("interleave(self.shares, first, count)", "interleave(self.shares, 0, count)",
     "it always begins at sample 0: resuming at sample `first` would repeat the data",
     "总是从第 0 个样本开始：从第 `first` 个样本恢复训练时，数据会重复"),
    ("interleave(self.shares, first, count)", "interleave(self.shares, first + 1, count)",
     "off by one sample: the first one is number `first`",
     "差一个样本：第一个样本的编号就是 `first`"),
]
