"""Language models, tokenizers and vision towers: what trains and acts, and what is refused."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from act import Policy, load_vla
from action_tokenizer import load_tokenizer, prompt_ids
from machinery.backbones import LANGUAGE_MODELS, build_tower, llm_config
from machinery.config import TrainConfig, UserError
from model import VLA

TOKENIZER = load_tokenizer(TINY["tokenizer"], True)
IMAGE = np.random.RandomState(0).randint(0, 255, (28, 28, 3)).astype(np.uint8)
ON_CPU = ("--deepspeed_config", "ds_configs/cpu.json")


# ------------------------------------------------------------------------------------------------------------
# Language models


SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2,
         "num_key_value_heads": 1}
MORE = {"mistral": {"sliding_window": 256}, "mixtral": {"num_local_experts": 4},
        "qwen2": {"sliding_window": 64, "use_sliding_window": False}, "qwen2_moe": {"num_experts": 4},
        "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2}}


def tiny_vla(**changes) -> VLA:
    torch.manual_seed(0)
    llm = {"model_type": "llama", **SHAPE, **changes.pop("llm", {})}
    values = {"vision_backbone": TINY["vision_backbone"], "arch_specifier": TINY["arch_specifier"],
              "tokenizer": TINY["tokenizer"], "image_size": 28, "action_dim": 7}
    return VLA(TrainConfig(**{**values, "llm_backbone": llm, **changes}), TOKENIZER).eval()


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_it_trains_from_embeddings_and_acts_from_a_static_cache(kind):
    """With the cache it acts as without, also when a shorter prompt is padded beside a longer one."""
    vla = tiny_vla(llm={"model_type": kind, "tie_word_embeddings": False, **MORE.get(kind, {})})
    policy = Policy(vla, TOKENIZER, {})
    images = torch.from_numpy(np.stack([IMAGE, 255 - IMAGE]))[:, None]
    prompts = [prompt_ids(TOKENIZER, text) for text in ("open", "put the red cup on the blue plate")]
    together = policy.generate(images, prompts)
    last = []
    with torch.inference_mode():
        for i, prompt in enumerate(prompts):
            ids = torch.tensor([prompt])
            tokens = []
            for _ in range(7):
                inputs = vla.embed(images[i : i + 1], torch.cat([ids, *tokens], dim=1))
                hidden = vla.llm.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
                tokens.append(policy.best_action(hidden[:, -1:]))
            assert torch.cat(tokens, dim=1)[0].tolist() == together[i].tolist()
            last.append(hidden[0, -1])
    assert not torch.allclose(*last)  # it depends on the image and the instruction
    inputs = torch.tensor([[*prompts[0], *together[0].tolist(), TOKENIZER.eos_token_id]])
    labels = torch.where(torch.arange(inputs.shape[1]) < len(prompts[0]), -100, inputs)
    vla(images[:1], inputs, labels)[0].backward()
    for part in (vla.projector, vla.llm.base_model.layers[0], vla.llm.get_input_embeddings()):
        assert all(param.grad.any() for param in part.parameters() if param.grad is not None)
    assert vla.projector["projector"][0].weight.grad.any()  # the gradient reaches the images' side


@pytest.mark.parametrize("spec", ["qwen3_next", "deepseek_v3", "lfm2", "gemma2", "gemma4_text", "gpt2"])
def test_other_kinds_are_refused(spec):
    with pytest.raises(UserError, match=rf"llm_backbone.*{spec}.*choose"):
        llm_config({"model_type": spec}, 500)


def test_misspelled_fields():
    with pytest.raises(UserError, match=r"llm_backbone.*num_hiden_layers.*'num_hidden_layers'"):
        llm_config({"model_type": "llama", "num_hiden_layers": 7}, 500)
    llm_config({"model_type": "llama", "pretraining_tp": 1, "rope_theta": 1e6}, 500)  # of older versions


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text", "phi3"])
def test_a_sliding_window_shorter_than_the_sequence(kind):
    """Training would be right, but a policy's masks have no window. 128 + 4 + 7 tokens, rounded up."""
    vla = tiny_vla(llm={"model_type": kind, "sliding_window": 192})
    for llm, changes in (({"sliding_window": 191}, {}),
                         ({"sliding_window": 192}, {"cameras": ["primary"] * 15})):  # 4 patches each
        with pytest.raises(UserError, match=r"llm_backbone.*sliding_window of 19.*fewer cameras"):
            tiny_vla(llm={"model_type": kind, **llm}, **changes)
    images, prompt = torch.from_numpy(IMAGE)[None, None], [1, *[5] * 127]
    assert Policy(vla, TOKENIZER, {}).generate(images, [prompt]).shape == (1, 7)
    with pytest.raises(UserError, match=r"llm_backbone.*sliding_window of 192"):
        Policy(vla, TOKENIZER, {}).generate(images, [prompt * 2])


