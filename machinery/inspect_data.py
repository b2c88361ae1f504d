"""Look at a dataset before training on it, and decode every image once.

    python data.py --inspect DIR [--data_mix NAME]         its content, findings, a picture
    python data.py --inspect DIR --config my_robot.yaml    the same, by the recipe in this YAML
    python data.py --check DIR ...                         decode all images, list bad episodes

For a dataset without a recipe, one is guessed and printed for copying.
"""

import argparse
import itertools
import json
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
from machinery.checks import findings, looks_like_targets, round_trip
from machinery.config import (
    Recipe,
    TrainConfig,
    UserError,
    exit_with_one_line,
    find_input,
    load_config,
    one_line,
)
from machinery.fields import check_recipe
from machinery.frames import (
    DataError,
    FrameTable,
    bad_episodes_file,
    end_with_parent,
    find_dataset,
    frame_table,
)
from machinery.host import cores
from machinery.images import contact_sheet, decode_image, decode_native
from machinery.recipes import Feature
from machinery.rlds import step_features


@dataclass
class Subject:
    """A dataset to look at."""

    name: str
    directory: Path
    recipe: Recipe
    source: str  # where the recipe is from
    kind: str = "bounds_q99"  # of normalization

    def table(self, index_dir: str | None, skip_bad_episodes: bool, load_proprio: bool = True
              ) -> FrameTable:
        keys = self.recipe.camera_keys([*self.recipe.camera_names])
        return frame_table(self.directory, self.recipe, keys, load_proprio, index_dir=index_dir,
                           skip_bad_episodes=skip_bad_episodes)


def find_subjects(folder: Path, data_mix: str | None, config: str | None) -> list[Subject]:
    """The datasets that a command line asks for. Raises UserError."""
    cfg = load_config(find_input(config)) if config else None
    subjects = []
    for name in dataset_names(folder, data_mix, cfg):
        name, _, version = name.partition(":")
        directory = locate(folder, name, version)
        if cfg and name in cfg.datasets:
            recipe, source = cfg.datasets[name], config
            check_recipe(name, recipe)
        elif name in oxe.DATASETS:
            recipe, source = oxe.DATASETS[name], "registered"
        else:
            recipe, source = guess_recipe(step_features(directory), directory), "guessed"
        if cfg and not cfg.use_proprio and recipe.state == Recipe().state:
            recipe = replace(recipe, state="0")  # the YAML needs no state: read none
        kind = cfg.action_normalization if cfg else "bounds_q99"
        subjects.append(Subject(name, directory, recipe, source, kind))
    return subjects


def holds_versions(folder: Path) -> bool:
    return any(folder.glob("*/features.json"))


def dataset_names(folder: Path, data_mix: str | None, cfg: TrainConfig | None) -> list[str]:
    """The datasets that are asked for: by the folder, by name, or all of the config's mixture."""
    only = None
    if (folder / "features.json").exists():
        only = folder.resolve().parent.name
    elif holds_versions(folder):
        only = folder.name
    mixture = data_mix or (cfg.data_mix if cfg else only)
    if mixture is None:
        raise DataError(f"{folder}: no TFDS dataset there: if it holds folders of datasets, choose "
                        "with --data_mix NAME")
    if isinstance(mixture, str) and mixture not in oxe.MIXTURES:
        return [mixture]
    resolved = oxe.resolve_mixture(mixture, cfg.datasets if cfg else None)
    names = [name for name, _, _ in resolved]
    if only is None or len(names) == 1:
        return names
    matching = [name for name in names if name.partition(":")[0] == only]
    if not matching:
        raise UserError(f"{folder}: is it one of {', '.join(names)}? Choose with --data_mix NAME")
    return matching


def locate(folder: Path, name: str, version: str) -> Path:
    """The directory of a dataset, in the folder of all datasets, or of its versions, or a version.
    Raises DataError."""
    if holds_versions(folder):
        folder, name = folder.parent, folder.name
    return find_dataset(folder, f"{name}:{version}" if version else name)


# ---- Guessing ------------------------------------------------------------------------------------


WRIST = ("wrist", "hand", "gripper")  # parts of the names of wrist cameras
TEXTS = ("language_instruction", "instruction", "language", "task")  # of instructions, best first


