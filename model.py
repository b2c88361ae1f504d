"""The VLA: vision tower(s) + projector + language model.

    image -> timm ViT(s) -> patch features -> projector --+
    "<s>", "In: What action should the robot take ...?"   +--> Llama --> the next token is an action bin
    (embedded as any text)                              --+

Read VLA.forward first: that is the whole model. Parameters are named as in OpenVLA's native checkpoints
(`vision_backbone.dino_featurizer...`, `projector.projector.0...`, `llm_backbone.llm.model.layers...`). The
ViT blocks are timm's and the decoder layers transformers'; there is no remote code and no `generate`.
"""

import inspect
import itertools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, StaticCache

from action_tokenizer import ActionTokenizer, normalize, prompt_ids, unnormalize
from images import center_crop, resize_image


class VLA(nn.Module):
    """A vision-language-action model with random weights.

    cfg: vision_backbone, llm_backbone, arch_specifier, image_size, image_resize_strategy, image_aug,
         cameras, window_size, action_dim, action_chunk, action_normalization, parallel_decoding, use_proprio,
         proprio_dim, prompt_style (see config.TrainConfig)
    tokenizer: from action_tokenizer.load_tokenizer
    llm_context: where the language model is made; under ZeRO-3 it is sharded layer by layer at its birth
    """

    def __init__(self, cfg, tokenizer, llm_context: AbstractContextManager | None = None):
        super().__init__()
        self.cfg, self.tokenizer = cfg, tokenizer
        self.action_tokenizer = ActionTokenizer(tokenizer.action_vocab_size)
        self.num_action_tokens = cfg.action_chunk * cfg.action_dim
        self.num_images = cfg.window_size * len(cfg.cameras)
        self.norm_stats: dict = {}  # the dataset_statistics.json of its training; predict_action needs it
        self.graphs: dict | None = None  # see speed_up

        towers = {name: build_tower(cfg.image_size, **kwargs) for name, kwargs in cfg.vision_backbone.items()}
        names = [f"{name}_featurizer" for name in towers] if len(towers) > 1 else ["featurizer"]
        self.vision_backbone = nn.ModuleDict(dict(zip(names, towers.values(), strict=True)))
        patches = {tower.patch_embed.num_patches for tower in towers.values()}
        if len(patches) > 1:
            raise ValueError(f"vision_backbone: the towers cut an image into {sorted(patches)} patches; they "
                             "must agree")
        self.num_patches = patches.pop()
        config = llm_config(cfg.llm_backbone, len(tokenizer))
        needed, window = self.cache_length(text=64), getattr(config, "sliding_window", None) or math.inf
        if needed > window:
            raise ValueError(f"llm_backbone: {config.model_type} looks back {window} tokens only; images and "
                             f"text need {needed}: take another model, fewer cameras or smaller images")
        with llm_context or nullcontext():
            self.llm_backbone = nn.ModuleDict({"llm": build_llm(config)})
        parameters = inspect.signature(self.llm.base_model.forward).parameters
        self.cache_argument = "cache" if "cache" in parameters else "past_key_values"  # its former name
        features, hidden = sum(tower.embed_dim for tower in towers.values()), self.llm.config.hidden_size
        self.projector = nn.ModuleDict({"projector": build_projector(cfg.arch_specifier, features, hidden)})
        if cfg.use_proprio:  # not OpenVLA's: the robot's state as one more token after the image patches
            self.proprio_projector = nn.Sequential(nn.Linear(cfg.proprio_dim, hidden), nn.GELU(),
                                                   nn.Linear(hidden, hidden))
        if cfg.parallel_decoding:  # not OpenVLA's: inputs that stand for "the next action token, please"
            self.action_queries = nn.Embedding(self.num_action_tokens, hidden)
            nn.init.normal_(self.action_queries.weight, std=0.02)  # as large as Llama's own embeddings

    @property
    def llm(self) -> nn.Module:
        """The Hugging Face causal language model."""
        return self.llm_backbone["llm"]

    def forward(self, images, input_ids, labels, proprio=None):
        """Teacher-forced training step.

        images (B, N, H, W, 3) uint8, N = window_size x cameras; input_ids, labels (B, L) int64, padded on the
        right; proprio (B, P) float32. Returns the loss, and for each action token the predicted id and the
        true one (both (B, num_action_tokens)), all on the device.
        """
        inputs = self.embed(images, input_ids, proprio)  # (B, S, hidden), S = L + image patches (+ 1)
        first = (labels != -100).int().argmax(1, keepdim=True)  # (B, 1)
        wanted = first + torch.arange(self.num_action_tokens + 1, device=labels.device)  # (B, T + 1)
        targets = labels.gather(1, wanted)
        wanted = wanted + inputs.shape[1] - labels.shape[1]  # in the sequence with patches
        if self.cfg.parallel_decoding:
            inputs = self.ask_in_parallel(inputs, wanted[:, :-1])
        # padding stands on the right, where causal attention never looks: no mask, so the fast kernels apply
        hidden = self.llm.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        # logits only where an action token or the stop token is predicted, one position earlier
        logits = self.llm.get_output_embeddings()(take(hidden, wanted - 1)).float()  # (B, T + 1, vocabulary)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return loss, logits.argmax(-1)[:, :-1], targets[:, :-1]

    def embed(self, images, input_ids, proprio=None):
        """-> (B, S, hidden): <s>, the projected image patches (and the state), then the rest of the text."""
        text = self.llm.get_input_embeddings()(input_ids)  # (B, L, hidden)
        features = self.patch_features([pixels.to(text.dtype) for pixels in self.pixel_values(images)])
        features = features.unflatten(0, images.shape[:2]).flatten(1, 2)  # (B, N * patches, width)
        extra = self.projector["projector"](features)  # (B, N * patches, hidden)
        if proprio is not None:
            extra = torch.cat([extra, self.proprio_projector(proprio.to(text.dtype))[:, None]], dim=1)
        return torch.cat([text[:, :1], extra, text[:, 1:]], dim=1)

    def ask_in_parallel(self, inputs, positions):
        """Put the learned queries where the action tokens stand: inputs (B, S, hidden), positions (B, T)."""
        queries = self.action_queries(torch.arange(positions.shape[1], device=inputs.device))  # (T, hidden)
        index = positions[..., None].expand(-1, -1, inputs.shape[-1])
        return inputs.scatter(1, index, queries.expand(len(inputs), -1, -1))

    def pixel_values(self, images) -> list[torch.Tensor]:
        """images (B, N, H, W, 3) uint8 -> for each tower (B * N, 3, H, W) float32, normalised as it was
        pretrained."""
        pixels = images.flatten(0, 1).permute(0, 3, 1, 2).float() / 255
        pixels = itertools.cycle(pixels.split(3, dim=1))  # the towers share an image, or have one each
        return [normalize_pixels(next(pixels), tower) for tower in self.vision_backbone.values()]

    def patch_features(self, pixel_values: list[torch.Tensor]) -> torch.Tensor:
        """For each tower (B, 3, H, W) -> (B, patches, sum of the towers' widths)."""
        towers = [*zip(self.vision_backbone.values(), pixel_values, strict=True)]
        if self.graphs is None or len(towers) == 1:
            return torch.cat([tower(pixels)[0] for tower, pixels in towers], dim=-1)
        # acting: an image does not fill a GPU, so the towers run side by side
        (first, first_pixels), (second, second_pixels) = towers
        main, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            second_features = second(second_pixels)[0]
        first_features = first(first_pixels)[0]
        main.wait_stream(side)
        return torch.cat([first_features, second_features], dim=-1)

    # --------------------------------------------------------------------------------------------------------
    # What is trained

    def freeze(self, freeze_vision_backbone: bool, freeze_llm_backbone: bool,
               unfreeze_last_llm_layer: bool) -> str:
        """Choose the trainable parameters as OpenVLA's three flags do; returns the name of its training
        stage."""
        if freeze_llm_backbone and not unfreeze_last_llm_layer:
            raise ValueError("freeze_llm_backbone without unfreeze_last_llm_layer leaves nothing that could "
                             "learn to act: set unfreeze_last_llm_layer: true")
        self.requires_grad_(True)
        self.vision_backbone.requires_grad_(not freeze_vision_backbone)
        self.projector.requires_grad_(not (freeze_vision_backbone and freeze_llm_backbone))
        if freeze_llm_backbone:  # except its two ends and last layer; OpenVLA leaves the final norm frozen
            self.llm_backbone.requires_grad_(False)
            for module in (self.llm.get_input_embeddings(), self.llm.base_model.layers[-1],
                           self.llm.get_output_embeddings()):
                module.requires_grad_(True)
        stages = {(False, False): "vla-full-train", (True, False): "vla-train",
                  (False, True): "vla-sandwich-train", (True, True): "vla-last-layer-train"}
        return stages[freeze_vision_backbone, freeze_llm_backbone]

    def count_parameters(self) -> tuple[int, int]:
        """(all, trained), also where ZeRO-3 has left only slices."""
        sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in self.parameters()]
        return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)

    @property
    def blocks(self) -> list[nn.Module]:
        """All transformer blocks: of the towers, then of the language model."""
        towers = [block for tower in self.vision_backbone.values() for block in tower.blocks]
        return [*towers, *self.llm.base_model.layers]

    def compile_blocks(self) -> None:
        """Let torch.compile fuse the operations inside each block. Blocks of a kind share one compilation,
        and what DeepSpeed does between modules stays outside."""
        for block in self.blocks:
            block.forward = torch.compile(block.forward)

    def recompute_activations(self) -> None:
        """Keep only the blocks' inputs for the backward pass, and compute the rest again."""
        for block in self.blocks:
            # nothing here is random (no dropout), so the generators' states need not be kept
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)

    def training_flops(self, num_tokens: int) -> float:
        """Floating-point operations of one training sample with num_tokens of text, without recomputation.

        The usual count: for each weight of a matrix and each token 2 in the forward pass, 2 for the gradient
        of the input and 2 for that of the weight if it is trained; for attention, 4 x width x tokens^2 a
        block forward and twice that backward. A frozen tower has no backward pass: nothing before it is
        trained. Embedding tables are looked up, not multiplied; the LM head sees the action tokens only.
        """
        def block_flops(blocks, width, tokens):
            weights = sum(weight_flops(p) for block in blocks for p in block.parameters())
            return tokens * (weights + (4 + 8 * trained) * len(blocks) * width * tokens)

        def weight_flops(p):
            shape = getattr(p, "ds_shape", p.shape)  # ds_shape: where ZeRO-3 has left only slices
            return shape.numel() * (2 + trained * (2 + 2 * p.requires_grad)) if len(shape) > 1 else 0

        total = 0.0
        for tower in self.vision_backbone.values():
            trained = any(p.requires_grad for p in tower.parameters())
            tokens = self.num_patches + tower.num_prefix_tokens
            total += self.num_images * block_flops(tower.blocks[:-1], tower.embed_dim, tokens)
        trained, patches = 1, self.num_images * self.num_patches
        total += patches * sum(map(weight_flops, self.projector.parameters()))
        layers, width = self.llm.base_model.layers, self.llm.config.hidden_size
        head = weight_flops(self.llm.get_output_embeddings().weight) * (self.num_action_tokens + 1)
        return total + head + block_flops(layers, width, num_tokens + patches + self.cfg.use_proprio)

    # --------------------------------------------------------------------------------------------------------
    # Acting

    @torch.inference_mode()
    def generate(self, images, prompts: Sequence[Sequence[int]], proprio=None) -> torch.Tensor:
        """Greedy action tokens (B, num_action_tokens) for images (B, N, H, W, C) uint8 and prompts of token
        ids; only action ids can be chosen."""
        longest, pad = max(map(len, prompts)), self.tokenizer.pad_token_id
        if self.graphs is not None:  # few different shapes, so that few graphs are recorded
            longest = -(-longest // 32) * 32
        input_ids = torch.tensor([[*prompt, *[pad] * (longest - len(prompt))] for prompt in prompts])
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        inputs = [images, input_ids.to(images.device), lengths.to(images.device), proprio]
        if self.graphs is not None:
            return self.replay(*inputs)
        return self.decode(*inputs, None if self.cfg.parallel_decoding else self.make_cache(images, longest))

    def cache_length(self, text: int) -> int:
        """How many tokens the language model sees with `text` tokens of a prompt, rounded up."""
        tokens = text + self.num_images * self.num_patches + self.cfg.use_proprio + self.num_action_tokens
        return -(-tokens // 64) * 64

    def make_cache(self, images, text: int) -> StaticCache:
        """Room for the keys and values of everything the language model will see."""
        config = self.llm.config
        cache = StaticCache(config, max_cache_len=self.cache_length(text))
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        cache.early_initialization(len(images), heads, width, self.llm.dtype, images.device)
        return cache

    def decode(self, images, input_ids, lengths, proprio, cache: StaticCache | None) -> torch.Tensor:
        """generate, for prompts padded on the right: input_ids (B, L), lengths (B,). Touches nothing but the
        device, and its shapes depend on its inputs' shapes alone, so that it can be recorded."""
        inputs, tokens, count = self.embed(images, input_ids, proprio), [], self.num_action_tokens
        size, device = inputs.shape[1], inputs.device  # S = L + image patches (+ 1)
        last = (lengths + size - input_ids.shape[1] - 1)[:, None]  # (B, 1) where each prompt ends
        if self.cfg.parallel_decoding:
            positions = last + 1 + torch.arange(count, device=device)
            inputs = self.ask_in_parallel(F.pad(inputs, (0, 0, 0, count)), positions)
            hidden = self.llm.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
            return self.best_action(take(hidden, positions - 1))

        # one after the other, with keys and values of what came before in the cache
        cache.reset()
        slots = torch.arange(cache.layers[0].keys.shape[2], device=device)
        prompt_or_new = ((slots <= last) | (slots >= size))[:, None, None]  # (B, 1, 1, slots): not padding
        mask = prompt_or_new & (slots <= slots[:size, None])  # (B, 1, S, slots): causal
        hidden = self.cached_forward(inputs, mask, slots[None, :size], cache)
        tokens.append(self.best_action(take(hidden, last)))
        for i in range(count - 1):
            step = self.llm.get_input_embeddings()(tokens[-1])  # (B, 1, hidden)
            mask = prompt_or_new & (slots <= size + i)
            hidden = self.cached_forward(step, mask, last + 1 + i, cache)
            tokens.append(self.best_action(hidden))
        return torch.cat(tokens, dim=1)

    def cached_forward(self, inputs, mask, positions, cache):
        """The language model on inputs (B, S, hidden), which come after what is in the cache."""
        output = self.llm.base_model(inputs_embeds=inputs, attention_mask=mask, position_ids=positions,
                                     **{self.cache_argument: cache}, use_cache=True)
        return output.last_hidden_state

    def best_action(self, hidden) -> torch.Tensor:
        """hidden (B, T, width) -> the likeliest action token at each place (B, T)."""
        first, stop = self.action_tokenizer.first_id, self.action_tokenizer.vocab_size
        head = self.llm.get_output_embeddings()
        bias = None if head.bias is None else head.bias[first:stop]
        return F.linear(hidden, head.weight[first:stop], bias).argmax(-1) + first

    def speed_up(self) -> None:
        """For acting on a GPU: fuse kernels and replay them as one CUDA graph for each size of batch and each
        32 tokens of prompt. The 7B's first action of a kind then takes two minutes (torch.compile)."""
        from matvec import linear  # here: it needs Triton, which comes with PyTorch for GPUs

        torch._dynamo.config.recompile_limit = 1024  # 8 are four kinds; more would be left uncompiled
        for layer in self.llm.modules():
            if isinstance(layer, nn.Linear):
                layer.forward = partial(linear, layer)
        self.cached_forward = torch.compile(self.cached_forward, dynamic=False)
        for tower in self.vision_backbone.values():
            tower.forward = torch.compile(tower.forward, dynamic=False)
        self.graphs = {}

    def replay(self, *inputs) -> torch.Tensor:
        """decode, recorded as a CUDA graph the first time that inputs of these shapes come."""
        shapes = tuple(None if x is None else x.shape for x in inputs)
        if shapes not in self.graphs:
            fixed = [None if x is None else x.clone() for x in inputs]
            cache = None if self.cfg.parallel_decoding else self.make_cache(fixed[0], fixed[1].shape[1])
            for _ in range(3):  # compile, and let libraries allocate what they keep
                self.decode(*fixed, cache)
            graph, pool = torch.cuda.CUDAGraph(), next((g.pool() for g, *_ in self.graphs.values()), None)
            with torch.cuda.graph(graph, pool=pool):
                tokens = self.decode(*fixed, cache)
            self.graphs[shapes] = graph, fixed, tokens, cache  # the graph writes into the cache's memory
        graph, fixed, tokens, _ = self.graphs[shapes]
        for place, x in zip(fixed, inputs, strict=True):
            if x is not None:
                place.copy_(x)
        graph.replay()
        return tokens.clone()

    def predict_action(self, image: np.ndarray | Sequence, instruction: str | Sequence[str],
                       unnorm_key: str | None = None, proprio: np.ndarray | None = None) -> np.ndarray:
        """What the robot should do: (action_dim,) float64 in the units of the dataset `unnorm_key`, or
        (action_chunk, action_dim) when the model was trained to predict several steps.

        image: (H, W, 3) uint8, or a list of window_size x cameras of them, oldest first. proprio: the robot's
        state (P,) as the dataset has it, if the model was trained with it. For a batch, give a list of each;
        the result gets a leading dimension. unnorm_key may be left out when the model was trained on
        one dataset; otherwise a ValueError lists the choices.
        """
        batched = not isinstance(instruction, str)
        images, instructions = (image, instruction) if batched else ([image], [instruction])
        stats, device = self.dataset_statistics(unnorm_key), self.llm.device
        images = [views if isinstance(views, list | tuple) else [views] for views in images]
        if len(images) != len(instructions) or any(len(views) != self.num_images for views in images):
            raise ValueError(f"{len(instructions)} instructions came with {[*map(len, images)]} images; the "
                             f"model needs {self.num_images} for each (window_size x cameras)")
        pixels = [[self.see(view) for view in views] for views in images]
        pixels = torch.from_numpy(np.array(pixels)).to(device)  # (B, N, H, W, C)
        prompts = [prompt_ids(self.tokenizer, text, self.cfg.prompt_style) for text in instructions]
        if self.cfg.use_proprio:
            if proprio is None:
                raise ValueError("the model was trained with the robot's state: pass proprio")
            states = np.atleast_2d(np.asarray(proprio, np.float32))
            expected = (len(images), len(next(iter(stats["proprio"].values()))))
            if states.shape != expected or not np.isfinite(states).all():
                raise ValueError(f"proprio of shape {states.shape}: expected {expected}, all finite")
            states = normalize(states, stats["proprio"], self.cfg.action_normalization)
            states = np.pad(states, ((0, 0), (0, self.cfg.proprio_dim - states.shape[1])))
            proprio = torch.from_numpy(states).to(device)
        tokens = self.generate(pixels, prompts, proprio if self.cfg.use_proprio else None)
        actions = self.action_tokenizer.decode(tokens.cpu().numpy())
        actions = actions.reshape(len(actions), self.cfg.action_chunk, self.cfg.action_dim)
        actions = unnormalize(actions, stats["action"], self.cfg.action_normalization)
        actions = actions[:, 0] if self.cfg.action_chunk == 1 else actions
        return actions if batched else actions[0]

    def see(self, image: np.ndarray) -> np.ndarray:
        """A camera's image (H, W, 3) uint8 -> what the model was trained to look at, (size, size, 3), or with
        3 channels for each tower where the towers differ."""
        cfg, means, image = self.cfg, [(0.0, 0.0, 0.0)], np.asarray(image)
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"an image of shape {image.shape} and type {image.dtype}: expected (height, "
                             "width, 3) uint8")
        if cfg.image_resize_strategy == "letterbox":  # each tower wants the margins in its own mean colour
            means = [vit.mean for vit in self.vision_backbone.values()]
        fills = [[int(255 * value) for value in mean] for mean in means]
        seen = [resize_image(image, cfg.image_size, cfg.image_resize_strategy, fill) for fill in fills]
        seen = [center_crop(x, cfg.image_size) for x in seen] if cfg.image_aug else seen
        return np.concatenate(seen, axis=-1)

    def dataset_statistics(self, unnorm_key: str | None) -> dict:
        """The statistics of one training dataset. Raises ValueError rather than leave actions in [-1, 1]."""
        if unnorm_key is None and len(self.norm_stats) == 1:
            return next(iter(self.norm_stats.values()))
        if unnorm_key not in self.norm_stats:
            raise ValueError(f"unnorm_key {unnorm_key!r} is not one of the model's datasets: "
                             f"{sorted(self.norm_stats)}")
        return self.norm_stats[unnorm_key]


# ------------------------------------------------------------------------------------------------------------
# Parts


def take(sequence, positions):
    """sequence (B, S, hidden), positions (B, T) -> (B, T, hidden)."""
    return sequence.gather(1, positions[..., None].expand(-1, -1, sequence.shape[-1]))


def build_tower(image_size: int, *, model: str, **kwargs) -> nn.Module:
    """A timm ViT by name, with any of timm's arguments, whose output is [(B, patches, width)]: the
    second-to-last block's, without final norm and class or register tokens (Prismatic's choice,
    prismatic/.../base_vision.py)."""
    try:
        vit = timm.create_model(model, num_classes=0, img_size=image_size, **kwargs)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"vision_backbone: timm cannot make {model!r}: {error}") from error
    if not hasattr(vit, "blocks") or any("running_mean" in name for name, _ in vit.named_buffers()):
        raise ValueError(f"vision_backbone: {model!r} is not a ViT without batch normalisation")
    # through forward, because ZeRO-3 gathers a module's parameters when the module is called
    vit.forward = partial(vit.forward_intermediates, indices=[len(vit.blocks) - 2], norm=False,
                          stop_early=True, output_fmt="NLC", intermediates_only=True)
    stats = timm.data.resolve_model_data_config(vit)
    vit.mean, vit.std = stats["mean"], stats["std"]  # numbers: as buffers they would be cast to bf16
    return vit


