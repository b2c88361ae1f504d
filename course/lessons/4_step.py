# %% en
# # 4. One training step by hand
#
# `deepspeed train_vla.py ...` trains. **What exactly happens in one step?** Here you take one step yourself, with
# nothing but PyTorch, and then read the project's loop line by line.
#
# Read `VLA.forward` in `model.py`, and `train` in `train_vla.py`.
# %% zh
# # 4. 亲手做一步训练
#
# 很多人学 OpenVLA，是从读 `vla-scripts/train.py` 开始做笔记的：配置、日志、随机种子、加载模型、冻结、数据集、训练策略，一行一行都看懂了，直到最后一行 `train_strategy.run_vla_training(...)`。文件到此为止，真正的训练循环在别处，笔记也就断在这里。本课从这里接着写。
#
# **一步训练里究竟发生了什么？** 先只用 PyTorch 亲手做一步，再逐行读本项目的循环，旁边放上 OpenVLA 的对应部分。
#
# 请对照 `model.py` 的 `VLA.forward` 和 `train_vla.py` 的 `train`。
# %%
import math

import torch

from action_tokenizer import load_tokenizer
from data import Mixture, collate, open_tables
from machinery.config import load_config
from model import VLA

cfg = load_config("configs/demo.yaml", ["action_dim=4"])
tokenizer = load_tokenizer(cfg.tokenizer, cfg.add_action_tokens)
mixture = Mixture(cfg, open_tables(cfg), tokenizer)


def make_batch(first, count):
    """Samples `first` and following of the run, as one batch."""
    dataset, rows, _ = mixture.draw(first, count)
    samples = [mixture.sample(d, row) for d, row in zip(dataset, rows, strict=True)]
    return collate(samples, tokenizer.pad_token_id)


batch = make_batch(0, 16)
for key in ("images", "input_ids", "labels"):
    print(key, tuple(batch[key].shape))
print("labels of the first sample:", [int(label) for label in batch["labels"][0] if label != -100])
print("positions without a label: ", int((batch["labels"][0] == -100).sum()))
# %% en
# Sixteen samples, padded on the right to the longest. Of the 26 positions of the first one, 5 have labels: four numbers
# and `</s>`. The other 21 have -100.
#
# **Predict.** An untrained model knows nothing. If it gave each of the 769 words of this vocabulary (512 of text, 256 of
# actions, one for padding) the same probability, what would the loss be?
# %% zh
# 16 个样本，在右边补齐到最长的那个。第一个样本有 26 个位置，其中 5 个有标签：动作的四个数和 `</s>`；其余 21 个都是 -100。
#
# **猜一猜。** 没训练过的模型什么都不会。词表有 769 个词（512 个文本的，256 个动作的，1 个用来填充），如果每个词的概率都一样，损失是多少？
# %%
torch.manual_seed(7)
vla = VLA(cfg, tokenizer)
loss, predicted, true = vla(batch["images"], batch["input_ids"], batch["labels"])
print(f"loss {loss.item():.2f}, logarithm of {len(tokenizer)}: {math.log(len(tokenizer)):.2f}")
print("predicted", tuple(predicted.shape), "of the first sample", predicted[0].tolist())
print("true     ", tuple(true.shape), "of the first sample", true[0].tolist())
# %% en
# **What you saw.** 6.79, near the logarithm 6.65. This is the cheapest check there is: a random model whose first loss is
# far from it compares the wrong things. One predicted id, 825, is not even a word: the model's last layer has 832 outputs,
# because matrices multiply faster if their sides are multiples of 64. Training teaches it never to choose the other 63.
#
# These are the lines that compare the right things. `at_positions` picks the hidden vectors at the wanted positions;
# `parallel_decoding` is off here (lesson 6 says what it is):
# %% zh
# **看到了什么。** 6.79，和对数 6.65 差不多。这是成本最低的检查：权重随机的模型，第一个损失要是差得远，多半是拿错了东西在比。预测里有个 825，词表里根本没有：模型最后一层有 832 个输出，因为矩阵的边长是 64 的倍数时乘得快；训练会让模型再也不选多出来的那 63 个。
#
# 下面几行比的就是对的东西。`at_positions` 取出指定位置的隐向量；`parallel_decoding` 这里没有打开（第 6 课会讲）：
# %%
show(VLA.forward, "first = ", "loss = ")
# %% en
# The model predicts at each position the *next* token. The first number of the action is therefore predicted at the prompt's
# last token: `wanted - 1`.
#
# ## Backward
#
# `loss.backward()` computes for each weight how the loss would change with it. **Predict:** take one weight,
# raise it by 0.001, and compute the loss again. Does it change by the gradient times 0.001?
# %% zh
# 模型在每个位置预测*下一个*词元，所以动作的第一个数是在提示词的最后一个词元处预测的：`wanted - 1`。
#
# ## 反向传播
#
# `loss.backward()` 算出每个权重的梯度：这个权重变一点，损失会变多少。**猜一猜：** 取一个权重，加上 0.001，重新算损失。变化是不是梯度乘以 0.001？
# %%
loss.backward()
weight = vla.projector["projector"][4].bias  # the last layer before the language model
number = int(weight.grad.abs().argmax())
gradient = weight.grad[number].item()
with torch.no_grad():
    weight[number] += 0.001
    after = vla(batch["images"], batch["input_ids"], batch["labels"])[0]
    weight[number] -= 0.001
