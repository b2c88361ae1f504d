"""Examine a dataset or a policy: find its faults, show them, name the cure.

    python doctor.py datasets/my_robot                                    terminal and report.html
    python doctor.py datasets/my_robot --config my_robot.yaml             by the recipe in this YAML
    python doctor.py datasets/my_robot --checkpoint runs/my_robot+n1+b32+x7
                                                   the episodes as its trained policy sees them
    python doctor.py runs/my_robot+n1+b32+x7 --seen seen                 why the policy fails
    python doctor.py RUN --rollout RUN/rollouts-step-... --server http://127.0.0.1:8000

Of a dataset it prints the survey's findings, as `data.py --inspect` does, then the episodes that do
not fit the others of their instruction (machinery/peers.py), in two lists: *wrong* ones, which
another reading explains (mirrored pictures, another instruction, shifted actions, a turned sign,
noise), and *hard* ones: rare, but they may be right. report.html, beside the dataset, shows all
this and plays the worst episodes. report.json has the numbers of every episode.

Of a policy it prints why it may fail, the likeliest cause first, each with its cure: it compares
what training saw with the requests in a folder of `serve_vla.py --record` (machinery/causes.py).
"""

import argparse
from dataclasses import replace
from pathlib import Path

from machinery.config import (  # first: it names a missing package
    Recipe,
    UserError,
    exit_with_one_line,
    read_secret,
)

# isort: split

import numpy as np

from machinery import peers
from machinery.convention import dimension_names
from machinery.files import write_json
from machinery.frames import FrameTable, bad_episodes_file, frame_table
from machinery.guess import state_fields
from machinery.inspect_data import (
    Subject,
    add_options,
    as_yaml,
    find_subjects,
    list_bad_episodes,
    locate,
)
from machinery.oxe import expand_mixture
from machinery.peers import Verdict
from machinery.report import page_facts, write_causes, write_page
from machinery.rlds import step_features
from machinery.survey import Finding, survey

FRAMES = 12  # per episode, to compare it with others; fewer if it has ALL_FRAMES
ALL_FRAMES = 40_000
LISTED = 10  # episodes in each list
PLAYED = 12  # episodes on the page
NOTES = {  # {kind of verdict: what its list means}
    "wrong": "Another reading of these episodes fits the others of their instruction better than "
             "the recorded one: look at them, and leave out the wrong ones.",
    "hard": "The others of their instruction do not predict these episodes, and no other reading "
            "fits better: they may be rare and right.",
}


# ---- Which demonstrations are bad ----------------------------------------------------------------


def open_subject(subject: Subject, index_dir: str | None) -> tuple[Subject, FrameTable]:
    """The dataset with its state, which pictures are compared with even if no policy needs it."""
    if subject.recipe.state == "0":
        state = state_fields(step_features(subject.directory))
        subject = replace(subject, recipe=replace(subject.recipe, state=state))
    return subject, subject.table(index_dir, skip_bad_episodes=True)


