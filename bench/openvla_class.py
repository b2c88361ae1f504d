"""Load our export into OpenVLA's own Hugging Face class and compare the two models' outputs.

    python bench/openvla_class.py --openvla ../openvla --openvla_python ../openvla-env/bin/python

Makes two models with random weights: OpenVLA-7B and OpenVLA-v01, but with a small Llama (DINOv2 +
SigLIP; and only SigLIP, with letterboxed images and Vicuna's prompt). Exports them. OpenVLA's
class, in its own environment (transformers 4.40.1, timm 0.9.10, tokenizers 0.19.1; here with torch
2.14 and NumPy 1.26; without this project), processes an image and a prompt. Prints the largest
difference in pixels and logits, and both actions.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from openvla_peer import INSTRUCTION, STATS
from PIL import Image

from act import load_vla
from action_tokenizer import PROMPTS, load_tokenizer, prompt_ids
from export_vla import description, export, save_tokenizer
from machinery.config import TrainConfig
from machinery.oft import new_vla
from machinery.weights import PRISMATIC, prismatic_config

ROOT = Path(__file__).resolve().parents[1]


def make_model(base: str, folder: Path, sizes: dict | None = None, **keys) -> None:
    """A native run directory: a Prismatic VLM with random weights, and a Llama of 10 M
    parameters. sizes: other ones of its towers; keys: of its YAML."""
    torch.manual_seed(0)
    config = prismatic_config(*PRISMATIC[base]) | keys
    for tower in config["vision_backbone"].values():
        tower.update(sizes or {})
    config["llm_backbone"] |= {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
                               "num_attention_heads": 4}
    config["tokenizer"] = str(ROOT / "tests/fixtures/model/tokenizer_llama")
    cfg = TrainConfig(**config, action_dim=7)
    tokenizer = load_tokenizer(cfg.tokenizer)
    vla, modules = new_vla(cfg, tokenizer), {}
    with torch.no_grad():  # make action tokens win: OpenVLA's class may choose any token
        vla.llm.lm_head.weight[: tokenizer.vocab_size - 256] *= 0.1
    for name, value in vla.state_dict().items():
        modules.setdefault(name.partition(".")[0], {})[name.partition(".")[2]] = value
    (folder / "checkpoints").mkdir(parents=True)
    save_tokenizer(cfg, folder)
    (folder / "config.json").write_text(json.dumps({"zerovla": description(cfg)}))
    (folder / "dataset_statistics.json").write_text(json.dumps(STATS))
    torch.save({"model": modules}, folder / "checkpoints/step-000000-epoch-00-loss=0.0000.pt")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--openvla", type=Path, required=True, help="a checkout of OpenVLA")
    parser.add_argument("--openvla_python", type=Path, required=True,
                        help="its environment's interpreter")
    args = parser.parse_args()
    image = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    for base in ("prism-dinosiglip-224px+7b", "siglip-224px+7b"):
        with tempfile.TemporaryDirectory() as folder:
            compare(base, image, Path(folder), args)


def compare(base: str, image: np.ndarray, folder: Path, args) -> None:
    """Ask an export the same question in OpenVLA's class and here, and print the differences."""
    make_model(base, folder / "native")
    export(str(folder / "native"), folder / "hf", "hf")
    policy = load_vla(folder / "hf")
    vla, style = policy.vla, policy.cfg.prompt_style
    prompt = PROMPTS[style].format(question=f"What action should the robot take to {INSTRUCTION}?")
    Image.fromarray(image).save(folder / "image.png")
    subprocess.run([args.openvla_python, ROOT / "bench/openvla_peer.py", args.openvla, "answer",
                    folder / "hf", folder / "image.png", folder / "official.npz", "--prompt", prompt],
                   check=True)
    theirs = np.load(folder / "official.npz")
    seen = torch.from_numpy(policy.prepare_image(image))[None, None]
    # OpenVLA's class appends the last id later
    ids = prompt_ids(policy.tokenizer, INSTRUCTION, style)[:-1]
    with torch.no_grad():
        hidden = vla.llm.base_model(inputs_embeds=vla.embed(seen, torch.tensor([ids]))).last_hidden_state
        logits = vla.llm.lm_head(hidden).numpy()
    pixels = torch.cat(vla.pixel_values(seen), dim=1).numpy()
    print(f"model {base}")
    print(f"prompt_ids {'equal' if theirs['ids'][0].tolist() == ids else 'differ'}")
    print(f"pixels_max_difference {abs(pixels - theirs['pixels']).max():.2e}")
    print(f"logits_max_difference {abs(logits - theirs['logits']).max():.2e} of {abs(logits).max():.2f}")
    print(f"action_openvla {theirs['action'].tolist()}")
    print(f"action_ours    {policy.predict_action(image, INSTRUCTION).tolist()}", flush=True)


if __name__ == "__main__":
    main()
