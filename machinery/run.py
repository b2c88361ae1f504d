"""A training run's directory: what describes it, its log, and where its training starts.

    runs/demo+n1+b32+x7/
        config.yaml, config.json    all keys, including those that were filled in
        dataset_statistics.json     how actions are normalized, in OpenVLA's format
        ds_config.json, tokenizer/
        metrics.jsonl               a line for each line of the log, with more numbers
        curves.png                  its curves, drawn when training ends
        first_batch.png             the first images, instructions and actions that the model saw
        events.out.tfevents.*       TensorBoard's curves
        checkpoints/step-...        see checkpoint.py

A run that has a checkpoint resumes from its own. `settle` fills in the keys that the YAML
leaves open.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import time
import types
import uuid
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch.distributed as dist
import yaml
from tqdm import tqdm

from action_tokenizer import IGNORE_INDEX, MAX_PROMPT, prompt_ids
from data import Mixture, open_tables
from machinery import connect, frames, oxe
from machinery.checkpoint import (
    CheckpointError,
    list_checkpoints,
    on_all_ranks,
    open_checkpoint,
    save_checkpoint,
)
from machinery.compiler import check_compile
from machinery.config import PATHS, PROJECT, TrainConfig, UserError, run_directory, walk
from machinery.connect import agree, gather, progress, wait_until
from machinery.files import atomic, read_json, read_metrics, take_lock, write_json
from machinery.frames import DataError, FrameTable, digest, without_version
from machinery.images import contact_sheet
from machinery.metrics import tag
from machinery.weights import SHAPE, describe_base, fingerprint, start_from

# keys that give the weights their meaning: a checkpoint is useless under another value
MEANING = """vision_backbone llm_backbone tokenizer add_action_tokens arch_specifier prompt_style
    image_size freeze_vision_backbone freeze_llm_backbone unfreeze_last_llm_layer lora_rank
    lora_alpha frozen_weights cameras use_proprio window_size action_chunk parallel_decoding
    action_head film action_normalization""".split()
# keys that determine its start and its batches: a run continues with the same ones only
BATCHES = """base_vlm pretrained_checkpoint data_mix datasets balance_weights image_aug
    skip_bad_episodes max_prefix seed global_batch_size""".split()
# the numbers on the terminal (metrics.jsonl and TensorBoard get all of them)
SHOWN = """loss accuracy grad_norm samples_per_second mfu eval/loss eval/accuracy
    eval/accuracy_of_most_frequent_bin""".split()


class Run:
    """A run. Only rank 0 writes.

    path: its directory; checkpoint: the one to continue from, opened, or None; step: how many
    steps it has taken; base: what its checkpoints are based on, see weights.describe_base
    """

    def __init__(self, cfg: TrainConfig):
        """Raises UserError if another job trains in the run, if not all ranks see its directory, or
        if training would not start where `cfg` expects it."""
        self.quiet = dist.get_rank() != 0
        self.path = run_directory(cfg)
        self.saves = cfg.keep_checkpoints != "none"
        self.keep_checkpoints = cfg.keep_checkpoints  # 0: all
        self.on_save_error = cfg.on_save_error
        self.lock = None
        self.started = time.time()
        self.prove_shared()
        # rank 0 decides: other machines may list an older state of a network disk
        own = gather([path.name for path in list_checkpoints(self.path / "checkpoints")])[0]
        given = cfg.pretrained_checkpoint
        self.checkpoint = None
        if own:
            self.checkpoint = open_checkpoint(self.path / "checkpoints" / own[-1])
        elif given and cfg.is_resume:
            if not Path(given, "checkpoint.json").exists():
                raise UserError(f"pretrained_checkpoint {given} is not a checkpoint of this "
                                "project: set is_resume: false to start from its weights")
            self.checkpoint = open_checkpoint(Path(given))
        self.step = 0
        self.base = None
        if self.checkpoint:
            self.step = self.checkpoint.meta["step"]
            self.base = self.checkpoint.base
        if not own:
            self.check_resume_point(cfg)

    def prove_shared(self) -> None:
        """Raise UserError on all ranks unless all of them read what rank 0 has just written into
        the run's directory. Without this, the first checkpoint would fail after hours."""
        progress.at(f"find {self.path}")
        new = not self.path.exists()
        proof = self.path / ".shared"
        if not self.quiet:
            if not new:
                self.claim()
            self.path.mkdir(parents=True, exist_ok=True)
            proof.write_text(uuid.uuid4().hex)
        token = gather(None if self.quiet else proof.read_text())[0]

        def unseen() -> str | None:
            with contextlib.suppress(OSError):
                for folder in (self.path.parent, self.path):
                    os.listdir(folder)  # NFS remembers for a minute that a file was not there
                if proof.read_text() == token:
                    return None
            return (f"{self.path} is not the folder that rank 0 writes to: set run_root_dir to one "
                    "that all machines share")

        try:
            if self.saves:
                on_all_ranks(lambda: wait_until(unseen, connect.SOON))
        finally:
            with contextlib.suppress(OSError):
                if not self.quiet:
                    proof.unlink()
                if not self.quiet and new:
                    self.path.rmdir()

    def claim(self) -> None:
        """Create the directory, and make sure that no other job trains in it."""
        if self.quiet or self.lock:
            return
        (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        try:
            self.lock = take_lock(self.path / ".lock", wait=False)
        except BlockingIOError as error:
            raise UserError(f"{self.path}: another job is training there: wait for it, or set "
                            "run_id") from error

    def check_resume_point(self, cfg: TrainConfig) -> None:
        """Raise UserError unless training starts at the step and epoch that `cfg` expects."""
        for key, expected in (("step", cfg.resume_step), ("epoch", cfg.resume_epoch)):
            actual = self.checkpoint.meta[key] if self.checkpoint else 0
            if expected not in (None, actual):
                raise UserError(f"resume_{key} is {expected}, but training would start at {key} "
                                f"{actual}: correct pretrained_checkpoint, or remove resume_{key}")

    def describe(self, cfg: TrainConfig, ds_config: dict, mixture: Mixture,
                 held_out: Mixture | None) -> None:
        """Write the files that describe the run, now that everything is open, and start its log."""
        shares = " ".join(f"{name}:{share:.4f}"
                          for name, share in zip(mixture.names, mixture.shares, strict=True))
        self.line(f"data frames {mixture.sizes.sum()} epoch_frames {mixture.epoch_length} "
                  f"shares {shares}")
        for name in cfg.features:  # the user's own datasets
            recipe = cfg.datasets[without_version(name)]
            table = mixture.tables[mixture.names.index(name)]
            if table.unused:
                self.line(f"unused {name} {', '.join(table.unused)}")
            if table.given.exists():
                self.line(f"statistics {name} {table.given}")
            self.line(f"recipe {name} action {recipe.action!r} state {recipe.state!r}")
        for name, why in oxe.left_out(cfg.data_mix, cfg.datasets).items():
            self.line(f"warning: {name}: left out: {why}")
        self.print_survey()
        if not held_out:
            self.line("warning: no evaluation: a dataset has no held-out frames")
        self.line(f"startup_s {time.time() - self.started:.1f}")
        if self.quiet:
            return
        self.claim()
        (self.path / "config.yaml").write_text(yaml.safe_dump(cfg.model_dump(), sort_keys=False))
        for name, values in (("config", cfg.model_dump()), ("ds_config", ds_config),
                             ("dataset_statistics", mixture.statistics)):
            write_json(self.path / f"{name}.json", values)
        mixture.tokenizer.save_pretrained(self.path / "tokenizer")
        self.open_log()

    # ---- The survey of the data ------------------------------------------------------------------

    def start_survey(self, cfg: TrainConfig, tables: list) -> None:
        """Look for faults in the data (survey.py) in a process that runs while the model is built.
        """
        if self.quiet:
            return
        job = {"datasets": {name: (str(table.path), str(table.directory))
                            for name, _, _, table in tables},
               "options": {"normalization": cfg.action_normalization,
                           "action_chunk": cfg.action_chunk},
               "accept": cfg.accept}
        self.survey = frames.start_program("machinery.survey", json.dumps(job),
                                           stderr=subprocess.DEVNULL)

    def print_survey(self) -> None:
        """Its findings. The training does not depend on them, and does not wait for long."""
        if self.quiet:
            return
        lines, _ = self.survey.communicate()
        if self.survey.returncode:
            self.line("warning: the survey of the data failed or took too long: python data.py "
                      "--inspect DIR repeats it")
        for line in lines.splitlines():
            self.line(line)

    # ---- The log ---------------------------------------------------------------------------------

    def open_log(self) -> None:
        """Start or continue the files. Lines logged after the checkpoint that training resumes from
        are dropped: those steps are about to be repeated."""
        # TensorBoard's own switch against importing TensorFlow, whose builds may crash beside torch
        sys.modules["tensorboard.compat.notf"] = types.ModuleType("tensorboard.compat.notf")
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(self.path, purge_step=self.step + 1)
        text = (self.path / "config.yaml").read_text()
        self.board.add_text("config", f"```\n{text}\n```")
        lines = [line for line in read_metrics(self.path) if line["step"] <= self.step]
        with atomic(self.path / "metrics.jsonl") as scratch:
            scratch.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def line(self, text: str) -> None:
        """One line on the terminal, clear of the progress bar."""
        if not self.quiet:
            tqdm.write(text)
            sys.stdout.flush()

    def steps(self, total: int):
        """The numbers of the steps that remain, with a progress bar on a terminal."""
        return tqdm(range(self.step, total), "train", initial=self.step, total=total, unit="step",
                    disable=True if self.quiet else None)

    def log(self, step: int, values: dict[str, float], shown_keys: Iterable[str] = SHOWN) -> None:
        """Some numbers on the terminal, all in metrics.jsonl and TensorBoard."""
        if self.quiet:
            return
        shown = " ".join(f"{key} {values[key]:.4g}" for key in shown_keys if key in values)
        if "eta_seconds" in values:
            shown += f" eta {tqdm.format_interval(values['eta_seconds'])}"
        self.line(f"step {step} {shown}")
        try:
            with open(self.path / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            for key, value in values.items():
                self.board.add_scalar(tag(key), value, step)
            self.board.flush()
        except OSError as error:  # not a reason to end a training
            self.line(f"warning: not logged: {error}")

    def first_batch(self, batch: dict, mixture: Mixture) -> None:
        """Show the model's first inputs: a prompt and an action here, and in first_batch.png and
        TensorBoard all images of some samples, oldest first, with both."""
        if self.quiet:
            return
        tiles = []
        times = math.ceil(224 / batch["images"].shape[2])  # small images are enlarged
        samples = zip(batch["images"][:8], batch["input_ids"][:8], batch["labels"][:8], strict=True)
        for images, ids, labels in samples:
            learned = labels != IGNORE_INDEX
            answer = labels[learned]
            prompt = mixture.tokenizer.decode(ids[: int(learned.int().argmax())])
            first_action = answer[: mixture.cfg.action_dim].numpy()
            action = " ".join(f"{a:.2f}" for a in mixture.action_tokenizer.decode(first_action))
            views = list(images.numpy().repeat(times, axis=1).repeat(times, axis=2))
            tiles.append((views, f"{prompt}\naction {action}"))
        self.line(f"first_prompt {prompt!r}")
        self.line(f"first_action {action}")
        sheet = contact_sheet(tiles, 2)
        sheet.save(self.path / "first_batch.png")
        self.board.add_image("view/first_batch", np.asarray(sheet), dataformats="HWC")

    def end(self, step: int, total: int, reason: str) -> None:
        """The curves, and the last line of the log."""
        if not self.quiet:
            frames.start_program("machinery.plots", str(self.path)).communicate()
        if step == total:
            seconds = time.time() - self.started
            self.line(f"done steps {total} seconds {seconds:.0f} run {self.path}")
        else:
            cure = "run the same command again to continue"
            if not self.saves:
                cure = "nothing was saved (keep_checkpoints: none)"
            self.line(f"stopped by {reason} at step {step} of {total}: {cure}")

    # ---- Checkpoints -----------------------------------------------------------------------------

    def save(self, engine, step: int, epoch: int, loss: float, must: bool) -> None:
        """Save a checkpoint. A failure ends the run if `must`, or if on_save_error is stop."""
        tag = f"step-{step:06d}-epoch-{epoch:02d}-loss={loss:.4f}"
        try:
            path = save_checkpoint(engine, self.path / "checkpoints", tag,
                                   {"step": step, "epoch": epoch, "base": self.base},
                                   self.keep_checkpoints)
        except CheckpointError as error:
            if must or self.on_save_error == "stop":
                raise
            self.line(f"warning: {error}; training continues (on_save_error: continue)")
            return
        self.line(f"saved {path}")


# ---- Where a training starts ---------------------------------------------------------------------


def settle(cfg: TrainConfig, ds_config: dict) -> dict:
    """Fill in the keys that the YAML leaves open -> the arguments of train_vla.train: cfg,
    ds_config, run, tables (of the data), tokenizer, weights (or None).

    First the run that continues, then the data, then the weights that training begins with. From
    here on the config does not change. Raises UserError if it contradicts one of these.
    """
    agree(settings(cfg) | ds_config)
    if cfg.compile:
        check_compile()
    cfg = oxe.read_recipes(cfg)
    run = Run(cfg)
    if run.checkpoint:
        cfg = resumed_config(cfg, run)
    progress.at("index the data")
    tables = open_tables(cfg)  # fails on bad data before gigabytes of weights are downloaded
    cfg = cfg.model_copy(update=data_facts(cfg, tables))
    run.start_survey(cfg, tables)
    if run.step:
        check_statistics(run.checkpoint.run_dir, tables)
    agree({f"dataset {name}": frames_of(table) for name, _, _, table in tables})
    progress.at("open the weights")
    cfg, tokenizer, weights = start_from(cfg, run.checkpoint)
    agree({"tokenizer": digest(sorted(tokenizer.get_vocab().items())),
           "weights": fingerprint(weights.tensors) if weights else None})
    progress.at("build the model")
    check_instructions(cfg, tables, tokenizer)
    if cfg.rests_on_base and not run.checkpoint:
        run.base = describe_base(cfg.pretrained_checkpoint or cfg.base_vlm, weights.tensors)
    return {"cfg": cfg, "ds_config": ds_config, "run": run, "tables": tables,
            "tokenizer": tokenizer, "weights": weights}


def settings(cfg: TrainConfig) -> dict:
    """What must be the same on all machines. Paths may differ, and so may num_workers."""
    keys = {key: value for key, value in walk(cfg.model_dump(exclude={*PATHS, "num_workers"}))
            if not isinstance(value, dict)}
    lesson = [PROJECT / f"{name}.py" for name in ("action_tokenizer", "data", "model", "train_vla")]
    code = [path.read_bytes() for path in (*lesson, *sorted(PROJECT.glob("machinery/*.py")))]
    packages = {name: version(name) for name in ("torch", "deepspeed", "transformers", "timm")}
    return {**packages, "code": digest(code), **keys}


def frames_of(table: FrameTable) -> str:
    """A dataset's fingerprint: its episodes, and the beginnings of its files. Statistics would not
    do: their last digits may depend on the CPU that computed them."""
    heads = []
    for shard in table.shards[:16]:
        with open(table.directory / shard, "rb") as file:
            heads.append(file.read(4096))
    return digest((table.shards, table.instructions, table.episodes.tobytes(), heads))


def resumed_config(cfg: TrainConfig, run: Run) -> TrainConfig:
    """The config with the values of MEANING that the checkpoint was trained with. Raises UserError
    if the YAML sets another value of a key that may not change."""
    run_dir = run.checkpoint.run_dir
    try:
        own = TrainConfig(**json.loads((run_dir / "config.json").read_text()))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{run_dir / 'config.json'}: cannot interpret the checkpoint without "
                              f"it: {error}") from error
    own_run = run_dir.resolve() == run.path.resolve()  # runs/ may be a link
    fixed = MEANING + BATCHES if own_run else MEANING
    was = dict(walk(own.model_dump()))  # {"datasets.my_robot.primary": "image", ...}
    now = dict(walk(cfg.model_dump()))
    for name in was | now:
        key = name.partition(".")[0]
        filled_in = key in SHAPE and key not in cfg.model_fields_set  # by the weights it began with
        if key not in fixed or filled_in or same(name, was.get(name), now.get(name)):
            continue
        raise UserError(f"{name} was {was.get(name)!r} and is now {now.get(name)!r}, but "
                        f"{run.checkpoint.path} continues a training with the former: set it back, "
                        "or set run_id to start another run")
    return cfg.model_copy(update={key: getattr(own, key) for key in MEANING})


def same(path: str, was, now) -> bool:
    """Do two values of a key mean the same? Files may have moved, and a run knows all fields of
    its language model, not only those in the YAML."""
    if path in ("base_vlm", "pretrained_checkpoint", "tokenizer") and was and now:
        return Path(was).name == Path(now).name
    if path == "llm_backbone" and isinstance(now, str):
        return Path(was.get("_name_or_path", now)).name == Path(now).name
    if path.startswith("llm_backbone."):
        return now in (None, was)
    return was == now or (isinstance(was, dict) and isinstance(now, dict))  # their parts follow


def data_facts(cfg: TrainConfig, tables: list) -> dict:
    """The keys of TrainConfig that the data determine. Raises UserError if datasets differ in
    their action dimensions."""
    action_dims = {name: len(table.statistics["action"]["mask"]) for name, _, _, table in tables}
    if len(set(action_dims.values())) > 1:
        raise UserError(f"data_mix: cannot mix datasets of different action dimensions: "
                        f"{action_dims}")
    proprio_dims = [len(table.statistics["proprio"]["mean"]) for *_, table in tables]
    features = {name: table.features for name, _, recipe, table in tables
                if replace(recipe, instructions=[]) != oxe.DATASETS.get(without_version(name))}
    return {"action_dim": next(iter(action_dims.values())), "features": features,
            "proprio_dim": max(proprio_dims) if cfg.use_proprio else 0}


def check_instructions(cfg: TrainConfig, tables: list, tokenizer) -> None:
    """Raise DataError for an instruction that is too long for a prompt: training would stop only
    when it draws that frame, perhaps after days, and again whenever it resumes."""
    for *_, table in tables:
        for text in table.instructions:
            if len(text.encode()) > MAX_PROMPT // 2:  # bytes; a token has at least one
                try:
                    prompt_ids(tokenizer, text, cfg.prompt_style)
                except UserError as error:
                    raise DataError(f"{table.directory}: {error}") from error


def check_statistics(run_dir: Path, tables: list) -> None:
    """Raise UserError if a run would continue on data with other statistics. Its policy would act
    by one of them, and be trained with both."""
    path = run_dir / "dataset_statistics.json"
    statistics = {name: table.statistics for name, _, _, table in tables}
    if path.exists() and read_json(path) != statistics:
        raise UserError(f"{path} differs from the statistics of {', '.join(statistics)} now: set "
                        "run_id (and to begin with the old weights, pretrained_checkpoint and "
                        "is_resume: false)")
