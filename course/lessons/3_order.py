# %% en
# # 3. Which frame comes when
#
# Training must see frames in a random order. OpenVLA has millions of them in long files, reads each file from the front,
# and picks at random from a buffer of 256,000 frames. When such a run stops, nobody knows which frames it has seen.
# **Can a random order be computed, instead of being stored?**
#
# Read `data.py` beside this notebook: `permute`, `interleave`, and `Mixture.draw`.
# %% zh
# # 3. 什么时候轮到哪一帧
#
# 训练要按随机的顺序看帧。OpenVLA 有几百万帧，存在很长的文件里；它从头往后读，再从一个 256,000 帧的缓冲区里随机抽。这样的训练一旦中断，就没人知道它看过哪些帧。**随机顺序能不能算出来，而不是存下来？**
#
# 请对照 `data.py` 阅读：`permute`，`interleave`，`Mixture.draw`。
# %%
import numpy as np

from data import permute

show(permute, "for r in range(4)", "todo = todo[out")
print()
for key in (7, 8):
    print("key", key, "order", *permute(np.arange(10), 10, key))
# %% en
# Two halves of a number take turns: one half is changed by a hash of the other, four times. Each turn can be undone, so no
# two numbers can become the same one. Such a *Feistel network* is how block ciphers are built.
#
# **Predict.** How long does it take to find element number 26,999,999 of a random order of 27 million frames, without
# making the order? And does each number of a smaller order occur exactly once?
# %% zh
# 一个数分成两半，轮流来：用一半的哈希去改另一半，共四轮。每一轮都能逆转，所以两个不同的数不会变成同一个数。这叫 *Feistel 网络*，分组密码就是这样造的。
#
# **猜一猜。** 有 2,700 万帧，不生成整个随机顺序，直接找其中第 26,999,999 个元素，要多久？再看一个小一些的顺序：每个数是不是恰好出现一次？
# %%
import time

start = time.perf_counter()
print("element 26,999,999 is frame", *permute(np.array([26_999_999]), 27_000_000, 7))
print("found in less than a tenth of a second:", time.perf_counter() - start < 0.1)
order = permute(np.arange(100_000), 100_000, 7)
print("each of 100,000 numbers exactly once:", len(np.unique(order)) == 100_000)
print("moved on average by", f"{np.abs(order - np.arange(100_000)).mean():,.0f} places")
# %% en
# **What you saw.** One element takes no time, and nothing is stored. Frames moved by 33,214 places on average, about a third
# of the length, as in any random order. How well does a buffer mix? The next cell imitates one of 1,000 frames on a file
# of 100,000.
# %% zh
# **看到了什么。** 找一个元素不费时间，也不用存任何东西。平均每帧移动了 33,214 个位置，约为总长的三分之一，和真正的随机顺序一样。缓冲区混得怎么样？下一格在 100,000 帧的文件上模拟一个 1,000 帧的缓冲区。
# %%
rng = np.random.default_rng(0)
buffer = list(range(1000))
drawn = []
for frame in range(1000, 100_000):  # take one out at random, put the next one of the file in
    place = rng.integers(1000)
    drawn.append(buffer[place])
    buffer[place] = frame
drawn = np.array(drawn)
print("buffer:  the first 64 frames are among the first",
      f"{drawn[:64].max() + 1:,}", "of the file")
print("permute: the first 64 frames are among the first",
      f"{order[:64].max() + 1:,}", "of the file")
print("buffer moved on average by", f"{np.abs(drawn - np.arange(len(drawn))).mean():,.0f} places")
# %% en
# **What you saw.** The buffer's first batch comes from the first 1,029 frames, a few episodes of one afternoon, and its
# frames moved by 732 places. The permutation's first batch comes from the whole file (99,640).
#
# ## Batch k is a function of (seed, k)
#
# A run draws sample after sample. Whose turn it is among several datasets is arithmetic too (`interleave`). All of it is
# four lines:
# %% zh
# **看到了什么。** 缓冲区的第一批只来自前 1,029 帧，也就是某个下午的几个回合；它的帧平均移动了 732 个位置。置换的第一批来自整个文件 (99,640)。
#
# ## 第 k 批是 (seed, k) 的函数
#
# 训练一个样本接一个样本地抽。有几个数据集时，轮到谁也是算出来的 (`interleave`)。全部就是四行：
# %%
from data import Mixture, TrainBatches, interleave, open_tables
from machinery.config import load_config

show(Mixture.draw, "dataset, visit")
print()
print("shares 3/4 and 1/4:", *interleave(np.array([0.75, 0.25]), 0, 12)[0])
# %% en
# **Predict.** A run on one GPU was stopped after step 1,000 and goes on with two GPUs. Do they see the frames that the one
# GPU would have seen?
# %% zh
# **猜一猜。** 一块 GPU 上的训练在第 1,000 步后停下，换成两块 GPU 继续。它们看到的帧，和那一块 GPU 本来会看到的一样吗？
# %%
cfg = load_config("configs/demo.yaml")
mixture = Mixture(cfg, open_tables(cfg))
one = TrainBatches(mixture, 64, 32, rank=0, world_size=1)  # global batch 64, 32 at a time
two = [TrainBatches(mixture, 64, 32, rank, world_size=2) for rank in (0, 1)]
step = 1000
on_one = [int(row) for micro in (0, 1) for _, _, row, _ in one.draw(2 * step + micro)]
on_two = [int(row) for rank in two for _, _, row, _ in rank.draw(step)]
print("first rows of step 1,000 on one GPU:", *on_one[:5])
print("the same 64 rows on two GPUs:", on_one == on_two)
seen = mixture.draw(0, 2480)[1]
print("one epoch is", len(seen), "samples; frames seen:", len(np.unique(seen)))
# %% en
# **What you saw.** The same 64 rows, and nobody had to remember anything: to resume is to count on from k. In an epoch of
# 2480 samples, each of the 2480 frames was seen once.
#
# ## Exercise 3
#
# Write `Mixture.draw`: `python course/check.py 3`. The key must hold three things: find out which by thinking about the
# next epoch, and about the second dataset.
#
# <details><summary>A hint</summary>
#
# `interleave` gives for each sample its dataset and its *visit*, the number of samples of that dataset before it. A visit
# is `epoch * size + index`. Permute the index with the key `mix_bits(seed, dataset, epoch)`.
#
# </details>
#
# {answer}
#
# Next: [4. One training step by hand](4_step.ipynb)
# %% zh
# **看到了什么。** 同样的 64 行，而且谁也不用记住什么：恢复训练就是从 k 接着数。一个 epoch 有 2480 个样本，2480 帧每帧恰好看了一次。
#
# ## 练习 3
#
# 写出 `Mixture.draw`：`python course/check.py 3 --zh`。密钥里必须有三样东西：想想下一个 epoch，再想想第二个数据集，就知道是哪三样。
#
# <details><summary>提示</summary>
#
# `interleave` 给出每个样本属于哪个数据集，以及它的 *visit*，即此前抽过这个数据集多少次。visit 等于 `epoch * size + index`。用密钥 `mix_bits(seed, dataset, epoch)` 对 index 做置换。
#
# </details>
#
# {answer}
#
# 下一课：[4. 亲手做一步训练](4_step.ipynb)
