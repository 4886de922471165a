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
choose pal random round_robin pal-16 pcgrad gradvac smart adapters eda drop_longest individual late_adapters

tune() { # NAME FIRST STEPS FLAGS...: fine-tunes from a first run; STEPS of each epoch
    run "$1" "$2" --batch_size "${BATCH:-32}" --epochs "${EPOCHS:-3}" ${LR:+--lr "$LR"} --steps_per_epoch "$3" "${@:4}"
}
DRAWS=${DRAWS:-50}
single=$((16 * DRAWS)) half=$((8 * DRAWS)) # one draw a step
combined="$DRAWS --draws_per_step 16"

run heads "" --option pretrain --model "$MODEL"
case " $RUNS " in *" individual "*) run heads-individual "" --option individual_pretrain --model "$MODEL" ;; esac
settle

for name in $RUNS; do
    case $name in
        pal | random | round_robin) tune "$name" heads "$single" --scheduler "$name" ;;
        pal-16) tune "$name" heads $combined --scheduler pal ;;
        pcgrad | gradvac) tune "$name" heads $combined --scheduler pal "--$name" ;;
        smart) tune "$name" heads "$single" --scheduler pal --smart ;;
        adapters) tune "$name" heads "$single" --scheduler pal --pal ;;
        eda) tune "$name" heads "$single" --scheduler pal --augment eda ;;
        drop_longest) tune "$name" heads "$single" --scheduler pal --drop_longest 0.02 ;;
        individual) tune "$name" heads-individual "$single" --scheduler pal ;;
        late_adapters) # half of the draws fine-tune the whole model, the other half only adapters that are added to it
            tune "$name-first" heads "$half" --scheduler pal
            settle
            tune "$name" "$name-first" "$half" --scheduler pal --pal --train pal --lr "${ADAPTER_LR:-5e-4}" ;;
    esac
done
finish
