# What the sweeps share; sourced by them, not run. A sweep names its settings with `choose`, calls `run NAME FIRST
# FLAGS...` for each that is chosen, and `finish` at its end. From the environment:
#
#   MODEL   minilm (default), a hub name, a directory       DATA     sample (default) or a directory
#   SEEDS   "0 1 2" (default): every setting runs with each OUT      where the runs go, default runs/<sweep>
#   RUNS    names of the settings to run, default all       JOBS     runs at a time, default 1 or the number of GPUs
#   FLAGS   flags of every run, those that train heads and  PYTHON   default python
#           score soups included: "--amp bf16", "--threads 4"
#
# Each run has a GPU of its own of CUDA_VISIBLE_DEVICES, else of all that nvidia-smi lists; JOBS beyond their number share
# them. A finished run is not repeated, a stopped one goes on, a failed one is named at the end, with those that needed
# it; the others still run. The same sweep may be started several times at once, also on machines that share OUT: each
# takes what no other has, and the last to end compares all. slurm.sh starts it as a job array.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 1
MODEL=${MODEL:-minilm} DATA=${DATA:-sample} SEEDS=${SEEDS:-0 1 2} FLAGS=${FLAGS:-} PYTHON=${PYTHON:-python}
OUT=${OUT:-runs/$(basename "$0" .sh)}
GPUS=($(tr , ' ' <<<"${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null)}"))
JOBS=${JOBS:-$((${#GPUS[@]} ? ${#GPUS[@]} : 1))}
command -v flock >/dev/null || flock() { :; } # without it a sweep has to be the only one

choose() { # NAMES...: RUNS is all of them, or those that are asked for; makes OUT
    local name
    for name in ${RUNS:=$*}; do
        case " $* " in
            *" $name "*) ;;
            *) echo "RUNS: $name is no setting, expected some of: $*" >&2; exit 2 ;;
        esac
    done
    [ "$JOBS" -gt 0 ] 2>/dev/null || { echo "JOBS: $JOBS, expected a number above 0" >&2; exit 2; }
    mkdir -p "$OUT" && failures=$(mktemp) || exit 1
    trap 'rm -f "$failures"' EXIT
    trap stop INT TERM
}

stop() { # ends the running runs, which write their checkpoints first
    trap - INT
    trap '' TERM # Slurm sends it to every process, and slurm.sh passes it on
    kill -TERM $(jobs -rp) 2>/dev/null
    wait
    echo "stopped; the same command goes on from here"
    exit 130
}

settle() { # until none is running
    while [ -n "$(jobs -rp)" ]; do sleep 0.2; done
}

free_slot() { # slot is the first of the JOBS that none is running in
    while true; do
        for ((slot = 0; slot < JOBS; slot++)); do
            jobs -rp | grep -qx "${slots[slot]:-none}" || return 0
        done
        sleep 0.2
    done
}

# run NAME FIRST FLAGS...: a run for each seed, JOBS at a time. FIRST names a settled run whose checkpoint it starts
# from, or those whose checkpoints it takes, or is empty.
slots=() runs=()
run() {
    local name=$1 firsts seed
    for seed in $SEEDS; do
        free_slot
        firsts=(${2:+${2// /-seed$seed }-seed$seed})
        runs+=("$name-seed$seed")
        (
            [ ${#GPUS[@]} -eq 0 ] || export CUDA_VISIBLE_DEVICES=${GPUS[slot % ${#GPUS[@]}]}
            for first in "${firsts[@]}"; do # another sweep may have it, or have had it and been killed
                is_done "$first" || has_failed "$first" || run_once wait "$first"
                is_done "$first" && ! has_failed "$first" && continue
                fail "$name-seed$seed: not started, it needs $first"
                exit
            done
            case ${#firsts[@]} in 0) ;; 1) set -- "$@" --checkpoint ;; *) set -- "$@" --checkpoints ;; esac
            run_once try "$name-seed$seed" --data "$DATA" --seed "$seed" --name "$name" $FLAGS "${@:3}" \
                "${firsts[@]/#/$OUT/}"
        ) &
        slots[slot]=$!
    done
}

is_done() { [ -e "$OUT/$1/results.json" ]; }

has_failed() { grep -q "^$1: " "$failures"; }

fail() { echo "$1" | tee -a "$failures"; }

# run_once HOW NAME FLAGS...: HOW is what to do where another sweep has the run: wait for it, or only try. Without flags
# it has those of before.
run_once() {
    local how=$1 name=$2 folder=$OUT/$2 flags status child line
    shift 2
    exec 9>"$folder.lock" # held by the run too, as long as it lives
    [ "$how" = wait ] && flock 9 2>/dev/null
    flock -n 9 2>/dev/null
    case $? in
        0) ;;
        1) echo "$name: another sweep has it"; return ;;
        *) fail "$name: $folder.lock cannot be locked, expected OUT on a file system with locks (flock)"; return ;;
    esac
    if [ $# -eq 0 ]; then
        [ -s "$folder.flags" ] || return # killed before it began
        eval "set -- $(cat "$folder.flags")"
    fi
    flags=$(printf '%q ' "$@")
    if [ -e "$folder" ] && [ -e "$folder.flags" ] && [ "$flags" != "$(cat "$folder.flags")" ]; then
        fail "$name: was made with other flags ($(cat "$folder.flags")), expected another OUT"
    elif is_done "$name"; then
        echo "$name: finished before"
    else
        echo "$flags" >"$folder.flags"
        if [ -e "$folder/config.json" ]; then
            echo "$name: goes on"
            set -- --resume "$folder"
        else
            echo "$name: $*"
            set -- "$@" --out "$folder"
        fi
        "$PYTHON" "$ROOT/multitask_classifier.py" "$@" >>"$folder.log" 2>&1 &
        child=$!
        trap 'kill -TERM $child 2>/dev/null' TERM
        while # a signal ends the waiting, not the run, which writes its checkpoint then
            wait "$child"
            status=$?
            kill -0 "$child" 2>/dev/null
        do :; done
        trap - TERM
        if [ "$status" -eq 0 ]; then echo "$name: done"
        else
            line=$(tail -n 1 "$folder.log")
            fail "$name: exit status $status${line:+, $line}"
        fi
    fi
    exec 9>&-
}

# Waits for all runs, writes the comparison of those that have ended, and names those that failed.
finish() {
    settle
    local folders=("$OUT"/*/results.json) name elsewhere=
    for name in "${runs[@]}"; do is_done "$name" || has_failed "$name" || elsewhere=$name; done
    if [ -z "$elsewhere" ] && [ ${#folders[@]} -gt 1 ]; then
        "$PYTHON" "$ROOT/evaluation.py" "${folders[@]%/results.json}" | tee "$OUT/comparison.txt"
    fi
    if [ -s "$failures" ]; then
        echo "failed:"
        awk '!seen[$0]++ { print "  " $0 }' "$failures" # what several need is named by each
        exit 1
    fi
    if [ -n "$elsewhere" ]; then echo "$elsewhere is still running in another sweep, which compares them all"
    else echo "all runs are finished, in $OUT"; fi
}
