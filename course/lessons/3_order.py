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
# 训练时，帧的顺序要随机。OpenVLA 有几百万帧，存在很大的文件里，只能从头顺序读，读进一个 256,000 帧的缓冲区，再从里面随机抽。这样的训练一旦中断，就没人说得清哪些帧看过、哪些没看过。**随机顺序能不能不存，直接算出来？**
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
# two numbers can become the same one. Such a *Feistel network* is how block ciphers are built. Two halves of b bits make 4^b
# numbers, usually more than there are frames: a result that is too large (`todo`) goes through again until it is small enough.
#
# **Predict.** How long does it take to find element number 26,999,999 of a random order of 27 million frames, without
# making the order? And does each number of a smaller order occur exactly once?
# %% zh
# 把一个数分成两半，用一半的哈希去改另一半，再交换，一共四轮。每一轮都可逆，所以不同的数绝不会变成同一个数。这叫 *Feistel 网络*，分组密码就是这样做的。两半各 b 位，一共 4^b 个数，通常比帧数多：结果太大 (`todo`) 就再过一遍，直到小于帧数。
#
# **猜一猜。** 有 2,700 万帧，不生成整个随机顺序，直接求第 26,999,999 个元素，要多久？再看一个短一些的顺序：是不是每个数恰好出现一次？
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
# **看到了什么。** 求一个元素几乎不花时间，也不用存任何东西。每帧平均移动 33,214 个位置，约为总长的三分之一，和真正的随机顺序一样。那缓冲区打得散不散？下一格拿 100,000 帧的文件，模拟一个 1,000 帧的缓冲区。
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
# A run draws sample after sample. Whose turn it is among several datasets is arithmetic too (`interleave`), and `self.rows`
# finds a training frame's row in the table of all frames. All of it is four lines:
# %% zh
# **看到了什么。** 缓冲区的第一批全部出自前 1,029 帧，也就是某个下午录的几个回合；每帧平均只移动了 732 个位置。用置换，第一批来自整个文件 (99,640)。
#
# ## 第 k 批是 (seed, k) 的函数
#
# 训练按编号一个一个地抽样本。数据集不止一个时，轮到哪个也是算出来的 (`interleave`)。`self.rows` 把训练集里的第几帧换成帧表里的行号。全部代码就四行：
# %%
from data import Mixture, TrainBatches, interleave, open_tables
from machinery.config import load_config

show(Mixture.draw, "dataset, visit")
print()
print("shares 3/4 and 1/4:", *interleave(np.array([0.75, 0.25]), 0, 12)[0])
# %% en
# **Predict.** A run on one GPU was stopped after step 1,000 and goes on with two GPUs. Do they see the frames that the one
# GPU would have seen? (A step has 64 samples, and a GPU computes 32 at a time, a *micro-batch*: one GPU needs two of them for
# a step, two GPUs one each.)
# %% zh
# **猜一猜。** 训练在一块 GPU 上跑到第 1,000 步停了，换两块 GPU 接着跑。它们看到的帧，和原来那块 GPU 本该看到的一样吗？（一步 64 个样本，一块 GPU 一次算 32 个，叫一个*小批*：一块 GPU 一步要算两个小批，两块 GPU 各算一个。）
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
# 2480 samples, each of the 2480 frames was seen once. (The demo's other 478 frames are held out: training never sees them.)
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
# **看到了什么。** 还是那 64 行，而且什么都不用记：恢复训练，就是从 k 接着往下数。一个 epoch 有 2480 个样本，2480 帧每帧恰好看一次。（演示数据另外 478 帧是留出的，训练从不看。）
#
# ## 练习 3
#
# 写出 `Mixture.draw`：`python course/check.py 3 --zh`。密钥要由三个量组成。是哪三个？想想下一个 epoch，再想想第二个数据集。
#
# <details><summary>提示</summary>
#
# `interleave` 告诉你每个样本出自哪个数据集，以及它的 *visit*：在它之前，这个数据集已经抽过多少个样本。visit 等于 `epoch * size + index`。用密钥 `mix_bits(seed, dataset, epoch)` 对 index 做置换。
#
# </details>
#
# {answer}
#
# 下一课：[4. 亲手做一步训练](4_step.ipynb)
