"""OpenVLA's own model class, timed on this machine with random weights: the baseline of our
figures.

    OPENVLA_ENV/bin/python bench/openvla_peer.py OPENVLA act                  # or a checkout of OpenVLA-OFT
    OPENVLA_ENV/bin/torchrun --nproc-per-node 2 bench/openvla_peer.py OPENVLA train --micro 32 --recompute
    OPENVLA_ENV/bin/torchrun --nproc-per-node 1 bench/openvla_peer.py OPENVLA finetune --micro 4
    OPENVLA_ENV/bin/python bench/openvla_peer.py OFT act_oft
    OPENVLA_ENV/bin/torchrun --nproc-per-node 1 bench/openvla_peer.py OFT finetune_oft --micro 8 --tokens 80
    OPENVLA_ENV/bin/python bench/openvla_peer.py OPENVLA answer EXPORT IMAGE OUT.npz

OPENVLA is a checkout of it. The environment has transformers 4.40.1, timm 0.9.10, and tokenizers
0.19.1, and for `finetune` peft 0.11.1. act_latency.py, train_throughput.py, small_cards.py, and
openvla_class.py run this file, which imports nothing from this project.

`answer` asks an exported model about an image and stores the class's inputs and outputs. A step of
`train` is the one of prismatic/training/strategies: FSDP around each ViT, ViT block, decoder layer,
and the projector, sharding gradients and optimizer (and, with --full_shard, weights), float32
master weights, bf16 arithmetic, AdamW, clipping, and its accuracy and L1. A step of `finetune` is
the one of vla-scripts/finetune.py: peft's adapters of rank 32 beside all linear layers of bf16
weights, DDP, autocast, AdamW, accuracy, and L1. It neither recomputes nor clips. Data loading is
not timed. `act_oft` and `finetune_oft` are the same for a checkout of OpenVLA-OFT with two cameras,
the state, and an L1 head.
"""

import argparse
import os
import sys
import time
import types
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

INSTRUCTION = "put the carrot on the plate"
PROMPT = f"In: What action should the robot take to {INSTRUCTION}?\nOut:"
STATS = {"made_up": {"action": {"q01": [-0.1] * 7, "q99": [0.2] * 7, "mask": [True] * 6 + [False]},
                     "proprio": {"q01": [-1.0] * 8, "q99": [1.0] * 8, "min": [-1.0] * 8}}}
TOKENIZER = Path(__file__).resolve().parents[1] / "tests/fixtures/model/tokenizer_llama/tokenizer.json"


def import_openvla(checkout: str):
    """Its three modules: configuration, model, and processor. OpenVLA-OFT's model needs two more
    folders."""
    for name in ("prismatic", "prismatic.extern", "prismatic.extern.hf", "prismatic.training",
                 "prismatic.vla", "prismatic.models"):  # skip their __init__ files
        module = types.ModuleType(name)
        module.__path__ = [f"{checkout}/{name.replace('.', '/')}"]
        sys.modules[name] = module
    from prismatic.extern.hf import (
        configuration_prismatic,
        modeling_prismatic,
        processing_prismatic,
    )

    return configuration_prismatic, modeling_prismatic, processing_prismatic


def make_model(configuration, modeling, layers: int, dtype: torch.dtype, device: str):
    """OpenVLAForActionPrediction in the 7B's shape."""
    text = {"vocab_size": 32064, "pad_token_id": 32000, "num_hidden_layers": layers}
    config = configuration.OpenVLAConfig(
        vision_backbone_id="dinosiglip-vit-so-224px", llm_backbone_id="llama2-7b-pure",
        arch_specifier="no-align+fused-gelu-mlp", image_resize_strategy="resize-naive", text_config=text,
        norm_stats=STATS)
    config._attn_implementation = "sdpa"
    torch.set_default_dtype(dtype)
    with torch.device(device):
        vla = modeling.OpenVLAForActionPrediction._from_config(config, attn_implementation="sdpa")
    torch.set_default_dtype(torch.float32)
    return vla.to(device, dtype)


def oft_parts(vla, device: str) -> tuple:
    """Tell OFT's model that there are two images -> its L1 head in bf16, and its projector of the state."""
    ddim = "diffusers.schedulers.scheduling_ddim"  # for its other head
    for name in ("diffusers", "diffusers.schedulers", ddim):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules[ddim].DDIMScheduler = None
    from prismatic.models.action_heads import L1RegressionActionHead
    from prismatic.models.projectors import ProprioProjector

    vla.vision_backbone.set_num_images_in_input(2)
    head = L1RegressionActionHead(vla.llm_dim, vla.llm_dim, 7).to(device, torch.bfloat16)
    return head, ProprioProjector(vla.llm_dim, 8).to(device)


