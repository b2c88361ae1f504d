"""Acting: an image and an instruction to an action, with a trained model.

    policy = load_vla("runs/demo+n1+b32+x7", "cuda", torch.bfloat16)       # or openvla/openvla-7b
    action = policy.predict_action(image, "open the drawer")               # (7,), in the dataset's units

Read predict_action, which prepares what the model sees exactly as training did, has `generate` say the action
tokens one after the other (greedy: `tokens_of`), and turns them into numbers. `speed_up` does the same for
one robot and a GPU several times as fast.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import StaticCache

from action_tokenizer import load_tokenizer, normalize, prompt_ids, unnormalize
from machinery.backbones import cached_forward, make_cache, round_up
from machinery.checkpoint import CheckpointError
from machinery.config import TrainConfig, UserError
from machinery.convention import Convention, convention
from machinery.images import center_crop, resize_image
from machinery.lora import linear_layers
from machinery.weights import fill, open_weights, parameters_without_memory
from model import VLA, take


def load_vla(where: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
             in_8_bits: bool = False) -> "Policy":
    """A model to act with, from anything that weights.open_weights knows. It takes no more memory than the
    weights do: of a 7B 15 GB in bf16, or 8.6 with the language model's matrices in 8 bits (int8.py). Raises
    CheckpointError when there is none, and UserError when it could not act."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {device}: PyTorch sees no GPU here: use cpu, or a PyTorch built for GPUs")
    weights = open_weights(where)
    cfg = TrainConfig(**weights.config)
    tokenizer = load_tokenizer(cfg.tokenizer, cfg.add_action_tokens)
    with parameters_without_memory():
        vla = VLA(cfg, tokenizer)
    vla.llm.tie_weights()
    if missing := weights.tensors.check(vla):
        raise CheckpointError(f"{where}: has no {', '.join(missing)}, which acting needs")
    fill(vla.requires_grad_(False), weights.tensors, device, dtype, shrinkable(vla) if in_8_bits else {})
    return Policy(vla.to(device).eval(), tokenizer, weights.norm_stats)


