"""OpenVLA-OFT's checkpoints in and out, and training with its head, against its own outputs
(tests/fixtures/oft)."""

import base64
import json
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from conftest import FIXTURES, LLAMA_TOKENIZER, TINY, ds_json, open_mixture, read_metrics
from safetensors.torch import save_file

import export_vla
from act import load_vla
from action_tokenizer import load_tokenizer
from machinery import examine, oft, wire
from machinery.checkpoint import Checkpoint, CheckpointError, list_checkpoints
from machinery.config import TrainConfig, UserError, load_config
from machinery.weights import hugging_face_to_ours, open_weights, rename
from train_vla import scheduled_learning_rate

OFT = FIXTURES / "oft"
CASES = json.loads((OFT / "cases.json").read_text())
L1 = [name for name in CASES if not name.startswith("token")]
IMAGE = np.full((96, 96, 3), 90, np.uint8)


def checkpoint(variant: str, folder, **told):
    """The directory of an OFT checkpoint. The sizes of its towers, which OFT's config.json cannot hold, are
    where exports of this project have them. told: zerovla.json."""
    facts = CASES[variant]
    robot = OFT / ("aloha" if variant.startswith("aloha") else "libero")
    folder.mkdir(exist_ok=True)
    for file in [*LLAMA_TOKENIZER.iterdir(), *robot.iterdir()]:
        part = file.name.partition("--")[0]
        if (part != "action_head" or variant in L1) and (part != "proprio_projector" or facts["use_proprio"]):
            shutil.copyfile(file, folder / file.name)
    weights = dict(np.load(OFT / "model.npz"))
    if facts["use_film"]:
        weights |= dict(np.load(OFT / "film.npz"))
        shutil.copy(next((OFT / "film").iterdir()), folder)
    tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    ours = hugging_face_to_ours(config) | {"llm_backbone": facts["text_config"]}
    for tower, sizes in zip(ours["vision_backbone"].values(), facts["towers"].values(), strict=True):
        tower.update({key: value for key, value in sizes.items() if key != "timm"})
    (folder / "config.json").write_text(json.dumps(config | {"zerovla": ours}))
    if told:
        (folder / "zerovla.json").write_text(json.dumps(told))
    return folder


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    """{variant: the policy of its checkpoint}, loaded once."""
    found = {}

    def policy(variant):
        if variant not in found:
            told = {"action_head": "oft_tokens"} if variant not in L1 else {}
            found[variant] = load_vla(checkpoint(variant, tmp_path_factory.mktemp(variant), **told))
        return found[variant]

    return policy


def requests(variant):
    """The golden requests: arguments of predict_action."""
    facts, arrays = CASES[variant], np.load(OFT / f"{variant}.npz")
    for i in range(facts["cases"]):
        state = arrays[f"proprio_raw_{i}"] if facts["use_proprio"] else None
        yield i, arrays, (list(arrays[f"images_raw_{i}"]), facts["instructions"][i], facts["unnorm_key"], state)


# ---- Acting ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", L1)
def test_actions_from_pictures_text_and_state(variant, policies):
    policy = policies(variant)
    limit = 1e-4 if CASES[variant]["use_film"] else 5e-5
    asked = [*requests(variant)]
    for i, arrays, request in asked:
        action = policy.predict_action(*request)
        np.testing.assert_allclose(action, arrays[f"actions_{i}"], atol=limit, rtol=0)
    views, texts, (key, *_), states = zip(*(request for *_, request in asked), strict=True)
    states = None if states[0] is None else np.stack(states)
    for action, (i, arrays, _) in zip(policy.predict_action(views, texts, key, states), asked, strict=True):
        np.testing.assert_allclose(action, arrays[f"actions_{i}"], atol=limit, rtol=0)  # padding is not seen


@pytest.mark.parametrize("head", ["oft_tokens", "oft_tokens_causal"])
def test_token_ids(head, tmp_path):
    policy = load_vla(checkpoint("token_1cam", tmp_path, action_head=head))
    which = "causal_" if head == "oft_tokens_causal" else ""
    for i, arrays, request in requests("token_1cam"):
        ids = policy.generate(*policy.prepare([request[0]], [request[1]], None, None))
        assert ids.flatten().tolist() == arrays[f"{which}argmax_action_ids_{i}"].flatten().tolist()
        expected = arrays[f"{which}actions_restricted_{i}"]
        np.testing.assert_allclose(policy.predict_action(*request), expected, atol=1e-12)


