"""examples/rl/rl.py: reinforcement learning, with a simulator of a few lines (paper_world.py)."""

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, ds_json, open_mixture

from act import Policy
from action_tokenizer import load_tokenizer
from data import collate
from examples.rl import rl
from examples.rl.paper_world import PaperWorld
from machinery.checkpoint import Checkpoint, list_checkpoints
from machinery.config import TrainConfig
from model import VLA

KEYS = {**TINY, "parallel_decoding": True, "action_chunk": 5, "global_batch_size": 8, "per_device_batch_size": 8,
        "vision_backbone": {"dino": TINY["vision_backbone"]["dino"]}, "arch_specifier": "gelu-mlp",
        "learning_rate": 3e-3, "save_interval": 1}
OPTIONS = ["--world", "examples.rl.paper_world:PaperWorld", "--execute", "4", "--workers", "1", "--updates", "2"]


@pytest.fixture
def reinforce(ranks, tiny):
    """Run rl.py -> (its groups, its metrics, its newest checkpoint, its text)."""

    def run(run_id: str, episodes: int, *options, count: int = 1, **changes):
        config = tiny(**{**KEYS, "run_id": run_id, **changes})
        done = ranks(count, config, "--deepspeed_config", ROOT / "ds_configs/cpu.json", *OPTIONS, "--episodes",
                     str(episodes), "--groups", "4", *options, script=str(ROOT / "examples/rl/rl.py"))
        assert done.returncode == 0, done.text
        path = config.parent / "runs" / run_id
        groups, metrics = ([json.loads(line) for line in (path / name).read_text().splitlines()]
                           for name in ("groups.jsonl", "metrics.jsonl"))
        return groups, metrics, Checkpoint(list_checkpoints(path / "checkpoints")[-1]), done.text

    return run


def test_before_the_first_step_all_ratios_are_one(reinforce):
    """What samples is what trains: the same temperature, the same forward pass."""
    groups, metrics, _, text = reinforce("one", 96, "--temperature", "1.3", learning_rate=2e-2)
    assert len(metrics) == 3 and all(line["ratio_error"] < 1e-4 for line in metrics), text
    assert metrics[0]["clipped"] > 0 and len({group["seed"] for group in groups}) == len(groups)


@pytest.mark.slow
def test_the_loop_learns(reinforce):
    """Sampled success from about a half to nearly always."""
    _, metrics, _, text = reinforce("learns", 1400, "--temperature", "1.0", "--noise", "shared", "--tasks", "up",
                                    "--groups", "8", "--updates", "4", learning_rate=1e-2, save_interval=0)
    assert metrics[0]["success"] < 0.7 and np.mean([line["success"] for line in metrics[-3:]]) > 0.85, text


