"""The model against the official one (tests/fixtures/model), and what it promises by itself."""

import contextlib
import gc
import json
import os
import subprocess
import sys
import weakref
import zlib

import numpy as np
import pytest
import torch
from conftest import GOLDEN_MODEL, ROOT, TINY

from act import Policy
from action_tokenizer import load_tokenizer
from machinery.config import TrainConfig
from machinery.zero import parameter_groups
from model import VLA

TINY_FUSED = json.loads((GOLDEN_MODEL / "tiny_fused.json").read_text())
ARRAYS = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN_MODEL / "tiny_fused.npz").items()}
STAGES = json.loads((GOLDEN_MODEL / "stages_trainable.json").read_text())
NORMS = ("norm.weight", "norm1.weight", "norm2.weight", "layernorm.weight")


class Tokenizer448:
    """The vocabulary of the official tiny model: 448 ids and a padding token, no text."""

    action_vocab_size, pad_token_id = 448, 448

    def __len__(self):
        return 449


def official_model(towers=("dino", "siglip")) -> VLA:
    """The architecture of the fixtures, with their recipe's weights."""
    shape = ("depth", "embed_dim", "num_heads")
    vision = {name: {"model": facts["timm_id"], **{key: facts[key] for key in shape}}
              for name, facts in TINY_FUSED["vision"].items() if name in towers}
    llm = {key: TINY_FUSED["llm"][key] for key in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "rms_norm_eps", "max_position_embeddings")}
    config = TrainConfig(vision_backbone=vision, llm_backbone={"model_type": "llama", **llm}, image_size=56,
                         arch_specifier="no-align+fused-gelu-mlp" if len(towers) > 1 else "no-align+gelu-mlp",
                         action_dim=7)
    vla = VLA(config, Tokenizer448()).eval()
    vla.load_state_dict({name: recipe(name, tuple(value.shape)) for name, value in vla.state_dict().items()})
    return vla


def recipe(name: str, shape: tuple) -> torch.Tensor:
    value = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape) * 0.05
    if (len(shape) == 1 and name.endswith(NORMS)) or name.endswith(".gamma"):
        value += 1
    return torch.from_numpy(value.astype(np.float32))


@pytest.fixture(scope="module")
def official() -> VLA:
    vla = official_model()
    pixels = [ARRAYS["pixel_values_native_dino"], ARRAYS["pixel_values_native_siglip"]]
    vla.pixel_values = lambda images: pixels  # the fixtures' pixels are no images but random numbers
    return vla


IMAGES = torch.zeros(3, 1, 56, 56, 3, dtype=torch.uint8)  # only its shape matters then


def test_parameter_names_and_weights_equal_openvla(official):
    state = official.state_dict()
    assert state.keys() == TINY_FUSED["param_checksums"].keys()
    for name, facts in TINY_FUSED["param_checksums"].items():
        assert list(state[name].shape) == facts["shape"]
        assert float(state[name].double().sum()) == pytest.approx(facts["sum"], abs=1e-4)


@torch.no_grad()
def test_features_and_logits_equal_openvla(official):
    features = official.patch_features(official.pixel_values(None))
    torch.testing.assert_close(features, ARRAYS["patch_features_concat"], atol=5e-6, rtol=0)
    inputs = official.embed(IMAGES, ARRAYS["input_ids"])
    torch.testing.assert_close(inputs[:, 1:17], ARRAYS["projected_patch_embeddings"], atol=5e-6, rtol=0)
    hidden = official.llm.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
    logits = official.llm.lm_head(hidden)
    real = ARRAYS["multimodal_attention_mask"].bool()
    torch.testing.assert_close(logits[real], ARRAYS["logits"][real], atol=5e-6, rtol=0)


