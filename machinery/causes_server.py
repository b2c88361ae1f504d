"""Does a running server answer as this checkpoint does? Both answer the same training frames.

The facts that the server reports (/health) are compared first. If its answers differ, the
checkpoint answers again, to changed pictures: a change that makes them equal is the cause.
Otherwise the numbers show whether the server scales its answers or has another model. Rounding
(8 bits, compiled code) changes few answers and is no fault.
"""

import base64

import numpy as np
import requests

from act import Policy
from data import Mixture
from machinery.causes import CHANGES, answer_causes
from machinery.config import UserError
from machinery.examine import Cause, spread
from machinery.images import decode_native
from machinery.wire import describe, describe_actions

KINDS = {"center_crop": "pictures", "action_q01_q99": "statistics"}  # of facts; others: model
EVERY = 7  # of the frames that `spread` chooses: about 24
BLACK = base64.b64decode(  # a PNG of 16 x 16 pixels, in place of a missing camera
    "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAIAAACQkWg2AAAAEElEQVR42mNgGAWjYBTAAAADEAAB1y2EYwAAAABJRU5Erk"
    "Jggg==")


def server_causes(policy: Policy, train: Mixture, url: str, token: str | None) -> list[Cause]:
    """Why the server at `url` does not answer as the policy does. Prints some of its facts. Raises
    UserError if it does not answer at all."""
    theirs = call(f"{url}/health", token)
    if "model" not in theirs:
        raise UserError(f"--server {url}: only clients with its token get its facts: add --token")
    print("server", url, *(f"{key} {theirs[key]}" for key in ("model", "cameras", "action_shape")))
    ours = describe(policy, theirs["model"]) | describe_actions(policy)
    for key, value in ours.items():
        if theirs.get(key, value) != value:
            text = f"the server's {key} is {theirs[key]}, this checkpoint's {value}"
            return [Cause(1.0, KINDS.get(key, "model"), text, "serve this checkpoint as it is")]

    name = train.names[0]
    table = train.tables[0]
    rows = spread(train)[::EVERY]
    texts = [table.instructions[number] for number in table.frames["instruction"][rows]]
    states = [None] * len(rows)
    if policy.cfg.use_proprio:
        # in standard form: they need not be the robot's, because both get the same
        shape = len(rows), len(ours["state"][name])
        states = np.resize(table.frames["proprio"][rows], shape).tolist()
    views = []
    given = []
    for row, text, state in zip(rows.tolist(), texts, states, strict=True):
        files = [file or BLACK for file in train.image_files(0, row)]
        views.append([decode_native(file) for file in files])
        images = [base64.b64encode(file).decode() for file in files]
        given.append(call(f"{url}/act", token, {"images": images, "instruction": text,
                                                "unnorm_key": name, "proprio": state}))
    names = ours["action"][name]

    def differences(change=np.asarray) -> list[Cause]:
        """Between the server's answers and the policy's to changed pictures."""
        changed = [[change(view) for view in frame] for frame in views]
        own = policy.predict_action(changed, texts, name, states if ours["proprio"] else None)
        return answer_causes(*(np.reshape(part, (-1, len(names))) for part in (own, given)), names)

    return explain(differences)


def call(url: str, token: str | None, request: dict | None = None):
    """The reply to a request. Raises UserError with the server's message."""
    method = "POST" if request else "GET"
    headers = {"Authorization": f"Bearer {token}"} if token else None
    try:
        reply = requests.request(method, url, json=request, headers=headers, timeout=600).json()
    except requests.RequestException as error:
        raise UserError(f"--server {url}: {error}: does serve_vla.py listen there?") from error
    if "error" in reply:
        raise UserError(f"--server {url}: {reply['error']}")
    return reply


def explain(differences) -> list[Cause]:
    """Causes for the differences between a server's answers and a policy's.

    differences: a change of pictures -> those that are left"""
    found = differences()
    for fault in CHANGES if found else ():
        if not differences(CHANGES[fault][0]):
            text = f"the server's answers are those to pictures that are {fault}"
            return [Cause(max(found).evidence, "pictures", text,
                          "look for code in the server, or before it, that changes pictures")]
    # other statistics scale every answer, and another model's may look scaled in some dimensions
    others = [cause for cause in found if "another model" in cause.text]
    return [cause._replace(kind="model" if others else "statistics",
                           text=f"the server: {cause.text}") for cause in others or found]
