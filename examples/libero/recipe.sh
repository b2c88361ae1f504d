#!/bin/bash
# LIBERO from nothing to a success table: examples/libero/recipe.sh data, then train, then rollout.
# An interrupted stage continues where it stopped. SEED and all arguments after the stage are passed on:
#   SEED=8 examples/libero/recipe.sh train --set max_steps=8000
# WORK has datasets and runs.
set -euo pipefail
cd "$(dirname "$0")/../.."
stage=$1 seed=${SEED:-7} work=${WORK:+$WORK/}
shift
export MUJOCO_GL=${MUJOCO_GL:-egl} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
case $stage in
  expert)  # the expert's success from LIBERO's own start states
    python examples/libero/expert.py "$@" ;;
  data)  # 50 + 1 demonstrations of each of the expert's 16 tasks
    [ -e "${work}datasets/libero_scripted/1.0.0" ] ||
      python examples/libero/make_dataset.py --episodes 50 --val_episodes 1 --out "${work}datasets" "$@" ;;
  train)
    python train_vla.py --config configs/libero_scripted.yaml --deepspeed_config ds_configs/zero1.json \
      --set "seed=$seed" "run_id=libero_scripted-seed$seed" "data_root_dir=${work}datasets" "run_root_dir=${work}runs" \
      "$@" ;;
  rollout)  # 20 start states of each task
    for tasks in "libero_object" "libero_spatial --tasks 0 1 2 3 7 8"; do
      python examples/libero/rollout.py --checkpoint "${work}runs/libero_scripted-seed$seed--image_aug" \
        --suite $tasks --trials 20 "$@"  # not quoted: several words
    done ;;
  *) echo "expert, data, train or rollout?" >&2; exit 2 ;;
esac
