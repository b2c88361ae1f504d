"""How well doctor.py finds bad demonstrations: corrupt 5% of a dataset, train on it, rank its episodes.

    python bench/bad_demonstrations.py --out /tmp/bad                          # ten minutes on two CPU cores
    python bench/bad_demonstrations.py --out /tmp/bad --draws 0 1 2 3 4 --set max_steps=300
    python bench/bad_demonstrations.py --out /tmp/bad --draws 0 1 2 3 4 --no-policy        # half a minute each

In each draw, 5% of the demo's 120 training episodes are corrupted, one in each of six ways:

    pictures  the pictures of another episode       shifted  actions of 5 frames earlier or later
    text      another instruction                   sign     one axis of the actions turned round
    mirrored  its pictures mirrored                 noise    Gaussian noise on the actions

The YAML's policy then trains on all of them, the bad ones included, and doctor.py ranks all 144 episodes: as
that policy sees them, as small pictures show them, and by the policy's loss alone. AUROC is the share of pairs
of a corrupted and a sound episode in which the corrupted one is ranked higher.
"""

import argparse
import io
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
from PIL import Image

from machinery.config import load_config
from machinery.frames import find_dataset
from machinery.rlds import Steps, open_builder, read_records, step_features, write_rlds

SHIFT = 5  # frames
NOISE = 0.5  # standard deviation, of actions in -1..1
KINDS = ["pictures", "text", "mirrored", "shifted", "sign", "noise"]


# ---- Corrupting ----------------------------------------------------------------------------------


def read_split(directory: Path, split: str) -> list[dict]:
    """The episodes of a split: {feature: array, or list of bytes}, with images as encoded bytes."""
    features = step_features(directory)
    episodes = []
    for file in open_builder(directory).info.splits[split].filepaths:
        for offset, data in read_records(Path(file)):
            steps = Steps(data, offset, features)
            episode = {}
            for name, feature in features.items():
                if feature.kind == "Image":
                    spans = steps.spans(name) - [offset, 0]
                    episode[name] = [data[start : start + size] for start, size in spans.tolist()]
                else:
                    episode[name] = steps[name]
            episodes.append(episode)
    return episodes


def as_steps(episode: dict, features: dict) -> dict:
    """An episode of read_split -> an episode as write_rlds takes it."""
    of_steps = [name for name, feature in features.items() if feature.of_step]
    steps = []
    for t in range(len(episode["action"])):
        step = {}
        for name in of_steps:
            *folders, leaf = name.split("/")
            place = step
            for folder in folders:
                place = place.setdefault(folder, {})
            place[leaf] = episode[name][t]
        steps.append(step)
    whole = {"steps": steps}
    for name in features.keys() - set(of_steps):
        folder, _, leaf = name.rpartition("/")
        (whole.setdefault(folder, {}) if folder else whole)[leaf] = episode[name][0]
    return whole


def mirrored(data: bytes) -> bytes:
    """An encoded image, mirrored left to right."""
    encoded = io.BytesIO()
    Image.fromarray(np.array(Image.open(io.BytesIO(data)))[:, ::-1]).save(encoded, "jpeg", quality=75)
    return encoded.getvalue()


def corrupt(kind: str, episode: dict, episodes: list[dict], rng: np.random.Generator) -> dict:
    """An episode with one fault. episodes: where another's pictures or text are taken from."""
    bad = dict(episode)
    actions = episode["action"]
    length = len(actions)
    images = [name for name in episode if "image" in name]
    other = episodes[rng.integers(len(episodes))]
    while other is episode or (kind == "text" and text_of(other) == text_of(episode)):
        other = episodes[rng.integers(len(episodes))]
    if kind == "pictures":
        frames = np.linspace(0, len(other["action"]) - 1, length).round().astype(int)
        bad |= {name: [other[name][t] for t in frames] for name in images}
    elif kind == "text":
        bad["language_instruction"] = [text_of(other)] * length
    elif kind == "mirrored":
        bad |= {name: [*map(mirrored, episode[name])] for name in images}
    elif kind == "shifted":
        frames = np.arange(length) + rng.choice([-SHIFT, SHIFT])
        bad["action"] = actions[frames.clip(0, length - 1)]
    elif kind == "sign":
        used = np.flatnonzero(np.abs(actions).mean(0) > 0.2)  # turning zeros changes nothing
        bad["action"] = actions * np.where(np.arange(actions.shape[1]) == rng.choice(used), -1, 1)
    elif kind == "noise":
        bad["action"] = np.clip(actions + NOISE * rng.standard_normal(actions.shape), -1, 1)
    bad["action"] = bad["action"].astype(np.float32)
    return bad