def test_loss_and_gradients_equal_openvla(official):
    official.zero_grad()
    loss, predicted, true = official(IMAGES, ARRAYS["input_ids"], ARRAYS["labels"])
    assert loss.item() == pytest.approx(TINY_FUSED["loss"], abs=1e-5)
    expected = ARRAYS["labels"][ARRAYS["labels"] >= 192].view(3, 7)
    assert torch.equal(true, expected) and predicted.shape == true.shape
    assert (predicted == true).float().mean() == TINY_FUSED["train_metrics"]["action_accuracy"]
    loss.backward()
    norms = {name: float(p.grad.norm()) for name, p in official.named_parameters() if p.grad is not None}
    golden = TINY_FUSED["grad_norms_vla_full_train"]
    golden = {name: norm for name, norm in golden.items() if norm is not None}
    assert norms.keys() == golden.keys()
    for name, norm in golden.items():
        assert norms[name] == pytest.approx(norm, rel=1e-3, abs=1e-6), name


@torch.no_grad()
def test_generated_actions_equal_openvla(official):
    """Cases whose official greedy tokens are all action ids: one by one, and all in one batch of unequal
    prompts."""
    vla = official_model()
    policy = Policy(vla, Tokenizer448(), {})
    vla.llm.lm_head.weight[448 - 256 : 448] *= 4
    cases = TINY_FUSED["generation"]["action_biased_cases"]
    empty = TINY_FUSED["generation"]["empty_token_id"]
    prompts, pixels = [], []
    for case in cases:
        draw = np.random.RandomState(case["seed"])
        body = draw.randint(3, 192, size=int(draw.randint(5, 30)))
        assert [1, *body] == case["input_ids_given"]
        prompts.append([*case["input_ids_given"], empty])
        pixels.append(torch.from_numpy(draw.standard_normal((1, 6, 56, 56)).astype(np.float32)))
    usable = [i for i, case in enumerate(cases) if min(case["generated_token_ids"]) >= 192]
    assert len(usable) >= 5
    for i in usable:
        vla.pixel_values = lambda _, i=i: [pixels[i][:, :3], pixels[i][:, 3:]]
        assert policy.generate(IMAGES[:1], [prompts[i]]).tolist() == [cases[i]["generated_token_ids"]]
    together = torch.cat([pixels[i] for i in usable])
    vla.pixel_values = lambda _: [together[:, :3], together[:, 3:]]
    tokens = policy.generate(IMAGES[:1].expand(len(usable), -1, -1, -1, -1), [prompts[i] for i in usable])
    assert tokens.tolist() == [cases[i]["generated_token_ids"] for i in usable]
    actions = vla.action_tokenizer.decode(tokens.numpy())
    from action_tokenizer import unnormalize

    stats = TINY_FUSED["generation"]["norm_stats"]["tiny_ds"]["action"]
    expected = [cases[i]["action"] for i in usable]
    np.testing.assert_array_equal(unnormalize(actions, stats, "bounds_q99"), expected)


@torch.no_grad()
def test_every_step_of_the_cache_equals_a_full_forward(official):
    golden = TINY_FUSED["generation"]
    sequence = torch.tensor([golden["full_sequence"]])
    i = golden["sample_index"]
    vla = official_model()
    vla.pixel_values = lambda _: [ARRAYS["pixel_values_native_dino"][i : i + 1],
                                  ARRAYS["pixel_values_native_siglip"][i : i + 1]]
    inputs = vla.embed(IMAGES[:1], sequence)
    hidden = vla.llm.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
    logits = vla.llm.lm_head(hidden)[0, -8:-1]
    torch.testing.assert_close(logits, ARRAYS["gen_step_logits"], atol=1e-5, rtol=0)
    assert logits.argmax(-1).tolist() == golden["generated_token_ids"]


@pytest.mark.parametrize("variant, towers", [("fused", ("dino", "siglip")), ("siglip", ("siglip",))])
@pytest.mark.parametrize("flags", [(False, False, False), (True, False, False), (False, True, True),
                                   (True, True, True)])