class Policy:
    """A model that acts.

    vla: with its weights, in eval mode, on the device where it is to act
    norm_stats: the dataset_statistics.json of its training, {dataset: statistics}
    """

    def __init__(self, vla: VLA, tokenizer, norm_stats: dict):
        self.vla, self.cfg, self.tokenizer, self.norm_stats = vla, vla.cfg, tokenizer, norm_stats
        self.action_tokenizer = vla.action_tokenizer
        self.graphs: dict | None = None  # see speed_up
        self.continue_llm = cached_forward(vla.llm)

    def predict_action(self, image: np.ndarray | Sequence, instruction: str | Sequence[str],
                       unnorm_key: str | None = None, proprio: np.ndarray | None = None,
                       prefix: np.ndarray | None = None) -> np.ndarray:
        """What the robot should do: (A,) float64 in the units of the dataset `unnorm_key`, or
        (action_chunk, A) when the model was trained to predict several steps.

        image: (H, W, 3) uint8; with several cameras or frames a list of window_size x cameras of them, oldest
        first, or for a window of one a dict {camera: image}. proprio: the robot's state (P,), if the model
        was trained with it. For a batch, give a list of each; the result gets a leading dimension. unnorm_key
        may be left out when the model was trained on one dataset; otherwise a UserError lists the choices.
        prefix: the chunk's first actions (k, A), where they are settled already, because the robot does them
        while it waits for the others: those are then said to go on from there. The result begins with them.

        Of a dataset that was described in a YAML, actions leave and states come in as they were recorded
        (convention.py; `convention(unnorm_key).action` says what each number is). Of OpenVLA's own, in its
        standard form: changes of position and rotation, then the gripper, 1 = open.
        """
        if not isinstance(instruction, str):
            if not isinstance(instruction, Sequence | np.ndarray) or not len(instruction):
                raise UserError(f"instruction {instruction!r}: expected a text, or a list of some")
            robot = self.convention(unnorm_key)
            state = None if proprio is None else robot.from_robot(np.asarray(proprio))
            known = None if prefix is None else self.known_tokens(prefix, len(instruction), unnorm_key)
            tokens = self.generate(*self.prepare(image, instruction, unnorm_key, state), known)
            return robot.to_robot(self.actions(tokens, unnorm_key))
        state, prefix = (None if x is None else np.asarray(x)[None] for x in (proprio, prefix))
        return self.predict_action([image], [instruction], unnorm_key, state, prefix)[0]

    # ---- Before and after the model ------------------------------------------------------------------------

    def prepare(self, images: Sequence, instructions: Sequence[str], unnorm_key: str | None,
                proprio: np.ndarray | None) -> tuple:
        """A batch as predict_action takes it -> what `generate` takes."""
        stats, device, count = self.dataset_statistics(unnorm_key), self.vla.llm.device, self.vla.num_images
        images = [self.views(view) for view in images]
        if len(images) != len(instructions) or any(len(views) != count for views in images):
            raise UserError(f"{len(instructions)} instructions came with {[*map(len, images)]} images; the "
                            f"model needs {count} for each (window_size x cameras)")
        pixels = torch.from_numpy(np.array([[self.see(view) for view in views] for views in images]))
        prompts = [prompt_ids(self.tokenizer, text, self.cfg.prompt_style) for text in instructions]
        if (longest := max(map(len, prompts), default=0)) > self.vla.room:  # as in training
            raise UserError(f"a prompt of {longest} tokens: the model's max_length of {self.cfg.max_length} "
                            f"leaves room for {self.vla.room}: shorten the instruction")
        if not self.cfg.use_proprio:
            return pixels.to(device), prompts, None  # (B, N, H, W, C), B lists of ids
        if proprio is None:
            raise UserError("the model was trained with the robot's state: pass proprio")
        states = np.asarray(proprio, np.float32)
        expected = (len(images), len(next(iter(stats["proprio"].values()))))
        if states.shape != expected or not np.isfinite(states).all():
            raise UserError(f"proprio of shape {states.shape}: expected {expected}, all finite")
        states = normalize(states, stats["proprio"], self.cfg.action_normalization)
        states = np.pad(states, ((0, 0), (0, self.cfg.proprio_dim - states.shape[1])))
        return pixels.to(device), prompts, torch.from_numpy(states).to(device)

    def views(self, images) -> Sequence:
        """One sample's images as predict_action takes them -> a list in the order of training."""
        cameras = self.cfg.cameras
        if not isinstance(images, dict):
            return images if isinstance(images, list | tuple) else [images]
        if images.keys() != set(cameras) or self.cfg.window_size > 1:
            raise UserError(f"images of the cameras {', '.join(images)}: expected {', '.join(cameras)}, by "
                            "name (or a list, where the model looks at several frames)")
        return [images[camera] for camera in cameras]

    def see(self, image: np.ndarray) -> np.ndarray:
        """A camera's image (H, W, 3) uint8 -> what the model was trained to look at, (size, size, 3), or with
        3 channels for each tower where the towers differ."""
        cfg, means, image = self.cfg, [(0.0, 0.0, 0.0)], np.array(image, order="C")
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise UserError(f"an image of shape {image.shape} and type {image.dtype}: expected (height, "
                            "width, 3) uint8")
        if cfg.image_resize_strategy == "letterbox":  # each tower wants the margins in its own mean colour
            means = [vit.mean for vit in self.vla.vision_backbone.values()]
        fills = [[int(255 * value) for value in mean] for mean in means]
        seen = [fit(image, cfg.image_size, cfg.image_resize_strategy, fill) for fill in fills]
        seen = [center_crop(x, cfg.image_size) for x in seen] if cfg.image_aug else seen
        return np.concatenate(seen, axis=-1)

    @property
    def max_prefix(self) -> int:
        """How many steps of a chunk may be given. What is decoded in parallel learns it in training alone."""
        return self.cfg.max_prefix if self.cfg.parallel_decoding else self.cfg.action_chunk - 1

    def known_tokens(self, prefix: np.ndarray, batch: int, unnorm_key: str | None) -> torch.Tensor:
        """Actions (B, k, A) as predict_action gives them -> the tokens (B, k * action_dim) that mean them."""
        robot = self.convention(unnorm_key)
        with np.errstate(over="ignore"):
            prefix = np.asarray(prefix, np.float64).astype(np.float32)
        if (prefix.ndim != 3 or (len(prefix), prefix.shape[2]) != (batch, len(robot.action))
                or not np.isfinite(prefix).all()):
            raise UserError(f"prefix of shape {prefix.shape[1:]}: expected (k, {len(robot.action)}), finite: "
                            f"steps of {', '.join(robot.action)}")
        if prefix.shape[1] > self.max_prefix:
            why = "its training's max_prefix" if self.cfg.parallel_decoding else "one less than its chunk"
            raise UserError(f"prefix of {prefix.shape[1]} steps: this model takes up to {self.max_prefix}, "
                            f"{why}")
        actions = robot.actions_from_robot(prefix).astype(np.float32)
        stats = self.dataset_statistics(unnorm_key)["action"]
        normalized = normalize(actions, stats, self.cfg.action_normalization)
        return torch.from_numpy(self.action_tokenizer.encode(normalized).reshape(batch, -1))

    def actions(self, tokens: torch.Tensor, unnorm_key: str | None) -> np.ndarray:
        """Action tokens (B, T) -> actions (B, action_chunk, action_dim), or (B, action_dim) for one step, in
        the dataset's units."""
        normalized = self.action_tokenizer.decode(tokens.cpu().numpy())
        chunk = () if self.cfg.action_chunk == 1 else (self.cfg.action_chunk,)
        normalized = normalized.reshape(len(tokens), *chunk, self.cfg.action_dim)
        stats = self.dataset_statistics(unnorm_key)["action"]
        return unnormalize(normalized, stats, self.cfg.action_normalization)

    def convention(self, unnorm_key: str | None) -> Convention:
        """In whose terms the robot of a dataset speaks."""
        name = self.dataset_name(unnorm_key)
        return convention(self.cfg, name, self.norm_stats[name])

    def dataset_name(self, unnorm_key: str | None) -> str:
        """One of the training's datasets, in whose units to act. Raises UserError rather than leave actions
        in [-1, 1]."""
        if unnorm_key is None and len(self.norm_stats) == 1:
            return next(iter(self.norm_stats))
        if unnorm_key not in self.norm_stats:
            raise UserError(f"unnorm_key {unnorm_key!r} is not one of the model's datasets: "
                            f"{sorted(self.norm_stats)}")
        return unnorm_key

    def dataset_statistics(self, unnorm_key: str | None) -> dict:
        """The statistics of one of the training's datasets. Raises UserError for those of another robot."""
        stats = self.norm_stats[name := self.dataset_name(unnorm_key)]
        if (width := len(stats["action"]["q01"])) != self.cfg.action_dim:
            raise UserError(f"unnorm_key {name!r}: its actions have {width} dimensions, the model's "
                            f"{self.cfg.action_dim}")
        return stats

    # ---- The model -----------------------------------------------------------------------------------------

    @torch.inference_mode()
    def generate(self, images, prompts: Sequence[Sequence[int]], proprio=None, known=None) -> torch.Tensor:
        """The likeliest action tokens (B, T), T = action_chunk x action_dim, for images (B, N, H, W, C) uint8
        and prompts of token ids; only action ids can be chosen. known (B, K): the first K of them."""
        known = torch.empty(len(prompts), 0, dtype=torch.int64) if known is None else known
        prompts = [[*prompt, *tokens] for prompt, tokens in zip(prompts, known.tolist(), strict=True)]
        longest, pad = max(map(len, prompts)), self.tokenizer.pad_token_id
        if self.graphs is not None:  # few different shapes, so that few graphs are recorded
            longest = round_up(longest, 32)
        input_ids = torch.tensor([[*prompt, *[pad] * (longest - len(prompt))] for prompt in prompts])
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        input_ids, lengths, known = (x.to(images.device) for x in (input_ids, lengths, known))
        inputs = [images, input_ids, lengths, proprio, known]
        if self.graphs is not None:
            return self.replay(*inputs)
        return self.tokens_of(*inputs, self.make_cache(images, longest))

    def make_cache(self, images, text: int) -> StaticCache | None:
        """Room for all that the language model will see of prompts of `text` tokens, if it needs any."""
        if self.cfg.parallel_decoding:
            return None
        return make_cache(self.vla.llm, len(images), self.vla.sequence_length(text))

    def tokens_of(self, images, input_ids, lengths, proprio, known, cache: StaticCache | None
                  ) -> torch.Tensor:
        """generate, for prompts that end with `known` (B, K) and are padded on the right: input_ids (B, L),
        lengths (B,). Touches nothing but the device, and its shapes depend on its inputs' shapes alone, so
        that it can be recorded."""
        vla, tokens, count = self.vla, [known], self.vla.num_action_tokens - known.shape[1]
        inputs = vla.embed(images, input_ids, proprio)  # (B, S, hidden)
        size, device = inputs.shape[1], inputs.device  # S = L + image patches (+ 1)
        last = (lengths + size - input_ids.shape[1] - 1)[:, None]  # (B, 1) where each prompt ends
        if self.cfg.parallel_decoding:
            positions = last + 1 + torch.arange(-known.shape[1], count, device=device)  # (B, T)
            inputs = vla.ask_in_parallel(F.pad(inputs, (0, 0, 0, count)), positions, known.shape[1])
            hidden = vla.llm.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
            return torch.cat([known, self.best_action(take(hidden, positions[:, -count:] - 1))], dim=1)

        # one after the other, with keys and values of what came before in the cache
        cache.reset()
        slots = torch.arange(cache.layers[0].keys.shape[2], device=device)
        prompt_or_new = ((slots <= last) | (slots >= size))[:, None, None]  # (B, 1, 1, slots): not padding
        mask = prompt_or_new & (slots <= slots[:size, None])  # (B, 1, S, slots): causal
        hidden = self.continue_llm(inputs, mask, slots[None, :size], cache)
        tokens.append(self.best_action(take(hidden, last)))
        for i in range(count - 1):
            step = vla.llm.get_input_embeddings()(tokens[-1])  # (B, 1, hidden)
            mask = prompt_or_new & (slots <= size + i)
            hidden = self.continue_llm(step, mask, last + 1 + i, cache)
            tokens.append(self.best_action(hidden))
        return torch.cat(tokens, dim=1)

    def best_action(self, hidden) -> torch.Tensor:
        """hidden (B, T, width) -> the likeliest action token at each place (B, T)."""
        first, stop = self.action_tokenizer.first_id, self.action_tokenizer.vocab_size
        head = self.vla.llm.get_output_embeddings()
        bias = None if head.bias is None else head.bias[first:stop]
        return F.linear(hidden, head.weight[first:stop], bias).argmax(-1) + first

    # ---- The same, faster ----------------------------------------------------------------------------------

    def speed_up(self) -> None:
        """For acting on a GPU: fuse kernels and replay them as one CUDA graph for each size of batch and each
        32 tokens of prompt. The 7B's first action of a kind then takes 90 seconds (torch.compile)."""
        from machinery import matvec  # here: it needs Triton, which comes with PyTorch for GPUs

        torch._dynamo.config.recompile_limit = 1024  # 8 are four kinds; more would be left uncompiled
        towers = self.vla.vision_backbone.values()
        matvec.speed_up(self.vla.llm)
        for module in (*towers, self.vla.llm.base_model):
            module.forward = torch.compile(module.forward, dynamic=False)
        if len(towers) == 2:
            self.vla.patch_features = partial(side_by_side, *towers)
        self.graphs = {}

    def replay(self, *inputs) -> torch.Tensor:
        """tokens_of, recorded as a CUDA graph the first time that inputs of these shapes come."""
        shapes = tuple(None if x is None else x.shape for x in inputs)
        if shapes not in self.graphs:
            fixed = [None if x is None else x.clone() for x in inputs]
            cache = self.make_cache(fixed[0], fixed[1].shape[1])
            for _ in range(3):  # compile, and let libraries allocate what they keep
                self.tokens_of(*fixed, cache)
            graph, pool = torch.cuda.CUDAGraph(), next((g.pool() for g, *_ in self.graphs.values()), None)
            with torch.cuda.graph(graph, pool=pool):
                tokens = self.tokens_of(*fixed, cache)
            self.graphs[shapes] = graph, fixed, tokens, cache  # the graph writes into the cache's memory
        graph, fixed, tokens, _ = self.graphs[shapes]
        for place, x in zip(fixed, inputs, strict=True):
            if x is not None:
                place.copy_(x)
        graph.replay()
        return tokens.clone()


