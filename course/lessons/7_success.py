# %% en
# # 7. Why success is not accuracy
#
# The log of a training prints `accuracy`: how often the predicted bin is the recorded one. **Is a policy with more
# accuracy a better policy?**
#
# This lesson needs the arm of `examples/own_robot` (MuJoCo), and the policy of lesson 6. Read `examples/break/break.py`.
# %% zh
# # 7. 为什么成功不等于准确
#
# 训练日志里的 `accuracy` 是预测的区间等于记录的区间的比例。**准确率更高的策略就是更好的策略吗？**
#
# 本课用到 `examples/own_robot` 的机械臂 (MuJoCo) 和第 6 课的策略。请看 `examples/break/break.py`。
# %% en
# ## Two policies on paper
#
# **Predict.** One policy always answers the bin *beside* the right one. Another ignores the picture and always answers
# the most frequent bin. Which has the higher accuracy, and which the smaller error? (A chunk is one action here, hence the
# `[:, 0]`.)
# %% zh
# ## 纸上的两个策略
#
# **猜一猜。** 一个策略总是回答正确区间*旁边*的那个；另一个不看图像，总是回答最常见的区间。谁的准确率高？谁的误差小？（这里一个动作块只有一个动作，所以取 `[:, 0]`。）
# %%
import numpy as np

from action_tokenizer import ActionTokenizer
from data import Mixture, most_frequent_tokens, open_tables
from machinery.config import load_config

show(most_frequent_tokens, "actions = ")
cfg = load_config("configs/demo.yaml")
mixture = Mixture(cfg, open_tables(cfg), train=False)
mixture.action_tokenizer = tokenizer = ActionTokenizer(32000)
dataset = np.zeros(478, int)
rows = mixture.rows(dataset, np.arange(478))  # all held-out frames
true = tokenizer.encode(mixture.actions(0, rows)[:, 0])
beside = np.where(true > tokenizer.first_id, true - 1, true + 1)
frequent = np.broadcast_to(most_frequent_tokens(mixture, dataset, rows), true.shape)
print()
for name, answer in (("one bin beside", beside), ("most frequent ", frequent)):
    error = np.abs(tokenizer.decode(answer) - tokenizer.decode(true)).mean()
    print(f"{name}: accuracy {(answer == true).mean():.3f}, mean error {error:.3f}")
# %% en
# **What you saw.** The one that is never right (0.000) has an error of 0.005, and the one that is right in a third of the
# cases (0.336) has 0.574.
#
# ## The same on a robot
#
# Now let them act. The arm has three joints, and shall touch the disc that the instruction names. Its expert computes the
# right turn of each joint; we put it through 256 bins, as a policy would, and spoil it on purpose.
# %% zh
# **看到了什么。** 从来不对的那个 (0.000) 误差是 0.005；三次里对一次的那个 (0.336) 误差是 0.574。
#
# ## 放到机器人上
#
# 现在让它们动起来。机械臂有三个关节，要碰到指令所说颜色的圆片。专家程序算出每个关节该转多少；我们像策略那样让它经过 256 个区间，再故意弄坏。
# %%
sys.path.insert(0, "examples/own_robot")
from robot import SPEED, Arm

from examples.closed_loop import rate

show(Arm.expert)
SIZE = np.array([SPEED, SPEED, SPEED, 1])  # a joint turns at most SPEED; the gripper is 0 or 1


def to_tokens(arm, action):
    """The expert's action as four tokens: turns of three joints, and the gripper."""
    turn = action - np.append(arm.target[:3], 0)
    return tokenizer.encode(turn / SIZE)


def play(arm, seed, spoil, steps=40):
    """One episode in which `spoil` changes the expert's tokens -> (success, right tokens)."""
    arm.reset(seed)
    right = []
    for _ in range(steps):
        wanted = to_tokens(arm, arm.expert())
        tokens = spoil(wanted)
        right.append((tokens == wanted).mean())
        arm.move(np.append(arm.target[:3], 0) + tokenizer.decode(tokens) * SIZE)
        if arm.solved:
            break
    return arm.solved, np.mean(right)


MIDDLE = tokenizer.encode(np.array(0.0))  # "do not turn"
SPOILERS = {
    "the expert, in bins    ": lambda tokens: tokens,
    "every bin one beside   ": lambda tokens: np.where(
        tokens > tokenizer.first_id, tokens - 1, tokens + 1),
    "the elbow never turns  ": lambda tokens: np.array([tokens[0], MIDDLE, *tokens[2:]]),
}
# %% en
# **Predict** for each of the three: the token accuracy, and how many of 40 episodes succeed.
# %% zh
# **猜一猜：** 三个策略的词元准确率各是多少？40 个回合各成功几个？
# %%
arm = Arm()
for name, spoil in SPOILERS.items():
    episodes = [play(arm, seed, spoil) for seed in range(200_000, 200_040)]
    counted = rate([success for success, _ in episodes])
    low, high = counted["interval"]
    print(f"{name} accuracy {np.mean([right for _, right in episodes]):.2f}, "
          f"success {counted['successes']} of 40 ({low:.0%} to {high:.0%})")