@pytest.mark.parametrize("changes, message", [
    ({"llm_backbone": {"model_type": "qwen3_next", **SHAPE}}, "llm_backbone: model_type qwen3_next"),
    ({"llm_backbone": {"model_type": "mistral", "sliding_window": 32, **SHAPE}}, "sliding_window"),
    ({"vision_backbone": {"a": {"model": "mixer_s16_224"}}, "image_size": 224}, "mixer_s16_224"),
])
def test_training_refuses_them_in_one_line(changes, message, plain_run, tiny, tmp_path):
    done = plain_run(tiny(**changes), *ON_CPU)
    assert done.returncode == 1 and message in done.text and "Traceback" not in done.text, done.text


@pytest.mark.parametrize("kind", ["gemma", "llama", "qwen3"])
def test_a_tied_language_model_whose_file_has_its_head_too(kind, plain_run, tiny, tmp_path):
    values = AutoConfig.for_model(kind, **{**SHAPE, "head_dim": 16}, vocab_size=500, tie_word_embeddings=True)
    llm = AutoModelForCausalLM.from_config(values)
    llm.save_pretrained(tmp_path / "llm")
    file = tmp_path / "llm/model.safetensors"
    state = load_file(file)
    assert "lm_head.weight" not in state
    table = state["model.embed_tokens.weight"]
    save_file({**state, "lm_head.weight": table.clone()}, file, {"format": "pt"})
    towers = {name: {**tower, "pretrained": False} for name, tower in TINY["vision_backbone"].items()}
    changes = {"llm_backbone": str(tmp_path / "llm"), "pretrained_backbones": True, "vision_backbone": towers}
    done = plain_run(tiny(**changes, max_steps=1, save_interval=1, run_id=kind, learning_rate=0.0,
                          eval_samples=8), *ON_CPU)
    assert done.returncode == 0, done.text
    policy = load_vla(tmp_path / f"runs/{kind}")
    head, embedding = policy.vla.llm.get_output_embeddings(), policy.vla.llm.get_input_embeddings()
    assert head.weight is embedding.weight and torch.equal(head.weight[:500], table.to(head.weight.dtype))
    assert policy.predict_action(IMAGE, "open").shape == (4,)


# ------------------------------------------------------------------------------------------------------------
# Towers


TOWER = {"embed_dim": 32, "depth": 3, "num_heads": 2}


@pytest.mark.parametrize("model", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3",
                                   "eva02_tiny_patch14_224", "vit_tiny_r_s16_p8_224"])
def test_towers_have_a_vector_for_each_patch(model):
    vit = build_tower(224, model=model, **TOWER)
    features = vit(torch.zeros(2, 3, 224, 224))
    assert features.shape == (2, vit.patch_embed.num_patches, vit.embed_dim)
    assert len(vit.mean) == len(vit.std) == 3


@pytest.mark.parametrize("model, image_size", [
    ("naflexvit_base_patch16_siglip", 64), ("hiera_tiny_224", 224), ("mixer_s16_224", 224),
    ("samvit_base_patch16_224", 64), ("swin_tiny_patch4_window7_224", 224), ("vit_base_resnet26d_224", 224)])
def test_towers_that_are_not_plain(model, image_size):
    more = TOWER if image_size == 64 else {}
    with pytest.raises(UserError, match=rf"vision_backbone: {model} .*plain ViT"):
        build_tower(image_size, model=model, **more)


@given(st.sampled_from([("vit_tiny_patch16_224", 16), ("vit_small_patch14_reg4_dinov2", 14),
                        ("vit_small_patch16_dinov3", 16)]), st.integers(30, 130))
@settings(max_examples=25, deadline=None)
def test_a_tower_sees_all_of_an_image_or_is_refused(tower, image_size):
    """timm ignores pixels beyond the last full patch."""
    torch.manual_seed(0)
    model, patch = tower
    try:
        vit = build_tower(image_size, model=model, **TOWER)
    except UserError as error:
        assert image_size % patch and "multiple" in str(error)
        return
    black = torch.zeros(1, 3, image_size, image_size)
    for place in ((0, 0), (0, image_size - 1), (image_size - 1, 0), (image_size - 1, image_size - 1)):
        dot = black.clone()
        dot[0, :, *place] = 9.0
        assert not torch.equal(vit(dot), vit(black)), place


