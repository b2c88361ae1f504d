"""Load our export into OpenVLA-OFT's own class, and compare how both act and learn.

    python bench/oft_class.py --oft ../openvla-oft --oft_python ../openvla-oft-env/bin/python

Makes a small model with random weights, an L1 head, two cameras, and the state, and exports it
(--format oft). OFT's class, in its own environment (its fork of transformers 4.40.1; without this
project), acts on two images, then trains all parameters in float32 on fixed batches. The same here.
Prints the largest difference of the actions, and of the losses of 50 steps.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from openvla_class import make_model
from openvla_peer import INSTRUCTION, train_on

from act import load_vla
from action_tokenizer import IGNORE_INDEX, prompt_ids
from export_vla import export

STATE, SAMPLES = np.linspace(-0.5, 0.7, 8), 4
SMALL = {"embed_dim": 32, "depth": 3, "num_heads": 4}
KEYS = {"image_size": 56, "action_head": "l1", "action_chunk": 8, "use_proprio": True, "proprio_dim": 8,
        "cameras": ["primary", "wrist"], "image_resize_strategy": "oft", "image_aug": False}


def make_batches(policy, steps: int) -> dict[str, np.ndarray]:
    """Random training batches of one instruction: arrays (steps, SAMPLES, ...)."""
    draw, vla = np.random.default_rng(0), policy.vla
    prompt = prompt_ids(policy.tokenizer, INSTRUCTION, policy.cfg.prompt_style)
    shape = (steps, SAMPLES, policy.cfg.action_chunk, policy.cfg.action_dim)
    actions = draw.uniform(-1, 1, shape).astype(np.float32)
    tokens = policy.action_tokenizer.encode(actions).reshape(steps, SAMPLES, -1)
    stop = np.full((steps, SAMPLES, 1), policy.tokenizer.eos_token_id)
    before = np.broadcast_to(prompt, (steps, SAMPLES, len(prompt)))
    images = draw.integers(0, 256, (steps, SAMPLES, 2, 56, 56, 3), dtype=np.uint8)
    # OFT's order: all channels of a camera, first tower first
    cameras = [torch.cat(vla.pixel_values(torch.from_numpy(images[:, :, i : i + 1]).flatten(0, 1)), dim=1)
               for i in range(2)]
    pixels = torch.cat(cameras, dim=1).unflatten(0, (steps, SAMPLES)).numpy()
    return {"images": images, "pixels": pixels, "actions": actions,
            "input_ids": np.concatenate([before, tokens, stop], axis=-1),
            "labels": np.concatenate([np.full_like(before, IGNORE_INDEX), tokens, stop], axis=-1),
            "proprio": draw.uniform(-1, 1, (steps, SAMPLES, 8)).astype(np.float32)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--oft", type=Path, required=True, help="a checkout of OpenVLA-OFT")
    parser.add_argument("--oft_python", type=Path, required=True, help="its environment's interpreter")
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model("prism-dinosiglip-224px+7b", folder / "native", SMALL, **KEYS)
        export(str(folder / "native"), folder / "oft", "oft")
        policy = load_vla(folder / "oft")
        images = np.random.default_rng(1).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
        batches = make_batches(policy, args.steps)
        np.savez(folder / "inputs.npz", views=images, state=STATE, **batches)
        subprocess.run([args.oft_python, Path(__file__).with_name("openvla_peer.py"), args.oft, "answer_oft",
                        folder / "oft", folder / "inputs.npz", folder / "official.npz"], check=True)
        theirs = np.load(folder / "official.npz")
        actions = policy.predict_action(list(images), INSTRUCTION, proprio=STATE)
        vla = policy.vla.requires_grad_(True)
        names = ("images", "input_ids", "labels", "proprio", "actions")
        losses = train_on(lambda batch: vla(**{name: batch[name] for name in names})[0], vla.parameters(), batches)
    print(f"actions_max_difference {abs(actions - theirs['actions']).max():.2e} of {abs(actions).max():.2f}")
    print(f"losses_max_difference {abs(losses - theirs['losses']).max():.2e} "
          f"first {losses[0]:.4f} last {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