def test_trainable_parameters_of_each_stage_equal_openvla(variant, towers, flags):
    vla = official_model(towers)
    stage = vla.freeze(*flags)
    golden = STAGES[variant][stage]
    assert {name for name, p in vla.named_parameters() if p.requires_grad} == set(golden["trainable"])
    loss, _, _ = vla(IMAGES, ARRAYS["input_ids"], ARRAYS["labels"])
    loss.backward()
    without = {name for name, p in vla.named_parameters() if p.requires_grad and p.grad is None}
    assert without == set(golden["trainable_but_grad_is_None"])


def test_freezing_everything_is_refused():
    with pytest.raises(ValueError, match="set unfreeze_last_llm_layer: true"):
        official_model().freeze(True, True, False)


# ------------------------------------------------------------------------------------------------------------
# The tiny model on real images


def tiny_policy(**changes) -> Policy:
    torch.manual_seed(0)
    keys = TrainConfig.model_fields
    values = {**{key: value for key, value in TINY.items() if key in keys}, "action_dim": 4, "proprio_dim": 4}
    tokenizer = load_tokenizer(str(ROOT / "configs/demo_tokenizer"), add_action_tokens=True)
    vla = VLA(TrainConfig(**{**values, **changes}), tokenizer).eval()
    stats = {"q01": [-1.0] * 4, "q99": [1.0] * 4, "min": [-2.0] * 4, "max": [2.0] * 4}
    action = {**stats, "mask": [True] * 3 + [False]}
    return Policy(vla, tokenizer, {"a": {"action": action, "proprio": stats}})


def tiny_model(**changes) -> VLA:
    return tiny_policy(**changes).vla


def test_the_image_is_looked_at():
    """OpenVLA's own class silently stopped doing so with transformers 4.50 (openvla#346)."""
    vla = tiny_model()
    noise = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    ids = torch.tensor([[1, 5, 6, 7, 8, *range(600, 604), 2]])
    labels = torch.where(torch.arange(10) < 5, -100, ids)
    losses = []
    for image in (np.zeros_like(noise), np.full_like(noise, 255), noise):
        losses.append(vla(torch.from_numpy(image)[None, None], ids, labels)[0].item())
    assert len(set(losses)) == 3


def test_padding_changes_nothing():
    vla = tiny_model()
    images = torch.randint(0, 256, (1, 1, 28, 28, 3), dtype=torch.uint8)
    ids = torch.tensor([[1, 5, 6, 7, 8, *range(600, 604), 2]])
    labels = torch.where(torch.arange(10) < 5, -100, ids)
    pad = torch.nn.functional.pad
    padded = pad(ids, (0, 6), value=768), pad(labels, (0, 6), value=-100)
    assert vla(images, *padded)[0].item() == pytest.approx(vla(images, ids, labels)[0].item(), abs=1e-6)


@pytest.mark.parametrize("changes", [{}, {"use_proprio": True}, {"action_chunk": 3}, {"image_aug": True},
                                     {"action_chunk": 3, "parallel_decoding": True}, {"window_size": 2},
                                     {"cameras": ["primary", "wrist"], "arch_specifier": "linear"}])
def test_predict_action(changes):
    policy = tiny_policy(**changes)
    views = policy.cfg.window_size * len(policy.cfg.cameras)
    rng = np.random.default_rng(1)
    images = [[rng.integers(0, 256, (40, 30, 3), dtype=np.uint8) for _ in range(views)] for _ in range(3)]
    proprio = rng.standard_normal((3, 4)).astype(np.float32) if policy.cfg.use_proprio else None
    texts = ["reach a goal position", "push", "Push a button on the coffee machine"]
    batch = policy.predict_action(images, texts, proprio=proprio)
    assert batch.shape == ((3, 3, 4) if policy.cfg.action_chunk == 3 else (3, 4)) and np.abs(batch).max() <= 1
    for i in range(3):
        state = None if proprio is None else proprio[i]
        one = policy.predict_action(images[i], texts[i], unnorm_key="a", proprio=state)
        np.testing.assert_array_equal(one, batch[i])


