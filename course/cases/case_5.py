"""Exercise 5: micro-batches per step (see check.py)."""

import train_vla
from machinery.config import load_config

OWNER, NAME = train_vla, "accumulation_steps"


def steps(global_batch: int, micro_batch: int, ranks: int, expected: str = "null") -> int:
    """The function for a configuration."""
    cfg = load_config("configs/demo.yaml", [f"global_batch_size={global_batch}", f"expected_world_size={expected}",
                                            f"per_device_batch_size={micro_batch}"])
    return train_vla.accumulation_steps(cfg, ranks)


def probes() -> list:
    return [
        ("batch 64, 32 at a time, 1 GPU", "批 64，一次 32，1 块 GPU", lambda: steps(64, 32, 1)),
        ("batch 2048, 8 at a time, 16 GPUs", "批 2048，一次 8，16 块 GPU", lambda: steps(2048, 8, 16)),
        ("batch 64, 32 at a time, 2 GPUs", "批 64，一次 32，2 块 GPU", lambda: steps(64, 32, 2)),
        ("batch 64, 24 at a time, 2 GPUs", "批 64，一次 24，2 块 GPU", lambda: steps(64, 24, 2)),
        ("batch 64, 32 at a time, 4 GPUs", "批 64，一次 32，4 块 GPU", lambda: steps(64, 32, 4)),
        ("expected_world_size 8, but 2 GPUs", "expected_world_size 是 8，却有 2 块 GPU",
         lambda: steps(64, 8, 2, "8")),
        ("expected_world_size 2, but 4 GPUs", "expected_world_size 是 2，却有 4 块 GPU",
         lambda: steps(64, 8, 4, "2")),
    ]


def ranks_forgotten(got: dict) -> bool:
    return got["batch 2048, 8 at a time, 16 GPUs"] == 2048 // 8


def per_gpu(got: dict) -> bool:
    return got["batch 2048, 8 at a time, 16 GPUs"] == 2048 // 16


def rounded_down(got: dict) -> bool:
    return got["batch 64, 24 at a time, 2 GPUs"] == 1 and got["batch 64, 32 at a time, 4 GPUs"] == 0


def rounded_up(got: dict) -> bool:
    return got["batch 64, 24 at a time, 2 GPUs"] == 2 or got["batch 64, 32 at a time, 4 GPUs"] == 1


def fraction(got: dict) -> bool:
    return bool(abs(got["batch 64, 24 at a time, 2 GPUs"] - 64 / 48) < 1e-6)


MISTAKES = [
    (ranks_forgotten, "the ranks are forgotten: all GPUs work on the same global batch, so each does fewer micro-batches",
     "忘了 GPU 的数量：所有 GPU 分担同一个全局批，每块要做的小批更少"),
    (per_gpu, "per_device_batch_size is forgotten: a GPU computes that many samples at a time, not one",
     "忘了 per_device_batch_size：一块 GPU 一次算这么多样本，不是一个"),
    (rounded_down, "rounded down: the global batch would become smaller without a word; raise UserError if it does not divide",
     "向下取整了：全局批会不声不响地变小；除不尽要抛出 UserError"),
    (rounded_up, "rounded up: the global batch would become larger without a word; raise UserError if it does not divide",
     "向上取整了：全局批会不声不响地变大；除不尽要抛出 UserError"),
    (fraction, "a fraction of a micro-batch: raise UserError if the global batch does not divide, and use //",
     "出现了小数个小批：除不尽要抛出 UserError，并用 //"),
    ("cfg.expected_world_size not in (None, world_size)", "False",
     "expected_world_size is ignored: if it is set and differs from the number of ranks, raise UserError",
     "没有理会 expected_world_size：如果设置了它，而 GPU 数量不同，要抛出 UserError"),
    ("cfg.expected_world_size not in (None, world_size)", "cfg.expected_world_size != world_size",
     "None is refused: expected_world_size may be left open, and then any number of ranks is right",
     "把 None 也拒绝了：expected_world_size 可以不设，那时多少块 GPU 都可以"),
]