print(f"gradient x 0.001 = {gradient * 0.001:.5f}, "
      f"the loss changed by {after.item() - loss.item():.5f}")
# %% en
# **What you saw.** The same to the last printed digit or nearly so. Now all weights at once, each a little against its
# gradient: that is a step. **Predict:** after 30 steps on the *same* 16 samples, how small is the loss? And on 16 other
# samples?
# %% zh
# **看到了什么。** 直到最后一位，两者几乎完全一样。接下来让所有权重同时沿梯度的反方向走一小步，这就是一步训练。**猜一猜：** 在*这* 16 个样本上走 30 步，损失能降到多少？换成另外 16 个样本呢？
# %%
optimizer = torch.optim.AdamW(vla.parameters(), lr=1e-3)
other = make_batch(1000, 16)
for step in range(31):
    loss, predicted, true = vla(batch["images"], batch["input_ids"], batch["labels"])
    if step % 10 == 0:
        with torch.no_grad():
            others = vla(other["images"], other["input_ids"], other["labels"])[0]
        accuracy = (predicted == true).float().mean()
        print(f"step {step:2d} loss {loss.item():.2f} accuracy {accuracy:.2f}; "
              f"other samples: loss {others.item():.2f}")
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(vla.parameters(), cfg.max_grad_norm)
    optimizer.step()
# %% en
# **What you saw.** The loss on its own 16 samples falls much further than on the others: a model of a few million
# weights learns 16 samples by heart. That is why a real run sees new samples in each step.
#
# ## The project's loop
#
# Your loop had five lines: forward, clear, backward, clip the gradient (if it is too long), step. This is the one that trains
# on eight GPUs. There, each GPU (a *rank*) computes micro-batches, as in lesson 3, and numbers are stored in bf16, which has
# 2 bytes:
# %% zh
# **看到了什么。** 训练用的 16 个样本上，损失降得远比别的样本多：模型有几百万个权重，已经把这 16 个样本背下来了。所以真正的训练，每一步都要换新样本。
#
# ## 本项目的循环
#
# 你刚才的循环有五行：前向、清零、反向、裁剪过大的梯度、更新。下面这个循环能在八块 GPU 上训练：每块 GPU（一个 *rank*）算自己的小批（见第 3 课），数用 bf16 存，每个 2 字节：
# %%
import train_vla