def test_a_recorded_action_keeps_the_cache_it_writes_into(monkeypatch):
    """A CUDA graph remembers addresses only; here it is one that records nothing."""
    class Graph:
        def pool(self):
            return 0, 0

        def replay(self):
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: contextlib.nullcontext())
    policy = tiny_policy(vision_backbone={"dino": TINY["vision_backbone"]["dino"]}, arch_specifier="linear")
    make_cache, policy.graphs, written = policy.make_cache, {}, []

    def watched(images, text):
        cache = make_cache(images, text)
        written.extend(weakref.ref(tensor) for layer in cache.layers for tensor in (layer.keys, layer.values))
        return cache

    policy.make_cache = watched
    policy.fused = {}  # nothing is compiled
    for length in (32, 64):
        policy.record(1, length, 0)
    for prompt in ([1, 5, 6], [1, 5, 6] * 20, [1, 5, 6]):  # two lengths, the first one twice
        policy.generate(torch.zeros(1, 1, 28, 28, 3, dtype=torch.uint8), [prompt])
    gc.collect()
    assert len(policy.graphs) == 2 and len(written) == 2 * 2 * policy.vla.llm.config.num_hidden_layers
    assert all(tensor() is not None for tensor in written)


def test_actions_need_statistics():
    policy, image = tiny_policy(), np.zeros((28, 28, 3), np.uint8)
    policy.norm_stats["b"] = policy.norm_stats["a"]
    with pytest.raises(ValueError, match=r"None is not one of the model's datasets: \['a', 'b'\]"):
        policy.predict_action(image, "push")
    with pytest.raises(ValueError, match="'c' is not one of"):
        policy.predict_action(image, "push", unnorm_key="c")
    policy.norm_stats = {}
    with pytest.raises(ValueError, match="not one of the model's datasets"):
        policy.predict_action(image, "push")


def test_no_action_from_what_was_never_seen_in_training():
    image = np.zeros((28, 28, 3), np.uint8)
    with pytest.raises(ValueError, match=r"1 images: the model needs 2"):
        tiny_policy(window_size=2).predict_action(image, "push")
    with pytest.raises(ValueError, match=r"2 instructions came with images for 1"):
        tiny_policy().predict_action([image], ["push", "pull"])
    for wrong in (image / 255, image[..., :1], image.transpose(2, 0, 1)):
        with pytest.raises(ValueError, match=r"expected \(height, width, 3\) uint8"):
            tiny_policy().predict_action(wrong, "push")
    for state in (np.full(4, np.nan), np.zeros(1)):
        with pytest.raises(ValueError, match=r"proprio.*finite.*\(1, 4\)"):
            tiny_policy(use_proprio=True).predict_action(image, "push", proprio=state)


def test_dropout_is_off_whatever_the_language_models_config_says():
    vla = tiny_model(llm_backbone={**TINY["llm_backbone"], "attention_dropout": 0.5}).train()
    images = torch.randint(0, 256, (1, 1, 28, 28, 3), dtype=torch.uint8)
    ids = torch.tensor([[1, 5, 6, 7, 8, *range(600, 604), 2]])
    labels = torch.where(torch.arange(10) < 5, -100, ids)
    assert vla(images, ids, labels)[0] == vla(images, ids, labels)[0]