def guess_recipe(features: dict[str, Feature], directory: Path, action: str | None = None
                 ) -> Recipe:
    """A recipe for a dataset without one: images by name, else in order; `action`, unless it is
    given; any text. Raises DataError if that is not enough."""
    steps = {name: feature for name, feature in features.items() if feature.of_step}
    actions = [name for name in (action, "action", "actions") if name in steps]
    texts = [name for name, feature in steps.items() if feature.kind == "Text"]
    for name, feature in features.items():
        named = any(part in name for part in TEXTS)
        if feature.kind == "Text" and not feature.of_step and named:
            texts.append(name)
    texts.sort(key=lambda name: [part not in name for part in TEXTS])
    images = [relative(name) for name, feature in steps.items() if feature.kind == "Image"]
    images.sort(key=lambda name: "depth" in name.lower())  # last
    if not (actions and texts and images):
        raise DataError(f"{directory}: cannot guess action, image and instruction among "
                        f"{sorted(features)}: describe it under `datasets:` in a YAML, and add "
                        "--config")
    state = "0"
    for name in ("state", "observation/proprio", "observation/state"):  # the best last
        feature = steps.get(name)
        if feature and feature.dtype.kind in "biuf" and None not in feature.shape:
            state = relative(name)
    wrist = [name for name in images if any(part in name.lower() for part in WRIST)]
    outside = [name for name in images if name not in wrist]
    for names in (wrist, outside):  # a camera of exactly that name comes first
        names.sort(key=lambda name: [name != part for part in ("wrist", "primary", "secondary")])
    cameras = dict(zip(("primary", "secondary"), outside, strict=False))
    cameras |= dict(zip(("wrist",), wrist, strict=False))
    others = {name.strip("/"): name for name in outside[2:] + wrist[1:]}  # by their own names
    return Recipe(**cameras, cameras=others, action=actions[0], instruction=texts[0], state=state)


def guess_action(recipe: Recipe, table: FrameTable) -> Recipe:
    """The recipe with `target` and `raw` for dimensions that look like targets and grippers."""
    stats = table.statistics["action"]
    targets = looks_like_targets(table.frames, table.episodes, stats)
    words = []
    for low, high, target in zip(stats["min"], stats["max"], targets, strict=True):
        is_gripper = low == 0 and high == 1
        words.append(" target raw" if is_gripper else " target" if target else "")
    if not any(words):
        return recipe
    fields, start = [], 0
    for same, group in itertools.groupby(words):
        stop = start + len(list(group))
        fields.append(f"{recipe.action}[{start}:{stop}]{same}")
        start = stop
    return replace(recipe, action=", ".join(fields))


def relative(name: str) -> str:
    """A feature's name -> a recipe's key for a state or camera."""
    is_observation = name.startswith("observation/")
    return name.removeprefix("observation/") if is_observation else f"/{name}"


def as_yaml(subject: Subject) -> str:
    """The recipe, for a YAML."""
    default = vars(Recipe())
    values = {key: value for key, value in vars(subject.recipe).items() if value != default[key]}
    return yaml.safe_dump({"datasets": {subject.name: values}}, sort_keys=False, width=1000)


# ---- What a dataset contains ---------------------------------------------------------------------


def inspect_dataset(subject: Subject, index_dir: str | None, out: Path) -> None:
    """Print a dataset's content, statistics and findings, and draw some frames."""
    table = subject.table(index_dir, skip_bad_episodes=True)
    print(f"dataset {subject.name} directory {subject.directory} recipe {subject.source}")
    for number, split in enumerate(table.splits):
        count = table.episodes["count"][table.episodes["split"] == number]
        line = f"split {split} episodes {len(count)} frames {count.sum()}"
        if len(count):
            line += f" frames_per_episode {count.min()}..{count.max()}"
        print(line)
    for camera, key in subject.recipe.camera_names.items():
        print(f"camera {camera} key {key}")
    texts = " | ".join(map(repr, table.instructions[:8]))
    print(f"instructions {len(table.instructions)} e.g. {texts}")
    print_statistics(table, subject.kind, with_state=subject.recipe.state != "0")
    for finding in findings(table, subject.kind, action_chunk=2):  # as for any chunk
        print(f"warning: {finding}")
    for reason in table.bad:
        print(f"warning: bad episode: {reason}")
    if subject.source == "guessed":
        guessed = replace(subject, recipe=guess_action(subject.recipe, table))
        print("to train on it, copy and correct (a gripper that is 1 when closed: clip invert "
              f"target raw)\n{as_yaml(guessed)}", end="")
    draw(table, subject.recipe, out)
    print(f"contact_sheet {out}")


def print_statistics(table: FrameTable, kind: str, with_state: bool) -> None:
    """A line for each dimension of the actions and states."""

    def numbers(stats: dict, dim: int) -> str:
        keys = ("min", "q01", "mean", "q99", "max", "std")
        return " ".join(f"{stats[key][dim]:9.4g}" for key in keys)

    titles = "dim       min       q01      mean       q99       max       std"
    stats = table.statistics["action"]
    rows = np.unique(np.linspace(0, len(table.frames) - 1, 1 << 16).astype(int))
    back = round_trip(table.frames["action"][rows], stats, kind)
    print(f"action   {titles}  half_bin     error  cut_off kind")
    for dim, normalized in enumerate(stats["mask"]):
        words = "target" if table.targets[dim] else "change"
        words += "" if normalized else " raw"
        print(f"action {dim:5d} {numbers(stats, dim)} {back['half_bin'][dim]:9.2g} "
              f"{back['error'][dim]:9.2g} {back['clipped'][dim]:8.2%} {words}")
    if with_state:
        print(f"state    {titles}")
        state = table.statistics["proprio"]
        for dim in range(len(state["min"])):
            print(f"state  {dim:5d} {numbers(state, dim)}")


