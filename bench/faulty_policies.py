"""The policies of injected_faults.py: sound, wrongly trained, damaged, or wrongly served.

Each of RUNS is trained by `train` if it is missing, which takes 40 minutes of two CPU cores for all of them.
"""

import copy
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np

# ---- Trainings -------------------------------------------------------------------------------------


@dataclass
class Run:
    """A training by configs/my_robot.yaml, from another run's weights if `start` is one."""

    changes: str  # of the YAML
    start: str | None = None
    change: Callable | None = None  # of the demonstrations, {split: episodes}
    cameras: dict = field(default_factory=lambda: {"primary": "outside", "wrist": "wrist"})


def shifted(splits: dict) -> None:
    """Each action is that of two frames before."""
    for episode in itertools.chain(*splits.values()):
        actions = episode["action"]
        episode["action"] = actions[np.maximum(np.arange(len(actions)) - 2, 0)]


def shuffled(splits: dict) -> None:
    """Instructions of other episodes."""
    for episodes in splits.values():
        order = np.random.default_rng(0).permutation(len(episodes))
        texts = [episodes[number]["language_instruction"][0] for number in order]
        for episode, text in zip(episodes, texts, strict=True):
            episode["language_instruction"] = [text] * len(episode["action"])


def only_eight(splits: dict) -> None:
    splits["train"] = splits["train"][:8]


FURTHER = "global_batch_size=16 per_device_batch_size=16 learning_rate=5e-4"
ONE = {"primary": "outside"}
RUNS = {
    "arm2": Run("max_steps=1100"),
    "arm1": Run(f"max_steps=250 cameras=[primary] {FURTHER}", "arm2", cameras=ONE),
    "arm1-lora": Run(f"max_steps=200 cameras=[primary] lora_rank=16 {FURTHER} learning_rate=3e-3", "arm2", cameras=ONE),
    "arm2-shifted": Run(f"max_steps=200 {FURTHER}", "arm2", shifted),
    "arm2-shuffled": Run(f"max_steps=250 {FURTHER}", "arm2", shuffled),
    "arm2-few-steps": Run("max_steps=40"),
    "arm2-few-episodes": Run(f"max_steps=300 {FURTHER}", "arm2", only_eight),
}


def program(*command) -> None:
    subprocess.run([sys.executable, *map(str, command)], check=True, stdout=subprocess.DEVNULL)


def train(policies: Path, name: str) -> Path:
    """Train a policy of RUNS, unless that was done -> its run."""
    run = RUNS[name]
    if not any((policies / name).glob("checkpoints/step-*")):
        starts = ["is_resume=false", f"pretrained_checkpoint={train(policies, run.start)}"] if run.start else []
        program(ROOT / "train_vla.py", "--config", ROOT / "configs/my_robot.yaml", "--deepspeed_config",
                ROOT / "ds_configs/cpu.json", "--set", f"data_root_dir={demonstrations(policies, run.change)}",
                f"run_root_dir={policies}", f"run_id={name}", "eval_interval=0", "save_interval=0",
                *run.changes.split(), *starts)
    return policies / name


def demonstrations(policies: Path, change: Callable | None) -> Path:
    """The arm's demonstrations, changed -> the folder that contains them."""
    from bad_demonstrations import as_steps, read_split

    from machinery.rlds import open_builder, step_features, write_rlds

    source = policies / "datasets/my_robot/1.0.0"
    if not source.exists():
        program(ROOT / "examples/own_robot/record.py", "--episodes", 500, "--out", policies / "datasets")
    if change is None:
        return policies / "datasets"
    folder = policies / f"datasets-{change.__name__}"
    if not folder.exists():
        splits = {split: read_split(source, split) for split in ("train", "val")}
        change(splits)
        features = step_features(source)
        write_rlds(folder, "my_robot", "1.0.0", open_builder(source).info.features,
                   {split: [as_steps(episode, features) for episode in part] for split, part in splits.items()})
    return folder


# ---- Damaged runs, and what serves wrongly ---------------------------------------------------------


def edit(folder: Path, file: str, change: Callable) -> None:
    """Change a JSON file of a run."""
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))


def rescale(statistics: dict, factor: float) -> None:
    """Statistics as of actions that are `factor` times as large."""
    for entry in statistics.values():
        for name in ("mean", "std", "min", "max", "q01", "q99"):
            entry["action"][name] = [factor * value for value in entry["action"][name]]


def rescaled(folder: Path) -> None:
    edit(folder, "dataset_statistics.json", lambda statistics: rescale(statistics, 1.5))


def with_another_dataset(folder: Path) -> None:
    """The run has learned two datasets: it can also act in the units of the other."""
    def add(content: dict) -> None:
        for entry in (content["datasets"], content["features"]):
            entry["other_robot"] = entry["my_robot"]

    def add_statistics(content: dict) -> None:
        other = copy.deepcopy(content)
        rescale(other, 0.5)
        content["other_robot"] = other["my_robot"]

    edit(folder, "config.json", add)
    edit(folder, "dataset_statistics.json", add_statistics)


def reweigh(change: Callable) -> dict:
    """`change` is called with the name and the flat tensor of each weight."""
    def run(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        file = max(folder.glob("checkpoints/*/*.safetensors"))
        tensors = load_file(file)
        for name, tensor in tensors.items():
            change(name, tensor)
        save_file(tensors, file)
    return {"run": run}


def of_its_base(folder: Path) -> None:
    """The weights that this run began with, under its own config."""
    base = Path(json.loads((folder / "config.json").read_text())["pretrained_checkpoint"])
    [own] = folder.glob("checkpoints/*")
    shutil.rmtree(own)
    shutil.copytree(max(base.glob("checkpoints/*")), own)


def causal(policy):
    """It decodes number by number, which it was not trained for."""
    policy.cfg = policy.cfg.model_copy(update={"parallel_decoding": False})
    return policy


def doubled(policy):
    """It acts with the statistics of larger actions."""
    rescale(policy.norm_stats, 2)
    return policy
