"""doctor.py: it ranks corrupted episodes first and names the mistake; its page holds all, and only, the data."""

import io
import json
import re
import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, open_mixture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from robots import ROBOTS
from test_libero import rollout as libero

import doctor
from machinery import causes, causes_actions, causes_model, causes_state, examine, peers, report
from machinery.causes_rollout import rollout_causes
from machinery.config import Recipe, TrainConfig
from machinery.frames import frame_table
from machinery.images import decode_native
from machinery.inspect_data import Subject

BENCH = runpy.run_path(str(ROOT / "bench/bad_demonstrations.py"))
READINGS = {"pictures": "pictures do not match", "text": "fits the instruction", "mirrored": "pictures mirrored",
            "shifted": "actions of", "sign": "turned round", "noise": "noisy"}

pytestmark = pytest.mark.usefixtures("index_here")


@pytest.fixture(scope="module")
def corrupted(tmp_path_factory):
    """The demo's dataset with one episode of each kind corrupted -> (its directory, {episode: kind})."""
    folder = tmp_path_factory.mktemp("corrupted")
    source = ROOT / "datasets/metaworld_demo/1.0.0"
    kinds = BENCH["write_corrupted"](source, folder, "metaworld_demo", 0.05, 0)
    return folder / "metaworld_demo", kinds


def run(monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["doctor.py", *map(str, arguments)])
    doctor.main()
    return capsys.readouterr().out


def facts_of(page: str) -> dict:
    return json.loads(re.search(r'id="facts">(.*?)</script>', page, re.DOTALL)[1])


# ------------------------------------------------------------------------------------------------------------
# The program


def test_the_corrupted_episodes_are_the_worst_and_named(corrupted, monkeypatch, capsys, tmp_path):
    directory, kinds = corrupted
    printed = run(monkeypatch, capsys, directory, "--config", ROOT / "configs/demo.yaml",
                  "--out", tmp_path / "report.html")
    lines = re.findall(r"^wrong episode (\d+) .*?: (.*)$", printed, re.MULTILINE)
    worst = {int(number): why for number, why in lines[:6]}
    assert worst.keys() == kinds.keys()
    for number, kind in kinds.items():
        assert READINGS[kind] in worst[number], kind
    numbers = json.loads((tmp_path / "report.json").read_text())["episodes"]
    assert len(numbers) == 144 and {entry["episode"] for entry in numbers[:6]} == kinds.keys()
    assert all(entry["record"] == entry["episode"] for entry in numbers[:6])  # of the only training shard

    page = (tmp_path / "report.html").read_text()
    facts = facts_of(page)
    assert len(page) < 10 << 20
    assert set(re.findall(r"https?://[^\"]*", page)) == {"http://www.w3.org/2000/svg"}  # nothing is fetched
    assert not re.search(r"@import|url\(|fetch\(|<link|(src|href)=", page)
    assert {"120", "24", "2,958"} <= {value for _, value in facts["tiles"]}
    assert len(facts["dims"]) == 8 and all(sum(dim["counts"]) == 2958 for dim in facts["dims"])
    played = {episode["number"]: episode for episode in facts["episodes"]}
    first = played[int(lines[0][0])]
    assert len(first["pictures"]["image"]) == first["count"] and len(first["action"]) == first["count"]
    assert [row["cells"][0] for row in facts["lists"][0]["rows"][:6]] == [number for number, _ in lines[:6]]


def test_with_a_policy_it_sees_with_its_eyes_and_reports_its_loss(corrupted, random_policy, monkeypatch, capsys,
                                                                  tmp_path):
    """The policy has random weights: its eyes are enough to find most of them."""
    directory, kinds = corrupted
    monkeypatch.setattr(examine, "open_policy", lambda checkpoint: random_policy)
    printed = run(monkeypatch, capsys, directory, "--checkpoint", "a run", "--out", tmp_path / "report.html")
    numbers = json.loads((tmp_path / "report.json").read_text())["episodes"]
    worst = {entry["episode"] for entry in numbers[:8]}
    assert len(worst & kinds.keys()) >= 5
    assert all(entry["loss"] == pytest.approx(np.log(256), abs=1) for entry in numbers)
    assert " loss " in printed and "loss" in facts_of((tmp_path / "report.html").read_text())["lists"][0]["columns"]