show(train_vla.train, "for step in run.steps", "metrics.add")
print()
show(train_vla.train, "if save_now:", "run.log(done, evaluate")
# %% en
# Line by line, beside `run_vla_training` in OpenVLA's `prismatic/training/strategies/base_strategy.py`, where readers of
# its `train.py` lose the thread:
#
# | here | what it does | OpenVLA |
# |---|---|---|
# | `for step in run.steps(...)` | counts optimizer steps, beginning at the checkpoint's | loops over its DataLoader, which never ends; the step is counted in `metrics`, and after a restart the data begin anew |
# | `scheduled_learning_rate(cfg, step, ...)` | the rate is a function of the step, so nothing has to be saved | a scheduler object with its own count, moved on once a step |
# | `for _ in range(accumulation)` | several micro-batches for a step, if the GPUs are few | not possible: it asserts that accumulation is 1, so batch and GPUs must fit each other |
# | `batch = metrics.wait_for_batch(...)` | the next micro-batch, from workers that loaded it ahead; measures the wait | the DataLoader yields the next batch, from TensorFlow's pipeline |
# | `loss, predicted, true = engine(...)` | forward; the model compares at the action's positions only, and returns what it predicted | forward under `autocast`, which returns the logits of *every* position |
# | `engine.backward(loss)` | backward; DeepSpeed adds up gradients, and divides them among the GPUs as the JSON asks | `loss.backward()`; FSDP shards as the code asks |
# | `engine.step()` | after the last micro-batch: average, clip, AdamW, clear | three calls: clip the norm, `optimizer.step()`, `zero_grad()` |
# | `metrics.add(loss, predicted, true, ...)` | adds loss, accuracy, and L1 (the mean error of the numbers) to sums on the GPU; read only when a line is logged | finds the action's positions in the logits by the number of patches, moves ids to the CPU in each step, and averages per dataset on rank 0 |
# | `if save_now: run.save(...)` | weights, AdamW's moments, and the step: resuming is exact | weights, at an interval or at the last step; all ranks wait |
# | `if evaluate_now: evaluate(...)` | loss and accuracy on held-out frames | not in the loop |
# %% zh
# 逐行来看，旁边是 OpenVLA 的 `run_vla_training`，它在 `prismatic/training/strategies/base_strategy.py` 里：
#
# | 本项目 | 做什么 | OpenVLA 的做法 |
# |---|---|---|
# | `for step in run.steps(...)` | 数优化器走了几步，从检查点的那一步数起 | 对 DataLoader 循环，而它永远不会结束；步数记在 `metrics` 里，恢复训练时数据从头再来 |
# | `scheduled_learning_rate(cfg, step, ...)` | 学习率是步数的函数，什么都不用存 | 一个调度器对象，自己计数，每步推进一次 |
# | `for _ in range(accumulation)` | GPU 少的时候，一步由几个小批凑成 | 不支持：断言累加次数必须是 1，批大小和 GPU 数量只能互相迁就 |
# | `batch = metrics.wait_for_batch(...)` | 取下一个小批，后台进程已提前读好；顺便记下等了多久 | 从 DataLoader 取下一批，背后是 TensorFlow 的数据管线 |
# | `loss, predicted, true = engine(...)` | 前向；模型只在动作的位置上比较，并返回预测的 id | 在 `autocast` 下前向，返回*每个*位置的 logits |
# | `engine.backward(loss)` | 反向；DeepSpeed 累加梯度，再按 JSON 的要求分给各 GPU | `loss.backward()`；怎么切分由 FSDP 的代码决定 |
# | `engine.step()` | 最后一个小批之后：平均、裁剪、AdamW、清零 | 分三次调用：裁剪范数，`optimizer.step()`，`zero_grad()` |
# | `metrics.add(loss, predicted, true, ...)` | 把损失、准确率和 L1（动作数值的平均误差）加到 GPU 上的累计值里，写日志时才读 | 按图像块的个数在 logits 里找到动作的位置，每步都把 id 搬到 CPU，rank 0 还按数据集分别统计 |
# | `if save_now: run.save(...)` | 存权重、AdamW 的两个矩和步数：能精确恢复 | 每隔若干步和最后一步存权重，所有进程一起等 |
# | `if evaluate_now: evaluate(...)` | 在留出的帧上算损失和准确率 | 循环里没有 |
#
# 笔记到这里就接上了：`run_vla_training` 做的事，就是你上面亲手做的那五行，加上多块 GPU、日志和检查点。
# %% en
# ## Exercise 4
#
# Write `VLA.forward`, from the embedded sequence to the loss: `python course/check.py 4`. Shifting the labels by one is the
# most frequent mistake in training a language model. It fails silently: the loss still falls.
#
# <details><summary>A hint</summary>
#
# `first`, where the labels of each sample begin, is the `argmax` of `labels != IGNORE_INDEX`. The T + 1 labels are at
# `first + arange(T + 1)` in the text, and the patches move them back by `inputs.shape[1] - labels.shape[1]` in the sequence.
#
# </details>
#
# {answer}
#
# Next: [5. ZeRO by editing a JSON](5_zero.ipynb)
# %% zh
# ## 练习 4
#
# 写出 `VLA.forward`，从拼好的序列到损失：`python course/check.py 4 --zh`。标签错开一位，是训练语言模型时最常见的错误，而且很隐蔽：损失照样下降。
#
# <details><summary>提示</summary>
#
# 每个样本的标签从 `first` 开始，即 `labels != IGNORE_INDEX` 的 `argmax`。T + 1 个标签在文本的 `first + arange(T + 1)` 处；在序列里，图像块把它们往后推了 `inputs.shape[1] - labels.shape[1]` 位。
#
# </details>
#
# {answer}
#
# 下一课：[5. 改一个 JSON 就换 ZeRO 的 stage](5_zero.ipynb)
