#!/bin/bash
# Meta-World MT50 from nothing to a success table: examples/metaworld/recipe.sh data, then train, then rollout.
# An interrupted stage continues where it stopped. SEED and all arguments after the stage are passed on:
#   SEED=8 examples/metaworld/recipe.sh train --set max_steps=8000
# CONFIG=NAME trains and plays another file of configs/; equal-data records as for other projects' policies. speedrun does
# all three against the clock. NUM_GPUS GPUs train; WORK has datasets and runs.
set -euo pipefail
cd "$(dirname "$0")/../.."
stage=$1 seed=${SEED:-7} config=${CONFIG:-metaworld_mt50} gpus=${NUM_GPUS:-1} work=${WORK:+$WORK/}
shift
export MUJOCO_GL=${MUJOCO_GL:-egl} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
case $stage in
  data)  # 100 + 2 demonstrations of each task from two cameras
    [ -e "${work}datasets/metaworld_mt50/1.0.0" ] ||
      python examples/metaworld/make_dataset.py --tasks mt50 --episodes 100 --val_episodes 2 \
        --cameras image gripperPOV --image_size 160 --multisampling 4 --jpeg_quality 90 \
        --noise 0.2 --tail 8 --experts ours --name metaworld_mt50 --out "${work}datasets" "$@" ;;
  train)
    launcher=python
    [ "$gpus" = 1 ] || launcher="deepspeed --num_gpus $gpus"
    $launcher train_vla.py --config "configs/$config.yaml" --deepspeed_config ds_configs/zero1.json \
      --set "seed=$seed" "run_id=$config-seed$seed" "data_root_dir=${work}datasets" "run_root_dir=${work}runs" \
      "per_device_batch_size=$((256 / gpus))" "$@" ;;
  rollout)  # 10 episodes of each task
    python examples/metaworld/rollout.py --checkpoint "${work}runs/$config-seed$seed" \
      --tasks mt50 --trials 10 --execute 4 "$@" ;;
  equal-data)  # 50 + 2 undisturbed ones by Meta-World's experts, one camera
    [ -e "${work}datasets/metaworld_mt50_equal/1.0.0" ] ||
      python examples/metaworld/make_dataset.py --tasks mt50 --episodes 50 --val_episodes 2 \
        --cameras image --image_size 224 --multisampling 4 --jpeg_quality 90 \
        --tail 8 --name metaworld_mt50_equal --out "${work}datasets" "$@" ;;
  speedrun)
    python examples/metaworld/speedrun.py "$@" ;;
  *) echo "data, equal-data, train, rollout or speedrun?" >&2; exit 2 ;;
esac
