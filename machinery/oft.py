"""OpenVLA-OFT: all actions of a chunk in one pass, as numbers instead of tokens.

Kim et al., 2025. `action_head: l1` in the YAML. The sequence is that of VLA.forward with three
changes, for a chunk of T numbers:

    <s>  patches  state  the prompt  0 0 ... 0  </s>      T zeros stand for the actions, and every
                                  ^ ^ ... ^               position sees all others, also later ones

The hidden states one position before the zeros go to a head, which returns T numbers in [-1, 1].
The loss is their mean distance from the recorded ones. Read OftVLA.forward.

    film: true                       the instruction also changes the image features (`condition`)
    action_head: oft_tokens          the likeliest action token at each position, without a head
    action_head: oft_tokens_causal   the same with causal attention
"""

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import nn

from action_tokenizer import BOUNDS, IGNORE_INDEX, normalize
from action_tokenizer import unnormalize as unnormalize_tokens
from data import Mixture
from machinery.config import TrainConfig, UserError
from model import VLA, at_positions


def new_vla(cfg: TrainConfig, *arguments) -> VLA:
    """The model that a config describes. arguments: VLA's others."""
    return (VLA if cfg.action_head == "tokens" else OftVLA)(cfg, *arguments)


def new_mixture(cfg: TrainConfig, *arguments, **options) -> Mixture:
    """The samples that it learns from. arguments: Mixture's others."""
    return (Mixture if cfg.action_head == "tokens" else OftMixture)(cfg, *arguments, **options)


class OftVLA(VLA):
    """A VLA with OpenVLA-OFT's action head."""

    def __init__(self, cfg: TrainConfig, tokenizer, llm_context=None):
        # zeros take the place of learned queries
        plain = cfg.model_copy(update={"parallel_decoding": False})
        super().__init__(plain, tokenizer, llm_context)
        self.cfg = cfg
        self.stop_id, self.pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        hidden = self.llm.config.hidden_size
        if cfg.action_head == "l1":
            self.action_head = Head(cfg.action_dim, hidden)
        if cfg.film:
            self.film = nn.ModuleDict()
            for name, tower in self.vision_backbone.items():
                self.film[name] = nn.ModuleList()
                for block in tower.blocks:
                    if type(block) is not Block:
                        raise UserError(f"film: the tower {name} has no plain blocks: remove film")
                    block.__class__ = FilmedBlock
                    layers = {part: nn.Linear(hidden, tower.embed_dim) for part in SCALE_AND_SHIFT}
                    self.film[name].append(nn.ModuleDict(layers))

    def forward(self, images, input_ids, labels, proprio=None, actions=None):
        """As VLA.forward. actions (B, action_chunk, action_dim) float32: the normalized ones, which
        the head is to predict. The action tokens in input_ids only mark their places.

        The predicted ids that are returned are the bins of the predicted numbers.
        """
        first = (labels != IGNORE_INDEX).int().argmax(1, keepdim=True)  # (B, 1)
        wanted = first + torch.arange(self.num_action_tokens + 1, device=labels.device)  # (B, T+1)
        targets = labels.gather(1, wanted)
        longest = torch.arange(labels.shape[1], device=labels.device) <= wanted.max()  # of samples
        described = longest.expand_as(labels)  # cuda_graph.py pads the batch further
        hidden = self.read(images, input_ids, wanted, proprio, described)  # (B, T + 1, width)
        if self.cfg.action_head == "l1":
            values = self.action_head(hidden[:, :-1]).float()
            loss = (values - actions).abs().mean()
            predicted = self.ids_of(values.detach()).flatten(1)
        else:
            logits = self.llm.get_output_embeddings()(hidden).float()
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            predicted = logits.argmax(-1)[:, :-1]
        return loss, predicted, targets[:, :-1]

    def hidden_states(self, images, input_ids, lengths, proprio):
        """For acting: prompts (B, L) of `lengths` (B,), padded on the right -> (B, T, width)."""
        count = self.num_action_tokens
        wanted = lengths[:, None] + torch.arange(count + 1, device=lengths.device)  # (B, T + 1)
        ids = F.pad(input_ids, (0, count + 1))
        ids = ids.scatter(1, wanted[:, -1:], self.stop_id)
        real = torch.arange(ids.shape[1], device=ids.device) <= wanted[:, -1:]
        return self.read(images, ids, wanted, proprio, real)[:, :-1]

    def read(self, images, input_ids, wanted, proprio, described):
        """-> (B, T + 1, width): the hidden states one position before the tokens `wanted` (B, T+1),
        which are the actions and </s>. described (B, L): the tokens whose mean FiLM sees, but for
        the actions. In training, OFT counts padding among them."""
        if self.cfg.film:
            self.condition(input_ids, described.scatter(1, wanted[:, :-1], False))
        inputs = self.embed(images, input_ids, proprio)  # (B, S, width)
        size = inputs.shape[1]
        wanted = wanted + size - input_ids.shape[1]
        zeros = wanted[:, :-1, None].expand(-1, -1, inputs.shape[2])
        inputs = inputs.scatter(1, zeros, 0.0)
        mask = None  # causal
        if self.cfg.action_head != "oft_tokens_causal":  # all that is not padding
            mask = (torch.arange(size, device=inputs.device) <= wanted[:, -1:])[:, None, None]
        hidden = self.llm.base_model(inputs_embeds=inputs, attention_mask=mask, use_cache=False)
        return at_positions(hidden.last_hidden_state, wanted - 1)

    def condition(self, input_ids, words):
        """FiLM: let every block of the towers scale and shift its features according to
        the mean embedding of the tokens `words` (B, L)."""
        text = self.llm.get_input_embeddings()(input_ids)  # (B, L, width)
        text = torch.where((input_ids == self.pad_id)[..., None], text.detach(), text)
        share = words / words.sum(1, keepdim=True)
        language = torch.einsum("blw,bl->bw", text, share.to(text.dtype))
        for name, layers in self.film.items():
            for block, layer in zip(self.vision_backbone[name].blocks, layers, strict=True):
                both = [layer[part](language)[:, None] for part in SCALE_AND_SHIFT]
                block.film = [each.repeat_interleave(self.num_images, 0) for each in both]

    def forget(self):
        """FiLM: let the towers see without an instruction."""
        for tower in self.vision_backbone.values():
            for block in tower.blocks:
                block.film = (0.0, 0.0)

    def ids_of(self, values: torch.Tensor) -> torch.Tensor:
        """ActionTokenizer.encode on the device."""
        tokenizer = self.action_tokenizer
        edges = torch.linspace(-1, 1, tokenizer.n_bins, device=values.device)
        return tokenizer.vocab_size - torch.bucketize(values.clamp(-1, 1), edges, right=True)


