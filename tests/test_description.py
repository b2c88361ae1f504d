"""Models from elsewhere: what their files may set, and which are refused because they would act nonsense."""

import copy
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from act import load_vla
from action_tokenizer import load_tokenizer
from machinery import hub
from machinery.checkpoint import CheckpointError
from machinery.config import TrainConfig, UserError
from machinery.description import DESCRIPTION
from machinery.weights import download, open_weights, rename
from model import VLA

IMAGE = np.random.RandomState(0).randint(0, 255, (28, 28, 3)).astype(np.uint8)
STATS = {key: [0.1 * i for i in range(4)] for key in ("q01", "q99", "min", "max", "mean", "std")}
STATS["mask"] = [True] * 4


def write_openvlas(path: Path) -> Path:
    """A tiny model as OpenVLA's Hugging Face class has it."""
    shape = {key: TINY[key] for key in TINY.keys() & {*DESCRIPTION}}
    cfg = TrainConfig(**shape, tokenizer=TINY["tokenizer"], action_dim=4)
    tokenizer = load_tokenizer(cfg.tokenizer, cfg.add_action_tokens)
    vla = VLA(cfg, tokenizer)
    tensors = {rename(name, tuple(cfg.vision_backbone), to_hugging_face=True): value.contiguous()
               for name, value in vla.state_dict().items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    load_tokenizer(cfg.tokenizer).save_pretrained(path)
    (path / "config.json").write_text(json.dumps({
        "model_type": "openvla", "norm_stats": {"arm": {"action": STATS}},
        "vision_backbone_id": "dinosiglip-vit-so-224px", "llm_backbone_id": "llama2-7b-pure",
        "image_resize_strategy": "resize-naive",
        "zerovla": {**shape, "action_dim": 4, "datasets": {}, "features": {}}}))
    return path


@pytest.fixture(scope="module")
def openvlas(tmp_path_factory) -> Path:
    return write_openvlas(tmp_path_factory.mktemp("others"))


@pytest.fixture
def copied(openvlas, tmp_path) -> Path:
    return shutil.copytree(openvlas, tmp_path / "copy")


def edit(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_it_acts(openvlas, capsys):
    assert load_vla(openvlas).predict_action(IMAGE, "open").shape == (4,)
    assert "--center_crop yes" in capsys.readouterr().err  # the files do not say
    assert load_vla(openvlas, center_crop=True).cfg.image_aug
    assert not capsys.readouterr().err


# ---- What a config.json may set ----------------------------------------------------------------------------


@pytest.mark.parametrize("tower", [
    {"model": "hf-hub:someone/vit"}, {"model": "local-dir:/tmp"}, {"model": "a", "checkpoint_path": "x.pth"},
    {"model": "a", "pretrained_cfg_overlay": {"file": "/etc/passwd"}}, {"model": "a", "pretrained": True},
    {"model": "a", "pretrained_cfg": {"url": "http://127.0.0.1/x"}}, {"model": "a", "cache_dir": "x"}])
def test_a_tower_names_no_files(tower, copied):
    edit(copied, lambda config: config["zerovla"].update(vision_backbone={"a": tower}))
    with pytest.raises(CheckpointError, match=rf"{copied}: config.json sets .*a.*may not"):
        open_weights(copied)


def test_timm_ids_are_names(copied):
    def change(config):
        del config["zerovla"]
        config["timm_model_ids"] = ["hf-hub:evil/x", "vit_so400m_patch14_siglip_224"]

    edit(copied, change)
    with pytest.raises(CheckpointError, match=r"hf-hub:evil/x.*may not"):
        open_weights(copied)


@pytest.mark.parametrize("key, value", [
    ("data_root_dir", "/"), ("tokenizer", "http://127.0.0.1/x"), ("pretrained_backbones", True),
    ("base_vlm", "evil/x"), ("index_dir", "/tmp"), ("hf_token", "/etc/passwd"), ("llm_backbone", "/etc")])
def test_settings_of_a_training_are_not_taken(key, value, copied):
    edit(copied, lambda config: config["zerovla"].update({key: value}))
    with pytest.raises(CheckpointError, match=rf"{copied}: config.json.*{key}"):
        open_weights(copied)


def test_fields_that_would_load_something_do_not_reach_transformers(copied):
    evil = {"auto_map": {"AutoConfig": "evil/x--code.Config"}, "_name_or_path": "/etc", "use_kernels": True,
            "attn_implementation": "evil/kernel", "_attn_implementation": "evil/kernel",
            "quantization_config": {"quant_method": "x"}, "torch_dtype": "float16", "architectures": ["x"]}
    edit(copied, lambda config: config["zerovla"]["llm_backbone"].update(evil))
    assert not open_weights(copied).config["llm_backbone"].keys() & evil.keys()
    assert load_vla(copied).predict_action(IMAGE, "open").shape == (4,)


@pytest.mark.parametrize("name", ["/etc/passwd", "../other/model.safetensors", "..", ""])
def test_an_index_lists_files_of_its_folder(name, copied):
    index = {"weight_map": {"a": name}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=rf"'{name}' is not a file's name"):
        open_weights(copied)


HOSTILE = ["hf-hub:evil/x", "local-dir:{canary}", "{canary}", "../canary", "http://127.0.0.1:9/x", "evil/x",
           {"file": "{canary}"}, {"url": "http://127.0.0.1:9/x"}, ["{canary}"], -1, 0, True, None, "", [], {},
           [0, 0]]
KEYS = {
    "top": ["zerovla", "norm_stats", "model_type", "auto_map", "quantization_config"],
    "zerovla": ["vision_backbone", "llm_backbone", "tokenizer", "data_root_dir", "image_size", "action_dim",
                "action_chunk", "parallel_decoding", "use_proprio", "proprio_dim", "window_size", "cameras",
                "features", "datasets", "prompt_style", "arch_specifier"],
    "tower": ["model", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "embed_dim",
              "depth", "num_heads", "mlp_ratio", "patch_size", "reg_tokens", "act_layer", "norm_layer",
              "weight_init", "img_size"],
    "llm": ["model_type", "auto_map", "_name_or_path", "attn_implementation", "hidden_size", "head_dim",
            "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
            "hidden_act", "rope_scaling", "rope_theta", "max_position_embeddings"]}
PLACES = [(place, key) for place, keys in KEYS.items() for key in keys]
watched: dict | None = None  # an audit hook cannot be removed, only told to do nothing


def audit(event: str, arguments: tuple) -> None:
    if watched is not None and (event in ("socket.connect", "subprocess.Popen", "os.system") or (
            event == "open" and "canary" in str(arguments[0]))):
        watched["seen"].append((event, str(arguments[0])))


sys.addaudithook(audit)


@given(st.lists(st.tuples(st.sampled_from(PLACES), st.sampled_from(HOSTILE)), min_size=1, max_size=3))
@example([(("tower", "model"), "local-dir:{canary}")])
@example([(("tower", "model"), "hf-hub:evil/x")])
@example([(("tower", "embed_dim"), "")])
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_config_reads_a_path_or_asks_an_address(openvlas, tmp_path, changes):
    global watched
    folder = tmp_path / "copy"
    if not folder.exists():
        shutil.copytree(openvlas, folder)
        (tmp_path / "canary").mkdir()
        (tmp_path / "canary/config.json").write_text("{}")
    config = json.loads((openvlas / "config.json").read_text())
    places = {"top": config, "zerovla": config["zerovla"], "llm": config["zerovla"]["llm_backbone"],
              "tower": next(iter(config["zerovla"]["vision_backbone"].values()))}
    for (place, key), value in copy.deepcopy(changes):
        places[place][key] = value
    text = json.dumps(config).replace("{canary}", str(tmp_path / "canary"))
    (folder / "config.json").write_text(text)
    watched = {"seen": []}
    try:
        load_vla(folder).predict_action(IMAGE, "open")
    except UserError as error:
        assert "\n" not in str(error)
    except (TypeError, ValueError, RuntimeError, KeyError):  # acting by statistics that are none
        assert "norm_stats" in str(changes) or "features" in str(changes) or "datasets" in str(changes)
    finally:
        seen = watched["seen"]
        watched = None
    assert not seen


def test_statistics_of_robots_of_another_width_are_left_out(copied):
    """A fine-tuned OpenVLA still has those of its base, whose robots have 7 dimensions."""
    own = [*open_weights(copied).norm_stats]
    base = {"base": {"action": {"q01": [0.0] * 7}}}
    edit(copied, lambda config: config.update(norm_stats=base | config["norm_stats"]))
    assert [*open_weights(copied).norm_stats] == own


def test_a_run_from_the_hub_brings_only_its_description(openvlas, tmp_path, plain_run, tiny, monkeypatch):
    done = plain_run(tiny(max_steps=1, run_id="tiny", eval_samples=8), "--deepspeed_config", "ds_configs/cpu.json")
    assert done.returncode == 0, done.text
    run = tmp_path / "runs/tiny"
    fetch = hub.fetch  # as if it came from there
    monkeypatch.setattr(hub, "fetch", lambda name, *how: run if name == "someone/run" else fetch(name, *how))
    assert download("someone/run") == run
    weights = open_weights("someone/run")
    assert weights.config.keys() <= {*DESCRIPTION, "tokenizer"}
    assert weights.config["tokenizer"] == str(run / "tokenizer")
    assert load_vla("someone/run").predict_action(IMAGE, "open").shape == (4,)
    assert "data_root_dir" in open_weights(run).config  # by its path, it is the user's own
    (checkpoint,) = (run / "checkpoints").iterdir()
    meta = json.loads((checkpoint / "checkpoint.json").read_text())
    (checkpoint / "checkpoint.json").write_text(json.dumps({**meta, "base": {"where": str(openvlas)}}))
    with pytest.raises(CheckpointError, match=rf"{openvlas}: a model from elsewhere may not name a path"):
        open_weights("someone/run")
    edit(run, lambda config: config["vision_backbone"]["dino"].update(model="local-dir:/tmp"))
    with pytest.raises(CheckpointError, match=r"local-dir.*may not"):
        open_weights("someone/run")


# ---- Refused: they would act nonsense ----------------------------------------------------------------------


@pytest.mark.parametrize("file, part", [
    ("action_decoder.pt", "UniVLA"), ("noisy_action_projector--1_checkpoint.pt", "diffusion")])
def test_other_models_in_openvlas_format(file, part, copied):
    (copied / file).write_text("x")
    with pytest.raises(CheckpointError, match=rf"{copied}.*{part}.*nonsense"):
        load_vla(copied)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("told", [True, False])
def test_quantized_weights(told, dtype, copied):
    """bitsandbytes leaves its scales beside them, as ...SCB, or they are lost."""
    file = copied / "model.safetensors"
    tensors = load_file(file)
    for name, value in list(tensors.items()):
        if "language_model.model.layers" in name and value.ndim == 2:
            tensors[name] = (value * 100).to(dtype)
            if told:
                tensors[name.removesuffix("weight") + "SCB"] = value.abs().amax(1)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{copied}.*quantized.*--int8"):
        load_vla(copied)


def test_a_quantized_model_that_only_says_so(copied):
    edit(copied, lambda config: config.update(quantization_config={"load_in_4bit": True}))
    with pytest.raises(CheckpointError, match=rf"{copied}.*quantized.*--int8"):
        load_vla(copied)
