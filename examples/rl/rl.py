"""Reinforcement learning on action tokens: a policy that gets better by trying (GRPO).

    python examples/rl/rl.py --config examples/rl/arm.yaml --deepspeed_config ds_configs/cpu.json \
        --world arm --execute 8 --episodes 8000 --set pretrained_checkpoint=runs/weak

An iteration plays groups of 8 episodes from one start each, with sampled actions. Training makes the tokens of
better episodes likelier than those of worse ones. Simulators: worlds.py. What goes wrong: docs/rl.md.
"""

import argparse
import functools
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's modules

from machinery.command_line import parse_command_line  # first: it names a missing package

# isort: split

import numpy as np
import torch
import torch.distributed as dist

from act import Policy
from action_tokenizer import IGNORE_INDEX
from data import collate, mix_bits, to_device
from examples.rl.worlds import Worlds
from machinery import zero
from machinery.connect import gather
from machinery.host import cores
from machinery.ranks import run_job
from machinery.run import settle
from model import at_positions
from train_vla import due, make_engine, open_data

GROUP = 8  # episodes from the same start
FIRST_SEED = 300_000  # of the starts: demonstrations have smaller ones, evaluations from 200,000 on
CLIP_LOW, CLIP_HIGH = 0.2, 0.28  # a token gains nothing from leaving 0.8 to 1.28 times its probability
ROUNDS = 3  # the first, and two that replace groups that teach nothing
GUARD = 0.1  # share of groups whose tasks are drawn evenly, against forgetting

def token_log_probs(vla, images, input_ids, labels, look, temperature: float, proprio=None):
    """The log-probabilities of the 256 action ids at each action token, (B, T, 256). Computed as in
    VLA.forward, once for equal looks (B,). Labels only mark places: no action token sees another."""
    _, rows, same = np.unique(look.cpu(), return_index=True, return_inverse=True)
    images, input_ids, labels = images[rows], input_ids[rows], labels[rows]
    inputs = vla.embed(images, input_ids, proprio if proprio is None else proprio[rows])  # (B', S, hidden)
    first = (labels != IGNORE_INDEX).int().argmax(1, keepdim=True) + inputs.shape[1] - labels.shape[1]
    places = first + torch.arange(vla.num_action_tokens, device=labels.device)  # (B, T)
    inputs = vla.insert_queries(inputs, places)
    hidden = vla.llm.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
    logits = vla.llm.get_output_embeddings()(at_positions(hidden, places - 1))
    ids = slice(vla.action_tokenizer.first_id, vla.action_tokenizer.vocab_size)
    return (logits[..., ids].float() / temperature).log_softmax(-1)[same]


def policy_loss(vla, args, labels, old, advantage, weight, **inputs):
    """-> the loss, and how far the executed tokens' probabilities have moved since sampling, (B, T).
    old (B, T): log-probabilities then; advantage (B, 1); weight (B, T): 0 if not executed."""
    log_probs = token_log_probs(vla, labels=labels, temperature=args.temperature, **inputs)
    tokens = labels[labels != IGNORE_INDEX].view(len(labels), -1)[:, :-1]  # (B, T), without </s>
    new = log_probs.gather(-1, (tokens - vla.action_tokenizer.first_id)[..., None])[..., 0]
    ratio = (new - old).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantage)
    if args.method == "cloning":  # the control: imitate the successful episodes
        gain = new * advantage
    return -(gain * weight).sum(), (ratio.detach() - 1) * (weight > 0)


def uniform_numbers(seed: int, keys: np.ndarray, chunk: int, dims: int, shared: bool) -> np.ndarray:
    """keys (B, 3): group, episode, decision -> numbers in 0..1 that look random, (B, chunk * dims).
    shared: one for all steps of a chunk, which then err to the same side: the robot goes elsewhere."""
    step = np.arange(chunk)[:, None] * (not shared)
    bits = mix_bits(seed, *keys.T[..., None, None], step, np.arange(dims))
    return bits.reshape(len(keys), -1) / 2.0**64