def test_prismatics_towers_of_384_pixels():
    assert build_tower(384, model="vit_so400m_patch14_siglip_384", **TOWER).patch_embed.num_patches == 27**2


def test_a_tower_is_not_random():
    with pytest.raises(UserError, match=r"vision_backbone.*remove drop_path_rate"):
        build_tower(28, model="vit_small_patch14_reg4_dinov2", drop_path_rate=0.1, **TOWER)


# ------------------------------------------------------------------------------------------------------------
# Tokenizers


def byte_level(folder: Path, tokenizer_class: str = "PreTrainedTokenizerFast", **settings):
    """Write a tokenizer of 300 pieces, as tokenizer.json; -> what the tokenizers library makes of it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(["open the drawer"] * 9, trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, show_progress=False,
        special_tokens=[value for key, value in settings.items() if key.endswith("_token")]))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": tokenizer_class, **settings}))
    return tokenizer


def sentencepiece_model() -> bytes:
    """A tokenizer.model as Llama's and Vicuna's: protobuf by hand, pieces and a trainer of type BPE."""
    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{i:02X}>", 6) for i in range(256)),
              ("\u2581", 1), ("\u2581o", 1)]

    def field(number: int, data: bytes) -> bytes:
        size = bytes([len(data)] if len(data) < 128 else [len(data) & 127 | 128, len(data) >> 7])
        return bytes([number << 3 | 2]) + size + data

    model = b"".join(field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", -i) + bytes([0x18, kind]))
                     for i, (text, kind) in enumerate(pieces))
    return model + field(2, b"\x18\x02\xe8\x02\x00\xf0\x02\x01\xf8\x02\x02\x98\x02\x01")


@pytest.mark.parametrize("settings", [{}, {"bos_token": "<s>"}, {"pad_token": "<pad>", "unk_token": "<unk>"}])
def test_a_tokenizer_without_an_end_is_refused_by_name(settings, tmp_path):
    byte_level(tmp_path, **settings)
    with pytest.raises(UserError, match=rf"tokenizer.*'{tmp_path}'.*eos_token.*tokenizer_config\.json"):
        load_tokenizer(str(tmp_path), True)


@pytest.mark.parametrize("settings", [{"eos_token": "</s>"},
                                      {"eos_token": "<|end|>", "bos_token": "<|begin|>"}])
def test_a_tokenizer_with_an_end_serves(settings, tmp_path):
    byte_level(tmp_path, **settings)
    tokenizer = load_tokenizer(str(tmp_path), True)
    assert tokenizer.decode([tokenizer.eos_token_id]) == settings["eos_token"]
    assert prompt_ids(tokenizer, "open")[0] == tokenizer.convert_tokens_to_ids([*settings.values()][-1])


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "Qwen2Tokenizer"])
def test_tokenizer_json_is_followed_whatever_class_is_named(name, tmp_path):
    """As deepseek's files are: transformers 5.17's LlamaTokenizer would lose their spaces."""
    text = "In: open the drawer\nOut:"
    expected = byte_level(tmp_path, name, bos_token="<s>", eos_token="</s>").encode(text).ids
    assert load_tokenizer(str(tmp_path))(text, add_special_tokens=False).input_ids == expected


def test_tokenizer_model_alone(plain_run, tiny, tmp_path):
    """lmsys/vicuna-7b-v1.5, which 28 of Prismatic's ids use, has nothing else."""
    (tmp_path / "vicuna").mkdir()
    (tmp_path / "vicuna/tokenizer.model").write_bytes(sentencepiece_model())
    (tmp_path / "vicuna/tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}))
    tokenizer = load_tokenizer(str(tmp_path / "vicuna"))
    assert tokenizer.action_vocab_size == 261 and tokenizer.eos_token_id == 2
    assert tokenizer("x", add_special_tokens=False).input_ids == [259, ord("x") + 3]
    done = plain_run(tiny(tokenizer=str(tmp_path / "vicuna"), max_steps=1, save_interval=0, eval_samples=8),
                     *ON_CPU)
    assert done.returncode == 0, done.text


def test_a_tokenizer_model_that_would_be_read_otherwise(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GemmaTokenizer"}))
    with pytest.raises(UserError, match=r"'<0x49>'.*tokenizer\.model.*'\u2581'.*tokenizer_class"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("content", ["", '{"model": {"type": "BPE"}}', None])
def test_a_tokenizer_that_cannot_be_loaded_is_named(content, tmp_path):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=rf"tokenizer.*'{tmp_path}'"):
        load_tokenizer(str(tmp_path))
