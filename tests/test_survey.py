"""The survey: each fault is found in a sound recording that was damaged so, and nothing in sound ones."""

import copy
import functools
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import RLDS, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from robots import ROBOTS, Robot, follow

from machinery import frames, oxe, run, survey_numbers
from machinery.config import Recipe
from machinery.survey import KINDS, mixture_lines, survey
from machinery.survey_pictures import misspelled

pytestmark = pytest.mark.usefixtures("index_here")


@functools.cache
def sound(name: str, seed: int = 0, pictures: bool = False) -> Robot:
    robot = ROBOTS[name](seed=seed)
    return robot.draw_pictures() if pictures else robot


def damaged(name: str, damage, pictures: bool = False) -> Robot:
    robot = copy.deepcopy(sound(name, 0, pictures))
    damage(robot)
    return robot


def found(robot: Robot, **options) -> list:
    ignored = {"no_camera"}
    if not robot.cameras:  # some robots repeat an episode, which only pictures could tell apart
        ignored |= {"held_out_seen", "episode_twice"}
    return [finding for finding in survey(robot.table(), **options) if finding.kind not in ignored]


def kinds(findings: list, severity: str = "high") -> set[str]:
    return {finding.kind for finding in findings if finding.severity == severity}


# ------------------------------------------------------------------------------------------------------------
# Sound data


@settings(max_examples=15)
@given(st.sampled_from(list(ROBOTS)), st.integers(1, 10**6), st.sampled_from(["bounds_q99", "bounds"]))
def test_sound_robots_of_any_seed(name, seed, kind):
    assert [str(finding) for finding in found(sound(name, seed), normalization=kind)] == []


@pytest.mark.filterwarnings("error")
@settings(max_examples=60)
@given(st.integers(1, 9), st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(0, 10**6),
       st.sampled_from(["zeros", "noise", "few", "huge", "one row"]), st.sampled_from(["bounds_q99", "normal"]))
def test_any_numbers_are_surveyed(dims, lengths, seed, content, kind):
    """Short episodes, dimensions that never change, a single frame: nothing fails, nothing warns."""
    draw = np.random.RandomState(seed)
    make = {"zeros": np.zeros, "noise": lambda shape: draw.randn(*shape), "few": lambda shape: draw.randint(0, 3, shape),
            "huge": lambda shape: 1e18 * draw.randn(*shape), "one row": lambda shape: np.ones(shape) * draw.randn(shape[1])}
    robot = Robot([make[content]((length, dims)) for length in lengths], [make["noise"]((length, 3)) for length in lengths],
                  ["go"] * len(lengths), {"action": "action target" if seed % 2 else "action change"})
    for finding in found(robot, normalization=kind):
        assert finding.kind in KINDS and finding.severity in ("high", "medium") and finding.cure


@pytest.mark.parametrize("name", ROBOTS)
def test_sound_robots_with_pictures(name):
    assert [str(finding) for finding in found(sound(name, 3, True))] == []


@pytest.mark.parametrize("of", [["actions"], ["actions", "states"]])
def test_small_changes_beside_an_open_gripper_are_not_a_quaternion(of):
    """Their length is one in most frames."""
    def damage(robot):
        every(robot, lambda values, e: np.column_stack([0.2 * values[:, :6], np.arange(len(values)) < 0.85 * len(values)]), of=of)

    assert kinds(found(damaged("changes", damage))) == set()


@pytest.mark.parametrize("name", ["bimanual", "changes"])
def test_rare_spikes_that_the_quantiles_leave_out(name):
    """No advice to use the whole range, and changes stay changes."""
    def damage(robot):
        robot.recipe = {"action": robot.recipe["action"].replace(" change", "")}
        for e in range(0, 30, 4):
            robot.actions[e][20, 2] = 655.35

    assert not {"range", "target_or_change"} & kinds(found(damaged(name, damage)))


@pytest.mark.parametrize("name, of", [("bimanual", "states"), ("changes", "actions"), ("hand_pose", "actions")])
def test_a_spike_is_not_another_unit(name, of):
    def damage(robot):
        getattr(robot, of)[3][20, 2] = -1e9
    assert kinds(found(damaged(name, damage))) == set()


def test_velocities_that_keep_their_sign_are_not_targets():
    """With the recipe's word `change`, and without any."""
    for said in ("", " change"):
        assert found(ROBOTS["mobile_base"](seed=5, said=said)) == []


@pytest.mark.parametrize("name", [path.stem for path in sorted((RLDS / "golden").glob("*.json"))
                                  if "refused" not in path.read_text()])
def test_openvlas_datasets(name, tmp_path):
    recipe = oxe.DATASETS[name]
    cameras = recipe.camera_keys([camera for camera in recipe.camera_names if camera == "primary"] or ["wrist"])
    if not any(cameras):
        pytest.skip("it has no camera")
    table = frames.frame_table(frames.find_dataset(RLDS / "data", name), recipe, cameras, True,
                               index_dir=str(tmp_path))
    for kind in ("bounds_q99", "bounds"):
        assert kinds(survey(table, kind)) == set()


