"""Faults of a policy that show without a robot: its training data, statistics, weights, prompt.

The loss on its own training frames should be the one that its training reported, and worse if a
frame gets another picture, text, prompt or attention mask. Read `model_causes`.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from act import Policy
from action_tokenizer import PROMPTS, SENTENCEPIECE_SPACE, prompt_ids
from data import Mixture
from machinery.examine import Cause, batches, log_likelihood, look, spread
from machinery.files import read_metrics
from machinery.peers import distances, evenly
from machinery.survey import survey
from machinery.survey_numbers import bounds

BETTER = 0.2  # nats per token: a difference that is no accident


def model_causes(policy: Policy, train: Mixture, held_out: Mixture | None, run: Path
                 ) -> Iterator[Cause]:
    """run: the run's directory, or one of its checkpoints."""
    cfg, table = policy.cfg, train.tables[0]
    for finding in survey(table, cfg.action_normalization, cfg.action_chunk):
        if finding.severity == "high" and finding.kind not in ("idle", "unused_split"):
            yield Cause(0.6, "data", finding.text, finding.cure)
    if wrong := statistics_cause(policy, train):
        yield wrong
        return  # all losses follow from it
    loss = loss_of(policy, train)
    blind = loss_of(policy, train, own_pictures=False)
    chance = entropy(train)
    logged, step = logged_loss(run)
    logged *= 1 + 1 / policy.vla.num_action_tokens  # which counts </s>, whose loss is 0
    text = f"the loss on its own training frames is {loss:.2f} nats per token, "
    as_logged = loss < max(1.2 * logged, logged + BETTER)
    if loss > 0.8 * chance or (logged and not as_logged):
        if better := other_reading(policy, train, loss):
            yield better
        elif logged and as_logged:
            yield Cause(0.9, "training", f"{text}{chance:.2f} without any learning: too few steps "
                        f"({step:.0f})", "train longer (max_steps)")
        else:
            known = f"{logged:.2f} in its metrics.jsonl, " if logged else ""
            yield Cause(1.0, "model", f"{text}{known}{chance:.2f} without any learning: these are "
                        "not the trained weights (base weights, or an adapter that is not merged), "
                        "or it has hardly learned", "export or merge this run's own checkpoint "
                        "again (export_vla.py), or train longer")
        return
    if blind - loss < 0.05:
        yield Cause(0.8, "model", f"pictures hardly matter: {text}with other frames' pictures "
                    f"{blind:.2f}", "data.py --inspect draws what its camera sees")
    elif not logged and (better := other_reading(policy, train, loss)):
        yield better
    if ignored := text_cause(policy, train, loss):
        yield ignored
    unknown = loss_of(policy, held_out) if held_out else loss
    if unknown > loss + 1.0:
        yield Cause(0.4, "training", f"the loss is {loss:.2f} on training frames and {unknown:.2f} "
                    "on held-out ones: it has memorized them (overfitting)",
                    "record more episodes, train shorter, or set image_aug: true")
    if step < 0.9 * cfg.max_steps:
        yield Cause(0.2, "weak", f"{text}at step {step:.0f} of {cfg.max_steps}",
                    "train to the end, or use the last checkpoint")


# ---- The loss ------------------------------------------------------------------------------------