def test_the_worst_are_left_out(corrupted, monkeypatch, capsys, tmp_path):
    directory, kinds = corrupted
    printed = run(monkeypatch, capsys, directory, "--config", ROOT / "configs/demo.yaml", "--leave_out", 6,
                  "--index_dir", tmp_path / "index", "--out", tmp_path / "report.html")
    assert "skip_bad_episodes: true" in printed
    table = frame_table(directory / "1.0.0", Recipe(primary="image"), ["image"], False,
                        index_dir=str(tmp_path / "index"), skip_bad_episodes=True)
    assert len(table.episodes) == 144 - 6
    records = table.episodes["record"][table.episodes["split"] == 0]
    assert not set(records.tolist()) & kinds.keys()


def test_another_width_and_a_folder_that_cannot_be_written(corrupted, random_policy, monkeypatch, capsys, tmp_path):
    directory, _ = corrupted
    with pytest.raises(SystemExit, match="--out"):
        run(monkeypatch, capsys, directory, "--out", tmp_path / "missing" / "report.html")
    random_policy.cfg.action_dim = 7
    monkeypatch.setattr(examine, "open_policy", lambda checkpoint: random_policy)
    with pytest.raises(SystemExit, match="4 dimensions, the policy's 7"):
        run(monkeypatch, capsys, directory, "--checkpoint", "a run", "--out", tmp_path / "report.html")


# ------------------------------------------------------------------------------------------------------------
# Other robots


def ranked(robot) -> list:
    table = robot.table()
    subject = Subject("robot", table.directory, robot.own_recipe, "test")
    return doctor.rank(subject, table)[0]


@pytest.mark.parametrize("name, kind", [("bimanual", "mirrored"), ("changes", "pictures"),
                                        ("mobile_base", "shifted")])
def test_one_bad_episode_of_another_robot_is_the_worst(name, kind):
    robot = ROBOTS[name](seed=1).draw_pictures()
    bad, other = 7, 22
    if kind == "shifted":
        robot.actions[bad] = np.roll(robot.actions[bad], 5, axis=0)
    for shots in robot.cameras.values():
        if kind == "mirrored":
            shots[bad] = shots[bad][:, :, ::-1]
        elif kind == "pictures":
            shots[bad] = shots[other][np.linspace(0, len(shots[other]) - 1, len(shots[bad])).astype(int)]
    assert bad in [verdict.episode for verdict in ranked(robot)[:3]]


# ------------------------------------------------------------------------------------------------------------
# A policy and its requests


def record(policy, folder, table, rows, see=np.asarray, read=str, answer=np.asarray, key="metaworld_demo",
           feel=None):
    """Requests with frames of a dataset, prepared wrongly, and answers to them, as serve_vla.py --record writes them."""
    from machinery.record import Writer
    from machinery.wire import describe

    views = [np.ascontiguousarray(see(decode_native(table.read_image(int(row), 0)))) for row in rows]
    texts = [read(table.instructions[number]) for number in table.frames["instruction"][rows]]
    answers = answer(policy.predict_action([[view] for view in views], texts, "metaworld_demo"))
    writer = Writer(folder, describe(policy, "policy"))
    for time, (row, view, text, action) in enumerate(zip(rows, views, texts, answers, strict=True)):
        writer.take({"client": "robot", "episode": int(table.episode_of(row)), "time": time, "images": [encode(view, "png")],
                     "state": None, "instruction": text, "unnorm_key": key, "prefix": 0, "chunk": [action.tolist()],
                     "unused_state": json.dumps(feel(table.frames["proprio"][row]).tolist() if feel else ())})
    for place in list(writer.open):
        writer.end(place)
    return doctor.seen_table(folder, policy.cfg, str(folder.parent / "index"))


