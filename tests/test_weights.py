"""Weights in and out: OpenVLA's names and files (tests/fixtures/model), round trips, and what is refused."""

import json
import pickle
import re
import shutil

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from conftest import GOLDEN_MODEL, LLAMA_TOKENIZER, ROOT, TINY, ds_json, read_metrics
from safetensors.torch import load_file, save_file
from test_model import official_model
from transformers import AutoConfig, AutoModelForCausalLM

import export_vla
from act import load_vla
from action_tokenizer import load_tokenizer
from machinery.checkpoint import CheckpointError, list_checkpoints
from machinery.config import TrainConfig, UserError
from machinery.weights import (
    PRISMATIC,
    open_weights,
    parameters_without_memory,
    prismatic_config,
    rename,
    start_from,
)
from model import VLA

GOLDEN = {name: json.loads((GOLDEN_MODEL / f"{name}.json").read_text()) for name in (
    "keys_openvla7b_native", "keys_openvla_v01_native", "keys_openvla7b_hf", "keys_openvla_v01_hf",
    "native_to_hf_key_map", "config_openvla7b_hf", "config_openvla_v01_hf", "preprocessor_config_openvla7b",
    "preprocessor_config_openvla_v01")}
RELEASED = [("openvla7b", "prism-dinosiglip-224px+7b"), ("openvla_v01", "siglip-224px+7b")]


def released_config(base: str):
    """The keys of TrainConfig of a model OpenVLA has released, with the tokenizer of the fixtures."""
    config = prismatic_config(*PRISMATIC[base])
    return TrainConfig(**{**config, "action_dim": 7, "tokenizer": str(LLAMA_TOKENIZER)})


# ------------------------------------------------------------------------------------------------------------
# OpenVLA's names


@pytest.mark.parametrize("variant, base", RELEASED)
def test_parameters_of_the_released_models(variant, base):
    """Names and shapes of all 7.5 billion, in both formats."""
    cfg = released_config(base)
    with parameters_without_memory():
        vla = VLA(cfg, load_tokenizer(cfg.tokenizer))
    ours = {name: list(p.shape) for name, p in vla.named_parameters()}
    native = {f"{module}.{name}": shape for module, names in GOLDEN[f"keys_{variant}_native"].items()
              for name, shape in names.items()}
    assert ours == native
    towers = tuple(cfg.vision_backbone)
    mapping = {name: rename(name, towers, to_hugging_face=True) for name in ours}
    assert mapping == GOLDEN["native_to_hf_key_map"][variant]
    assert {mapping[name]: shape for name, shape in ours.items()} == GOLDEN[f"keys_{variant}_hf"]
    back = {rename(name, towers, to_hugging_face=False): name for name in mapping.values()}
    assert back == mapping


@pytest.mark.parametrize("variant, base", RELEASED)
def test_exported_descriptions_say_what_openvlas_say(variant, base):
    cfg, golden = released_config(base), GOLDEN[f"config_{variant}_hf"]["use_diff"]
    config = export_vla.hugging_face_config(cfg, golden["norm_stats"], "bfloat16")
    assert {key: config[key] for key in golden if key != "text_config"} == {
        key: value for key, value in golden.items() if key != "text_config"}
    text = golden["text_config"]
    assert {key: config["text_config"][key] for key in text} == text
    golden = GOLDEN[f"preprocessor_config_{variant}"]
    processor = export_vla.preprocessor_config(cfg)
    assert {key: processor[key] for key in golden} == golden


def test_openvlas_class_finds_the_action_tokens_of_any_vocabulary(tmp_path):
    """It takes them to end pad_to_multiple_of rows below the vocabulary's end."""
    tokenizer = load_tokenizer(str(LLAMA_TOKENIZER))
    tokenizer.add_tokens([f"more{i}" for i in range(16)])
    tokenizer.save_pretrained(tmp_path)
    for path in (LLAMA_TOKENIZER, tmp_path):
        cfg = released_config("prism-dinosiglip-224px+7b")
        cfg.tokenizer = str(path)
        config = export_vla.hugging_face_config(cfg, {}, "bfloat16")
        known = load_tokenizer(str(path)).action_vocab_size
        assert config["text_config"]["vocab_size"] - config["pad_to_multiple_of"] == known


