# %% en
# # 8. A policy that asks for help, and one that gets better by itself
#
# A policy that imitates sees only states that its teacher visited. One small mistake leads to a state that no demonstration shows,
# where the next mistake is larger. **What can be done about it, besides more demonstrations?** Two things: let the policy play,
# and have a teacher take over (DAgger), or let it play, and only tell it whether it succeeded (reinforcement learning).
#
# Read `ask_for_help.py` and `rest_of_episode` in `examples/own_robot`, and `examples/rl/rl.py`.
# %% zh
# # 8. 会求助的策略，和自己变好的策略
#
# 模仿学来的策略，只见过老师到过的状态。一个小错误会把它带到演示里从没有过的状态，在那里下一个错误更大。**除了多录演示，还有什么办法？** 有两种：让策略自己做，由老师中途接手 (DAgger)；或者让策略自己做，只告诉它成功了没有（强化学习）。
#
# 请对照 `examples/own_robot` 的 `ask_for_help.py` 和 `rest_of_episode`，以及 `examples/rl/rl.py`。
# %%
sys.path.insert(0, "examples/own_robot")
import ask_for_help
from record import rest_of_episode

show(ask_for_help.record)
print()
show(rest_of_episode)
# %% en
# `record` is one episode of DAgger: the policy plays some steps, and if it has not succeeded by then, the expert finishes.
# **Only the expert's part is recorded**, from wherever the policy got to.
#
# With cameras, that takes ten minutes (`python examples/own_robot/ask_for_help.py`). To repeat it often enough to measure
# something, this lesson takes the same arm and expert, but a small policy without pictures: it sees the three angles it has
# commanded, and how far the disc is from the hand. Its actions are tokens, as everywhere in this project.
# %% zh
# `record` 就是 DAgger 的一个回合：策略先做几步，如果到那时还没成功，就由专家做完。**只录专家做的那一段**，从策略走到的地方开始录。
#
# 带相机的版本要十分钟 (`python examples/own_robot/ask_for_help.py`)。为了能重复足够多次、量出点东西来，本课用同样的机械臂和专家，但策略很小，不看图像：它看到的是自己发出的三个关节角，以及圆片离手有多远。动作照样是词元。
# %%
import numpy as np
import torch
from robot import SPEED, Arm

from action_tokenizer import ActionTokenizer
from examples.closed_loop import rate

tokenizer = ActionTokenizer(257)  # a vocabulary of one word, and 256 for actions
SIZE = np.array([SPEED, SPEED, SPEED, 1])


class Hand(Arm):
    """The arm without cameras: it sees commanded angles, and the way to the disc (dm)."""

    def look(self):
        way = self.discs[self.goal] - self.data.site("tip").xpos[:2]
        return {"images": {}, "state": np.float32([*self.target[:3], *(10 * way)])}


class Student:
    """A policy: two layers, and a choice among 256 tokens for each of four numbers."""

    def __init__(self, steps, seed):
        torch.manual_seed(seed)
        self.net = torch.nn.Sequential(torch.nn.Linear(5, 256), torch.nn.GELU(),
                                       torch.nn.Linear(256, 256), torch.nn.GELU(),
                                       torch.nn.Linear(256, 4 * 256))
        seen = np.array([step["observation"]["state"] for step in steps])
        turns = np.array([step["action"] for step in steps])
        turns[:, :3] -= seen[:, :3]
        self.seen = torch.tensor(seen)
        self.ids = torch.tensor(tokenizer.encode(turns / SIZE)) - tokenizer.first_id
        optimizer = torch.optim.AdamW(self.net.parameters(), 2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
        for _ in range(600):
            some = torch.randint(len(seen), (64,))
            logits = self.net(self.seen[some]).unflatten(1, (4, 256))
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), self.ids[some].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    @torch.inference_mode()
    def choose(self, seen):
        return self.net(seen).unflatten(-1, (4, 256)).argmax(-1)

    def act(self, arm):
        """Look, choose four tokens, and move."""
        ids = self.choose(torch.tensor(arm.look()["state"])).numpy() + tokenizer.first_id
        arm.move(np.append(arm.target[:3], 0) + tokenizer.decode(ids) * SIZE)


def succeeds(arm, seed, student):
    """Does the student reach the disc by itself, within 30 steps?"""
    arm.reset(seed)
    for _ in range(30):
        student.act(arm)
        if arm.solved:
            return True
    return False


def demonstration(arm, seed):
    """The expert from the start."""
    arm.reset(seed)
    return rest_of_episode(arm)


def with_help(arm, seed, student, longest):
    """As ask_for_help.record: the expert's part, or None if the student needed no help."""
    arm.reset(seed)
    for _ in range(ask_for_help.takeover(seed, longest)):
        student.act(arm)
    return None if arm.solved else rest_of_episode(arm)


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
arm = Hand()
TEST = range(200_000, 200_100)  # starts that no recording has


