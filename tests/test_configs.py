"""The YAML files of configs/: OpenVLA's experiments with its values, and its biggest mixture in training."""

import json
import re

import numpy as np
import pytest
import tensorflow_datasets as tfds
import yaml
from conftest import RLDS, ROOT, TINY, ds_json, read_metrics

from machinery import oxe
from machinery.config import TrainConfig, UserError, load_config, load_ds_config
from machinery.fields import CONSTANT, parse_fields
from machinery.rlds import write_rlds

CONFIGS = ROOT / "configs"

# OpenVLA's registry (prismatic/conf/vla.py), a row each:
# vla_id, base_vlm, data_mix, what is frozen (v: vision, l: language model but its last layer), global batch
REGISTRY = """
siglip-224px+mx-bridge                         siglip-224px+7b            bridge                    -  256
siglip-224px-icy+mx-bridge                     siglip-224px+7b            bridge                    v  256
prism-dinosiglip-224px+mx-bridge               prism-dinosiglip-224px+7b  bridge                    -  256
siglip-224px+mx-oxe-magic-soup                 siglip-224px+7b            oxe_magic_soup            -  2048
prism-dinosiglip-224px+mx-oxe-magic-soup-plus  prism-dinosiglip-224px+7b  oxe_magic_soup_plus_minus -  2048
siglip-224px+mx-tdroid_carrot_in_bowl          siglip-224px+7b            tdroid_carrot_in_bowl     -  256
siglip-224px+mx-tdroid_pour_corn_in_pot        siglip-224px+7b            tdroid_pour_corn_in_pot   -  256
siglip-224px-icy+mx-tdroid_carrot_in_bowl      siglip-224px+7b            tdroid_carrot_in_bowl     v  256
siglip-224px-last_layer+mx-tdroid_carrot_in_bowl siglip-224px+7b          tdroid_carrot_in_bowl     vl 256
siglip-224px-sandwich+mx-tdroid_carrot_in_bowl siglip-224px+7b            tdroid_carrot_in_bowl     l  256
siglip-224px+mx-droid_wipe                     siglip-224px+7b            droid_wipe                -  256
"""
ROWS = [row.split() for row in REGISTRY.strip().splitlines()]
# what all of them share, and the values of OpenVLA's train.py that are not in its registry
SHARED = {"epochs": 1000, "max_steps": None, "per_device_batch_size": 32, "learning_rate": 2e-5,
          "weight_decay": 0.0, "max_grad_norm": 1.0, "lr_scheduler_type": "constant", "warmup_ratio": 0.0,
          "save_interval": 2500, "seed": 7, "image_aug": False, "expected_world_size": None,
          "data_root_dir": "datasets/open-x-embodiment", "run_root_dir": "runs", "window_size": 1,
          "action_chunk": 1, "action_normalization": "bounds_q99", "cameras": ["primary"],
          "use_proprio": False}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_loads_and_its_datasets_are_known(path):
    cfg = load_config(path, [])
    assert path.stem in (cfg.vla_id, "oxe")  # named after the experiment; oxe.yaml is the headline command
    assert oxe.resolve_mixture(cfg.data_mix, cfg.datasets)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_openvlas_registry(row):
    vla_id, base_vlm, data_mix, frozen, global_batch = row
    name = "oxe" if vla_id.endswith("magic-soup-plus") else vla_id
    cfg = vars(load_config(CONFIGS / f"{name}.yaml", []))
    expected = {**SHARED, "vla_id": vla_id, "base_vlm": base_vlm, "data_mix": data_mix,
                "freeze_vision_backbone": "v" in frozen, "freeze_llm_backbone": "l" in frozen,
                "unfreeze_last_llm_layer": "l" in frozen, "global_batch_size": int(global_batch)}
    assert {key: cfg[key] for key in expected} == expected


STEPS = {"spatial": 25000, "object": 25000, "goal": 30000, "10": 40000}


