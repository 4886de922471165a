#!/usr/bin/env bash
# The methods against each other: schedulers, gradient treatments, SMART, projected attention layers, augmentation.
#
#   DATA=DIR SEEDS="0 1 2" bash sweeps/methods.sh          all settings, full epochs, on the CPU or the GPU
#   RUNS="pal pcgrad" EPOCHS=2 STEPS=200 bash sweeps/methods.sh
#
# For each seed the heads are trained on the frozen encoder once, and every setting fine-tunes from them. All settings
# take the same number of rows: EPOCHS epochs of STEPS steps (0: as many as see as many rows as the training files hold)
# of BATCH rows. See common.sh for the other settings.
source "$(dirname "$0")/common.sh"
choose pal random round_robin temperature pcgrad gradvac smart adapters eda drop_longest individual late_adapters
EPOCHS=${EPOCHS:-3} STEPS=${STEPS:-0} BATCH=${BATCH:-32}

tune() { # NAME FIRST EPOCHS FLAGS...: fine-tunes from a first run
    run "$1" "$2" --batch_size "$BATCH" --steps_per_epoch "$STEPS" --epochs "$3" ${LR:+--lr "$LR"} "${@:4}"
}

run heads "" --option pretrain --model "$MODEL"
case " $RUNS " in *" individual "*) run heads-individual "" --option individual_pretrain --model "$MODEL" ;; esac
settle

for name in $RUNS; do
    case $name in
        pal | random | round_robin | temperature) tune "$name" heads "$EPOCHS" --scheduler "$name" ;;
        pcgrad | gradvac) tune "$name" heads "$EPOCHS" --scheduler pal "--$name" ;;
        smart) tune "$name" heads "$EPOCHS" --scheduler pal --smart ;;
        adapters) tune "$name" heads "$EPOCHS" --scheduler pal --pal ;;
        eda) tune "$name" heads "$EPOCHS" --scheduler pal --augment eda ;;
        drop_longest) tune "$name" heads "$EPOCHS" --scheduler pal --drop_longest 0.02 ;;
        individual) tune "$name" heads-individual "$EPOCHS" --scheduler pal ;;
        late_adapters) # the first half of the epochs fine-tunes the whole model, the rest only adapters that are added
            tune "$name-first" heads $(((EPOCHS + 1) / 2)) --scheduler pal
            settle
            tune "$name" "$name-first" $((EPOCHS > 1 ? EPOCHS / 2 : 1)) --scheduler pal --pal --train pal \
                --lr "${ADAPTER_LR:-5e-4}" ;;
    esac
done
finish
