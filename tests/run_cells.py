"""Many short trainings in one job, for test_zero.py: `deepspeed tests/run_cells.py --config cells.json`.

cells.json: {name: {"config": keys of TrainConfig, "ds_config": a DeepSpeed JSON}}. Each runs as if started by
itself; only the start of Python and of the process group, which take longest, are shared. A "*" in
pretrained_checkpoint stands for what is not known beforehand, the loss in the checkpoint's name.
"""

import argparse
import gc
import glob
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import config
import ranks
import train_vla

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path)
    parser.add_argument("--local_rank")
    cells = json.loads(parser.parse_args().config.read_text())
    neighbour = ranks.start_job()
    gc.freeze()  # DeepSpeed collects garbage whenever it starts: let it not look at all that was imported
    for name, cell in cells.items():
        print(f"cell {name}", flush=True)
        values = cell["config"]
        if "pretrained_checkpoint" in values:
            (values["pretrained_checkpoint"],) = glob.glob(values["pretrained_checkpoint"])
        cfg = config.TrainConfig(**values)
        train_vla.train(cfg, cell["ds_config"])
        gc.collect()  # an engine and its hooks refer to each other
    gc.unfreeze()
    neighbour.release()
    train_vla.dist.destroy_process_group()
