"""What a policy sees in recorded frames, and how likely it finds their actions.

Both are computed for any change of the inputs, so that two readings of the same frames can be
compared: recorded and mirrored pictures, the episode's instruction and another one. `look` runs the
vision towers, `log_likelihood` the language model on what they saw.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from act import Policy, load_vla
from data import IGNORE_INDEX, Mixture, collate, to_device
from machinery.config import Recipe, UserError, find_input
from machinery.frames import DataError, FrameTable, find_dataset, frame_table
from machinery.inspect_data import locate
from machinery.oxe import find_recipe
from machinery.peers import shorten
from model import VLA, at_positions

BATCH = 32  # frames per call of the model
GRID = 4  # features of the pictures are averaged over GRID x GRID parts


def open_policy(checkpoint: str) -> Policy:
    """Load a policy onto the GPU if there is one."""
    if torch.cuda.is_available():
        return load_vla(checkpoint, "cuda", torch.bfloat16)
    return load_vla(checkpoint)


@torch.inference_mode()
def look(vla: VLA, images: torch.Tensor) -> torch.Tensor:
    """images (B, N, S, S, 3) uint8 -> the towers' features (B, N, patches, width)."""
    dtype = vla.llm.get_input_embeddings().weight.dtype
    pixels = [pixels.to(dtype) for pixels in vla.pixel_values(images)]
    return vla.patch_features(pixels).unflatten(0, images.shape[:2])


@torch.inference_mode()
def log_likelihood(vla: VLA, features: torch.Tensor, input_ids: torch.Tensor,
                   labels: torch.Tensor, proprio: torch.Tensor | None = None) -> torch.Tensor:
    """features from `look`, the others as in VLA.forward -> (B, T) log-probability of each action
    token after the recorded ones, among action tokens only."""
    text = vla.llm.get_input_embeddings()(input_ids)  # (B, L, hidden)
    extra = vla.projector["projector"](features.flatten(1, 2))
    if proprio is not None:
        state = vla.proprio_projector(proprio.to(text.dtype))
        extra = torch.cat([extra, state[:, None]], dim=1)
    inputs = torch.cat([text[:, :1], extra, text[:, 1:]], dim=1)  # as in VLA.embed
    first = (labels != IGNORE_INDEX).int().argmax(1, keepdim=True)  # (B, 1)
    wanted = first + torch.arange(vla.num_action_tokens, device=labels.device)  # (B, T)
    true = labels.gather(1, wanted)
    wanted = wanted + inputs.shape[1] - labels.shape[1]
    if vla.cfg.parallel_decoding:
        inputs = vla.insert_queries(inputs, wanted)
    hidden = vla.llm.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
    logits = vla.llm.get_output_embeddings()(at_positions(hidden, wanted - 1)).float()
    ids = vla.action_tokenizer.first_id, vla.action_tokenizer.vocab_size
    logits = logits[..., slice(*ids)].log_softmax(-1)
    return logits.gather(-1, (true - ids[0])[..., None])[..., 0]


def summary(features: torch.Tensor) -> np.ndarray:
    """Features from `look` -> (B, WIDTH) float32 that nearly keep their distances: each patch is
    normalized, and patches are averaged over a coarse grid."""
    patches = F.layer_norm(features.float(), features.shape[-1:])  # (B, N, patches, width)
    side = int(patches.shape[2] ** 0.5)
    grid = patches.flatten(0, 1).transpose(1, 2).unflatten(2, (side, side))
    pooled = F.adaptive_avg_pool2d(grid, min(GRID, side))  # (B * N, width, cells, cells)
    return shorten(pooled.reshape(len(features), -1).cpu().numpy())


def open_mixture(policy: Policy, name: str, recipe: Recipe, table: FrameTable, train: bool = True
                 ) -> Mixture:
    """One dataset as the policy's training opens it, normalized by its statistics if it has some.
    Raises UserError if its actions are of another width, DataError if the split is empty."""
    width = table.frames["action"].shape[1]
    if width != policy.cfg.action_dim:
        raise UserError(f"{name}: its actions have {width} dimensions, the policy's "
                        f"{policy.cfg.action_dim}: was it trained on this dataset?")
    cfg = policy.cfg.model_copy(update={"datasets": {name: recipe}})
    mixture = Mixture(cfg, [(name, 1.0, recipe, table)], policy.tokenizer, train)
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
    recipe = find_recipe(name.partition(":")[0], directory, cfg.datasets)
    table = frame_table(directory, recipe, recipe.camera_keys(cfg.cameras), cfg.use_proprio,
                        index_dir=index_dir or cfg.index_dir,
                        skip_bad_episodes=cfg.skip_bad_episodes)
    train = open_mixture(policy, name, recipe, table)
    try:
        return train, open_mixture(policy, name, recipe, table, train=False)
    except DataError:
        return train, None


def batches(mixture: Mixture, rows: Sequence[int], device) -> Iterator[dict]:
    """The model's training inputs for frames `rows` of the mixture's first dataset."""
    for start in range(0, len(rows), BATCH):
        samples = [mixture.sample(0, int(row)) for row in rows[start : start + BATCH]]
        yield to_device(collate(samples, mixture.tokenizer.pad_token_id), device)


def see(policy: Policy, mixture: Mixture, rows: np.ndarray
        ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frames `rows` (R,) -> features of the pictures and of the mirrored pictures, (R, D) each, and
    the policy's loss (R,), in nats per action token."""
    vla = policy.vla
    parts = []
    for batch in batches(mixture, rows, vla.llm.device):
        images = batch.pop("images")
        features = look(vla, images)
        loss = -log_likelihood(vla, features, **batch).mean(1)
        mirrored = look(vla, images.flip(3))
        parts.append((summary(features), summary(mirrored), loss.float().cpu().numpy()))
    seen, mirrored, loss = (np.concatenate(part) for part in zip(*parts, strict=True))
    return seen, mirrored, loss