def encode(image, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Causes for an untrained policy that gets its data with a fault."""
    policy = tiny_policy()
    train, held_out = examine.open_data(policy, "metaworld_demo", ROOT / "datasets/metaworld_demo",
                                        str(tmp_path_factory.mktemp("index")))
    policy.norm_stats = {key: train.statistics["metaworld_demo"] for key in ("metaworld_demo", "other")}
    rows = held_out.rows(np.zeros(60, int), np.arange(0, 480, 8))

    def ask(rows=rows, **fault) -> list:
        folder = tmp_path_factory.mktemp("seen") / "seen"
        return causes.request_causes(policy, train, record(policy, folder, train.tables[0], rows, **fault))

    ask.policy, ask.train, ask.held_out = policy, train, held_out
    return ask


FAULTS = {  # {fault: (arguments of Seen, words of the first cause)}
    "sound": ({}, None),
    "flipped": ({"see": lambda x: x[::-1]}, "upside down.*image[::-1]"),
    "bgr": ({"see": lambda x: x[..., ::-1]}, "red and blue.*RGB"),
    "black": ({"see": np.zeros_like}, "black.*camera"),
    "coarse": ({"see": lambda x: causes.coarsen(x, 4)}, "low resolution"),
    "jpeg": ({"see": lambda x: causes.compress(x, 8)}, "compressed.*PNG"),
    "cropped": ({"see": lambda x: causes.middle(x, 7, 7)}, "cropped.*complete"),
    "key": ({"key": "other"}, "unnorm_key 'other'"),
    "capitals": ({"read": str.upper}, None),  # prompts are in lower case
    "a full stop": ({"read": lambda text: f"{text}."}, "not in the training data.*[^.]': send"),
    "other words": ({"read": lambda text: "do it"}, "not in the training data"),
    "sign": ({"answer": lambda x: x * [1, 1, 1, -1]}, r"action\[3\] have the other sign"),
    "scale": ({"answer": lambda x: x * 0.03}, "0.03 times.*statistics"),
}


@pytest.mark.parametrize("fault", [pytest.param(fault, marks=[] if fault in ("sound", "flipped") else pytest.mark.slow)
                                   for fault in FAULTS])
def test_a_fault_is_named_first(asked, fault):
    arguments, words = FAULTS[fault]
    found = sorted(asked(**arguments), key=lambda cause: -cause.evidence)
    if words is None:
        assert found == []
    else:
        words = words.replace("[::-1]", r"\[::-1\]")
        assert re.search(words, f"{found[0].text}: {found[0].cure}"), found


@pytest.mark.parametrize("logged, kind", [(None, "model"), (1.0, "model"), (4.5, "training")])
def test_a_policy_without_learning_is_named(asked, logged, kind, tmp_path):
    """An untrained policy, of a training that reported another loss, or this one."""
    if logged:
        (tmp_path / "metrics.jsonl").write_text(f'{{"step": 10, "loss": {logged}}}\n')
    found = causes_model.model_causes(asked.policy, asked.train, None, tmp_path)
    assert [cause.kind for cause in found] == [kind]


def test_statistics_of_another_dataset(asked, monkeypatch, tmp_path):
    own = asked.policy.norm_stats["metaworld_demo"]
    other = {name: np.multiply(values, 2).tolist() for name, values in own["action"].items() if name != "mask"}
    monkeypatch.setattr(asked.policy, "norm_stats", {"metaworld_demo": {**own, "action": own["action"] | other}})
    found = [*causes_model.model_causes(asked.policy, asked.train, None, tmp_path)]
    assert [cause.kind for cause in found] == ["statistics"] and "dataset_statistics.json" in found[0].cure


def test_a_text_that_makes_no_difference(asked, monkeypatch):
    """Is no fault if the first picture tells the task, as the demo's do."""
    table = asked.train.tables[0]
    loss = causes_model.loss_of(asked.policy, asked.train)
    assert causes_model.text_cause(asked.policy, asked.train, loss) is None
    frames = np.array(table.frames)
    texts = np.random.default_rng(0).integers(0, len(table.instructions), len(table.episodes))
    frames["instruction"] = texts[table.episode_of(np.arange(len(frames)))]
    monkeypatch.setattr(table, "frames", frames)
    assert "text is ignored" in causes_model.text_cause(asked.policy, asked.train, loss).text


def test_full_attention_is_what_it_says():
    """The first of the inputs sees the last."""
    llm = tiny_policy().vla.llm.base_model
    inputs = torch.randn(1, 5, llm.config.hidden_size)
    other = inputs + torch.nn.functional.pad(torch.ones(1, 1, 1), (0, 0, 4, 0))

    def changes() -> bool:
        with torch.inference_mode():
            first, second = (llm(inputs_embeds=x, use_cache=False).last_hidden_state[:, 0] for x in (inputs, other))
        return not torch.allclose(first, second)

    policy = SimpleNamespace(vla=SimpleNamespace(llm=SimpleNamespace(base_model=llm)))
    assert not changes()
    with causes_model.full_attention(policy):
        assert changes()
    assert not changes()


class Machine:
    """A robot of three axes and a gripper that lags behind its commands, which are targets or changes of the axes."""

    def __init__(self, targets: bool):
        self.targets = np.array([targets] * 3 + [True])
        self.draw = np.random.default_rng(0)
        played = [self.play(self.draw.uniform(-1, 1, 4), lambda state, goal: [self.expert(state, goal)], 1)
                  for _ in range(60)]
        states, actions = (np.concatenate([episode[part] for episode in played]) for part in (0, 1))
        self.number = np.repeat(np.arange(60), 20)
        frames = np.zeros(1200, [("proprio", "f4", 4), ("action", "f4", 4)])
        frames["proprio"], frames["action"] = states, actions[:, 0]
        low, high = np.quantile(actions[:, 0], [0.01, 0.99], axis=0)
        self.table = SimpleNamespace(
            frames=frames, targets=self.targets, first_frames=np.arange(60) * 20, episodes={"count": np.full(60, 20)},
            statistics={"action": {"q01": low, "q99": high, "mask": [True, True, True, False]}},
            episode_of=lambda rows: rows // 20)

    def expert(self, state, goal):
        way = np.clip(goal - state, -0.1, 0.1)[:3] + self.draw.normal(0, 0.01, 3)
        return np.append(state[:3] + way if self.targets[0] else way, goal[3] > 0)

    def play(self, goal, policy, execute, change=lambda action, state: action, hold=1, delay=0,
             twice=False):
        """An episode of 20 frames per step -> states and answers of the requests."""
        state, kept, plan = np.append(self.draw.uniform(-1, 1, 3), 0.5), [], [np.append(np.zeros(3), 0.5)] * delay
        if self.targets[0]:
            plan = [state] * delay
        for _ in range(20):
            answer = np.array(policy(state, goal))
            kept.append((state, answer))
            plan += [action for action in answer[:execute] for _ in range(hold)] * (1 + twice)
            for _ in range(execute * hold * (1 + twice)):
                action = change(plan.pop(0), state)
                reach = np.where(self.targets, action - state, action)
                state = (state + reach * [0.8, 0.8, 0.8, 0.5]).clip(-30, 30)
        return [np.array(part) for part in zip(*kept, strict=True)]

    def causes(self, chunk=1, execute=1, clock=None, **fault) -> list:
        def policy(state, goal):
            steps = [self.expert(state, goal)]
            for _ in range(chunk - 1):
                steps.append(self.expert(steps[-1] if self.targets[0] else state + 0.8 * sum(steps), goal))
            return steps

        played = [self.play(self.draw.uniform(-1, 1, 4), policy, execute, **fault) for _ in range(10)]
        states, answers = (np.concatenate([episode[part] for episode in played]) for part in (0, 1))
        request = causes_actions.Played(states, answers, np.repeat(np.arange(10), 20), clock)
        readings = [request, request._replace(states=states[:, [1, 0, 2, 3]])]  # the second is wrong
        return causes_actions.action_causes(self.table, readings, ["x", "y", "z", "gripper"])


@pytest.mark.parametrize("fault, words", [
    ({}, None), ({"chunk": 4, "execute": 4}, None), ({"chunk": 4, "execute": 2}, None),
    ({"change": lambda a, s: a * [1, 1, 1, -1] + [0, 0, 0, 1]}, "gripper.*other sign"),
    ({"change": lambda a, s: a * [1, -1, 1, 1]}, "y is.*other sign"),
    ({"change": lambda a, s: a[[2, 1, 0, 3]]}, "x and z.*order"),
    ({"change": lambda a, s: a[[1, 2, 0, 3]]}, "x and y and z.*order"),
    ({"change": lambda a, s: a * [0.25, 0.25, 0.25, 1]}, "actions.*0.25 times"),
    ({"change": lambda a, s: a * [1, 1, 1, 0.1]}, "gripper.*another.* range"),
    ({"chunk": 8, "execute": 1}, "too short")])
@pytest.mark.parametrize("targets", [False, True])
def test_what_the_robot_did(targets, fault, words):
    found = Machine(targets).causes(**fault)
    if words is None:
        assert found == []
    else:
        assert re.search(words, found[0].text), found


@pytest.mark.parametrize("targets, fault, words", [
    (False, {"delay": 3}, "late: a delay"), (False, {"hold": 3}, "lasts 3 frames.*rate"),
    (False, {"hold": 2, "clock": 2}, "2 frames.*has 1 steps"),
    (True, {"chunk": 4, "execute": 4, "delay": 2, "clock": 4}, "2 frames late"),
    (True, {"chunk": 4, "execute": 4, "twice": True, "clock": 8}, "again.*too long"),
    (False, {"change": lambda a, s: np.append(np.clip(a[:3] - s[:3], -0.1, 0.1), a[3])}, "delta as absolute"),
    (True, {"change": lambda a, s: np.append(a[:3] + s[:3], a[3])}, "absolute as delta")])
def test_what_a_robot_did_with_changes_or_targets(targets, fault, words):
    found = Machine(targets).causes(**fault)
    assert re.search(words, found[0].text), found


@pytest.mark.parametrize("clock", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow), 40])
@pytest.mark.parametrize("chunk", [1, 4])
def test_a_simulators_clock_is_not_the_robots(chunk, clock):
    """Nothing happened between the requests that takes this time, and it would show in the motion."""
    assert Machine(False).causes(chunk, chunk, clock=clock) == []