# id: vision backbone, language model, resize strategy; what OpenVLA's registry says
REGISTRY = {
    "reproduction-llava-v15+13b": ("clip-vit-l-336px", "vicuna-v15-13b", "letterbox"),
    "in1k-224px+7b": ("in1k-vit-l", "vicuna-v15-7b", "letterbox"),
    "siglip-224px+7b": ("siglip-vit-so400m", "vicuna-v15-7b", "letterbox"),
    "siglip-384px-resize-crop+7b": ("siglip-vit-so400m-384px", "vicuna-v15-7b", "resize-crop"),
    "dinoclip-336px-resize-naive+7b": ("dinoclip-vit-l-336px", "vicuna-v15-7b", "resize-naive"),
    "dinosiglip-384px-letterbox+7b": ("dinosiglip-vit-so-384px", "vicuna-v15-7b", "letterbox"),
    "dinosiglip-224px-resize-naive+7b": ("dinosiglip-vit-so-224px", "vicuna-v15-7b", "resize-naive"),
    "llama2-chat+13b": ("clip-vit-l-336px", "llama2-13b-chat", "letterbox"),
    "mistral-instruct-v0.1+7b": ("clip-vit-l-336px", "mistral-v0.1-7b-instruct", "letterbox"),
    "phi-2+3b": ("clip-vit-l-336px", "phi-2-3b", "letterbox"),
    "prism-clip-controlled+13b": ("clip-vit-l-336px", "llama2-13b-pure", "resize-naive"),
    "prism-siglip-controlled+13b": ("siglip-vit-so400m-384px", "llama2-13b-pure", "resize-naive"),
    "prism-siglip+13b": ("clip-vit-l-336px", "llama2-13b-pure", "resize-naive"),
    "prism-dinosiglip+13b": ("dinosiglip-vit-so-384px", "llama2-13b-pure", "resize-naive"),
    "prism-dinosiglip-224px+7b": ("dinosiglip-vit-so-224px", "llama2-7b-pure", "resize-naive"),
}


def test_prismatic_ids():
    assert len(PRISMATIC) == 50
    assert {name: tuple(PRISMATIC[name]) for name in REGISTRY} == REGISTRY
    for name, row in PRISMATIC.items():
        config = prismatic_config(*row)
        assert config["image_size"] in (224, 336, 384) and AutoConfig.for_model(**config["llm_backbone"])
        assert ("fused" in config["arch_specifier"]) == (len(config["vision_backbone"]) == 2), name


# ------------------------------------------------------------------------------------------------------------
# Files


@pytest.fixture(scope="module")
def run(tmp_path_factory, ranks):
    """A run of three steps with frozen towers, in float32 under ZeRO-3 on two ranks."""
    path = tmp_path_factory.mktemp("run")
    values = {**TINY, "run_root_dir": str(path / "runs"), "max_steps": 3, "freeze_vision_backbone": True}
    (path / "tiny.yaml").write_text(yaml.safe_dump(values))
    done = ranks(2, path / "tiny.yaml", "--deepspeed_config", ds_json(path / "ds.json", 3, bf16=False))
    assert done.returncode == 0, done.text
    return next((path / "runs").iterdir())


def tensors(where) -> dict[str, torch.Tensor]:
    opened = open_weights(where).tensors
    return {name: opened.whole(name) for name in opened.shapes}


def assert_equal(a, b) -> None:
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def test_round_trip_is_exact(run, tmp_path):
    """native -> hf -> native -> hf, each from the one before; and all from the run's own checkpoint."""
    export_vla.export(str(run), tmp_path / "native", "native")
    export_vla.export(str(tmp_path / "native"), tmp_path / "hf", "hf")
    export_vla.export(str(tmp_path / "hf"), tmp_path / "native2", "native")
    export_vla.export(str(tmp_path / "native2"), tmp_path / "hf2", "hf")
    for other in ("native", "hf", "native2", "hf2"):
        assert_equal(run, tmp_path / other)
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    actions = [load_vla(path).predict_action(image, "push") for path in (
        run, tmp_path / "native", tmp_path / "hf", tmp_path / "native2", tmp_path / "hf2")]
    assert all((action == actions[0]).all() for action in actions)
    modules = {"vision_backbone", "projector", "llm_backbone"}
    (native,) = {torch.load(path, weights_only=True)["model"].keys() == modules
                 for path in (tmp_path / "native/checkpoints").iterdir()}
    assert native and len(list((tmp_path / "native/checkpoints").iterdir())) == 2


def test_export_in_bf16_and_several_shards(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export_vla, "SHARD_BYTES", 100_000)
    export_vla.export(str(run), tmp_path / "hf", "hf", torch.bfloat16)
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 2 and {path.name for path in files} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == 2 * sum(t.numel() for t in tensors(run).values())
    expected = tensors(run)
    exported = tensors(tmp_path / "hf")
    assert all(torch.equal(tensor, expected[name].bfloat16()) for name, tensor in exported.items())
    with pytest.raises(CheckpointError, match=r"exists: .*another directory"):
        export_vla.export(str(run), tmp_path / "hf", "hf")
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match=files[1].name):
        open_weights(tmp_path / "hf")


