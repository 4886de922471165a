#!/usr/bin/env bash
# The methods against each other: schedulers, gradient treatments, SMART, projected attention layers, augmentation.
#
#   DATA=DIR SEEDS="0 1 2" bash sweeps/methods.sh          all settings, on the CPU or the GPU
#   RUNS="pal pcgrad" EPOCHS=5 DRAWS=53 bash sweeps/methods.sh
#
# For each seed the heads are trained on the frozen encoder once, and every setting fine-tunes from them. All settings
# of a seed take the same number of draws (batches of one task): EPOCHS x DRAWS x 16. Those that take one draw a step
# have 16 times as many optimizer steps as those that combine 16 draws. See common.sh for the other settings.
source "$(dirname "$0")/common.sh"
EPOCHS=${EPOCHS:-3} DRAWS=${DRAWS:-50} BATCH=${BATCH:-32}
common=(--batch_size "$BATCH" --epochs "$EPOCHS" ${LR:+--lr "$LR"})

heads=$OUT/heads-seed@SEED@
single() { # NAME FLAGS...: one draw a step
    is_chosen "$1" && run "$1" --checkpoint "$heads" "${common[@]}" \
        --steps_per_epoch $((16 * DRAWS)) "${@:2}"
}
combined() { # NAME FLAGS...: 16 draws a step
    is_chosen "$1" && run "$1" --checkpoint "$heads" "${common[@]}" \
        --steps_per_epoch "$DRAWS" --draws_per_step 16 "${@:2}"
}

run heads --option pretrain --model "$MODEL"
is_chosen individual && run heads-individual --option individual_pretrain --model "$MODEL"
settle

single pal --scheduler pal
single random --scheduler random
single round_robin --scheduler round_robin
combined pal-16 --scheduler pal
combined pcgrad --scheduler pal --pcgrad
combined gradvac --scheduler pal --gradvac
single smart --scheduler pal --smart
single adapters --scheduler pal --pal
single eda --scheduler pal --augment eda
single drop_longest --scheduler pal --drop_longest 0.02
if is_chosen individual; then
    heads=$OUT/heads-individual-seed@SEED@
    single individual --scheduler pal
    heads=$OUT/heads-seed@SEED@
fi

# The late adapters: half of the draws fine-tune the whole model, the other half only adapters that are added to it.
if is_chosen late_adapters; then
    run late_adapters-first --checkpoint "$heads" "${common[@]}" \
        --steps_per_epoch $((8 * DRAWS)) --scheduler pal
    settle
    run late_adapters --checkpoint "$OUT/late_adapters-first-seed@SEED@" "${common[@]}" \
        --steps_per_epoch $((8 * DRAWS)) --scheduler pal --pal --train pal --lr "${ADAPTER_LR:-5e-4}"
fi
finish
