"""The page of serve_vla.py in a real browser."""

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from PIL import Image
from test_model import tiny_policy
from test_socket import running

from machinery.convention import Convention

LABELS = ["dx", "dy", "dz", "grip"]


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="apt-get install chromium")
@pytest.mark.parametrize("width, dark", [(1280, False), (390, True)])
def test_a_visitor_drops_pictures_and_reads_the_action(width, dark, tmp_path, monkeypatch):
    """With a token, two cameras, a state, and a chunk of 4 steps, the first of them in large numbers."""
    policy = tiny_policy(cameras=["primary", "wrist"], use_proprio=True, action_chunk=4, image_aug=True)
    stats = policy.norm_stats["a"]
    for part in stats.values():
        part["mean"] = [0.0] * 4
    robot = Convention(LABELS, LABELS, *[np.asarray] * 3)
    monkeypatch.setattr(policy, "convention", lambda key: robot)
    pictures = np.random.RandomState(0).randint(0, 255, (2, 60, 80, 3)).astype(np.uint8)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    expected = policy.predict_action([*pictures], "open <b>it</b>", None, np.array([0.5, -1, 0, 1]))
    seen = [policy.prepare_image(picture) for picture in pictures]
    with running(policy, "open sesame") as (port, *_), Browser(tmp_path / "profile", width, 900, dark) as page:
        page.open(f"http://127.0.0.1:{port}/")
        page.wait("!door.hidden && room.hidden")
        page.type("#token", "sesame")
        page.run("document.querySelector('#door button').click()")
        page.wait("!error.hidden && error.textContent.includes('token')")
        page.type("#token", "open sesame")
        page.run("document.querySelector('#door button').click()")
        page.wait("door.hidden && !room.hidden && error.hidden")
        page.type("#text", "open <b>it</b>")
        page.run("document.querySelector('#act').click()")
        page.wait("error.textContent.includes('primary')")  # has no picture yet
        for i in (0, 1):
            page.drop(f"#cameras figure:nth-child({i + 1}) .drop", tmp_path / f"{i}.png")
        page.wait("document.querySelectorAll('.drop img').length === 2")
        page.type("#state", "0.5, -1 0;1")
        page.run("document.querySelector('#act').click()")
        page.wait("!answer.hidden")
        numbers = page.run("[...document.querySelectorAll('#numbers .tile')].map(tile => [Number("
                           "tile.firstChild.textContent), tile.lastChild.textContent])")
        assert [label for _, label in numbers] == LABELS
        np.testing.assert_allclose([value for value, _ in numbers], expected[0], rtol=1e-3, atol=1e-4)
        assert page.run("document.querySelectorAll('#curves path').length") == 4
        assert page.run("document.querySelectorAll('#arrow path').length") == 1 + 4
        drawn = page.run("[...document.querySelectorAll('#seen canvas')].map(canvas => [...canvas.getContext('2d')"
                         ".getImageData(0, 0, canvas.width, canvas.height).data])")
        for ours, theirs in zip(seen, drawn, strict=True):
            np.testing.assert_array_equal(np.reshape(theirs, (*ours.shape[:2], 4))[..., :3], ours)
        assert page.run("document.documentElement.scrollWidth") <= width
        background = page.run("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)")
        page.drop(".drop", tmp_path / "broken.jpg")
        page.wait("document.querySelector('.drop img').alt === 'broken.jpg'")
        page.run("document.querySelector('#act').click()")
        page.wait("error.textContent.includes('not a JPEG or PNG') && answer.hidden")