@pytest.mark.parametrize("suite", STEPS)
def test_libero_fine_tunes(suite):
    """They see as many samples as OpenVLA's LoRA runs: 50, 50, 60 and 80 thousand steps of 128."""
    cfg = vars(load_config(CONFIGS / f"openvla-7b+libero_{suite}_no_noops.yaml", []))
    expected = {**SHARED, "data_mix": f"libero_{suite}_no_noops", "image_aug": True, "global_batch_size": 256,
                "pretrained_checkpoint": "openvla/openvla-7b", "is_resume": False, "max_steps": STEPS[suite]}
    assert {key: cfg[key] for key in expected} == expected


def test_a_config_states_only_what_differs():
    for path in CONFIGS.glob("*.yaml"):
        values = yaml.safe_load(path.read_text())
        if parent := values.pop("inherits", None):
            inherited = vars(load_config(path.with_name(parent), []))
            assert not [key for key, value in values.items() if inherited[key] == value], path.name


# ------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize("changes, words", [
    ({"learnin_rate": 1e-3}, "learnin_rate.*'learning_rate'"),
    ({"learning_rate": "fast"}, "learning_rate: 'fast'.*number"),
    ({"max_steps": 1.5}, "max_steps: 1.5.*integer"),
    ({"max_steps": "5"}, "max_steps: '5'.*integer"),
    ({"max_steps": 0}, "max_steps: 0.*1"),
    ({"image_aug": "always"}, "image_aug: 'always'.*boolean"),
    ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type: 'cosine'.*'linear-warmup"),
    ({"learning_rate": float("nan")}, "learning_rate: nan.*finite"),
    ({"warmup_ratio": 5.0}, "warmup_ratio: 5.0"),
    ({"warmup_ratio": 0.1}, "warmup_ratio .*lr_scheduler_type"),  # it would be ignored
    ({"keep_checkpoints": -1}, "keep_checkpoints.*: -1"),
    ({"save_interval": -1}, "save_interval: -1"),
    ({"lora_alpha": 0.0}, "lora_alpha: 0.0"),
    ({"pretrained_backbones": True, "llm_backbone": "some/llm", "base_vlm": "openvla/openvla-7b"},
     "pretrained_backbones .*openvla/openvla-7b.*remove"),
    ({"frozen_weights": "int8", "base_vlm": "openvla/openvla-7b"}, "frozen_weights: .*lora_rank"),
    ({"lora_rank": 8}, "lora_rank .*base_vlm"),
    ({"tokenizer": ""}, "tokenizer"),
    ({"max_prefix": 2}, "max_prefix 2: .*parallel_decoding"),
    ({"datasets": {"metaworld_demo": {"primay": "x"}}}, "metaworld_demo.primay.*'primary'"),
    ({"datasets": {"metaworld_demo": {"absolute": -1}}}, "metaworld_demo.absolute: -1"),
    ({"datasets": {"metaworld_demo": {"targets": -1}}}, "metaworld_demo.targets: -1"),
    ({"data_mix": {"metaworld_demo": "half"}}, "data_mix.*: 'half'.*number"),
    ({"run_root_dir": "$NOT_SET/runs"}, r"\$NOT_SET.*not set"),  # a folder of this name would be made
])
def test_a_mistake_in_the_yaml_is_named(changes, words, tiny):
    with pytest.raises(UserError, match=words) as error:
        load_config(tiny(**changes))
    assert "\n" not in str(error.value)


def test_mistakes_in_files_and_overrides(tiny, tmp_path):
    with pytest.raises(UserError, match=r"--set max_steps: .*key=value"):
        load_config(tiny(), ["max_steps"])
    with pytest.raises(UserError, match=r"--set data_mix=\{a: 1: .*line 1"):
        load_config(tiny(), ["data_mix={a: 1"])
    with pytest.raises(UserError, match=r"max_stps.*'max_steps'"):
        load_config(tiny(), ["max_stps=3"])
    path = tmp_path / "odd.yaml"
    for text, words in [("seed: 1\nseed: 2\n", "duplicate.*'seed'"), ("on: 1\n", "True"),
                        ("run_id: 2026-13-45\n", "month"), ("run_id: \x07\n", "character")]:
        path.write_text(text)
        with pytest.raises(UserError, match=f"{path}: .*{words}"):
            load_config(path)