def draw(table: FrameTable, recipe: Recipe, out: Path) -> None:
    """Some frames, all cameras side by side, each with its instruction and action."""
    keys = [recipe.camera(name)[0] for name in recipe.camera_names]
    side, columns = (224, 4) if len(keys) == 1 else (160, max(6 // len(keys), 1))
    width = side * len(keys)  # pixels
    tiles = []
    for row in np.linspace(0, len(table.frames) - 1, 12).astype(int):
        try:
            views = [decode_image(table.read_image(row, table.cameras.index(key)), side)
                     for key in keys]
        except (ValueError, OSError) as error:
            raise DataError(f"{table.where(row)}: {error}: --check finds all such") from error
        text = table.instructions[table.frames["instruction"][row]]
        numbers = " ".join(f"{value:.2f}" for value in table.frames["action"][row])
        caption = [f"frame {row}: {' | '.join(recipe.camera_names)}"]
        caption += textwrap.wrap(text, width // 7)[:2]
        caption += textwrap.wrap(numbers, max(width // 6, 40))
        tiles.append((np.concatenate(views, axis=1), "\n".join(caption)))
    contact_sheet(tiles, columns).save(out)


# ---- Decoding every image ------------------------------------------------------------------------


def check_dataset(subject: Subject, index_dir: str | None) -> int:
    """Decode every image of a dataset, and list episodes with a broken one for skip_bad_episodes ->
    the number of bad episodes. Those that are bad for other reasons count, too."""
    table = subject.table(index_dir, skip_bad_episodes=True, load_proprio=False)
    black = subject.source == "registered"  # in OpenVLA's own datasets, no image is a black one
    check = partial(check_episodes, table.path, table.directory, black)
    parts = np.array_split(np.arange(len(table.episodes)), min(len(table.episodes), 256))
    path = bad_episodes_file(table.directory, index_dir)
    # {file: {record: reason}}; an earlier check's are in table.bad, and not looked at again
    listed: dict[str, dict[str, str]] = json.loads(path.read_text()) if path.exists() else {}
    count = len(table.bad)
    with ProcessPoolExecutor(cores(), get_context("fork"),
                             end_with_parent) as pool:
        bar = tqdm(pool.map(check, parts), f"check {subject.name}", len(parts), leave=False,
                   disable=None)
        for bad in bar:
            count += len(bad)
            for file, record, reason in bad:
                listed.setdefault(file, {})[str(record)] = reason
    for file, records in listed.items():
        for record, reason in records.items():
            print(f"bad episode {table.directory / file}: record {record}: {reason}")
    if listed:
        path.write_text(json.dumps(listed, indent=1))
    cure = " (skip_bad_episodes: true leaves them out)" if listed else ""
    print(f"checked {subject.name} episodes {len(table.episodes)} frames {len(table.frames)} "
          f"bad_episodes {count}{cure}")
    return count


def check_episodes(path: Path, directory: Path, black: bool, episodes: np.ndarray
                   ) -> list[tuple[str, int, str]]:
    """Those of the episodes with an image that cannot be decoded or, unless it may be shown as
    `black`, is missing: [(file, record, reason), ...]."""
    table = FrameTable(path, directory)
    bad = []
    for number in episodes:
        episode = table.episodes[number]
        first = int(episode["first"])
        try:
            for row in range(first, first + int(episode["count"])):
                for camera in range(len(table.cameras)):
                    data = table.read_image(row, camera)
                    if data:
                        decode_native(data)
                    elif not black:
                        raise DataError("it is empty, and would be shown as black")
        except (ValueError, OSError) as error:
            reason = f"{table.cameras[camera]} of frame {row - first}: {one_line(error)}"
            bad.append((table.shards[episode["shard"]], int(episode["record"]), reason))
    return bad


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--inspect", type=Path, metavar="DIR", help="a dataset, or a folder of many")
    what.add_argument("--check", type=Path, metavar="DIR", help="the same; decode all its images")
    parser.add_argument("--data_mix", metavar="NAME", help="a dataset or mixture in that folder")
    parser.add_argument("--config", metavar="YAML", help="with recipes and action_normalization")
    parser.add_argument("--index_dir", metavar="DIR",
                        help="folder for frame tables (default: with the dataset)")
    parser.add_argument("--out", type=Path, default=Path("contact_sheet.png"))
    args = parser.parse_args()
    with exit_with_one_line():
        args.out.parent.mkdir(parents=True, exist_ok=True)
        subjects = find_subjects(args.inspect or args.check, args.data_mix, args.config)
        if args.check:
            if sum([check_dataset(subject, args.index_dir) for subject in subjects]):
                raise UserError("some episodes cannot be used: see above")
            return
        for subject in subjects:
            stem = args.out.stem if len(subjects) == 1 else f"{args.out.stem}_{subject.name}"
            inspect_dataset(subject, args.index_dir, args.out.with_stem(stem))


if __name__ == "__main__":
    main()