def test_the_demonstrations_in_the_repository():
    recipe = Recipe(primary="image")
    table = frames.frame_table(frames.find_dataset(ROOT / "datasets", "metaworld_demo"), recipe, ["image"], True)
    assert [str(finding) for finding in survey(table)] == []


# ------------------------------------------------------------------------------------------------------------
# Scale


def every(robot: Robot, change, episodes=None, of=("actions", "states")) -> None:
    """Apply a function of (values, episode) to actions and states of some episodes."""
    for key in of:
        values = getattr(robot, key)
        for e in range(len(values)) if episodes is None else episodes:
            values[e] = np.array(change(values[e].astype(float), e))


def scaled(columns, factor: float, episodes, of=("actions", "states")):
    def damage(robot):
        def change(values, e):
            values[:, columns] *= factor
            return values
        every(robot, change, episodes, of)
    return damage


JOINTS = [*range(6), *range(7, 13)]
NOISE = np.random.RandomState(1)


@pytest.mark.parametrize("name, columns, factor, episodes", [
    ("bimanual", JOINTS, 57.3, [3]), ("bimanual", JOINTS, 57.3, [2, 9, 10, 11, 20, 21, 22, 29]),
    ("hand_pose", [0, 1, 2], 1000, [7, 8]), ("arm_in_degrees", [0, 1, 2, 3, 4], 1 / 57.3, [0, 1]),
    ("changes", [0, 1, 2], 1000, [4]), ("mobile_base", [0, 1, 2, 3, 4], 1 / 57.3, [28]),
    ("hand_pose", [0, 1, 2], 1e-3, [3, 7, 9]), ("bimanual", [7, 8, 9, 10, 11, 12], 1e-3, [4, 11]),
])
def test_episodes_in_another_unit(name, columns, factor, episodes):
    findings = found(damaged(name, scaled(columns, factor, episodes)))
    both = {finding.of: finding for finding in findings if finding.kind == "episode_scale"}
    assert {*both} == {"action", "state"} and kinds(findings) == {"episode_scale"}
    for finding in both.values():
        assert {*finding.dims} == {*columns} and {*finding.episodes} == {*episodes[:8]}
        assert re.search(f"{len(episodes)} of 30 episodes", finding.text)


@settings(max_examples=15)
@given(st.sets(st.integers(0, 29), min_size=1, max_size=8), st.sampled_from([57.3, 1000, 100]))
def test_any_few_episodes_in_another_unit(episodes, factor):
    findings = found(damaged("hand_pose", scaled([0, 1, 2], factor, sorted(episodes))))
    assert kinds(findings) == {"episode_scale"}
    assert all({*finding.dims} <= {0, 1, 2} for finding in findings)


def test_an_arm_that_rests_at_zero_is_not_in_another_unit():
    def damage(robot):
        every(robot, lambda values, e: np.column_stack([values[:, :7], 1e-3 * NOISE.randn(len(values), 6), values[:, 13]]),
              [3, 8, 20])
    assert "episode_scale" not in kinds(found(damaged("bimanual", damage)))


def spikes(of: str, column: int, value, every_n: int):
    def damage(robot):
        draw = np.random.RandomState(2)
        for values in getattr(robot, of):
            rows = np.flatnonzero(draw.rand(len(values)) < 1 / every_n)
            values[rows, column] = value(draw, len(rows))
    return damage


@pytest.mark.parametrize("name, of, value, rate, kind", [
    ("bimanual", "actions", lambda draw, n: 655.35, 60, "bounds_q99"),
    ("bimanual", "states", lambda draw, n: 655.35, 60, "bounds_q99"),
    ("arm_in_degrees", "states", lambda draw, n: draw.uniform(-6000, 6000, n), 25, "bounds_q99"),
    ("hand_pose", "actions", lambda draw, n: 40 * draw.randn(n), 40, "bounds_q99"),
    ("changes", "actions", lambda draw, n: 9.0, 70, "bounds_q99"),
    ("bimanual", "actions", lambda draw, n: -100.0, 900, "bounds"),
])
def test_outliers(name, of, value, rate, kind):
    findings = found(damaged(name, spikes(of, 2, value, rate)), normalization=kind)
    (finding,) = [finding for finding in findings if finding.kind == "outliers"]
    assert finding.dims == (2,) and finding.of == of[:-1] and finding.severity == "high"
    assert int(re.search(r"get (\d+) of 256 bins", finding.text)[1]) < 64
    assert ("bounds_q99" in finding.cure) == (kind == "bounds")
    assert {*kinds(findings), *kinds(findings, "medium")} <= {"outliers", "range", "jumps", "gripper"}


def constant(of: str, column: int, value: float, noise: float):
    def damage(robot):
        for values in getattr(robot, of):
            values[:, column] = value + noise * NOISE.randn(len(values))
    return damage


