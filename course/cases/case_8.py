"""Exercise 8: how much better an episode was than its group (see check.py)."""

from types import SimpleNamespace

import numpy as np

from examples.rl import rl

OWNER, NAME = rl, "with_advantages"


def decisions(successes: list, executed: list | None = None, method: str = "grpo") -> list[dict]:
    """Of a group: chunks of 5 steps with 2 numbers each, of which 4 steps are executed."""
    episodes = []
    for number, success in enumerate(successes):
        count = executed[number] if executed else 6
        chunks = [{"old": np.zeros(10), "place": 10 * number + i} for i in range(-(-count // 4))]
        episodes.append({"success": success, "executed": count, "decisions": chunks})
    with np.errstate(invalid="ignore"):  # 0 / 0 in one of the mistakes
        return rl.with_advantages(episodes, SimpleNamespace(execute=4, method=method), 2)


def of(key: str, *arguments):
    """A probe: this key of each decision."""
    return lambda: np.array([one[key] for one in decisions(*arguments)])


THREE, LENGTHS = [True] * 3 + [False] * 5, [8, 5, 3, 6, 8, 8, 1, 4]


def probes() -> list:
    return [("advantages if 3 of 8 succeed", "8 个里成功 3 个时的优势", of("advantage", THREE)),
            ("advantages if 7 of 8 succeed", "8 个里成功 7 个时的优势", of("advantage", [True] * 7 + [False])),
            ("weights", "权重", of("weight", THREE)),
            ("weights of episodes of different lengths", "长短不一的回合的权重", of("weight", THREE, LENGTHS)),
            ("weights if all succeed", "全部成功时的权重", of("weight", [True] * 4)),
            ("advantages if all fail", "全部失败时的优势", of("advantage", [False] * 4)),
            ("which decisions", "哪些决定", of("place", THREE, LENGTHS)),
            ("advantages of the cloning method", "cloning 方法的优势", of("advantage", THREE, None, "cloning"))]


BETTER = "(rewards - rewards.mean()) / (rewards.std() + 1e-6)"
STEPS = 'min(args.execute, episode["executed"] - number * args.execute)'
MISTAKES = [
    (BETTER, "rewards / (rewards.std() + 1e-6)",
     "the group's mean is not subtracted: a failure then has advantage 0 and teaches nothing",
     "没有减去组内平均：失败的优势就成了 0，什么也教不了"),
    (BETTER, "rewards",
     "the reward itself is not an advantage: subtract the group's mean, divide by its standard deviation",
     "奖励本身不是优势：要减去组内平均，再除以标准差"),
    (BETTER, "rewards - rewards.mean()",
     "not divided by the group's standard deviation: a rare success should count for more",
     "没有除以组内标准差：难得的成功应该算得更重"),
    (BETTER, "(rewards.mean() - rewards) / (rewards.std() + 1e-6)",
     "the sign is reversed: what is better than its group has a positive advantage",
     "符号反了：比同组好的，优势应为正"),
    (BETTER, "(rewards - rewards.mean()) / (rewards.var() + 1e-6)",
     "divided by the variance instead of the standard deviation (its square root)",
     "除的是方差，而不是标准差（方差的平方根）"),
    (BETTER, "(rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)",
     "the deviation is that of a sample (n - 1): the group is all there is, so divide by n (NumPy's std)",
     "用了样本标准差 (n - 1)：这里只看这一组，应除以 n（NumPy 的 std）"),
    (" + 1e-6", "",
     "0 / 0 is NaN if all episodes succeed or all fail: add 1e-6 to the standard deviation",
     "全成功或全失败时是 0 / 0，得到 NaN：标准差要加上 1e-6"),
    ("np.arange(len(decision[\"old\"])) < steps * action_dim", "np.ones(len(decision[\"old\"]))",
     "the weights are forgotten: what was not executed caused nothing, and must have weight 0",
     "忘了权重：没有执行的动作什么也没造成，权重必须是 0"),
    ("steps * action_dim", "steps",
     "steps are not tokens: each of them has action_dim tokens",
     "一步不是一个词元：每步有 action_dim 个词元"),
    (STEPS, "args.execute",
     "the end of the episode is ignored: its last chunk was executed only in part",
     "没有管回合的结尾：最后一个动作块只执行了一部分"),
    (STEPS, 'min(args.execute, episode["executed"])',
     "each chunk is counted from the episode's start: number * args.execute steps were executed before it",
     "每个动作块都从回合开头数起了：在它之前已经执行了 number * args.execute 步"),
    (STEPS, '(episode["executed"] - number * args.execute)',
     "the tail of a chunk is counted: only its first args.execute steps are executed",
     "把动作块的尾部也算进去了：只执行前 args.execute 步"),
    (" * bool(advantage)", "",
     "an episode with advantage 0 has weights: its tokens would be counted, and make the others' share smaller",
     "优势为 0 的回合还有权重：它的词元会被计数，别的词元分到的就少了"),
    ('rewards if args.method == "cloning" else better', "better",
     "args.method is ignored: for cloning, the advantage is the reward itself",
     "没有管 args.method：cloning 的优势就是奖励本身"),
]