def text_of(episode: dict) -> bytes:
    return episode["language_instruction"][0]


def write_corrupted(source: Path, out: Path, name: str, share: float, seed: int) -> dict[int, str]:
    """Copy a dataset with `share` of its training episodes corrupted -> {number of the episode:
    kind}, which is also written to corrupted.json."""
    features = step_features(source)
    rng = np.random.default_rng(seed)
    splits = {split: read_split(source, split) for split in open_builder(source).info.splits}
    sound = splits["train"]
    numbers = rng.permutation(len(sound))[: round(share * len(sound))].tolist()
    kinds = {number: KINDS[i % len(KINDS)] for i, number in enumerate(numbers)}
    splits["train"] = [corrupt(kinds[i], episode, sound, rng) if i in kinds else episode
                       for i, episode in enumerate(sound)]
    episodes = {split: (as_steps(episode, features) for episode in part)
                for split, part in splits.items()}
    path = write_rlds(out, name, "1.0.0", open_builder(source).info.features, episodes)
    (path / "corrupted.json").write_text(json.dumps(kinds))
    return kinds


# ---- Ranking -------------------------------------------------------------------------------------


def train(args: argparse.Namespace, folder: Path) -> Path:
    """Train the YAML's policy on the corrupted dataset in a folder, unless that was done -> its run."""
    run = folder / "run"
    command = [sys.executable, ROOT / "train_vla.py", "--config", args.config, "--deepspeed_config",
               args.deepspeed_config, "--set", f"data_root_dir={folder}", f"run_root_dir={folder}",
               "run_id=run", "eval_interval=0", "save_interval=0", *args.set]
    subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL)
    return run


def scores(directory: Path, name: str, run: Path | None, config: str) -> dict[str, dict[int, float]]:
    """{how: {episode: how bad it is}}."""
    import doctor
    from machinery.inspect_data import find_subjects

    subject, table = doctor.open_subject(find_subjects(directory, name, config)[0], None)
    verdicts, _ = doctor.rank(subject, table)
    found = {"small pictures": {verdict.episode: verdict.score for verdict in verdicts}}
    if run:
        from machinery.examine import open_policy

        verdicts, losses = doctor.rank(subject, table, open_policy(str(run)))
        found = {"policy": {verdict.episode: verdict.score for verdict in verdicts},
                 "loss alone": losses, **found}
    return found


def main() -> None:
    """Print a row for each way of ranking."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for datasets and runs")
    parser.add_argument("--config", default=str(ROOT / "configs/demo.yaml"))
    parser.add_argument("--deepspeed_config", default=str(ROOT / "ds_configs/cpu.json"))
    parser.add_argument("--draws", type=int, nargs="+", default=[0], help="seeds of the corruption")
    parser.add_argument("--share", type=float, default=0.05, help="of the training episodes")
    parser.add_argument("--no-policy", action="store_true", help="train none: small pictures only")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="keys of the YAML")
    args = parser.parse_args()
    cfg = load_config(args.config)
    source = find_dataset(cfg.data_root_dir, cfg.data_mix)
    higher = {}  # {how: {kind: [share of sound episodes that rank lower, one of each corrupted]}}
    for draw in args.draws:
        folder = args.out / str(draw)
        known = folder / cfg.data_mix / "1.0.0/corrupted.json"
        if not known.exists():
            write_corrupted(source, folder, cfg.data_mix, args.share, draw)
        kinds = {int(number): kind for number, kind in json.loads(known.read_text()).items()}
        run = None if args.no_policy else train(args, folder)
        for how, values in scores(folder, cfg.data_mix, run, args.config).items():
            sound = np.array([value for episode, value in values.items() if episode not in kinds])
            for episode, kind in kinds.items():
                lower = (sound < values[episode]).mean() + (sound == values[episode]).mean() / 2
                higher.setdefault(how, {}).setdefault(kind, []).append(lower)
    for how, of_kind in higher.items():
        line = f"{how:<15} overall {np.mean(np.concatenate([*of_kind.values()])):.3f}"
        print(line, *(f"{kind} {np.mean(of_kind[kind]):.3f}" for kind in KINDS if kind in of_kind))


if __name__ == "__main__":
    main()