@pytest.mark.parametrize("name, of, value, noise, severity", [
    ("bimanual", "states", 0.0, 1e-7, "high"), ("bimanual", "actions", 0.3, 1e-4, "high"),
    ("arm_in_degrees", "states", 90.0, 2e-3, "high"), ("changes", "actions", 0.0, 1e-7, "high"),
    ("changes", "states", 1.0, 1e-4, "high"), ("hand_pose", "states", 1000.0, 1e-4, "high"),
    ("bimanual", "states", -0.2, 2e-3, "medium"),
])
def test_noise_is_not_motion(name, of, value, noise, severity):
    findings = found(damaged(name, constant(of, 1, value, noise)))
    (finding,) = [finding for finding in findings if finding.kind == "jitter"]
    assert (finding.of, finding.dims, finding.severity) == (of[:-1], (1,), severity)
    assert kinds(findings) <= {"jitter"}


# ------------------------------------------------------------------------------------------------------------
# Rotations


def turned(of: str, column: int, start: float, stop: float, turn: float, low: float, noise: float = 0.0):
    """An angle that goes from start to stop (shares of a turn) in each episode, within low .. low + turn."""
    def damage(robot):
        for values in getattr(robot, of):
            angle = np.linspace(start, stop, len(values)) + 0.02 * NOISE.randn() + noise * NOISE.randn(len(values))
            values[:, column] = (angle * turn - low) % turn + low
    return damage


@pytest.mark.parametrize("of, start, stop, turn, low, noise", [
    ("actions", 0.3, 0.7, 2 * np.pi, -np.pi, 0), ("states", 0.3, 0.7, 2 * np.pi, -np.pi, 0.01),
    ("states", -0.2, 0.3, 360, 0, 0.002), ("actions", 0.2, 0.8, 360, -180, 0),
    ("states", 0.5, 0.5, 2 * np.pi, -np.pi, 0.004),  # a hand that points at the border, and trembles
    ("actions", 0.5, 0.5, 360, -180, 0.0),  # some episodes here, some there
])
def test_angles_that_wrap(of, start, stop, turn, low, noise):
    findings = found(damaged("bimanual", turned(of, 3, start, stop, turn, low, noise)))
    (finding,) = [finding for finding in findings if finding.kind == "wraps"]
    assert (finding.of, finding.dims, finding.severity) == (of[:-1], (3,), "high")
    assert "unwrap" in finding.cure and finding.episodes


@settings(max_examples=20)
@given(st.floats(-0.4, 0.4), st.floats(0.15, 0.6), st.sampled_from([2 * np.pi, 360.0]))
def test_any_angle_wraps_only_past_its_border(start, reach, turn):
    findings = found(damaged("bimanual", turned("states", 3, start, start + reach, turn, -turn / 2)))
    wraps = [finding.dims for finding in findings if finding.kind == "wraps"]
    if start + reach > 0.6:
        assert wraps == [(3,)]
    elif start + reach < 0.4:
        assert wraps == []


def test_changes_of_an_angle_that_wraps():
    def damage(robot):
        for values in robot.actions[::3]:
            values[10, 5] -= 2 * np.pi * np.sign(values[10, 5])
    (finding,) = [f for f in found(damaged("changes", damage)) if f.kind == "wraps"]
    assert finding.dims == (5,)


def signs(of: str, rule):
    def damage(robot):
        for e, values in enumerate(getattr(robot, of)):
            for row in values:
                row[3:7] *= rule(row[3:7], e)
    return damage


@pytest.mark.parametrize("of, rule, jumps", [
    ("actions", lambda q, e: -1 if q[3] < 0 else 1, True), ("states", lambda q, e: -1 if q[1] < 0 else 1, True),
    ("actions", lambda q, e: -1 if e % 4 == 1 else 1, False), ("states", lambda q, e: -1 if e > 24 else 1, False),
])
def test_quaternions_of_both_signs(of, rule, jumps):
    findings = found(damaged("hand_pose", signs(of, rule)))
    (finding,) = [finding for finding in findings if finding.kind == "quaternion_sign"]
    assert (finding.of, finding.dims, finding.severity) == (of[:-1], (3, 4, 5, 6), "high")
    assert ("changes its sign" in finding.text) == jumps
    assert kinds(findings) <= {"quaternion_sign", "jumps"}


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(0, 29), st.integers(1, 60)), min_size=20, max_size=60, unique=True))
def test_any_flips_of_a_quaternion(flips):
    def damage(robot):
        for episode, row in flips:
            robot.actions[episode][row:, 3:7] *= -1
    (finding,) = [f for f in found(damaged("hand_pose", damage)) if f.kind == "quaternion_sign"]
    assert {*finding.episodes} <= {episode for episode, _ in flips}


def lengths(change, rows: slice):
    def damage(robot):
        for values in robot.actions:
            values[rows, 3:7] = change(values[rows, 3:7])
    return damage


@pytest.mark.parametrize("change, rows, severity, text", [
    (lambda q: q * 0, slice(40, 44), "high", "all zeros"), (lambda q: 0.7 * q, slice(40, 50), "high", "0.7"),
    (lambda q: 2 * q, slice(0, None), "medium", "length 2 "),
    (lambda q: np.round(32767 * q), slice(0, None), "medium", "3.28e"),
])
def test_quaternions_of_another_length(change, rows, severity, text):
    findings = found(damaged("hand_pose", lengths(change, rows)))
    (finding,) = [finding for finding in findings if finding.kind == "quaternion_length"]
    assert (finding.dims, finding.severity) == ((3, 4, 5, 6), severity) and text in finding.text


