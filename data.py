"""From frame tables to batches.

A training batch is a pure function of (seed, step): `Mixture.draw` says which frames sample number g, g+1,
... of the run are, by arithmetic alone. No shuffle buffer, no state to save: resuming at step k means
starting at sample k x global_batch_size; one GPU or 64 see the same global batches, each rank taking its
slice.

Read in this order: permute and interleave (which frame comes when), Mixture (datasets, weights, one sample),
TrainBatches and collate (what the DataLoader's workers run). The image functions and `python data.py
--inspect` stand at the end. How a dataset is read from disk is in rlds.py, what its fields mean in oxe.py.
"""

import argparse
import functools
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import oxe
from action_tokenizer import ActionTokenizer, prompt_ids
from rlds import DataError, FrameTable, find_dataset, frame_table, step_features

IGNORE_INDEX = -100  # label of tokens that are not learned, cross_entropy's default

# ------------------------------------------------------------------------------------------------------------
# Which frame comes when


def mix_bits(*numbers) -> np.ndarray:
    """Hash integers (scalars or arrays, broadcast) to a uint64 that looks random: SplitMix64 for each."""
    h = np.uint64(0)
    with np.errstate(over="ignore"):
        for number in numbers:
            h = (h ^ np.asarray(number).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            h = h ^ (h >> np.uint64(31))
    return h


def permute(index: np.ndarray, n: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Element `index` of a random permutation of 0..n-1 chosen by `key`, without making the permutation.

    A Feistel network permutes the numbers of 2b bits, for the smallest b with 4^b >= n; a result that is not
    below n is sent through again until it is, which keeps the map one-to-one (cycle walking). All arguments
    broadcast.
    """
    index, n, key = (a.astype(np.uint64) for a in np.broadcast_arrays(index, n, key))
    bits = np.uint64(1) + np.floor(np.log2(np.maximum(n, 2) - np.uint64(1)) / 2).astype(np.uint64)
    mask = (np.uint64(1) << bits) - np.uint64(1)
    out = index.copy()
    todo = np.arange(out.size)
    while todo.size:
        low, high = out[todo] & mask[todo], out[todo] >> bits[todo]
        for r in range(4):
            low, high = high ^ (mix_bits(key[todo], r, low) & mask[todo]), low
        out[todo] = (high << bits[todo]) | low
        todo = todo[out[todo] >= n[todo]]
    return out.astype(np.int64)


def interleave(weights: np.ndarray, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples first .. first+count-1 of the mixture -> (which dataset, how many samples of it came before).

    Visit j of dataset d is due at time (j + phase_d) / weight_d, and samples come in the order of their due
    times. So each dataset's share is exact to within 1 + weight_d x D / 2 samples at every moment, and any
    stretch can be computed on its own. weights: (D,) positive, sum 1.
    """
    phase = (np.arange(len(weights)) + 0.5) / len(weights)
    start = max(first - len(weights), 0)  # so early that no more than `first` samples can be due before it

    def due(dataset, visit):
        return (visit + phase[dataset]) / weights[dataset]

    every = np.arange(len(weights))
    done = np.ceil(start * weights - phase).clip(0)  # visits due before `start`; corrected for rounding:
    done += due(every, done) < start
    done -= (done > 0) & (due(every, done - 1) >= start)
    until = np.ceil((first + count + len(weights)) * weights - phase).clip(0) + 1
    sizes = (until - done).clip(0).astype(np.int64)
    dataset = np.repeat(every, sizes)
    visit = np.arange(sizes.sum()) + np.repeat(done.astype(np.int64) - np.cumsum(sizes) + sizes, sizes)
    order = np.argsort(due(dataset, visit), kind="stable")[first - int(done.sum()) :][:count]
    return dataset[order], visit[order]


# ------------------------------------------------------------------------------------------------------------
# Normalisation


def normalize(values: np.ndarray, stats: Mapping, kind: str) -> np.ndarray:
    """(..., D) float32 -> the same in [-1, 1] (kind "bounds_q99", "bounds") or of unit deviation ("normal").

    stats: "action" or "proprio" of dataset_statistics.json. Bit for bit OpenVLA's, which zeroes dimensions
    that never change (even masked ones: a gripper that is always open becomes 0, not 1).
    """
    f32 = functools.partial(np.asarray, dtype=np.float32)
    mask = np.array(stats.get("mask", [True] * values.shape[-1]))
    if kind == "normal":
        return np.where(mask, (values - f32(stats["mean"])) / f32(np.array(stats["std"]) + 1e-8), values)
    low, high = (np.array(stats[key]) for key in BOUNDS[kind])
    scaled = np.clip(np.float32(2) * (values - f32(low)) / f32(high - low + 1e-8) - np.float32(1), -1, 1)
    constant = np.array(stats["min"]) == np.array(stats["max"])
    return np.where(constant, np.float32(0), np.where(mask, scaled, values))


def unnormalize(actions: np.ndarray, stats: Mapping, kind: str) -> np.ndarray:
    """Undo normalize for actions (..., D) float64, as OpenVLA's predict_action does: masked dimensions
    stay as they are (a gripper in 0..1), and so does not undo the zeroing of constants."""
    mask = np.array(stats.get("mask", [True] * actions.shape[-1]))
    if kind == "normal":
        return np.where(mask, actions * (np.array(stats["std"]) + 1e-8) + np.array(stats["mean"]), actions)
    low, high = (np.array(stats[key]) for key in BOUNDS[kind])
    return np.where(mask, 0.5 * (actions + 1) * (high - low) + low, actions)


BOUNDS = {"bounds_q99": ("q01", "q99"), "bounds": ("min", "max")}

# ------------------------------------------------------------------------------------------------------------
# Datasets and samples


def mixture_shares(weights: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, int]:
    """Weights and numbers of frames (all splits) of the datasets -> (each one's share of all samples, epoch
    length).

    As OpenVLA: shares are in proportion to weight x frames, and an epoch is over when the datasets of weight
    1 have been seen once. (Without any of weight 1, where OpenVLA fails: those of the largest weight.)
    """
    shares = weights * sizes / np.sum(weights * sizes)
    primary = weights == (1.0 if (weights == 1.0).any() else weights.max())
    return shares, int((sizes / shares)[primary].max())


class Mixture:
    """The datasets of a mixture: opened, weighted, and one split of each ready to be drawn from.

    cfg: data_root_dir, data_mix, datasets, cameras, use_proprio, window_size, action_chunk,
         action_normalization, image_size, image_aug, seed, index_dir, skip_bad_episodes, prompt_style,
         max_length (see train_vla.TrainConfig)
    """

    def __init__(self, cfg, tokenizer=None, train: bool = True):
        self.cfg, self.tokenizer, self.train = cfg, tokenizer, train
        mixture = oxe.resolve_mixture(cfg.data_mix, cfg.datasets)
        self.names = [name for name, _, _ in mixture]
        self.recipes = [recipe for _, _, recipe in mixture]
        self.tables = [self._open(name, recipe) for name, _, recipe in mixture]
        self.statistics = {}  # what dataset_statistics.json holds
        for name, recipe, table in zip(self.names, self.recipes, self.tables, strict=True):
            size, absolute = table.frames.dtype["action"].shape[0], recipe.absolute
            if absolute > size:
                raise DataError(f"{name}: {absolute} absolute action dimensions of {size}: lower `absolute` "
                                "in its recipe")
            mask = [True] * (size - absolute) + [False] * absolute
            action = {**table.statistics["action"], "mask": mask}
            self.statistics[name] = {**table.statistics, "action": action}
        dims = {name: len(self.statistics[name]["action"]["mask"]) for name in self.names}
        if len(set(dims.values())) > 1:
            raise ValueError(f"data_mix: datasets with different action dimensions cannot be mixed: {dims}")
        self.action_dim = dims[self.names[0]]
        self.proprio_dim = 0
        if cfg.use_proprio:  # shorter states are padded with zeros
            self.proprio_dim = max(len(stats["proprio"]["mean"]) for stats in self.statistics.values())
        self.action_tokenizer = ActionTokenizer(tokenizer.action_vocab_size) if tokenizer else None

        sizes = np.array([self.statistics[name]["num_transitions"] for name in self.names])
        weights = np.array([weight for _, weight, _ in mixture])
        self.weights, self.epoch_length = mixture_shares(weights, sizes)
        self.runs = [self._kept_runs(d) for d in range(len(self.names))]
        self.sizes = np.array([run[2][-1] if len(run[2]) else 0 for run in self.runs])
        if not self.sizes.all():
            empty = self.names[int(np.argmin(self.sizes))]
            kind, path = "training" if train else "held-out", find_dataset(cfg.data_root_dir, empty)
            raise DataError(f"{empty}: no {kind} frame with an instruction in {path}")
        self.warnings = [f"{name}: left out {len(table.bad)} bad episodes, the first: {table.bad[0]}"
                         for name, table in zip(self.names, self.tables, strict=True) if table.bad]
        self.warnings += [f"{name}: its recipe has no {' or '.join(cfg.cameras)} camera: its images are black"
                          for name, recipe in zip(self.names, self.recipes, strict=True)
                          if not any(recipe.camera_keys(cfg.cameras))]

    def _open(self, name: str, recipe: oxe.Recipe) -> FrameTable:
        cfg = self.cfg
        keys = recipe.camera_keys(cfg.cameras)
        standardize = functools.partial(oxe.standardize, recipe=recipe, cameras=keys,
                                        load_proprio=cfg.use_proprio)
        return frame_table(find_dataset(cfg.data_root_dir, name), standardize, keys,
                           oxe.fingerprint(recipe, cfg.use_proprio), index_dir=cfg.index_dir,
                           skip_bad_episodes=cfg.skip_bad_episodes)

    def _kept_runs(self, d: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The frames of dataset d that this split may show, as runs of consecutive ones: (first, count, total
        so far).

        OpenVLA's rules: with a "val" split, train on "train"; otherwise on the first 95 % of its episodes
        (rounded half to even). Episodes without any instruction are left out.
        """
        table, episodes = self.tables[d], self.tables[d].episodes
        split = np.array(table.splits)[episodes["split"]]
        train = split == "train"
        if "val" in table.splits:
            chosen = train if self.train else split == "val"
        else:
            position = np.cumsum(train) - 1  # number of the episode within "train"
            boundary = round(95 * int(train.sum()) / 100)
            chosen = train & ((position < boundary) == self.train)
        chosen = episodes[chosen & episodes["labeled"]]
        first, count = chosen["first"].astype(np.int64), chosen["count"].astype(np.int64)
        if self.recipes[d].skip_idle:
            first, count = self._without_idle(d, first, count)
        return first[count > 0], count[count > 0], np.cumsum(count[count > 0])

    def _without_idle(self, d: int, first: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Runs of frames -> the runs between idle ones, by the thousand episodes to bound memory."""
        runs = []
        for part in range(0, len(first), 1000):
            f, c = first[part : part + 1000], count[part : part + 1000]
            rows = np.repeat(f - np.cumsum(c) + c, c) + np.arange(c.sum())
            rows = rows[~oxe.is_idle(self.actions(d, rows))]
            starts = np.flatnonzero((np.diff(rows, prepend=-2) != 1) | np.isin(rows, f))
            runs.append(np.stack([rows[starts], np.diff(np.append(starts, len(rows)))]))
        return tuple(np.concatenate(runs, axis=1)) if runs else (first, count)

    def draw(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Samples first .. first+count-1 of the training -> (dataset, frame row, epoch of that dataset), each
        (count,)."""
        dataset, visit = interleave(self.weights, first, count)
        epoch, index = np.divmod(visit, self.sizes[dataset])
        index = permute(index, self.sizes[dataset], mix_bits(self.cfg.seed, dataset, epoch))
        return dataset, self.rows(dataset, index), epoch

    def rows(self, dataset: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Number of a kept frame within its dataset -> its row in the frame table."""
        row = np.empty_like(index)
        for d in np.unique(dataset):
            first, count, total = self.runs[d]
            i = index[dataset == d]
            run = np.searchsorted(total, i, side="right")
            row[dataset == d] = first[run] + i - (total - count)[run]
        return row

    def actions(self, d: int, rows: np.ndarray) -> np.ndarray:
        """Normalised actions that follow frames `rows` (R,) of dataset d -> (R, action_chunk, action_dim)
        float32.

        Past the end of the episode, relative dimensions are 0 and absolute ones repeat the last, as in
        OpenVLA.
        """
        table, stats = self.tables[d], self.statistics[self.names[d]]["action"]
        episode = table.episodes[table.episode_of(rows)]
        wanted = rows[:, None] + np.arange(self.cfg.action_chunk)
        last = (episode["first"] + episode["count"])[:, None] - 1
        actions = table.frames["action"][np.minimum(wanted, last)]
        actions = normalize(actions, stats, self.cfg.action_normalization)
        actions[..., : self.action_dim - self.recipes[d].absolute][wanted > last] = 0
        return actions

    def sample(self, d: int, row: int, epoch: int = 0, augment_seed: int | None = None) -> dict:
        """One training sample: images (N, H, W, 3) uint8, N = window_size x cameras; input_ids and labels
        (L,) int64; dataset; proprio (P,) float32 if used. With augment_seed, images are augmented, each
        with its own numbers; without, a model trained with augmentation sees the crop it will act with."""
        cfg, table, name = self.cfg, self.tables[d], self.names[d]
        first = int(table.first_frames[table.episode_of(row)])
        images = []
        for past in range(cfg.window_size - 1, -1, -1):
            for key in self.cameras_shown(d, row, epoch):
                try:
                    data = table.read_image(max(row - past, first), table.cameras.index(key))
                    images.append(decode_image(data, cfg.image_size))
                except (ValueError, OSError) as error:
                    raise DataError(f"{table.where(row)}: {key} of frame {row - first}: {error}") from error
        if augment_seed is not None:
            images = [augment(image, **draw_augmentation(augment_seed, i)) for i, image in enumerate(images)]
        elif cfg.image_aug:
            images = [center_crop(image, cfg.image_size) for image in images]

        frame = table.frames[row]
        prompt = self._prompt(table.instructions[frame["instruction"]])
        try:
            targets = self.action_tokenizer.encode(self.actions(d, np.array([row])).reshape(-1))
        except ValueError as error:
            raise DataError(f"{table.where(row)}: frame {row - first}: {error}") from error
        targets = [*targets.tolist(), self.tokenizer.eos_token_id]
        sample = {"images": np.stack(images), "input_ids": np.array(prompt + targets), "dataset": d,
                  "labels": np.array([IGNORE_INDEX] * len(prompt) + targets)}
        if cfg.use_proprio:
            proprio = normalize(frame["proprio"], self.statistics[name]["proprio"], cfg.action_normalization)
            sample["proprio"] = np.pad(proprio, (0, self.proprio_dim - len(proprio)))
        return sample

    def cameras_shown(self, d: int, row: int, epoch: int) -> tuple[str | None, ...]:
        """The keys of the images that cfg.cameras means for a frame. DROID has two exterior cameras; which
        one is `primary` is drawn once per episode and epoch."""
        choices = [(getattr(self.recipes[d], camera) or "").split("|") for camera in self.cfg.cameras]
        coin = int(mix_bits(self.cfg.seed, d, epoch, self.tables[d].episode_of(row))) & 1
        return tuple(keys[coin % len(keys)] or None for keys in choices)

    @functools.lru_cache(maxsize=4096)  # noqa: B019 (lives as long as the run)
    def _prompt(self, instruction: str) -> list[int]:
        ids = prompt_ids(self.tokenizer, instruction, self.cfg.prompt_style)
        if len(ids) + self.cfg.action_chunk * self.action_dim + 1 > self.cfg.max_length:
            raise DataError(f"an instruction makes a prompt of {len(ids)} tokens, too long for max_length "
                            f"{self.cfg.max_length}: {instruction[:200]!r}")
        return ids


def collate(samples: list[dict], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Stack samples to a batch; input_ids and labels are padded on the right to the longest."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    for sample in samples:
        for key, fill in (("input_ids", pad_token_id), ("labels", IGNORE_INDEX)):
            sample[key] = np.append(sample[key], [fill] * (longest - len(sample[key]))).astype(np.int64)
    return torch.utils.data.default_collate(samples)


class TrainBatches(torch.utils.data.Dataset):
    """Micro-batch number i of this rank, counted from the start of the run. For a DataLoader with
    batch_size=None."""

    def __init__(self, mixture: Mixture, global_batch: int, micro_batch: int, rank: int, world_size: int):
        self.mixture, self.global_batch, self.micro_batch = mixture, global_batch, micro_batch
        self.rank, self.world_size = rank, world_size

    def draw(self, i: int) -> list[tuple[int, int, int, int]]:
        """The samples of micro-batch i: (number in the run, dataset, frame row, epoch of that dataset)."""
        step, micro = divmod(i, self.global_batch // (self.micro_batch * self.world_size))
        first = step * self.global_batch + (micro * self.world_size + self.rank) * self.micro_batch
        numbers = range(first, first + self.micro_batch)
        return list(zip(numbers, *self.mixture.draw(first, self.micro_batch), strict=True))

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        augmented = self.mixture.cfg.image_aug and self.mixture.train
        samples = [self.mixture.sample(d, row, epoch, number if augmented else None)
                   for number, d, row, epoch in self.draw(i)]
        return collate(samples, self.mixture.tokenizer.pad_token_id)


# ------------------------------------------------------------------------------------------------------------
# Images


def decode_image(data: bytes, size: int) -> np.ndarray:
    """JPEG or PNG bytes -> (size, size, 3) uint8. No bytes give a black image."""
    return resize_image(decode_native(data), size) if data else np.zeros((size, size, 3), np.uint8)


def decode_native(data: bytes) -> np.ndarray:
    """JPEG or PNG bytes -> (H, W, 3) uint8.

    JPEGs are decoded with the fast DCT and plain upsampling, as TensorFlow's decode_image does; the accurate
    ones differ from it on two thirds of all values.
    """
    if simplejpeg.is_jpeg(data):
        return simplejpeg.decode_jpeg(data, fastdct=True, fastupsample=False)
    image = Image.open(io.BytesIO(data))
    if image.mode == "I;16":  # depth, for example: its upper eight bits, as TensorFlow
        image = Image.fromarray((np.array(image) >> 8).astype(np.uint8))
    return np.array(image.convert("RGB"))


def resize_image(image: np.ndarray, size: int, strategy: str = "lanczos", fill: Sequence[int] = (0, 0, 0)
                 ) -> np.ndarray:
    """(H, W, 3) uint8 -> (size, size, 3).

    strategy "lanczos" does not keep the aspect ratio: how OpenVLA's training data is resized. "resize-naive",
    "resize-crop" (cut off what is too long) and "letterbox" (pad with the colour `fill`) are bicubic: how its
    processors treat what they are given to act on.
    """
    if image.shape[:2] == (size, size):
        return image
    if strategy != "lanczos":
        return _resize_bicubic(Image.fromarray(image), size, strategy, fill)
    try:
        x = torch.from_numpy(image).permute(2, 0, 1)[None]
        x = F.interpolate(x, (size, size), mode="lanczos", antialias=True)
        return x[0].permute(1, 2, 0).numpy()
    except (ValueError, NotImplementedError):  # before PyTorch 2.15; Pillow: within 1, four times as slow
        return np.array(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS))


def _resize_bicubic(image: Image.Image, size: int, strategy: str, fill: Sequence[int]) -> np.ndarray:
    (width, height), shape = image.size, (size, size)
    if strategy == "letterbox":
        longest = max(width, height)
        left, top = (longest - width) // 2, (longest - height) // 2
        padded = Image.new("RGB", (width + 2 * left, height + 2 * top), tuple(fill))
        padded.paste(image, (left, top))
        image, (width, height) = padded, padded.size  # one pixel off square where the difference was odd
    if strategy != "resize-naive":  # the shorter side becomes `size`
        shape = (size * width // min(width, height), size * height // min(width, height))
    image = image.resize(shape, Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2) for side in image.size)
    return np.array(image.crop((left, top, left + size, top + size)))


CROP_SIDE = 0.9**0.5  # the crop keeps 90 % of the area


def crop(image: np.ndarray, top: float, left: float, size: int) -> torch.Tensor:
    """(H, W, 3) uint8 -> (3, size, size) float32 in 0..1: the part that begins at (top, left), given as
    fractions of the sides, and is CROP_SIDE of them long; bilinear, as tf.image.crop_and_resize."""
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    y_grid, x_grid = (torch.linspace(-1, 1, size) * CROP_SIDE + (2 * offset + CROP_SIDE - 1)
                      for offset in (top, left))
    grid = torch.stack(torch.broadcast_tensors(x_grid, y_grid[:, None]))  # (2, size, size)
    return F.grid_sample(x, grid.permute(1, 2, 0)[None], align_corners=True)[0].mul_(1 / 255)


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (size, size, 3): what a model trained on random crops is shown when it acts."""
    x = crop(image, (1 - CROP_SIDE) / 2, (1 - CROP_SIDE) / 2, size).clamp_(0, 1)
    return x.mul_(255.5).clamp_(max=255).byte().permute(1, 2, 0).numpy()


def draw_augmentation(*seed: int) -> dict[str, float]:
    """Random parameters for `augment`, in OpenVLA's ranges. OpenVLA's crops always lie on the image's
    diagonal, because it draws both offsets with one seed; ours are independent."""
    ranges = {"top": (0, 1 - CROP_SIDE), "left": (0, 1 - CROP_SIDE), "brightness": (-0.2, 0.2),
              "contrast": (0.8, 1.2), "saturation": (0.8, 1.2), "hue": (-0.05, 0.05)}
    uniform = mix_bits(*seed, np.arange(len(ranges))) / 2.0**64
    return {name: low + u * (high - low)
            for (name, (low, high)), u in zip(ranges.items(), uniform.tolist(), strict=True)}


def augment(image: np.ndarray, top: float, left: float, brightness: float, contrast: float, saturation: float,
            hue: float) -> np.ndarray:
    """(S, S, 3) uint8 -> the same: crop at (top, left) and resize back, then brightness, contrast,
    saturation, hue, as OpenVLA does with TensorFlow (dlimp's augment_image); hue as a fraction of the
    circle."""
    x = crop(image, top, left, len(image)).add_(brightness).clamp_(0, 1)  # (3, S, S)
    mean = x.mean((1, 2), keepdim=True)
    x = x.mul_(contrast).add_(mean * (1 - contrast)).clamp_(0, 1).numpy()

    # to hue, value and chroma (= saturation x value), by sorting instead of branching, and back
    r, g, b = x
    high, low = np.maximum(g, b), np.minimum(g, b)
    value, other = np.maximum(r, high), np.minimum(r, high)
    chroma = value - np.minimum(other, low)
    swapped, below = (g < b).view(np.int8), (r < high).view(np.int8)
    sextant = below * (12 * swapped - 2) - 6 * swapped  # which part of the colour circle this order means
    h = np.abs((other - low) / np.maximum(chroma, np.float32(1e-9)) + sextant) + np.float32(6 * hue)
    h -= np.float32(6) * np.floor(h * np.float32(1 / 6))
    chroma = np.minimum(chroma * np.float32(saturation), value)
    x = 2 - np.abs(h - np.array([3, 2, 4], np.float32)[:, None, None])
    x[0] = 1 - x[0]
    x = x.clip(0, 1, out=x) * chroma + (value - chroma)
    return np.minimum(x * 255.5, 255).astype(np.uint8).transpose(1, 2, 0)


def contact_sheet(tiles: list[tuple[np.ndarray, str]], columns: int = 4) -> Image.Image:
    """Images (H, W, 3) uint8, each with a caption of a few lines below it, as one picture."""
    height, width = max(t.shape[0] for t, _ in tiles), max(max(t.shape[1] for t, _ in tiles), 240)
    cell = height + 14 * max(caption.count("\n") + 1 for _, caption in tiles) + 8
    sheet = Image.new("RGB", (width * min(columns, len(tiles)), cell * -(-len(tiles) // columns)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (tile, caption) in enumerate(tiles):
        x, y = i % columns * width, i // columns * cell
        sheet.paste(Image.fromarray(tile), (x, y))
        pen.multiline_text((x + 2, y + height + 2), caption, fill="black")
    return sheet


# ------------------------------------------------------------------------------------------------------------
# python data.py --inspect DIR [--data_mix NAME]: look at a dataset before training on it


def guess_recipe(directory: Path) -> oxe.Recipe:
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
    return oxe.Recipe(**dict(zip(oxe.CAMERAS, images, strict=False)), instruction=texts[0])


def inspect_dataset(directory: Path, name: str | None, out: Path) -> None:
    """Print what is in a dataset, warn of what often goes wrong, and write a contact sheet of some frames."""
    if name is None and not (directory / "features.json").exists():  # the folder that holds the versions
        directory, name = directory.parent, directory.name
    path = find_dataset(directory, name or "")
    name = (name or path.resolve().parent.name).partition(":")[0]
    recipe = oxe.DATASETS.get(name) or guess_recipe(path)
    cameras = [camera for camera in oxe.CAMERAS if getattr(recipe, camera)]
    keys = recipe.camera_keys(cameras)
    standardize = functools.partial(oxe.standardize, recipe=recipe, cameras=keys, load_proprio=False)
    table = frame_table(path, standardize, keys, oxe.fingerprint(recipe, False), skip_bad_episodes=True)
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


def dataset_warnings(table: FrameTable, recipe: oxe.Recipe) -> list[str]:
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=inspect_dataset.__doc__)
    parser.add_argument("--inspect", type=Path, required=True, metavar="DIR",
                        help="a dataset, or a folder of datasets")
    parser.add_argument("--data_mix", metavar="NAME", help="a dataset or mixture in that folder")
    parser.add_argument("--out", type=Path, default=Path("contact_sheet.png"))
    args = parser.parse_args()
    try:
        names = [name for name, _, _ in oxe.resolve_mixture(args.data_mix)] if args.data_mix else [None]
        for name in names:
            stem = args.out.stem if len(names) == 1 else f"{args.out.stem}_{name}"
            inspect_dataset(args.inspect, name, args.out.with_stem(stem))
    except ValueError as error:  # DataError is one
        sys.exit(f"error: {error}")
