"""A policy on recorded frames: what its towers see, and how likely it finds the actions.

Both take any pictures, so that recorded and changed ones can be compared: `look` runs the vision
towers, `log_likelihood` the model. `open_data` opens the frames that the policy was trained on.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from act import Policy, load_vla
from data import Mixture, collate, to_device
from machinery.config import Recipe, UserError, find_input
from machinery.files import read_json
from machinery.frames import DataError, FrameTable, find_dataset, frame_table, without_version
from machinery.guess import state_fields
from machinery.inspect_data import locate
from machinery.oft import new_mixture
from machinery.oxe import find_recipe
from machinery.peers import evenly
from machinery.rlds import step_features
from model import VLA

BATCH = 32  # frames per call of the model
FRAMES = 160  # of a dataset, to look at
GRID = 4  # a picture's features are averaged over GRID x GRID parts
WIDTH = 512  # features of a picture


class Cause(NamedTuple):
    """Why a policy may fail."""

    evidence: float  # 0..1, by which causes are ranked
    kind: str  # pictures, words, state, actions, answers, statistics, data, model, training, weak
    text: str  # the fault, in numbers
    cure: str
    pictures: tuple = ()  # (title, image) of a seen frame and of what training saw


def open_policy(checkpoint: str, center_crop: bool | None = None) -> Policy:
    """Load a policy onto the GPU if there is one. center_crop: see load_vla."""
    how = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    return load_vla(checkpoint, *how, center_crop=center_crop)


def recording_of(table: FrameTable) -> dict:
    """What the program that recorded a dataset states about it, such as fps."""
    return read_json(table.directory / "recording.json", {})


@torch.inference_mode()
def look(vla: VLA, images: torch.Tensor) -> np.ndarray:
    """images (B, N, S, S, C) uint8 -> features (B, N, WIDTH) float32 that nearly keep distances:
    the towers' patches, normalized, averaged over a coarse grid, and projected at random."""
    dtype = vla.llm.get_input_embeddings().weight.dtype
    pixels = [pixels.to(dtype) for pixels in vla.pixel_values(images)]
    if vla.cfg.film:
        vla.forget()
    patches = vla.patch_features(pixels).float()  # (B * N, patches, width)
    patches = F.layer_norm(patches, patches.shape[-1:])
    side = int(patches.shape[1] ** 0.5)
    grid = patches.transpose(1, 2).unflatten(2, (side, side))
    pooled = F.adaptive_avg_pool2d(grid, GRID).flatten(1)
    features = pooled.cpu() @ random_matrix(pooled.shape[1])
    return features.unflatten(0, images.shape[:2]).numpy()


@functools.cache
def random_matrix(height: int) -> torch.Tensor:
    """(height, WIDTH), the same in every run."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(height, WIDTH, generator=draw) / WIDTH**0.5


@torch.inference_mode()
def log_likelihood(vla: VLA, batch: dict) -> torch.Tensor:
    """A training batch -> (B, T) float32, the log-probability of each action token after the
    recorded ones, among action tokens only.

    For an action head, that of the bin around each recorded number, under a Laplace distribution
    around the answer: as wide as the sample's mean error, where it is the likeliest.
    """
    kept = []
    numbers = vla.cfg.action_head == "l1"
    head = vla.action_head if numbers else vla.llm.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, inputs, answer: kept.append(answer))
    _, _, true = vla(**batch)
    hook.remove()
    if numbers:
        error = (kept[0].float() - batch["actions"]).abs().flatten(1)
        wide = error.mean(1, keepdim=True).clamp(min=1e-6)
        return -(wide * (vla.action_tokenizer.n_bins - 1)).log() - error / wide
    first = vla.action_tokenizer.first_id
    logits = kept[0][:, :-1, first : vla.action_tokenizer.vocab_size].float()  # without </s>
    return logits.log_softmax(-1).gather(-1, (true - first)[..., None])[..., 0]


def open_mixture(policy: Policy, name: str, recipe: Recipe, table: FrameTable, train: bool = True
                 ) -> Mixture:
    """One dataset as the policy's training opens it, normalized by its statistics if it has some.
    Raises UserError if its actions are of another width, DataError if the split is empty."""
    width = table.frames["action"].shape[1]
    if width != policy.cfg.action_dim:
        raise UserError(f"{name}: its actions have {width} dimensions, the policy's "
                        f"{policy.cfg.action_dim}: was it trained on this dataset?")
    cfg = policy.cfg.model_copy(update={"datasets": {name: recipe}})
    tables = [(name, 1.0, recipe, table)]
    mixture = new_mixture(cfg, tables, policy.tokenizer, train)
    mixture.statistics[name] = policy.norm_stats.get(name, mixture.statistics[name])
    return mixture


def open_data(policy: Policy, name: str, directory: Path | None, index_dir: str | None
              ) -> tuple[Mixture, Mixture | None]:
    """The training and held-out frames of one of the policy's datasets, from another directory
    than its training's if one is given. Raises DataError."""
    cfg = policy.cfg
    if directory is None:
        directory = find_dataset(find_input(cfg.data_root_dir), name)
    else:
        directory = locate(directory, directory.name, "")
    recipe = find_recipe(without_version(name), directory, cfg.datasets)
    if not cfg.use_proprio:  # the states show the effect of the actions
        recipe = replace(recipe, state=state_fields(step_features(directory)))
    table = frame_table(directory, recipe, recipe.camera_keys(cfg.cameras), True,
                        index_dir=index_dir or cfg.index_dir,
                        skip_bad_episodes=cfg.skip_bad_episodes)
    train = open_mixture(policy, name, recipe, table)
    try:
        return train, open_mixture(policy, name, recipe, table, train=False)
    except DataError:
        return train, None


def spread(mixture: Mixture, most: int = FRAMES) -> np.ndarray:
    """Up to `most` rows of the mixture's one dataset, at even distances."""
    index = evenly(int(mixture.sizes[0]), most)
    return mixture.rows(np.zeros(len(index), int), index)


def batches(mixture: Mixture, rows: Sequence[int], device) -> Iterator[dict]:
    """The model's training inputs for frames `rows` of the mixture's first dataset."""
    for start in tqdm(range(0, len(rows), BATCH), "frames", leave=False, disable=None):
        samples = [mixture.sample(0, int(row)) for row in rows[start : start + BATCH]]
        yield to_device(collate(samples, mixture.tokenizer.pad_token_id), device)


def see(policy: Policy, mixture: Mixture, rows: np.ndarray
        ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frames `rows` (R,) -> features of the pictures and of the mirrored pictures, (R, D) each, and
    the policy's loss (R,), in nats per action token."""
    vla = policy.vla
    parts = []
    for batch in batches(mixture, rows, vla.llm.device):
        images = batch["images"]
        loss = -log_likelihood(vla, batch).mean(1).cpu().numpy()
        parts.append((look(vla, images), look(vla, images.flip(3)), loss))
    seen, mirrored, loss = (np.concatenate(part) for part in zip(*parts, strict=True))
    return seen.reshape(len(rows), -1), mirrored.reshape(len(rows), -1), loss