def test_a_clock_that_ticks_in_frames():
    draw, episode = np.random.default_rng(0), np.repeat([0, 1], 30)
    time = np.cumsum(np.full(60, 8e8) + draw.normal(0, 2e6, 60)) + 1e10 * episode
    assert causes_actions.frames_by_clock(time, episode, 10) == 8
    assert causes_actions.frames_by_clock(time, episode, 10.6) is None  # its client waits for answers
    assert causes_actions.frames_by_clock(time, episode, 0) is None


@pytest.mark.parametrize("damage, words", [
    (lambda x: np.rad2deg(x), "degrees"), (lambda x: x[:, [0, 2, 1, 3]], "order"),
    (lambda x: np.repeat(x[:1], len(x), 0), "frozen"), (lambda x: x * 1000, "millimeters"),
    (lambda x: x + np.array([0, 0, 0.9, 0]), "offset"), (lambda x: x, None)])
def test_states_that_training_did_not_see(damage, words):
    draw = np.random.default_rng(0)
    trained, seen = draw.uniform([-0.5, 0.3, 0.1, 0], [0.5, 0.8, 0.2, 1], (2, 200, 4))
    found, ways = causes_state.state_causes(trained, damage(seen), ["x", "y", "z", "gripper"], trained,
                                            np.zeros(len(seen), int))
    assert bool(found) == bool(words) and all(words in cause.text for cause in found)
    if words != "frozen":
        assert min(np.abs(way(damage(seen)) - seen).max() for way in ways) < 0.1


