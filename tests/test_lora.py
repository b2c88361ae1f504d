"""LoRA and 8-bit weights: alike however sharded; checkpoints beside a base; merged, exported, acting."""

import itertools
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import LLAMA_TOKENIZER, ROOT, ds_json, open_mixture
from test_weights import released_config
from test_zero import JSONS, MODEL, STEPS, agree, cell, read, tensors
from torch._inductor.utils import run_and_get_code

import export_vla
from act import load_vla
from action_tokenizer import load_tokenizer
from data import TrainBatches
from machinery import cost, int8, memory, ranks
from machinery.checkpoint import Checkpoint, CheckpointError, list_checkpoints
from machinery.config import TrainConfig, UserError, load_config
from machinery.lora import ADAPTER, add_adapters, linear_layers
from machinery.weights import (
    PRISMATIC,
    SHAPE,
    open_weights,
    parameters_without_memory,
    prismatic_config,
)
from model import VLA

LORA = {"lora_rank": 4, "lora_alpha": 8.0, "learning_rate": 5e-3}
KINDS = {"lora": LORA, "int8": {**LORA, "frozen_weights": "int8"}}
SWITCHES = {"full": (False, 1), "frozen_vision": (True, 2)}  # recomputation and accumulation


def base_cell(root):
    """What the others begin with; it has learned something."""
    return cell(root, "base", "cpu", bf16=False, max_steps=20, learning_rate=1e-2)


def cells(root, ranks, json_names):
    """JSONs with adapters on a base, float32 and in 8 bits; what is frozen, recomputed and accumulated varies
    along."""
    base, found = {"base_vlm": str(root / "base")}, {}
    for name in json_names:
        for kind, switches in KINDS.items():
            if kind == "int8" and "zero3" in name:
                continue
            for freezing, (recompute, accumulation) in SWITCHES.items():
                found |= cell(root, f"{kind}-{freezing}-{name}-x{ranks}", name, ranks, freezing, recompute,
                              accumulation, bf16=False, **base, **switches)
    return found


@pytest.fixture(scope="session")
def train(ranks):
    """Run cells on so many ranks."""

    def train(root, count, cells) -> None:
        path = root / f"cells{count}.json"
        path.write_text(json.dumps(cells))
        done = ranks(count, path, script="tests/run_cells.py")
        assert done.returncode == 0, done.text[-5000:]

    return train


def more_cells(root):
    """A run in bf16 to be resumed, one in 8 bits without adapters, one of more than OpenVLA's modules."""
    base = {"base_vlm": str(root / "base")}
    state = {**base, **LORA, "use_proprio": True}
    return {**cell(root, "straight", "zero2", save_interval=2, keep_checkpoints=0, **base, **LORA),
            **cell(root, "last_layer", "zero2", 1, "last_layer", frozen_weights="int8", **base),
            **cell(root, "with_state", "cpu", bf16=False, **state)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, train):
    """The folder with all runs: on one rank ZeRO-0, with which ZeRO-2 and 3 on two are compared."""
    root = tmp_path_factory.mktemp("lora")
    resumed = cell(root, "resumed", "zero2", **LORA, base_vlm=str(root / "base"),
                   pretrained_checkpoint=str(root / "straight/checkpoints/step-000002-*"))
    train(root, 1, {**base_cell(root), **cells(root, 1, ["zero0"]), **more_cells(root), **resumed})
    train(root, 2, cells(root, 2, ["zero2", "zero3"]))
    return root


