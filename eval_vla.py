"""Evaluate a model in open loop: let it act on recorded frames, and compare with what was recorded.

    python eval_vla.py --checkpoint runs/demo+n1+b32+x7                      on held-out episodes
    python eval_vla.py --checkpoint runs/demo+n1+b32+x7 --on-train-frames    on frames it learned from
    python eval_vla.py --checkpoint openvla/openvla-7b --config my_robot.yaml    any model on a YAML's data

Every frame is answered by Policy.predict_action from the image as it was recorded, exactly as a robot would
ask. For each dataset and action dimension this prints the accuracy of the action tokens, L1 in normalised
units (-1..1) and in those of the dataset, and beside each what always answering the most frequent bin of the
training data would give. eval.json keeps the numbers, eval.png shows some episodes, recorded against
predicted: both in the run's directory. A low open-loop error does not prove a good policy, but a high one
proves a bad one. The third command is what a fine-tuning should improve on: a model that does not know the
data acts by their statistics, or, with --unnorm_key, by those of a dataset that it knows.

Robots fail most often because acting prepares its inputs in another way than training did: red and blue
swapped, another resize, another prompt, other statistics. So the same frames are answered in three ways:

    accuracy_teacher_forced   training's inputs (data.py), each token after the recorded ones: as its log
    accuracy_greedy           training's inputs, each token after the model's own
    accuracy_inference        Policy.predict_action on the recorded image

The first reproduces the log (accuracy_logged; while training the weights still moved, and images were
augmented). The last two agree, token for token (`agreement`), unless preparing the inputs differs: that is a
warning, and with --on-train-frames an error. Where the model was trained with augmentation, all three see the
centre crop it acts with.
"""

import argparse
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from act import Policy, load_vla
from action_tokenizer import unnormalize
from data import IGNORE_INDEX, Mixture, collate
from machinery import oxe
from machinery.checkpoint import Checkpoint, Tensors
from machinery.config import TrainConfig, UserError, exit_with_one_line, find_input, load_config
from machinery.frames import DataError
from machinery.images import decode_native
from machinery.run import step_of
from machinery.weights import open_weights

BATCH = 16  # frames the model sees at once
EPISODES, EPISODE_FRAMES = 3, 300  # drawn in the PNG
TOLERANCE = 0.03  # "a few points" of accuracy


# ------------------------------------------------------------------------------------------------------------
# Three answers to the same frames. A frame is (dataset number, row of its frame table, epoch).


def act(policy: Policy, mixture: Mixture, frames: list[tuple]) -> tuple[np.ndarray, np.ndarray]:
    """What a robot would get, for frames of one dataset: (action tokens (B, T), actions (B, action_chunk,
    action_dim) in the dataset's units)."""
    dataset, (table, cfg) = frames[0][0], (mixture.tables[frames[0][0]], mixture.cfg)
    views, texts = [], []
    for d, row, epoch in frames:
        first = int(table.first_frames[table.episode_of(row)])
        images = [table.read_image(max(row - past, first), table.cameras.index(key))
                  for past in range(cfg.window_size - 1, -1, -1)
                  for key in mixture.cameras_shown(d, row, epoch)]
        black = np.zeros((cfg.image_size, cfg.image_size, 3), np.uint8)  # for a camera that is not there
        views.append([decode_native(image) if image else black for image in images])
        texts.append(table.instructions[table.frames["instruction"][row]])
    proprio = np.stack([table.frames["proprio"][row] for _, row, _ in frames]) if cfg.use_proprio else None
    # predict_action would not tell the tokens, and speak in the robot's terms
    tokens = policy.generate(*policy.prepare(views, texts, mixture.names[dataset], proprio))
    actions = policy.actions(tokens, mixture.names[dataset])
    return tokens.cpu().numpy(), actions.reshape(len(frames), cfg.action_chunk, cfg.action_dim)


