"""serve_vla.py --record: what real clients sent and got, read back with the project's own reader."""

import json
import signal
import socket
import time

import numpy as np
import pytest
from test_serve import Client, file, json_numpy, picture, query, text
from test_socket import seen, talking

from act import load_vla
from machinery.images import decode_native
from machinery.rlds import Steps, open_builder, read_records, step_features


@pytest.fixture(scope="module")
def vla(colors):
    return load_vla(colors)


def read_back(folder) -> list[dict]:
    """A dataset's episodes, by their beginning: {feature: values}."""
    features = step_features(folder)
    episodes = []
    for path in open_builder(folder).info.splits["train"].filepaths:
        for offset, data in read_records(path):
            steps = Steps(data, offset, features)
            episodes.append({name: steps[name] for name in features})
    return sorted(episodes, key=lambda episode: episode["time"][0])


def wait_for(condition, seconds: float = 60) -> None:
    stop = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < stop
        time.sleep(0.05)


def test_requests_become_a_dataset(colors, vla, tmp_path, commands, serving):
    folder = tmp_path / "seen"
    lossless, jpeg, other = picture(1, 0), file(picture(0, 1), "jpeg"), picture(1, 1, 3)
    shown = decode_native(jpeg)
    answers = [vla.predict_action(image, "hold it", "cold") for image in (lossless, shown, other)]
    with serving(colors, "--record", folder) as (process, port, _):
        client = Client(port)
        for episode in (1, "two"):
            assert client.send(query(json_numpy(lossless), episode=episode)) == (200, json_numpy(answers[0]))
            for ignored in ({}, {"state": [0.5, -2, 1]}, {"state": json_numpy(np.arange(3.0))}, {"state": "no numbers"}):
                reply = client.send(query(text(jpeg), episode=episode, **ignored))
                assert reply == (200, answers[1].tolist())  # a state that the model does not take changes nothing
        assert client.send(query(text(jpeg), instruction="", episode="two"))[0] == 400  # not answered: not recorded
        with talking(port) as (ask, *_):
            for words in ("hold it", "let go"):
                assert "actions" in ask(seen(other, prompt=words))
        # the first episodes to end are those of the websocket, when it closes
        info = folder / "1.0.0/dataset_info.json"
        wait_for(lambda: len(json.loads(info.read_text())["splits"][0]["shardLengths"]) >= 2)
        connection = socket.create_connection(("127.0.0.1", port))
        process.send_signal(signal.SIGKILL)  # the others end with the server
        process.wait()
        connection.close()
    wait_for(lambda: len(json.loads(info.read_text())["splits"][0]["shardLengths"]) == 4)

    episodes = read_back(folder / "1.0.0")
    assert [episode["episode_metadata/episode"] for episode in episodes] == [[b"1"], [b"two"], [b""], [b""]]
    assert [episode["language_instruction"] for episode in episodes] == [
        [b"hold it"] * 5, [b"hold it"] * 5, [b"hold it"], [b"let go"]]
    for episode in episodes[:2]:
        images = episode["observation/primary"]
        np.testing.assert_array_equal(decode_native(images[0]), lossless)
        assert images[1] == jpeg  # unchanged
        given = np.float32([answers[0], *[answers[1]] * 4])
        np.testing.assert_array_equal(episode["action"], given)
        np.testing.assert_array_equal(episode["chunk"], given[:, None])
        assert [json.loads(state) for state in episode["unused_state"]] == [[], [], [0.5, -2, 1], [0, 1, 2], []]
        assert (np.diff(episode["time"]) > 0).all() and abs(episode["time"][0] / 1e9 - time.time()) < 600
        assert episode["unnorm_key"] == [b"cold"] * 5 and episode["prefix"].tolist() == [0] * 5
    np.testing.assert_array_equal(decode_native(episodes[2]["observation/primary"][0]), other)
    np.testing.assert_array_equal(episodes[2]["action"][0], np.float32(answers[2]))

    # a further server of the same model appends; data.py and TFDS read what it wrote
    with serving(colors, "--record", folder) as (_, port, _):
        assert Client(port).send(query(text(jpeg)))[0] == 200
        second = ["--checkpoint", colors, "--device", "cpu", "--port", 0, "--record", folder]
        ((status, printed),) = commands(("", {}, "serve_vla.py", second))
        assert status == 1 and "another server" in printed, printed
    assert len(read_back(folder / "1.0.0")) == 5
    ((status, printed),) = commands(("", {}, "data.py", ["--inspect", folder]))
    assert status == 0 and "episodes 5 frames 13" in printed and "bad episode" not in printed, printed


def test_another_model_s_recording_is_not_mixed_in(colors, tmp_path, commands):
    described = tmp_path / "seen/1.0.0/features.json"
    described.parent.mkdir(parents=True)
    described.write_text("{}")
    arguments = ["--checkpoint", colors, "--device", "cpu", "--port", 0, "--record", tmp_path / "seen"]
    ((status, printed),) = commands(("", {}, "serve_vla.py", arguments))
    assert status == 1 and "choose another folder" in printed, printed
    assert described.read_text() == "{}"