def vectors(of: str, jump_at_pi: bool):
    """Rotation vectors near pi in dimensions 3 to 5: beyond pi, or in some episodes, the opposite ones."""
    def damage(robot):
        for e, values in enumerate(getattr(robot, of)):
            time = np.arange(len(values))
            angle = np.pi - 0.25 + (0.4 * np.sin(time / 9 + e) if jump_at_pi else 0.1 * np.sin(time / 9))
            axis = np.stack([np.ones(len(time)), 0.8 + 0.1 * np.sin(time / 7), 0.1 * np.cos(time / 5)], 1)
            axis /= np.linalg.norm(axis, axis=1, keepdims=True)
            angle = np.where(angle > np.pi, angle - 2 * np.pi, angle)
            if not jump_at_pi and e % 3 == 0:
                angle = angle - 2 * np.pi + 0.5
            values[:, 3:6] = axis * angle[:, None]
    return damage


@pytest.mark.parametrize("of", ["actions", "states"])
@pytest.mark.parametrize("jumps", [True, False])
def test_rotation_vectors_near_pi(of, jumps):
    findings = found(damaged("changes" if of == "states" else "bimanual", vectors(of, jumps)))
    (finding,) = [finding for finding in findings if finding.kind == "rotation_vector"]
    assert (finding.of, finding.dims, finding.severity) == (of[:-1], (3, 4, 5), "high")


# ------------------------------------------------------------------------------------------------------------
# Ends, timing, order


@pytest.mark.parametrize("name, of, row, value, severity", [
    ("bimanual", "actions", -1, 0.0, "high"), ("arm_in_degrees", "actions", -1, 0.0, "high"),
    ("arm_in_degrees", "actions", 0, 0.0, "high"), ("hand_pose", "states", -1, 0.0, "high"),
    ("changes", "actions", -1, 0.0, "medium"),
])
def test_steps_that_are_filled_in(name, of, row, value, severity):
    def damage(robot):
        for values in getattr(robot, of):
            values[row] = value
    findings = found(damaged(name, damage))
    (finding,) = [finding for finding in findings if finding.kind == "ends"]
    assert (finding.of, finding.severity) == (of[:-1], severity) and "trim: true" in finding.cure
    assert "zeros" in finding.text and ("last" in finding.text) == (row == -1)
    assert kinds(findings) - {"ends"} <= {"outliers"}  # zeros are 1 of 90 frames


@pytest.mark.parametrize("name, of, count", [
    ("bimanual", "actions", 5), ("arm_in_degrees", "actions", 2), ("hand_pose", "actions", 10), ("bimanual", "states", 8),
])
def test_episodes_that_are_padded_with_zeros(name, of, count):
    def damage(robot):
        for values in getattr(robot, of):
            values[-count:] = 0
    (finding,) = [finding for finding in found(damaged(name, damage)) if finding.kind == "ends"]
    assert (finding.of, finding.severity) == (of[:-1], "high") and f"last {count} steps" in finding.cure, finding.text


@pytest.mark.parametrize("name", ["bimanual", "arm_in_degrees", "hand_pose", "changes"])
def test_two_executions_in_a_record(name):
    def damage(robot):
        for key in ("actions", "states"):
            values = getattr(robot, key)
            setattr(robot, key, [np.concatenate(values[e : e + 2]) for e in range(0, 30, 2)])
        robot.texts = robot.texts[::2]
    findings = found(damaged(name, damage))
    (finding,) = [finding for finding in findings if finding.kind == "jumps"]
    assert finding.severity == "high" and "executions" in finding.text and len(finding.episodes) == 8


@pytest.mark.parametrize("name", ["bimanual", "arm_in_degrees", "hand_pose"])
def test_dropped_frames(name):
    def damage(robot):
        draw = np.random.RandomState(3)
        for e, values in enumerate(robot.states):
            kept = np.ones(len(values), bool)
            for start in draw.choice(np.arange(5, len(values) - 12), 3):
                kept[start : start + 5] = False
            robot.states[e], robot.actions[e] = values[kept], robot.actions[e][kept]
    findings = found(damaged(name, damage))
    (finding,) = [finding for finding in findings if finding.kind == "dropped_frames"]
    assert finding.of == "state" and kinds(findings) <= {"dropped_frames"}


def smooth(e: int, steps: int = 80, speed: float = 1.0) -> np.ndarray:
    time = speed * np.arange(steps + 1)[:, None]
    return np.sin(time / 12 + np.arange(6) + e) * [1, 0.5, 2, 1, 1, 0.7]


def smooth_robot(kept=lambda way, e: way, slow: int = 1) -> Robot:
    ways = [kept(smooth(e, 80 * slow, 1 / slow), e) for e in range(20)]
    return Robot([way[1:] for way in ways], [way[:-1] for way in ways], ["go", "stop"] * 10, {"action": "action target"})


