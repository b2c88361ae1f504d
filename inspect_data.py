"""Look at a dataset before training on it: python data.py --inspect DIR [--data_mix NAME]"""

import argparse
from pathlib import Path

import numpy as np

import oxe
from config import Recipe, told_in_one_line
from frames import DataError, FrameTable, find_dataset, frame_table
from images import contact_sheet, decode_image
from rlds import step_features


def guess_recipe(directory: Path) -> Recipe:
    """A recipe for a dataset nobody described: its image features in order, `action`, and whatever text
    there is."""
    features = step_features(directory)
    images = [name.removeprefix("observation/") for name, (_, _, image) in features.items() if image]
    texts = [name for name, (_, dtype, image) in features.items() if dtype.kind == "O" and not image]
    texts.sort(key=lambda name: "language_instruction" not in name)
    if "action" not in features or not texts or not images:
        raise DataError(f"{directory}: cannot guess what is action, image and instruction in "
                        f"{sorted(features)}: describe it under `datasets:` in a YAML and train, or use the "
                        "names of OXE")
    return Recipe(**dict(zip(oxe.CAMERAS, images, strict=False)), instruction=texts[0])


def inspect_dataset(directory: Path, name: str | None, out: Path) -> None:
    """Print what is in a dataset, warn of what often goes wrong, and write a contact sheet of some frames."""
    if name is None and not (directory / "features.json").exists():  # the folder that holds the versions
        directory, name = directory.parent, directory.name
    path = find_dataset(directory, name or "")
    name = (name or path.resolve().parent.name).partition(":")[0]
    recipe = oxe.DATASETS.get(name) or guess_recipe(path)
    cameras = [camera for camera in oxe.CAMERAS if getattr(recipe, camera)]
    keys = recipe.camera_keys(cameras)
    table = frame_table(path, recipe, keys, False, oxe.code_of(recipe), skip_bad_episodes=True)
    stats, episodes = table.statistics["action"], table.episodes

    print(f"dataset {name} directory {path} recipe {'registered' if name in oxe.DATASETS else 'guessed'}")
    for number, split in enumerate(table.splits):
        count = episodes["count"][episodes["split"] == number]
        print(f"split {split} episodes {len(count)} frames {count.sum()}"
              + (f" frames_per_episode {count.min()}..{count.max()}" if len(count) else ""))
    for camera in cameras:
        print(f"camera {camera} key {getattr(recipe, camera)}")
    print(f"instructions {len(table.instructions)} e.g. {' | '.join(map(repr, table.instructions[:8]))}")
    print("action   dim       min       q01      mean       q99       max       std")
    for dim in range(len(stats["min"])):
        values = " ".join(f"{stats[key][dim]:9.4f}" for key in ("min", "q01", "mean", "q99", "max", "std"))
        print(f"action {dim:5d} {values}")
    for warning in dataset_warnings(table, recipe):
        print(f"warning: {warning}")
    rows = np.linspace(0, len(table.frames) - 1, 12).astype(int)
    tiles = [(decode_image(table.read_image(row, 0), 224), _caption(table, row)) for row in rows]
    contact_sheet(tiles).save(out)
    print(f"contact_sheet {out}")


def dataset_warnings(table: FrameTable, recipe: Recipe) -> list[str]:
    """What makes policies fail without any error: constant dimensions, idle frames, missing text, bad
    episodes."""
    stats, actions = table.statistics["action"], table.frames["action"]
    spread = np.array(stats["q99"]) - np.array(stats["q01"])
    relative = actions[:, : actions.shape[1] - recipe.absolute]
    still = np.abs(relative) < 1e-3 * np.maximum(spread, 1e-9)[: relative.shape[1]]
    idle = still.all(1).mean() if relative.shape[1] else 0.0
    unlabeled = int((~table.episodes["labeled"] & (table.episodes["count"] > 0)).sum())
    largest = np.abs([stats["min"], stats["max"]]).max(0)
    found = [f"action dimension {d} never changes (always {stats['min'][d]:.4g}): it will be trained as 0"
             for d in np.flatnonzero(np.array(stats["min"]) == np.array(stats["max"]))]
    found += [f"action dimension {d} is absolute and reaches {largest[d]:.4g}: what lies beyond -1..1 is cut "
              "off" for d in range(relative.shape[1], actions.shape[1]) if largest[d] > 1]
    if idle > 0.05:
        found.append(f"{idle:.0%} of all frames command no motion: policies copy such pauses; remove them")
    if unlabeled:
        found.append(f"{unlabeled} of {len(table.episodes)} episodes have no instruction: they are left out")
    return found + [f"bad episode: {reason}" for reason in table.bad]


def _caption(table: FrameTable, row: int) -> str:
    text = table.instructions[table.frames["instruction"][row]]
    action = " ".join(f"{value:.2f}" for value in table.frames["action"][row])
    return f"frame {row}\n{text[:40]}\n{text[40:80]}\n{action}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=inspect_dataset.__doc__)
    parser.add_argument("--inspect", type=Path, required=True, metavar="DIR",
                        help="a dataset, or a folder of datasets")
    parser.add_argument("--data_mix", metavar="NAME", help="a dataset or mixture in that folder")
    parser.add_argument("--out", type=Path, default=Path("contact_sheet.png"))
    args = parser.parse_args()
    with told_in_one_line():
        names = [name for name, _, _ in oxe.resolve_mixture(args.data_mix)] if args.data_mix else [None]
        for name in names:
            stem = args.out.stem if len(names) == 1 else f"{args.out.stem}_{name}"
            inspect_dataset(args.inspect, name, args.out.with_stem(stem))


if __name__ == "__main__":
    main()