@pytest.mark.parametrize("freezing", ["full", "frozen_vision"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_way_of_sharding_changes_the_losses(kind, freezing, runs):
    found = [*runs.glob(f"{kind}-{freezing}-*-x2")]
    assert len(found) == (2 if kind == "lora" else 1)
    agree(found, runs / f"{kind}-{freezing}-zero0-x1")


@pytest.mark.slow
def test_nor_does_any_other_json(tmp_path_factory, train):
    root = tmp_path_factory.mktemp("all")
    train(root, 1, {**base_cell(root), **cells(root, 1, JSONS)})
    train(root, 2, cells(root, 2, JSONS))
    for kind, freezing in itertools.product(KINDS, SWITCHES):
        found = [*root.glob(f"{kind}-{freezing}-*")]
        assert len(found) == 2 * (len(JSONS) if kind == "lora" else len(JSONS) - 2)
        agree(found, root / f"{kind}-{freezing}-zero0-x1")


def test_both_matter(runs):
    first = {kind: read(runs / f"{kind}-full-zero0-x1") for kind in KINDS}
    full = read(runs / "lora-frozen_vision-zero0-x1", "grad_norm")
    assert abs(first["lora"] - first["int8"]).max() > 1e-5
    assert (abs(read(runs / "lora-full-zero0-x1", "grad_norm") - full) > 1e-3).all()


def test_a_checkpoint_holds_what_was_trained_and_resuming_is_exact(runs):
    straight, resumed = runs / "straight", runs / "resumed"
    for key in ("loss", "grad_norm", "learning_rate", "accuracy"):
        assert len(read(resumed, key)) == STEPS - 2 and (read(straight, key)[2:] == read(resumed, key)).all()
    first, second = (tensors(list_checkpoints(run / "checkpoints")[-1]) for run in (straight, resumed))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert all(key.endswith(ADAPTER) for key in first)
    small, whole = (sum(file.stat().st_size for file in run.rglob("*.safetensors"))
                    for run in (resumed, runs / "base"))
    assert small < whole / 4
    kept = Checkpoint(list_checkpoints(runs / "last_layer/checkpoints")[-1])
    assert kept.base and all(kept.trained.values()) and "llm_backbone.llm.lm_head.weight" in kept.shapes
    assert not any("vision" in name for name in kept.shapes)


def test_modules_that_are_not_openvlas_are_trained_whole(runs):
    kept = Checkpoint(list_checkpoints(runs / "with_state/checkpoints")[-1])
    assert kept.shapes["proprio_projector.0.weight"] == [16, 4]
    with pytest.raises(CheckpointError, match=r"proprio_projector\S* is not an adapter.*hf"):
        export_vla.export(str(runs / "with_state"), runs / "no", "peft")


@pytest.fixture(scope="module")
def batch(runs):
    cfg = TrainConfig(**json.loads((runs / "base/config.json").read_text()))
    tokenizer = load_tokenizer(cfg.tokenizer, True)
    batch = TrainBatches(open_mixture(cfg, tokenizer), 8, 8, rank=0, world_size=1)[0]
    del batch["dataset"]
    return batch


@torch.no_grad()
def logits(vla, batch) -> torch.Tensor:
    inputs = vla.embed(batch["images"], batch["input_ids"])
    hidden = vla.llm.base_model(inputs_embeds=inputs).last_hidden_state
    return vla.llm.get_output_embeddings()(hidden)


@torch.no_grad()
def test_adapters_begin_as_nothing_and_merge_to_the_same(runs, batch):
    vla, merged = load_vla(runs / "base").vla, load_vla(runs / "lora-full-zero0-x1").vla
    begun = logits(vla, batch)
    vla.freeze(False, False, False)
    add_adapters(vla, 4, 8.0, seed=7)
    assert torch.equal(logits(vla, batch), begun)
    kept = Checkpoint(list_checkpoints(runs / "lora-full-zero0-x1/checkpoints")[-1])
    trained = {name: p for name, p in vla.named_parameters() if p.requires_grad}
    assert trained.keys() == kept.shapes.keys()
    for name, p in trained.items():
        p.copy_(kept.whole(name))
    torch.testing.assert_close(logits(vla, batch), logits(merged, batch), atol=1e-5, rtol=1e-5)
    assert (logits(merged, batch) - begun).abs().max() > 1e-2
    opened = open_weights(runs / "lora-full-zero0-x1").tensors  # any part of a merged matrix can be read
    name = "llm_backbone.llm.model.layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(opened.read(name, 5, 21), opened.whole(name).flatten()[5:21])


def test_nearly_as_many_parameters_as_under_openvlas_finetune():
    """There peft reports "trainable params: 110,828,288 || all params: 7,652,065,472". Its "all-linear" meant
    names' last words: `proj` also chose the towers' first convolutions, and the head was not left out."""
    cfg = released_config("prism-dinosiglip-224px+7b")
    with parameters_without_memory():
        vla = VLA(cfg, load_tokenizer(str(LLAMA_TOKENIZER)))
    vla.freeze(False, False, False)
    add_adapters(vla, 32, 16.0, seed=7)
    convolutions = [tower.patch_embed.proj.weight.shape for tower in vla.vision_backbone.values()]
    more = sum(shape[0] + shape[1:].numel() for shape in (*convolutions, vla.llm.lm_head.weight.shape))
    whole, trained = vla.count_parameters()
    assert (whole + 32 * more, trained + 32 * more) == (7_652_065_472, 110_828_288)


# ---- The base ----------------------------------------------------------------------------------------------


def test_a_base_that_is_gone_or_has_changed_is_named(runs, tmp_path):
    for name in ("base", "lora-full-zero0-x1"):
        shutil.copytree(runs / name, tmp_path / name)
    (checkpoint,) = list_checkpoints(tmp_path / "lora-full-zero0-x1/checkpoints")
    (base,) = list_checkpoints(tmp_path / "base/checkpoints")
    meta = json.loads((checkpoint / "checkpoint.json").read_text())
    assert meta["base"]["where"].startswith(str(runs / "base"))
    meta["base"]["where"] = str(base)  # moved, as the message below says how
    (checkpoint / "checkpoint.json").write_text(json.dumps(meta))
    load_vla(checkpoint)
    facts = json.loads((base / "checkpoint.json").read_text())
    (base / "checkpoint.json").write_text(json.dumps({**facts, "step": 21}))
    with pytest.raises(CheckpointError, match=f"based on {base}, whose weights have changed: put it back"):
        load_vla(checkpoint)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(CheckpointError, match=f"based on {base}: put it back"):
        load_vla(checkpoint)


def test_a_base_in_openvlas_format_and_adapters_on_adapters(runs, tmp_path, plain_run):
    """The export of a merged model is the base of the next; so is the run itself."""
    export_vla.export(str(runs / "lora-full-zero0-x1"), tmp_path / "hf", "hf")
    for name, where in (("on_hf", tmp_path / "hf"), ("on_run", runs / "lora-full-zero0-x1")):
        values = {**MODEL, **KINDS["int8"], "run_root_dir": str(tmp_path), "run_id": name, "max_steps": 1,
                  "base_vlm": str(where), "per_device_batch_size": 8}
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
        for steps in (1, 2):  # the second resumes
            done = plain_run(tmp_path / "c.yaml", "--deepspeed_config",
                             ds_json(tmp_path / "ds.json", 2, False), "--set", f"max_steps={steps}")
            assert done.returncode == 0, done.text
        assert f"weights_from {where}" in done.text and "resumed" in done.text
    assert "\nmemory weights_gb" in done.text
    np.testing.assert_array_equal(read(tmp_path / "on_hf"), read(tmp_path / "on_run"))
    export_vla.export(str(tmp_path / "on_hf"), tmp_path / "adapter", "peft")
    named = json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(tmp_path / "hf")  # peft and transformers load it
    weights = tmp_path / "hf/model-00001-of-00001.safetensors"
    content = bytearray(weights.read_bytes())
    content[-8:] = b"\0" * 8  # in the first row of the last tensor, a vector
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="whose weights have changed"):
        open_weights(tmp_path / "on_hf")


def test_what_cannot_be_is_refused(tmp_path, tiny, plain_run):
    with pytest.raises(UserError, match=r"lora_rank.*set base_vlm"):
        load_config(tiny(lora_rank=4))
    path = tiny(base_vlm=str(ROOT), frozen_weights="int8", lora_rank=4)
    done = plain_run(path, "--deepspeed_config", "ds_configs/zero3.json")
    assert done.returncode == 1 and "error: frozen_weights: ZeRO-3" in done.text and "zero2.json" in done.text


# ---- For peft ----------------------------------------------------------------------------------------------


def test_the_base_that_peft_is_told(tmp_path, capsys):
    """Its id on the hub, also for the hub's cache; its directory; nothing, if peft could not load it."""
    cached = tmp_path / "models--openvla--openvla-7b/snapshots/31f090d0"
    for folder in (cached, tmp_path / "native"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"model_type": "openvla"} if folder == cached else {"vla": {}}))
    for name, where, told in (("openvla/openvla-7b", cached, "openvla/openvla-7b"),
                              (str(cached), cached, "openvla/openvla-7b"),
                              ("prism-siglip-224px+7b", tmp_path / "native/checkpoints/step-1.pt", None),
                              (str(tmp_path / "native"), tmp_path / "native", None)):
        assert export_vla.base_for_peft(name, where) == told
        assert ("--format hf" in capsys.readouterr().out) == (told is None)