def act(args) -> None:
    """Print the median seconds of an action, or of a chunk, from images in host memory to numbers."""
    from PIL import Image
    from transformers import PreTrainedTokenizerFast

    configuration, modeling, processing = import_openvla(args.checkout)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vla = make_model(configuration, modeling, args.layers, torch.bfloat16, device).eval()
    views, more = 1, {}
    if args.what == "act_oft":
        head, projector = oft_parts(vla, device)
        views, more = 2, {"action_head": head.eval(), "proprio_projector": projector.bfloat16().eval(),
                          "proprio": np.zeros(8)}
    processor = processing.PrismaticImageProcessor(
        use_fused_vision_backbone=True, image_resize_strategy="resize-naive", input_sizes=[(3, 224, 224)] * 2,
        interpolations=["bicubic"] * 2, means=[(0.485, 0.456, 0.406), (0.5, 0.5, 0.5)],
        stds=[(0.229, 0.224, 0.225), (0.5, 0.5, 0.5)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(TOKENIZER))
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    times = []
    for _ in range(args.repeats + 3):
        started = time.perf_counter()
        text = tokenizer(PROMPT, return_tensors="pt")
        pixels = torch.cat([processor(Image.fromarray(image), return_tensors="pt")["pixel_values"]
                            for _ in range(views)], dim=1)
        with torch.inference_mode():
            vla.predict_action(
                input_ids=text["input_ids"].to(device), attention_mask=text["attention_mask"].to(device),
                pixel_values=pixels.to(device, torch.bfloat16), unnorm_key="made_up", do_sample=False, **more)
        times.append(time.perf_counter() - started)
    print("seconds", float(np.median(times[3:])))


def join() -> str:
    """Connect the ranks started by torchrun -> the device of this rank."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    device, backend = ("cuda", "nccl") if torch.cuda.is_available() else ("cpu", "gloo")
    dist.init_process_group(backend, rank=int(os.environ.get("RANK", 0)),
                            world_size=int(os.environ.get("WORLD_SIZE", 1)))
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return device


def make_batch(args, device: str, views: int = 1, numbers: int = 7
               ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random pixels (B, 6 x views, 224, 224) float32; ids (B, tokens), which end in the numbers of an
    action, or a chunk, and stop; labels."""
    pixels = torch.randn(args.micro, 6 * views, 224, 224, device=device)
    ids = torch.randint(1000, 31000, (args.micro, args.tokens), device=device)
    ids[:, -numbers - 1 : -1] = torch.randint(31744, 32000, (args.micro, numbers), device=device)
    ids[:, -1] = 2
    labels = ids.clone()
    labels[:, : -numbers - 1] = -100
    return pixels, ids, labels


def action_metrics(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Accuracy and L1 as computed in its training; both wait for the device."""
    predicted, true = logits[:, 256:-1].argmax(dim=2), labels[:, 1:].to(logits.device)
    mask = true > 31743
    accuracy = ((predicted == true) & mask).sum().float() / mask.sum().float()
    predicted_bins, true_bins = (ids[mask].cpu().numpy().clip(31744, 31999) for ids in (predicted, true))
    return accuracy.item(), np.abs(predicted_bins - true_bins).mean() * 2 / 255


def report(loss: float, metrics: tuple[float, float], times: list[float], device: str) -> None:
    """Print the median seconds of a step after the first two, and the peak memory of rank 0's GPU."""
    memory = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0
    if dist.get_rank() == 0:
        print("loss {:.3f} accuracy {:.3f} l1 {:.3f} gpu_gb {:.1f}".format(loss, *metrics, memory))
        print("seconds", float(np.median(times[2:])))
    dist.destroy_process_group()


def train(args) -> None:
    """Time the training of all weights under FSDP."""
    from timm.models.vision_transformer import Block, VisionTransformer
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    device = join()
    configuration, modeling, _ = import_openvla(args.checkout)
    vla = make_model(configuration, modeling, args.layers, torch.float32, device)
    vla.language_model.config.use_cache = False  # as in prismatic/models/backbones/llm/base_llm.py
    sharding = ShardingStrategy.FULL_SHARD if args.full_shard else ShardingStrategy.SHARD_GRAD_OP
    vla = FullyShardedDataParallel(
        vla, sharding_strategy=sharding, use_orig_params=True, limit_all_gathers=True,
        auto_wrap_policy=ModuleWrapPolicy({VisionTransformer, Block, LlamaDecoderLayer,
                                           modeling.PrismaticProjector}),
        mixed_precision=MixedPrecision(*[torch.bfloat16] * 3),
        device_id=torch.cuda.current_device() if device == "cuda" else None)
    if args.recompute:
        checkpoint_wrapper.apply_activation_checkpointing(
            # not reentrant, its default
            vla, checkpoint_wrapper_fn=checkpoint_wrapper.checkpoint_wrapper,
            check_fn=lambda module: isinstance(module, LlamaDecoderLayer))
    optimizer = torch.optim.AdamW(vla.parameters(), lr=2e-5)
    pixels, ids, labels = make_batch(args, device)
    pixels, times = pixels.bfloat16(), []
    for _ in range(args.steps):
        started = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16):
            output = vla(input_ids=ids, attention_mask=torch.ones_like(ids).bool(), pixel_values=pixels,
                         labels=labels)
        output.loss.backward()
        metrics = action_metrics(output.logits, labels)
        vla.clip_grad_norm_(max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss = output.loss.item()  # its progress bar prints the loss at every step
        times.append(time.perf_counter() - started)
    report(loss, metrics, times, device)


def finetune(args) -> None:
    """Time the training of peft's adapters. Batches start in host memory, as from its loader."""
    device = join()
    configuration, modeling, _ = import_openvla(args.checkout)
    vla = make_model(configuration, modeling, args.layers, torch.bfloat16, device)
    vla = with_adapters(vla, device)
    optimizer = torch.optim.AdamW([p for p in vla.parameters() if p.requires_grad], lr=5e-4)
    (pixels, ids, labels), times = make_batch(args, "cpu"), []
    for _ in range(args.steps):
        started = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16):
            output = vla(input_ids=ids.to(device), attention_mask=torch.ones_like(ids).bool().to(device),
                         pixel_values=pixels.bfloat16().to(device), labels=labels)
        output.loss.backward()
        metrics = action_metrics(output.logits, labels)
        loss = output.loss.item()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - started)
    report(loss, metrics, times, device)


