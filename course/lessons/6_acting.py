# %% en
# # 6. Acting: from tokens back to meters
#
# A trained model gets a picture and a sentence. **How does a movement come out, and what else must be known for it to be
# the right one?**
#
# Read `Policy.predict_action` and `tokens_of` in `act.py`. First a policy is needed: the next cell trains the demo's model
# for 200 steps of 32 samples, some three minutes on two free CPU cores, unless it has been trained before.
# %% zh
# # 6. 执行动作：从词元变回米
#
# 训练好的模型拿到一张图像和一句话。**动作是怎么出来的？还要知道什么，动作才是对的？**
#
# 请看 `act.py` 的 `Policy.predict_action` 和 `tokens_of`。首先要有一个策略：下一格把演示模型训练 200 步，每步 32 个样本，两个空闲的 CPU 核大约三分钟；以前训练过就不再训练。
# %%
import json

from course.begin import demo_policy

show(demo_policy, "command =", "keep_checkpoints")
run = demo_policy()
lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
held_out = next(line for line in reversed(lines) if "eval/accuracy" in line)
print(f"\nheld-out accuracy {held_out['eval/accuracy']:.2f}, "
      f"of the most frequent bins {held_out['eval/accuracy_of_most_frequent_bin']:.2f}")
# %% en
# ## One action
#
# These lines turn a picture and a sentence into an action (the `None`s and `known` are for what this policy does not use: the
# robot's state, the choice among several datasets, and the beginning of an action that is already known):
# %% zh
# ## 一个动作
#
# 下面几行把图像和句子变成动作（几个 `None` 和 `known` 在这里都用不到：它们是机器人状态、多个数据集时选哪一个、动作里已知的开头）：
# %%
import numpy as np

from act import Policy, load_vla
from data import Mixture, open_tables
from machinery.images import decode_native

show(Policy.predict_action, "inputs = self.prepare", "return robot")
policy = load_vla(run)
mixture = Mixture(policy.cfg, open_tables(policy.cfg), policy.tokenizer, train=False)
table = mixture.tables[0]
rows = mixture.rows(np.zeros(8, int), np.arange(0, 400, 50))  # eight held-out frames
images = [decode_native(table.read_image(row, 0)) for row in rows]
texts = [table.instructions[number] for number in table.frames["instruction"][rows]]
recorded = table.frames["action"][rows]

passes = []
policy.vla.llm.base_model.layers[0].register_forward_hook(lambda *_: passes.append(1))
tokens = policy.generate(*policy.prepare(images[:1], texts[:1], None, None))
print("\ninstruction", repr(texts[0]), "picture", images[0].shape)
print("tokens", tokens[0].tolist(), "passes through the language model", len(passes))
print("normalized", policy.action_tokenizer.decode(tokens[0].numpy()).round(3))
print("action    ", policy.predict_action(images[0], texts[0]).round(3))
print("recorded  ", recorded[0].round(3))
# %% en
# **What you saw.** Four tokens took 4 passes through the language model: the first reads the picture and the prompt, and each
# further one only the token before it. The normalized numbers then became an action in the robot's own units. In this frame
# the first number has the wrong sign: a policy that was trained for three minutes is often wrong. (The picture has 96 x 96
# pixels, as it was recorded; `prepare` makes it 84 x 84.)
#
# Many robots need a *chunk* of actions at a time. 8 actions of 4 numbers would take 32 passes. With `parallel_decoding`,
# learned queries take the place of the action tokens, no number waits for another, and one pass is enough. In training, a
# chunk may reach past the end of its episode: there a velocity is 0, and a joint angle to reach stays as it was, so that the
# robot rests.
#
# ## Back to the robot's units
#
# The model's numbers lie between -1 and 1. What they mean is written beside the weights, in `dataset_statistics.json`. (The
# demo's robot uses -1..1 itself, so the action above has the same numbers before and after.)
# %% zh
# **看到了什么。** 四个词元，经过语言模型 4 次：第一次读图像和提示词，之后每次只读前一个词元。归一化的数再变成机器人自己单位的动作。这一帧里第一个数的符号是错的：只训练了三分钟的策略经常会错。（图像是录制时的 96 x 96 像素，`prepare` 把它缩成 84 x 84。）
#
# 很多机器人一次要一段动作，叫*动作块*。8 个动作、每个 4 个数，就要 32 次。打开 `parallel_decoding`，动作词元的位置换成学出来的查询，各个数互不等待，一次就够。训练时，动作块可能超出回合的末尾：超出的部分，速度填 0，目标关节角保持最后一个，机器人停在原处。
#
# ## 变回机器人的单位
#
# 模型的数在 -1 和 1 之间。它们是什么意思，写在权重旁边的 `dataset_statistics.json` 里。（演示的机器人自己用的就是 -1..1，所以上面的动作换算前后数字相同。）
# %%
from action_tokenizer import unnormalize

show(unnormalize, "low, high", "return")
stats = policy.dataset_statistics(None)["action"]
print("\nq01", np.round(stats["q01"], 2), "q99", np.round(stats["q99"], 2))
# %% en
# **Predict.** Another robot moves at most 0.03 per step. If the model's tokens are right, but they are converted with *that*
# robot's statistics, what happens to the token accuracy, and what to the movement?
# %% zh
# **猜一猜。** 另一台机器人每步最多移动 0.03。如果词元是对的，却用*那台*机器人的统计量来换算，词元准确率会怎样？动作会怎样？
# %%
small = {"q01": [-0.03] * 4, "q99": [0.03] * 4}
tokens = policy.generate(*policy.prepare(images, texts, None, None))
true = policy.action_tokenizer.encode(mixture.actions(0, rows)[:, 0])
print(f"token accuracy of these eight frames {(tokens.numpy() == true).mean():.2f}")
for name, used in (("its own statistics", stats), ("another robot's   ", small)):
    actions = unnormalize(policy.action_tokenizer.decode(tokens.numpy()), used, "bounds_q99")
    print(name, f"mean size of a movement {np.abs(actions[:, :3]).mean():.3f}, "
          f"mean error {np.abs(actions - recorded).mean():.3f}")
# %% en
# **What you saw.** The accuracy did not change: it only compares tokens. The movements became tiny, 0.013 instead of 0.441. Such a robot creeps in the
# right direction until time is up, and no number in the training's log shows it. Statistics are half of the model.
#
# ## Exercise 6
#
# Write `unnormalize`: `python course/check.py 6`
#
# <details><summary>A hint</summary>
#
# -1 becomes `low`, +1 becomes `high`. Check your formula with these two before you run the check. Then think of the gripper,
# which the mask may exclude.
#
# </details>
#
# {answer}
#
# Next: [7. Why success is not accuracy](7_success.ipynb)
# %% zh
# **看到了什么。** 准确率没变：它只比较词元。动作却变得极小：0.013，而不是 0.441。这样的机器人朝正确的方向一点点挪，直到时间用完，而训练日志里没有一个数能看出来。统计量是模型的另一半。
#
# ## 练习 6
#
# 写出 `unnormalize`：`python course/check.py 6 --zh`
#
# <details><summary>提示</summary>
#
# -1 变成 `low`，+1 变成 `high`。先用这两个数验算你的公式，再运行检查。然后想一想夹爪：掩码可能把它排除在外。
#
# </details>
#
# {answer}
#
# 下一课：[7. 为什么成功不等于准确](7_success.ipynb)