def test_it_learns(policy):
    """A few updates on one group make what its better episodes did likelier, and the others' less likely."""
    vla = copy.deepcopy(policy.vla)
    learner, args = Policy(vla, policy.tokenizer, policy.norm_stats), arguments(noise="shared")
    episodes = play(learner, args)
    batch = collate([{**one} for one in rl.with_advantages(episodes, args, 4)], policy.tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(vla.parameters(), 1e-3)
    for _ in range(5):
        loss, moved = rl.policy_loss(vla, args, **batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    better = batch["advantage"][:, 0] > 0
    assert moved[better].mean() > 0.002 and moved[~better].mean() < -0.002


@pytest.mark.slow
def test_a_resumed_run_continues_with_new_episodes(reinforce):
    """The same groups and weights, to the bit, as a run without a break."""
    groups, metrics, whole, _ = reinforce("whole", 96)
    reinforce("resumed", 32)
    again, steps, resumed, text = reinforce("resumed", 96)
    assert "resumed" in text and again == groups and len({group["seed"] for group in groups}) == len(groups)
    assert [line["step"] for line in steps] == [line["step"] for line in metrics]
    for name in whole.shapes:
        assert torch.equal(whole.whole(name), resumed.whole(name)), name


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_two_ranks_are_one(reinforce, stage, tmp_path):
    """Each plays and trains on a share of the groups; the update is that of one rank."""
    groups, metrics, one, _ = reinforce("one", 64)
    sharded = ["--deepspeed_config", ds_json(tmp_path / "sharded.json", stage, bf16=False)]
    shared, both, two, _ = reinforce("two", 64, *sharded, count=2, per_device_batch_size=4)
    assert shared == groups
    for ours, theirs in zip(metrics, both, strict=True):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    for name in one.shapes:
        torch.testing.assert_close(one.whole(name), two.whole(name), rtol=0, atol=3e-4)


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Policy:
    """A policy with random weights."""
    keys = {**KEYS, "index_dir": str(tmp_path_factory.mktemp("index")), "data_root_dir": str(ROOT / "datasets")}
    tokenizer = load_tokenizer(TINY["tokenizer"], add_action_tokens=True)
    mixture = open_mixture(TrainConfig(**keys), tokenizer)
    torch.manual_seed(1)
    return Policy(VLA(mixture.cfg, tokenizer), tokenizer, mixture.statistics)


def arguments(**changes) -> SimpleNamespace:
    return SimpleNamespace(**{"temperature": 1.3, "noise": "independent", "execute": 4, "method": "grpo",
                              **changes})


def play(policy, args, count: int = 8, number: int = 0) -> list[dict]:
    """A group's episodes in this process."""
    world = PaperWorld([], policy.cfg.image_size)
    trials = world.begin("up", 3, count)
    episodes = [{"key": (number, i), "decisions": []} for i in range(count)]
    for steps in (4, 2):
        seen = world.look(trials)
        questions = [(episode, "move up", *one) for episode, one in zip(episodes, seen, strict=True)]
        for trial, actions in zip(trials, rl.decide(policy, args, questions), strict=True):
            for action in actions[:steps]:
                world.step(trial, action, False)
    for i, episode in enumerate(episodes):
        episode |= {"executed": 6, "success": i % 2 == 0}
    return episodes


def gradient(policy, args, decisions: list[dict]) -> torch.Tensor:
    batch = collate([{**one} for one in decisions], policy.tokenizer.pad_token_id)
    loss, _ = rl.policy_loss(policy.vla, args, **batch)
    return torch.cat([part.flatten() for part in torch.autograd.grad(
        loss, policy.vla.parameters(), allow_unused=True) if part is not None])


@pytest.mark.parametrize("method", ["grpo", "cloning"])
def test_what_was_not_executed_teaches_nothing(policy, method):
    """The tail of a chunk, and what comes after the end: other tokens there change no gradient."""
    args = arguments(method=method)
    decisions = rl.with_advantages(play(policy, args), args, policy.cfg.action_dim)
    steps = [one["weight"].reshape(5, -1).sum(1).tolist() for one in decisions if one["weight"].any()]
    assert steps == [[4, 4, 4, 4, 0], [4, 4, 0, 0, 0]] * (4 if method == "cloning" else 8)
    before = gradient(policy, args, decisions)
    for one in decisions:
        tokens = one["labels"][-21:-1]  # without </s>
        tokens[one["weight"] == 0] = policy.action_tokenizer.first_id
    assert torch.equal(before, gradient(policy, args, decisions))
    tokens = decisions[0]["labels"][-21:-1]
    tokens[0] += 1 if tokens[0] == policy.action_tokenizer.first_id else -1
    assert not torch.equal(before, gradient(policy, args, decisions))


def test_a_group_has_one_start(monkeypatch):
    """All its episodes see the same at first, act differently, and groups have different starts."""
    seen = {}

    def decide(questions):
        for episode, text, images, _ in questions:
            group, number = episode["key"]
            episode["decisions"].append({})
            seen.setdefault(group, {}).setdefault(number, (text, images[0].tobytes()))
        return [np.full((4, 4), episode["key"][1] - 3.5) for episode, *_ in questions]

    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    table = SimpleNamespace(directory=Path("."))
    recipe = SimpleNamespace(camera=lambda name: [name], action="action")
    args = SimpleNamespace(tasks=[], world="examples.rl.paper_world:PaperWorld", workers=2)
    worlds = rl.Worlds(args, TrainConfig(**KEYS), ("", 1, recipe, table), 0, 1)
    groups = [{"number": n, "seed": 300_000 + n, "task": worlds.tasks[n % 2]} for n in range(3)]
    played = worlds.play(groups, rl.GROUP, decide, one_by_one=False)
    worlds.close()
    assert [len({*seen[number].values()}) for number in range(3)] == [1, 1, 1] and len(seen[0]) == rl.GROUP
    assert len({start for group in seen.values() for start in group.values()}) == 3
    assert [[one["success"] for one in episodes] for episodes in played] == [
        [False] * 4 + [True] * 4, [True] * 4 + [False] * 4, [False] * 4 + [True] * 4]
    assert {(one["executed"], len(one["decisions"])) for one in played[0]} == {(6, 2)}


def test_a_groups_first_look_goes_through_the_model_once(policy):
    """Later looks differ, as do other groups'. What is computed is the same."""
    args = arguments()
    decisions = [one for number in range(2) for episode in play(policy, args, 3, number) for one in episode["decisions"]]
    assert len({int(one["look"]) for one in decisions}) == 2 * (1 + 3)
    for one in decisions:  # another picture for each look
        one["images"] = torch.full_like(one["images"], int(one["look"]) % 251)
    inputs = collate([{key: one[key] for key in ("images", "input_ids", "labels", "look")} for one in decisions], 0)
    rows = []
    [tower] = policy.vla.vision_backbone.values()
    hook = tower.register_forward_pre_hook(lambda tower, inputs: rows.append(len(inputs[0])))
    with torch.no_grad():
        shared = rl.token_log_probs(policy.vla, **inputs, temperature=1.0)
        separate = rl.token_log_probs(policy.vla, **{**inputs, "look": torch.arange(12)}, temperature=1.0)
    hook.remove()
    assert rows == [8, 12]
    torch.testing.assert_close(shared, separate)


def test_groups_of_one_value_teach_nothing(policy):
    args = arguments()
    for value in (False, True):
        episodes = [{**episode, "success": value} for episode in play(policy, args)]
        decisions = rl.with_advantages(episodes, args, policy.cfg.action_dim)
        assert not any(one["weight"].any() for one in decisions)
    advantages = {float(one["advantage"][0]) for one in rl.with_advantages(play(policy, args), args, 4)}
    assert sorted(advantages) == pytest.approx([-1.0, 1.0], abs=1e-4)


@pytest.mark.parametrize("noise", ["shared", pytest.param("independent", marks=pytest.mark.slow)])
def test_both_kinds_of_noise_sample_from_the_policy(policy, noise):
    """The marginals are the policy's. Shared: the steps of a chunk use the same number."""
    args, tokens = arguments(noise=noise, temperature=0.3), []
    for group in range(25):
        tokens += [one["decisions"][0] for one in play(policy, args, 40, group)]
    index = np.stack([one["labels"][-21:-1] for one in tokens]) - policy.action_tokenizer.first_id  # (1000, 20)
    batch = collate([{key: tokens[0][key] for key in ("images", "input_ids", "labels", "look")}], 0)
    with torch.no_grad():
        expected = rl.token_log_probs(policy.vla, **batch, temperature=0.3)[0].exp().cumsum(-1).numpy()
    for place in range(20):
        found = (index[:, place, None] <= np.arange(256)).mean(0)
        assert np.abs(found - expected[place]).max() < 0.07  # Kolmogorov-Smirnov, p < 0.0001
    together = np.corrcoef(index[:, 0], index[:, 4])[0, 1]
    assert together > 0.9 if noise == "shared" else abs(together) < 0.2


def test_tasks_that_are_uncertain_come_more_often():
    history = [{"task": task, "successes": count} for task, count in (("done", 8), ("half", 4), ("none", 0))] * 6
    drawn = [rl.draw_task(["done", "half", "none"], history, 7, number) for number in range(1000)]
    shares = {task: drawn.count(task) / 1000 for task in ("done", "half", "none")}
    assert shares["half"] > 0.7 and 0.03 < shares["done"] < 0.15 and 0.03 < shares["none"] < 0.15


@pytest.mark.skipif(not importlib.util.find_spec("mujoco"), reason="no MuJoCo")
def test_the_arm_begins_alike():
    """In a process of its own: TensorFlow and Mesa do not go together."""
    program = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}]
from examples.rl.worlds import Arm, Reach
for world, steps in (Arm(["outside"], []), 40), (Reach(["outside"], []), 1):
    trials = world.begin("blue", 300_001, 3)
    seen = [look for trial in trials for look in world.look([trial])]
    print({{images[0].tobytes() + state.tobytes() for images, state in seen}} == {{seen[0][0][0].tobytes() + seen[0][1].tobytes()}})
    print({{robot.instruction for robot in trials}} == {{"touch the blue disc"}})
    for number, robot in enumerate(trials):
        for _ in range(steps):
            world.step(robot, robot.expert() if number else -robot.expert(), False)
    print([world.succeeded(robot) for robot in trials] == [False, True, True])"""
    done = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, timeout=100)
    assert done.stdout.split() == ["True"] * 6, done.stdout + done.stderr