# ---- Parts -------------------------------------------------------------------------------------------------


def shrinkable(vla: VLA) -> dict[str, nn.Linear]:
    """{name: layer} of what acting spends its time and memory on: the language model's linear layers."""
    return {name: layer for name, layer in linear_layers(vla).items() if name.startswith("llm_backbone")}


def fit(image: np.ndarray, size: int, strategy: str, fill: Sequence[int]) -> np.ndarray:
    """(H, W, 3) uint8 -> (size, size, 3) by one of the strategies that image_resize_strategy names. "lanczos"
    is how training data are resized. "resize-naive", "resize-crop" (cut off what is too long) and "letterbox"
    (pad with the colour `fill`) are bicubic: how OpenVLA's processors treat what they are given to act on."""
    if strategy == "lanczos" or image.shape[:2] == (size, size):
        return resize_image(image, size)
    image = Image.fromarray(image)
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


def side_by_side(first, second, pixel_values: list[torch.Tensor]) -> torch.Tensor:
    """VLA.patch_features for two towers at the same time: one image does not fill a GPU."""
    first_pixels, second_pixels = pixel_values
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):
        second_features = second(second_pixels)
    first_features = first(first_pixels)
    main.wait_stream(side)
    return torch.cat([first_features, second_features], dim=-1)
