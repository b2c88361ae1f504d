"""Acting: from an image and an instruction to an action, with a trained model.

    policy = load_vla("runs/demo+n1+b32+x7", "cuda", torch.bfloat16)   # or openvla/openvla-7b
    action = policy.predict_action(image, "open the drawer")           # (7,) in the dataset's units

Read predict_action. It prepares the model's inputs exactly as training did, generates the action
tokens greedily (`tokens_of`), and turns them into numbers. `speed_up` makes the same computation
several times as fast for one robot and a GPU.
"""

import contextlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import StaticCache

from action_tokenizer import load_tokenizer, normalize, prompt_ids, unnormalize
from machinery import oft
from machinery.acting_images import fit, prepare_oft
from machinery.cached_llm import cached_forward, make_cache
from machinery.checkpoint import CheckpointError
from machinery.config import TrainConfig, UserError
from machinery.convention import Convention, convention
from machinery.cuda_graph import no_tracing
from machinery.host import cores
from machinery.images import center_crop
from machinery.lora import linear_layers
from machinery.weights import (
    describes_a_model,
    fill,
    open_weights,
    parameters_without_memory,
)
from model import VLA, at_positions

PROMPT_LENGTHS = (32, 64)  # tokens, rounded up; instructions of 20 words have fewer


class ModelError(UserError):
    """The model computes numbers that are not finite. No action may follow from them."""


def load_vla(
    where: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    in_8_bits: bool = False,
    center_crop: bool | None = None,
) -> "Policy":
    """Load a model to act with, from anything that weights.open_weights accepts.

    center_crop: show it the middle of each image, as a model needs that was trained with random
    crops. None: as the checkpoint says, else not. Memory is that of the weights: for a 7B 15 GB in
    bf16, or 8.6 GB with the language model's matrices in 8 bits (int8.py). Raises CheckpointError
    if weights are missing.
    """
    torch.set_num_threads(min(torch.get_num_threads(), cores()))  # a container may have fewer
    weights = open_weights(where)
    if center_crop is not None:
        weights.config["image_aug"] = center_crop
    elif "image_aug" not in weights.config:
        print(f"note: {where} does not contain whether it was trained with random crops "
              "(image_aug), as OpenVLA's fine-tuned models were: they need --center_crop yes",
              file=sys.stderr)
    cfg = TrainConfig(**weights.config)
    tokenizer = load_tokenizer(cfg.tokenizer, cfg.add_action_tokens)
    with describes_a_model(where), parameters_without_memory():
        vla = oft.new_vla(cfg, tokenizer)
    vla.llm.tie_weights()
    if missing := weights.tensors.check(vla):
        raise CheckpointError(f"{where}: missing {', '.join(missing)}, which acting needs")
    to_shrink = shrinkable(vla) if in_8_bits else {}
    fill(vla.requires_grad_(False), weights.tensors, device, dtype, to_shrink)
    return Policy(vla.to(device).eval(), tokenizer, weights.norm_stats)


