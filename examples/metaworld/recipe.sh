#!/bin/bash
# Meta-World MT50 from nothing to a success table: examples/metaworld/recipe.sh data, then train, then rollout.
# Each stage goes on where an interrupted one stopped. SEED and whatever follows the stage's name are passed on:
#   SEED=8 examples/metaworld/recipe.sh train --set max_steps=8000
# CONDITIONS=plain before each: 50 demonstrations by Meta-World's experts, undisturbed, and one camera, as others have.
set -euo pipefail
cd "$(dirname "$0")/../.."
stage=$1 seed=${SEED:-7} conditions=${CONDITIONS:-ours}
shift
export MUJOCO_GL=${MUJOCO_GL:-egl} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
case $conditions in
  ours)
    name=metaworld_mt50 cameras=[primary,wrist]
    demonstrations="--episodes 100 --cameras image gripperPOV --noise 0.2 --experts ours" ;;
  plain)
    name=metaworld_mt50_plain cameras=[primary]
    demonstrations="--episodes 50 --cameras image" ;;
  *) echo "CONDITIONS: ours or plain?" >&2; exit 2 ;;
esac
case $stage in
  data)  # and 2 demonstrations of each task that are held out
    [ -e "datasets/$name/1.0.0" ] ||
      python examples/metaworld/make_dataset.py --tasks mt50 $demonstrations --val_episodes 2 \
        --image_size 160 --multisampling 4 --jpeg_quality 90 --tail 8 --name "$name" "$@" ;;
  train)
    python train_vla.py --config configs/metaworld_mt50.yaml --deepspeed_config ds_configs/zero1.json \
      --set "data_mix=$name" "cameras=$cameras" "seed=$seed" "run_id=$name-seed$seed" "$@" ;;
  rollout)  # 10 episodes of each task
    python examples/metaworld/rollout.py --checkpoint "runs/$name-seed$seed--image_aug" \
      --tasks mt50 --trials 10 --execute 4 "$@" ;;
  *) echo "data, train or rollout?" >&2; exit 2 ;;
esac