def report(name, outcomes):
    """A row: successes, with the 95% interval."""
    counted = rate(outcomes)
    low, high = counted["interval"]
    print(f"{name}: success {counted['successes']} of {counted['trials']} "
          f"({low:.0%} to {high:.0%})")


steps = [step for seed in range(10) for step in demonstration(arm, seed)]
first = Student(steps, 0)
right = (first.choose(first.seen) == first.ids).float().mean()
print(f"token accuracy on its own {len(steps)} frames {right:.2f}")
report("ten demonstrations", [succeeds(arm, seed, first) for seed in TEST])
# %% en
# ## More of the same, or help where it is needed?
#
# Now two ways to record 20 more episodes, in two rounds:
#
# - **demonstrations**: the expert plays from the start, as before
# - **help**: the student plays a random number of steps first. Unless it has succeeded, the expert then takes over
#
# The second shows the expert's way out of states that the student gets itself into. **Predict** which is better, and which
# costs the expert more time. The cell repeats both with three random seeds.
# %% zh
# ## 再来一些同样的，还是在需要的地方求助？
#
# 再录 20 个回合，分两轮，有两种办法：
#
# - **demonstrations**：和以前一样，专家从头做到尾
# - **help**：学生先做随机的几步，如果还没成功，专家接手做完
#
# 第二种录下的是：学生把自己弄到那个状态之后，专家怎样脱身。**猜一猜**哪种更好，哪种更费专家的时间。下一格用三个随机种子各做一遍。
# %%
results = {}
for way in ("demonstrations", "help"):
    for repeat in range(3):
        steps, student, seed = [], None, 1000 * repeat
        for number in range(3):  # ten episodes each: the first demonstrations, then two rounds
            recorded = 0
            while recorded < 10:
                if student is None or way == "demonstrations":
                    new = demonstration(arm, seed)
                else:
                    # twice as long as a demonstration
                    new = with_help(arm, seed, student, longest=20)
                steps += new or []
                recorded += new is not None
                seed += 1
            student = Student(steps, repeat)
            frames, outcomes = results.setdefault((way, number), ([], []))
            frames.append(len(steps))
            outcomes += [succeeds(arm, test, student) for test in TEST]
for (way, number), (frames, outcomes) in results.items():
    report(f"{way:14s} round {number}, {np.mean(frames):.0f} frames", outcomes)
# %% en
# **What you saw.** On its own frames the first student's accuracy was 1.00, and it still failed in 15 of 100 new episodes. More
# data helped, of either kind: from 195 of 300 to 255 with demonstrations, and to 272 with help. **Is help better?** The
# intervals (81 to 89% and 87 to 93%) overlap, and three seeds are few: replace `range(3)` by `range(3, 6)`, and see whether the order
# stays. What is certain is the cost: 241 recorded frames instead of 277, because the student has played a part of each episode.
#
# For a policy with cameras it is the same loop with `train_vla.py` in the place of `Student`. With a real robot, you are the
# expert: you take over when the policy goes wrong, and only your part is recorded
# ([how](../examples/own_robot/README.md#you-are-the-expert)).
#
# ## A policy that gets better by itself
#
# A teacher is not always there. But success can often be measured, and a policy that outputs the *probability* of each token can
# try: it draws its actions instead of always taking the likeliest, and afterwards makes what worked likelier. `examples/rl/rl.py`
# does that with the whole engine. Here are its parts in a toy world, where an episode has six actions and succeeds if
# their first numbers are positive on average. The policy is a VLA of this project, with random weights.
# %% zh
# **看到了什么。** 第一个学生在自己的帧上准确率是 1.00，可是 100 个新回合里仍有 15 个失败。两种数据都有用：300 次里的成功从 195 次升到 255 次（演示）和 272 次（求助）。**求助更好吗？** 两个区间（81% 到 89%，87% 到 93%）有重叠，三个种子也太少：把 `range(3)` 换成 `range(3, 6)` 再跑一次，看先后会不会变。能确定的是代价：求助只录了 241 帧，而不是 277 帧，因为每个回合有一部分是学生做的。
#
# 带相机的策略也是同样的循环，只是把 `Student` 换成 `train_vla.py`。在真机上，你就是专家：策略走错时由你接手，只录你做的那一段（[怎么做](../../examples/own_robot/README.md#you-are-the-expert)）。
#
# ## 自己变好的策略
#
# 老师不是随时都在。但成功与否常常可以自动判断，而策略给出的是每个词元的*概率*，所以它可以自己试：动作不总取最可能的，而是按概率抽；事后让成功的动作变得更可能。`examples/rl/rl.py` 用整套训练引擎做这件事。这里把它的几个部件放进一个玩具世界：一个回合六个动作，第一个数的平均值为正就算成功。策略就是本项目的 VLA，权重随机。
# %%
import types

