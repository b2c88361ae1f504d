"""How 8-bit weights change a trained model's answers, compared with how bf16 changes them.

    python bench/int8_agreement.py --checkpoint runs/demo+n1+b32+x7             # five minutes on a CPU core

The model answers held-out frames in float32 and in bf16, with three sets of weights: unmodified;
the language model in 8 bits (machinery/int8.py; as for acting); and all linear layers except the
head in 8 bits (as `frozen_weights: int8` trains).

Each row compares one variant with another: the percentage of equal action tokens after the recorded
ones, of equal tokens after the model's own, and of actions with all own tokens equal; then the
accuracy. The last column is the largest lead, in float32, of the likeliest token over the second,
among the tokens (after the recorded ones) that differ. Compare it with the median lead, printed
below the table.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from act import load_vla
from eval_vla import BATCH, choose_frames, from_training_inputs, open_mixture
from machinery import int8
from machinery.config import find_input
from machinery.lora import linear_layers

SHRUNK = {"unmodified": None, "8 bits in the language model": "llm_backbone", "8 bits everywhere": ""}


def answers(args, dtype: torch.dtype, shrunk: str | None) -> list[np.ndarray]:
    """-> [tokens after the recorded ones, after its own, true ones, leads of the first]: each
    (frames, T)."""
    policy, leads = load_vla(args.checkpoint, args.device, dtype), []
    for name, layer in linear_layers(policy.vla).items():
        if shrunk is not None and name.startswith(shrunk):
            int8.shrink(layer)

    # (B, T + 1, vocabulary); the last is for the stop token
    def note_lead(head, inputs, logits) -> None:
        first, second = logits[:, :-1].float().topk(2).values.unbind(-1)
        leads.append((first - second).cpu().numpy())

    policy.vla.llm.get_output_embeddings().register_forward_hook(note_lead)
    cfg = policy.cfg.model_copy(update={"data_root_dir": find_input(policy.cfg.data_root_dir)})
    mixture = open_mixture(policy, cfg, train=False)
    frames = [tuple(frame) for frame in choose_frames(mixture, 0, args.samples).tolist()]
    parts = [from_training_inputs(policy, mixture, frames[i : i + BATCH]) for i in range(0, len(frames), BATCH)]
    return [np.concatenate(part) for part in (*zip(*parts, strict=True), leads)]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", required=True,
                        help="a run's directory, or one of its checkpoints")
    parser.add_argument("--samples", type=int, default=1024,
                        help="number of frames; all, if there are fewer")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    results, dtypes = {}, {"float32": torch.float32, "bf16": torch.bfloat16}
    print("| arithmetic | weights | compared with | tokens, % | own tokens, % | actions, % | accuracy, % "
          "| largest lead |")
    print("|---|---|---|---:|---:|---:|---:|---:|")
    for dtype in dtypes:
        for weights, shrunk in SHRUNK.items():
            forced, greedy, true, _ = results[dtype, weights] = answers(args, dtypes[dtype], shrunk)
            like = (dtype if shrunk is not None else "float32", "unmodified")
            leads = results["float32", "unmodified"][3]
            equal, own = forced == results[like][0], greedy == results[like][1]
            figures = (equal.mean(), own.mean(), own.all(1).mean(), (forced == true).mean())
            print(f"| {dtype} | {weights} | {', '.join(like)} | "
                  + " | ".join(f"{100 * figure:.2f}" for figure in figures)
                  + f" | {leads[~equal].max(initial=0):.3f} |", flush=True)
    print(f"frames {len(leads)} median_lead {np.median(leads):.2f}")


if __name__ == "__main__":
    main()