def test_peft_loads_the_adapters_onto_the_exported_base(runs, batch, tmp_path, capsys):
    """The module tree of OpenVLA's Hugging Face class, made of this project's modules."""
    peft = pytest.importorskip("peft")
    adapted = runs / "lora-full-zero0-x1"
    export_vla.export(str(runs / "base"), tmp_path / "base", "hf")
    export_vla.export(str(adapted), tmp_path / "adapter", "peft")
    assert peft.PeftConfig.from_pretrained(tmp_path / "adapter").base_model_name_or_path is None
    assert f"note: the base {runs / 'base'}" in capsys.readouterr().out
    vla = load_vla(tmp_path / "base").vla
    begun, projector = logits(vla, batch), vla.projector["projector"]

    class Theirs(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = SimpleNamespace(model_type="openvla")
            self.vision_backbone, self.language_model = vla.vision_backbone, vla.llm
            self.projector = torch.nn.ModuleDict({"fc1": projector[0], "fc2": projector[2]})

    theirs = peft.PeftModel.from_pretrained(Theirs(), tmp_path / "adapter")
    projector[0], projector[2] = theirs.base_model.model.projector.values()
    expected = logits(load_vla(adapted).vla, batch)
    torch.testing.assert_close(logits(vla, batch), expected, atol=1e-5, rtol=1e-5)
    assert (expected - begun).abs().max() > 1e-2
    with pytest.raises(CheckpointError, match=r"vision_backbone\S* is not an adapter.*hf"):
        export_vla.export(str(runs / "base"), tmp_path / "no", "peft")


# ---- In 8 bits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_in_8_bits(dtype):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(64, 48).to(dtype), torch.randn(3, 5, 64, dtype=dtype, requires_grad=True)
    expected = layer(x)
    (wanted,) = torch.autograd.grad(expected.sum(), x)
    int8.shrink(layer)
    assert layer.weight.dtype == torch.int8 and layer.row_scale.dtype == dtype
    y = layer(x)
    (found,) = torch.autograd.grad(y.sum(), x)
    for ours, theirs in ((y, expected), (found, wanted)):
        assert ours.dtype == dtype and (ours - theirs).norm() < 0.01 * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trained_model_in_8_bits_says_the_same(dtype, colors):
    cfg = TrainConfig(**json.loads((colors / "config.json").read_text()))
    mixture = open_mixture(cfg, load_tokenizer(cfg.tokenizer, True), train=False)
    batch = TrainBatches(mixture, 64, 64, rank=0, world_size=1)[0]
    del batch["dataset"]
    vla = load_vla(colors, dtype=dtype).vla
    with torch.no_grad():
        _, expected, _ = vla(**batch)
        for layer in linear_layers(vla).values():
            int8.shrink(layer)
        _, found, true = vla(**batch)
    assert (found == expected).float().mean() >= 0.99 and (found == true).float().mean() > 0.9


# ---- Memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage, expected", [  # GB of 1e9 parameters on 4 ranks: ds_configs/README.md's table
    (0, (2, 2, 12)), (1, (2, 6, 3)), (2, (2, 1, 3)), (3, (0.5, 1, 3))])