from act import Policy
from action_tokenizer import load_tokenizer
from data import Mixture, collate, open_tables
from examples.rl import rl
from examples.rl.paper_world import PaperWorld
from machinery.config import load_config
from model import VLA

show(PaperWorld.succeeded)
print()
show(rl.with_advantages)
SMALL = ["action_dim=4", "parallel_decoding=true", "action_chunk=5", "image_size=28",
         "arch_specifier=gelu-mlp",
         "vision_backbone={dino: {model: vit_small_patch14_reg4_dinov2, "
         "embed_dim: 32, depth: 2, num_heads: 2}}",
         "llm_backbone={model_type: llama, hidden_size: 32, intermediate_size: 64, "
         "num_hidden_layers: 2, num_attention_heads: 2}"]


def make_policy(seed):
    """A VLA with random weights. Its episodes depend on the seed, too."""
    cfg = load_config("configs/demo.yaml", [*SMALL, f"seed={seed}"])
    words = load_tokenizer(cfg.tokenizer, cfg.add_action_tokens)
    mixture = Mixture(cfg, open_tables(cfg), words)
    torch.manual_seed(seed)
    return Policy(VLA(mixture.cfg, words), words, mixture.statistics)


world = PaperWorld(["up"], 28)


def play_group(policy, args, number):
    """Eight episodes from the same start."""
    trials = world.begin("up", rl.FIRST_SEED + number, rl.GROUP)
    episodes = [{"key": (number, i), "decisions": [], "executed": world.horizon}
                for i in range(rl.GROUP)]
    for count in (4, 2):  # of a chunk of five
        questions = [(episode, world.instruction("up"), *seen)
                     for episode, seen in zip(episodes, world.look(trials), strict=True)]
        for trial, actions in zip(trials, rl.decide(policy, args, questions), strict=True):
            trial["actions"] += [*actions[:count]]
    for episode, trial in zip(episodes, trials, strict=True):
        episode["success"] = world.succeeded(trial)
    return episodes


# %% en
# The eight episodes of a *group* begin alike, so if one succeeds and another fails, that is due to their actions. An
# episode's **advantage** is how much better it was than its group: its reward minus the group's mean, divided by the group's
# standard deviation. No network has to estimate how good a state is.
#
# **Predict.** Three of eight episodes succeed. What is the advantage of each of the three, and of each of the five? And if all
# eight succeed?
# %% zh
# 一*组*八个回合，开头完全一样，所以一个成功、一个失败，差别只能来自动作。一个回合的**优势** (advantage) 是它比同组好多少：奖励减去组内平均，再除以组内标准差。不需要另一个网络来估计状态有多好。
#
# **猜一猜。** 八个回合里三个成功：这三个的优势各是多少？另外五个呢？如果八个全成功呢？
# %%
args = types.SimpleNamespace(temperature=1.0, noise="shared", execute=4, method="grpo")
policy = make_policy(0)
episodes = play_group(policy, args, 0)
for wins in (3, 8):
    pretended = [{**episode, "success": i < wins} for i, episode in enumerate(episodes)]
    found = rl.with_advantages(pretended, args, action_dim=4)
    print(f"{wins} of 8 succeed: advantages",
          " ".join(f"{one['advantage'][0]:.2f}" for one in found[::2] if one["weight"].any()))
pretended = [{**episode, "success": i < 3} for i, episode in enumerate(episodes)]
found = rl.with_advantages(pretended, args, action_dim=4)
print("weights of the first episode's two decisions:",
      [int(one["weight"].sum()) for one in found[:2]], "of", found[0]["weight"].size)
# %% en
# A group that only succeeds teaches nothing, nor does one that only fails: nothing in it was better. The weights leave out
# actions that were predicted but never executed: of a chunk of five steps with four numbers each, four steps were executed, and
# of the second chunk two.
#
# Now the loss. With a positive advantage, each token of the episode should become likelier, with a negative one less likely, but
# not by more than a little before new episodes are played:
# %% zh
# 全成功的组教不了什么，全失败的组也一样：里面没有哪个更好。权重 (weight) 去掉了预测过但没有执行的动作：一个动作块五步，每步四个数，只执行了四步；第二块只执行了两步。
#
# 再看损失。优势为正，这个回合的每个词元都应更可能；为负则更不可能。但在重新采样之前，每次只能变一点：
# %%
show(rl.policy_loss)


