"""The VLA: vision tower(s) + projector + language model.

    image -> timm ViT(s) -> patch features -> projector --+
    "<s>", "In: What action should the robot take ...?"   +--> Llama --> the next token is an action
    (embedded like any text)                            --+

Read VLA.forward first: that is the whole model. Parameters are named as in OpenVLA's native
checkpoints (`vision_backbone.dino_featurizer...`, `projector.projector.0...`,
`llm_backbone.llm.model.layers...`). The ViT blocks are timm's and the decoder layers
transformers' (machinery/backbones.py). How the model acts is in act.py.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from action_tokenizer import IGNORE_INDEX, ActionTokenizer
from machinery import backbones
from machinery.config import TrainConfig, UserError


class VLA(nn.Module):
    """A vision-language-action model with random weights.

    tokenizer: from action_tokenizer.load_tokenizer; it determines the size of the vocabulary
    llm_context: entered while the language model is made; ZeRO-3 shards it there, layer by layer
    """

    def __init__(self, cfg: TrainConfig, tokenizer,
                 llm_context: AbstractContextManager | None = None):
        super().__init__()
        self.cfg = cfg
        self.action_tokenizer = ActionTokenizer(tokenizer.action_vocab_size)
        self.num_action_tokens = cfg.action_chunk * cfg.action_dim
        self.num_images = cfg.window_size * len(cfg.cameras)

        towers = {}
        for name, arguments in cfg.vision_backbone.items():
            key = f"{name}_featurizer" if len(cfg.vision_backbone) > 1 else "featurizer"
            towers[key] = backbones.build_tower(cfg.image_size, **arguments)
        self.vision_backbone = nn.ModuleDict(towers)
        self.num_patches = next(iter(towers.values())).patch_embed.num_patches

        config = backbones.llm_config(cfg.llm_backbone, len(tokenizer))
        backbones.check_window(config, self.sequence_length(num_text=128))  # few prompts are longer
        with llm_context or nullcontext():
            self.llm_backbone = nn.ModuleDict({"llm": backbones.build_llm(config)})
        hidden = config.hidden_size
        features = sum(tower.embed_dim for tower in towers.values())
        projector = build_projector(cfg.arch_specifier, features, hidden)
        self.projector = nn.ModuleDict({"projector": projector})

        # Two options that OpenVLA does not have
        if cfg.use_proprio:  # the robot's state, as one more token after the image patches
            self.proprio_projector = nn.Sequential(nn.Linear(cfg.proprio_dim, hidden), nn.GELU(),
                                                   nn.Linear(hidden, hidden))
        if cfg.parallel_decoding:  # all action tokens in one pass: a learned query asks for each
            self.action_queries = nn.Embedding(self.num_action_tokens, hidden)
            nn.init.normal_(self.action_queries.weight, std=0.02)  # as Llama's own embeddings

    @property
    def llm(self) -> nn.Module:
        """The Hugging Face causal language model."""
        return self.llm_backbone["llm"]

    def forward(self, images, input_ids, labels, proprio=None, prefix_length=0):
        """Teacher-forced training step.

        images (B, N, H, W, 3) uint8, N = window_size x cameras; input_ids, labels (B, L) int64,
        padded on the right; proprio (B, D) float32; prefix_length (B, 1): see insert_queries.
        Returns the loss, and for each action token the predicted id and the true one, (B, T) each
        with T = num_action_tokens, on the device.

        The sequence, for one image of 256 patches, a prompt of P tokens with its <s>, and T = 7:

            position    0    1 .. 256   257 .. 255+P    256+P   257+P  ..  262+P   263+P
            input      <s>   patches     the prompt       a1      a2   ..    a7    </s>     padding
            label       -       -            -            a1      a2   ..    a7    </s>     -: -100

        A language model predicts at each position the token at the next one. So the T + 1
        predictions that the loss needs are made one position earlier: from the prompt's last
        token, which predicts a1, to a7, which predicts </s>.
        """
        inputs = self.embed(images, input_ids, proprio)  # (B, S, hidden), S = L + patches (+ 1)
        first = (labels != IGNORE_INDEX).int().argmax(1, keepdim=True)  # (B, 1), a1's in the text
        wanted = first + torch.arange(self.num_action_tokens + 1, device=labels.device)  # (B, T+1)
        targets = labels.gather(1, wanted)  # (B, T + 1): a1 .. a7, </s>
        wanted = wanted + inputs.shape[1] - labels.shape[1]  # their positions behind the patches
        if self.cfg.parallel_decoding:
            inputs = self.insert_queries(inputs, wanted[:, :-1], prefix_length)
        # base_model stops before the vocabulary: logits for T + 1 positions instead of for S.
        # Padding is on the right, where causal attention never looks: without a mask, the fast
        # attention kernels apply
        hidden = self.llm.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        hidden = at_positions(hidden, wanted - 1)  # (B, T + 1, hidden)
        logits = self.llm.get_output_embeddings()(hidden).float()  # (B, T + 1, vocabulary)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return loss, logits.argmax(-1)[:, :-1], targets[:, :-1]

    def embed(self, images, input_ids, proprio=None):
        """-> (B, S, hidden): <s>, the projected image patches (and the state), the other text."""
        text = self.llm.get_input_embeddings()(input_ids)  # (B, L, hidden)
        pixels = [pixels.to(text.dtype) for pixels in self.pixel_values(images)]
        features = self.patch_features(pixels)  # (B * N, patches, features)
        features = features.unflatten(0, images.shape[:2]).flatten(1, 2)  # (B, N * patches, ...)
        extra = self.projector["projector"](features)  # (B, N * patches, hidden)
        if proprio is not None:
            state = self.proprio_projector(proprio.to(text.dtype))  # (B, hidden)
            extra = torch.cat([extra, state[:, None]], dim=1)
        return torch.cat([text[:, :1], extra, text[:, 1:]], dim=1)

    def insert_queries(self, inputs, positions, prefix_length=0):
        """Replace the action tokens with learned queries. The first prefix_length tokens stay: they
        are actions that the robot is already executing while this chunk is predicted.

        inputs (B, S, hidden); positions (B, T), the action tokens'; prefix_length int or (B, 1)
        """
        index = torch.arange(self.num_action_tokens, device=inputs.device)
        given = (index < prefix_length)[..., None]  # (T, 1) or (B, T, 1)
        queries = self.action_queries(index)  # (T, hidden)
        new = torch.where(given, at_positions(inputs, positions), queries)  # (B, T, hidden)
        return inputs.scatter(1, positions[..., None].expand_as(new), new)

    def pixel_values(self, images) -> list[torch.Tensor]:
        """images (B, N, H, W, 3) uint8 -> for each tower (B * N, 3, H, W), normalized.

        When acting, each tower may have its own resized image: then the last dimension is 6.
        """
        pixels = images.flatten(0, 1).permute(0, 3, 1, 2).float() / 255
        towers = self.vision_backbone.values()
        if pixels.shape[1] == 3:
            return [backbones.normalize_pixels(pixels, tower) for tower in towers]
        pairs = zip(pixels.split(3, dim=1), towers, strict=True)
        return [backbones.normalize_pixels(own, tower) for own, tower in pairs]

    def patch_features(self, pixel_values: list[torch.Tensor]) -> torch.Tensor:
        """For each tower (B, 3, H, W) -> (B, patches, sum of the towers' widths)."""
        pairs = zip(self.vision_backbone.values(), pixel_values, strict=True)
        return torch.cat([tower(pixels) for tower, pixels in pairs], dim=-1)

    # ---- Which parameters are trained ------------------------------------------------------------

    def freeze(self, freeze_vision_backbone: bool, freeze_llm_backbone: bool,
               unfreeze_last_llm_layer: bool) -> str:
        """Choose the trainable parameters as OpenVLA's flags do. Returns OpenVLA's name for them
        (there called a stage). Raises UserError if nothing is left that could learn to act."""
        if freeze_llm_backbone and not unfreeze_last_llm_layer:
            raise UserError("freeze_llm_backbone: also set unfreeze_last_llm_layer: true")
        self.requires_grad_(True)
        self.vision_backbone.requires_grad_(not freeze_vision_backbone)
        self.projector.requires_grad_(not (freeze_vision_backbone and freeze_llm_backbone))
        if freeze_llm_backbone:
            self.llm_backbone.requires_grad_(False)  # the final norm stays frozen, as in OpenVLA
            self.llm.get_input_embeddings().requires_grad_(True)
            self.llm.base_model.layers[-1].requires_grad_(True)
            self.llm.get_output_embeddings().requires_grad_(True)
            return "vla-last-layer-train" if freeze_vision_backbone else "vla-sandwich-train"
        return "vla-train" if freeze_vision_backbone else "vla-full-train"

    def count_parameters(self) -> tuple[int, int]:
        """(all, trained), also when ZeRO-3 has left only slices of them (ds_numel)."""
        total = trained = 0
        for p in self.parameters():
            size = getattr(p, "ds_numel", p.numel())
            total += size
            trained += size * p.requires_grad
        return total, trained

    def sequence_length(self, num_text: int) -> int:
        """Tokens that the language model sees with a prompt of num_text, rounded up to 64."""
        tokens = num_text + self.num_images * self.num_patches + self.num_action_tokens
        return backbones.round_up(tokens + self.cfg.use_proprio)

    @property
    def blocks(self) -> list[nn.Module]:
        """All transformer blocks: of the towers, then of the language model."""
        towers = [block for tower in self.vision_backbone.values() for block in tower.blocks]
        return [*towers, *self.llm.base_model.layers]

    def compile_blocks(self, recompute: bool) -> None:
        """Let torch.compile fuse the operations inside each block.

        Blocks of a kind share one compilation, and DeepSpeed's work between modules stays outside.
        recompute: as recompute_activations, but inside the compiled graph.
        """
        import torch._functorch.config as functorch  # no public setting does this

        functorch.activation_memory_budget = 0.0 if recompute else 1.0  # 0: keep a block's inputs
        for tower in self.vision_backbone.values():
            if hasattr(tower.patch_embed, "backbone"):  # a hybrid ViT begins with a small ResNet
                stem = tower.patch_embed.backbone
                stem.forward = torch.compile(stem.forward)
        for block in self.blocks:
            block.forward = torch.compile(block.forward)

    def recompute_activations(self) -> None:
        """Keep only the blocks' inputs for the backward pass, and compute the rest again."""
        # nothing here is random (no dropout), so the generators' states need not be kept
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        for block in self.blocks:
            block.forward = partial(again, block.forward)


# ---- Parts ---------------------------------------------------------------------------------------


def at_positions(sequence, positions):
    """sequence (B, S, hidden), positions (B, T) -> (B, T, hidden)."""
    return sequence.gather(1, positions[..., None].expand(-1, -1, sequence.shape[-1]))


def build_projector(arch_specifier: str, features: int, hidden: int) -> nn.Module:
    """Image features -> the language model's width; the kinds of prismatic/util/nn_utils.py."""
    match arch_specifier.removeprefix("no-align+"):
        case "linear":
            return nn.Linear(features, hidden)
        case "gelu-mlp":
            return nn.Sequential(nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        case "fused-gelu-mlp":
            return nn.Sequential(nn.Linear(features, 4 * features), nn.GELU(),
                                 nn.Linear(4 * features, hidden), nn.GELU(),
                                 nn.Linear(hidden, hidden))
    raise UserError(f"arch_specifier {arch_specifier!r}: use linear, gelu-mlp or fused-gelu-mlp")
