"""What the results of a closed loop (examples/*/rollout.py) show about why a policy fails.

Evidence is a share: of episodes that failed, for causes that touch all of them, and of the failures
that are a task's, for causes that touch this task.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np

from data import Mixture
from machinery.examine import Cause, recording_of


def rollout_causes(train: Mixture, path: Path) -> list[Cause]:
    """Causes for the failures in a folder of rollout.py, or in its summary.json."""
    path = path / "summary.json" if path.is_dir() else path
    played = json.loads(path.read_text())
    tasks = played["tasks"]
    texts = {task: tasks[task]["instruction"].lower() for task in tasks}
    failed = {task: entry["trials"] - entry["successes"] for task, entry in tasks.items()}
    failures = sum(failed.values())
    rate = failures / sum(entry["trials"] for entry in tasks.values())
    print(f"rollout {path} failures {rate:.1%} simulator {played['simulator']}")
    if not failures:
        return []

    found = []
    table = train.tables[0]
    recorded = recording_of(table)
    for key in sorted(played.keys() & recorded.keys() - {"tasks"}):
        theirs, ours = played[key], recorded[key]
        if not np.isin(theirs, ours).all():  # of the recording's cameras, a policy may use some
            text = f"the rollout's {key} is {theirs}, the recording's {ours}"
            cure = f"play with {ours}, or record and train with {theirs}"
            found.append(Cause(rate, "simulator", text, cure))
    execute, chunk = played["execute"], train.cfg.action_chunk
    if 2 * execute > chunk > 1:
        text = f"{execute} of the {chunk} predicted steps are executed between two looks"
        found.append(Cause(rate / 2, "simulator", text, f"try --execute {chunk // 4 or 1}"))

    episodes = np.unique(table.episode_of(train.stretches[0][0]))
    numbers = table.frames["instruction"][table.first_frames[episodes]]
    trained = Counter(table.instructions[number].lower() for number in numbers)
    for task, entry in tasks.items():
        count = trained[texts[task]]
        if not count:
            text = f"the task {task} ({texts[task]!r}) is not in the training data"
        elif entry["successes"] or entry["interval"][1] > 1 - rate:
            continue  # it may have been bad luck
        else:
            text = f"the task {task} always fails, others do not; training has {count} episodes"
        cure = "look at its film, and record more episodes of it"
        found.append(Cause(failed[task] / failures, "training", text, cure))
    return found
