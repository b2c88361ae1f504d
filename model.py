"""The VLA: vision tower(s) + projector + language model.

    image -> timm ViT(s) -> patch features -> projector --+
    "<s>", "In: What action should the robot take ...?"   +--> Llama --> the next token is an action bin
    (embedded as any text)                              --+

Read VLA.forward first: that is the whole model. Parameters are named as in OpenVLA's native checkpoints
(`vision_backbone.dino_featurizer...`, `projector.projector.0...`, `llm_backbone.llm.model.layers...`). The
ViT blocks are timm's, the decoder layers transformers' (backbones.py). How it acts is in act.py.
"""

import itertools
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch._functorch import config as functorch
from torch.utils.checkpoint import checkpoint

from action_tokenizer import ActionTokenizer
from machinery.backbones import build_llm, build_tower, llm_config, normalize_pixels, round_up
from machinery.config import TrainConfig, UserError


class VLA(nn.Module):
    """A vision-language-action model with random weights.

    tokenizer: from action_tokenizer.load_tokenizer; it settles the size of the vocabulary
    llm_context: where the language model is made; under ZeRO-3 it is sharded layer by layer at its birth
    """

    def __init__(self, cfg: TrainConfig, tokenizer, llm_context: AbstractContextManager | None = None):
        super().__init__()
        self.cfg = cfg
        self.action_tokenizer = ActionTokenizer(tokenizer.action_vocab_size)
        self.num_action_tokens = cfg.action_chunk * cfg.action_dim
        self.num_images = cfg.window_size * len(cfg.cameras)

        towers = {name: build_tower(cfg.image_size, **kwargs) for name, kwargs in cfg.vision_backbone.items()}
        names = [f"{name}_featurizer" for name in towers] if len(towers) > 1 else ["featurizer"]
        self.vision_backbone = nn.ModuleDict(dict(zip(names, towers.values(), strict=True)))
        patches = {tower.patch_embed.num_patches for tower in towers.values()}
        if len(patches) > 1:
            raise UserError(f"vision_backbone: the towers cut an image into {sorted(patches)} patches; they "
                            "must agree")
        self.num_patches = patches.pop()
        config = llm_config(cfg.llm_backbone, len(tokenizer))
        self.room = getattr(cfg, "max_length", 64) - self.num_action_tokens - 1  # for a prompt, beside </s>
        with llm_context or nullcontext():
            self.llm_backbone = nn.ModuleDict({"llm": build_llm(config)})
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

    def forward(self, images, input_ids, labels, proprio=None, known=0):
        """Teacher-forced training step.

        images (B, N, H, W, 3) uint8, N = window_size x cameras; input_ids, labels (B, L) int64, padded on the
        right; proprio (B, D) float32; known (B, 1): see ask_in_parallel. Returns the loss, and for each
        action token the predicted id and the true one (both (B, T), T = num_action_tokens), on the device.

        What stands where, for one image of 256 patches, a prompt of P tokens with its <s>, and T = 7:

            position    0    1 .. 256   257 .. 255+P    256+P   257+P  ..  262+P   263+P
            input      <s>   patches     the prompt       a1      a2   ..    a7    </s>     then padding
            label       -       -            -            a1      a2   ..    a7    </s>     -: none, -100

        A language model says at each position what stands at the next one. So the T + 1 predictions that the
        loss compares with the labels are made one position earlier, from the prompt's last token to a7.
        """
        inputs = self.embed(images, input_ids, proprio)  # (B, S, hidden), S = L + image patches (+ 1)
        first = (labels != -100).int().argmax(1, keepdim=True)  # (B, 1), a1's place in the text
        wanted = first + torch.arange(self.num_action_tokens + 1, device=labels.device)  # (B, T + 1)
        targets = labels.gather(1, wanted)  # a1 .. a7, </s>
        wanted = wanted + inputs.shape[1] - labels.shape[1]  # their places beside the patches
        if self.cfg.parallel_decoding:
            inputs = self.ask_in_parallel(inputs, wanted[:, :-1], known)
        # padding stands on the right, where causal attention never looks: no mask, so the fast kernels apply
        hidden = self.llm.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
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

    def ask_in_parallel(self, inputs, positions, known=0):
        """Put the learned queries where the action tokens stand, but for the first `known` of them, which it
        is told: inputs (B, S, hidden), positions (B, T), known a number or (B, 1)."""
        places = torch.arange(self.num_action_tokens, device=inputs.device)
        told = (places < known)[..., None]  # (T, 1) or (B, T, 1)
        queries = torch.where(told, take(inputs, positions), self.action_queries(places))
        return inputs.scatter(1, positions[..., None].expand_as(queries), queries)

    def pixel_values(self, images) -> list[torch.Tensor]:
        """images (B, N, H, W, 3 or 3 a tower) uint8 -> for each tower (B * N, 3, H, W), normalised."""
        pixels = images.flatten(0, 1).permute(0, 3, 1, 2).float() / 255
        pixels = itertools.cycle(pixels.split(3, dim=1))  # the towers share an image, or have one each
        return [normalize_pixels(next(pixels), tower) for tower in self.vision_backbone.values()]

    def patch_features(self, pixel_values: list[torch.Tensor]) -> torch.Tensor:
        """For each tower (B, 3, H, W) -> (B, patches, sum of the towers' widths)."""
        towers = zip(self.vision_backbone.values(), pixel_values, strict=True)
        return torch.cat([tower(pixels) for tower, pixels in towers], dim=-1)

    # ---- What is trained -----------------------------------------------------------------------------------

    def freeze(self, freeze_vision_backbone: bool, freeze_llm_backbone: bool,
               unfreeze_last_llm_layer: bool) -> str:
        """Choose the trainable parameters as OpenVLA's flags do -> its name for them (there: a stage)."""
        if freeze_llm_backbone and not unfreeze_last_llm_layer:
            raise UserError("freeze_llm_backbone without unfreeze_last_llm_layer leaves nothing that could "
                            "learn to act: set unfreeze_last_llm_layer: true")
        self.requires_grad_(True)
        self.vision_backbone.requires_grad_(not freeze_vision_backbone)
        self.projector.requires_grad_(not (freeze_vision_backbone and freeze_llm_backbone))
        if freeze_llm_backbone:  # except its two ends and last layer; OpenVLA leaves the final norm frozen
            self.llm_backbone.requires_grad_(False)
            for module in (self.llm.get_input_embeddings(), self.llm.base_model.layers[-1],
                           self.llm.get_output_embeddings()):
                module.requires_grad_(True)
        names = {(False, False): "vla-full-train", (True, False): "vla-train",
                 (False, True): "vla-sandwich-train", (True, True): "vla-last-layer-train"}
        return names[freeze_vision_backbone, freeze_llm_backbone]

    def count_parameters(self) -> tuple[int, int]:
        """(all, trained), also where ZeRO-3 has left only slices."""
        sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in self.parameters()]
        return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)

    def sequence_length(self, text: int) -> int:
        """How many tokens the language model sees with `text` tokens of a prompt, rounded up to 64."""
        tokens = text + self.num_images * self.num_patches + self.cfg.use_proprio + self.num_action_tokens
        return round_up(tokens)

    @property
    def blocks(self) -> list[nn.Module]:
        """All transformer blocks: of the towers, then of the language model."""
        towers = [block for tower in self.vision_backbone.values() for block in tower.blocks]
        return [*towers, *self.llm.base_model.layers]

    def compile_blocks(self, recompute: bool) -> None:
        """Let torch.compile fuse the operations inside each block. Blocks of a kind share one compilation,
        and what DeepSpeed does between modules stays outside. recompute: what recompute_activations does,
        without Python in between (with no room for activations, a block's inputs alone are kept)."""
        functorch.activation_memory_budget = 0.0 if recompute else 1.0
        first = [tower.patch_embed for tower in self.vision_backbone.values()]
        stems = [embedding.backbone for embedding in first if hasattr(embedding, "backbone")]  # small ResNets
        for block in [*stems, *self.blocks]:
            block.forward = torch.compile(block.forward)

    def recompute_activations(self) -> None:
        """Keep only the blocks' inputs for the backward pass, and compute the rest again."""
        for block in self.blocks:
            # nothing here is random (no dropout), so the generators' states need not be kept
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


# ---- Parts -------------------------------------------------------------------------------------------------


def take(sequence, positions):
    """sequence (B, S, hidden), positions (B, T) -> (B, T, hidden)."""
    return sequence.gather(1, positions[..., None].expand(-1, -1, sequence.shape[-1]))


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
    raise UserError(f"arch_specifier {arch_specifier!r}: choose linear, gelu-mlp or fused-gelu-mlp")
