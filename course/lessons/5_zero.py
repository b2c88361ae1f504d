# %% en
# # 5. ZeRO by editing a JSON
#
# OpenVLA's 7.5 billion weights take 15 GB to store, and yet a GPU of 80 GB cannot train them alone. **What takes all
# that memory, and how do eight GPUs share it?**
#
# Read `make_engine` in `train_vla.py`, and look into `ds_configs/`. Two processes on this computer take the place of two GPUs.
# %% zh
# # 5. 改一个 JSON 就换 ZeRO 的 stage
#
# OpenVLA 的 75 亿个权重存下来是 15 GB，一块 80 GB 的 GPU 却训练不了它。**内存都花在哪里？八块 GPU 怎样分担？**
#
# 请看 `train_vla.py` 的 `make_engine` 和文件夹 `ds_configs/`。这里用本机的两个进程代替两块 GPU。
# %%
import difflib
from pathlib import Path

two, three = (Path(f"ds_configs/zero{stage}.json").read_text().splitlines() for stage in (2, 3))
print("\n".join(difflib.unified_diff(two, three, "zero2.json", "zero3.json", lineterm="", n=0)))
# %% en
# That is the difference between ZeRO-2 and ZeRO-3: the stage, and a few settings of communication. No line of Python
# changes. What is divided is this. For each trained weight, bf16 training with AdamW stores
#
# - the weight itself, 2 bytes
# - its gradient, 2 bytes in bf16, or 4 where gradients are summed in float32
# - a float32 copy that the optimizer updates, and AdamW's two moments: 4 + 4 + 4 bytes
#
# Each stage divides one kind more among the GPUs: stage 0 none, stage 1 the optimizer's 12 bytes, stage 2 also the gradients,
# stage 3 also the weights. (In the code below, `half` means bf16; `on_host` is the share in the CPU's memory, here 0.)
#
# **Predict.** With 8 GPUs: how many bytes per weight does each GPU hold at stages 0, 1, 2, 3?
# %% zh
# ZeRO-2 和 ZeRO-3 的差别就这些：stage，以及几个通信的设置。Python 一行都不用改。被切分的是：用 bf16 和 AdamW 训练时，每个权重要存
#
# - 权重本身，2 字节
# - 它的梯度，bf16 是 2 字节；用 float32 累加的地方是 4 字节
# - 优化器更新的 float32 副本，和 AdamW 的两个矩：4 + 4 + 4 字节
#
# 每高一级，就多切分一样：stage 0 什么都不切，stage 1 切优化器的 12 字节，stage 2 再切梯度，stage 3 连权重也切。（下面代码里 `half` 指 bf16，`on_host` 是放在 CPU 内存里的比例，这里是 0。）
#
# **猜一猜。** 8 块 GPU，stage 0、1、2、3 时，每块 GPU 上每个权重占多少字节？
# %%
import torch

from action_tokenizer import load_tokenizer
from machinery.config import load_config, load_ds_config
from machinery.cost import memory_held
from model import VLA

show(memory_held, "gradients = 4", '"optimizer":')
cfg = load_config("configs/demo.yaml", ["action_dim=4"])
with torch.device("meta"):  # no memory: only shapes
    vla = VLA(cfg, load_tokenizer(cfg.tokenizer, cfg.add_action_tokens))
weights, _ = vla.count_parameters()
print("\nbytes per weight on each of 8 GPUs")
for stage in (0, 1, 2, 3):
    held = memory_held(vla, load_ds_config(f"ds_configs/zero{stage}.json"), 8, recompute=False)
    parts = {name: held[name] / weights for name in ("weights", "gradients", "optimizer")}
    total = sum(parts.values())
    print(f"stage {stage}:", *(f"{name} {size:.2f}" for name, size in parts.items()),
          f"together {total:.2f}, for 7.5 billion weights {total * 7.5:.0f} GB")
# %% en
# **What you saw.** Stage 0 holds 16.00 bytes per weight on every GPU: 120 GB for 7.5 billion, and that is why 80 GB are not
# enough. Stage 1 divides the optimizer's 12 bytes by 8. (Its gradients take more here: float32 sums, and bf16 ones beside them.)
# Stage 2 divides the gradients too, of which it keeps only the float32 sums: 4.00 bytes. Stage 3 also divides the weights, and
# 2.25 bytes are left. Activations come on top, and depend on the batch.
#
# ## The same numbers?
#
# **Predict.** Stage 3 keeps only slices of the weights on each GPU, and gathers each block when it is needed. Does the loss of
# the first steps change?
# %% zh
# **看到了什么。** stage 0 时每块 GPU 上每个权重占 16.00 字节：75 亿个权重就是 120 GB，所以 80 GB 不够。stage 1 把优化器的 12 字节除以 8。（这里它的梯度反而占得多：既有 float32 的累计值，又有 bf16 的。）stage 2 再把梯度切开，而且只留 float32 的累计值：4.00 字节。stage 3 连权重也切开，只剩 2.25 字节。激活值另算，取决于批的大小。
#
# ## 结果一样吗？
#
# **猜一猜。** stage 3 时每块 GPU 只存权重的切片，用到哪个块再收集哪个块。前几步的损失会变吗？
# %%
import re
import subprocess


def losses(json_file, processes):
    """Train three steps with this JSON and number of processes -> the lines with losses."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes),
               "train_vla.py", "--config", "configs/demo.yaml",
               "--deepspeed_config", f"ds_configs/{json_file}",
               "--set", f"run_id=course-{json_file}-{processes}", "max_steps=3",
               "global_batch_size=16", "per_device_batch_size=8",
               "eval_samples=16", "keep_checkpoints=none", "log_interval=1", "num_workers=0"]
    log = subprocess.run(command, capture_output=True, text=True)
    assert log.returncode == 0, log.stderr[-2000:]
    return re.findall(r"^step \d loss [\d.]+", log.stdout, re.MULTILINE)


for json_file, processes in (("zero0.json", 2), ("zero3.json", 2), ("zero2.json", 1)):
    print(json_file, "processes", processes, losses(json_file, processes))
# %% en
# **What you saw.** The same losses, to three digits or nearly: only storage and communication change. (The digits not
# printed differ, because each stage sums bf16 numbers in another order.) The last line had *one* process, and the same losses
# too: the global batch of 16 was then computed as two micro-batches of 8.
#
# ## Exercise 5
#
# That is `accumulation_steps`: the global batch stays the same on any number of GPUs. Write it: `python course/check.py 5`
#
# <details><summary>A hint</summary>
#
# All GPUs together compute `per_device_batch_size * world_size` samples at a time. If the global batch is not a multiple of
# that, there is no right answer, only an error that names the key to change.
#
# </details>
#
# {answer}
#
# Next: [6. Acting](6_acting.ipynb)
# %% zh
# **看到了什么。** 损失的前三位小数相同，或几乎相同：变的只是存储和通信。（没打印的位数会不同，因为各 stage 对 bf16 求和的次序不同。）最后一行只有*一个*进程，损失也一样：全局批 16 被分成了两个 8 的小批。
#
# ## 练习 5
#
# 这就是 `accumulation_steps`：不管多少块 GPU，全局批不变。写出它：`python course/check.py 5 --zh`
#
# <details><summary>提示</summary>
#
# 所有 GPU 一次共算 `per_device_batch_size * world_size` 个样本。全局批如果不是它的整数倍，就没有正确答案，只能报错，并指出该改哪个键。
#
# </details>
#
# {answer}
#
# 下一课：[6. 执行动作](6_acting.ipynb)
