"""The numbers of a training: loss, accuracy and L1 of action tokens, speed and memory."""

import math
import time

import numpy as np
import psutil
import torch
import torch.distributed as dist

from data import Mixture, TrainBatches, make_loader, to_device
from machinery.config import TrainConfig
from machinery.ranks import next_batch


class Metrics:
    """Sums since the last average, kept on the device so that the loop never waits for them.

    names: the datasets, which batches refer to by number
    """

    def __init__(self, names: list[str], device: torch.device, action_tokenizer):
        self.names = names
        self.action_tokenizer = action_tokenizer
        # a row per dataset: tokens, correct ones, L1; then one: batches, their losses
        self.sums = torch.zeros(len(names) + 1, 3, device=device)
        self.start_clock()

    def start_clock(self) -> None:
        """Begin timing here, so that saving and evaluating do not count as part of a step."""
        self.started = time.perf_counter()
        self.data_seconds = 0.0

    def wait_for_batch(self, loader, step: int) -> dict:
        """The next batch, for this step. Counts how long it took to arrive."""
        asked = time.perf_counter()
        batch = next_batch(loader, step)
        self.data_seconds += time.perf_counter() - asked
        return batch

    @torch.no_grad()
    def add(self, loss, predicted, true, dataset) -> None:
        """loss: scalar; predicted, true (B, T): action token ids; dataset (B,): on the host."""
        bins = self.action_tokenizer.bin_index(predicted) - self.action_tokenizer.bin_index(true)
        l1 = bins.abs() * (2 / (self.action_tokenizer.n_bins - 1))  # in distances of bin centers
        values = torch.stack([torch.ones_like(l1), predicted == true, l1], dim=-1)  # (B, T, 3)
        index = dataset.to(self.sums.device, non_blocking=True)
        self.sums.index_add_(0, index, values.sum(1).float())
        self.sums[-1, 0] += 1
        self.sums[-1, 1] += loss.detach()

    def average(self, cfg: TrainConfig, steps_left: int = 0) -> dict:
        """Averages over all ranks since the last call, which waits for the device. Resets them."""
        dist.all_reduce(self.sums)
        *datasets, (batches, loss, _) = self.sums.tolist()
        seconds = time.perf_counter() - self.started
        tokens, correct, l1 = np.sum(datasets, axis=0)
        samples = batches * cfg.per_device_batch_size
        steps = samples / cfg.global_batch_size
        values = {
            "loss": loss / batches, "accuracy": correct / tokens, "l1": l1 / tokens,
            "step_seconds": seconds / steps, "data_seconds": self.data_seconds / steps,
            "samples_per_second": samples / seconds, "eta_seconds": steps_left * seconds / steps,
            "host_gb": psutil.Process().memory_info().rss / 1e9,
        }
        if torch.cuda.is_available():
            values["gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
        if len(self.names) > 1:
            for name, (n, right, distance) in zip(self.names, datasets, strict=True):
                if n:
                    values[f"accuracy/{name}"] = right / n
                    values[f"l1/{name}"] = distance / n
        self.sums.zero_()
        self.start_clock()
        return values


@torch.no_grad()
def evaluate(engine, held_out: Mixture, cfg: TrainConfig, baseline: np.ndarray, step: int) -> dict:
    """Loss, accuracy and L1 on held-out frames, always the same ones.

    baseline (T,): the most frequent id of each action token in training. Its accuracy is reported
    too: a policy that ignores the image does as well.
    """
    micro_batch = cfg.per_device_batch_size
    global_batch = micro_batch * dist.get_world_size()
    batches = TrainBatches(held_out, global_batch, micro_batch, dist.get_rank(),
                           dist.get_world_size())
    frames = min(cfg.eval_samples, int(held_out.sizes.sum()))
    numbers = range(math.ceil(frames / global_batch))
    metrics = Metrics(held_out.names, engine.device, engine.module.action_tokenizer)
    constant = torch.from_numpy(baseline).to(engine.device)
    guessed = torch.zeros(2, device=engine.device)  # correct, all
    engine.eval()
    loader = make_loader(batches, cfg.num_workers, numbers)
    for _ in numbers:
        batch = next_batch(loader, step)
        loss, predicted, true = engine(**to_device(batch, engine.device))
        metrics.add(loss, predicted, true, batch["dataset"])
        guessed[0] += (true == constant).sum()
        guessed[1] += true.numel()
    engine.train()
    dist.all_reduce(guessed)
    values = {f"eval/{key}": value for key, value in metrics.average(cfg).items()
              if key.split("/")[0] in ("loss", "accuracy", "l1")}
    values["eval/accuracy_of_most_frequent_bin"] = float(guessed[0] / guessed[1])
    return values


def tag(key: str) -> str:
    """The name of a number in TensorBoard, which sorts its groups: `eval` and `train` come first.
    """
    if key.startswith("eval/"):
        return key
    scores = key.startswith(("loss", "accuracy", "l1"))
    return f"{'train' if scores else 'tuning'}/{key}"