def test_recomputation_changes_no_gradient():
    images = torch.randint(0, 256, (2, 1, 28, 28, 3), dtype=torch.uint8)
    ids = torch.tensor([[1, 5, 6, 7, 8, *range(600, 604), 2]] * 2)
    labels = torch.where(torch.arange(10) < 5, -100, ids)
    gradients = []
    for recompute in (False, True):
        vla = tiny_model().train()
        if recompute:
            vla.recompute_activations()
        vla(images, ids, labels)[0].backward()
        gradients.append([p.grad for p in vla.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_decay_spares_biases_and_norms():
    vla = tiny_model()
    decayed, spared = parameter_groups(vla, 0.1)
    assert decayed["weight_decay"] == 0.1 and spared["weight_decay"] == 0.0
    names = {id(p): name for name, p in vla.named_parameters()}
    assert all(p.ndim > 1 and not names[id(p)].endswith("bias") for p in decayed["params"])
    assert all(p.ndim <= 1 or names[id(p)].endswith("bias") for p in spared["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_unknown_projector_is_explained():
    with pytest.raises(ValueError, match=r"arch_specifier 'mlp'.*fused-gelu-mlp"):
        tiny_model(arch_specifier="mlp")


def test_a_matrix_times_one_vector_in_triton():
    """Its kernel under Triton's interpreter, which runs where there is no GPU but has to be there from the
    start of a process: widths below, at, above and beside the block's."""
    pytest.importorskip("triton")
    code = """
import copy
import torch
from machinery.int8 import shrink
from machinery.matvec import linear, speed_up
torch.manual_seed(0)
for width, rows, bias, vectors in [(64, 30, True, 1), (4096, 5, False, 1), (11008, 3, True, 1),
                                   (777, 4, False, 1), (64, 30, True, 2)]:
    for dtype, error in [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)]:
        layer = torch.nn.Linear(width, rows, bias=bias).to(dtype).requires_grad_(False)
        x = torch.randn(1, vectors, width).to(dtype)
        exact = copy.deepcopy(layer).double()(x.double())
        y = linear(layer, x)
        assert y.shape == exact.shape and y.dtype == dtype
        assert (y - exact).norm() < error * exact.norm(), (width, rows, dtype)
        shrink(layer)
        y, exact = linear(layer, x), layer(x)
        assert (y - exact).norm() < 1.5 * error * exact.norm(), (width, rows, dtype)

class Attention(torch.nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (torch.nn.Linear(48, n, bias=bias) for n in (32, 16, 16))

    def forward(self, x, y):  # in another order, and one of them of another input
        first = self.q_proj(x), self.v_proj(x), self.k_proj(x)
        return torch.cat([*first, self.q_proj(x), self.k_proj(y), self.v_proj(x)], dim=-1)

for bias in (False, True):
    for eight in (False, True):
        plain = Attention(bias).requires_grad_(False)
        if eight:
            [shrink(layer) for layer in plain.children()]
        fast = copy.deepcopy(plain)
        speed_up(fast)
        for vectors in (1, 3):
            x, y = torch.randn(2, 1, vectors, 48)
            assert torch.allclose(fast(x, y), plain(x, y), atol=1e-5), (bias, eight, vectors)
print("all good")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.stdout == "all good\n", done.stderr


def test_an_image_may_be_turned_by_slicing():
    """As those of MuJoCo are, whose pictures stand on their heads, or BGR."""
    policy, image = tiny_policy(image_aug=True), np.random.default_rng(0).integers(0, 256, (28, 28, 3))
    turned = image.astype(np.uint8)[::-1, ::-1, ::-1]
    actions = [policy.predict_action([image], ["open it"]) for image in (turned, turned.copy())]
    np.testing.assert_array_equal(*actions)


def test_what_speed_up_puts_in_place_acts_alike():
    """All but the GPU's part of it: nothing is compiled and no graph recorded."""
    pytest.importorskip("triton")
    image, texts = np.full((28, 28, 3), 90, np.uint8), ["open it", "close the drawer, slowly"]
    policy = tiny_policy(vision_backbone={"a": TINY["vision_backbone"]["dino"]}, arch_specifier="gelu-mlp")
    before = policy.predict_action([image] * 2, texts)
    with torch.compiler.set_stance("force_eager"):
        policy.speed_up(batches=[])
        np.testing.assert_array_equal(policy.predict_action([image] * 2, texts), before)
