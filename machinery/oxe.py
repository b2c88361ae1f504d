"""Which datasets a training uses, with which weights, and which of their frames.

configs/tables/open_x_embodiment.yaml holds OpenVLA's recipes and mixtures for Open X-Embodiment. A
user's own dataset is described in the same words in the YAML (`datasets:`). fields.py explains the
words, recipes.py applies them.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from machinery.checks import findings
from machinery.config import RECIPES, Recipe, TrainConfig, UserError, load_table, nearest
from machinery.fields import check_recipe
from machinery.frames import DataError, FrameTable, find_dataset

_table = load_table("open_x_embodiment")
DATASETS: dict[str, Recipe] = RECIPES.validate_python(_table["datasets"])
MIXTURES: dict[str, dict[str, float]] = _table["mixtures"]  # {name: {dataset: weight}}
REFUSED: dict[str, str] = _table["refused"]  # {dataset: why OpenVLA does not train on it}

# ---- Which frames are used -----------------------------------------------------------------------


def kept_episodes(table: FrameTable, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """The episodes of a split: (first frame, number of frames), each (E,) int64.

    OpenVLA's rules: with a "val" split, train on "train"; otherwise on the first 95% of its
    episodes (rounded half to even). Episodes without any instruction are left out.
    """
    split = np.array(table.splits)[table.episodes["split"]]
    chosen = split == "train"
    if "val" not in table.splits:
        boundary = round(95 * int(chosen.sum()) / 100)
        in_train = np.cumsum(chosen) <= boundary
        chosen &= in_train == train
    elif not train:
        chosen = split == "val"
    chosen = table.episodes[chosen & table.episodes["labeled"]]
    return chosen["first"].astype(np.int64), chosen["count"].astype(np.int64)


def is_idle(normalized: np.ndarray) -> np.ndarray:
    """(..., steps, 7) normalized action chunks -> (...) bool: does the chunk command no motion?

    For DROID. OpenVLA compares with the value of 0 under the quantiles of all of DROID, which are
    constants in its code. With other statistics, the filter therefore drops nothing, here as there.
    """
    low = np.array(_table["droid"]["q01"], np.float32)
    high = np.array(_table["droid"]["q99"], np.float32)
    zero = np.float32(2) * (-low) / (high - low + np.float32(1e-8)) - np.float32(1)
    return (np.abs(normalized[..., :6] - zero) <= np.float32(1e-5)).all((-1, -2))


def without_idle(first: np.ndarray, count: np.ndarray, actions: Callable
                 ) -> tuple[np.ndarray, np.ndarray]:
    """Stretches of frames -> those between idle frames. actions: rows -> normalized chunks."""
    firsts, counts = [first[:0]], [count[:0]]
    for part in range(0, len(first), 1000):  # to bound memory
        some_first = first[part : part + 1000]
        some_count = count[part : part + 1000]
        before = np.cumsum(some_count) - some_count
        rows = np.repeat(some_first - before, some_count) + np.arange(some_count.sum())
        rows = rows[~is_idle(actions(rows))]
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
    unknown names, recipes that cannot be right, and if no dataset remains.
    """
    own = RECIPES.validate_python(own or {})
    for name, recipe in own.items():
        check_recipe(name, recipe)
    known = {**DATASETS, **own}
    refused = left_out(data_mix, own)
    mixture = []
    for name, weight in expand_mixture(data_mix, own).items():
        plain = name.partition(":")[0]  # without a version
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


def left_out(data_mix: str | Mapping[str, float], own: Mapping[str, Recipe] | None = None
             ) -> dict[str, str]:
    """The datasets of a mixture that OpenVLA does not train on: {dataset: why}."""
    own = own or {}
    names = [name.partition(":")[0] for name in expand_mixture(data_mix, own)]
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
            first_error = error
    if len(missing) == 1 and not found:
        raise first_error
    if missing:
        cure = "download them"
        if found:
            here = ", ".join(f"{name!r}: {weight:g}" for name, weight, *_ in found)
            cure += f", or train on the others with data_mix: {{{here}}}"
        raise DataError(f"{data_root_dir}: {len(missing)} of {len(missing) + len(found)} datasets "
                        f"are missing: {', '.join(missing)}: {cure}")
    owners = {}
    for name, *_, directory in found:
        first = owners.setdefault(directory.resolve(), name)
        if first != name:  # its weight would count twice
            raise UserError(f"data_mix: {first} and {name} are the same files, {directory}: "
                            "remove one")
    if any(name.partition(":")[0] in own for name, *_ in found):  # OpenVLA shows black images
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


def mixture_notes(cfg: TrainConfig, mixture) -> list[str]:
    """Warnings for the start of a training on a data.Mixture, a line each."""
    refused = left_out(cfg.data_mix, cfg.datasets)
    notes = [f"{name}: left out: {why}" for name, why in refused.items()]
    for name, table in zip(mixture.names, mixture.tables, strict=True):
        for finding in findings(table, cfg.action_normalization, cfg.action_chunk):
            if finding.severity == "high":
                notes.append(f"{name}: {finding}")
    return notes