def test_states_that_are_frozen_in_each_episode():
    draw = np.random.default_rng(0)
    trained, seen = draw.uniform(0, 1, (2, 200, 3))
    start = np.arange(200) // 5 * 5
    found, ways = causes_state.state_causes(trained, seen[start], ["x", "y", "z"], trained, start)
    assert "frozen" in found[0].text and not ways
    seen[:, :2] = seen[start][:, :2]  # the third moves
    found, ways = causes_state.state_causes(trained, seen, ["x", "y", "z"], trained, start)
    assert "x, y are frozen" in found[0].text and found[0].evidence == 1 and not ways
    seen[:, :2] = 0, 1  # two grippers of a policy that does not use them?
    found, ways = causes_state.state_causes(trained, seen, ["x", "y", "z"], trained, start)
    assert "x, y are frozen" in found[0].text and found[0].evidence < 0.5 and ways


def test_a_robot_that_goes_where_no_demonstration_was_has_sound_states():
    draw = np.random.default_rng(0)
    trained, seen = draw.uniform([0.2, 0.5, 0.8], [0.4, 0.7, 1], (2, 200, 3))
    start = np.arange(200) // 5 * 5
    far = np.where(start[:, None] == np.arange(200)[:, None], seen, seen + [40, -3, 7] * draw.random((200, 3)))

    def examined(states):
        return causes_state.state_causes(trained, states, ["x", "y", "z"], trained, start)

    assert examined(far)[0] == []
    found, ways = examined(far[:, [1, 2, 0]])
    assert "x, y, z are in another order" in found[0].text
    np.testing.assert_array_equal(ways[0](far[:, [1, 2, 0]]), far)
    assert examined(seen + np.array([2, 0, 0]))[0]


