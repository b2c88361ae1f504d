# %% en
# # 8. A policy that asks for help
#
# A policy that imitates sees only states that its teacher visited. One small mistake leads to a state that no demonstration shows,
# where the next mistake is larger. **What should one record next: more demonstrations, or something else?**
#
# To try it in minutes without a GPU, this lesson uses a small policy without pictures: it sees the joint angles it has
# commanded, and how far the disc is from the hand. The arm and its expert are those of `examples/own_robot`, and the actions are
# tokens, as everywhere in this project.
# %% zh
# # 8. 会求助的策略
#
# 模仿学来的策略，只见过老师到过的状态。一个小错误会把它带到演示里从没有过的状态，在那里下一个错误更大。**接下来该录什么：更多的演示，还是别的？**
#
# 为了不用 GPU、几分钟就能试，本课用一个不看图像的小策略：它看到的是自己发出的关节角，以及圆片离手有多远。机械臂和专家来自 `examples/own_robot`，动作照样是词元。
# %%
import numpy as np
import torch

from action_tokenizer import ActionTokenizer

sys.path.insert(0, "examples/own_robot")
from robot import SPEED, Arm

from examples.closed_loop import rate

tokenizer = ActionTokenizer(257)  # a vocabulary of one word, and 256 for actions
SIZE = np.array([SPEED, SPEED, SPEED, 1])
show(Arm.solved)


def observe(arm):
    """What the policy sees: three commanded angles, and from the hand to the disc in decimeters."""
    way = arm.discs[arm.goal] - arm.data.site("tip").xpos[:2]
    return np.float32([*arm.target[:3], *(10 * way)])


def turn(arm):
    """What the expert would do, as four tokens."""
    change = arm.expert() - np.append(arm.target[:3], 0)
    return tokenizer.encode(change / SIZE)


def move(arm, tokens):
    """Do what four tokens say."""
    arm.move(np.append(arm.target[:3], 0) + tokenizer.decode(tokens) * SIZE)


