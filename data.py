"""From frame tables to batches.

A training batch is a pure function of (seed, step). `Mixture.draw` computes which frames samples
g, g + 1, ... of the run are, by arithmetic alone: no shuffle buffer, no state to save. To resume
at step k is to start at sample k x global_batch_size, and the global batches are the same on 1 GPU
or 64.

Read in this order: permute and interleave (which frame comes when), Mixture (datasets, weights,
one sample), TrainBatches and collate (run by the DataLoader's workers). A dataset's frame table
has a row for each frame: its action, and where its images are (machinery/frames.py).
"""

import functools
import runpy
import signal

from machinery.config import Recipe, TrainConfig

if __name__ == "__main__":  # python data.py --inspect DIR, which needs no PyTorch
    runpy.run_module("machinery.inspect_data", run_name="__main__", alter_sys=True)

import numpy as np
import torch

from action_tokenizer import IGNORE_INDEX, ActionTokenizer, normalize, prompt_ids
from machinery import oxe
from machinery.frames import DataError, FrameTable, follow_rank, frame_table
from machinery.images import augment, center_crop, decode_image, draw_augmentation

# ---- Which frame comes when ----------------------------------------------------------------------


def mix_bits(*numbers) -> np.ndarray:
    """Hash integers (scalars or arrays, broadcast) to a uint64 that looks random: SplitMix64."""
    h = np.uint64(0)
    with np.errstate(over="ignore"):
        for number in numbers:
            h = (h ^ np.asarray(number).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            h = h ^ (h >> np.uint64(31))
    return h


def permute(index: np.ndarray, n: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Element `index` of a random permutation of 0..n-1 chosen by `key`, without building it.

    A Feistel network permutes the numbers of 2b bits, for the smallest b with 4^b >= n. A result
    that is not below n goes through again until it is (cycle walking: still one-to-one). All
    arguments broadcast.
    """
    index, n, key = (a.astype(np.uint64) for a in np.broadcast_arrays(index, n, key))
    bits = 1 + np.floor(np.log2(np.maximum(n, 2) - np.uint64(1)) / 2)
    bits = bits.astype(np.uint64)  # b: a number is two halves of b bits
    mask = (np.uint64(1) << bits) - np.uint64(1)
    out = index.copy()
    todo = np.arange(out.size)  # positions whose result is not below n yet
    while todo.size:
        low = out[todo] & mask[todo]
        high = out[todo] >> bits[todo]
        for r in range(4):  # a round changes one half by a hash of the other, and swaps them
            changed = high ^ (mix_bits(key[todo], r, low) & mask[todo])
            high = low
            low = changed
        out[todo] = (high << bits[todo]) | low
        todo = todo[out[todo] >= n[todo]]
    return out.astype(np.int64)


def interleave(shares: np.ndarray, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples first .. first+count-1 of the mixture -> (dataset, how many of its samples came
    before), (count,) int64 each. shares: (D,), sum 1.

    Visit j of dataset d is due at time (j + phase_d) / share_d. Samples come in the order of their
    due times, at equal ones in that of d. phase_d = (d + 1/2) / D spreads the starts. With shares
    3/4 and 1/4

        A is due at  0.33  1.67  3.00  4.33  5.67  7.00  ...      = (j + 1/4) / (3/4)
        B is due at  3.00  7.00  ...                              = (j + 3/4) / (1/4)

    and the samples are A A A B A A A B ...: interleave([0.75, 0.25], 2, 3) is (A, B, A), (2, 0, 3):
    the third visit of A, the first of B, the fourth of A. Each dataset's share is exact to within
    1 + share_d x D / 2 samples at every moment, and any part of the order can be computed alone.
    """
    datasets = np.arange(len(shares))
    phase = (datasets + 0.5) / len(shares)

    def due(dataset, visit):
        return (visit + phase[dataset]) / shares[dataset]

    # skip the visits due before `start`, a time by which at most `first` samples can be due
    start = max(first - len(shares), 0)
    skipped = np.ceil(start * shares - phase).clip(0)  # (D,)
    skipped += due(datasets, skipped) < start  # in floating point, ceil may be one off
    skipped -= (skipped > 0) & (due(datasets, skipped - 1) >= start)
    # then take more visits of each dataset than `count` samples can need
    until = np.ceil((first + count + len(shares)) * shares - phase).clip(0) + 1
    taken = (until - skipped).clip(0).astype(np.int64)  # (D,)
    # list them, dataset by dataset; in the example above A A A A A A B B
    dataset = np.repeat(datasets, taken)
    position = np.arange(taken.sum()) - np.repeat(np.cumsum(taken) - taken, taken)  # 0..5 0 1
    visit = skipped.astype(np.int64)[dataset] + position
    # sort them by due time, A A A B A A A B, and cut out `count` of them: A B A
    order = np.argsort(due(dataset, visit), kind="stable")
    order = order[first - int(skipped.sum()) :][:count]
    return dataset[order], visit[order]


# ---- Datasets and samples ------------------------------------------------------------------------


def open_tables(cfg: TrainConfig) -> list[tuple[str, float, Recipe, FrameTable]]:
    """The mixture's datasets: [(name, weight, recipe, table), ...]. Indexes each new one first."""
    found = oxe.find_datasets(cfg.data_root_dir, cfg.data_mix, cfg.datasets, cfg.cameras)
    tables = []
    for name, weight, recipe, directory in found:
        table = frame_table(directory, recipe, recipe.camera_keys(cfg.cameras), cfg.use_proprio,
                            index_dir=cfg.index_dir, skip_bad_episodes=cfg.skip_bad_episodes)
        tables.append((name, weight, recipe, table))
    return tables


class Mixture:
    """The datasets of a mixture, weighted, and one split of each to draw samples from.

    tables: from open_tables; train: the training split, or else the held-out one
    """

    def __init__(self, cfg: TrainConfig, tables: list, tokenizer=None, train: bool = True):
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.train = train
        self.names, weights, self.recipes, self.tables = zip(*tables, strict=True)
        self.statistics = {name: table.statistics for name, _, _, table in tables}
        if tokenizer:
            self.action_tokenizer = ActionTokenizer(tokenizer.action_vocab_size)
            prompt = functools.partial(prompt_ids, tokenizer, prompt_style=cfg.prompt_style)
            self.prompt = functools.lru_cache(maxsize=4096)(prompt)  # instructions repeat

        frames = np.array([stats["num_transitions"] for stats in self.statistics.values()])
        self.shares, self.epoch_length = oxe.mixture_shares(np.array(weights), frames,
                                                            cfg.balance_weights)
        self.stretches = [self._stretches(dataset) for dataset in range(len(tables))]
        self.sizes = np.array([count.sum() for _, count, _ in self.stretches])  # in this split
        if not self.sizes.all():
            empty = self.tables[int(np.argmin(self.sizes))]
            split = "training" if train else "held-out"
            raise DataError(f"{empty.directory}: no {split} frame with an instruction in its "
                            f"splits {', '.join(empty.splits)}")

    def _stretches(self, dataset: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """This split's frames, as stretches of adjacent rows -> (first row, count, cumulative
        count) of each."""
        first, count = oxe.kept_episodes(self.tables[dataset], self.train)
        if self.recipes[dataset].skip_idle:
            first, count = oxe.divide(first, count, lambda rows: ~oxe.is_idle(
                self.actions(dataset, rows)))
        first, count = first[count > 0], count[count > 0]
        return first, count, np.cumsum(count)

    def draw(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Samples first .. first+count-1 of the run -> (dataset, frame row, epoch), (count,)."""
        dataset, visit = interleave(self.shares, first, count)
        epoch, index = np.divmod(visit, self.sizes[dataset])
        index = permute(index, self.sizes[dataset], mix_bits(self.cfg.seed, dataset, epoch))
        return dataset, self.rows(dataset, index), epoch

    def rows(self, dataset: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Number of a frame within its dataset's split -> its row in the frame table."""
        row = np.empty_like(index)
        for d in np.unique(dataset):
            first, count, end = self.stretches[d]
            number = index[dataset == d]
            stretch = np.searchsorted(end, number, side="right")
            before = end[stretch] - count[stretch]
            row[dataset == d] = first[stretch] + number - before
        return row

    def window(self, dataset: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The frames of an action chunk from each of `rows` (R,) on -> (rows that stop at the
        episode's last frame, past its end?), (R, action_chunk) each."""
        table = self.tables[dataset]
        episode = table.episodes[table.episode_of(rows)]
        last = episode["first"].astype(np.int64) + episode["count"] - 1
        wanted = rows[:, None] + np.arange(self.cfg.action_chunk)
        return np.minimum(wanted, last[:, None]), wanted > last[:, None]

    def actions(self, dataset: int, rows: np.ndarray) -> np.ndarray:
        """Normalized chunks from frames `rows` (R,) on, (R, action_chunk, action_dim) float32.

        Past the end of the episode, changes are 0 and targets repeat the last, as in OpenVLA.
        """
        table = self.tables[dataset]
        rows, past_end = self.window(dataset, rows)
        stats = self.statistics[self.names[dataset]]["action"]
        actions = normalize(table.frames["action"][rows], stats, self.cfg.action_normalization)
        actions[past_end[..., None] & ~table.targets] = 0
        return actions

    def sample(self, dataset: int, row: int, epoch: int = 0,
               augment_seed: int | None = None) -> dict:
        """One training sample: images (N, H, W, 3) uint8, N = window_size x cameras; input_ids and
        labels (L,) int64; dataset; proprio (P,) float32 if used.

        augment_seed: of this sample's random crops and colors. Without one, a model trained with
        augmentation gets the center crop that it will see when acting. Raises DataError.
        """
        cfg = self.cfg
        table = self.tables[dataset]
        frame = table.frames[row]
        try:
            images = [decode_image(file, cfg.image_size)
                      for file in self.image_files(dataset, row, epoch)]
            prompt = self.prompt(table.instructions[frame["instruction"]])
            actions = self.actions(dataset, np.array([row]))  # (1, action_chunk, action_dim)
            answer = self.action_tokenizer.encode(actions.reshape(-1)).tolist()
        except (ValueError, OSError) as error:
            number = row - int(table.first_frames[table.episode_of(row)])
            raise DataError(f"{table.where(row)}: frame {number}: {error}") from error
        if augment_seed is not None:
            for i, image in enumerate(images):
                six = mix_bits(augment_seed, i, np.arange(6)) / 2.0**64  # uniform in 0..1
                images[i] = augment(image, **draw_augmentation(six))
        elif cfg.image_aug:
            images = [center_crop(image, cfg.image_size) for image in images]

        answer.append(self.tokenizer.eos_token_id)
        sample = {
            "images": np.stack(images),
            "input_ids": np.array(prompt + answer),
            "labels": np.array([IGNORE_INDEX] * len(prompt) + answer),
            "dataset": dataset,
        }
        if cfg.use_proprio:
            stats = self.statistics[self.names[dataset]]["proprio"]
            proprio = normalize(frame["proprio"], stats, cfg.action_normalization)
            sample["proprio"] = np.pad(proprio, (0, cfg.proprio_dim - len(proprio)))  # shorter ones
        return sample

    def image_files(self, dataset: int, row: int, epoch: int = 0) -> list[bytes]:
        """Of the frame and those before it in its window, oldest first, each camera's image, or
        b"" for a missing camera."""
        table = self.tables[dataset]
        first = int(table.first_frames[table.episode_of(row)])
        cameras = [table.cameras.index(key) for key in self.cameras_shown(dataset, row, epoch)]
        return [table.read_image(max(row - past, first), camera)
                for past in reversed(range(self.cfg.window_size)) for camera in cameras]

    def cameras_shown(self, dataset: int, row: int, epoch: int) -> list[str | None]:
        """The key of each camera of cfg.cameras for a frame. DROID has two exterior cameras:
        which one is `primary` is drawn once per episode and epoch."""
        episode = self.tables[dataset].episode_of(row)
        choice = int(mix_bits(self.cfg.seed, dataset, epoch, episode))
        keys = [self.recipes[dataset].camera(name) for name in self.cfg.cameras]
        return [alternatives[choice % len(alternatives)] for alternatives in keys]


def most_frequent_tokens(mixture: Mixture, dataset: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The most frequent id of each action token (T,) in the frames (dataset, row), (R,) each: the
    best answer that ignores the image."""
    actions = [mixture.actions(d, rows[dataset == d]) for d in np.unique(dataset)]
    tokens = mixture.action_tokenizer.encode(np.concatenate(actions).reshape(len(rows), -1))
    return np.array([np.bincount(column).argmax() for column in tokens.T])


# ---- Batches -------------------------------------------------------------------------------------


def collate(samples: list[dict], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Stack samples to a batch; input_ids and labels are padded on the right to the longest."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    for sample in samples:
        padding = (0, longest - len(sample["input_ids"]))
        for key, fill in (("input_ids", pad_token_id), ("labels", IGNORE_INDEX)):
            sample[key] = np.pad(sample[key], padding, constant_values=fill)
    return torch.utils.data.default_collate(samples)


class TrainBatches(torch.utils.data.Dataset):
    """For a DataLoader with batch_size=None: this rank's micro-batch i, counted from the start."""

    def __init__(self, mixture: Mixture, global_batch: int, micro_batch: int,
                 rank: int, world_size: int):
        self.mixture = mixture
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.rank = rank
        self.world_size = world_size

    def draw(self, i: int) -> list[tuple[int, int, int, int]]:
        """The samples of micro-batch i: (number in the run, dataset, frame row, epoch) of each."""
        micro_batches = self.global_batch // (self.micro_batch * self.world_size)
        step, micro = divmod(i, micro_batches)
        first = step * self.global_batch + (micro * self.world_size + self.rank) * self.micro_batch
        numbers = range(first, first + self.micro_batch)
        return list(zip(numbers, *self.mixture.draw(first, self.micro_batch), strict=True))

    def records(self, i: int) -> list[str]:
        """Dataset, file and record of each sample of micro-batch i, for messages."""
        names, tables = self.mixture.names, self.mixture.tables
        return [f"{names[d]} {tables[d].where(row)}" for _, d, row, _ in self.draw(i)]

    def __getitem__(self, i: int) -> dict[str, torch.Tensor] | DataError:
        """Micro-batch i, or the error in its data, which ranks.next_batch raises. If a worker
        raised it, it would arrive as the text of a traceback."""
        try:
            return self.batch(self.draw(i))
        except DataError as error:
            return error

    def batch(self, drawn: list[tuple[int, int, int, int]]) -> dict[str, torch.Tensor]:
        """The batch of these samples. With max_prefix, training leaves some of each chunk's first
        steps visible, a random number (VLA.insert_queries)."""
        mixture, cfg = self.mixture, self.mixture.cfg
        augmented = cfg.image_aug and mixture.train
        samples = []
        for number, dataset, row, epoch in drawn:
            samples.append(mixture.sample(dataset, row, epoch, number if augmented else None))
        batch = collate(samples, mixture.tokenizer.pad_token_id)
        if cfg.max_prefix and mixture.train:
            numbers = [number for number, *_ in drawn]
            steps = mix_bits(cfg.seed, numbers) % (cfg.max_prefix + 1)  # 0..max_prefix
            tokens = steps.astype(np.int64) * cfg.action_dim
            batch["prefix_length"] = torch.from_numpy(tokens)[:, None]  # (B, 1)
        return batch


def make_loader(batches: TrainBatches, num_workers: int, numbers: range):
    """Iterator over this rank's micro-batches of these numbers, loaded ahead by workers."""
    options = {"generator": torch.Generator()}  # the global one initializes the weights
    if num_workers:
        options |= {"persistent_workers": True, "prefetch_factor": 4,
                    "multiprocessing_context": "fork", "worker_init_fn": follow_rank}
    loader = iter(torch.utils.data.DataLoader(
        batches, batch_size=None, sampler=numbers, num_workers=num_workers,
        pin_memory=torch.cuda.is_available(), **options))
    # a dead worker is an error when its batch is needed; PyTorch's handler could also raise it
    # while a checkpoint is being written
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return loader


def to_device(batch: dict, device) -> dict:
    """The model's inputs, on the GPU. From pinned memory, the copy overlaps with computation."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()
            if key != "dataset"}