def test_values_that_mean_something(tiny):
    intervals = ["save_interval=0", "log_interval=0", "eval_interval=0"]
    cfg = load_config(tiny(), ["learning_rate=2e-5", "keep_checkpoints=none", *intervals])
    assert cfg.learning_rate == 2e-5 and cfg.keep_checkpoints == "none"


@pytest.mark.parametrize("change, words", [
    ({"train_batch_size": 8}, "remove train_batch_size: .*global_batch_size"),
    ({"train_batch_size": "auto"}, "remove train_batch_size"),
    ({"gradient_clipping": 1.0}, "remove gradient_clipping: .*max_grad_norm"),
    ({"scheduler": {"type": "WarmupLR"}}, "remove scheduler: .*lr_scheduler_type"),
    ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}},
     "remove optimizer.params.lr: .*learning_rate"),
    ({"fp16": {"enabled": True}}, "remove fp16.enabled"),
    ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
     "remove .*round_robin_gradients: .*wrong"),
    ({"zero_optimization": {"stage": 2, "cpu_offload": True}},
     "remove .*cpu_offload: .*offload_optimizer"),
    ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
     "remove .*quantized_weights: .*rounds"),
    ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}},
     "remove .*quantized_gradients: .*wrong"),
    ({"optimizer": {"type": "AdamW", "params": {"amsgrad": True}}},
     "remove optimizer.params.amsgrad"),
    ({"optimizer": {"type": "AdamW", "params": {"beta": 1}}},
     "optimizer.params.beta: unknown.*'betas'"),
    ({"optimizer": {"type": "SGD"}}, "optimizer.*AdamW"),
    ({"optimizer": {}}, "optimizer.*AdamW"),
    ({"zero_optimisation": {"stage": 3}}, "zero_optimisation: unknown.*'zero_optimization'"),
    ({"bf_16": {"enabled": True}}, "bf_16: unknown.*'bf16'"),
    ({"activation_checkpointng": {}},
     "activation_checkpointng: unknown.*'activation_checkpointing'"),
    ({"activation_checkpointing": {"cpu_checkpointing": True}}, "cpu_checkpointing: unknown"),
    ({"data_types": {"grad_acum_dtype": "fp32"}}, "grad_acum_dtype: unknown.*'grad_accum_dtype'"),
    ({"zero_optimization": {"stage": "auto"}}, 'zero_optimization.stage: .*"auto"'),
    ({"zero_optimization": {"stage": "3"}}, 'zero_optimization.stage: .*"3"'),
    ({"zero_optimization": {"stage": 2, "overlap_comm": "False"}}, 'overlap_comm: .*"False"'),
    ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "5e8"}},
     'reduce_bucket_size: .*"5e8"'),
])
def test_what_deepspeed_would_ignore_or_the_yaml_sets(change, words, tmp_path):
    path = ds_json(tmp_path / "ds.json", 2, **change)
    with pytest.raises(UserError, match=words):
        load_ds_config(path)


@pytest.mark.parametrize("text, words", [
    ('{"zero_optimization": {"stage": 3}, "zero_optimization": {"stage": 1}}',
     "duplicate.*'zero_optimization'"),
    ('{"bf16": {"enabled": true}}  // why', "line 1"),
    ('{"bf16": {"enabled": true}', "line 2"),
    ('{"bf16": {"bf16_optimizer_states": true}}', "remove bf16.bf16_optimizer_states: .*moments"),
    ('{"bf16": {"enabled": "False"}}', 'bf16.enabled: .*"False"'),
])
def test_a_json_that_cannot_be_read_or_trains_in_another_precision(text, words, tmp_path):
    (tmp_path / "ds.json").write_text(text + "\n")
    with pytest.raises(UserError, match=f"ds.json: .*{words}"):
        load_ds_config(tmp_path / "ds.json")


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_every_json_loads(path):
    assert load_ds_config(path) == json.loads(path.read_text())


# ------------------------------------------------------------------------------------------------------------
# Magic Soup++

COLUMNS = {"world_vector": 3, "rotation_delta": 3, "gripper_closedness_action": 1}
BROKEN = "cmu_stretch"  # gets one more episode, which is not finite
TINY_MODEL = {key: TINY[key] for key in (
    "vision_backbone", "arch_specifier", "llm_backbone", "tokenizer", "add_action_tokens", "image_size")}