class Student:
    """A policy: two layers, and a choice among 256 tokens for each of four numbers."""

    def __init__(self, seen, tokens, seed):
        torch.manual_seed(seed)
        self.net = torch.nn.Sequential(torch.nn.Linear(5, 256), torch.nn.GELU(), torch.nn.Linear(256, 256),
                                       torch.nn.GELU(), torch.nn.Linear(256, 4 * 256))
        seen, ids = torch.tensor(np.array(seen)), torch.tensor(np.array(tokens)) - tokenizer.first_id
        optimizer = torch.optim.AdamW(self.net.parameters(), 2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
        for _ in range(600):
            some = torch.randint(len(seen), (64,))
            logits = self.net(seen[some]).unflatten(1, (4, 256))
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[some].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    @torch.inference_mode()
    def __call__(self, arm):
        logits = self.net(torch.tensor(observe(arm))).unflatten(0, (4, 256))
        return logits.argmax(-1).numpy() + tokenizer.first_id


def episode(arm, seed, student, steps):
    """The student plays `steps` steps, then the expert to the end. Only the expert's part is recorded."""
    arm.reset(seed)
    for _ in range(steps):
        move(arm, student(arm))
    seen, tokens, held = [], [], 0
    while held < 3 and len(seen) < 60:
        seen.append(observe(arm))
        tokens.append(turn(arm))
        move(arm, tokens[-1])
        held += arm.solved
    return seen, tokens


def succeeds(arm, seed, student):
    """Does the student reach the disc by itself, within 30 steps?"""
    arm.reset(seed)
    for _ in range(30):
        move(arm, student(arm))
        if arm.solved:
            return True
    return False
# %% en
# ## Ten demonstrations
#
# **Predict.** The expert always succeeds. A student learns from ten of its demonstrations until its training loss is near
# zero. In how many of 100 new episodes does it succeed?
# %% zh
# ## 十个演示
#
# **猜一猜。** 专家总能成功。学生从它的十个演示里学，训练损失学到接近零。在 100 个新回合里，它能成功几个？
# %%
arm = Arm()
TEST = range(200_000, 200_100)  # starts that no recording has


def report(name, frames, outcomes):
    """A row: successes, with the 95% interval."""
    counted = rate(outcomes)
    low, high = counted["interval"]
    print(f"{name} frames {frames:4d} success {counted['successes']} of {counted['trials']} ({low:.0%} to {high:.0%})")


seen, tokens = [], []
for seed in range(10):
    recorded = episode(arm, seed, None, 0)
    seen += recorded[0]
    tokens += recorded[1]
first = Student(seen, tokens, 0)
ids = np.array([first.net(torch.tensor(one)).unflatten(0, (4, 256)).argmax(-1).numpy() for one in seen])
print(f"token accuracy on its own frames {(ids + tokenizer.first_id == np.array(tokens)).mean():.2f}")
report("ten demonstrations", len(seen), [succeeds(arm, seed, first) for seed in TEST])
# %% en
# ## More of the same, or help where it is needed?
#
# Now two ways to record 20 more episodes, in two rounds:
#
# - **demonstrations**: the expert plays from the start, as before
# - **help**: the student plays a random number of steps first, then the expert takes over and finishes (DAgger)
#
# The second shows the expert's way out of states that the student gets itself into. It also records fewer frames, as the
# student has played a part of each episode. **Predict** which is better. The cell repeats both with three random seeds.
# %% zh
# ## 再来一些同样的，还是在需要的地方求助？
#
# 再录 20 个回合，分两轮，有两种办法：
#
# - **demonstrations**：和以前一样，专家从头做到尾
# - **help**：学生先做随机的几步，然后专家接手，做完为止 (DAgger)
#
# 第二种录下的是：学生把自己弄到那个状态之后，专家怎样脱身。它录的帧也更少，因为每个回合有一部分是学生做的。**猜一猜**哪种更好。下一格用三个随机种子各做一遍。
# %%
results = {}
for way in ("demonstrations", "help"):
    for repeat in range(3):
        rng = np.random.default_rng(repeat)
        seed = 1000 * repeat
        seen, tokens, student = [], [], None
        for number in range(3):  # ten episodes each: the first demonstrations, then two rounds
            for _ in range(10):
                steps = int(rng.integers(1, 20)) if way == "help" and number else 0
                recorded = episode(arm, seed, student if steps else None, steps)
                seen += recorded[0]
                tokens += recorded[1]
                seed += 1
            student = Student(seen, tokens, repeat)
            outcomes = [succeeds(arm, test, student) for test in TEST]
            frames, known = results.setdefault((way, number), ([], []))
            frames.append(len(seen))
            known += outcomes
for (way, number), (frames, outcomes) in results.items():
    report(f"{way:14s} round {number}", round(np.mean(frames)), outcomes)
# %% en
# **What you saw.** On its own frames the first student's accuracy was 0.97, and it still failed in 17 of 100 new episodes. More
# data helped: from 201 of 300 to 253 or 254. **Demonstrations and help ended alike**: their intervals cover each other, so this
# experiment does not show that one is better. It does show what help costs: 217 recorded frames instead of 277, about a fifth
# less of the expert's time, for the same success. In so short a task a student drifts little. The longer an episode, and the more
# there is to go wrong, the more states there are that only the student visits.
#
# It is easy to fool oneself here. With one seed and 100 episodes, either way could have "won".
#
# For a policy with cameras it is the same loop with `train_vla.py` in the place of `Student`. With a real robot, you are
# the expert: you take over when the policy goes wrong, and only your part is recorded.
#
# ## Exercise 8
#
# Is 253 of 300 better than 201? Is 254 better than 253? The intervals answer. Write `wilson` (`examples/closed_loop.py`): `python course/check.py 8`
#
# <details><summary>A hint</summary>
#
# Wilson's interval for s successes of n, with p = s / n and z = 1.96: the center is p + z² / 2n, half the width is
# z √(p (1 - p) / n + z² / 4n²), and both are divided by 1 + z² / n.
#
# </details>
#
# {answer}
#
# This was the last lesson. Now read [the tour](../docs/tour.md), and train a policy of
# [your own robot](../examples/own_robot/README.md).
# %% zh
# **看到了什么。** 第一个学生在自己的帧上准确率是 0.97，可是 100 个新回合里仍有 17 个失败。数据多了有用：300 次里的成功从 201 次升到 253 或 254 次。**从头演示和求助，最后一样好**：两者的区间互相覆盖，所以这个实验不能说明哪种更好。它说明的是代价：求助只录了 217 帧，而不是 277 帧，同样的成功率，专家少花了大约五分之一的时间。任务这么短，学生偏不了多远；回合越长、会出错的地方越多，只有学生才会走到的状态就越多。
#
# 在这里很容易骗自己：只用一个种子、100 个回合，哪一种都可能“赢”。
#
# 带相机的策略也是同样的循环，只是把 `Student` 换成 `train_vla.py`。在真机上，你就是专家：策略走错时由你接手，只录你做的那一段。
#
# ## 练习 8
#
# 300 次里成功 253 次，比 201 次好吗？254 次比 253 次好吗？看区间就知道。写出 `wilson` (`examples/closed_loop.py`)：`python course/check.py 8 --zh`
#
# <details><summary>提示</summary>
#
# n 次里成功 s 次，p = s / n，z = 1.96。Wilson 区间的中心是 p + z² / 2n，半宽是 z √(p (1 - p) / n + z² / 4n²)，两者都除以 1 + z² / n。
#
# </details>
#
# {answer}
#
# 这是最后一课。接下来读[导览](../../docs/tour.zh.md)，再训练[你自己机器人](../../examples/own_robot/README.md)的策略。