@pytest.mark.parametrize("kept, text", [
    (lambda way, e: way[np.arange(81) % 25 != 7], "dropped"), (lambda way, e: way[np.random.RandomState(e).rand(81) > 0.05], "dropped"),
    (lambda way, e: way[np.arange(81) // 2 * 2], "repeats"), (lambda way, e: way[np.arange(81) - (np.arange(81) % 9 == 5)], "repeats"),
])
def test_single_frames_that_are_lost_or_repeated(kept, text):
    (finding,) = [f for f in found(smooth_robot(kept)) if f.kind == "dropped_frames"]
    assert text in finding.text and not found(smooth_robot())


def test_a_slow_motion_at_a_high_rate_is_not_idle():
    assert "idle" not in {f.kind for f in found(smooth_robot(slow=60))}


def test_a_target_that_is_held_while_the_robot_moves_is_not_idle():
    def damage(robot):
        for e, action in enumerate(robot.actions):
            robot.actions[e] = action[np.minimum(np.arange(len(action)) // 10 * 10 + 9, len(action) - 1)]
            robot.states[e] = follow(NOISE, robot.actions[e], 0.002, 0.2)
    assert "idle" not in kinds(found(damaged("bimanual", damage)))


def stuck(episodes, value):
    def damage(robot):
        for e in episodes:
            robot.states[e] = value(robot.states[e])
    return damage


@pytest.mark.parametrize("name", ["bimanual", "changes"])
@pytest.mark.parametrize("episodes, value, severity", [
    (range(30), lambda state: 0 * state + 0.3, "high"), (range(30), lambda state: 0.3 + 1e-6 * NOISE.randn(*state.shape), "high"),
    ([3, 5, 8], lambda state: 0 * state + state[0], "medium"), ([29], lambda state: 0 * state, "medium"),
])
def test_states_that_never_move(name, episodes, value, severity):
    (finding,) = [f for f in found(damaged(name, stuck(episodes, value))) if f.kind == "still_state"]
    assert finding.severity == severity and {*finding.episodes} <= {*episodes}
    assert "use_proprio" in finding.cure


@pytest.mark.parametrize("name, episodes", [("bimanual", [3, 9]), ("changes", [0]), ("hand_pose", [1, 2, 28])])
def test_grippers_that_are_inverted_in_a_few_episodes(name, episodes):
    def damage(robot):
        for e in range(30):
            robot.actions[e][:, -1] = np.arange(len(robot.actions[e])) < 60 - 40 * (name == "changes")
        for e in episodes:
            robot.actions[e][:, -1] = 1 - robot.actions[e][:, -1]
    (finding,) = [f for f in found(damaged(name, damage)) if f.kind == "gripper"]
    assert finding.severity == "medium" and sorted(finding.episodes) == episodes and "invert" in finding.cure


@pytest.mark.parametrize("before, after, severity", [(20, 0, "medium"), (40, 0, "high"), (0, 40, "medium"), (80, 90, "high")])
def test_pauses(before, after, severity):
    def damage(robot):
        every(robot, lambda values, e: np.concatenate([values[:1].repeat(before, 0), values,
                                                       values[-1:].repeat(after, 0)]))
    (finding,) = [f for f in found(damaged("bimanual", damage)) if f.kind == "idle"]
    start, end = map(int, re.search(r"\((\d+)% at the start of episodes, (\d+)% at the end", finding.text).groups())
    assert finding.severity == severity and (start > 5) == (before > 0) and (end > 5) == (after > 0)


def shifted(frames_: int):
    """Actions that many frames later (earlier if negative)."""
    def damage(robot):
        size = abs(frames_)
        for e in range(len(robot.actions)):
            action, state = robot.actions[e], robot.states[e]
            late = (action[:-size], state[size:]) if frames_ > 0 else (action[size:], state[:-size])
            robot.actions[e], robot.states[e] = late
    return damage


@pytest.mark.parametrize("name", ["bimanual", "arm_in_degrees", "changes", "hand_pose"])
@pytest.mark.parametrize("frames_, severity", [(4, "high"), (-7, "medium")])
def test_actions_at_the_wrong_time(name, frames_, severity):
    """An action is recorded when its effect is already there, or long before."""
    findings = found(damaged(name, shifted(frames_)))
    (finding,) = [finding for finding in findings if finding.kind == "delay"]
    assert finding.severity == severity and finding.of == "action"


# ------------------------------------------------------------------------------------------------------------
# Actions come back from their tokens


DRAW = np.random.RandomState(0)
N = 3000
OPEN_OR_CLOSED = DRAW.randint(0, 2, N)


def rare(value: float, every_n: int) -> np.ndarray:
    return np.where(np.arange(N) % every_n == 7, value, 0.0)


def ranges(actions: np.ndarray, recipe: dict, kind: str) -> list[str]:
    episodes = np.split(actions, len(actions) // 50)
    robot = Robot(episodes, [np.zeros((50, 1))] * len(episodes), ["go"] * len(episodes), recipe)
    return [str(f) for f in found(robot, normalization=kind, action_chunk=1) if f.kind in ("range", "gripper")]


@pytest.mark.parametrize("recipe, kind, column, words", [
    ({}, "bounds_q99", (0, rare(0.5, 300)), "0..0: .*action_normalization: bounds "),
    ({}, "bounds_q99", (2, rare(-4.0, 250)), "-4 to 0, .*action_normalization: bounds "),
    ({}, "normal", (4, DRAW.randn(N)), "'normal' .*3.% .*action_normalization: bounds_q99"),
    ({}, "normal", (3, DRAW.uniform(-9, 1, N)), "'normal' .*4.% .*action_normalization: bounds_q99"),
    ({}, "bounds_q99", (6, 255 * OPEN_OR_CLOSED), "is raw, .* 0 to 255.*'gripper /255 tar"),
    ({}, "bounds_q99", (6, 0.08 * OPEN_OR_CLOSED), "0 to 0.08.* 10 of 256 bins: scale it"),
    ({}, "bounds_q99", (6, DRAW.uniform(-3, 3, N)), r"is raw, .*-1\.\.1: divide it .*remove raw"),
    ({}, "bounds_q99", (6, DRAW.uniform(-0.9, 0.8, N)), "is raw .*many values between.*remove raw"),
    ({}, "bounds", (6, np.ones(N)), r"never changes \(always 1\)"),
    ({"absolute": 0}, "bounds_q99", (6, np.full(N, -0.3)), r"never changes \(always -0.3\)"),
    ({"action": "action[:6] target raw, action[6:] raw"}, "bounds_q99", (0, DRAW.uniform(0, 2, N)), "divide"),
])
def test_a_dimension_that_does_not_come_back_is_named(recipe, kind, column, words):
    actions = DRAW.uniform(-0.5, 0.5, (N, 7))
    actions[:, 6] = OPEN_OR_CLOSED
    if kind == "normal" or "raw" in recipe.get("action", ""):  # which are fine there
        actions[:, :6] = np.where(np.arange(N) % 2, 0.5, -0.5)[:, None]
    where, actions[:, where[0]] = column, column[1]
    (text,) = ranges(actions, recipe, kind)
    assert re.match(f"action dimension {where[0]}:? .*{words}", text), text


@pytest.mark.parametrize("recipe, column", [
    ({}, OPEN_OR_CLOSED), ({}, 2 * OPEN_OR_CLOSED - 1), ({"absolute": 0}, 255 * OPEN_OR_CLOSED),
    ({"action": "action[:6], action[6:] /255 clip invert target raw"}, 255 * OPEN_OR_CLOSED),
    ({"action": "action[:6], action[6:] *12.5 target raw"}, DRAW.uniform(0, 0.08, N)),
    ({"action": "action[:6], action[6:] target"}, DRAW.uniform(-3, 3, N)),
])
def test_a_dimension_that_comes_back_is_not(recipe, column):
    actions = np.column_stack([DRAW.uniform(-0.5, 0.5, (N, 6)), column])
    assert ranges(actions, recipe, "bounds_q99") == []


# ------------------------------------------------------------------------------------------------------------
# What the recipe means


def test_steps_to_and_fro_do_not_wrap():
    steps = list(np.random.RandomState(0).choice([-6.0, 0.0, 6.0], (10, 30, 3)))
    robot = Robot(steps, [np.zeros((30, 1))] * 10, ["go"] * 10, {"action": "action", "absolute": 0})
    assert "wraps" not in kinds(found(robot))


@pytest.mark.parametrize("ahead, told", [(0, True), (1, False)])
def test_actions_that_equal_the_state_of_their_frame(ahead, told):
    """As when an arm is led by hand. A gripper's state may be equal to its command."""
    way = np.sin(0.2 * np.arange(31)[:, None] + np.random.RandomState(0).uniform(0, 6, (20, 1, 6)))
    way = np.concatenate([way, way[..., :1] > 0], axis=2)
    robot = Robot([*way[:, ahead : 30 + ahead]], [*way[:, :30]], ["go"] * 20,
                  {"action": "action[:6] target, action[6:] target raw"})
    copies = [f.dims for f in found(robot) if f.kind == "copies"]
    assert copies == [(0, 1, 2, 3, 4, 5)] * told


@pytest.mark.parametrize("position", [True, False])
def test_a_noisy_velocity_that_keeps_its_sign(position):
    """With or without the odometry that it moves, and a recipe that does not declare it."""
    def damage(robot):
        robot.recipe = {"action": "action[:6] target, action[6:7] target raw, action[7:8]"}
        for e, action in enumerate(robot.actions):
            speed = 0.2 + 0.05 * NOISE.randn(len(action))
            robot.actions[e] = np.column_stack([action[:, :7], speed])
            place = np.concatenate([[0], np.cumsum(speed)[:-1]])
            robot.states[e] = np.column_stack([robot.states[e][:, :7], place if position else speed])
    assert "target_or_change" not in kinds(found(damaged("bimanual", damage)))


def test_targets_that_the_recipe_takes_for_changes():
    for name, columns in (("bimanual", 14), ("arm_in_degrees", 5)):
        robot = copy.deepcopy(sound(name))
        robot.recipe = {"action": f"action[:{columns}]", "absolute": 0}
        (finding,) = [f for f in found(robot) if f.severity == "high"]
        assert finding.kind == "target_or_change" and len(finding.dims) >= columns - 2
        assert found(robot, action_chunk=1) == []
        robot.recipe = {"action": f"action[:{columns}] change"}  # the user knows better
        assert "target_or_change" not in kinds(found(robot))


def velocities(robot):
    """Of joints, which keep their sign, with the state that they move."""
    for e, action in enumerate(robot.actions):
        speed = 0.02 * (1 + 0.3 * np.sin(np.arange(len(action)) / 8 + e + np.arange(6)[:, None])).T
        robot.actions[e] = np.column_stack([speed, action[:, 6]])
        robot.states[e] = np.cumsum(np.concatenate([robot.states[e][:1, :6], speed[:-1]]), axis=0)


@pytest.mark.parametrize("damage", [lambda robot: None, velocities])
def test_changes_that_the_recipe_calls_targets(damage):
    robot = damaged("changes", damage)
    assert "target_or_change" not in kinds(found(robot))
    robot.recipe = {"action": "action[:6] target, action[6:] target raw"}
    (finding,) = [f for f in found(robot) if f.kind == "target_or_change"]
    assert finding.severity == "high" and finding.dims == (0, 1, 2, 3, 4, 5) and "`change`" in finding.cure


# ------------------------------------------------------------------------------------------------------------
# Pictures


def frozen(robot, episodes, start: int, key: str = "image"):
    for e in episodes:
        shots = [*robot.cameras[key][e]]
        shots[start:] = [shots[start]] * (len(shots) - start)
        robot.cameras[key][e] = shots


@pytest.mark.parametrize("episodes, start, severity", [(range(30), 0, "high"), ([3, 4], 20, "high"), ([7], 40, "medium")])
def test_a_camera_that_hung(episodes, start, severity):
    findings = found(damaged("bimanual", lambda robot: frozen(robot, episodes, start, "wrist"), True))
    (finding,) = [finding for finding in findings if finding.kind == "camera_hung"]
    assert (finding.of, finding.severity) == ("wrist", severity)
    assert {*finding.episodes} <= {*episodes} and kinds(findings) <= {"camera_hung"}


@pytest.mark.parametrize("change", [lambda shots: shots, lambda shots: shots[:, ::2, ::2]])
def test_two_cameras_with_one_picture(change):
    def damage(robot):
        robot.cameras["wrist"] = [change(shots) for shots in robot.cameras["image"]]
    (finding,) = found(damaged("bimanual", damage, True))
    assert finding.kind == "equal_cameras" and "image and wrist" in finding.text


@pytest.mark.parametrize("value, episodes, word, severity", [
    (0, range(30), "black", "high"), (0, [2, 3, 4, 5], "black", "high"), (255, range(30), "white", "high"),
    (90, range(30), "of one color", "high"), (0, [9], "black", "medium"),
])
def test_pictures_without_content(value, episodes, word, severity):
    def damage(robot):
        for e in episodes:
            shots = robot.cameras["image"][e]
            robot.cameras["image"][e] = np.clip(value + NOISE.randint(-2, 3, shots.shape), 0, 255).astype(np.uint8)
    findings = [f for f in found(damaged("bimanual", damage, True)) if f.kind == "blank"]
    assert [(f.of, f.severity) for f in findings] == [("image", severity)] and f"are {word} in" in findings[0].text


def copied(robot, source: int, to: int) -> None:
    for values in (robot.actions, robot.states, robot.texts, *robot.cameras.values()):
        values[to] = values[source]


@pytest.mark.parametrize("pictures", [True])
@pytest.mark.parametrize("pairs, val, kind", [([(3, 8)], 0, "episode_twice"), ([(0, 28), (1, 29)], 3, "held_out_seen")])
def test_an_episode_that_occurs_twice(pairs, val, kind, pictures):
    def damage(robot):
        robot.val = val
        for pair in pairs:
            copied(robot, *pair)
    findings = [f for f in found(damaged("changes", damage, pictures)) if f.kind in (
        "episode_twice", "held_out_seen")]
    assert {f.kind for f in findings} <= {"episode_twice", "held_out_seen"} and findings
    if val:
        assert [f.kind for f in findings] == [kind] and {*findings[0].episodes} == {28, 29}
    assert f"{pairs[0][0]} = {pairs[0][1]}" in findings[0].text


# ------------------------------------------------------------------------------------------------------------
# Words


def worded(*texts):
    def damage(robot):
        robot.texts = [texts[e % len(texts)] for e in range(30)]
    return damage


def last(text: str, count: int = 1, val: int = 0):
    def damage(robot):
        robot.texts[-count:] = [text] * count
        robot.val = val
    return damage


@pytest.mark.parametrize("damage, kind, words", [
    (worded("go"), "one_instruction", "'go'"), (worded("go", "stop", ""), "unlabeled", "10 of 30"),
    (last("put the spoon into the pto"), "misspelled", "'put the spoon into the pto'"),
    (last("put the  spoon into the pot."), "misspelled", "pot."),
    (last("sing", 3, 3), "only_held_out", "'sing'"),
])
def test_instructions(damage, kind, words):
    findings = found(damaged("changes", damage))
    (finding,) = [finding for finding in findings if finding.kind == kind]
    assert words in finding.text and finding.severity == "medium" and finding.of == "instruction"


@pytest.mark.parametrize("count, alike", [([3, 1], True), ([4, 1], True), ([2, 1], False), ([10, 3], False)])
def test_one_typo_among_few(count, alike):
    assert bool(misspelled(["pick up the red cup", "pick up the red cpu"], np.array(count), np.arange(2))) == alike


def test_other_words_are_not_misspelled():
    texts = ["pick up block 1", "pick up block 2", "open the red box", "open the bed box", "put the cup left",
             "put the cap left", "close it", "CLOSE IT"]
    count = np.full(len(texts), 10)
    assert misspelled(texts, count, np.arange(len(texts))) == []


# ------------------------------------------------------------------------------------------------------------
# The program


def job(tables: dict, **changes) -> dict:
    return {"datasets": {name: (str(table.path), str(table.directory)) for name, table in tables.items()},
            "options": {"normalization": "bounds_q99", "action_chunk": 4}, "accept": [], **changes}


def on_disk(robot: Robot, root, name: str):
    directory = robot.write(root, name)
    recipe = robot.own_recipe
    return frames.frame_table(directory, recipe, recipe.camera_keys([*recipe.camera_names]), True)


def test_what_a_training_prints(tmp_path):
    """A few lines, the worst first, each with the key that silences it; from the files the second time."""
    def damage(robot):
        scaled(JOINTS, 57.3, [3])(robot)
        constant("states", 5, 0.0, 1e-7)(robot)
        constant("actions", 4, 0.0, 1e-7)(robot)
        turned("states", 3, 0.3, 0.7, 2 * np.pi, -np.pi)(robot)
        for key in ("actions", "states"):
            setattr(robot, key, [values[:30] for values in getattr(robot, key)[:12]])
        robot.texts = ["go"] * 12
        robot.cameras = {"image": [np.zeros((30, 16, 16, 3), np.uint8)] * 12}
    table = on_disk(damaged("bimanual", damage), tmp_path, "arm")
    lines = mixture_lines(job({"arm": table}))
    warnings = [line for line in lines if line.startswith("warning: arm: ")]
    assert len(warnings) == 5 and lines[-1].startswith("more_findings") and "--inspect" in lines[-1]
    kinds_ = [re.search(r"accept: \[(\w+)\]", line)[1] for line in warnings]
    assert kinds_ == sorted(kinds_, key=[*KINDS].index)
    (cached,) = table.path.glob("survey-*.json")
    for accepted in ([kinds_[0]], [f"arm.{kinds_[0]}"]):
        assert not any(kinds_[0] in line for line in mixture_lines(job({"arm": table}, accept=accepted)))
    assert mixture_lines(job({"arm": table}, accept=[f"other.{kinds_[0]}"])) == lines
    cached.write_text("[]")
    assert mixture_lines(job({"arm": table})) == []


LONG = "import time; from machinery import survey; survey.LONGEST = 1; survey.mixture_lines = time.sleep; survey.main()"


@pytest.mark.parametrize("code", ["print('warning: arm: x')", "1 / 0", LONG])
def test_a_training_survives_its_survey(code):
    process = subprocess.Popen([sys.executable, "-c", code, "99"], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL)
    printed = []
    run.Run.print_survey(SimpleNamespace(quiet=False, survey=process, line=printed.append))
    assert len(printed) == 1 and ("--inspect" in printed[0]) == ("print" not in code)


def test_the_program(tmp_path):
    """As a training starts it."""
    robot = damaged("changes", constant("actions", 1, 0.0, 1e-7))
    robot.actions, robot.states, robot.texts = robot.actions[:6], robot.states[:6], robot.texts[:6]
    table = on_disk(robot.draw_pictures(("image",)), tmp_path, "arm")
    process = frames.start_program("machinery.survey", json.dumps(job({"arm": table})))
    lines, _ = process.communicate()
    assert process.returncode == 0 and lines.startswith("warning: arm: action dimension 1: "), lines


def test_grippers_of_a_mixture(tmp_path):
    tables = {}
    for name, turn in (("open", False), ("closed", True)):
        robot = ROBOTS["changes"](seed=len(name), episodes=8).draw_pictures(("image",))
        for values in robot.actions:
            values[:, 6] = 1 - values[:, 6] if turn else values[:, 6]
        tables[name] = on_disk(robot, tmp_path, name)
    (line,) = [line for line in mixture_lines(job(tables)) if "gripper" in line]
    assert line.startswith("warning: closed: ") and "invert" in line
    assert mixture_lines(job({"open": tables["open"]})) == []


def test_a_part_of_a_big_table(monkeypatch):
    table = sound("changes").table()
    monkeypatch.setattr(survey_numbers, "ROWS", 400)
    sample = survey_numbers.Sample(table, 400)
    assert sample.numbers.tolist() == [*range(0, 30, 3)]
    np.testing.assert_array_equal(sample.frames["action"], table.frames["action"][sample.rows])
    assert json.dumps([finding._asdict() for finding in survey(table)])