def synthesize(name: str, root) -> None:
    """Write four small episodes with the image, actions and text that the dataset's recipe reads."""
    f, recipe, rng = tfds.features, oxe.DATASETS[name], np.random.default_rng(0)
    features, step = {"observation": {}, "action": {}}, {"observation": {}, "action": {}}

    def add(key, feature, value):
        *folder, leaf = key.split("/")
        for tree, item in ((features, feature), (step, value)):
            (tree[folder[0]] if folder else tree)[leaf] = item

    add(f"observation/{recipe.primary}", f.Image(shape=(16, 16, 3)), np.full((16, 16, 3), 99, np.uint8))
    add(recipe.instruction, f.Text(), "lift the cup")
    for key in (field.key for field in parse_fields(recipe.action)):
        if not CONSTANT.fullmatch(key):
            columns = COLUMNS.get(key.split("/")[-1], 8)  # where nothing is said, recipes cut 7 of 8
            add(key, f.Tensor(shape=(columns,), dtype=np.float32), np.float32(rng.uniform(0, 0.4, columns)))
    episodes = [{"steps": [step] * 6}] * 4
    if name == BROKEN:
        episodes = [{"steps": [{**step, "action": np.float32([np.nan] * 8)}]}, *episodes]
    write_rlds(root, name, "1.0.0", {"steps": f.Dataset(features)}, {"train": episodes})


@pytest.fixture(scope="module")
def magic_soup(tmp_path_factory):
    """A folder with all 27 datasets of Magic Soup++, those that the fixtures lack made up."""
    root = tmp_path_factory.mktemp("oxe")
    for name, _, _ in oxe.resolve_mixture("oxe_magic_soup_plus"):
        if (RLDS / "data" / name).exists():
            (root / name).symlink_to(RLDS / "data" / name)
        else:
            synthesize(name, root)
    return root


@pytest.mark.parametrize("data_mix, count", [
    ("oxe_magic_soup_plus", 27), pytest.param("oxe_magic_soup_plus_minus", 25, marks=pytest.mark.slow)])
def test_magic_soup_trains_and_every_dataset_is_reported(data_mix, count, magic_soup, tmp_path, ranks):
    """20 steps of 32 samples with configs/oxe.yaml and a tiny model; the rarest dataset is one in 315."""
    values = {"inherits": str(CONFIGS / "oxe.yaml"), "base_vlm": None, **TINY_MODEL, "data_mix": data_mix,
              "data_root_dir": str(magic_soup), "index_dir": str(magic_soup / "index"), "num_workers": 0,
              "skip_bad_episodes": True, "max_steps": 20, "log_interval": 20, "eval_interval": 0,
              "global_batch_size": 32, "per_device_batch_size": 16, "run_root_dir": str(tmp_path / "runs")}
    (tmp_path / "soup.yaml").write_text(yaml.safe_dump(values))
    done = ranks(2, tmp_path / "soup.yaml", "--deepspeed_config", "ds_configs/cpu.json")
    assert done.returncode == 0, done.text
    assert re.search(f"warning: .*{BROKEN}.* bad episode", done.text), done.text
    metrics = read_metrics(tmp_path / "runs")[20]
    names = [name for name, _, _ in oxe.resolve_mixture(data_mix)]
    assert len(names) == count
    for name in names:
        assert 0 <= metrics[f"accuracy/{name}"] <= 1 and 0 <= metrics[f"l1/{name}"] <= 2
    (run,) = (tmp_path / "runs").iterdir()
    assert set(json.loads((run / "dataset_statistics.json").read_text())) == set(names)


# ------------------------------------------------------------------------------------------------------------
# The guide for those who come from OpenVLA


def test_the_options_that_the_guide_names_exist():
    """`key:` anywhere, and options that are said to be the same."""
    text = (ROOT / "docs/openvla_options.md").read_text()
    same = [row.split("|")[1] for row in text.splitlines() if row.startswith("|") and "| same" in row]
    named = re.findall(r"`(\w+):[^`]*`", text) + re.findall(r"`(\w+)`", " ".join(same))
    assert len(named) > 40 and set(named) <= TrainConfig.model_fields.keys() | {"inherits"}
