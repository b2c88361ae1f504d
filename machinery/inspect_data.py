"""Look at a dataset before training on it, and read every image once.

    python data.py --inspect DIR [--data_mix NAME]         what is in it, what will go wrong, a picture
    python data.py --inspect DIR --config my_robot.yaml    the same, read as this YAML's recipe says
    python data.py --check DIR ...                         decode every image, on all cores; list bad episodes

A dataset that nobody has described yet is shown by a guessed recipe, which is printed for copying.
"""

import argparse
import json
import os
import textwrap
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import yaml
from tqdm import tqdm

from machinery import oxe
from machinery.checks import looks_like_targets, round_trip
from machinery.config import Recipe, UserError, exit_with_one_line, find_input, load_config
from machinery.frames import (
    DataError,
    FrameTable,
    bad_episodes_file,
    data_files,
    end_with_parent,
    find_dataset,
    frame_table,
    index_roots,
    writable_root,
)
from machinery.images import contact_sheet, decode_image, decode_native
from machinery.recipes import Feature
from machinery.rlds import step_features


@dataclass
class Subject:
    """A dataset to look at: its name and directory; its recipe, and where that comes from; kind: of the
    normalisation."""

    name: str
    directory: Path
    recipe: Recipe
    source: str
    kind: str = "bounds_q99"

    def table(self, index_dir: str | None, skip_bad_episodes: bool, load_proprio: bool = True) -> FrameTable:
        keys = self.recipe.camera_keys([*self.recipe.camera_names])
        return frame_table(self.directory, self.recipe, keys, load_proprio, index_dir=index_dir,
                           skip_bad_episodes=skip_bad_episodes)


def find_subjects(folder: Path, data_mix: str | None, config: str | None) -> list[Subject]:
    """The datasets that a command line means. Raises UserError."""
    if config:
        cfg = load_config(find_input(config))
        mixture = [(data_mix, None, None)] if data_mix else oxe.resolve_mixture(cfg.data_mix, cfg.datasets)
        known, kind = {**oxe.DATASETS, **cfg.datasets}, cfg.action_normalization
    else:
        mixture = oxe.resolve_mixture(data_mix) if data_mix in {**oxe.DATASETS, **oxe.MIXTURES} else None
        known, kind = oxe.DATASETS, "bounds_q99"
    if mixture is None and data_mix is None and not (folder / "features.json").exists():
        folder, data_mix = folder.parent, folder.name  # the folder that holds the versions
    if mixture and (folder / "features.json").exists():  # a version of one of them
        name = folder.resolve().parent.name
        mixture = [entry for entry in mixture if entry[0].partition(":")[0] == name] or mixture
        if len(mixture) > 1:
            raise UserError(f"{folder}: is it one of {', '.join(name for name, *_ in mixture)}? Say so with "
                            "--data_mix NAME")
    elif mixture and not (folder / folder.name).exists():  # one dataset of the mixture is asked for
        only = [(name, *rest) for name, *rest in mixture if name.partition(":")[0] == folder.name]
        mixture, folder = (only, folder.parent) if only else (mixture, folder)
    subjects = []
    for name in [name for name, *_ in mixture] if mixture else [data_mix or ""]:
        directory = find_dataset(folder, name)
        name = name.partition(":")[0] or directory.resolve().parent.name
        recipe, source = known.get(name), config if config and name in cfg.datasets else "registered"
        if config and recipe and not cfg.use_proprio and recipe.state == Recipe().state:
            recipe = replace(recipe, state="0")  # it is neither named nor used
        subjects.append(Subject(name, directory, recipe or guess_recipe(step_features(directory), directory),
                                source if recipe else "guessed", kind))
    return subjects


# ---- Guessing ----------------------------------------------------------------------------------------------


