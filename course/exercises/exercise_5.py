"""Exercise 5. The global batch stays the same on any number of GPUs.   练习 5：GPU 再多，全局批不变。

Write the body of accumulation_steps (train_vla.py), then: python course/check.py 5
写出 accumulation_steps 的函数体 (train_vla.py)，然后运行上面的命令（加 --zh 用中文）。

cfg.global_batch_size        samples of an optimizer step   一步更新用的样本
cfg.per_device_batch_size    samples that a GPU computes at a time   一块 GPU 一次算的样本
cfg.expected_world_size      None, or the number of GPUs that there must be   None，或者必须有的 GPU 数量
world_size                   the number of GPUs   GPU 的数量
"""

from machinery.config import TrainConfig, UserError


def accumulation_steps(cfg: TrainConfig, world_size: int) -> int:
    """How many micro-batches each GPU computes for one optimizer step. Raises UserError if the global
    batch cannot be divided so, or if expected_world_size is another number.

    Hint: all GPUs together compute per_device_batch_size x world_size samples at a time.
    """
    raise NotImplementedError