def rank(subject: Subject, table: FrameTable, policy=None
         ) -> tuple[list[Verdict], dict[int, float]]:
    """All episodes with an instruction, the worst first, and the policy's loss of each."""
    labeled = int(table.episodes["labeled"].sum())
    losses = {}
    if not labeled:
        return [], losses
    rows = peers.choose_rows(table, int(np.clip(ALL_FRAMES // labeled, 4, FRAMES)))
    stats = table.statistics["action"]
    if policy:
        from machinery.examine import open_mixture, see  # here: importing PyTorch takes seconds

        mixture = open_mixture(policy, subject.name, subject.recipe, table)
        stats = mixture.statistics[subject.name]["action"]
        seen, mirrored, loss = see(policy, mixture, rows)
        number = table.episode_of(rows)
        losses = {int(n): float(loss[number == n].mean()) for n in np.unique(number)}
    else:
        seen, mirrored = peers.shrink(table, rows)
    frames = peers.gather(table, rows, seen, mirrored, stats, subject.kind)
    return peers.judge(frames, peers.examine(frames)), losses


def because(reading: str, table: FrameTable, actions: list[str]) -> str:
    """A verdict's reading in words."""
    word, _, number = reading.partition(" ")
    match word:
        case "text":
            return f"fits the instruction {table.instructions[int(number)]!r}"
        case "mirrored":
            return "fits with its pictures mirrored"
        case "shift":
            return f"fits with the actions of {int(number):+d} frames"
        case "sign":
            return f"fits with {actions[int(number)]} turned round"
        case "pictures":
            return "its pictures do not match its state: of another episode, or a rare place"
        case "noise":
            return "its actions are noisy"
    return "no other reading fits better: rare, or wrong in another way"


# ---- Output --------------------------------------------------------------------------------------


def episode_lists(verdicts: list[Verdict], losses: dict[int, float], table: FrameTable,
                  actions: list[str]) -> list[dict]:
    """Print the wrong and the hard episodes -> the page's two lists of them."""
    lists = []
    for kind, note in NOTES.items():
        rows = []
        for verdict in [verdict for verdict in verdicts if verdict.kind == kind][:LISTED]:
            first = table.frames[table.first_frames[verdict.episode]]
            text = table.instructions[first["instruction"]]
            why = because(verdict.reading, table, actions)
            loss = [losses[verdict.episode]] if losses else []
            print(f"{kind} episode {verdict.episode} score {verdict.score:.2f}",
                  *(f"loss {value:.2f}" for value in loss), f"{text!r}: {why}")
            cells = [str(verdict.episode), why, text, verdict.score, verdict.lack, *loss]
            rows.append({"episode": verdict.episode, "cells": cells})
        columns = ["episode", "why", "instruction", "score", "nats", *(["loss"] if losses else [])]
        lists.append({"title": f"{kind.capitalize()} episodes", "note": note, "columns": columns,
                      "rows": rows})
    return lists


def choose_shown(verdicts: list[Verdict], findings: list[Finding], lists: list[dict]
                 ) -> dict[int, str]:
    """{episode: why}: those that the page plays. The first is the one that fits best."""
    shown = {verdicts[-1].episode if verdicts else 0: ""}
    for entry in lists:
        shown |= {row["episode"]: row["cells"][1] for row in entry["rows"][: PLAYED // 3]}
    for finding in findings:
        for number in finding.episodes[:1]:
            shown.setdefault(number, finding.kind)
    return dict(list(shown.items())[:PLAYED])


def numbers(table: FrameTable, verdicts: list[Verdict], losses: dict[int, float]) -> list[dict]:
    """The verdict of every episode, and where it is recorded."""
    entries = []
    for verdict in verdicts:
        episode = table.episodes[verdict.episode]
        entries.append({**verdict._asdict(), "loss": losses.get(verdict.episode),
                        "split": table.splits[episode["split"]],
                        "file": table.shards[episode["shard"]], "record": int(episode["record"])})
    return entries


def leave_out(table: FrameTable, entries: list[dict], index_dir: str | None) -> Path:
    """List episodes (of `numbers`) as bad, so that skip_bad_episodes leaves them out."""
    path = bad_episodes_file(table.directory, index_dir)
    list_bad_episodes(path, [(entry["file"], entry["record"], f"doctor.py: {entry['kind']}")
                             for entry in entries])
    return path


def examine_dataset(subject: Subject, policy, args: argparse.Namespace) -> None:
    """Print and write everything about one dataset."""
    subject, table = open_subject(subject, args.index_dir)
    out = args.out or table.directory / "report.html"
    try:
        out.open("ab").close()  # fail before minutes of work
    except OSError as error:
        raise UserError(f"{error}: name another file with --out") from error
    labels = dimension_names(subject.recipe, table.features)
    print(f"dataset {subject.name} directory {subject.directory} recipe {subject.source} episodes "
          f"{len(table.episodes)} frames {len(table.frames)}")
    findings = survey(table, subject.kind)
    for finding in findings:
        print(f"warning: {finding}")
    verdicts, losses = rank(subject, table, policy)
    lists = episode_lists(verdicts, losses, table, labels[0])
    shown = choose_shown(verdicts, findings, lists)
    facts = page_facts(table, subject.name, subject.kind, labels, findings, lists, shown)
    write_page(out, {**facts, "recipe": as_yaml(subject), "recipe_note": subject.source})
    entries = numbers(table, verdicts, losses)
    write_json(out.with_suffix(".json"), {"episodes": entries})
    if args.leave_out:
        path = leave_out(table, entries[: args.leave_out], args.index_dir)
        print(f"left_out {args.leave_out} in {path}: train with skip_bad_episodes: true, or remove "
              "that file to use them again")
    print(f"report {out}")


# ---- Why a policy fails --------------------------------------------------------------------------


def seen_table(directory: Path, cfg, index_dir: str | None) -> FrameTable:
    """The requests in a folder of serve_vla.py --record, as they were sent."""
    state = "state" if cfg.use_proprio else "0"
    return frame_table(locate(directory, directory.name, ""), Recipe(action="action target",
                       state=state), cfg.cameras, cfg.use_proprio, index_dir=index_dir)


def examine_policy(args: argparse.Namespace) -> None:
    """Print and write why a policy may fail."""
    from machinery.causes import find_causes
    from machinery.causes_rollout import rollout_causes
    from machinery.causes_server import server_causes
    from machinery.examine import open_data, open_policy

    policy = open_policy(str(args.what))
    mix = expand_mixture(policy.cfg.data_mix, policy.cfg.datasets)
    name = policy.dataset_name(args.data_mix or next(iter(mix.keys() & policy.norm_stats), None))
    train, held_out = open_data(policy, name, args.dataset, args.index_dir)
    seen = seen_table(args.seen, policy.cfg, args.index_dir) if args.seen else None
    print(f"policy {args.what} dataset {train.tables[0].directory}: takes a minute or two",
          flush=True)
    causes = find_causes(policy, args.what, train, held_out, seen)
    examined = "data, statistics, weights, prompt, training"
    if seen:
        examined += "; requests: pictures, words, states, answers, and what the robot did"
    if args.rollout:
        causes += rollout_causes(train, args.rollout)
        examined += "; a closed loop"
    if args.server:
        token = read_secret(args.token, "--token") if args.token else None
        causes += server_causes(policy, train, args.server.rstrip("/"), token)
        examined += "; a server"
    causes.sort(reverse=True, key=lambda cause: cause.evidence)
    for cause in causes:
        print(f"cause {cause.kind} evidence {cause.evidence:.2f} {cause.text}: {cause.cure}")
    print(f"causes {len(causes)} examined: {examined}")
    if causes:
        print("cure the first, drive again with another --record folder, and run the doctor again: "
              "one fault can look like two")
    out = args.out or (args.seen or Path()) / "report.html"
    write_causes(out, str(args.what), examined, causes)
    print(f"report {out}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", type=Path, help="a dataset, a folder of many, or a policy")
    add_options(parser)
    parser.add_argument("--checkpoint", help="a policy trained on it: a run or checkpoint")
    parser.add_argument("--leave_out", type=int, default=0, metavar="N",
                        help="list the N worst episodes as bad, for skip_bad_episodes: true")
    parser.add_argument("--seen", type=Path, metavar="DIR", help="a policy's recorded requests")
    parser.add_argument("--rollout", type=Path, metavar="DIR", help="a policy's closed loop")
    parser.add_argument("--server", metavar="URL", help="which should answer as the policy does")
    parser.add_argument("--token", help="a file or environment variable with the server's token")
    parser.add_argument("--dataset", type=Path, metavar="DIR",
                        help="a policy's training data (default: by its config)")
    parser.add_argument("--out", type=Path, help="default: report.html in the dataset's folder")
    args = parser.parse_args()
    with exit_with_one_line():
        if args.seen or not any(args.what.rglob("features.json")):
            return examine_policy(args)
        subjects = find_subjects(args.what, args.data_mix, args.config)
        policy = None
        if args.checkpoint:
            from machinery.examine import open_policy
            policy = open_policy(args.checkpoint)
            if not args.config:  # by the recipe of its training
                subjects = [replace(subject, recipe=policy.cfg.datasets.get(subject.name,
                                    subject.recipe), source=args.checkpoint,
                                    kind=policy.cfg.action_normalization) for subject in subjects]
        if args.out and len(subjects) > 1:
            raise UserError(f"--out {args.out}: there are {len(subjects)} datasets: add --data_mix")
        for subject in subjects:
            examine_dataset(subject, policy, args)


if __name__ == "__main__":
    main()
