"""Exercise 6: from the model's numbers back to the robot's (see check.py)."""

import json

import numpy as np

import action_tokenizer
from data import open_tables
from machinery.config import load_config

OWNER, NAME = action_tokenizer, "unnormalize"
ARM = {"q01": [-0.5, 0.0, 1.0], "q99": [0.5, 3.0, 2.0], "min": [-2.0, -1.0, 0.0], "max": [2.0, 9.0, 3.0],
       "mean": [0.0, 1.0, 1.5], "std": [0.2, 0.5, 0.1]}
GRIPPER = {**ARM, "mask": [True, True, False]}
NUMBERS = np.array([[-1.0, 0.0, 1.0], [0.5, -0.5, 0.25]])


def demo() -> np.ndarray:
    """The demo's first actions, there and back."""
    ((_, _, _, table),) = open_tables(load_config("configs/demo.yaml"))
    stats = json.loads(json.dumps(table.statistics["action"], default=list))
    normalized = action_tokenizer.normalize(table.frames["action"][:64], stats, "bounds_q99")
    return action_tokenizer.unnormalize(normalized.astype(np.float64), stats, "bounds_q99")


def probes() -> list:
    def back(stats, kind):
        return lambda: action_tokenizer.unnormalize(NUMBERS.copy(), stats, kind)

    return [("bounds_q99", "bounds_q99", back(ARM, "bounds_q99")),
            ("bounds", "bounds", back(ARM, "bounds")),
            ("normal", "normal", back(ARM, "normal")),
            ("a gripper that the mask excludes", "掩码排除了夹爪", back(GRIPPER, "bounds_q99")),
            ("the same with normal", "同上，normal", back(GRIPPER, "normal")),
            ("the demo's actions", "演示数据的动作", demo)]


SCALED = "0.5 * (actions + 1) * (high - low) + low"
MISTAKES = [
    (SCALED, "(actions + 1) * (high - low) + low",
     "twice too far: -1..1 is 2 wide, so (actions + 1) must be halved",
     "大了一倍：-1..1 宽 2，所以 (actions + 1) 要减半"),
    (SCALED, "actions * (high - low) + low",
     "-1 becomes another number than q01: the model's numbers begin at -1, not at 0 (actions + 1)",
     "-1 没有变成 q01：模型的数从 -1 开始，不是从 0 开始 (actions + 1)"),
    (SCALED, "0.5 * (actions + 1) * (high - low)",
     "the lower bound is not added: -1 must become `low`, not 0",
     "没有加上下界：-1 应该变成 low，而不是 0"),
    ("BOUNDS[kind]", "('min', 'max')",
     "the minimum and maximum whatever `kind` is: bounds_q99 means q01 and q99 (BOUNDS[kind])",
     "不管 kind 是什么都用了最小值和最大值：bounds_q99 指 q01 和 q99 (BOUNDS[kind])"),
    ("BOUNDS[kind]", "('q01', 'q99')",
     "q01 and q99 whatever `kind` is: bounds means the minimum and maximum (BOUNDS[kind])",
     "不管 kind 是什么都用了 q01 和 q99：bounds 指最小值和最大值 (BOUNDS[kind])"),
    ("np.where(mask, scaled, actions)", "scaled",
     "the mask is forgotten: where it is false, such as a gripper in 0..1, the number passes unchanged",
     "忘了掩码：掩码为 false 的维（例如 0..1 的夹爪）要原样通过"),
    ("np.where(mask, scaled, actions)", "np.where(mask, actions, scaled)",
     "the mask is the wrong way round: true means that the number was scaled",
     "掩码用反了：true 表示这一维缩放过"),
    ('if kind == "normal"', "if False",
     "'normal' is forgotten: there, undo (x - mean) / std",
     "忘了 'normal'：这时要还原 (x - mean) / std"),
    ('actions * (np.array(stats["std"]) + 1e-8) + np.array(stats["mean"])',
     '(actions - np.array(stats["mean"])) / (np.array(stats["std"]) + 1e-8)',
     "normalized again instead of undone: multiply by std, then add the mean",
     "又归一化了一遍，而不是还原：应该乘以 std，再加上 mean"),
]
