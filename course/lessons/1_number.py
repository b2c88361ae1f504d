# %% en
# # 1. A number becomes a word
#
# A language model can only do one thing: choose the next word from a list. A robot needs numbers: move 7 mm to
# the left, close the gripper. **How can a model that only chooses words move an arm?**
#
# The answer is one page of code, `action_tokenizer.py`. You need no GPU, and this notebook takes less than a minute.
# %% zh
# # 1. 一个数变成一个词
#
# 语言模型只会做一件事：从词表里选下一个词。机器人要的却是数：向左 7 毫米，合上夹爪。**只会选词的模型，怎么让机械臂动起来？**
#
# 答案只有一页代码：`action_tokenizer.py`。不需要 GPU，本页一分钟以内跑完。
# %% en
# ## 256 bins
#
# The range from -1 to 1 is cut into bins, and each bin gets one id at the end of the vocabulary. Llama's vocabulary
# has 32,000 ids, and OpenVLA gives up the last 256, its rarest words, for the bins. An action of four numbers is four such
# words. These are the lines that do it (`np.digitize` counts how many edges are at or below a number):
# %% zh
# ## 256 个区间
#
# 把 -1 到 1 切成若干区间，每个区间对应词表末尾的一个 id。Llama 的词表有 32,000 个 id，OpenVLA 把最后 256 个（最少用的词）让给了动作。一个动作有四个数，就是四个这样的词。起作用的是下面几行（`np.digitize` 数有几条边界小于或等于这个数）：
# %%
from action_tokenizer import ActionTokenizer

show(ActionTokenizer.encode, "bin_numbers =", "return")
print()
show(ActionTokenizer.__init__, "self.bins")
# %% en
# **Predict before you run the next cell.** Which id does -1.0 get, the first or the last of the vocabulary? Do
# 0.300, 0.301, and 0.303 get the same id? And what happens to 1.7, which is outside the range?
# %% zh
# **运行下一格之前先猜一猜。** -1.0 得到的是词表的第一个 id 还是最后一个？0.300、0.301、0.303 的 id 相同吗？超出范围的 1.7 会怎样？
# %%
import numpy as np

tokenizer = ActionTokenizer(32000)
for number in (-1.0, 0.0, 0.300, 0.301, 0.303, 0.998, 1.0, 1.7):
    token = int(tokenizer.encode(np.array(number)))
    print(f"{number:6.3f} -> id {token} -> {float(tokenizer.decode(np.array(token))):7.4f}")
# %% en
# **What you saw.** -1.0 got the last id, 31999, and ids count *down* from there. 0.300 and 0.301 got the same
# id, 31834: to the model they are one word, and both come back as 0.2980. 0.303 is the next word, 31833. 1.7 was clipped to 1.0. And 0.998 and
# 1.0 got two ids, 31745 and 31744, that decode to the same number, 0.9961: 256 edges enclose only 255 intervals. That is a
# quirk of OpenVLA, kept because its checkpoints were trained with it.
# %% zh
# **看到了什么。** -1.0 得到最后一个 id，31999，id 从那里*往下*数。0.300 和 0.301 得到同一个 id，31834：对模型来说它们是同一个词，解码回来都是 0.2980；0.303 已经是下一个词，31833。1.7 被截断成 1.0。0.998 和 1.0 的 id 不同（31745 和 31744），解码却是同一个数 0.9961：256 条边界只围出 255 个区间。这是 OpenVLA 的一处小毛病；它的检查点就是这样训练的，所以保留。
# %% en
# ## How much is lost?
#
# **Predict:** the bins are about 2/255 wide. What is the largest error that encoding and decoding can make? The cell
# measures it on real actions: 2,958 frames of the demo's robot, with four numbers each (the hand's movement in x, y, and z,
# and the gripper). `normalize` brings them to -1..1, as the next section shows. And what would 8 bins cost, or 2048?
# %% zh
# ## 损失了多少精度？
#
# **猜一猜：** 每个区间宽约 2/255，编码再解码，误差最大是多少？下一格用真实的动作来量：演示机器人的 2,958 帧，每帧四个数（手在 x、y、z 方向的移动，加上夹爪）。`normalize` 把它们换算到 -1..1，下一节就讲。如果只用 8 个区间呢？2048 个呢？
# %%
from action_tokenizer import normalize
from data import open_tables
from machinery.config import load_config