# %% en
# **What you saw.** The policy that was never right (0.00) succeeded in 40 of 40, as the expert did. The one whose tokens were
# right three times in four (0.75) failed in all 40, because the one that was wrong, the elbow's, was the one that mattered. The percentages are the 95%
# interval, within which the true rate of success probably lies:
# with 40 episodes, do not believe in small differences.
#
# ## Broken on purpose
#
# A real policy goes wrong at its inputs and outputs. `break.py` gives the trained policy one wrong input at a time, in 160
# held-out frames. `error` is the mean distance from the recorded action, `size` the mean size of a movement. **Predict:** which
# of the seven rows below the first can you tell from it by their accuracy?
# %% zh
# **看到了什么。** 从来没对过的策略 (0.00) 和专家一样，40 次全部成功；四个词元对三个的策略 (0.75) 40 次全部失败，因为错的那个数正好要紧。百分比是 95% 区间，真正的成功率大概就在里面：只有 40 个回合时，别相信小的差别。
#
# ## 故意弄坏
#
# 真实的策略会在输入和输出上出错。`break.py` 在 160 个留出的帧上，每次给训练好的策略一个错误的输入。`error` 是和记录的动作的平均距离，`size` 是运动的平均大小。**猜一猜：** 第一行下面的七行，哪几行光看准确率就能和它区分开？
# %%
import subprocess

from course.begin import demo_policy

run = demo_policy()  # of lesson 6
command = [sys.executable, "examples/break/break.py", "--checkpoint", str(run), "--frames", "160"]
print(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
# %% en
# **What you saw.** Wrong pictures and words cost accuracy, some of them little: swapped colors 0.483 to 0.442. The last two rows
# have the very accuracy of the first: the tokens are right, and what is made of them is not. `size` shows the robot that hardly
# moves (0.016), and `error` both. And in
# [the table of its README](../examples/break/README.md), where a better-trained policy also acted, the very last row even *succeeds*
# as often as the first: none of those six tasks needs the gripper.
#
# Accuracy proves neither: the policy one bin beside had none and always succeeded, and the one with a lame elbow had much
# and never did. A drop, as with the black image, is a reason to look. Only acting shows whether a policy is good.
#
# ## Exercise 7
#
# A third is what one gets without looking, so every accuracy needs that number beside it. Write `most_frequent_tokens`:
# `python course/check.py 7`
#
# <details><summary>A hint</summary>
#
# Frames of several datasets may come mixed. Each must be normalized with its own dataset's statistics, which
# `mixture.actions(d, rows)` does for the frames of one dataset d. Then put them together, encode, and count in each column.
#
# </details>
#
# {answer}
#
# Next: [8. A policy that asks for help, and one that gets better by itself](8_help.ipynb)
# %% zh
# **看到了什么。** 图像和文字错了，准确率会掉，有的掉得很少：红蓝互换只从 0.483 掉到 0.442。最后两行的准确率和第一行完全一样：词元是对的，错在拿它们做了什么。`size` 能看出几乎不动的机器人 (0.016)，`error` 两者都能看出来。在[它的 README 的表](../../examples/break/README.md)里，一个训练得更久的策略也真正动了起来：最后一行连*成功率*都和第一行一样，因为那六个任务都用不到夹爪。
#
# 准确率什么都证明不了：总是偏一个区间的策略准确率是零，却次次成功；肘部不动的策略准确率很高，却次次失败。准确率突然下降（比如图像全黑时），说明该去查一查；策略好不好，只有真正执行才知道。
#
# ## 练习 7
#
# 不看图像也能对三分之一，所以任何准确率旁边都要写上这个数。写出 `most_frequent_tokens`：`python course/check.py 7 --zh`
#
# <details><summary>提示</summary>
#
# 几个数据集的帧可能混在一起。每一帧都要用自己数据集的统计量归一化；对某个数据集 d 的帧，`mixture.actions(d, rows)` 已经这样做了。然后合起来，编码，逐列计数。
#
# </details>
#
# {answer}
#
# 下一课：[8. 会求助的策略，和自己变好的策略](8_help.ipynb)
