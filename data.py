"""From frame tables to batches.

A training batch is a pure function of (seed, step): `Mixture.draw` says which frames sample number g, g+1,
... of the run are, by arithmetic alone. No shuffle buffer, no state to save: resuming at step k means
starting at sample k x global_batch_size, and on 1 GPU or 64 the global batches are the same.

Read in this order: permute and interleave (which frame comes when), Mixture (datasets, weights, one sample),
TrainBatches and collate (what the DataLoader's workers run). A dataset's frame table (a row for each frame:
its action, and where its images lie) is made in frames.py by its recipe: what the fields mean (fields.py).
"""

import functools
import runpy

import numpy as np
import torch

from action_tokenizer import ActionTokenizer, normalize, prompt_ids
from machinery import oxe
from machinery.config import Recipe, TrainConfig, UserError
from machinery.frames import DataError, FrameTable, frame_table
from machinery.images import augment, center_crop, decode_image, draw_augmentation

IGNORE_INDEX = -100  # label of tokens that are not learned, cross_entropy's default

# ---- Which frame comes when --------------------------------------------------------------------------------


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
    below n is sent through again until it is (cycle walking: still one-to-one). All arguments broadcast.
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


def interleave(shares: np.ndarray, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples first .. first+count-1 of the mixture -> (which dataset, how many samples of it came before).

    Visit j of dataset d is due at time (j + phase_d) / share_d; samples come in the order of their due times,
    at equal ones in that of d. phase_d = (d + 1/2) / D spreads the starts. With shares 3/4 and 1/4

        A is due at  0.33  1.67  3.00  4.33  5.67  7.00  ...      = (j + 1/4) / (3/4)
        B is due at  3.00  7.00  ...                              = (j + 3/4) / (1/4)

    and the samples are A A A B A A A B ...: interleave([0.75, 0.25], 2, 3) is (A, B, A), (2, 0, 3): the third
    visit of A, the first of B, the fourth of A. Each dataset's share is exact to within 1 + share_d x D / 2
    samples at every moment, and any part of the order can be computed on its own. shares: (D,), sum 1.
    """
    phase = (np.arange(len(shares)) + 0.5) / len(shares)
    start = max(first - len(shares), 0)  # so early that no more than `first` samples can be due before it

    def due(dataset, visit):
        return (visit + phase[dataset]) / shares[dataset]

    every = np.arange(len(shares))
    done = np.ceil(start * shares - phase).clip(0)  # visits due before `start`; corrected for rounding:
    done += due(every, done) < start
    done -= (done > 0) & (due(every, done - 1) >= start)
    until = np.ceil((first + count + len(shares)) * shares - phase).clip(0) + 1
    sizes = (until - done).clip(0).astype(np.int64)
    dataset = np.repeat(every, sizes)
    visit = np.arange(sizes.sum()) + np.repeat(done.astype(np.int64) - np.cumsum(sizes) + sizes, sizes)
    order = np.argsort(due(dataset, visit), kind="stable")[first - int(done.sum()) :][:count]
    return dataset[order], visit[order]


# ---- Datasets and samples ----------------------------------------------------------------------------------


def mixture_shares(weights: np.ndarray, sizes: np.ndarray, balance: bool = True) -> tuple[np.ndarray, int]:
    """Weights and numbers of frames (all splits) of the datasets -> (each one's share of all samples, epoch
    length).

    As OpenVLA: shares are in proportion to weight x frames, or without `balance` to the weights alone, and an
    epoch is over when the datasets of weight 1 have been seen once. (Without any of weight 1, where OpenVLA
    fails: those of the largest weight.)
    """
    shares = weights * sizes if balance else weights
    shares = shares / shares.sum()
    primary = weights == (1.0 if (weights == 1.0).any() else weights.max())
    return shares, int((sizes / shares)[primary].max())


def open_tables(cfg: TrainConfig) -> list[tuple[str, float, Recipe, FrameTable]]:
    """A mixture's datasets, which are indexed now where they have not been: [(name, weight, recipe, table),
    ...]."""
    return [(name, weight, recipe, frame_table(
                directory, recipe, recipe.camera_keys(cfg.cameras), cfg.use_proprio,
                index_dir=cfg.index_dir, skip_bad_episodes=cfg.skip_bad_episodes))
            for name, weight, recipe, directory in oxe.find_datasets(cfg)]


class Mixture:
    """The datasets of a mixture: opened, weighted, and one split of each ready to be drawn from."""

    def __init__(self, cfg: TrainConfig, tokenizer=None, train: bool = True):
        self.cfg, self.tokenizer, self.train = cfg, tokenizer, train
        self.names, weights, self.recipes, self.tables = map(list, zip(*open_tables(cfg), strict=True))
        self.statistics = {name: table.statistics  # the content of dataset_statistics.json
                           for name, table in zip(self.names, self.tables, strict=True)}
        dims = {name: len(self.statistics[name]["action"]["mask"]) for name in self.names}
        if len(set(dims.values())) > 1:
            raise UserError(f"data_mix: datasets with different action dimensions cannot be mixed: {dims}")
        self.action_dim = dims[self.names[0]]
        self.proprio_dim = 0
        if cfg.use_proprio:  # shorter states are padded with zeros
            self.proprio_dim = max(len(stats["proprio"]["mean"]) for stats in self.statistics.values())
        self.features = {name: table.features for name, table in zip(self.names, self.tables, strict=True)
                         if name.partition(":")[0] in cfg.datasets}
        self.warnings = oxe.mixture_warnings(cfg, self.names, self.recipes, self.tables) if train else []
        self.action_tokenizer = ActionTokenizer(tokenizer.action_vocab_size) if tokenizer else None
        if tokenizer:
            room = cfg.max_length - cfg.action_chunk * self.action_dim - 1  # for the prompt
            for name, table in zip(self.names, self.tables, strict=True):
                told = oxe.leave_out_long_texts(cfg, table, room, lambda text: len(self.prompt(text)))
                self.warnings += [f"{name}: {line}" for line in told]

        transitions = np.array([self.statistics[name]["num_transitions"] for name in self.names])
        balance = getattr(cfg, "balance_weights", True)  # a config made elsewhere may not know of it
        self.shares, self.epoch_length = mixture_shares(np.array(weights), transitions, balance)
        self.stretches = [self._stretches(d) for d in range(len(self.names))]
        self.sizes = np.array([total[-1] if len(total) else 0 for _, _, total in self.stretches])
        if not self.sizes.all():
            empty, kind = int(np.argmin(self.sizes)), "training" if train else "held-out"
            raise DataError(f"{self.names[empty]}: no {kind} frame with an instruction in "
                            f"{self.tables[empty].directory}")

    def _stretches(self, d: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """This split's frames of dataset d, as stretches of adjacent ones: (first, count, total so far)."""
        first, count = oxe.kept_episodes(self.tables[d], self.train)
        if self.recipes[d].skip_idle:
            first, count = oxe.without_idle(first, count, functools.partial(self.actions, d))
        return first[count > 0], count[count > 0], np.cumsum(count[count > 0])

    def draw(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Samples first .. first+count-1 of the training -> (dataset, frame row, epoch), each (count,)."""
        dataset, visit = interleave(self.shares, first, count)
        epoch, index = np.divmod(visit, self.sizes[dataset])
        index = permute(index, self.sizes[dataset], mix_bits(self.cfg.seed, dataset, epoch))
        return dataset, self.rows(dataset, index), epoch

    def rows(self, dataset: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Number of a kept frame within its dataset -> its row in the frame table."""
        row = np.empty_like(index)
        for d in np.unique(dataset):
            first, count, total = self.stretches[d]
            i = index[dataset == d]
            which = np.searchsorted(total, i, side="right")
            row[dataset == d] = first[which] + i - (total - count)[which]
        return row

    def actions(self, d: int, rows: np.ndarray) -> np.ndarray:
        """Normalised actions from frames `rows` (R,) of dataset d on: (R, action_chunk, action_dim) float32.
        Past the end of the episode, changes are 0 and targets repeat the last, as in OpenVLA."""
        table, stats = self.tables[d], self.statistics[self.names[d]]["action"]
        window, past_end = self.window(d, rows)
        actions = normalize(table.frames["action"][window], stats, self.cfg.action_normalization)
        actions[past_end[..., None] & ~table.targets] = 0
        return actions

    def window(self, d: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Frames `rows` (R,) of dataset d -> (the rows of their chunks (R, action_chunk), those past the end
        of the episode replaced by its last; which ones these are, bool)."""
        table = self.tables[d]
        episode = table.episodes[table.episode_of(rows)]
        wanted = rows[:, None] + np.arange(self.cfg.action_chunk)
        last = (episode["first"] + episode["count"])[:, None].astype(np.int64) - 1
        return np.minimum(wanted, last), wanted > last

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
            numbers = [mix_bits(augment_seed, i, np.arange(6)) / 2.0**64 for i in range(len(images))]
            images = [augment(image, **draw_augmentation(six))
                      for image, six in zip(images, numbers, strict=True)]
        elif cfg.image_aug:
            images = [center_crop(image, cfg.image_size) for image in images]

        frame = table.frames[row]
        prompt = self.prompt(table.instructions[frame["instruction"]])
        try:
            answer = self.action_tokenizer.encode(self.actions(d, np.array([row])).reshape(-1))
        except ValueError as error:
            raise DataError(f"{table.where(row)}: frame {row - first}: {error}") from error
        answer = [*answer.tolist(), self.tokenizer.eos_token_id]
        sample = {"images": np.stack(images), "input_ids": np.array(prompt + answer), "dataset": d,
                  "labels": np.array([IGNORE_INDEX] * len(prompt) + answer)}
        if cfg.use_proprio:
            proprio = normalize(frame["proprio"], self.statistics[name]["proprio"], cfg.action_normalization)
            sample["proprio"] = np.pad(proprio, (0, self.proprio_dim - len(proprio)))
        return sample

    def cameras_shown(self, d: int, row: int, epoch: int) -> tuple[str | None, ...]:
        """The keys of the images that cfg.cameras means for a frame. DROID has two exterior cameras; which
        one is `primary` is drawn once per episode and epoch."""
        choices = [self.recipes[d].camera(name) for name in self.cfg.cameras]
        coin = int(mix_bits(self.cfg.seed, d, epoch, self.tables[d].episode_of(row)))
        return tuple(keys[coin % len(keys)] for keys in choices)

    @functools.lru_cache(maxsize=4096)  # noqa: B019 (lives as long as the run)
    def prompt(self, instruction: str) -> list[int]:
        return prompt_ids(self.tokenizer, instruction, self.cfg.prompt_style)


def most_frequent_tokens(mixture: Mixture, dataset: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The most frequent id of each action token (T,) after frames (dataset, row), each (R,): the answer that
    knows no image."""
    actions = [mixture.actions(d, rows[dataset == d]) for d in np.unique(dataset)]
    tokens = mixture.action_tokenizer.encode(np.concatenate(actions).reshape(len(rows), -1))
    return np.array([np.bincount(column).argmax() for column in tokens.T])


def collate(samples: list[dict], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Stack samples to a batch; input_ids and labels are padded on the right to the longest."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    for sample in samples:
        for key, fill in (("input_ids", pad_token_id), ("labels", IGNORE_INDEX)):
            sample[key] = np.append(sample[key], [fill] * (longest - len(sample[key]))).astype(np.int64)
    return torch.utils.data.default_collate(samples)


class TrainBatches(torch.utils.data.Dataset):
    """For a DataLoader with batch_size=None: this rank's micro-batch i, counted from the run's start."""

    def __init__(self, mixture: Mixture, global_batch: int, micro_batch: int, rank: int, world_size: int):
        self.mixture, self.global_batch, self.micro_batch = mixture, global_batch, micro_batch
        self.rank, self.world_size = rank, world_size

    def draw(self, i: int) -> list[tuple[int, int, int, int]]:
        """The samples of micro-batch i: (number in the run, dataset, frame row, epoch of that dataset)."""
        step, micro = divmod(i, self.global_batch // (self.micro_batch * self.world_size))
        first = step * self.global_batch + (micro * self.world_size + self.rank) * self.micro_batch
        numbers = range(first, first + self.micro_batch)
        return list(zip(numbers, *self.mixture.draw(first, self.micro_batch), strict=True))

    def records(self, i: int) -> list[str]:
        """Dataset, file and record of each sample of micro-batch i, for messages."""
        names, tables = self.mixture.names, self.mixture.tables
        return [f"{names[d]} {tables[d].where(row)}" for _, d, row, _ in self.draw(i)]

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        cfg, train, drawn = self.mixture.cfg, self.mixture.train, self.draw(i)
        samples = [self.mixture.sample(d, row, epoch, number if cfg.image_aug and train else None)
                   for number, d, row, epoch in drawn]
        batch = collate(samples, self.mixture.tokenizer.pad_token_id)
        if cfg.max_prefix and train:  # how many tokens of its chunk each sample is given
            steps = mix_bits(cfg.seed, [number for number, *_ in drawn]) % (cfg.max_prefix + 1)
            batch["known"] = torch.from_numpy(steps.astype(np.int64) * self.mixture.action_dim)[:, None]
        return batch


if __name__ == "__main__":  # python data.py --inspect DIR
    runpy.run_module("machinery.inspect_data", run_name="__main__")