def normalize_pixels(pixels: torch.Tensor, tower: nn.Module) -> torch.Tensor:
    """(B, 3, H, W) float32 in [0, 1] -> of the mean and deviation this tower was pretrained on."""
    channels = zip(pixels.unbind(1), tower.mean, tower.std, strict=True)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)


def llm_config(spec: dict | str, num_tokens: int) -> PretrainedConfig:
    """The language model's transformers config. spec: its fields with model_type, or a directory or hub id
    to read them from. The vocabulary is num_tokens, rounded up to a multiple of 64. There is no dropout: a
    step depends on its batch alone, and recomputation finds the same activations again."""
    try:
        config = AutoConfig.from_pretrained(spec) if isinstance(spec, str) else AutoConfig.for_model(**spec)
    except Exception as error:  # transformers has many kinds for a wrong field
        raise ValueError(f"llm_backbone: transformers makes no config of {spec!r}: {error}") from error
    config.vocab_size = -(-num_tokens // 64) * 64
    for key, value in vars(config).items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    return config


def build_llm(config: PretrainedConfig) -> nn.Module:
    """A causal language model with random weights."""
    llm = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    if not hasattr(llm.base_model, "layers"):
        raise ValueError(f"llm_backbone: {config.model_type} has no decoder blocks in `layers`, as Llama has")
    return llm


def build_projector(arch_specifier: str, features: int, hidden: int) -> nn.Module:
    """Image features -> the language model's width; the three kinds of prismatic/util/nn_utils.py."""
    match arch_specifier.removeprefix("no-align+"):
        case "linear":
            return nn.Linear(features, hidden)
        case "gelu-mlp":
            return nn.Sequential(nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        case "fused-gelu-mlp":
            return nn.Sequential(nn.Linear(features, 4 * features), nn.GELU(),
                                 nn.Linear(4 * features, hidden), nn.GELU(), nn.Linear(hidden, hidden))
    raise ValueError(f"arch_specifier {arch_specifier!r}: choose linear, gelu-mlp or fused-gelu-mlp")