SCALE_AND_SHIFT = ("scale", "shift")


class FilmedBlock(Block):
    """A ViT block that scales and shifts its features between attention and MLP. `film` holds
    both, (B, 1, width) each."""

    def forward(self, x, **options):
        """x (B, tokens, width) -> the same shape."""
        scale, shift = self.film
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), **options)))
        x = x * (1 + scale) + shift
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class Head(nn.Module):
    """Hidden states of a step's numbers -> the numbers. Names are those of OFT's files."""

    def __init__(self, action_dim: int, hidden: int):
        super().__init__()
        self.action_dim = action_dim
        blocks = [nn.ModuleDict({"ffn": nn.Sequential(nn.LayerNorm(hidden),
                                                      nn.Linear(hidden, hidden), nn.ReLU())})
                  for _ in range(2)]
        self.model = nn.ModuleDict({
            "layer_norm1": nn.LayerNorm(action_dim * hidden),
            "fc1": nn.Linear(action_dim * hidden, hidden),
            "mlp_resnet_blocks": nn.ModuleList(blocks),
            "layer_norm2": nn.LayerNorm(hidden),
            "fc2": nn.Linear(hidden, action_dim)})

    def forward(self, hidden):
        """(B, action_chunk x action_dim, width) -> (B, action_chunk, action_dim)."""
        x = hidden.unflatten(1, (-1, self.action_dim)).flatten(2)
        x = F.relu(self.model["fc1"](self.model["layer_norm1"](x)))
        for block in self.model["mlp_resnet_blocks"]:
            x = x + block["ffn"](x)
        return self.model["fc2"](self.model["layer_norm2"](x))


# ---- Samples -------------------------------------------------------------------------------------


class OftMixture(Mixture):
    """A mixture whose samples also have `actions` (action_chunk, action_dim) float32."""

    def sample(self, dataset: int, row: int, epoch: int = 0, augment_seed: int | None = None
               ) -> dict:
        """As Mixture.sample; the state is normalized as it will be when the policy acts."""
        sample = super().sample(dataset, row, epoch, augment_seed)
        sample["actions"] = self.actions(dataset, np.array([row]))[0]
        if self.cfg.use_proprio:
            state = self.tables[dataset].frames[row]["proprio"].astype(np.float64)
            stats = self.statistics[self.names[dataset]]["proprio"]
            state = normalize_state(state, stats, self.cfg.action_normalization)
            sample["proprio"][: len(state)] = state
        return sample


# ---- Normalization -------------------------------------------------------------------------------


def normalize_state(values: np.ndarray, stats: dict, kind: str) -> np.ndarray:
    """States (..., P) float64 -> float32, as OFT does when it acts. Other than `normalize`, it
    clips all dimensions, and constant ones are -1 where they have their value."""
    if kind == "normal":
        return normalize(values.astype(np.float32), stats, kind)
    low, high = (np.array(stats[key]) for key in BOUNDS[kind])
    scaled = 2 * (values - low) / (high - low + 1e-8) - 1
    mask = stats.get("mask", [True] * values.shape[-1])
    return np.where(mask, scaled, values).clip(-1, 1).astype(np.float32)


def unnormalize(actions: np.ndarray, stats: dict, kind: str) -> np.ndarray:
    """Undo `normalize` for actions (..., D) float64. OpenVLA forgets the 1e-8, OFT does not."""
    if kind == "normal":
        return unnormalize_tokens(actions, stats, kind)
    low, high = (np.array(stats[key]) for key in BOUNDS[kind])
    mask = stats.get("mask", [True] * actions.shape[-1])
    return np.where(mask, 0.5 * (actions + 1) * (high - low + 1e-8) + low, actions)
