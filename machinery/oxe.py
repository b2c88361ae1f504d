"""Which datasets a training uses, with which weights, and which of their frames.

configs/tables/open_x_embodiment.yaml holds OpenVLA's recipes and mixtures for Open X-Embodiment. A
user's own dataset is described in the same words in the YAML (`datasets:`). fields.py explains the
words, recipes.py applies them.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from machinery.config import (
    RECIPES,
    Recipe,
    TrainConfig,
    UserError,
    first_problem,
    load_table,
    load_yaml,
    nearest,
)
from machinery.frames import DataError, FrameTable, find_dataset, plain, without_version

_table = load_table("open_x_embodiment")
DATASETS: dict[str, Recipe] = RECIPES.validate_python(
    {name: {**recipe, "openvla_rules": True} for name, recipe in _table["datasets"].items()})
MIXTURES: dict[str, dict[str, float]] = _table["mixtures"]  # {name: {dataset: weight}}
REFUSED: dict[str, str] = _table["refused"]  # {dataset: why OpenVLA does not train on it}

# ---- Which frames are used -----------------------------------------------------------------------


def kept_episodes(table: FrameTable, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """The episodes of a split: (first frame, number of frames), each (E,) int64.

    With a "val" split, train on "train"; otherwise on the episodes of "train" that are not held
    out. Episodes without any instruction are left out, and then frames whose instruction the recipe
    does not choose: the episodes that are held out do not depend on that.
    """
    split = np.array(table.splits)[table.episodes["split"]]
    chosen = split == "train"
    if "val" not in table.splits:
        chosen &= held_out(table, chosen) != train
    elif not train:
        chosen = split == "val"
    chosen = table.episodes[chosen & table.episodes["labeled"]]
    first, count = chosen["first"].astype(np.int64), chosen["count"].astype(np.int64)
    if table.chosen is None:
        return first, count
    return divide(first, count, table.chosen.__getitem__)


def held_out(table: FrameTable, chosen: np.ndarray) -> np.ndarray:
    """Which of the chosen episodes (E,) bool to evaluate on, (E,) bool: 5% of them.

    By OpenVLA's rules the last ones (rounded half to even). Otherwise a twentieth, and at least
    one, of the episodes of each instruction that has five, then of all others together. Each
    instruction keeps an episode to train on, unless none has two. The draw depends on the data
    only, and appended episodes change little of it.
    """
    if table.openvla_rules:
        return chosen & (np.cumsum(chosen) > round(95 * int(chosen.sum()) / 100))
    texts = instructions_of(table, chosen & table.episodes["labeled"])
    left = Counter(text for episode in texts.values() for text in episode)
    due = Counter({text: -(-count // 20) for text, count in left.items() if count >= 5})
    draw = np.random.RandomState(0).rand(len(chosen))  # an episode's does not depend on later ones
    order = sorted(texts, key=draw.__getitem__)
    least = round(len(texts) / 20)
    held = []
    for of_each in (True, False):
        for episode in order:
            own = texts[episode]
            needed = any(due[text] > 0 for text in own) if of_each else len(held) < least
            if needed and all(left[text] > 1 for text in own):
                held.append(episode)
                left.subtract(own)
                due.subtract(own)
        order = sorted({*order} - {*held}, key=draw.__getitem__)
    mask = np.zeros(len(chosen), bool)
    mask[held or order[:least]] = True
    return mask


def instructions_of(table: FrameTable, chosen: np.ndarray) -> dict[int, set[str]]:
    """{episode: its instructions, in lower case and without double spaces} of the chosen ones."""
    number = np.repeat(np.arange(len(table.episodes)), table.episodes["count"])
    pairs = np.unique(number * len(table.instructions) + table.frames["instruction"])
    known = [plain(text) for text in table.instructions]
    texts = {episode: set() for episode in np.flatnonzero(chosen).tolist()}
    for episode, text in zip(*np.divmod(pairs, len(table.instructions)), strict=True):
        if episode in texts and known[text]:
            texts[int(episode)].add(known[text])
    return texts


def is_idle(normalized: np.ndarray) -> np.ndarray:
    """(..., steps, 7) normalized action chunks -> (...) bool: does the chunk command no motion?

    For DROID. OpenVLA compares with the value of 0 under the quantiles of all of DROID, which are
    constants in its code. With other statistics, the filter therefore drops nothing, here as there.
    """
    low = np.array(_table["droid"]["q01"], np.float32)
    high = np.array(_table["droid"]["q99"], np.float32)
    zero = np.float32(2) * (-low) / (high - low + np.float32(1e-8)) - np.float32(1)
    return (np.abs(normalized[..., :6] - zero) <= np.float32(1e-5)).all((-1, -2))


def divide(first: np.ndarray, count: np.ndarray, kept: Callable) -> tuple[np.ndarray, np.ndarray]:
    """Stretches of frames -> the stretches of kept frames in them. kept: rows -> bool."""
    firsts, counts = [first[:0]], [count[:0]]
    for part in range(0, len(first), 1000):  # to bound memory
        some_first = first[part : part + 1000]
        some_count = count[part : part + 1000]
        before = np.cumsum(some_count) - some_count
        rows = np.repeat(some_first - before, some_count) + np.arange(some_count.sum())
        rows = rows[kept(rows)]
        begins = (np.diff(rows, prepend=-2) != 1) | np.isin(rows, some_first)
        begins = np.flatnonzero(begins)
        firsts.append(rows[begins])
        counts.append(np.diff(np.append(begins, len(rows))))
    return np.concatenate(firsts), np.concatenate(counts)


# ---- Mixtures ------------------------------------------------------------------------------------


def resolve_mixture(data_mix: str | Mapping[str, float], own: Mapping[str, Recipe] | None = None
                    ) -> list[tuple[str, float, Recipe]]:
    """A mixture's or a dataset's name, or {dataset: weight} -> [(dataset, weight, recipe), ...].

    own: `datasets:` of the YAML. Datasets that OpenVLA refuses are left out. Raises UserError for
    unknown names, and if no dataset remains.
    """
    own = RECIPES.validate_python(own or {})
    known = {**DATASETS, **own}
    refused = left_out(data_mix, own)
    mixture = []
    for name, weight in expand_mixture(data_mix, own).items():
        plain = without_version(name)
        if plain in refused:
            continue
        if plain not in known:
            close = nearest(plain, [*known, *MIXTURES])
            raise UserError(f"data_mix: no dataset or mixture is called {name!r}{close}; describe "
                            "your own under `datasets:`")
        if weight <= 0:
            raise UserError(f"data_mix: {name}: the weight {weight} is not positive")
        mixture.append((name, weight, known[plain]))
    if not mixture:
        raise UserError(f"data_mix: {data_mix}: the mixture is empty: {refused}")
    return mixture


def expand_mixture(data_mix: str | Mapping[str, float], own: Mapping[str, Recipe]
                   ) -> Mapping[str, float]:
    """A mixture by name, or one dataset -> {dataset: weight}."""
    if not isinstance(data_mix, str):
        return data_mix
    if data_mix in MIXTURES and data_mix not in own:
        return MIXTURES[data_mix]
    return {data_mix: 1.0}


def find_recipe(name: str, directory: Path, own: Mapping[str, Recipe]) -> Recipe | None:
    """The recipe of the dataset in a directory: the YAML's (own), OpenVLA's, or the one beside it
    (recipe.yaml). A recipe of the YAML without other keys than names and instructions is added to
    one of these, and names that it leaves out are the latter's."""
    recipe, known = own.get(name), DATASETS.get(name)
    if recipe or not known:
        known = read_recipe(directory) or known
    if not (recipe and known):
        return recipe or known
    empty = replace(recipe, names={}, instructions=[]) == Recipe()
    return replace(known if empty else recipe, names=recipe.names or known.names,
                   instructions=recipe.instructions or known.instructions)


