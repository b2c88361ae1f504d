"""Look at a dataset before training on it, and decode every image once.

    python data.py --inspect DIR [--data_mix NAME]         its content, findings, a picture
    python data.py --inspect DIR --config my_robot.yaml    the same, by the recipe in this YAML
    python data.py --check DIR ...                         decode all images, list bad episodes

A dataset's recipe is that of the YAML, or recipe.yaml in its directory, or a guess. It is printed
for copying, and with --yaml FILE written as a YAML to train with.
"""

import argparse
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import yaml
from tqdm import tqdm

from machinery import oxe
from machinery.config import (
    PROJECT,
    Recipe,
    TrainConfig,
    UserError,
    exit_with_one_line,
    find_input,
    load_config,
    one_line,
)
from machinery.convention import dimension_names
from machinery.fields import (
    check_recipe,
    parse_fields,
    recipe_key,
    recipe_values,
    write_recipe,
)
from machinery.files import read_json, write_json
from machinery.frames import (
    DataError,
    FrameTable,
    bad_episodes_file,
    end_with_parent,
    find_dataset,
    frame_table,
    refuse_lerobot,
    without_version,
)
from machinery.guess import action_fields, assumptions, field_list, guess_kinds, state_fields
from machinery.host import cores
from machinery.images import contact_sheet, decode_image, decode_native
from machinery.peers import evenly
from machinery.rlds import step_features
from machinery.survey import round_trip, survey
from machinery.survey_timing import looks_like_targets


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
        recipe = replace(self.recipe, instructions=[])  # all of it is looked at
        return frame_table(self.directory, recipe, keys, load_proprio, index_dir=index_dir,
                           skip_bad_episodes=skip_bad_episodes)


def find_subjects(folder: Path, data_mix: str | None, config: str | None) -> list[Subject]:
    """The datasets that a command line asks for. Raises UserError."""
    cfg = oxe.read_recipes(load_config(find_input(config))) if config else None
    subjects = []
    for name in dataset_names(folder, data_mix, cfg):
        name, _, version = name.partition(":")
        directory = locate(folder, name, version)
        own = cfg.datasets if cfg else {}
        recipe = oxe.find_recipe(name, directory, own)
        source = config if name in own else str(directory / "recipe.yaml")
        if name in oxe.DATASETS and name not in own:
            source = "registered"
        elif recipe:
            check_recipe(name, recipe)
        else:
            recipe, source = guess_recipe(directory), "guessed"
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
        refuse_lerobot(folder)
        raise DataError(f"{folder}: no TFDS dataset there: if it holds folders of datasets, choose "
                        "with --data_mix NAME")
    if isinstance(mixture, str) and mixture not in oxe.MIXTURES:
        return [mixture]
    resolved = oxe.resolve_mixture(mixture, cfg.datasets if cfg else {})
    names = [name for name, _, _ in resolved]
    if only is None or len(names) == 1:
        return names
    matching = [name for name in names if without_version(name) == only]
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


def guess_recipe(directory: Path) -> Recipe:
    """A recipe for a dataset without one: images by name, else in order; `action`; any text. Raises
    DataError if that is not enough."""
    features = step_features(directory)
    steps = {name: feature for name, feature in features.items() if feature.of_step}
    action = action_fields(steps)
    texts = []
    for name, feature in features.items():
        named = any(part in name for part in TEXTS)
        is_text = feature.dtype.kind == "O" and feature.shape == () and feature.kind != "Image"
        if is_text and (named or (feature.of_step and feature.kind == "Text")):
            texts.append(name)
    texts.sort(key=lambda name: (name not in steps, [part not in name for part in TEXTS]))
    images = [recipe_key(name) for name, feature in steps.items() if feature.kind == "Image"]
    images.sort(key=lambda name: "depth" in name.lower())  # last
    if not (action and texts and images):
        raise DataError(f"{directory}: cannot guess action, image and instruction among "
                        f"{sorted(features)}: describe it under `datasets:` in a YAML, and add "
                        "--config")
    wrist = [name for name in images if any(part in name.lower() for part in WRIST)]
    outside = [name for name in images if name not in wrist]
    for names in (wrist, outside):  # a camera of exactly that name comes first
        names.sort(key=lambda name: [name != part for part in ("wrist", "primary", "secondary")])
    cameras = dict(zip(("primary", "secondary"), outside, strict=False))
    cameras |= dict(zip(("wrist",), wrist, strict=False))
    others = {name.strip("/"): name for name in outside[2:] + wrist[1:]}  # by their own names
    return Recipe(**cameras, cameras=others, action=action, instruction=texts[0],
                  state=state_fields(steps))


