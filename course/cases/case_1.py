"""Exercise 1: a number becomes a token id (see check.py)."""

import numpy as np

import action_tokenizer
from action_tokenizer import ActionTokenizer, normalize
from data import open_tables
from machinery.config import load_config

OWNER, NAME = action_tokenizer.ActionTokenizer, "encode"
LLAMA = ActionTokenizer(32000)


def demo_actions() -> np.ndarray:
    """The normalized actions of the demo's 2,958 frames."""
    cfg = load_config("configs/demo.yaml")
    ((_, _, _, table),) = open_tables(cfg)
    return normalize(table.frames["action"], table.statistics["action"], "bounds_q99")


def probes() -> list:
    return [
        ("the numbers -0.5, 0.1, 0.3", "数 -0.5, 0.1, 0.3", lambda: LLAMA.encode(np.array([-0.5, 0.1, 0.3]))),
        ("the demo's actions", "演示数据的动作", lambda: LLAMA.encode(demo_actions())),
        ("the numbers -3 and 1.7", "数 -3 和 1.7", lambda: LLAMA.encode(np.array([-3.0, 1.7]))),
        ("32 bins", "32 个区间", lambda: ActionTokenizer(1000, 32).encode(np.array([[-0.9, 0.2]]))),
        ("not a number", "NaN", lambda: LLAMA.encode(np.array([np.nan, 0.0]))),
        ("infinity", "无穷大", lambda: LLAMA.encode(np.array([0.0, np.inf]))),
    ]


MISTAKES = [
    ("vocab_size - bin_numbers", "vocab_size - bin_numbers + 1",
     "off by one bin: every id is too large by 1; bins count from 1, and -1.0 must get the last id, vocab_size - 1",
     "差一个区间：每个 id 都大了 1；区间从 1 数起，-1.0 应该得到最后一个 id，即 vocab_size - 1"),
    ("vocab_size - bin_numbers", "vocab_size - bin_numbers - 1",
     "off by one bin: every id is too small by 1; np.digitize already counts from 1",
     "差一个区间：每个 id 都小了 1；np.digitize 本来就从 1 数起"),
    ("self.vocab_size - bin_numbers", "self.first_id + bin_numbers - 1",
     "the order is reversed: larger numbers get smaller ids (count down from vocab_size)",
     "顺序反了：数越大，id 越小（从 vocab_size 往下数）"),
    ("self.vocab_size - bin_numbers", "self.first_id + bin_numbers",
     "the order is reversed: larger numbers get smaller ids (count down from vocab_size)",
     "顺序反了：数越大，id 越小（从 vocab_size 往下数）"),
    ("np.clip(actions, -1.0, 1.0)", "actions",
     "not clipped: a number outside [-1, 1] gets an id that is no action's; clip first",
     "没有截断：[-1, 1] 以外的数得到的 id 不是动作的 id；先截断"),
    ("self.bins)", "np.linspace(-1.0, 1.0, 256))",
     "256 bins whatever n_bins is: use the edges in self.bins",
     "不管 n_bins 是多少，总用 256 个区间：请用 self.bins 里的边界"),
    ("np.digitize(np.clip(actions, -1.0, 1.0), self.bins)",
     "np.rint((np.clip(actions, -1.0, 1.0) + 1) / 2 * (self.n_bins - 1)).astype(int) + 1",
     "rounded to the nearest edge: count how many edges are <= the number (np.digitize), do not round",
     "舍入到了最近的边界：应该数有多少条边界 <= 这个数 (np.digitize)，不要舍入"),
    ("np.digitize(np.clip(actions, -1.0, 1.0), self.bins)",
     "np.clip((np.clip(actions, -1.0, 1.0) + 1) / 2 * self.n_bins, 0, self.n_bins - 1).astype(int) + 1",
     "n_bins intervals of equal width: self.bins has n_bins edges, which enclose one interval fewer (np.digitize)",
     "分成了 n_bins 个等宽区间：self.bins 是 n_bins 条边界，只围出 n_bins - 1 个区间 (np.digitize)"),
    ("self.bins)", "self.bins, right=True)",
     "-1.0 gets no bin: an edge counts if it is <= the number, so without right=True",
     "-1.0 没有得到区间：边界 <= 这个数就要算上，所以不要用 right=True"),
    (lambda got: got["first"] == "infinity" and "infinity" in got,
     "NaN is refused, but infinity gets an id: np.isfinite is false for both",
     "拒绝了 NaN，可是无穷大还是得到了 id：np.isfinite 对两者都返回 False"),
    (lambda got: got["first"] == "not a number" and "not a number" in got,
     "NaN gets an id, and becomes a command at full speed: raise UserError if a number is not finite",
     "NaN 也得到了 id，会变成一条全速的指令：遇到非有限的数要抛出 UserError"),
]
