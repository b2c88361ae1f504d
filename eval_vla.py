"""Evaluate a model in open loop: let it act on recorded frames and compare with the recording.

    python eval_vla.py --checkpoint runs/demo+n1+b32+x7                    on held-out episodes
    python eval_vla.py --checkpoint runs/demo+n1+b32+x7 --on-train-frames  on frames it learned from
    python eval_vla.py --checkpoint openvla/openvla-7b --config YAML       any model on other data

For each dataset and action dimension this prints the accuracy of the action tokens and the L1
error, normalized (-1..1), and for each number of the robot's action the L1 error in its own units
(degrees, 0..255, ...). Beside each is the value for always answering the most frequent bin of the
training data. eval.json keeps the numbers and eval.png shows some episodes, recorded and predicted;
both go into the run's or export's directory. A low open-loop error does not prove a good policy,
but a high one proves a bad one. The third command gives the baseline for fine-tuning: a model that
does not know the data acts by their statistics or, with --unnorm_key, by a dataset's that it knows.

Robots fail most often because acting prepares the inputs in another way than training did: swapped
red and blue, another resize, prompt or statistics. So the same frames are answered in three ways:

    accuracy_teacher_forced   training's inputs (data.py), each token after the recorded ones
    accuracy_greedy           training's inputs, each token after the model's own
    accuracy_inference        acting's inputs: the recorded image through Policy.prepare

The first reproduces the training log (accuracy_logged; there the weights still changed and images
were augmented). The last two agree token for token (`agreement`) if acting prepares the inputs
correctly. If they do not, that is a warning, and with --on-train-frames an error. A model trained
with augmentation gets the same center crop in all three.
"""

import argparse
from pathlib import Path

from machinery.config import TrainConfig, UserError, exit_with_one_line, find_input, load_config


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="a run, a checkpoint, or a hub id")
    parser.add_argument("--center_crop", choices=["yes", "no"],
                        help="show the middle of each image; default: as the checkpoint says")
    parser.add_argument("--config", metavar="YAML", help="its data; default: the training's")
    parser.add_argument("--data_mix", help="another mixture or dataset")
    parser.add_argument("--data_root_dir", help="another folder of datasets")
    parser.add_argument("--unnorm_key", help="a dataset the model knows, to act so on unknown ones")
    parser.add_argument("--samples", type=int, default=1024, help="how many frames, none twice")
    parser.add_argument("--on-train-frames", action="store_true", help="the last it learned from")
    parser.add_argument("--out", type=Path, help="PNG, with a JSON; default: beside the checkpoint")
    return parser.parse_args()


if __name__ == "__main__":
    read_options()  # mistakes and --help, before PyTorch is imported for seconds

import numpy as np
import torch
from tqdm import tqdm

from act import Policy
from action_tokenizer import unnormalize
from data import IGNORE_INDEX, Mixture, collate, most_frequent_tokens, open_tables, to_device
from machinery import oxe
from machinery.checkpoint import Checkpoint, Tensors
from machinery.convention import Convention, convention, dimension_names
from machinery.examine import open_policy, recording_of
from machinery.files import read_metrics, write_json
from machinery.frames import DataError
from machinery.images import decode_native
from machinery.oft import new_mixture
from machinery.peers import evenly
from machinery.plots import draw_curves
from machinery.run import data_facts
from machinery.weights import open_weights

BATCH = 16  # frames per call of the model
EPISODES = 3  # in the PNG
EPISODE_FRAMES = 300  # of each, at most
TOLERANCE = 0.03  # of accuracies that should agree
ANSWERS = ("teacher_forced", "greedy", "inference")


# ---- Three answers to the same frames ----------------------------------------------------------
# A frame is (dataset number, row of its frame table, epoch).