def guess_recipe(features: dict[str, Feature], directory: Path, action: str | None = None) -> Recipe:
    """A recipe for a dataset nobody described: its images by name, else in order; its `action`, unless that
    is known; whatever text there is. Raises DataError where that is not enough."""
    steps = {name: feature for name, feature in features.items() if feature.of_step}
    images = [relative(name) for name, feature in steps.items() if feature.kind == "Image"]
    images.sort(key=lambda name: "depth" in name.lower())  # what is no colour picture comes last
    texts = [name for name, feature in steps.items() if feature.kind == "Text"]
    texts += [name for name, feature in features.items()
              if feature.kind == "Text" and not feature.of_step and any(part in name for part in TEXTS)]
    texts.sort(key=lambda name: [part not in name for part in TEXTS])
    actions = [name for name in (action, "action", "actions") if name in steps]
    if not (actions and texts and images):
        raise DataError(f"{directory}: cannot guess what is action, image and instruction in "
                        f"{sorted(features)}: describe it under `datasets:` in a YAML, and say --config")
    states = [relative(name) for name in ("observation/state", "observation/proprio", "state")
              if name in steps and steps[name].dtype.kind in "biuf" and None not in steps[name].shape]
    wrist = [name for name in images if any(part in name.lower() for part in WRIST)]
    outside = [name for name in images if name not in wrist]
    for names in (wrist, outside):  # a camera that is called so already takes that part
        names.sort(key=lambda name: [name != part for part in ("wrist", "primary", "secondary")])
    named = dict(zip(("primary", "secondary"), outside, strict=False))
    named |= {"wrist": wrist[0]} if wrist else {}
    others = {name.strip("/"): name for name in [*outside[2:], *wrist[1:]]}  # by their own names
    return Recipe(**named, cameras=others, action=actions[0], instruction=texts[0],
                  state=states[0] if states else "0")


def guess_action(recipe: Recipe, table: FrameTable) -> Recipe:
    """The recipe, with words for what its action's dimensions look like: places to go to, and grippers."""
    stats = table.statistics["action"]
    places = looks_like_targets(table.frames, table.episodes, stats)
    grippers = (np.array(stats["min"]) == 0) & (np.array(stats["max"]) == 1)
    words = [" target raw" if gripper else " target" if place else ""
             for gripper, place in zip(grippers, places, strict=True)]
    starts = [d for d in range(len(words)) if d == 0 or words[d] != words[d - 1]]
    fields = [f"{recipe.action}[{start}:{stop}]{words[start]}"
              for start, stop in zip(starts, [*starts[1:], len(words)], strict=True)]
    return replace(recipe, action=", ".join(fields)) if any(words) else recipe


WRIST = ("wrist", "hand", "gripper")
TEXTS = ("language_instruction", "instruction", "language", "task")  # how instructions are called, best first


def relative(name: str) -> str:
    """A feature's name -> a recipe's key for a state or camera."""
    return name.removeprefix("observation/") if name.startswith("observation/") else f"/{name}"


def as_yaml(subject: Subject) -> str:
    """The recipe, as it would stand in a YAML."""
    plain = Recipe()
    said = {key: value for key, value in vars(subject.recipe).items() if value != getattr(plain, key)}
    return yaml.safe_dump({"datasets": {subject.name: said}}, sort_keys=False, width=1000)


# ---- What is in a dataset ----------------------------------------------------------------------------------


