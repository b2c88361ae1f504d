"""The pretrained parts: timm's ViTs as vision towers, transformers' language models, tokenizers.

Training needs little of the language model: embeddings in, hidden states out. Acting also needs a
static cache of keys and values, in which shorter prompts are followed by padding (act.tokens_of).
tests/test_backbones.py tries both with every kind of language model below.
"""

import inspect
from pathlib import Path

import timm
import torch
from sentencepiece import SentencePieceProcessor
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    masking_utils,
)

from machinery import hub
from machinery.config import UserError, nearest, one_line
from machinery.files import read_json

# `model_type` of a transformers config. Linear, hybrid and latent attention (qwen3_next, jamba,
# deepseek_v3, ...) would train, but could not act: they have no such cache.
LANGUAGE_MODELS = """cohere2 gemma gemma3_text glm glm4 granite llama mistral mixtral olmo2 olmo3
    phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe smollm3""".split()


def round_up(n: int) -> int:
    """The smallest multiple of 64 that is not below n. Matrices with such sides multiply faster."""
    return -(-n // 64) * 64


# ---- The language model ------------------------------------------------------------------------


def llm_fields(model_type: str) -> set[str]:
    """The fields of a language model's transformers config that describe it."""
    config = type(AutoConfig.for_model(model_type))()
    own = vars(config).keys() - vars(PretrainedConfig()).keys()
    return {*own, *config.attribute_map, "model_type", "rope_theta", "rope_scaling",
            "partial_rotary_factor"}


def llm_config(spec: dict | str, num_tokens: int) -> PretrainedConfig:
    """The language model's transformers config, for a vocabulary of num_tokens, rounded up.

    spec: the config's fields, with model_type, or a directory or hub id to read them from. Dropout
    is set to 0: a step then depends on its batch only, and recomputed activations are the same.
    Raises UserError for a kind that was not tested and for misspelled fields.
    """
    fields = spec
    if isinstance(spec, str):
        fields = read_json(hub.fetch(spec, ["config.json"], ["config.json"]) / "config.json")
    kind = fields.get("model_type")
    if kind not in LANGUAGE_MODELS:
        raise UserError(f"llm_backbone: model_type {kind} has not been tested: choose one of "
                        f"{', '.join(LANGUAGE_MODELS)}")
    config = AutoConfig.for_model(**fields)
    if fields is spec:
        known = {*vars(type(config)()), *config.attribute_map}
        for key in spec.keys() - known:  # transformers ignores them: misspelled, or old
            if suggestion := nearest(key, known, 0.85):
                raise UserError(f"llm_backbone: unknown key {key!r}{suggestion}")
    config.vocab_size = round_up(num_tokens)
    config.pad_token_id = None  # the tokenizer's; here it would freeze a row of the embedding
    for key, value in vars(config).items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    return config


# transformers looks for several samples in a row, and waits for the GPU to find out. Ours have one
masking_utils.find_packed_sequence_indices = lambda position_ids: None


def build_llm(config: PretrainedConfig) -> nn.Module:
    """A causal language model with random weights, in float32."""
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")


def check_window(config: PretrainedConfig, length: int) -> None:
    """Raise UserError if the model's sliding window is shorter than a sequence of `length` tokens.

    It would train without a warning and then act differently: the masks of act.py have no window.
    """
    window = getattr(config, "sliding_window", None)
    if window and length > window:
        raise UserError(f"llm_backbone: the sliding_window of {window} is shorter than {length} "
                        "tokens: use smaller images, fewer cameras or another model")


# ---- Its tokenizer -----------------------------------------------------------------------------


def open_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory or hub id.

    Raises UserError if there is none, or if transformers would not begin a text as tokenizer.model
    does: Llama's puts a space before the first word, and some versions lose it without a warning.
    """
    try:
        folder = hub.fetch(path, ["*.json", "*.model", "*.txt", "*.jinja"],
                           ["tokenizer.json|tokenizer.model"])
        # the class that follows tokenizer.json to the letter; AutoTokenizer's rebuild parts of it
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        file = Path(tokenizer.init_kwargs.get("vocab_file") or "")
        if file.suffix != ".model" or file.with_name("tokenizer.json").exists():
            return tokenizer
        # with tokenizer.model only (Vicuna), only the class named beside it knows of that space
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        expected = SentencePieceProcessor(model_file=str(file)).encode("In", out_type=str)
    except Exception as error:  # transformers raises many kinds
        raise UserError(f"tokenizer: cannot load {path!r}: {one_line(error)}") from error
    found = tokenizer.tokenize("In")
    if found[0][0] != expected[0][0]:
        raise UserError(f"tokenizer: {path!r}: transformers begins a text with {found[0]!r}, "
                        f"{file.name} with {expected[0]!r}: correct tokenizer_class in "
                        "tokenizer_config.json (LlamaTokenizer?)")
    return tokenizer


# ---- Vision towers -----------------------------------------------------------------------------

# what a model from elsewhere may set: arguments of timm's classes, not where it loads weights from
TOWER_ARGUMENTS = {"model", *inspect.signature(timm.models.VisionTransformer).parameters,
                   *inspect.signature(timm.models.Eva).parameters}
SOURCES = {"pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path"}  # set by the user


def build_tower(image_size: int, *, model: str, pretrained: bool = False, **kwargs) -> nn.Module:
    """A timm ViT by name, with any of timm's arguments: pixels (B, 3, H, W) -> (B, patches, width).

    The output is that of the second-to-last block, without the final norm and without class and
    register tokens. Prismatic chose it (prismatic/.../base_vision.py); checkpoints contain the last
    block, too. Raises UserError for other architectures, and if patches do not cover the image.
    """
    known = timm.get_pretrained_cfg(model) if pretrained else None
    if known and known.hf_hub_id and not known.hf_hub_filename and not kwargs.keys() & SOURCES:
        folder = hub.fetch(known.hf_hub_id, ["model.safetensors"], ["model.safetensors"])
        kwargs["pretrained_cfg_overlay"] = {"file": str(folder / "model.safetensors")}
    vit = timm.create_model(model, pretrained, num_classes=0, img_size=image_size, **kwargs)
    plain = isinstance(vit, (timm.models.VisionTransformer, timm.models.Eva))
    if not plain or any("running_mean" in name for name, _ in vit.named_buffers()):
        raise UserError(f"vision_backbone: {model} is not a plain ViT without batch norm: choose "
                        "another, as vit_small_patch14_reg4_dinov2")
    for key in kwargs:
        if "drop" in key and kwargs[key]:  # a step depends on its batch only
            raise UserError(f"vision_backbone: {model}: remove {key}: towers have no dropout")
    # timm ignores pixels beyond the last full patch. Prismatic's towers of 384 pixels were trained
    # like that, with patches of 14
    patch = vit.patch_embed.patch_size[0]
    if image_size % patch and image_size != 384:
        raise UserError(f"vision_backbone: {model}: its patches of {patch} do not cover image_size "
                        f"{image_size}: choose a multiple")
    # as forward: ZeRO-3 gathers a module's parameters when the module is called
    # as a tensor: ZeRO-3's hooks do not see inside lists
    vit.forward = lambda pixels: vit.forward_intermediates(
        pixels, [len(vit.blocks) - 2], norm=False, stop_early=True, output_fmt="NLC",
        intermediates_only=True)[0]
    stats = timm.data.resolve_model_data_config(vit)
    vit.mean = stats["mean"]  # Python numbers: buffers would be cast to bf16
    vit.std = stats["std"]
    return vit


def normalize_pixels(pixels: torch.Tensor, tower: nn.Module) -> torch.Tensor:
    """(B, 3, H, W) float32 in [0, 1] -> with the mean and deviation of the tower's pretraining."""
    # one channel at a time: Python numbers become kernel arguments, where a tensor of three would
    # be copied from the host at every step, which a CUDA graph cannot record
    channels = zip(pixels.unbind(1), tower.mean, tower.std, strict=True)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)
