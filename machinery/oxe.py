"""Which datasets a training sees, and which of their frames.

OpenVLA's recipes and mixtures for Open X-Embodiment stand in configs/tables/open_x_embodiment.yaml; a user's
own dataset is described in the same words in the YAML (`datasets:`). fields.py says what the words mean,
recipes.py carries them out.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from machinery.config import RECIPES, Recipe, TrainConfig, UserError, load_table, nearest
from machinery.fields import check_recipe
from machinery.frames import DataError, FrameTable, find_dataset

CAMERAS = ("primary", "secondary", "wrist")
_table = load_table("open_x_embodiment")
DATASETS: dict[str, Recipe] = RECIPES.validate_python(_table["datasets"])
MIXTURES: dict[str, dict[str, float]] = _table["mixtures"]  # {name: {dataset: weight}}
REFUSED: dict[str, str] = _table["refused"]  # {dataset: why OpenVLA does not train on it}

# ---- Which frames are shown --------------------------------------------------------------------------------


def kept_episodes(table: FrameTable, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """The episodes of a split: (first frame, number of frames), each (E,) int64.

    OpenVLA's rules: with a "val" split, train on "train"; otherwise on the first 95 % of its episodes
    (rounded half to even). Episodes without any instruction are left out.
    """
    split = np.array(table.splits)[table.episodes["split"]]
    chosen = split == "train"
    if "val" not in table.splits:
        boundary = round(95 * int(chosen.sum()) / 100)
        chosen = chosen & ((np.cumsum(chosen) <= boundary) == train)
    elif not train:
        chosen = split == "val"
    chosen = table.episodes[chosen & table.episodes["labeled"]]
    return chosen["first"].astype(np.int64), chosen["count"].astype(np.int64)


def is_idle(normalized: np.ndarray) -> np.ndarray:
    """(..., steps, 7) normalised action chunks -> (...) bool: does the whole chunk command no motion?

    For DROID. OpenVLA compares with what "zero" would be under the quantiles of the whole of it, written into
    its code; with other statistics the filter therefore drops nothing. Kept so.
    """
    low, high = (np.array(_table["droid"][key], np.float32) for key in ("q01", "q99"))
    zero = np.float32(2) * (-low) / (high - low + np.float32(1e-8)) - np.float32(1)
    return (np.abs(normalized[..., :6] - zero) <= np.float32(1e-5)).all((-1, -2))


def without_idle(first: np.ndarray, count: np.ndarray, actions: Callable) -> tuple[np.ndarray, np.ndarray]:
    """Stretches of frames -> those between idle ones, by the thousand to bound memory. actions: rows ->
    normalised action chunks."""
    stretches = []
    for part in range(0, len(first), 1000):
        f, c = first[part : part + 1000], count[part : part + 1000]
        rows = np.repeat(f - np.cumsum(c) + c, c) + np.arange(c.sum())
        rows = rows[~is_idle(actions(rows))]
        starts = np.flatnonzero((np.diff(rows, prepend=-2) != 1) | np.isin(rows, f))
        stretches.append(np.stack([rows[starts], np.diff(np.append(starts, len(rows)))]))
    return tuple(np.concatenate(stretches, axis=1)) if stretches else (first, count)


# ---- Mixtures ----------------------------------------------------------------------------------------------


def resolve_mixture(data_mix: str | Mapping[str, float], own: Mapping[str, Recipe] | None = None
                    ) -> list[tuple[str, float, Recipe]]:
    """A mixture's or a dataset's name, or {dataset: weight} -> [(dataset, weight, recipe), ...].

    own: the YAML's `datasets:`. Datasets that OpenVLA refuses are left out. Raises UserError for unknown
    names, for field lists that cannot be read, and when nothing is left.
    """
    own = RECIPES.validate_python(own or {})
    for name, recipe in own.items():
        try:
            check_recipe(recipe)
            if ":" in name:
                raise UserError("leave its version away here, and say it in data_mix")
            if recipe.skip_idle and "droid" not in name:  # see is_idle
                raise UserError("skip_idle: knows DROID's pauses alone: remove it, and record no pauses")
        except UserError as error:
            raise UserError(f"datasets: {name}: {error}") from None
    known, mixture = {**DATASETS, **own}, []
    own_name = isinstance(data_mix, str) and data_mix in own
    for name, weight in ({data_mix: 1.0} if own_name else expand_mixture(data_mix)).items():
        plain = str(name).partition(":")[0]
        if not (isinstance(weight, int | float) and 0 < weight < 1e9):
            raise UserError(f"data_mix: the weight of {name} must be positive, below 1e9; it is {weight!r}")
        if plain not in known and plain not in REFUSED:
            raise UserError(f"data_mix: no dataset or mixture is called {name!r}"
                            f"{nearest(plain, [*known, *MIXTURES])}; describe your own under `datasets:`")
        if plain in known:
            mixture.append((name, float(weight), known[plain]))
    if not mixture:
        reasons = "".join(f"; {name}: {why}" for name, why in left_out(data_mix).items())
        raise UserError(f"data_mix: {data_mix}: the mixture is empty: nothing to train on{reasons}")
    return mixture


def expand_mixture(data_mix: str | Mapping[str, float]) -> Mapping[str, float]:
    """A mixture by name, or one dataset -> {dataset: weight}."""
    return MIXTURES.get(data_mix, {data_mix: 1.0}) if isinstance(data_mix, str) else data_mix


def left_out(data_mix: str | Mapping[str, float]) -> dict[str, str]:
    """The datasets of a mixture that OpenVLA does not train on, and why."""
    names = [str(name).partition(":")[0] for name in expand_mixture(data_mix)]
    return {name: REFUSED[name] for name in names if name in REFUSED}


def find_datasets(cfg: TrainConfig) -> list[tuple[str, float, Recipe, Path]]:
    """The mixture that a config names -> [(dataset, weight, recipe, its directory), ...]. Raises UserError
    for datasets that are not there, or are the same, and for cameras that none of them has."""
    found, missing, owners = [], [], {}
    for name, weight, recipe in resolve_mixture(cfg.data_mix, cfg.datasets):
        try:
            found.append((name, weight, recipe, find_dataset(cfg.data_root_dir, name)))
        except DataError as error:
            missing.append((name, error))
    if missing and len(found) + len(missing) > 1:
        here = ", ".join(f"{name!r}: {weight:g}" for name, weight, *_ in found)
        raise DataError(f"{cfg.data_root_dir} has {len(found)} of {len(found) + len(missing)} datasets; "
                        f"there are no {', '.join(name for name, _ in missing)}: fetch them"
                        + f", or train on what is there with data_mix: {{{here}}}" * bool(found))
    if missing:
        raise missing[0][1]
    for name, *_, directory in found:
        if (first := owners.setdefault(directory.resolve(), name)) != name:
            raise UserError(f"data_mix: {first} and {name} are the same files, {directory}: remove one")
    for camera in cfg.cameras:
        own = [recipe for name, _, recipe, _ in found if name.partition(":")[0] in cfg.datasets]
        if own and not any(recipe.camera_keys([camera])[0] for _, _, recipe, _ in found):
            known = {name for recipe in own for name in recipe.camera_names}
            raise UserError(f"cameras: no dataset has {camera!r}; {', '.join(name for name, *_ in found)} "
                            f"have {', '.join(sorted(known)) or 'none'}")
    return found


def mixture_warnings(cfg: TrainConfig, names: list[str], recipes: list[Recipe], tables: list[FrameTable]
                     ) -> list[str]:
    """All that a log should say of the datasets at its start, each line beginning with one's name."""
    found = [f"{name}: left out: {why}" for name, why in left_out(cfg.data_mix).items()
             if name not in cfg.datasets]  # a user's own may have its name
    for name, recipe, table in zip(names, recipes, tables, strict=True):
        lines = [f"left out {len(table.bad)} bad episodes, the first: {table.bad[0]}"] if table.bad else []
        if not any(recipe.camera_keys(cfg.cameras)):
            lines.append(f"its recipe has no {' or '.join(cfg.cameras)} camera: its images are black")
        lines += table.warnings[cfg.action_normalization] + table.warnings["frames"]
        found += [f"{name}: {line}" for line in lines + table.warnings["chunks"] * (cfg.action_chunk > 1)]
    return found


def leave_out_long_texts(cfg: TrainConfig, table: FrameTable, room: int, tokens: Callable) -> list[str]:
    """Find instructions that make prompts of more than `room` tokens; tokens: text -> their number. Raises
    DataError naming the first, unless bad episodes are to be skipped: then theirs are, and told."""
    # no token is shorter than a byte, and templates than 512: most texts need not be counted
    long = {number: count for number, text in enumerate(table.instructions)
            if len(text.encode()) + 512 > room and (count := tokens(text)) > room}
    rows = np.flatnonzero(np.isin(table.frames["instruction"], [*long])) if long else []
    if not len(rows):
        return []
    number, episodes = int(table.frames["instruction"][rows[0]]), np.unique(table.episode_of(rows))
    problem = (f"{table.where(rows[0])}: its instruction makes a prompt of {long[number]} tokens, and "
               f"max_length {cfg.max_length} leaves room for {room}: {table.instructions[number][:100]!r}")
    if not cfg.skip_bad_episodes:
        raise DataError(f"{problem}: raise max_length, or leave such out with skip_bad_episodes: true")
    table.episodes["labeled"][episodes] = False
    return [f"left out {len(episodes)} episodes, the first: {problem}"]