def inspect_dataset(subject: Subject, index_dir: str | None, out: Path) -> None:
    """Print what is in a dataset, warn of what often goes wrong, and draw some frames."""
    recipe, table = subject.recipe, subject.table(index_dir, skip_bad_episodes=True)
    stats, episodes, target = table.statistics["action"], table.episodes, table.targets
    raw = ~np.array(stats["mask"])
    print(f"dataset {subject.name} directory {subject.directory} recipe {subject.source}")
    for number, split in enumerate(table.splits):
        count = episodes["count"][episodes["split"] == number]
        print(f"split {split} episodes {len(count)} frames {count.sum()}"
              + (f" frames_per_episode {count.min()}..{count.max()}" if len(count) else ""))
    for camera, key in recipe.camera_names.items():
        print(f"camera {camera} key {key}")
    print(f"instructions {len(table.instructions)} e.g. {' | '.join(map(repr, table.instructions[:8]))}")
    rows = np.unique(np.linspace(0, len(table.frames) - 1, 1 << 16).astype(int))
    back = round_trip(table.frames["action"][rows], stats, subject.kind)
    titles = "dim       min       q01      mean       q99       max       std"
    print(f"action   {titles}  half_bin     error  cut_off kind")
    for dim in range(len(raw)):
        print(f"action {dim:5d} {numbers(stats, dim)} {back['half_bin'][dim]:9.2g} {back['error'][dim]:9.2g} "
              f"{back['cut'][dim]:8.2%} {'target' if target[dim] else 'change'}{' raw' if raw[dim] else ''}")
    state = table.statistics["proprio"]
    print(*[f"state    {titles}"] if recipe.state != "0" else [])
    for dim in range(len(state["min"]) if recipe.state != "0" else 0):
        print(f"state  {dim:5d} {numbers(state, dim)}")
    for warning in [*table.warnings[subject.kind], *other_warnings(table), *table.warnings["chunks"]]:
        print(f"warning: {warning}")
    if subject.source == "guessed":
        guessed = replace(subject, recipe=guess_action(recipe, table))
        print("to train on it, copy and correct (a gripper that is 1 when closed: clip invert target raw)\n"
              + as_yaml(guessed), end="")
    draw(table, recipe, out)
    print(f"contact_sheet {out}")


def numbers(stats: dict, dim: int) -> str:
    """A dimension's statistics, in columns."""
    return " ".join(f"{stats[key][dim]:9.4g}" for key in ("min", "q01", "mean", "q99", "max", "std"))


def other_warnings(table: FrameTable) -> list[str]:
    """What makes policies fail without any error, beside actions that do not come back: idle frames, missing
    text, bad episodes."""
    stats, actions = table.statistics["action"], table.frames["action"]
    spread = np.array(stats["q99"]) - np.array(stats["q01"])
    motion = np.where(table.targets, np.diff(actions, axis=0, prepend=actions[:1]), actions)
    moving = spread > 0
    still = np.abs(motion[:, moving]) < 1e-3 * spread[moving]
    idle = still.all(1).mean() if moving.any() else 0.0
    unlabeled = int((~table.episodes["labeled"] & (table.episodes["count"] > 0)).sum())
    found = [*table.warnings["frames"]]
    if unused := sorted(set(table.splits) - {"train", "val"}):
        found.append(f"nothing is trained or evaluated on its split {', '.join(unused)}, but statistics "
                     "count it: what is to be held out must be called val")
    if idle > 0.05:
        found.append(f"{idle:.0%} of all frames command no motion: policies copy such pauses; remove them")
    if unlabeled:
        found.append(f"{unlabeled} of {len(table.episodes)} episodes have no instruction: they are left out")
    return found + [f"bad episode: {reason}" for reason in table.bad]