@torch.no_grad()
def decide(policy: Policy, args, questions: list[tuple]) -> list[np.ndarray]:
    """Sample the next actions for each (episode, instruction, images, state) -> (execute, A) each.
    Appends to each episode the decision, as a training sample."""
    vla, cfg, robot = policy.vla, policy.cfg, policy.convention(None)
    episodes, texts, images, states = zip(*questions, strict=True)
    views = torch.stack([policy.prepare_views(some) for some in images])  # as evaluation does
    _, prompts, states = policy.prepare(views, texts, None, robot.from_robot(np.stack(states)))
    first_id = vla.action_tokenizer.first_id
    answer = [first_id] * vla.num_action_tokens + [policy.tokenizer.eos_token_id]
    keys = np.array([(*episode["key"], len(episode["decisions"])) for episode in episodes])  # (B, 3)
    looks = mix_bits(keys[:, 0], keys[:, 1] * (keys[:, 2] > 0), keys[:, 2])  # the first: equal in a group
    samples = []
    for row, prompt in enumerate(prompts):
        samples.append({"images": views[row], "input_ids": np.array(prompt + answer), "look": looks[row].astype(np.int64),
                        "labels": np.array([IGNORE_INDEX] * len(prompt) + answer)})
        if cfg.use_proprio:
            samples[row]["proprio"] = states[row].float().cpu()
    batch = collate([{**sample} for sample in samples], policy.tokenizer.pad_token_id)
    log_probs = token_log_probs(vla, **to_device(batch, vla.llm.device), temperature=args.temperature)
    numbers = uniform_numbers(cfg.seed, keys, cfg.action_chunk, cfg.action_dim, args.noise == "shared")
    cumulative = log_probs.double().exp().cumsum(-1)  # (B, T, 256): ids have the order of actions
    numbers = torch.from_numpy(numbers).to(cumulative.device)[..., None]
    index = (cumulative <= numbers).sum(-1).clamp(max=255)  # (B, T)
    old, index = log_probs.gather(-1, index[..., None])[..., 0].cpu(), index.cpu()
    for row, episode in enumerate(episodes):
        samples[row]["labels"][-len(answer) : -1] = index[row] + first_id
        episode["decisions"].append({**samples[row], "old": old[row]})
    actions = robot.to_robot(policy.actions(index + first_id, None))
    return [*actions.reshape(len(actions), cfg.action_chunk, -1)[:, : args.execute]]


def with_advantages(episodes: list[dict], args, action_dim: int) -> list[dict]:
    """The decisions of a group's episodes, each with its advantage, and a weight for each token.
    A group that only succeeds or only fails teaches nothing: no episode is better than another."""
    rewards = np.array([episode["success"] for episode in episodes], np.float32)
    better = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    advantages = rewards if args.method == "cloning" else better
    decisions = []
    for episode, advantage in zip(episodes, advantages, strict=True):
        for number, decision in enumerate(episode["decisions"]):
            # of a chunk only the first steps are executed, and none after the end
            steps = min(args.execute, episode["executed"] - number * args.execute) * bool(advantage)
            weight = np.float32(np.arange(len(decision["old"])) < steps * action_dim)
            decisions.append({**decision, "advantage": np.float32([advantage]), "weight": weight})
    return decisions


def draw_task(tasks: list[str], history: list[dict], seed: int, number: int) -> str:
    """The task of a group. Tasks that succeed half of the time teach most: shares are p (1 - p),
    with p from a task's last four groups."""
    share = []
    for task in tasks:
        recent = [group["successes"] for group in history if group["task"] == task][-4:]
        p = (sum(recent) + 1) / (GROUP * len(recent) + 2)
        share.append(p * (1 - p))
    share = (1 - GUARD) * np.array(share) / sum(share) + GUARD / len(tasks)
    return tasks[np.searchsorted(np.cumsum(share)[:-1], mix_bits(seed, number) / 2.0**64)]


def collect(policy: Policy, args, worlds: Worlds, history: list[dict], step: int) -> list[dict]:
    """Play until args.groups groups teach something -> this rank's decisions. Adds every group that
    any rank played to the history, so that all ranks, and a resumed run, continue with the next."""
    decisions, missing = [], args.groups
    for _ in range(ROUNDS):
        groups = [{"step": step, "number": number, "seed": FIRST_SEED + number,
                   "task": draw_task(worlds.tasks, history, policy.cfg.seed, number)}
                  for number in range(len(history), len(history) + missing)]
        mine = groups[dist.get_rank() :: dist.get_world_size()]
        played = worlds.play(mine, GROUP, functools.partial(decide, policy, args),
                             one_by_one=policy.vla.llm.device.type == "cpu")
        for group, episodes in zip(mine, played, strict=True):
            group["successes"] = sum(episode["success"] for episode in episodes)
            decisions += with_advantages(episodes, args, policy.cfg.action_dim)
        history += sorted((one for some in gather(mine) for one in some), key=lambda one: one["number"])
        missing -= sum(0 < one["successes"] < GROUP + (args.method == "cloning") for one in history[-len(groups) :])
        if missing <= 0:
            break
    return [one for one in decisions if one["weight"].any()] or decisions[:1]  # every rank needs one