def learn(policy, args, iterations):
    """Iterations of eight groups and four optimizer steps -> which episodes of each succeeded."""
    optimizer = torch.optim.AdamW(policy.vla.parameters(), 1e-2, weight_decay=0)
    history = []
    for iteration in range(iterations):
        groups = [play_group(policy, args, 8 * iteration + i) for i in range(8)]
        history.append([episode["success"] for group in groups for episode in group])
        decisions = [one for group in groups
                     for one in rl.with_advantages(group, args, action_dim=4)]
        order = np.random.default_rng(iteration).permutation(len(decisions))
        for part in np.array_split(order, 4):
            batch = collate([{**decisions[i]} for i in part], policy.tokenizer.pad_token_id)
            batch["weight"] /= max(1, batch["weight"].sum())
            loss, _ = rl.policy_loss(policy.vla, args, **batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return history


# %% en
# **Predict.** With random weights, about half of the episodes succeed. After how many episodes do nine in ten? And would it be as good
# to imitate the successful episodes and forget the others (`method="cloning"`)? The cell repeats both with three seeds.
# %% zh
# **猜一猜。** 权重随机时，大约一半的回合成功。要多少个回合之后，十个里能成功九个？如果只模仿成功的回合、不管失败的（`method="cloning"`），会一样好吗？下一格用三个种子各做一遍。
# %%
for method in ("grpo", "cloning"):
    args.method = method
    curves = [learn(make_policy(seed), args, iterations=24) for seed in range(3)]
    for begin in range(0, 24, 4):
        outcomes = [one for curve in curves for tried in curve[begin : begin + 4] for one in tried]
        report(f"{method:7s} episodes {64 * begin:4d} to {64 * (begin + 4):4d}", outcomes)
# %% en
# **What you saw.** In the first 256 episodes of each seed, 410 of 768 succeeded, and in the last 256, 767. Nobody showed the policy
# an action: it had only one bit for each episode. Imitating the successful episodes worked, too, but more slowly at the same learning
# rate: 723 of 768 at the end. It never learns what to avoid, and where a policy nearly always succeeds, the rare failure says most.
#
# **Do not expect this of a robot.** This toy has one task and needs no picture. The same functions with the simulated arm and its camera
# take thirty thousand episodes from 44% to 65%, and imitating the successes, or training longer on demonstrations, does as well:
# [docs/rl.md](../docs/rl.md#the-arm) has the figures. If no episode succeeds, all advantages are 0, and nothing is ever learned: reinforcement needs a policy that
# can do the task sometimes, such as one that has imitated.
#
# ## Exercise 8
#
# Write `with_advantages` (`examples/rl/rl.py`): `python course/check.py 8`
#
# <details><summary>A hint</summary>
#
# First the rewards of the group as an array, then all advantages at once. After that, go through the episodes and their decisions: the decision
# with number n begins at step n × execute, so min(execute, executed - n × execute) of its steps were executed, with
# action_dim tokens each.
#
# </details>
#
# {answer}
#
# This was the last lesson. Try [the quiz](quiz.md), then read [the tour](../docs/tour.md), and train a policy of
# [your own robot](../examples/own_robot/README.md).
# %% zh
# **看到了什么。** 三个种子合起来，各自最初的 256 个回合里，768 个成功 410 个；最后的 256 个回合里，768 个成功 767 个。没有人给策略示范过任何动作，每个回合它只得到一比特的信息。只模仿成功的回合也行，但同样的学习率下慢一些：最后是 768 个里的 723 个。它学不到该避开什么；而策略几乎总能成功的时候，难得的失败恰恰最有信息。
#
# **别指望机器人上也这么顺利。** 这个玩具只有一个任务，也不用看图像。同样的函数用在带相机的仿真机械臂上，三万个回合才把成功率从 44% 提到 65%，而只模仿成功的回合、或者在演示上多训练一会儿，效果也差不多，数字见 [docs/rl.zh.md](../../docs/rl.zh.md#机械臂)。如果没有一个回合成功，所有优势都是 0，就什么也学不到：强化学习要从一个有时能成功的策略开始，比如模仿学来的策略。
#
# ## 练习 8
#
# 写出 `with_advantages` (`examples/rl/rl.py`)：`python course/check.py 8 --zh`
#
# <details><summary>提示</summary>
#
# 先把一组的奖励放进一个数组，一次算出所有优势。然后逐个回合、逐个决定：第 n 个决定从第 n × execute 步开始，所以执行了 min(execute, executed - n × execute) 步，每步 action_dim 个词元。
#
# </details>
#
# {answer}
#
# 这是最后一课。可以做一做[二十道题](../quiz.zh.md)，再读[导览](../../docs/tour.zh.md)，然后训练[你自己机器人](../../examples/own_robot/README.md)的策略。