def test_the_corners_of_a_state():
    stats = {"q01": [-1.0, 0.0, 0.2, -1.0], "q99": [1.0, 0.0, 0.2, 1.0], "mask": [True, True, True, False]}
    rows = np.array([[3.0, 3e-9, 0.2, 5.0], [-3.0, 7e-9, 0.3, 0.5], [0.5, 0.0, 0.1, -7.0]])
    found = oft.normalize_state(rows, stats, "bounds_q99")
    np.testing.assert_allclose(found, [[1, -0.4, -1, 1], [-1, 0.4, 1, 0.5], [0.5, -1, -1, -1]], atol=1e-6)


def test_a_request_s_state_keeps_its_digits(tmp_path, policies):
    """A constant dimension amplifies them by 1e8."""
    policy = policies("l1_2cam_proprio")
    stats = policy.norm_stats["libero_spatial_no_noops"]["proprio"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(stats, "q01", [0.04] * 8)
        patch.setitem(stats, "q99", [0.04] * 8)
        state = policy.prepare([[IMAGE] * 2], ["open"], None, np.full((1, 8), 0.04 + 3e-9))[2]
    torch.testing.assert_close(state, torch.full((1, 8), -0.4), atol=1e-3, rtol=0)


def change_part(folder, part, change):
    (file,) = folder.glob(f"{part}--*")
    state = torch.load(file, weights_only=True)
    torch.save(change(state), file)


@pytest.mark.parametrize("spoil, message", [
    (lambda d: next(d.glob("action_head*")).unlink(), r"action_head--\*_checkpoint.pt is missing"),
    (lambda d: (d / "dataset_statistics.json").unlink(), "dataset_statistics.json is missing"),
    (lambda d: next(d.glob("model.safe*")).unlink(), "model.safetensors"),
    (lambda d: ((d / "config.json").unlink(), (d / "lora_adapter").mkdir()), "merge_lora_weights"),
    (lambda d: (d / "noisy_action_projector--1_checkpoint.pt").write_text(""), "diffusion.*nonsense"),
    (lambda d: (d / "action_head--7_checkpoint.pt").write_text(""), "remove one of them"),
    (lambda d: next(d.glob("action_head*")).write_bytes(b"PK"), "action_head.*damaged"),
    (lambda d: change_part(d, "action_head", lambda s: {"module.noise.weight": torch.ones(2)}), "not OFT's L1"),
    (lambda d: change_part(d, "action_head", lambda s: s | {"module.model.new": torch.ones(2)}), "unexpected action"),
    (lambda d: change_part(d, "action_head", lambda s: s | {"module.model.fc2.weight": torch.ones(6, 64)}),
     "actions of 6 numbers.*action_chunk.*zerovla.json"),
    (lambda d: (d / "zerovla.json").write_text('{"tokenizer": "/etc"}'), "zerovla|may not"),
])
def test_what_is_missing_or_unknown_is_named(spoil, message, tmp_path):
    folder = checkpoint("l1_2cam_proprio", tmp_path)
    spoil(folder)
    with pytest.raises((UserError, OSError), match=message) as error:
        load_vla(folder)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


class Evil:
    def __reduce__(self):
        return eval, ("open('/tmp/never', 'w')",)


def test_code_in_a_part_is_not_run(tmp_path):
    folder = checkpoint("l1_1cam", tmp_path)
    torch.save({"module.model.fc2.weight": Evil()}, next(folder.glob("action_head*")))
    with pytest.raises(CheckpointError, match=r"action_head.*more than tensors"):
        load_vla(folder)


def test_the_token_variant_asks_how_it_attends(tmp_path):
    folder = checkpoint("token_1cam", tmp_path)
    (folder / "modeling_prismatic.py").write_text("from prismatic.vla.constants import NUM_ACTIONS_CHUNK\n")
    with pytest.raises(CheckpointError, match=r'"action_head": "oft_tokens".*zerovla.json.*oft_tokens_causal'):
        load_vla(folder)
    (folder / "zerovla.json").write_text('{"action_head": "oft_tokens_causal", "action_chunk": 5}')
    assert load_vla(folder).predict_action(IMAGE, "open").shape == (5, 7)


def test_more_can_be_told_and_a_note_says_what_was_assumed(tmp_path, capsys):
    folder = checkpoint("l1_1cam", tmp_path, cameras=["primary", "side"], action_chunk=3)
    policy = load_vla(folder)
    assert policy.predict_action([IMAGE] * 2, "open").shape == (3, 7)
    assert "chunks of 3 steps, cameras primary, side, bounds_q99" in capsys.readouterr().err
    with pytest.raises(UserError, match="this model takes up to 0"):
        policy.predict_action([IMAGE] * 2, "open", prefix=np.zeros((1, 7)))


# ---- Training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", CASES)
def test_loss_and_gradients(variant, policies):
    facts, arrays = CASES[variant], np.load(OFT / f"{variant}.npz")
    batch = {name: torch.from_numpy(arrays[f"train_{name}"]) for name in ("images", "input_ids", "labels", "actions")}
    batch["images"] = batch["images"].view(2, facts["cameras"], 56, 56, 3)
    if facts["use_proprio"]:
        batch["proprio"] = torch.from_numpy(arrays["train_proprio"])
    vla = policies(variant).vla.requires_grad_(True)
    vla.zero_grad()
    loss, predicted, true = vla(**batch)
    loss.backward()
    assert abs(loss.item() - facts["train_loss"]) < 2e-5
    expected = batch["input_ids"].gather(1, (batch["labels"] != -100).int().argmax(1, keepdim=True)
                                         + torch.arange(predicted.shape[1]))
    assert true.tolist() == expected.tolist()  # the ids of actions beside the numbers
    norms = {}
    for name, param in vla.named_parameters():
        part, _, rest = name.partition(".")
        if part == "film":
            name = f"vla.{rename(f'vision_backbone.{rest}'.replace('featurizer.', 'featurizer.blocks.'), TOWERS, True)}"
        elif part == "proprio_projector":
            name = name.replace(".0.", ".fc1.").replace(".2.", ".fc2.")
        elif part != "action_head":
            name = f"vla.{rename(name, TOWERS, True)}"
        norms[name] = param.grad.norm().item() if param.grad is not None else 0.0
    golden = {re.sub(r"base_layer\.|(?<=\d\.)block\.|vision_backbone\.(?=vision)", "", name): norm or 0.0
              for name, norm in facts["grad_norms"].items()}
    assert norms.keys() == golden.keys()
    assert sum(norm > 0 for norm in golden.values()) > 80
    for name, norm in golden.items():
        assert norms[name] == pytest.approx(norm, rel=1e-3), name


def test_a_batch_padded_further_is_the_same(policies):
    """As cuda_graph.py pads it."""
    arrays = np.load(OFT / "l1_2cam_proprio_film.npz")
    batch = {name: torch.from_numpy(arrays[f"train_{name}"])
             for name in ("images", "input_ids", "labels", "actions", "proprio")}
    vla = policies("l1_2cam_proprio_film").vla
    batch["input_ids"] = torch.nn.functional.pad(batch["input_ids"], (0, 5))
    batch["labels"] = torch.nn.functional.pad(batch["labels"], (0, 5), value=-100)
    assert abs(vla(**batch)[0].item() - CASES["l1_2cam_proprio_film"]["train_loss"]) < 2e-5


TOWERS = ("dino", "siglip")


def test_predicted_ids_are_those_of_the_tokenizer(policies):
    vla = policies("l1_1cam").vla
    values = torch.linspace(-1.1, 1.1, 4001)
    assert vla.ids_of(values).tolist() == vla.action_tokenizer.encode(values.numpy()).tolist()


HEAD = {"action_head": "l1", "action_chunk": 4}
FILMED = {**HEAD, "film": True, "use_proprio": True}


def test_numbers_come_from_the_same_data_as_tokens(tmp_path):
    cfg = TrainConfig(**{**TINY, **FILMED, "index_dir": str(tmp_path)})
    tokenizer = load_tokenizer(cfg.tokenizer, True)
    plain = open_mixture(cfg, tokenizer)
    mixture = oft.OftMixture(plain.cfg, list(zip(
        plain.names, [1.0], plain.recipes, plain.tables, strict=True)), tokenizer)
    sample, tokens = mixture.sample(0, 700), plain.sample(0, 700)
    assert sample.keys() - tokens.keys() == {"actions"}
    assert sample["actions"].shape == (4, 4) and sample["actions"].dtype == np.float32
    answer = tokens["labels"][tokens["labels"] != -100][:-1]
    assert mixture.action_tokenizer.encode(sample["actions"].flatten()).tolist() == answer.tolist()
    state = mixture.tables[0].frames[700]["proprio"].astype(np.float64)
    expected = oft.normalize_state(state, mixture.statistics[mixture.names[0]]["proprio"], "bounds_q99")
    assert sample["proprio"].tolist() == expected.tolist()


@pytest.mark.parametrize("changes, message", [
    ({"film": True}, "film: needs action_head"), ({**HEAD, "max_prefix": 2}, "max_prefix 2"),
    ({"num_steps_before_decay": 5, "lr_scheduler_type": "linear-warmup+cosine-decay"}, "num_steps_before_decay")])
def test_keys_without_effect(changes, message, tiny):
    with pytest.raises(UserError, match=message):
        load_config(tiny(**changes))


def test_the_learning_rate_falls_once():
    cfg = TrainConfig(learning_rate=1e-3, num_steps_before_decay=3)
    assert [scheduled_learning_rate(cfg, step, 9) for step in (0, 2, 3, 8)] == [1e-3, 1e-3, 1e-4, 1e-4]


@pytest.fixture(scope="module")
def run(tmp_path_factory, plain_run):
    """A run with FiLM and states, all trained."""
    folder = tmp_path_factory.mktemp("film")
    done = plain_run(write_yaml(folder, **FILMED), "--deepspeed_config", "ds_configs/cpu.json")
    assert done.returncode == 0, done.text
    return folder / "runs/vla"


def write_yaml(folder, **changes):
    values = {**TINY, "run_root_dir": str(folder / "runs"), "run_id": "vla", "max_steps": 8, "index_dir": str(folder),
              "eval_samples": 8, "global_batch_size": 8, "per_device_batch_size": 4, **changes}
    (folder / "oft.yaml").write_text(yaml.safe_dump(values))
    return folder / "oft.yaml"


def test_a_run_learns_and_acts(run):
    steps = [*read_metrics(run.parent).values()]
    losses = [step["loss"] for step in steps if "loss" in step]
    assert np.mean(losses[-3:]) < 0.8 * losses[0]
    assert 0 < steps[-1]["eval/accuracy"] < 1 and steps[-1]["eval/l1"] < 1
    policy = load_vla(run)
    actions = policy.predict_action(IMAGE, "open the drawer", None, np.zeros(len(policy.convention(None).state)))
    assert actions.shape == (4, 4) and np.isfinite(actions).all()


def tensors_of(where):
    tensors = open_weights(where).tensors
    return {name: tensors.whole(name) for name in tensors.shapes}


def same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("form", ["oft", "native"])
def test_exports_of_a_run_are_read_back_exactly(form, run, tmp_path, capsys):
    export_vla.export(str(run), tmp_path / "out", form)
    same(tensors_of(run), tensors_of(tmp_path / "out"))
    assert open_weights(tmp_path / "out").config["film"]
    state = np.zeros(len(load_vla(run).convention(None).state))
    ours, theirs = (load_vla(where).predict_action(IMAGE, "open", None, state) for where in (run, tmp_path / "out"))
    assert ours.tolist() == theirs.tolist()
    if form == "oft":
        assert "NUM_ACTIONS_CHUNK 4, ACTION_DIM 4, PROPRIO_DIM 4" in capsys.readouterr().out
        with pytest.raises(CheckpointError, match="--format hf does not fit action_head l1"):
            export_vla.export(str(run), tmp_path / "hf", "hf")


@pytest.mark.parametrize("variant", ["l1_2cam_proprio", "l1_2cam_proprio_film"])
def test_an_imported_checkpoint_is_exported_with_the_same_files(variant, tmp_path):
    folder = checkpoint(variant, tmp_path / "theirs")
    export_vla.export(str(folder), tmp_path / "native", "native")
    same(tensors_of(folder), tensors_of(tmp_path / "native"))
    export_vla.export(str(tmp_path / "native"), tmp_path / "out", "oft")
    same(tensors_of(folder), tensors_of(tmp_path / "out"))
    for file in folder.glob("*--*.pt"):
        part = file.name.partition("--")[0]
        (out,) = (tmp_path / "out").glob(f"{part}--*checkpoint.pt")
        theirs, ours = torch.load(file, weights_only=True), torch.load(out, weights_only=True)
        assert {name: x.shape for name, x in theirs.items()} == {name: x.shape for name, x in ours.items()}
        if part != "vision_backbone":
            same(theirs, ours)
    _, arrays, request = next(requests(variant))
    np.testing.assert_allclose(load_vla(tmp_path / "out").predict_action(*request), arrays["actions_0"], atol=1e-4)


def test_adapters_beside_a_head_trained_whole_on_two_ranks(run, tmp_path, ranks):
    """From a run: --set base_vlm. The head continues, and each stage of ZeRO takes the same steps."""
    losses = {}
    for stage in (2, 3):
        folder = tmp_path / str(stage)
        folder.mkdir()
        config = write_yaml(folder, **FILMED, base_vlm=str(run), lora_rank=4, max_steps=3, keep_checkpoints=1)
        done = ranks(2, config, "--deepspeed_config", ds_json(folder / "ds.json", stage, bf16=False))
        assert done.returncode == 0, done.text
        losses[stage] = [values["loss"] for values in read_metrics(folder / "runs").values() if "loss" in values]
    assert losses[2] == pytest.approx(losses[3], rel=1e-5) and losses[2][2] < losses[2][0]
    trained = Checkpoint(list_checkpoints(folder / "runs/vla/checkpoints")[-1]).shapes
    assert {name.split(".")[0] for name in trained if "lora" not in name} == {"action_head", "film", "proprio_projector"}
    assert any("vision_backbone" in name for name in trained)
    state = np.zeros(len(load_vla(run).convention(None).state))
    assert np.isfinite(load_vla(folder / "runs/vla").predict_action(IMAGE, "open", None, state)).all()


def test_blocks_that_recompute_see_the_same_instruction(policies):
    """Recomputation in the backward pass reads FiLM's numbers again."""
    arrays = np.load(OFT / "l1_2cam_proprio_film.npz")
    vla = policies("l1_2cam_proprio_film").vla.requires_grad_(True)
    batch = {name: torch.from_numpy(arrays[f"train_{name}"])
             for name in ("images", "input_ids", "labels", "actions", "proprio")}
    gradients = []
    for again in (False, True):
        if again:
            vla.recompute_activations()
        vla.zero_grad()
        vla(**batch)[0].backward()
        gradients.append({name: p.grad for name, p in vla.named_parameters() if p.grad is not None})
    for block in vla.blocks:
        del block.forward
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


# ---- Other programs ----------------------------------------------------------------------------------------


def test_the_likelihood_of_numbers(run, tmp_path):
    policy = load_vla(run)
    mixture = examine.open_data(policy, "metaworld_demo", None, str(tmp_path))[0]
    batch = next(examine.batches(mixture, [3, 500], "cpu"))
    found = examine.log_likelihood(policy.vla, batch)
    assert found.shape == (2, policy.vla.num_action_tokens)
    loss = policy.vla(**batch)[0].item()
    assert -found.mean().item() == pytest.approx(1 + np.log(255 * loss), abs=0.3)  # of each sample, exactly so


def test_evaluation_and_the_doctor_take_it(run, tmp_path, commands):
    jobs = [("", {}, "eval_vla.py", ["--checkpoint", run, "--samples", "16"]),
            ("", {}, "doctor.py", [TINY["data_root_dir"] + "/metaworld_demo", "--checkpoint", run, "--index_dir", tmp_path,
                                   "--out", tmp_path / "page.html"])]
    for status, text in commands(*jobs):
        assert status == 0, text


def test_ofts_client_is_answered(policies):
    policy = policies("l1_2cam_proprio")
    _, arrays, ((full, wrist), text, _, state) = next(requests("l1_2cam_proprio"))
    sent = {"full_image": wire.encode_array(full), "wrist_image": wire.encode_array(wrist), "instruction": text,
            "state": wire.encode_array(state)}
    query = wire.parse_request(json.dumps(sent).encode(), policy)
    reply = wire.encode_action(policy.predict_action(query.views, query.instruction, query.unnorm_key, query.proprio),
                               query)
    steps = [np.frombuffer(base64.b64decode(step["__numpy__"]), step["dtype"]) for step in reply]
    np.testing.assert_allclose(steps, arrays["actions_0"], atol=5e-5)