def test_export_leaves_other_folders_alone(run, tmp_path):
    (tmp_path / "exp.tmp").mkdir()
    (tmp_path / "exp.tmp/notes.txt").write_text("mine")
    export_vla.export(str(run), tmp_path / "exp", "hf")
    assert (tmp_path / "exp.tmp/notes.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exp", "exp.tmp"]


def test_a_directory_as_openvla_writes_it(tmp_path):
    """Without our own description: what the model is follows from OpenVLA's keys."""
    config = GOLDEN["config_openvla7b_hf"]["use_diff"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    keys = GOLDEN["keys_openvla7b_hf"]
    save_file({key: torch.zeros(1) for key in keys}, tmp_path / "model.safetensors")
    weights = open_weights(tmp_path)
    expected = released_config("prism-dinosiglip-224px+7b")
    for key in ("vision_backbone", "image_size", "arch_specifier", "prompt_style", "image_resize_strategy"):
        assert weights.config[key] == getattr(expected, key)
    llm = AutoConfig.for_model(**weights.config["llm_backbone"])
    # the file's, by its defaults
    assert (llm.hidden_size, llm.rms_norm_eps, llm.vocab_size) == (4096, 1e-6, 32064)
    assert weights.norm_stats == config["norm_stats"]
    assert set(weights.tensors.shapes) == set(GOLDEN["native_to_hf_key_map"]["openvla7b"])


def test_the_official_models_native_checkpoint(tmp_path):
    """A .pt laid out as OpenVLA's trainer does, in full and without the towers it had frozen."""
    vla = official_model()
    modules: dict = {"vision_backbone": {}, "projector": {}, "llm_backbone": {}}
    for name, value in vla.state_dict().items():
        modules[name.split(".")[0]][name.partition(".")[2]] = value
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"model": {
        "vision_backbone_id": "dinosiglip-vit-so-224px", "llm_backbone_id": "llama2-7b-pure",
        "image_resize_strategy": "resize-naive"}}))
    torch.save({"model": modules, "optimizer": None}, tmp_path / "checkpoints/latest-checkpoint.pt")
    weights = open_weights(tmp_path)
    assert weights.tensors.check(vla) == []
    assert all(torch.equal(weights.tensors.whole(name), value) for name, value in vla.state_dict().items())
    del modules["vision_backbone"]
    torch.save({"model": modules}, tmp_path / "checkpoints/latest-checkpoint.pt")
    weights = open_weights(tmp_path / "checkpoints/latest-checkpoint.pt")
    assert weights.tensors.check(vla) == ["vision_backbone"]
    assert all(tower["pretrained"] for tower in weights.config["vision_backbone"].values())


def test_keys_that_do_not_fit_are_listed(run, tmp_path):
    export_vla.export(str(run), tmp_path / "hf", "hf")
    (file,) = (tmp_path / "hf").glob("*.safetensors")
    contents = load_file(file)
    del contents["projector.fc1.bias"]
    contents["projector.fc2.bias"] = torch.zeros(3)
    contents["language_model.extra"] = torch.zeros(1)
    save_file(contents, file)
    with pytest.raises(CheckpointError) as error:
        load_vla(tmp_path / "hf")
    for message in ("3 problems", "missing projector.projector.0.bias", "unexpected llm_backbone.llm.extra",
                    "projector.projector.2.bias: shape [3], this model has [32]"):
        assert message in str(error.value)


class Malicious:
    def __reduce__(self):
        return (print, ("this ran",))


def test_pickles_are_never_run(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"vla": {"base_vlm": "prism-dinosiglip-224px+7b"}}))
    path = tmp_path / "checkpoints/step-000001-epoch-00-loss=0.1.pt"
    torch.save({"model": {"projector": Malicious()}}, path)
    with pytest.raises(CheckpointError, match="UnpicklingError"):
        open_weights(tmp_path)
    path.write_bytes(pickle.dumps({"model": Malicious()}))
    with pytest.raises(CheckpointError, match=r"RuntimeError|UnpicklingError"):
        open_weights(tmp_path)
    assert "this ran" not in capsys.readouterr().out