@torch.inference_mode()
def recall(policy: Policy, mixture: Mixture, frames: list[tuple]
           ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """From training's own inputs: (teacher-forced, greedy, true) action tokens, each (B, T)."""
    samples = [mixture.sample(*frame) for frame in frames]
    prompts = [sample["input_ids"][sample["labels"] == IGNORE_INDEX].tolist() for sample in samples]
    batch = collate(samples, mixture.tokenizer.pad_token_id)
    batch = {key: value.to(policy.vla.llm.device) for key, value in batch.items() if key != "dataset"}
    _, forced, true = policy.vla(**batch)
    greedy = policy.generate(batch["images"], prompts, batch.get("proprio"))
    return forced.cpu().numpy(), greedy.cpu().numpy(), true.cpu().numpy()


# ---- Numbers -----------------------------------------------------------------------------------------------


def measure(mixture: Mixture, d: int, rows: np.ndarray, answers: dict[str, np.ndarray], constant: np.ndarray
            ) -> dict:
    """How good the answers to frames `rows` (R,) of dataset d are.

    answers: tokens (R, T) by name: true, inference, ...; and `actions` (R, action_chunk, action_dim).
    constant: the most frequent token for each of the T. Accuracy and normalised L1 are training's: of tokens,
    and of their bins' centres. The L1 in the dataset's units is against the recorded action itself, as far as
    the episode goes.
    """
    tokenizer, cfg = mixture.action_tokenizer, mixture.cfg
    recorded, shape = record(mixture, d, rows), (len(rows), cfg.action_chunk, cfg.action_dim)
    frequent = np.broadcast_to(constant, answers["true"].shape)
    kind, stats = cfg.action_normalization, mixture.statistics[mixture.names[d]]["action"]
    frequent_actions = unnormalize(tokenizer.decode(frequent).reshape(shape), stats, kind)
    result: dict = {"frames": len(rows)}
    for name, tokens, actions in (("inference", answers["inference"], answers["actions"]),
                                  ("most_frequent_bin", frequent, frequent_actions)):
        correct = (tokens == answers["true"]).reshape(shape)
        normalised = np.abs(tokenizer.decode(tokens) - tokenizer.decode(answers["true"])).reshape(shape)
        physical = np.abs(actions - recorded)
        result[name] = {
            "accuracy": float(correct.mean()), "accuracy_per_dim": correct.mean((0, 1)).tolist(),
            "l1": float(normalised.mean()), "l1_per_dim": normalised.mean((0, 1)).tolist(),
            "l1_units_per_dim": np.nanmean(physical, (0, 1)).tolist()}
    return result


def record(mixture: Mixture, d: int, rows: np.ndarray) -> np.ndarray:
    """The recorded actions (R, action_chunk, action_dim) that follow frames `rows`, in the dataset's units;
    NaN past the end of the episode."""
    table = mixture.tables[d]
    episode = table.episodes[table.episode_of(rows)]
    wanted = rows[:, None] + np.arange(mixture.cfg.action_chunk)
    last = (episode["first"] + episode["count"])[:, None].astype(np.int64) - 1
    actions = table.frames["action"][np.minimum(wanted, last)].astype(np.float64)
    actions[wanted > last] = np.nan
    return actions


def most_frequent_tokens(mixture: Mixture, d: int, samples: int) -> np.ndarray:
    """The most frequent id of each action token (T,) in dataset d: the answer that knows no image."""
    index = np.linspace(0, mixture.sizes[d] - 1, min(samples, mixture.sizes[d])).astype(np.int64)
    actions = mixture.actions(d, mixture.rows(np.full(len(index), d), index))
    tokens = mixture.action_tokenizer.encode(actions.reshape(len(index), -1))
    return np.array([np.bincount(column).argmax() for column in tokens.T])


def logged_accuracy(run_dir: Path, step: int, samples: int, global_batch: int, on_train_frames: bool
                    ) -> float | None:
    """What training logged: on held-out frames at this step, or on the last `samples` training frames."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    lines = [json.loads(line) for line in lines if step_of(line) < math.inf]  # one may be cut short
    if not on_train_frames:
        return next((line["eval/accuracy"] for line in lines
                     if line["step"] == step and "eval/accuracy" in line), None)
    lines = [line for line in lines if "accuracy" in line and line["step"] <= step]
    total = seen = 0.0
    for line, before in zip(reversed(lines), [*reversed(lines[:-1]), {"step": 0}], strict=False):
        steps = line["step"] - before["step"]
        total, seen = total + steps * line["accuracy"], seen + steps
        if seen * global_batch >= samples:
            break
    return total / seen if seen else None


def verdict(accuracy: dict[str, float], agreement: float, frames: int, strategy: str
            ) -> tuple[str | None, list[str]]:
    """What the accuracies say: the mismatch between training and acting, if there is one, and what else is
    worth knowing."""
    mismatch, remarks = None, []
    forced, greedy, inference = (accuracy[name] for name in ("teacher_forced", "greedy", "inference"))
    if agreement < 1 - TOLERANCE:
        mismatch = (f"{1 - agreement:.1%} of the action tokens are others when it acts on the recorded "
                    f"images (accuracy {inference:.3f}) than on training's inputs ({greedy:.3f}), so acting "
                    f"prepares them differently: compare image_resize_strategy ({strategy}), the order of "
                    "colours and cameras, the prompt and the statistics")
    if forced - greedy > TOLERANCE:
        remarks.append(f"note: {forced:.3f} after the recorded tokens, {greedy:.3f} after its own: a mistake "
                       "in one token leads to others; no fault of the inputs")
    if forced < accuracy.get("logged", 0.0) - 2 * TOLERANCE - frames ** -0.5:  # two standard errors
        remarks.append(f"warning: the saved weights reach {forced:.3f} where training logged "
                       f"{accuracy['logged']:.3f}: config.json or the data are not those of the training")
    return mismatch, remarks


# ---- The picture -------------------------------------------------------------------------------------------


COLOURS = {"recorded": "black", "predicted": "darkorange"}


def draw_episodes(policy: Policy, mixture: Mixture, path: Path) -> None:
    """Some episodes side by side, a row for each number of the robot's action, in its own terms."""
    episodes = [(d, first, count) for d, (firsts, counts, _) in enumerate(mixture.stretches)
                for first, count in zip(firsts.tolist(), counts.tolist(), strict=True)]
    chosen = [episodes[i] for i in np.unique(np.linspace(0, len(episodes) - 1, EPISODES).astype(int))]
    rows_needed = max(len(policy.convention(mixture.names[d]).action) for d, *_ in chosen)
    width, height, left, top = 520, 120, 90, 76
    sheet = Image.new("RGB", (width * len(chosen), height * rows_needed + top), "white")
    pen, small, large = ImageDraw.Draw(sheet), ImageFont.load_default(13), ImageFont.load_default(16)
    for column, (d, first, count) in enumerate(chosen):
        name, table, x = mixture.names[d], mixture.tables[d], column * width
        robot, rows = policy.convention(name), first + np.arange(min(count, EPISODE_FRAMES))
        batches = [[(d, row, 0) for row in rows[i : i + BATCH].tolist()] for i in range(0, len(rows), BATCH)]
        predicted = np.concatenate([act(policy, mixture, batch)[1][:, 0] for batch in batches])  # (R, A)
        curves = {"recorded": robot.to_robot(record(mixture, d, rows)[:, 0]),
                  "predicted": robot.to_robot(predicted)}
        text = table.instructions[table.frames["instruction"][first]]
        title = f"{name}, episode {table.episode_of(first)}, {len(rows)} frames"
        pen.multiline_text((x + left, 6), f"{title}\n{text[:50]}", "black", large)
        for i, (label, colour) in enumerate(COLOURS.items()):
            pen.line((x + left + 110 * i, 60, x + left + 24 + 110 * i, 60), colour, 3)
            pen.text((x + left + 30 + 110 * i, 52), label, colour, small)
        for dim, label in enumerate(robot.action):
            box = (x + left, top + dim * height + 18, x + width - 16, top + (dim + 1) * height - 4)
            draw_curves(pen, small, box, label, {key: values[:, dim] for key, values in curves.items()})
    sheet.save(path)


def draw_curves(pen: ImageDraw.ImageDraw, font, box: tuple, title: str, curves: dict[str, np.ndarray]
                ) -> None:
    """Curves (R,) in a frame, with its name above and its range on the left."""
    left, top, right, bottom = box
    values = np.concatenate([*curves.values()])
    low, high = values.min(), max(values.max(), values.min() + 1e-6)
    pen.rectangle(box, outline="lightgray")
    for y, text in ((top, f"{high:.3g}"), (bottom - 15, f"{low:.3g}")):
        pen.text((left - 6, y), text, "gray", font, anchor="ra")
    pen.text((left, top - 17), title, "dimgray", font)
    for label, curve in curves.items():
        x = np.linspace(left, right, len(curve))
        y = bottom - 4 - (curve - low) / (high - low) * (bottom - top - 8)
        pen.line([*zip(x.tolist(), y.tolist(), strict=True)], COLOURS[label], 2)


# ---- The program -------------------------------------------------------------------------------------------


def evaluate(policy: Policy, checkpoint: Tensors, cfg: TrainConfig, samples: int, on_train_frames: bool,
             out: Path) -> None:
    """Do all of it, and raise DataError if training and acting do not match on training frames."""
    learned, step = open_mixture(policy, cfg, True), 0
    mixture = learned if on_train_frames else open_mixture(policy, cfg, False)
    if (Path(checkpoint.where) / "checkpoint.json").exists():
        ours = Checkpoint(checkpoint.where)
        step, run_dir = ours.meta["step"], ours.run_dir
    known = cfg.global_batch_size * step if step and cfg.data_mix == policy.cfg.data_mix else 0
    samples = min(samples, (known if on_train_frames else 0) or int(mixture.sizes.sum()))
    frames = choose_frames(mixture, known - samples if known and on_train_frames else 0, samples)

    results, every = {}, []
    for d in np.unique(frames[:, 0]).tolist():
        chosen = frames[frames[:, 0] == d]
        answers = ask(policy, mixture, chosen)
        every.append(answers)
        results[mixture.names[d]] = measure(mixture, d, chosen[:, 1], answers,
                                            most_frequent_tokens(learned, d, samples))
        report(mixture.names[d], results[mixture.names[d]])
    tokens = {name: np.concatenate([answers[name] for answers in every])
              for name in ("teacher_forced", "greedy", "inference", "true")}
    accuracy = {name: float((tokens[name] == tokens["true"]).mean()) for name in [*tokens][:3]}
    agreement = float((tokens["greedy"] == tokens["inference"]).mean())
    if known and (logged := logged_accuracy(run_dir, step, samples, cfg.global_batch_size, on_train_frames)):
        accuracy = {"logged": logged, **accuracy}
    print(f"{'train' if on_train_frames else 'held-out'} frames {len(frames)} "
          + " ".join(f"accuracy_{name} {value:.4f}" for name, value in accuracy.items())
          + f" agreement {agreement:.4f}")
    mismatch, remarks = verdict(accuracy, agreement, len(frames), cfg.image_resize_strategy)
    facts = {"checkpoint": str(checkpoint.where), "data_mix": cfg.data_mix,
             "on_train_frames": on_train_frames, "frames": len(frames), "accuracy": accuracy,
             "agreement": agreement, "mismatch": mismatch, "datasets": results}
    out.with_suffix(".json").write_text(json.dumps(facts, indent=2))
    draw_episodes(policy, mixture, out)
    print(f"wrote {out} {out.with_suffix('.json')}")
    for remark in remarks:
        print(remark)
    if mismatch and on_train_frames:
        raise DataError(mismatch)
    if mismatch:
        print(f"warning: {mismatch}")


def choose_frames(mixture: Mixture, first: int, samples: int) -> np.ndarray:
    """The frames of `samples` training samples from number `first` on, (R, 3): dataset, row, epoch. All that
    there are, if no more than that; none twice while there are others."""
    if first == 0 and samples >= mixture.sizes.sum():
        dataset = np.repeat(np.arange(len(mixture.sizes)), mixture.sizes)
        index = np.concatenate([np.arange(size) for size in mixture.sizes])
        return np.stack([dataset, mixture.rows(dataset, index), np.zeros_like(index)], axis=1)
    frames = np.stack(mixture.draw(first, samples), axis=1)
    return frames if first else frames[frames[:, 2] == 0]


def open_mixture(policy: Policy, cfg: TrainConfig, train: bool) -> Mixture:
    """The data, normalised by the model's own statistics."""
    mixture = Mixture(cfg, policy.tokenizer, train)
    if mixture.action_dim != cfg.action_dim:
        raise DataError(f"data_mix {cfg.data_mix}: its actions have {mixture.action_dim} dimensions, the "
                        f"model's {cfg.action_dim}")
    mixture.proprio_dim = cfg.proprio_dim
    for name, ours in mixture.statistics.items():
        theirs = policy.norm_stats.setdefault(name, ours)  # one that it does not know: see `main`
        if cfg.use_proprio:
            width, known = (len(stats["proprio"]["mean"]) for stats in (ours, theirs))
            if width != known or width > cfg.proprio_dim:
                raise DataError(f"{name}: its state has {width} numbers, the model's "
                                f"{min(known, cfg.proprio_dim)}: correct `state` in its recipe")
        if train and not all(np.allclose(ours["action"][key], theirs["action"][key], rtol=1e-3, atol=1e-6)
                             for key in ("q01", "q99", "mean")):  # the mean: of a gripper, inverted or not
            print(f"warning: {name}: not the dataset that the model was trained on, or another recipe: its "
                  "actions have other statistics; the model's are used")
        mixture.statistics[name] = theirs
    return mixture


def ask(policy: Policy, mixture: Mixture, frames: np.ndarray) -> dict[str, np.ndarray]:
    """All answers to frames (R, 3) of one dataset, as `measure` takes them."""
    parts = []
    for i in tqdm(range(0, len(frames), BATCH), mixture.names[frames[0, 0]], unit="batch", leave=False):
        batch = [tuple(frame) for frame in frames[i : i + BATCH].tolist()]
        parts.append([*recall(policy, mixture, batch), *act(policy, mixture, batch)])
    names = ("teacher_forced", "greedy", "true", "inference", "actions")
    return {name: np.concatenate(part) for name, part in zip(names, zip(*parts, strict=True), strict=True)}


def report(name: str, result: dict) -> None:
    """Print a dataset's numbers."""
    model, constant = result["inference"], result["most_frequent_bin"]
    print(f"dataset {name} frames {result['frames']} accuracy {model['accuracy']:.4f} most_frequent_bin "
          f"{constant['accuracy']:.4f} l1 {model['l1']:.4f} most_frequent_bin {constant['l1']:.4f}")
    for dim in range(len(model["l1_per_dim"])):
        values = [(key, model[f"{key}_per_dim"][dim], constant[f"{key}_per_dim"][dim])
                  for key in ("accuracy", "l1", "l1_units")]
        print(f"dataset {name} dim {dim}",
              *(f"{key} {ours:.4g} most_frequent_bin {theirs:.4g}" for key, ours, theirs in values))


DATA = "data_mix data_root_dir datasets balance_weights index_dir skip_bad_episodes".split()


def data_config(policy: Policy, args: argparse.Namespace) -> TrainConfig:
    """The model's config, with the data that the command line means. Raises UserError."""
    given = {key: value for key in ("data_mix", "data_root_dir") if (value := getattr(args, key))}
    said = policy.cfg.model_fields_set
    if args.config:
        theirs = load_config(find_input(args.config))
        given = {**{key: getattr(theirs, key) for key in DATA}, **given}
    if missing := [f"--{key}" for key in ("data_mix", "data_root_dir") if key not in {*said, *given}]:
        raise UserError(f"{args.checkpoint} does not say on what data: give --config, or "
                        f"{' and '.join(missing)}")
    cfg = policy.cfg.model_copy(update=given)
    cfg = cfg.model_copy(update={"data_root_dir": find_input(cfg.data_root_dir)})
    unknown = [name for name, *_ in oxe.find_datasets(cfg) if name not in policy.norm_stats]
    if args.unnorm_key:
        policy.dataset_name(args.unnorm_key)  # raises UserError
    for name in unknown:
        if args.unnorm_key:
            policy.norm_stats[name] = policy.dataset_statistics(args.unnorm_key)
        print(f"the model does not know {name}: it acts by the statistics of {args.unnorm_key or 'the data'}")
    return cfg


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="a run, a checkpoint, OpenVLA's, or a hub id")
    parser.add_argument("--config", metavar="YAML", help="on whose data; default: those it was trained on")
    parser.add_argument("--data_mix", help="mixture or dataset, instead")
    parser.add_argument("--data_root_dir", help="folder of the datasets, instead")
    parser.add_argument("--unnorm_key", help="a dataset the model knows, to act so on one that it does not")
    parser.add_argument("--samples", type=int, default=1024, help="how many frames, none twice")
    parser.add_argument("--on-train-frames", action="store_true", help="the last frames it learned from")
    parser.add_argument("--out", type=Path, help="picture; numbers go beside it; default: with the run")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    with exit_with_one_line():
        if args.samples < 1 or (args.out and args.out.suffix not in (".png", ".jpg")):
            raise UserError(f"--samples {args.samples} --out {args.out}: expected at least 1 and a .png")
        policy = load_vla(args.checkpoint, *(("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)))
        cfg = data_config(policy, args)
        tensors = open_weights(args.checkpoint).tensors
        own = Path(tensors.where) / "checkpoint.json"
        folder = own.parents[2] if own.exists() else Path()
        out = args.out or folder / ("eval_train.png" if args.on_train_frames else "eval.png")
        out.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(out.parent, os.W_OK) or out.is_dir():  # said before minutes of evaluating
            raise UserError(f"{out} cannot be written to: say with --out where the picture goes")
        evaluate(policy, tensors, cfg, args.samples, args.on_train_frames, out)


if __name__ == "__main__":
    main()