def with_adapters(vla, device: str):
    """The model with peft's adapters under DDP."""
    from peft import LoraConfig, get_peft_model

    vla = get_peft_model(vla, LoraConfig(r=32, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear",
                                         init_lora_weights="gaussian"))
    vla.print_trainable_parameters()
    return parallel(vla, device)


def parallel(module, device: str):
    """A module under DDP, as both finetune.py wrap it."""
    return torch.nn.parallel.DistributedDataParallel(
        module, device_ids=[torch.cuda.current_device()] if device == "cuda" else None,
        find_unused_parameters=True, gradient_as_bucket_view=True).train()


def finetune_oft(args) -> None:
    """As finetune, for OFT: two cameras, the state, chunks of 8 steps, and an L1 head."""
    device = join()
    configuration, modeling, _ = import_openvla(args.checkout)
    vla = make_model(configuration, modeling, args.layers, torch.bfloat16, device)
    head, projector = (parallel(part, device) for part in oft_parts(vla, device))
    patches = 2 * vla.vision_backbone.get_num_patches() + 1
    vla = with_adapters(vla, device)
    trained = [p for part in (vla, head, projector) for p in part.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-4)
    (pixels, ids, labels), times = make_batch(args, "cpu", views=2, numbers=56), []
    actions, state = torch.rand(args.micro, 8, 7), torch.rand(args.micro, 8)
    for _ in range(args.steps):
        started = time.perf_counter()
        truth = actions.to(device).bfloat16()
        with torch.autocast(device, dtype=torch.bfloat16):
            output = vla(input_ids=ids.to(device), attention_mask=torch.ones_like(ids).bool().to(device),
                         pixel_values=pixels.bfloat16().to(device), labels=labels.to(device),
                         output_hidden_states=True, proprio=state.to(device), proprio_projector=projector,
                         use_film=False)
        mask = (labels[:, 1:] > 31743).to(device)
        hidden = output.hidden_states[-1][:, patches:-1][mask].reshape(args.micro, 56, -1)
        predicted = head.module.predict_action(hidden.bfloat16())
        loss = torch.nn.functional.l1_loss(predicted, truth)
        loss.backward()
        value = loss.item()
        distances = [(predicted[:, steps] - truth[:, steps]).abs().mean().item()
                     for steps in (slice(0, 1), slice(1, None))]
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - started)
    report(value, (float("nan"), distances[0]), times, device)


