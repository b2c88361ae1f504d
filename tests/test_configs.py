"""The YAML files of configs/: OpenVLA's experiments with its values, and its biggest mixture in training."""

import json
import re

import numpy as np
import pytest
import tensorflow_datasets as tfds
import yaml
from conftest import RLDS, ROOT, TINY, read_metrics

from machinery import oxe
from machinery.config import TrainConfig, load_config
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
    assert f"warning: {BROKEN}: left out 1 bad episodes, the first: " in done.text
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