def loss_of(policy: Policy, mixture: Mixture, prompt: Callable | None = None,
            own_pictures: bool = True) -> float:
    """Nats per action token, as in training, or with another prompt, a function of the instruction,
    or with other frames' pictures."""
    own = mixture.prompt
    mixture.prompt = prompt or own
    found = []
    try:
        for batch in batches(mixture, spread(mixture), policy.vla.llm.device):
            if not own_pictures:
                batch["images"] = batch["images"].roll(len(batch["images"]) // 2, dims=0)
            found.append(-log_likelihood(policy.vla, batch).mean(1).cpu().numpy())
    finally:
        mixture.prompt = own
    return float(np.concatenate(found).mean())


def entropy(mixture: Mixture) -> float:
    """The loss of answers that only know how frequent each token is, in nats."""
    rows = spread(mixture, 5000)
    ids = mixture.action_tokenizer.encode(mixture.actions(0, rows).reshape(len(rows), -1))
    found = []
    for column in ids.T:
        share = np.unique(column, return_counts=True)[1] / len(rows)
        found.append(-(share * np.log(share)).sum())
    return float(np.mean(found))


def logged_loss(run: Path) -> tuple[float, float]:
    """The last loss that the training of these weights reported, and its step. (0, inf) if there
    is no log."""
    name = re.match(r"step-(\d+)", run.name)
    last = int(name[1]) if name else np.inf
    logs = map(read_metrics, (run, *run.parents[:2]))
    lines = [line for line in next(filter(None, logs), ())
             if "loss" in line and line["step"] <= last]
    return (lines[-1]["loss"], lines[-1]["step"]) if lines else (0.0, np.inf)


# ---- Other readings of the same weights ----------------------------------------------------------


def other_reading(policy: Policy, mixture: Mixture, loss: float) -> Cause | None:
    """The prompt or the attention mask with which the weights explain the frames far better."""
    tokenizer, cfg = policy.tokenizer, policy.cfg
    space = tokenizer.convert_tokens_to_ids(SENTENCEPIECE_SPACE)
    tries = {}
    for style in PROMPTS:
        ask = functools.partial(prompt_ids, tokenizer, prompt_style=style)
        changed = {"": ask, f", without the token {space} at its end": lambda text, ask=ask: [
            token for token in ask(text) if token != space]}
        for more, prompt in changed.items():
            if style != cfg.prompt_style or more:
                tries[f"prompt_style {style}{more}"] = loss_of(policy, mixture, prompt)
    if cfg.parallel_decoding:
        with full_attention(policy):
            tries["full attention"] = loss_of(policy, mixture)
    best = min(tries, key=tries.__getitem__)
    if tries[best] > 0.7 * loss:
        return None
    cure = "act with causal attention only as it was trained, or train it again here"
    if best != "full attention":
        cure = f"act with the prompt of its training: {best}"
    return Cause(0.95, "model", f"the loss on its own training frames is {loss:.2f} as it is "
                 f"configured (causal attention, prompt_style {cfg.prompt_style}), and "
                 f"{tries[best]:.2f} with {best}", cure)


@contextlib.contextmanager
def full_attention(policy: Policy) -> Iterator[None]:
    """Within this block, each position of an unpadded sequence sees all others."""
    def see_all(module, arguments, options):
        inputs = options["inputs_embeds"]
        size = inputs.shape[1]
        options["attention_mask"] = inputs.new_zeros(len(inputs), 1, size, size)
        return arguments, options

    hook = policy.vla.llm.base_model.register_forward_pre_hook(see_all, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def text_cause(policy: Policy, mixture: Mixture, loss: float) -> Cause | None:
    """Instructions that make no difference, although the pictures do not tell the task."""
    table = mixture.tables[0]
    first, _, _ = mixture.stretches[0]
    first = first[evenly(len(first), 100)]
    texts = table.frames["instruction"][first]
    every = sorted({table.instructions[number] for number in texts})
    if len(every) < 2 or len(first) < 8:
        return None
    other = dict(zip(every, every[1:] + every[:1], strict=True))
    swapped = loss_of(policy, mixture, lambda text, own=mixture.prompt: own(other.get(text, text)))
    if swapped > loss + BETTER:
        return None
    seen = [look(policy.vla, batch["images"]) for batch in
            batches(mixture, first, policy.vla.llm.device)]
    seen = np.concatenate(seen).reshape(len(first), -1)
    apart = distances(seen, seen) + np.diag([np.inf] * len(first))
    told = (texts[apart.argmin(1)] == texts).mean()
    if told > 0.9:
        return None
    return Cause(0.85, "model", f"the text is ignored: the loss on training frames is {loss:.2f}, "
                 f"with another instruction {swapped:.2f}, though the first pictures tell the task "
                 f"in only {told:.0%} of the episodes", "check that each episode has its own "
                 "instruction (data.py --inspect), and record tasks that only the text tells apart")


# ---- Statistics ----------------------------------------------------------------------------------


def statistics_cause(policy: Policy, mixture: Mixture) -> Cause | None:
    """Statistics of the checkpoint that are not those of the training data."""
    name, kind = mixture.names[0], policy.cfg.action_normalization
    for part in ("action", "proprio")[: 1 + policy.cfg.use_proprio]:
        own = np.array(bounds(policy.norm_stats[name][part], kind))
        data = np.array(bounds(mixture.tables[0].statistics[part], kind))
        if own.shape != data.shape:
            continue
        width = data[1] - data[0]
        away = np.abs(own - data).max(0) / np.maximum(width, 1e-6)
        away = np.where(width > 1e-6, away, 0)
        if away.max() > 0.1:
            dim = int(away.argmax())
            text = (f"the statistics of the checkpoint are not those of the dataset: {part} "
                    f"{dim} is {own[0, dim]:.3g}..{own[1, dim]:.3g} there and "
                    f"{data[0, dim]:.3g}..{data[1, dim]:.3g} in {mixture.tables[0].directory}")
            return Cause(0.95, "statistics", text, "put back the dataset_statistics.json of this "
                         "training, or name its dataset with --dataset")
    return None