def update(engine, args, decisions: list[dict], accumulation: int, pad: int) -> dict:
    """An optimizer step for each of args.updates parts of the decisions -> numbers for the log."""
    part = np.array([decision["look"] % args.updates for decision in decisions])  # the same on any ranks
    moved = [[] for _ in range(args.updates)]
    for number in range(args.updates):
        mine = np.flatnonzero(part == number)
        tokens = sum(gather(float(sum(decisions[row]["weight"].sum() for row in mine))))
        scale = accumulation * dist.get_world_size() / max(1, tokens)  # DeepSpeed divides by the first two
        nothing = [{**decisions[0], "weight": decisions[0]["weight"] * 0}]
        for rows in np.array_split(mine, accumulation):  # neighbors may have the same look
            batch = collate([{**decisions[row]} for row in rows] or nothing, pad)
            batch["weight"] *= scale
            loss, change = engine(**to_device(batch, engine.device))
            engine.backward(loss)
            engine.step()  # acts after the last micro-batch
            moved[number].append(change.flatten())
    error, change = torch.cat(moved[0]).abs().max().item(), torch.cat(moved[-1])
    clipped = ((change < -CLIP_LOW) | (change > CLIP_HIGH)).float().mean().item()
    return {"ratio_error": max(gather(error)), "clipped": clipped, "grad_norm": float(engine.get_global_grad_norm()),
            "entropy": -float(np.mean([decision["old"].mean() for decision in decisions]))}  # of a token


def reinforce(args, cfg, ds_config, run, tables, tokenizer, weights) -> None:
    """The program, on every rank. Its arguments after the first are train_vla.train's."""
    mixture, held_out = open_data(cfg, tables, tokenizer)
    worlds = Worlds(args, cfg, tables[0], dist.get_rank(), dist.get_world_size())
    most = args.groups * GROUP * -(-worlds.horizon // args.execute)  # decisions of an iteration
    accumulation = -(-most // (args.updates * dist.get_world_size() * cfg.per_device_batch_size))
    engine = make_engine(cfg, ds_config, accumulation, tokenizer, weights, run)
    engine.module.forward = functools.partial(policy_loss, engine.module, args)
    zero.set_learning_rate(engine, cfg.learning_rate)
    run.describe(cfg, ds_config, mixture, held_out)
    policy = Policy(engine.module, tokenizer, mixture.statistics)
    path, history, step = run.path / "groups.jsonl", [], run.step
    if path.exists():  # what came after the checkpoint is played again, from the same starts
        history = [group for group in map(json.loads, path.open()) if group["step"] < step]
    while GROUP * len(history) < args.episodes:
        before, began = len(history), time.perf_counter()
        decisions = collect(policy, args, worlds, history, step)
        new, played = history[before:], time.perf_counter()
        values = update(engine, args, decisions, accumulation, tokenizer.pad_token_id)
        step += args.updates
        success = float(np.mean([group["successes"] for group in new])) / GROUP
        values |= {"success": success, "groups": len(new), "episodes": GROUP * len(history),
                   "play_s": played - began, "update_s": time.perf_counter() - played}
        run.log(step, values, values)
        if not run.quiet:
            path.write_text("".join(json.dumps(group) + "\n" for group in history))
        last = GROUP * len(history) >= args.episodes
        if due(cfg.save_interval, step // args.updates, last):  # its name's "loss": share of failures
            run.save(engine, step, step // args.updates, 1 - success, must=last)
    worlds.close()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False,
                                     epilog="and --config, --deepspeed_config, --set of train_vla.py")
    add = parser.add_argument
    add("--world", required=True, help="arm, metaworld, libero, or module:class")
    add("--tasks", nargs="*", default=[], help="of the world; default: all")
    add("--episodes", type=int, required=True, help="to play in all")
    add("--groups", type=int, default=8, help="useful ones in an iteration, of 8 episodes each")
    add("--updates", type=int, default=4, help="optimizer steps in an iteration")
    add("--execute", type=int, required=True, help="steps of a chunk before the next look")
    add("--temperature", type=float, default=0.5, help="of sampling, and so of training")
    add("--noise", choices=["shared", "independent"], default="shared", help="see uniform_numbers")
    add("--method", choices=["grpo", "cloning"], default="grpo", help="cloning: imitate successes")
    add("--workers", type=int, default=cores(), help="simulator processes; default: one per core")
    args, sys.argv[1:] = parser.parse_known_args()
    cfg, ds_config = parse_command_line(__doc__)
    if not cfg.parallel_decoding or cfg.action_head != "tokens" or cfg.window_size > 1:
        sys.exit("error: rl.py needs parallel_decoding, action_head: tokens, and window_size: 1")
    cfg = cfg.model_copy(update={"is_resume": False})  # start from pretrained_checkpoint's weights
    run_job(lambda: reinforce(args, **settle(cfg, ds_config)))


if __name__ == "__main__":
    main()
