#!/usr/bin/env bash
# The methods against each other: schedulers, gradient treatments, regularizers, adapters, augmentation, averages.
#
#   DATA=DIR SEEDS="0 1 2" bash sweeps/methods.sh          all settings, full epochs, on the CPU or the GPU
#   RUNS="pal pcgrad" EPOCHS=2 STEPS=200 bash sweeps/methods.sh
#
# For each seed the heads are trained on the frozen encoder once, and every setting fine-tunes from them, but for mlm,
# whose encoder is another, siamese and mlp, whose heads are, and individual and separate: one model and three from heads
# that were trained alone. All settings take EPOCHS epochs of STEPS steps (0: as many as see as many rows as there are, eda's
# with those it makes, drop_longest's without those it drops, and of each model of separate those of its task) of BATCH
# rows, with LR as --lr if it is set (late_adapters' second half: ADAPTER_LR). See common.sh for the other settings.
# torchjd's methods go by their names there; CAGrad and NashMTL need its solvers.
source "$(dirname "$0")/common.sh"
choose pal random round_robin temperature task_weights pcgrad gradvac smart smart_wide bregman rdrop ema mlm \
    copy_top_layers adapters low_rank eda drop_longest individual separate siamese mlp \
    UPGrad MGDA AlignedMTL CAGrad ConFIG CRMOGM DualProj FairGrad IMTLG Krum NashMTL PCD Random \
    COSMOS DWA GeometricMean IMTLL PBI STCH UW late_adapters soup
EPOCHS=${EPOCHS:-3} STEPS=${STEPS:-0} BATCH=${BATCH:-32}
SMART_WIDE=${SMART_WIDE:---smart_eps 0.1 --smart_sigma 0.01 --smart_eta 0.1}

tune() { # NAME FIRST EPOCHS FLAGS...: fine-tunes from a first run
    run "$1" "$2" --batch_size "$BATCH" --steps_per_epoch "$STEPS" --epochs "$3" ${LR:+--lr "$LR"} "${@:4}"
}

run heads "" --option pretrain --model "$MODEL"
case " $RUNS " in
    *" individual "* | *" separate "*) run heads-individual "" --option individual_pretrain --model "$MODEL" ;;
esac
settle

for name in $RUNS; do
    case $name in
        pal | random | round_robin | temperature) tune "$name" heads "$EPOCHS" --scheduler "$name" ;;
        task_weights) tune "$name" heads "$EPOCHS" --task_weights sts=0.4 ;;
        pcgrad | gradvac | rdrop | smart) tune "$name" heads "$EPOCHS" "--$name" ;;
        smart_wide) tune "$name" heads "$EPOCHS" --smart $SMART_WIDE ;;
        bregman) tune "$name" heads "$EPOCHS" --bregman ;;
        ema) tune "$name" heads "$EPOCHS" --average ema ;;
        mlm) tune "$name" "" "$EPOCHS" --mlm_epochs 3 --model "$MODEL" ;;
        siamese) tune "$name" "" "$EPOCHS" --pairs siamese --model "$MODEL" ;;
        mlp) tune "$name" "" "$EPOCHS" --head mlp --model "$MODEL" ;;
        copy_top_layers) tune "$name" heads "$EPOCHS" --copy_top_layers 2 ;;
        adapters) tune "$name" heads "$EPOCHS" --pal ;;
        low_rank) tune "$name" heads "$EPOCHS" --pal --pal_kind low_rank ;;
        eda) tune "$name" heads "$EPOCHS" --augment eda ;;
        drop_longest) tune "$name" heads "$EPOCHS" --drop_longest 0.02 ;;
        individual) tune "$name" heads-individual "$EPOCHS" ;;
        separate) # models of one task each
            for task in sst para sts; do tune "$name-$task" heads-individual "$EPOCHS" --tasks "$task"; done ;;
        late_adapters) # the first half of the epochs fine-tunes the whole model, the rest only adapters that are added
            tune "$name-first" heads $(((EPOCHS + 1) / 2))
            settle
            tune "$name" "$name-first" $((EPOCHS > 1 ? EPOCHS / 2 : 1)) --pal --train pal --lr "${ADAPTER_LR:-5e-4}" ;;
        soup) # of models that began with the same heads
            settle
            for of in pal random temperature; do tune "$of" heads "$EPOCHS" --scheduler "$of"; done
            settle
            run soup "pal random temperature" --option soup --soup greedy ;;
        COSMOS | DWA | GeometricMean | IMTLL | PBI | STCH | UW) # weigh losses, whose gradients stay as they are
            tune "$name" heads "$EPOCHS" --treatment "$name" --gradient_scale own ;;
        *) tune "$name" heads "$EPOCHS" --treatment "$name" ;;
    esac
done
finish