@pytest.mark.parametrize("unit, words", [(1, "0. and action.1. are exchanged"), (1000, "0. and action.1. are exchanged"), (0, None)])
def test_states_that_the_model_does_not_take_show_what_the_robot_did(asked, unit, words):
    """It did what was demonstrated, and was answered with two columns exchanged."""
    table = asked.train.tables[0]
    rows = (table.first_frames[:10, None] + np.arange(12)).reshape(-1)
    answers = table.frames["action"][rows][:, [1, 0, 2, 3]]
    found = asked(rows=rows, answer=lambda _: answers, feel=lambda state: unit * state)
    assert [cause for cause in found if cause.kind == "state"] == []
    actions = [cause.text for cause in found if cause.kind == "actions"]
    assert len(actions) == bool(words) and all(re.search(words, text) for text in actions), actions


def test_the_program_examines_recorded_requests(monkeypatch, capsys, tmp_path):
    """With a folder as serve_vla.py --record writes it."""
    robot = ROBOTS["changes"](seed=1, episodes=3).draw_pictures(("primary",))
    robot.texts = ["Reach a goal position"] * 3
    for part in range(3):
        robot.actions[part] = robot.actions[part][:, :4]
    robot.write(tmp_path, "seen")
    policy = tiny_policy()
    monkeypatch.setattr(examine, "open_policy", lambda checkpoint: policy)
    policy.norm_stats = examine.open_data(policy, "metaworld_demo", None, str(tmp_path))[0].statistics
    printed = run(monkeypatch, capsys, tmp_path / "run", "--seen", tmp_path / "seen", "--index_dir", tmp_path,
                  "--out", tmp_path / "page.html")
    assert "cause pictures" in printed and "unlike training's" in printed
    assert len(facts_of((tmp_path / "page.html").read_text())["findings"]) == printed.count("\ncause ")


# ------------------------------------------------------------------------------------------------------------
# A closed loop (for a server: test_serve.py)


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """Write what examples/libero/rollout.py writes, with the demo's tasks and one that training never had, and
    ask why it failed: ask(successes of each task in 10 trials, conditions, recording.json) -> causes."""
    source, folder = ROOT / "datasets/metaworld_demo/1.0.0", tmp_path_factory.mktemp("played")
    directory = folder / "metaworld_demo/1.0.0"
    directory.mkdir(parents=True)
    for file in source.iterdir():
        if file.name != "recording.json":
            (directory / file.name).symlink_to(file)
    policy = tiny_policy(action_chunk=4)
    train, _ = examine.open_data(policy, "metaworld_demo", directory, str(folder / "index"))
    texts = [train.tables[0].instructions[0], train.tables[0].instructions[1].upper(), "Fold the towel"]

    def ask(successes, recording=None, **conditions) -> list:
        episodes = [{"task": task, "seed": 0, "trial": trial, "success": trial < wins, "steps": 5}
                    for task, wins in enumerate(successes) for trial in range(10)]
        out = folder / "rollouts"
        out.mkdir(exist_ok=True)
        film = libero.closed_loop.encode_film([Image.new("RGB", (16, 16), color) for color in ("red", "blue")])
        for task in range(3):
            libero.film_path(out, task, 0).write_bytes(film)
        conditions = {"suite": "demo", "execute": 1, "simulator": "mujoco 3.3.0", **conditions}
        libero.report(libero.summarize(episodes), texts, episodes, conditions, out)
        (directory / "recording.json").write_text(json.dumps(recording or {}))
        return rollout_causes(train, out)

    return ask


RECORDING = {"simulator": "mujoco 3.3.0", "image_size": 96, "cameras": ["image", "wrist"], "tasks": ["a", "b"]}
SAME = {"image_size": 96, "cameras": ["image"]}


@pytest.mark.parametrize("successes, changes, kind, words", [
    ((10, 10, 10), {"simulator": "mujoco 3.9.0"}, None, None),  # nothing fails
    ((10, 5), {}, None, None),
    ((1, 0), {}, None, None),  # no worse than the others, beyond luck
    ((10, 9, 0), {}, "training", "task 2 .'fold the towel'. is not in the training data"),
    ((10, 0), {}, "training", "task 1 always fails.* 20 episodes"),
    ((10, 5), {"simulator": "mujoco 3.9.0"}, "simulator", "mujoco 3.9.0, the recording's mujoco 3.3.0"),
    ((10, 5), {"image_size": 80}, "simulator", "image_size is 80, .* 96"),
    ((10, 5), {"cameras": ["front"]}, "simulator", "cameras is .'front'."),
    ((10, 5), {"execute": 4}, "simulator", "4 of the 4 .*--execute 1")])