def from_camera(policy: Policy, mixture: Mixture, frames: list[tuple]
                ) -> tuple[np.ndarray, np.ndarray]:
    """Answer frames of one dataset as on a robot: -> (action tokens (B, T), actions
    (B, action_chunk, action_dim) in the dataset's units)."""
    dataset = frames[0][0]
    name = mixture.names[dataset]
    table = mixture.tables[dataset]
    cfg = mixture.cfg
    black = np.zeros((cfg.image_size, cfg.image_size, 3), np.uint8)  # for a missing camera
    views, texts, states = [], [], []
    for _, row, epoch in frames:
        files = mixture.image_files(dataset, row, epoch)
        views.append([decode_native(file) if file else black for file in files])
        texts.append(table.instructions[table.frames["instruction"][row]])
        if cfg.use_proprio:
            states.append(table.frames["proprio"][row])
    # not predict_action: it returns no tokens, and actions in the robot's own form
    inputs = policy.prepare(views, texts, name, np.stack(states) if states else None)
    tokens = policy.generate(*inputs)
    actions = policy.actions(tokens, name)
    return policy.ids(tokens), actions.reshape(len(frames), cfg.action_chunk, cfg.action_dim)


@torch.inference_mode()
def from_training_inputs(policy: Policy, mixture: Mixture, frames: list[tuple]
                         ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Answer training's own inputs: -> (teacher-forced, greedy, true) action tokens (B, T)."""
    samples = [mixture.sample(*frame) for frame in frames]
    prompts = [sample["input_ids"][sample["labels"] == IGNORE_INDEX].tolist() for sample in samples]
    batch = collate(samples, mixture.tokenizer.pad_token_id)
    batch = to_device(batch, policy.vla.llm.device)
    _, forced, true = policy.vla(**batch)
    greedy = policy.generate(batch["images"], prompts, batch.get("proprio"))
    return forced.cpu().numpy(), policy.ids(greedy), true.cpu().numpy()


def collect(policy: Policy, mixture: Mixture, frames: np.ndarray) -> dict[str, np.ndarray]:
    """All answers to frames (R, 3) of one dataset, as `measure` takes them."""
    batches = []
    name = mixture.names[frames[0, 0]]
    for i in tqdm(range(0, len(frames), BATCH), name, unit="batch", leave=False):
        batch = [tuple(frame) for frame in frames[i : i + BATCH].tolist()]
        forced, greedy, true = from_training_inputs(policy, mixture, batch)
        inference, actions = from_camera(policy, mixture, batch)
        batches.append({"teacher_forced": forced, "greedy": greedy, "true": true,
                        "inference": inference, "actions": actions})
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


# ---- Numbers -----------------------------------------------------------------------------------


def measure(mixture: Mixture, dataset: int, rows: np.ndarray, answers: dict[str, np.ndarray],
            frequent: np.ndarray) -> dict:
    """Score the answers to frames `rows` (R,) of a dataset.

    answers: tokens (R, T) by name, and `actions` (R, action_chunk, action_dim)
    frequent: the most frequent token for each of the T

    Accuracy and normalized L1 are training's: of tokens and of their bins' centers. `l1_units` is
    in the robot's own units, for each of its numbers (`robot`), against the recorded actions up to
    the end of the episode.
    """
    tokenizer = mixture.action_tokenizer
    cfg = mixture.cfg
    shape = (len(rows), cfg.action_chunk, cfg.action_dim)
    true = answers["true"]
    robot = robot_of(mixture, dataset)
    recorded = robot.to_robot(recorded_actions(mixture, dataset, rows))
    stats = mixture.statistics[mixture.names[dataset]]["action"]
    frequent = np.broadcast_to(frequent, true.shape)
    normalized = tokenizer.decode(frequent).reshape(shape)
    frequent_actions = unnormalize(normalized, stats, cfg.action_normalization)

    def score(tokens, actions) -> dict:
        correct = (tokens == true).reshape(shape)
        l1 = np.abs(tokenizer.decode(tokens) - tokenizer.decode(true)).reshape(shape)
        units = np.abs(robot.to_robot(actions) - recorded)
        return {"accuracy": float(correct.mean()),
                "accuracy_per_dim": correct.mean((0, 1)).tolist(),
                "l1": float(l1.mean()),
                "l1_per_dim": l1.mean((0, 1)).tolist(),
                "l1_units_per_dim": np.nanmean(units, (0, 1)).tolist()}

    return {"frames": len(rows),
            "names": dimension_names(mixture.recipes[dataset], mixture.tables[dataset].features)[0],
            "robot": robot.action,
            "inference": score(answers["inference"], answers["actions"]),
            "most_frequent_bin": score(frequent, frequent_actions)}


def robot_of(mixture: Mixture, dataset: int) -> Convention:
    """The form in which a dataset's robot takes actions, by the recipe of the data."""
    name = mixture.names[dataset]
    features = {name: mixture.tables[dataset].features}
    cfg = mixture.cfg.model_copy(update={"features": features})
    return convention(cfg, name, mixture.statistics[name])


def recorded_actions(mixture: Mixture, dataset: int, rows: np.ndarray) -> np.ndarray:
    """The recorded actions (R, action_chunk, action_dim) from frames `rows` on, in the dataset's
    units; NaN past the end of the episode."""
    window, past_end = mixture.window(dataset, rows)
    actions = mixture.tables[dataset].frames["action"][window].astype(np.float64)
    actions[past_end] = np.nan
    return actions


def logged_accuracy(run_dir: Path, step: int, samples: int, global_batch: int,
                    on_train_frames: bool) -> float | None:
    """The training log's accuracy: on held-out frames at this step, or on the last `samples`
    training frames."""
    lines = read_metrics(run_dir)
    if not on_train_frames:
        for line in lines:
            if line["step"] == step and "eval/accuracy" in line:
                return line["eval/accuracy"]
        return None
    lines = [line for line in lines if "accuracy" in line and line["step"] <= step]
    total, seen = 0.0, 0  # seen: steps
    while lines and seen * global_batch < samples:
        line = lines.pop()
        steps = line["step"] - (lines[-1]["step"] if lines else 0)
        total += steps * line["accuracy"]
        seen += steps
    return total / seen if seen else None


def verdict(accuracy: dict[str, float], agreement: float, frames: int, strategy: str
            ) -> tuple[str | None, list[str]]:
    """-> (the mismatch between training and acting, if there is one, and other remarks)."""
    mismatch = None
    remarks = []
    forced, greedy, inference = (accuracy[key] for key in ANSWERS)
    if agreement < 1 - TOLERANCE:
        mismatch = (f"{1 - agreement:.1%} of the action tokens differ between acting on the "
                    f"recorded images (accuracy {inference:.3f}) and training's inputs "
                    f"({greedy:.3f}), so acting prepares them differently: compare "
                    f"image_resize_strategy ({strategy}), the order of colors and cameras, the "
                    "prompt and the statistics")
    if forced - greedy > TOLERANCE:
        remarks.append(f"note: accuracy {forced:.3f} after the recorded tokens, {greedy:.3f} after "
                       "the model's own: one wrong token leads to others")
    if forced < accuracy.get("logged", 0.0) - 2 * TOLERANCE - frames**-0.5:  # two standard errors
        remarks.append(f"warning: accuracy {forced:.3f}, but training logged "
                       f"{accuracy['logged']:.3f}: config.json or the data differ from training's")
    return mismatch, remarks


def report(name: str, result: dict) -> None:
    """Print a dataset's numbers."""
    model = result["inference"]
    frequent = result["most_frequent_bin"]
    print(f"dataset {name} frames {result['frames']} accuracy {model['accuracy']:.4f} "
          f"most_frequent_bin {frequent['accuracy']:.4f} l1 {model['l1']:.4f} "
          f"most_frequent_bin {frequent['l1']:.4f}")
    for dim, label in enumerate(result["names"]):
        line = f"dataset {name} dim {dim}"
        for key in ("accuracy_per_dim", "l1_per_dim"):
            line += f" {key.removesuffix('_per_dim')} {model[key][dim]:.4g}"
            line += f" most_frequent_bin {frequent[key][dim]:.4g}"
        print(f"{line} name {label}")
    for i, label in enumerate(result["robot"]):
        print(f"dataset {name} robot {label} l1_units {model['l1_units_per_dim'][i]:.4g} "
              f"most_frequent_bin {frequent['l1_units_per_dim'][i]:.4g}")


# ---- The picture -------------------------------------------------------------------------------


def draw_episodes(policy: Policy, mixture: Mixture, path: Path) -> None:
    """Some episodes side by side, a row for each number of the robot's action, in its units."""
    episodes = []  # (dataset, first row, frames)
    for dataset, (firsts, counts, _) in enumerate(mixture.stretches):
        for first, count in zip(firsts.tolist(), counts.tolist(), strict=True):
            episodes.append((dataset, first, count))
    chosen = evenly(len(episodes), EPISODES)
    columns = []
    for dataset, first, count in [episodes[i] for i in chosen]:
        table = mixture.tables[dataset]
        robot = robot_of(mixture, dataset)
        rows = first + np.arange(min(count, EPISODE_FRAMES))
        predicted = []
        for i in range(0, len(rows), BATCH):
            frames = [(dataset, row, 0) for row in rows[i : i + BATCH].tolist()]
            _, actions = from_camera(policy, mixture, frames)
            predicted.append(actions[:, 0])  # the first step of each chunk
        fps = recording_of(table).get("fps")
        x = (rows - first) / (fps or 1)
        curves = {label: (x, robot.to_robot(actions)) for label, actions in (
            ("recorded", recorded_actions(mixture, dataset, rows)[:, 0]),
            ("predicted", np.concatenate(predicted)))}
        text = table.instructions[table.frames["instruction"][first]]
        title = f"{mixture.names[dataset]}, episode {table.episode_of(first)}, {len(rows)} frames"
        unit = " s" if fps else " frames"
        columns.append((f"{title}\n{text[:50]}", unit, robot.action, curves))
    draw_curves(columns, path)


# ---- The program -------------------------------------------------------------------------------


def evaluate(policy: Policy, checkpoint: Tensors, cfg: TrainConfig, samples: int,
             on_train_frames: bool, out: Path) -> None:
    """Print and write everything. Raises DataError if training and acting do not match on training
    frames."""
    learned = open_mixture(policy, cfg, train=True)
    mixture = learned if on_train_frames else open_mixture(policy, cfg, train=False)
    seen = 0  # training samples of this mixture that the model has learned from
    own = (Path(checkpoint.where) / "checkpoint.json").exists()
    if own and cfg.data_mix == policy.cfg.data_mix:
        ours = Checkpoint(checkpoint.where)
        step = ours.meta["step"]
        seen = cfg.global_batch_size * step
    if on_train_frames and seen:
        samples = min(samples, seen)
        frames = choose_frames(mixture, seen - samples, samples)
    else:
        samples = min(samples, int(mixture.sizes.sum()))
        frames = choose_frames(mixture, 0, samples)

    results, tokens = score_datasets(policy, mixture, learned, frames, samples)
    accuracy = {}
    if seen:
        logged = logged_accuracy(ours.run_dir, step, samples, cfg.global_batch_size,
                                 on_train_frames)
        if logged:
            accuracy["logged"] = logged
    for key in ANSWERS:
        accuracy[key] = float((tokens[key] == tokens["true"]).mean())
    agreement = float((tokens["greedy"] == tokens["inference"]).mean())
    line = f"{'train' if on_train_frames else 'held-out'} frames {len(frames)}"
    for key, value in accuracy.items():
        line += f" accuracy_{key} {value:.4f}"
    print(f"{line} agreement {agreement:.4f}")
    mismatch, remarks = verdict(accuracy, agreement, len(frames), cfg.image_resize_strategy)

    facts = {"checkpoint": str(checkpoint.where), "data_mix": cfg.data_mix,
             "on_train_frames": on_train_frames, "frames": len(frames), "accuracy": accuracy,
             "agreement": agreement, "mismatch": mismatch, "datasets": results}
    write_json(out.with_suffix(".json"), facts)
    draw_episodes(policy, mixture, out)
    print(f"wrote {out} {out.with_suffix('.json')}")
    for remark in remarks:
        print(remark)
    if mismatch and on_train_frames:
        raise DataError(mismatch)
    if mismatch:
        print(f"warning: {mismatch}")


def score_datasets(policy: Policy, mixture: Mixture, learned: Mixture, frames: np.ndarray,
                   samples: int) -> tuple[dict, dict[str, np.ndarray]]:
    """Answer frames (R, 3) and print the scores: -> ({dataset: scores}, tokens (R, T) by name).

    learned: training data, whose most frequent tokens in `samples` frames are the baseline"""
    results = {}
    tokens = {key: [] for key in (*ANSWERS, "true")}
    for dataset in np.unique(frames[:, 0]).tolist():
        name = mixture.names[dataset]
        chosen = frames[frames[:, 0] == dataset]
        answers = collect(policy, mixture, chosen)
        for key in tokens:
            tokens[key].append(answers[key])
        size = learned.sizes[dataset]
        index = evenly(size, samples)
        numbers = np.full(len(index), dataset)
        frequent = most_frequent_tokens(learned, numbers, learned.rows(numbers, index))
        results[name] = measure(mixture, dataset, chosen[:, 1], answers, frequent)
        report(name, results[name])
    return results, {key: np.concatenate(parts) for key, parts in tokens.items()}


def choose_frames(mixture: Mixture, first: int, samples: int) -> np.ndarray:
    """The frames of `samples` training samples from number `first` on, (R, 3): dataset, row, epoch.
    From 0 on, no frame is chosen twice."""
    if first == 0 and samples >= mixture.sizes.sum():
        dataset = np.repeat(np.arange(len(mixture.sizes)), mixture.sizes)
        index = np.concatenate([np.arange(size) for size in mixture.sizes])
        return np.stack([dataset, mixture.rows(dataset, index), np.zeros_like(index)], axis=1)
    frames = np.stack(mixture.draw(first, samples), axis=1)
    return frames if first else frames[frames[:, 2] == 0]


def open_mixture(policy: Policy, cfg: TrainConfig, train: bool) -> Mixture:
    """The data, normalized by the model's own statistics. A dataset that the model does not know
    gives the policy its statistics."""
    tables = open_tables(cfg)
    action_dim = data_facts(cfg, tables)["action_dim"]
    if action_dim != cfg.action_dim:
        raise DataError(f"data_mix {cfg.data_mix}: its actions have {action_dim} dimensions, the "
                        f"model's {cfg.action_dim}")
    mixture = new_mixture(cfg, tables, policy.tokenizer, train)
    for name, ours in mixture.statistics.items():
        theirs = policy.norm_stats.setdefault(name, ours)
        for key in ("q01", "q99", "mean"):  # the mean notices an inverted gripper
            same = np.allclose(ours["action"][key], theirs["action"][key], rtol=1e-3, atol=1e-6)
            if train and not same:
                print(f"warning: {name}: the {key} of its actions differs from training's: this is "
                      "another dataset or recipe. The model's statistics are used")
                break
        mixture.statistics[name] = theirs
    return mixture


DATA_KEYS = "data_mix data_root_dir datasets balance_weights index_dir skip_bad_episodes".split()


def data_config(policy: Policy, args: argparse.Namespace) -> TrainConfig:
    """The model's config with the data that the command line names. Raises UserError."""
    data = {}
    if args.config:
        theirs = load_config(find_input(args.config))
        data = {key: getattr(theirs, key) for key in DATA_KEYS}
    for key in ("data_mix", "data_root_dir"):
        if getattr(args, key):
            data[key] = getattr(args, key)
        elif key not in data and key not in policy.cfg.model_fields_set:
            raise UserError(f"{args.checkpoint} does not contain {key}: give --config or --{key}")
    cfg = policy.cfg.model_copy(update=data)
    cfg = cfg.model_copy(update={"data_root_dir": find_input(cfg.data_root_dir)})
    cfg = oxe.read_recipes(cfg)
    if args.unnorm_key:
        known = policy.dataset_statistics(args.unnorm_key)  # raises UserError
    found = oxe.find_datasets(cfg.data_root_dir, cfg.data_mix, cfg.datasets, cfg.cameras)
    for name, *_ in found:
        if name in policy.norm_stats:
            continue
        if args.unnorm_key:
            policy.norm_stats[name] = known
        print(f"the model does not know {name}: it acts by the statistics of "
              f"{args.unnorm_key or 'the data'}")
    return cfg


def main() -> None:
    """Command line."""
    args = read_options()
    with exit_with_one_line():
        crop = {"yes": True, "no": False}.get(args.center_crop)
        policy = open_policy(args.checkpoint, crop)
        cfg = data_config(policy, args)
        tensors = open_weights(args.checkpoint).tensors
        folder = Path(tensors.where if Path(args.checkpoint).exists() else "")  # "": of the hub
        if folder.suffix == ".pt" or (folder / "checkpoint.json").exists():
            folder = folder.parents[1]  # its run
        name = "eval_train" if args.on_train_frames else "eval"
        out = (args.out or folder / name).with_suffix(".png")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.open("ab").close()  # fail before minutes of evaluating
        evaluate(policy, tensors, cfg, args.samples, args.on_train_frames, out)


if __name__ == "__main__":
    main()