def read_recipe(directory: Path) -> Recipe | None:
    """The recipe in a dataset's directory, if there is one. Raises UserError."""
    path = directory / "recipe.yaml"
    if not path.exists():
        return None
    try:
        values = load_yaml(path.read_text(), str(path)) or {}
        return RECIPES.validate_python({"recipe": values})["recipe"]
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}") from None


def read_recipes(cfg: TrainConfig) -> TrainConfig:
    """The config with the recipes that are beside its datasets (find_recipe)."""
    recipes = dict(cfg.datasets)
    for name in expand_mixture(cfg.data_mix, recipes):
        plain = without_version(name)
        try:
            recipe = find_recipe(plain, find_dataset(cfg.data_root_dir, name), recipes)
        except DataError:  # no such dataset: find_datasets reports all of them
            continue
        if recipe and recipe != DATASETS.get(plain):
            recipes[plain] = recipe
    return cfg.model_copy(update={"datasets": recipes})


def left_out(data_mix: str | Mapping[str, float], own: Mapping[str, Recipe] | None = None
             ) -> dict[str, str]:
    """The datasets of a mixture that OpenVLA does not train on: {dataset: why}."""
    own = own or {}
    names = [without_version(name) for name in expand_mixture(data_mix, own)]
    return {name: REFUSED[name] for name in names if name in REFUSED and name not in own}


def find_datasets(data_root_dir: str, data_mix: str | Mapping[str, float],
                  own: Mapping[str, Recipe], cameras: list[str]
                  ) -> list[tuple[str, float, Recipe, Path]]:
    """The datasets of a mixture: [(dataset, weight, recipe, its directory), ...].

    Raises UserError if one is missing or is there twice, or if no dataset has one of the cameras.
    """
    found, missing = [], []
    for name, weight, recipe in resolve_mixture(data_mix, own):
        try:
            found.append((name, weight, recipe, find_dataset(data_root_dir, name)))
        except DataError as error:
            missing.append(name)
            last_error = error
    if not found:
        raise last_error
    if missing:
        here = ", ".join(f"{name!r}: {weight:g}" for name, weight, *_ in found)
        raise DataError(f"{data_root_dir}: {len(missing)} of {len(missing) + len(found)} datasets "
                        f"are missing: {', '.join(missing)}: download them, or train on the others "
                        f"with data_mix: {{{here}}}")
    owners = {}
    for name, *_, directory in found:
        first = owners.setdefault(directory.resolve(), name)
        if first != name:  # its weight would count twice
            raise UserError(f"data_mix: {first} and {name} are the same files, {directory}: "
                            "remove one")
    if any(without_version(name) in own for name, *_ in found):  # OpenVLA shows black images
        known = sorted({camera for *_, recipe, _ in found for camera in recipe.camera_names})
        for camera in cameras:
            if camera not in known:
                raise UserError(f"cameras: no dataset has {camera!r}, only {', '.join(known)}")
    return found


def mixture_shares(weights: np.ndarray, frames: np.ndarray, balance: bool = True
                   ) -> tuple[np.ndarray, int]:
    """Weights and numbers of frames (all splits) of the datasets -> (share of each among all
    samples, epoch length).

    As in OpenVLA, shares are proportional to weight x frames (without `balance`, to the weights),
    and an epoch ends when every dataset of weight 1 has been seen once. If none has weight 1, for
    which OpenVLA fails, those of the largest weight count.
    """
    shares = weights * frames if balance else weights
    shares = shares / shares.sum()
    primary = weights == (1.0 if 1.0 in weights else weights.max())
    return shares, int((frames / shares)[primary].max())
