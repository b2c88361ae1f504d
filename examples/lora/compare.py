"""Compare LoRA with full fine-tuning, on the CPU, with the demo's model and data.

    python examples/lora/compare.py --out runs/lora                             # README.md has the table

Splits the demonstrations' six tasks. The model of configs/demo.yaml learns four of them, then is
fine-tuned on the other two: in full, with adapters, and with adapters on 8-bit weights. Prints
held-out action-token accuracy and loss on the two tasks, before and after; the checkpoints' sizes;
and, if the simulator is installed (examples/metaworld/requirements.txt), the successes in 60
episodes.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from machinery.config import load_config  # first: it names a missing package

# isort: split

import numpy as np
import yaml

from machinery.rlds import write_rlds

NEW = {  # the tasks learned second, and their names in the simulator
    "Slide a plate into a cabinet": "plate-slide-v3", "Push and close a drawer": "drawer-close-v3"}
WAYS = {  # the keys of the YAML for each way. Adapters need larger steps
    "nothing": {"learning_rate": 0.0, "max_steps": 1},
    "everything": {"learning_rate": 3e-4},
    "lora": {"lora_rank": 32, "learning_rate": 3e-3},
    "lora_int8": {"lora_rank": 32, "learning_rate": 3e-3, "frozen_weights": "int8"},
}


def divide(folder: Path) -> None:
    """Write the demonstrations as two datasets, `four` and `two`; images keep their encoding."""
    import tensorflow_datasets as tfds  # imported here: these take seconds

    from data import open_tables

    ((*_, table),) = open_tables(load_config(ROOT / "configs/demo.yaml"))
    f = tfds.features
    features = {"steps": f.Dataset({
        "observation": {"image": f.Image(shape=(None, None, 3), encoding_format="jpeg")},
        "action": f.Tensor(shape=table.frames["action"].shape[1:], dtype=np.float32),
        "language_instruction": f.Text()})}

    def episodes(split: int, new: bool):
        for first, count in table.episodes[["first", "count"]][table.episodes["split"] == split].tolist():
            text = table.instructions[table.frames["instruction"][first]]
            if (text in NEW) == new:
                yield {"steps": [{"observation": {"image": table.read_image(row, 0)},
                                  "action": np.array(table.frames["action"][row]),
                                  "language_instruction": text} for row in range(first, first + count)]}

    for name, new in (("four", False), ("two", True)):
        if not (folder / name).exists():
            splits = {split: episodes(number, new) for number, split in enumerate(table.splits)}
            write_rlds(folder, name, "1.0.0", features, splits)


def train(out: Path, name: str, data: str, **keys) -> dict:
    """Train configs/demo.yaml on one of the two datasets -> its last held-out metrics."""
    config = {"inherits": str(ROOT / "configs/demo.yaml"), "data_root_dir": str(out / "data"),
              "data_mix": data, "datasets": {data: {"primary": "image"}}, "run_root_dir": str(out),
              "run_id": name, "eval_interval": 0, "save_interval": 100000, **keys}
    path = out / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    subprocess.run([sys.executable, ROOT / "train_vla.py", "--config", path, "--deepspeed_config",
                    ROOT / "ds_configs/cpu.json"], check=True, stdout=subprocess.DEVNULL)
    lines = map(json.loads, (out / name / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "eval/loss" in line][-1]


def successes(run: Path) -> list[str]:
    """Run a policy for 30 episodes of each of the two tasks -> number of successes."""
    if not importlib.util.find_spec("metaworld"):
        return ["no simulator"] * len(NEW)
    subprocess.run([sys.executable, ROOT / "examples/metaworld/rollout.py", "--checkpoint", run, "--tasks",
                    *NEW.values(), "--trials", "10", "--seeds", "0", "1", "2", "--out", run / "rollouts",
                    "--recording", ROOT / "datasets/metaworld_demo/1.0.0/recording.json"],
                   check=True, stdout=subprocess.DEVNULL)
    tasks = json.loads((run / "rollouts/summary.json").read_text())["tasks"]
    return [f"{tasks[task]['successes']} of {tasks[task]['trials']}" for task in NEW.values()]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder for data and runs")
    parser.add_argument("--steps", type=int, default=400, help="of the first training")
    parser.add_argument("--tuning_steps", type=int, default=100, help="of each fine-tuning")
    args = parser.parse_args()
    out = args.out.absolute()
    divide(out / "data")
    train(out, "base", "four", max_steps=args.steps)
    print("| fine-tuned | accuracy | loss | frequent bin |", " | ".join(NEW.values()), "| checkpoint MB |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for way, keys in WAYS.items():
        keys = {"max_steps": args.tuning_steps, "base_vlm": str(out / "base"), **keys}
        values = train(out, way, "two", **keys)
        size = sum(file.stat().st_size for file in (out / way / "checkpoints").rglob("*")) / 1e6
        figures = [values[f"eval/{key}"] for key in ("accuracy", "loss", "accuracy_of_most_frequent_bin")]
        row = [way, *(f"{figure:.3f}" for figure in figures), *successes(out / way), f"{size:.1f}"]
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