class Policy:
    """A model that acts.

    vla: with its weights, in eval mode, on the device where it is to act
    norm_stats: dataset_statistics.json of its training, {dataset: statistics}
    """

    def __init__(self, vla: VLA, tokenizer, norm_stats: dict):
        self.vla = vla
        self.cfg = vla.cfg
        self.tokenizer = tokenizer
        self.norm_stats = norm_stats
        self.action_tokenizer = vla.action_tokenizer
        self.graphs: dict[tuple[int, int, int], tuple] = {}  # see speed_up
        self.continue_llm = cached_forward(vla.llm)

    def predict_action(
        self,
        image: np.ndarray | Sequence,
        instruction: str | Sequence[str],
        unnorm_key: str | None = None,
        proprio: np.ndarray | None = None,
        prefix: np.ndarray | None = None,
    ) -> np.ndarray:
        """The robot's next action: (A,) float64 in the units of the dataset `unnorm_key`, or
        (action_chunk, A) if the model was trained to predict several steps.

        image: (H, W, 3) uint8. With several cameras or frames, a list of window_size x cameras of
            them, oldest first; for a window of one also a dict {camera: image}. For a batch also
            a tensor of what prepare_views returns
        unnorm_key: may be left out if the model was trained on one dataset
        proprio: the robot's state (P,), if the model was trained with it
        prefix: the chunk's first actions (k, A), if they are settled because the robot executes
            them while it waits. The others are predicted to follow them; the result includes them

        For a batch, pass a list of each; the result gets a leading dimension.

        For a dataset described in a YAML, states and actions are in the recorded form
        (machinery/convention.py; `convention(unnorm_key).action` labels each number). For OpenVLA's
        own datasets they are in standard form: changes of position and rotation, then the gripper,
        1 = open. Raises UserError; ModelError if the model itself is broken.
        """
        if isinstance(instruction, str):
            states = None if proprio is None else np.asarray(proprio)[None]
            prefixes = None if prefix is None else np.asarray(prefix)[None]
            return self.predict_action([image], [instruction], unnorm_key, states, prefixes)[0]
        robot = self.convention(unnorm_key)
        states = None if proprio is None else robot.from_robot(np.asarray(proprio))
        known = None
        if prefix is not None:
            known = self.known_tokens(prefix, len(instruction), unnorm_key)
        inputs = self.prepare(image, instruction, unnorm_key, states)
        tokens = self.generate(*inputs, known)
        return robot.to_robot(self.actions(tokens, unnorm_key))

    # ---- Before and after the model -------------------------------------------------------------

    def prepare(
        self,
        images: Sequence | torch.Tensor,
        instructions: Sequence[str],
        unnorm_key: str | None,
        proprio: np.ndarray | None,
    ) -> tuple:
        """A batch as predict_action takes it, with standard states -> the arguments of `generate`:
        pixels (B, N, H, W, C) uint8, B lists of token ids, states (B, P) float32 or None."""
        cfg = self.cfg
        device = self.vla.llm.device
        stats = self.dataset_statistics(unnorm_key)
        if len(images) != len(instructions):
            raise UserError(f"{len(instructions)} instructions came with images for {len(images)}")
        if not isinstance(images, torch.Tensor):
            images = torch.stack([self.prepare_views(views) for views in images])
        pixels = images.to(device)
        ids = {text: prompt_ids(self.tokenizer, text, cfg.prompt_style) for text in {*instructions}}
        prompts = [ids[text] for text in instructions]
        if not cfg.use_proprio:
            return pixels, prompts, None
        states = np.asarray(proprio, np.float64)
        expected = (len(images), len(stats["proprio"]["min"]))
        with np.errstate(over="ignore"):
            small = states.astype(np.float32)
        if states.shape != expected or not np.isfinite(small).all():
            raise UserError(f"proprio of shape {states.shape}: expected the robot's state, finite "
                            f"and of shape {expected}")
        if cfg.action_head == "tokens":
            states = normalize(small, stats["proprio"], cfg.action_normalization)
        else:
            states = oft.normalize_state(states, stats["proprio"], cfg.action_normalization)
        states = np.pad(states, ((0, 0), (0, cfg.proprio_dim - states.shape[1])))
        return pixels, prompts, torch.from_numpy(states).to(device)

    def prepare_views(self, images) -> torch.Tensor:
        """One sample's images as predict_action takes them -> (N, size, size, C) uint8."""
        views = self.views(images)
        count = self.vla.num_images
        if len(views) != count:
            raise UserError(f"{len(views)} images: the model needs {count} for each instruction "
                            "(window_size x cameras)")
        return torch.from_numpy(np.stack([self.prepare_image(view) for view in views]))

    def views(self, images) -> Sequence:
        """One sample's images as predict_action takes them -> a list in the order of training."""
        cameras = self.cfg.cameras
        if not isinstance(images, dict):
            return images if isinstance(images, list | tuple) else [images]
        if images.keys() != set(cameras) or self.cfg.window_size > 1:
            raise UserError(f"images of the cameras {', '.join(images)}: expected "
                            f"{', '.join(cameras)}, or a list if the model takes several frames")
        return [images[camera] for camera in cameras]

    def prepare_image(self, image: np.ndarray) -> np.ndarray:
        """A camera's image (H, W, 3) uint8 -> the model's (size, size, 3), or 3 channels for each
        tower if their images differ."""
        cfg = self.cfg
        image = np.array(image, order="C")
        # floats, or channels first, would pass and mislead the model
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise UserError(f"an image of shape {image.shape} and type {image.dtype}: expected "
                            "(height, width, 3) uint8")
        if cfg.image_resize_strategy == "oft":
            return prepare_oft(image, cfg.image_size, cfg.image_aug)
        means = [(0.0, 0.0, 0.0)]
        if cfg.image_resize_strategy == "letterbox":  # margins in each tower's own mean color
            means = [tower.mean for tower in self.vla.vision_backbone.values()]
        channels = []
        for mean in means:
            fill = [int(255 * value) for value in mean]
            resized = fit(image, cfg.image_size, cfg.image_resize_strategy, fill)
            if cfg.image_aug:  # the middle of training's random crops
                resized = center_crop(resized, cfg.image_size)
            channels.append(resized)
        return np.concatenate(channels, axis=-1)

    @property
    def max_prefix(self) -> int:
        """How many steps of a chunk may be given. Parallel decoding must have learned it."""
        return self.cfg.max_prefix if self.cfg.parallel_decoding else self.cfg.action_chunk - 1

    def known_tokens(
        self, prefix: np.ndarray, batch: int, unnorm_key: str | None
    ) -> torch.Tensor:
        """Robot actions (B, k, A) -> their tokens (B, k * action_dim)."""
        robot = self.convention(unnorm_key)
        with np.errstate(over="ignore"):
            prefix = np.asarray(prefix, np.float64).astype(np.float32)
        expected = (batch, *prefix.shape[1:2], len(robot.action))
        if prefix.shape != expected or not np.isfinite(prefix).all():
            raise UserError(f"prefix of shape {prefix.shape[1:]}: expected "
                            f"(k, {len(robot.action)}), finite: steps of {', '.join(robot.action)}")
        if prefix.shape[1] > self.max_prefix:
            raise UserError(f"prefix of {prefix.shape[1]} steps: this model takes up to "
                            f"{self.max_prefix} (its max_prefix with parallel_decoding, else "
                            "action_chunk - 1)")
        actions = robot.actions_from_robot(prefix).astype(np.float32)
        stats = self.dataset_statistics(unnorm_key)["action"]
        normalized = normalize(actions, stats, self.cfg.action_normalization)
        return torch.from_numpy(self.action_tokenizer.encode(normalized).reshape(batch, -1))

    def actions(self, tokens: torch.Tensor, unnorm_key: str | None) -> np.ndarray:
        """Action tokens, or an action head's numbers (B, T) -> standard actions
        (B, action_chunk, action_dim), or (B, action_dim) for one step, in the dataset's units."""
        if self.cfg.action_head == "l1":
            normalized = tokens.double().cpu().numpy()
        else:
            normalized = self.action_tokenizer.decode(tokens.cpu().numpy())
        chunk = () if self.cfg.action_chunk == 1 else (self.cfg.action_chunk,)
        normalized = normalized.reshape(len(tokens), *chunk, self.cfg.action_dim)
        stats = self.dataset_statistics(unnorm_key)["action"]
        undo = unnormalize if self.cfg.action_head == "tokens" else oft.unnormalize
        return undo(normalized, stats, self.cfg.action_normalization)

    def ids(self, tokens: torch.Tensor) -> np.ndarray:
        """What `generate` returns, as token ids: of an action head's numbers, their bins."""
        tokens = self.vla.ids_of(tokens) if self.cfg.action_head == "l1" else tokens
        return tokens.cpu().numpy()

    def convention(self, unnorm_key: str | None) -> Convention:
        """The form in which a dataset's robot takes actions and reports states."""
        name = self.dataset_name(unnorm_key)
        return convention(self.cfg, name, self.norm_stats[name])

    def dataset_name(self, unnorm_key: str | None) -> str:
        """The dataset in whose units to act. Raises UserError for an unknown one."""
        if unnorm_key is None and len(self.norm_stats) == 1:
            return next(iter(self.norm_stats))
        if unnorm_key not in self.norm_stats:
            raise UserError(f"unnorm_key {unnorm_key!r} is not one of the model's datasets: "
                            f"{sorted(self.norm_stats)}")
        return unnorm_key

    def dataset_statistics(self, unnorm_key: str | None) -> dict:
        """The statistics of a dataset. Raises UserError."""
        return self.norm_stats[self.dataset_name(unnorm_key)]

    # ---- The model ------------------------------------------------------------------------------

    @torch.inference_mode()
    def generate(
        self, images, prompts: Sequence[Sequence[int]], proprio=None, known=None
    ) -> torch.Tensor:
        """The likeliest action tokens (B, T), T = action_chunk x action_dim, for images
        (B, N, H, W, C) uint8 and prompts of token ids. Only action ids can be chosen. known (B, K):
        the first K of them. With an action head: the normalized numbers, float."""
        count = len(prompts)
        if known is None:
            known = torch.empty(count, 0, dtype=torch.int64)
        prompts = [[*ids, *tokens] for ids, tokens in zip(prompts, known.tolist(), strict=True)]
        shape = (count, max(map(len, prompts)), known.shape[1])
        recorded = [each for each in self.graphs
                    if each[0] >= shape[0] and each[1] >= shape[1] and each[2] == shape[2]]
        shape = min(recorded, default=shape)
        if shape[0] > count:  # repeat the last sample
            rows = torch.arange(shape[0]).clamp(max=count - 1)
            prompts = [prompts[row] for row in rows]
            images = images[rows]
            known = known[rows]
            proprio = None if proprio is None else proprio[rows]
        pad = self.tokenizer.pad_token_id
        padded = [[*ids, *[pad] * (shape[1] - len(ids))] for ids in prompts]
        device = images.device
        input_ids = torch.tensor(padded).to(device)  # (B, L)
        lengths = torch.tensor([len(ids) for ids in prompts]).to(device)  # (B,)
        inputs = [images, input_ids, lengths, proprio, known.to(device)]
        if recorded:
            tokens = self.replay(shape, inputs)
        else:
            tokens = self.tokens_of(*inputs, self.make_cache(images, shape[1]))
        tokens = tokens[:count]
        broken = ~tokens.isfinite() if tokens.is_floating_point() else tokens < 0
        if broken.any():
            raise ModelError("the model computes numbers that are not finite (NaN or infinity): "
                             "its weights are damaged, or the state or dtype is out of range")
        return tokens

    def make_cache(self, images, text: int) -> StaticCache | None:
        """Keys and values for prompts of `text` tokens and their actions, if decoding needs any."""
        if self.cfg.parallel_decoding:
            return None
        return make_cache(self.vla.llm, len(images), self.vla.sequence_length(text))

    def tokens_of(
        self, images, input_ids, lengths, proprio, known, cache: StaticCache | None
    ) -> torch.Tensor:
        """generate, for prompts input_ids (B, L) of `lengths` (B,) that end with `known` (B, K) and
        are padded on the right. It uses only the device and its shapes depend only on its inputs'
        shapes, so a CUDA graph can record it."""
        vla = self.vla
        if self.cfg.action_head != "tokens":
            hidden = vla.hidden_states(images, input_ids, lengths, proprio)  # (B, T, width)
            if self.cfg.action_head == "l1":
                return vla.action_head(hidden).flatten(1)
            return self.best_action(hidden)
        device = images.device
        count = vla.num_action_tokens - known.shape[1]  # tokens to predict
        inputs = vla.embed(images, input_ids, proprio)  # (B, S, hidden), S = L + patches (+ 1)
        size = inputs.shape[1]
        last = (lengths + size - input_ids.shape[1] - 1)[:, None]  # (B, 1) where each prompt ends
        if self.cfg.parallel_decoding:
            positions = last + 1 + torch.arange(-known.shape[1], count, device=device)  # (B, T)
            inputs = F.pad(inputs, (0, 0, 0, count))
            inputs = vla.insert_queries(inputs, positions, known.shape[1])
            hidden = vla.llm.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
            predicted = self.best_action(at_positions(hidden, positions[:, -count:] - 1))
            return torch.cat([known, predicted], dim=1)

        # one after the other, with the keys and values of earlier tokens in the cache
        cache.reset()
        slots = torch.arange(cache.layers[0].keys.shape[2], device=device)
        not_padding = ((slots <= last) | (slots >= size))[:, None, None]  # (B, 1, 1, slots)
        mask = not_padding & (slots <= slots[:size, None])  # (B, 1, S, slots): causal
        hidden = self.continue_llm(inputs, mask, slots[None, :size], cache)
        tokens = [known, self.best_action(at_positions(hidden, last))]
        for i in range(count - 1):
            step = vla.llm.get_input_embeddings()(tokens[-1].clamp(min=0))  # (B, 1, hidden)
            mask = not_padding & (slots <= size + i)
            hidden = self.continue_llm(step, mask, last + 1 + i, cache)
            tokens.append(self.best_action(hidden))
        return torch.cat(tokens, dim=1)

    def best_action(self, hidden) -> torch.Tensor:
        """hidden (B, T, width) -> the likeliest action token at each place (B, T), or -1 if its
        logit is not finite. argmax chooses a NaN."""
        first = self.action_tokenizer.first_id
        stop = self.action_tokenizer.vocab_size
        head = self.vla.llm.get_output_embeddings()
        bias = None if head.bias is None else head.bias[first:stop]
        logits = F.linear(hidden, head.weight[first:stop], bias)
        best = logits.argmax(-1)
        finite = logits.gather(-1, best[..., None])[..., 0].isfinite()
        return (best + first + 1) * finite - 1

    # ---- The same, faster -----------------------------------------------------------------------

    def speed_up(self, batches: Sequence[int] = (1,), prefixes: Sequence[int] = (0,)) -> None:
        """Fuse kernels, and record a CUDA graph for each of these batch sizes, numbers of steps in
        a prefix, and PROMPT_LENGTHS. For the 7B each takes about 45 seconds (torch.compile).

        Other requests are computed without compiled code: a robot never waits for a compilation.
        """
        from machinery import matvec  # here: it needs Triton, which comes with PyTorch for GPUs

        torch._dynamo.config.recompile_limit = 1024  # the default of 8 is used up by 4 kinds
        matvec.speed_up(self.vla.llm)
        # block by block: the model as a whole takes twice as long to compile, and gains 3%
        self.fused = {block: torch.compile(block.forward, dynamic=False)
                      for block in self.vla.blocks}
        towers = self.vla.vision_backbone.values()
        if len(towers) == 2:
            self.vla.patch_features = partial(side_by_side, *towers)
        for batch, prefix, length in itertools.product(batches, prefixes, PROMPT_LENGTHS):
            self.record(batch, length, prefix * self.cfg.action_dim)

    @contextlib.contextmanager
    def fuse(self) -> Iterator[None]:
        """Meanwhile, the model is compiled for each new shape."""
        plain = {block: block.forward for block in self.fused}
        for block, forward in self.fused.items():
            block.forward = forward
        try:
            yield
        finally:
            for block, forward in plain.items():
                block.forward = forward

    @torch.inference_mode()
    def record(self, batch: int, length: int, known: int) -> None:
        """Record tokens_of as a CUDA graph, for prompts of up to `length` tokens that are followed
        by `known` action tokens."""
        device = self.vla.llm.device
        black = np.zeros((224, 224, 3), np.uint8)
        pixels = self.prepare_views([black] * self.vla.num_images).to(device)
        first = self.action_tokenizer.first_id
        shape = (batch, length + known, known)
        proprio = None
        if self.cfg.use_proprio:
            proprio = torch.zeros(batch, self.cfg.proprio_dim, device=device)
        fixed = [pixels.repeat(batch, 1, 1, 1, 1),
                 torch.full(shape[:2], first, device=device),
                 torch.full((batch,), shape[1], device=device),
                 proprio,
                 torch.full((batch, known), first, device=device)]
        cache = self.make_cache(fixed[0], shape[1])
        with self.fuse(), no_tracing():
            for _ in range(3):  # compile, and let libraries allocate their workspaces
                self.tokens_of(*fixed, cache)
            graph = torch.cuda.CUDAGraph()
            pool = next((g.pool() for g, *_ in self.graphs.values()), None)
            with torch.cuda.graph(graph, pool=pool):
                tokens = self.tokens_of(*fixed, cache)
        self.graphs[shape] = graph, fixed, tokens, cache  # the graph writes into the cache

    def replay(self, shape: tuple[int, int, int], inputs: list) -> torch.Tensor:
        """tokens_of, by the graph recorded for this shape."""
        graph, fixed, tokens, _ = self.graphs[shape]
        for place, x in zip(fixed, inputs, strict=True):
            if x is not None:
                place.copy_(x)
        graph.replay()
        return tokens.clone()


# ---- Parts -------------------------------------------------------------------------------------


def shrinkable(vla: VLA) -> dict[str, nn.Linear]:
    """{name: layer} of the language model's linear layers, which take most memory and time."""
    layers = linear_layers(vla)
    return {name: layer for name, layer in layers.items() if name.startswith("llm_backbone")}


def side_by_side(first, second, pixel_values: list[torch.Tensor]) -> torch.Tensor:
    """VLA.patch_features of two towers on two CUDA streams: one image does not fill a GPU."""
    first_pixels, second_pixels = pixel_values
    main = torch.cuda.current_stream()
    side = torch.cuda.Stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):
        second_features = second(second_pixels)
    first_features = first(first_pixels)
    main.wait_stream(side)
    return torch.cat([first_features, second_features], dim=-1)