def test_names_and_tokens_that_lead_nowhere(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # as the variable of this name does
    for where, message in (
        ("prism-dinosiglip-224+7b", r"did you mean 'prism-dinosiglip-224px\+7b'"),
        ("openvla/openvla-7b", "'openvla/openvla-7b'.*downloaded.*HF_HUB_OFFLINE"),
        ("siglip-224px+7b", r"prismatic-vlms.*downloaded.*\(siglip-224px\+7b\)"),
        (tmp_path, f"{tmp_path}: expected a run"),
    ):
        with pytest.raises(CheckpointError, match=message):
            open_weights(where)
    (tmp_path / "token").write_text("hf_abc\n")
    monkeypatch.setenv("MY_TOKEN", "hf_def")
    monkeypatch.setenv("HF_TOKEN", "hf_before")
    for where, token in ((str(tmp_path / "token"), "hf_abc"), ("MY_TOKEN", "hf_def")):
        with pytest.raises(ValueError, match=r"tokenizer: .*''"):  # nothing else is asked for
            start_from(TrainConfig(hf_token=where), None)
        assert huggingface_hub.get_token() == token  # what every download asks for
    with pytest.raises(ValueError, match=r"hf_token.*'nowhere'"):
        start_from(TrainConfig(hf_token="nowhere"), None)


def test_a_checkpoint_by_any_way_to_it(run, tmp_path, monkeypatch):
    (checkpoint,) = list_checkpoints(run / "checkpoints")
    (tmp_path / "best").symlink_to(checkpoint)
    monkeypatch.chdir(checkpoint)
    for where in (".", tmp_path / "best", f"../{checkpoint.name}"):
        assert open_weights(where).config["action_dim"] == 4


def test_damaged_files_are_named(run, tmp_path):
    export_vla.export(str(run), tmp_path / "hf", "hf")
    (tmp_path / "hf/model-00001-of-00001.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(CheckpointError, match=r"model-00001-of-00001.safetensors: .*Git LFS"):
        open_weights(tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    del config["zerovla"]
    (tmp_path / "hf/config.json").write_text(json.dumps(config | {"vision_backbone_id": "vit-x"}))
    with pytest.raises(CheckpointError, match=r"config\.json.*vit-x"):
        open_weights(tmp_path / "hf")


def test_actions_of_another_width_than_openvlas(run, tmp_path):
    """Its files do not say how wide actions are, but their statistics do; another robot's are refused."""
    export_vla.export(str(run), tmp_path / "hf", "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    del config["zerovla"]["action_dim"]
    seven = {key: [0.0] * 7 for key in ("q01", "q99", "min", "max", "mean", "std")}
    own = json.loads((tmp_path / "hf/dataset_statistics.json").read_text())
    for names in (["bridge_orig"], ["metaworld_demo", "bridge_orig"]):  # also under the base's name
        config["norm_stats"] = {name: {"action": seven} for name in names}
        (tmp_path / "hf/config.json").write_text(json.dumps(config))
        policy, image = load_vla(tmp_path / "hf"), np.full((28, 28, 3), 90, np.uint8)
        assert policy.predict_action([image], ["open it"]).shape == (1, 4)
        assert policy.norm_stats == own  # a server shows only what the model can act by
        with pytest.raises(UserError, match=r"unnorm_key 'bridge_orig'.*metaworld_demo"):
            policy.predict_action([image], ["open it"], "bridge_orig")


# ------------------------------------------------------------------------------------------------------------
# Training from them


def train_from(ranks, path, stage: int, count: int, **changes) -> tuple:
    """One step; what the YAML leaves unsaid of the model comes from the weights."""
    shape = ("vision_backbone", "llm_backbone", "tokenizer", "add_action_tokens", "arch_specifier",
             "image_size")
    values = {key: value for key, value in TINY.items() if key not in shape}
    config = path / f"from{stage}.yaml"
    values |= {"run_root_dir": str(path / f"runs{stage}"), "max_steps": 1, **changes}
    config.write_text(yaml.safe_dump(values))
    done = ranks(count, config, "--deepspeed_config",
                 ds_json(path / "ds.json", stage, bf16=False))
    assert done.returncode == 0, done.text
    return read_metrics(path / f"runs{stage}")[1]["loss"], next((path / f"runs{stage}").iterdir()), done.text


def test_training_from_weights_is_the_same_for_every_stage(run, tmp_path, ranks):
    export_vla.export(str(run), tmp_path / "hf", "hf")
    (checkpoint,) = list_checkpoints(run / "checkpoints")
    first = []
    for stage, count, changes in ((0, 1, {"base_vlm": str(tmp_path / "hf")}), (3, 2, {"base_vlm": str(run)}),
                                  (2, 2, {"pretrained_checkpoint": str(checkpoint), "is_resume": False})):
        # another seed than the run's, whose frozen tower is as it was drawn; part frozen, part trained
        loss, _, text = train_from(ranks, tmp_path, stage, count, seed=8, freeze_vision_backbone=True, **changes)
        assert "weights_from" in text
        first.append(loss)
    np.testing.assert_allclose(first, first[0], rtol=1e-6)


@pytest.mark.parametrize("stage", [1, 3])
def test_frozen_weights_survive_training_saving_and_export(stage, run, tmp_path, ranks):
    """DeepSpeed's own ZeRO-1 checkpoints have lost them (DeepSpeed#5439)."""
    _, trained, _ = train_from(ranks, tmp_path, stage, 2, base_vlm=str(run), freeze_vision_backbone=True, seed=8)
    export_vla.export(str(trained), tmp_path / "native", "native")
    before, after = tensors(run), tensors(tmp_path / "native")
    assert before.keys() == after.keys()
    for name in before:
        frozen = name.startswith("vision_backbone")
        assert torch.equal(before[name], after[name]) == frozen, name


def test_beginning_with_a_language_models_own_weights(tmp_path, ranks):
    """Llama's weights from a directory, a larger vocabulary, towers from timm's files, a fresh projector."""
    import timm

    torch.manual_seed(1)
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY["llm_backbone"], vocab_size=500))
    llm.save_pretrained(tmp_path / "llm")
    tower = TINY["vision_backbone"]["dino"]
    kwargs = {key: value for key, value in tower.items() if key != "model"}
    vit = timm.create_model(tower["model"], num_classes=0, img_size=28, **kwargs)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    towers = {"dino": {**tower, "pretrained_cfg_overlay": {"file": str(tmp_path / "vit.safetensors")}}}
    changes = {"pretrained_backbones": True, "llm_backbone": str(tmp_path / "llm"), "image_size": 28,
               "vision_backbone": towers, "tokenizer": TINY["tokenizer"], "add_action_tokens": True,
               "learning_rate": 0.0}
    _, run, text = train_from(ranks, tmp_path, 3, 2, **changes)
    assert "weights_from" in text and "except projector, vision_backbone" in text
    shutil.rmtree(tmp_path / "llm")  # the run describes it
    assert load_vla(run).vla.llm.config.hidden_size == 32
    state = tensors(run)
    for name, value in llm.state_dict().items():
        ours = state[f"llm_backbone.llm.{name}"]
        assert torch.equal(ours[: len(value)], value), name
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            assert len(ours) > 500 and 0.01 < ours[500:].std() < 0.03
    for name, value in vit.state_dict().items():
        assert torch.equal(state[f"vision_backbone.featurizer.{name}"], value), name


MEMORY = """
import json, os, sys, psutil, deepspeed, torch
sys.path.insert(0, {root!r})
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as ranks.start_job does: a minute to compile
deepspeed.init_distributed()
from machinery.config import TrainConfig
from machinery.checkpoint import Tensors
from machinery.cost import training_flops
from machinery.weights import Weights
from train_vla import make_vla
from action_tokenizer import load_tokenizer
tokenizer = load_tokenizer({tokenizer!r}, True)
llm = dict(model_type="llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=12,
           num_attention_heads=8)
cfg = TrainConfig(vision_backbone={towers!r}, llm_backbone=llm, image_size=28, action_dim=4)
ds = json.load(open({ds!r})) | dict(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1)
before = psutil.Process().memory_info().rss
vla = make_vla(cfg, tokenizer, Weights(Tensors("any"), {{}}), True, ds)
import resource
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
size = 4 * sum(getattr(p, "ds_numel", p.numel()) for p in vla.parameters())
print(f"rank {{torch.distributed.get_rank()}} grown {{(peak - before) / size:.3f}}", flush=True)
whole = make_vla(cfg, tokenizer, None, False, {{}})  # work is counted alike however it is sharded
assert training_flops(vla, 20) == training_flops(whole, 20) > 0
"""


def test_under_zero3_no_rank_ever_holds_the_whole_model(tmp_path, ranks):
    script = tmp_path / "memory.py"
    script.write_text(MEMORY.format(root=str(ROOT), tokenizer=TINY["tokenizer"],
                                    towers=TINY["vision_backbone"], ds=str(ROOT / "ds_configs/zero3.json")))
    done = ranks(2, "none", script=script)
    # not by lines: two processes may print on one
    grown = [float(share) for share in re.findall(r"rank \d grown (\d\.\d{3})", done.text)]
    assert len(grown) == 2 and max(grown) < 0.75 and done.returncode == 0, done.text


def test_a_run_without_its_statistics_is_not_opened(colors, tmp_path):
    """It would load, and have no units to act in."""
    run = shutil.copytree(colors, tmp_path / "run")
    (run / "dataset_statistics.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"dataset_statistics\.json"):
        open_weights(run)