def guess_action(recipe: Recipe, table: FrameTable) -> tuple[Recipe, list[str]]:
    """-> (the recipe with words for the dimensions of its action, what it assumes)."""
    looks = looks_like_targets(table.frames, table.episodes, table.statistics["action"])
    names, _ = dimension_names(recipe, table.features)
    some = table.frames["action"][:: len(table.frames) // 200_000 + 1]
    dimensions = guess_kinds(names, some, looks)
    widths = {field.key: table.features[field.key] for field in parse_fields(recipe.action)}
    return replace(recipe, action=field_list(widths, dimensions)), assumptions(dimensions)


def describe_dataset(directory: Path, names: dict[str, list[str]]) -> None:
    """Guess the recipe of a dataset whose numbers have names ({feature: names}), write it into its
    directory, and print it."""
    recipe = replace(guess_recipe(directory), names=names)
    subject = Subject(directory.parent.name, directory, recipe, "guessed")
    subject.recipe, notes = guess_action(recipe, subject.table(None, skip_bad_episodes=False))
    print(f"recipe {write_recipe(directory, subject.recipe)}")
    for note in notes:
        print(f"note: {note}")
    print(as_yaml(subject), end="")


TO_TRAIN = "to train on it, copy and correct:"


def as_yaml(subject: Subject) -> str:
    """The lines of a YAML about the dataset. Its names stay in recipe.yaml."""
    recipe = replace(subject.recipe, names={})
    values = {"data_root_dir": str(subject.directory.resolve().parents[1]),
              "data_mix": subject.name,
              "cameras": [*recipe.camera_names],
              "use_proprio": recipe.state != "0",
              "datasets": {subject.name: recipe_values(recipe)}}
    return yaml.safe_dump(values, sort_keys=False, width=1000, allow_unicode=True)


def write_yaml(subject: Subject, path: Path) -> None:
    """Write a YAML that trains on the dataset. Raises UserError instead of overwriting one."""
    template = PROJECT / "configs/my_robot.yaml"
    if path.exists():
        raise UserError(f"{path} exists: remove it, or choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"""\
# Trains a small model with random weights, in minutes on a CPU. To fine-tune OpenVLA-7B on a GPU,
# add the lines marked "#7b" in the file that this one inherits.
inherits: {template}
vla_id: {subject.name}
{as_yaml(subject)}""", encoding="utf-8")
    print(f"wrote {path}")


# ---- What a dataset contains ---------------------------------------------------------------------


def inspect_dataset(subject: Subject, index_dir: str | None, out: Path) -> None:
    """Print a dataset's content, statistics and findings, and draw some frames."""
    notes = []
    if subject.source == "guessed":
        table = subject.table(index_dir, skip_bad_episodes=True)
        subject.recipe, notes = guess_action(subject.recipe, table)
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
    print_statistics(table, subject.kind, *dimension_names(subject.recipe, table.features))
    if table.unused:
        print(f"unused {', '.join(table.unused)}")
    for finding in survey(table, subject.kind):  # as for any chunk
        print(f"warning: {finding}")
    for reason in table.bad:
        print(f"warning: bad episode: {reason}")
    for note in notes:
        print(f"note: {note}")
    if subject.source == "guessed" or subject.source.endswith("recipe.yaml"):
        print(f"{TO_TRAIN}\n{as_yaml(subject)}", end="")
    draw(table, subject.recipe, out)
    print(f"contact_sheet {out}")


def print_statistics(table: FrameTable, kind: str, names: list[str], state_names: list[str]
                     ) -> None:
    """A line for each dimension of the actions and states."""

    def numbers(stats: dict, dim: int) -> str:
        keys = ("min", "q01", "mean", "q99", "max", "std")
        return " ".join(f"{stats[key][dim]:9.4g}" for key in keys)

    titles = "dim       min       q01      mean       q99       max       std"
    stats = table.statistics["action"]
    some = table.frames["action"][evenly(len(table.frames), 1 << 16)]
    back = round_trip(some, stats, kind)
    print(f"action   {titles}  half_bin     error  cut_off kind        name")
    for dim, name in enumerate(names):
        words = "target" if table.targets[dim] else "change"
        words += "" if stats["mask"][dim] else " raw"
        print(f"action {dim:5d} {numbers(stats, dim)} {back['half_bin'][dim]:9.2g} "
              f"{back['error'][dim]:9.2g} {back['clipped'][dim]:8.2%} {words:11} {name}")
    if state_names != ["0"]:
        print(f"state    {titles} name")
        for dim, name in enumerate(state_names):
            print(f"state  {dim:5d} {numbers(table.statistics['proprio'], dim)} {name}")


def draw(table: FrameTable, recipe: Recipe, out: Path) -> None:
    """Some frames, all cameras side by side, each with its instruction and action."""
    keys = [recipe.camera(name)[0] for name in recipe.camera_names]
    side, columns = (224, 4) if len(keys) == 1 else (160, max(6 // len(keys), 1))
    tiles = []
    for row in evenly(len(table.frames), 12):
        try:
            views = [decode_image(table.read_image(row, table.cameras.index(key)), side)
                     for key in keys]
        except (ValueError, OSError) as error:
            raise DataError(f"{table.where(row)}: {error}: --check finds all such") from error
        text = table.instructions[table.frames["instruction"][row]]
        numbers = " ".join(f"{value:.2f}" for value in table.frames["action"][row])
        caption = f"frame {row}: {' | '.join(recipe.camera_names)}\n{text[:100]}\n{numbers}"
        tiles.append((views, caption))
    contact_sheet(tiles, columns).save(out)


# ---- Decoding every image ------------------------------------------------------------------------


def check_dataset(subject: Subject, index_dir: str | None) -> int:
    """Decode every image of a dataset, and list episodes with a broken one for skip_bad_episodes ->
    the number of bad episodes. Those that are bad for other reasons count, too."""
    table = subject.table(index_dir, skip_bad_episodes=True, load_proprio=False)
    black = subject.source == "registered"  # in OpenVLA's own datasets, no image is a black one
    check = partial(check_episodes, table.path, table.directory, black)
    parts = np.array_split(np.arange(len(table.episodes)), min(len(table.episodes), 256))
    found = []
    with ProcessPoolExecutor(cores(), get_context("fork"), end_with_parent) as pool:
        bar = tqdm(pool.map(check, parts), f"check {subject.name}", len(parts), leave=False,
                   disable=None)
        for bad in bar:
            found += bad
    listed = list_bad_episodes(bad_episodes_file(table.directory, index_dir), found)
    for file, records in listed.items():
        for record, reason in records.items():
            print(f"bad episode {table.directory / file}: record {record}: {reason}")
    # an earlier check's are in table.bad, and were not looked at again
    count = len(table.bad) + len(found)
    cure = " (skip_bad_episodes: true leaves them out)" if listed else ""
    print(f"checked {subject.name} episodes {len(table.episodes)} frames {len(table.frames)} "
          f"bad_episodes {count}{cure}")
    return count


def list_bad_episodes(path: Path, bad: Iterable[tuple[str, int, str]]) -> dict[str, dict[str, str]]:
    """Add (file, record, reason) to a list of bad episodes (frames.bad_episodes_file), for
    skip_bad_episodes -> the complete list, {file: {record: reason}}."""
    listed = read_json(path, {})
    for file, record, reason in bad:
        listed.setdefault(file, {})[str(record)] = reason
    if listed:
        write_json(path, listed)
    return listed


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


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which datasets to look at, and how: for doctor.py, too."""
    parser.add_argument("--data_mix", metavar="NAME", help="a dataset or mixture in that folder")
    parser.add_argument("--config", metavar="YAML", help="with recipes and action_normalization")
    parser.add_argument("--index_dir", metavar="DIR",
                        help="folder for frame tables (default: with the dataset)")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--inspect", type=Path, metavar="DIR", help="a dataset, or a folder of many")
    what.add_argument("--check", type=Path, metavar="DIR", help="the same; decode all its images")
    add_options(parser)
    parser.add_argument("--out", type=Path, default=Path("contact_sheet.png"),
                        help="the picture")
    parser.add_argument("--yaml", type=Path, metavar="FILE", help="write a YAML to train with")
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
            if args.yaml:
                write_yaml(subject, args.yaml)


if __name__ == "__main__":
    sys.exit(main())  # before data.py imports PyTorch