def test_memory_is_told_and_too_much_refused(stage, expected, monkeypatch):
    ds_config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
    cfg = TrainConfig(**{key: value for key, value in MODEL.items() if key in SHAPE}, action_dim=7)
    vla = VLA(cfg, load_tokenizer(cfg.tokenizer, cfg.add_action_tokens))
    vla.large = torch.nn.Parameter(torch.empty(10**9, device="meta"))
    vla.count_parameters = lambda: (10**9, 10**9)
    told = cost.memory_needed(vla, ds_config, ranks=4).split()
    values = dict(zip(told[1::2], map(float, told[2::2]), strict=True))
    assert values.pop("activations_gb") < 0.1
    assert tuple(values.values()) == pytest.approx(expected, rel=1e-3)
    assert [*values] == ["weights_gb", "gradients_gb", "optimizer_gb"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 4 * 10**9))
    with pytest.raises(UserError, match=f"take {sum(expected):.1f} GB.* 4.0.*per_device_batch_size"):
        cost.memory_needed(vla, ds_config, ranks=4)

    # recomputation: always, never, or only if a micro-batch would not fit
    kept = cost.memory_held(vla, ds_config, 4, recompute=False)
    room = 2e9 + sum(kept.values()) + 0.3 * kept["activations"]
    samples = vla.cfg.per_device_batch_size
    for gb, fits in ((1.001 * room / 0.95e9, True), (0.999 * room / 0.95e9, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gb=gb: (0, gb * 1e9))
        for wanted, recompute in ((None, False), ({}, True), ({"only_if_needed": True}, not fits)):
            changed = ds_config | ({} if wanted is None else {"activation_checkpointing": wanted})
            assert cost.recomputes(vla, changed, 4, cost.gpu_memory()) == recompute
            *_, told, _, largest = cost.memory_needed(vla, changed, ranks=4).split()
            assert told == ("yes" if recompute else "no")
            assert recompute or (int(largest) >= samples) == fits


def test_host_memory_for_what_is_offloaded_is_told_and_too_much_refused(monkeypatch):
    """Two machines of four ranks, and 60 % of the optimizer on the host."""
    cfg = TrainConfig(**{key: value for key, value in MODEL.items() if key in SHAPE}, action_dim=7)
    vla = VLA(cfg, load_tokenizer(cfg.tokenizer, cfg.add_action_tokens))
    vla.count_parameters = lambda: (10**9, 10**9)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    ds_config = json.loads((ROOT / "ds_configs/zero3_partial_offload.json").read_text())
    monkeypatch.setattr(cost.host, "memory", lambda: 6 * 10**9)
    assert cost.memory_needed(vla, ds_config, ranks=8).endswith(" host_gb 5.4")
    monkeypatch.setattr(cost.host, "memory", lambda: 5 * 10**9)
    with pytest.raises(UserError, match=r"5.4 GB.* 5.0: offload less"):
        cost.memory_needed(vla, ds_config, ranks=8)


@pytest.mark.parametrize("image_size", [28, 112])
def test_the_estimate_of_activations(image_size):
    """Against what PyTorch keeps for the backward pass."""
    cfg = TrainConfig(**{key: value for key, value in MODEL.items() if key in SHAPE} | {
        "image_size": image_size, "llm_backbone": MODEL["llm_backbone"] | {
            "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 6}},
        action_dim=7, per_device_batch_size=4)
    ids = torch.randint(0, 300, (4, 32))
    labels = torch.where(torch.arange(32) < 24, -100, ids)
    images = torch.randint(0, 255, (4, 1, image_size, image_size, 3), dtype=torch.uint8)
    for recompute in (False, True):
        vla, kept = VLA(cfg, load_tokenizer(cfg.tokenizer, cfg.add_action_tokens)), {}
        estimate = cost.activations(vla, recompute)
        if recompute:
            vla.recompute_activations()
        parameters = {param.untyped_storage().data_ptr() for param in vla.parameters()}

        def keep(tensor, parameters=parameters, kept=kept):
            if (place := tensor.untyped_storage().data_ptr()) not in parameters:
                kept[place] = tensor  # and so its memory is not used for another
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            vla(images, ids, labels)
        numbers = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 4
        assert 0.8 * numbers < estimate < (4 if recompute else 1.2) * numbers, (recompute, numbers, estimate)


SEVEN_B = prismatic_config(*PRISMATIC["prism-dinosiglip-224px+7b"]) | {
    "tokenizer": str(ROOT / "tests/fixtures/model/tokenizer_llama"), "action_dim": 7}


@pytest.mark.slow
def test_a_micro_batch_that_is_said_to_fit_does():
    """Against the peaks that were measured (bench/README.md): on a GPU of just that size, a smaller one is named."""
    with torch.device("meta"):
        vla = VLA(TrainConfig(**SEVEN_B), load_tokenizer(SEVEN_B["tokenizer"], False)).bfloat16()

    def largest(json_name, gpus, samples, recompute, gb):
        ds_config = json.loads((ROOT / f"ds_configs/{json_name}.json").read_text())
        ds_config["activation_checkpointing"] = {} if recompute else {"only_if_needed": True}
        vla.cfg = vla.cfg.model_copy(update={"per_device_batch_size": samples})
        *_, word, decided, _, count = cost.memory_needed(vla, ds_config, gpus, gb * 1e9).split()
        assert word == "recompute"
        return decided, int(count)

    for json_name, gpus, samples, gb in (("zero2", 2, 16, 80), ("zero3", 2, 16, 72), ("zero2", 4, 16, 49),
                                         ("zero3", 4, 16, 38), ("zero2", 1, 8, 138)):
        assert largest(json_name, gpus, samples, True, gb)[1] < samples
    for json_name, gb in (("zero2", 116), ("zero3", 123)):  # without recomputation: it is asked for
        assert largest(json_name, 2, 32, False, gb)[0] == "yes"
        assert largest(json_name, 2, 32, False, 160)[0] == "no"
    add_adapters(vla, 32, 16.0, seed=7)
    for samples, gb in ((1, 19.1), (4, 19.5), (8, 20.3), (32, 25.2)):
        assert largest("one_small_gpu", 1, samples, True, gb)[1] < samples
    decided, count = largest("one_small_gpu", 1, 8, False, 24)
    assert decided == "yes" and count >= 8  # which is not too cautious: it took 20.3 GB
    assert largest("one_small_gpu", 1, 8, False, 80)[0] == "no"


def test_what_other_ways_would_take_is_told():
    """The line memory_if of `python -m machinery.memory` against what memory_needed says of models that are trained in these ways."""
    cfg = TrainConfig(**{key: value for key, value in MODEL.items() if key in SHAPE}, action_dim=7)

    def make():
        return VLA(cfg, load_tokenizer(cfg.tokenizer, cfg.add_action_tokens)).bfloat16()

    def needed(vla, json_name="one_small_gpu"):
        ds_config = json.loads((ROOT / f"ds_configs/{json_name}.json").read_text())
        told = cost.memory_needed(vla, ds_config, ranks=1).split()
        return sum(map(float, told[2:7:2]))  # but for the activations

    adapted, last_layer, told = make(), make(), memory.memory_if(make()).split()
    adapted.freeze(False, False, False)
    add_adapters(adapted, 32, 16.0, seed=7)
    expected = {"lora_bf16_gb": needed(adapted)}
    for layer in linear_layers(adapted).values():
        int8.shrink(layer)
    last_layer.freeze(True, True, True)
    expected |= {"lora_int8_gb": needed(adapted), "last_layer_gb": needed(last_layer),
                 "everything_offloaded_gb": needed(make(), "zero2_offload")}
    assert dict(zip(told[1::2], map(float, told[2::2]), strict=True)) == pytest.approx(expected, rel=2e-3)
    assert len(set(expected.values())) == 4


def test_out_of_memory_ends_with_advice(capsys, monkeypatch):
    def program():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(ranks, "start_job", lambda: None)
    monkeypatch.setattr(ranks.os, "_exit", sys.exit)
    with pytest.raises(SystemExit):
        ranks.run_job(program)
    told = capsys.readouterr().err
    assert "error: the GPU's memory is full" in told and "per_device_batch_size" in told
    assert "Traceback" not in told


@pytest.mark.parametrize("trains", [False, True])
def test_torch_compile_leaves_products_of_8_bits_as_they_are(trains):
    """It knows a kernel for them, which on a GPU takes a thousand times as long."""
    layer = torch.nn.Linear(64, 48, dtype=torch.bfloat16).requires_grad_(False)
    int8.shrink(layer)
    x = torch.randn(1, 40, 64, dtype=torch.bfloat16, requires_grad=trains)
    with torch.inference_mode(not trains):
        y, code = run_and_get_code(torch.compile(lambda x: int8.linear(layer, x)), x)
    assert "int8pack" not in "".join(code)
    torch.testing.assert_close(y, int8.linear(layer, x), rtol=0.02, atol=0.02)