((_, _, _, table),) = open_tables(load_config("configs/demo.yaml"))
actions = normalize(table.frames["action"], table.statistics["action"], "bounds_q99")
print(f"frames {len(actions):,}, numbers in each {actions.shape[1]}")
for bins in (8, 32, 256, 2048):
    some = ActionTokenizer(32000, bins)
    ids = some.encode(actions)
    error = np.abs(some.decode(ids) - actions).max()
    print(f"{bins:5d} bins: largest error {error:.4f}, frames per bin {len(actions) / bins:.1f}")
# %% en
# **What you saw.** With 256 bins the largest error is 0.0039, half a bin. On an arm that moves at most 2 cm per step, that
# is less than a tenth of a millimeter. More bins would be finer, but each would be seen less often: 11.6 frames per bin
# with 256, and 1.4 with 2048. A word that the model has seen once is hard to learn.
# %% zh
# **看到了什么。** 用 256 个区间，最大误差是 0.0039，即半个区间。如果机械臂每步最多移动 2 厘米，这还不到十分之一毫米。区间再多会更细，但每个区间的样本更少：256 个时平均 11.6 帧，2048 个时只有 1.4 帧。只见过一次的词很难学会。
# %% en
# ## Which numbers should be -1 and 1?
#
# Robots count in meters and radians, so numbers are first scaled. The obvious choice maps the smallest and the largest
# recorded number to -1 and 1. **Predict:** one of 2,958 frames is broken: it has the number 100 instead of something
# below 1. How many of the 256 ids are still used?
# %% zh
# ## 哪些数对应 -1 和 1？
#
# 机器人用米和弧度，所以要先缩放。最容易想到的办法是把记录里的最小值和最大值映射到 -1 和 1。**猜一猜：** 2,958 帧里有一帧坏了，本该小于 1 的数成了 100。256 个 id 还能用上几个？
# %%
show(normalize, "low, high", "normalized =")
print()
x = table.frames["action"][:, :1].copy()
x[0] = 100.0
statistics = {"min": x.min(0), "max": x.max(0),
              "q01": np.quantile(x, 0.01, 0), "q99": np.quantile(x, 0.99, 0)}
for kind in ("bounds", "bounds_q99"):
    ids = tokenizer.encode(normalize(x, statistics, kind))
    print(f"{kind}: {len(np.unique(ids))} of 256 ids are used")
# %% en
# **What you saw.** With the minimum and maximum, 7 ids are left: one broken frame has squeezed all movements into a few
# words. With percentiles 1 and 99 (`bounds_q99`), 218 are used. The cost: the numbers beyond them, 2% of all, are clipped.
# Two exceptions: a number whose `mask` is false, such as a gripper that is already in 0..1, is not scaled, and one that is
# the same in all frames becomes 0, because it has no range to divide by.
#
# ## Exercise 1
#
# Write `ActionTokenizer.encode` yourself. In the project's folder, run
#
# ```bash
# python course/check.py 1
# ```
#
# The first time it makes `course/my/exercise_1.py`, with the place for your code. Run it again to learn what is wrong.
#
# <details><summary>A hint</summary>
#
# Three lines: refuse what is not finite, clip, and count edges with `np.digitize(x, self.bins)`. -1.0 has one edge at or below
# it, and must get the id `self.vocab_size - 1`.
#
# </details>
#
# {answer}
#
# Next: [2. The picture between the words](2_picture.ipynb)
# %% zh
# **看到了什么。** 用最小值和最大值，只剩 7 个 id：一帧坏数据把所有动作挤进了几个词里。用第 1 和第 99 百分位 (`bounds_q99`)，能用上 218 个。代价是超出这两个百分位的数（共 2%）会被截断。有两个例外：`mask` 为 false 的那一维不缩放，比如本来就在 0..1 的夹爪；所有帧都相同的那一维变成 0，因为它的范围是零，没法做除数。
#
# ## 练习 1
#
# 自己写出 `ActionTokenizer.encode`。在项目文件夹里运行
#
# ```bash
# python course/check.py 1 --zh
# ```
#
# 第一次运行会生成 `course/my/exercise_1.py`，代码写在里面；再运行一次，就知道哪里不对。
#
# <details><summary>提示</summary>
#
# 三行就够：拒绝非有限的数，截断，用 `np.digitize(x, self.bins)` 数边界。-1.0 处恰好数到一条边界，它的 id 必须是 `self.vocab_size - 1`。
#
# </details>
#
# {answer}
#
# 下一课：[2. 图像放在词之间](2_picture.ipynb)