def answer(args) -> None:
    """Show an exported model an image; write pixels, token ids, logits, and the action to a
    file."""
    from PIL import Image
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForVision2Seq, AutoProcessor

    configuration, modeling, processing = import_openvla(args.checkout)
    AutoConfig.register("openvla", configuration.OpenVLAConfig)
    AutoImageProcessor.register(configuration.OpenVLAConfig, processing.PrismaticImageProcessor)
    AutoProcessor.register(configuration.OpenVLAConfig, processing.PrismaticProcessor)
    AutoModelForVision2Seq.register(configuration.OpenVLAConfig, modeling.OpenVLAForActionPrediction)
    export, image, out = args.files
    processor = AutoProcessor.from_pretrained(export)
    vla = AutoModelForVision2Seq.from_pretrained(export, torch_dtype=torch.float32).eval()
    inputs = processor(args.prompt, Image.open(image))
    with torch.no_grad():
        logits = vla(**inputs).logits
        action = vla.predict_action(**inputs, unnorm_key="made_up", do_sample=False)
    np.savez(out, pixels=inputs["pixel_values"].numpy(), ids=inputs["input_ids"].numpy(),
             logits=logits.numpy(), action=action)


def train_on(loss_of, parameters, batches: dict) -> list[float]:
    """AdamW on one batch after another -> the losses."""
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-3), []
    for step in range(len(batches["actions"])):
        loss = loss_of({name: torch.from_numpy(array[step]) for name, array in batches.items()})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def answer_oft(args) -> None:
    """As answer, for an export of OFT's: act on images and a state, then train on batches from a
    file; write the actions and the losses."""
    import json

    import timm
    from PIL import Image
    from transformers import AutoTokenizer

    configuration, modeling, processing = import_openvla(args.checkout)
    export, inputs, out = args.files
    towers = json.loads(open(f"{export}/config.json").read())["zerovla"]["vision_backbone"]
    sizes = {tower.pop("model"): tower for tower in towers.values()}
    create = timm.create_model
    # its class knows towers of full size only
    timm.create_model = lambda model, **options: create(model, **options, **sizes[model])
    config = configuration.OpenVLAConfig.from_pretrained(export)
    vla = modeling.OpenVLAForActionPrediction.from_pretrained(export, config=config, torch_dtype=torch.float32)
    parts = dict(zip(("action_head", "proprio_projector"), oft_parts(vla, "cpu"), strict=True))
    for name, part in parts.items():
        (file,) = Path(export).glob(f"{name}--*")
        tensors = torch.load(file, weights_only=True)
        part.float().load_state_dict({key.removeprefix("module."): tensor for key, tensor in tensors.items()})
    arrays = dict(np.load(inputs))
    processor = processing.PrismaticImageProcessor.from_pretrained(export)
    views = [Image.fromarray(view) for view in arrays.pop("views")]
    pixels = torch.cat([processor(view, return_tensors="pt")["pixel_values"] for view in views], dim=1)
    text = AutoTokenizer.from_pretrained(export)(PROMPT, return_tensors="pt")
    low, high = (np.array(STATS["made_up"]["proprio"][key]) for key in ("q01", "q99"))
    state = np.clip(2 * (arrays.pop("state") - low) / (high - low + 1e-8) - 1, -1, 1)
    with torch.no_grad():
        actions, _ = vla.eval().predict_action(**text, pixel_values=pixels, unnorm_key="made_up", do_sample=False,
                                               proprio=state, **parts)

    def loss_of(batch: dict) -> torch.Tensor:
        """As finetune_oft, without autocast."""
        ids, labels = batch["input_ids"], batch["labels"]
        output = vla(input_ids=ids, attention_mask=torch.ones_like(ids).bool(), pixel_values=batch["pixels"],
                     labels=labels, output_hidden_states=True, proprio=batch["proprio"],
                     proprio_projector=parts["proprio_projector"], use_film=False)
        patches = 2 * vla.vision_backbone.get_num_patches() + 1
        hidden = output.hidden_states[-1][:, patches:-1][labels[:, 1:] > 31743].reshape(len(ids), 56, -1)
        predicted = parts["action_head"].predict_action(hidden)
        return torch.nn.functional.l1_loss(predicted, batch["actions"])

    trained = [p for part in (vla, *parts.values()) for p in part.requires_grad_(True).parameters()]
    np.savez(out, actions=actions, losses=train_on(loss_of, trained, arrays))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkout")
    parser.add_argument("what", choices=["act", "act_oft", "train", "finetune", "finetune_oft", "answer",
                                         "answer_oft"])
    parser.add_argument("files", nargs="*",
                        help="for answer: the export, an image, and the output file")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--layers", type=int, default=32,
                        help="decoder layers of the language model")
    parser.add_argument("--micro", type=int, default=32, help="samples per GPU")
    parser.add_argument("--tokens", type=int, default=32, help="text tokens, with action and stop")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=20, help="timed actions, after three others")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--full_shard", action="store_true")
    arguments = parser.parse_args()
    {"act": act, "act_oft": act, "train": train, "finetune": finetune, "finetune_oft": finetune_oft,
     "answer": answer, "answer_oft": answer_oft}[arguments.what](arguments)