def test_why_a_closed_loop_fails(played, successes, changes, kind, words):
    found = played(successes, RECORDING, **{**SAME, **changes})
    assert [cause.kind for cause in found] == ([kind] if kind else [])
    for cause in found:
        assert re.search(words, f"{cause.text}: {cause.cure}") and 0 < cause.evidence <= 1


def test_a_recording_without_versions_is_not_blamed(played):
    assert played((10, 9)) == []


# ------------------------------------------------------------------------------------------------------------
# Parts


@settings(max_examples=20)
@given(st.integers(0, 1000), st.integers(2, 6), st.integers(1, 3))
def test_an_episode_is_predicted_as_if_it_had_never_been_seen(seed, episodes, width):
    draw = np.random.default_rng(seed)
    episode = np.repeat(np.arange(episodes), 5)
    seen = draw.standard_normal((len(episode), 4))
    known = draw.standard_normal((len(episode), width))
    every = peers.Peers(seen, known, episode)
    predicted = every.predict(seen, episode)
    for number in range(episodes):
        rest = episode != number
        kernel = every.kernel(seen)[np.ix_(rest, rest)] + peers.RIDGE * np.eye(rest.sum())
        weights = np.linalg.solve(kernel, known[rest] - every.mean)
        expected = every.kernel(seen)[~rest][:, rest] @ weights + every.mean
        np.testing.assert_allclose(predicted[~rest], expected, atol=1e-8)


@pytest.fixture
def random_policy():
    """An untrained policy for the demo's dataset."""
    return tiny_policy()


def tiny_policy(**changes):
    from act import Policy
    from action_tokenizer import load_tokenizer
    from model import VLA

    torch.manual_seed(0)
    cfg = TrainConfig(**{**TINY, "action_dim": 4, "proprio_dim": 4, **changes})
    tokenizer = load_tokenizer(cfg.tokenizer, cfg.add_action_tokens)
    return Policy(VLA(cfg, tokenizer).eval(), tokenizer, {})


@pytest.mark.parametrize("changes", [{}, {"use_proprio": True}, {"parallel_decoding": True, "action_chunk": 3},
                                     {"window_size": 2}])
def test_the_likelihood_is_the_trainings(changes, tmp_path):
    policy = tiny_policy(index_dir=str(tmp_path), **changes)
    mixture = open_mixture(policy.cfg, policy.tokenizer)
    rows = [3, 500, 1000, 2000]
    batch = next(examine.batches(mixture, rows, "cpu"))
    found = examine.log_likelihood(policy.vla, batch)
    assert found.shape == (4, policy.vla.num_action_tokens) and (found < 0).all()
    for place, row in enumerate(rows):  # without the others, and their padding
        own = examine.log_likelihood(policy.vla, next(examine.batches(mixture, [row], "cpu")))
        torch.testing.assert_close(own[0], found[place], atol=1e-4, rtol=1e-4)
    loss, _, _ = policy.vla(**batch)
    assert -found.mean() < loss  # of which the other tokens are a part


def test_text_of_the_data_cannot_leave_its_place(tmp_path):
    """Whatever an instruction holds, the page's script finds the same text and nothing else."""
    evil = "</script><script>alert(1)</script><!-- <b> & \u2028 \"'"
    report.write_page(tmp_path / "page.html", {"name": evil})
    page = (tmp_path / "page.html").read_text()
    assert page.count("<script") == 2 and page.count("</script>") == 2
    assert facts_of(page) == {"name": evil}
    assert "innerHTML" not in page and "document.write" not in page


def test_a_long_episode_shows_some_of_its_pictures(monkeypatch):
    robot = ROBOTS["changes"](seed=1, episodes=2).draw_pictures()
    table = robot.table()
    monkeypatch.setattr(report, "PICTURES", 8 * len(table.cameras))
    facts = report.page_facts(table, "robot", "bounds_q99", ([str(i) for i in range(99)],) * 2, [], [], {0: "", 1: ""})
    for episode in facts["episodes"]:
        frames = [frame for frame, _ in episode["pictures"][table.cameras[0]]]
        assert len(frames) == 4 and frames[0] == 0 and frames[-1] == episode["count"] - 1