def draw(table: FrameTable, recipe: Recipe, out: Path) -> None:
    """Some frames, all cameras side by side, each with its instruction and action."""
    keys = [recipe.camera(name)[0] for name in recipe.camera_names]
    side, columns = (224, 4) if len(keys) == 1 else (160, max(6 // len(keys), 1))
    cameras = " | ".join(recipe.camera_names)
    tiles = []
    for row in np.linspace(0, len(table.frames) - 1, 12).astype(int):
        try:
            views = [decode_image(table.read_image(row, table.cameras.index(key)), side) for key in keys]
        except (ValueError, OSError) as error:
            raise DataError(f"{table.where(row)}: {error}: --check finds all such") from error
        text = table.instructions[table.frames["instruction"][row]]
        values = [f"{value:.2f}" for value in table.frames["action"][row]]
        per_line = max(side * len(keys) // 34, 6)
        lines = [" ".join(values[i : i + per_line]) for i in range(0, len(values), per_line)]
        words = textwrap.wrap(text, side * len(keys) // 7)[:2]
        caption = "\n".join([f"frame {row}: {cameras}", *words, *lines])
        tiles.append((np.concatenate(views, axis=1), caption))
    contact_sheet(tiles, columns).save(out)


# ---- Reading every image -----------------------------------------------------------------------------------


def check_dataset(subject: Subject, index_dir: str | None) -> int:
    """Decode every image of a dataset, and list episodes with one that cannot be, for skip_bad_episodes ->
    how many. An episode that was bad for another reason stays listed."""
    table = subject.table(index_dir, skip_bad_episodes=True, load_proprio=False)
    directory = subject.directory.resolve()
    listing, roots = data_files(directory), index_roots(directory, index_dir)
    parts = np.array_split(np.arange(len(table.episodes)), min(len(table.episodes), 256))
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("fork"), end_with_parent) as pool:
        black = subject.source == "registered"  # OpenVLA's rule for its own datasets' empty images
        every = pool.map(partial(check_episodes, table.path, table.directory, black), parts)
        bad = [found for part in tqdm(every, f"check {subject.name}", len(parts), leave=False, disable=None)
               for found in part]
    listed: dict[str, dict[str, str]] = {}
    for file, record, reason in bad:
        listed.setdefault(file, {})[str(record)] = reason
        print(f"bad episode {table.directory / file}: record {record}: {reason}")
    file = bad_episodes_file(writable_root(directory, roots), listing)
    if listed or file.exists():
        file.write_text(json.dumps(listed, indent=1))
    print(f"checked {subject.name} episodes {len(table.episodes)} frames {len(table.frames)} bad_episodes "
          f"{len(bad) + len(table.bad)}" + (" (skip_bad_episodes: true leaves them out)" if bad else ""))
    return len(bad) + len(table.bad)


def check_episodes(path: Path, directory: Path, black: bool, episodes: np.ndarray
                   ) -> list[tuple[str, int, str]]:
    """[(file, record, what is wrong), ...] for those of the episodes with an image that cannot be decoded or,
    unless it may be shown as `black`, is empty."""
    table, bad = FrameTable(path, directory), []
    for number in episodes:
        episode = table.episodes[number]
        rows = range(episode["first"], episode["first"] + episode["count"])
        try:
            for row in rows:
                for camera in range(len(table.cameras)):
                    if data := table.read_image(row, camera):
                        decode_native(data)
                    elif not black:
                        raise DataError("it is empty, and would be shown as black")
        except (ValueError, OSError) as error:
            reason = f"{table.cameras[camera]} of frame {row - rows[0]}: {' '.join(str(error).split())}"
            bad.append((table.shards[episode["shard"]], int(episode["record"]), reason))
    return bad


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--inspect", type=Path, metavar="DIR", help="a dataset, or a folder of datasets")
    what.add_argument("--check", type=Path, metavar="DIR", help="the same, to decode all its images")
    parser.add_argument("--data_mix", metavar="NAME", help="a dataset or mixture in that folder")
    parser.add_argument("--config", metavar="YAML", help="whose recipes and normalisation to use")
    parser.add_argument("--index_dir", metavar="DIR", help="where frame tables go; default: with the dataset")
    parser.add_argument("--out", type=Path, default=Path("contact_sheet.png"))
    args = parser.parse_args()
    with exit_with_one_line():
        if args.out.suffix not in (".png", ".jpg"):
            raise UserError(f"--out {args.out}: expected a .png")
        args.out.parent.mkdir(parents=True, exist_ok=True)  # or say now that it cannot be
        subjects = find_subjects(args.inspect or args.check, args.data_mix, args.config)
        if args.check:
            if sum(check_dataset(subject, args.index_dir) for subject in subjects):
                raise UserError("some episodes cannot be used: see above")
            return
        for subject in subjects:
            stem = args.out.stem if len(subjects) == 1 else f"{args.out.stem}_{subject.name}"
            inspect_dataset(subject, args.index_dir, args.out.with_stem(stem))


if __name__ == "__main__":
    main()
