# What the sweeps share; sourced by them, not run. A sweep calls `run NAME FLAGS...` for each of its settings and
# `finish` at its end. Settings come from the environment:
#
#   MODEL   minilm (default), a hub name, a directory       DATA     sample (default) or a directory
#   SEEDS   "0 1 2" (default): every setting runs with each OUT      where the runs go, default runs/<sweep>
#   RUNS    names of the settings to run, default all       JOBS     runs at a time, default 1
#   FLAGS   flags for every run, such as "--amp bf16"       PYTHON   default python
#
# A finished run is not repeated, a stopped one goes on, a failed one is named at the end and the others still run.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 1
MODEL=${MODEL:-minilm} DATA=${DATA:-sample} SEEDS=${SEEDS:-0 1 2} JOBS=${JOBS:-1} FLAGS=${FLAGS:-} PYTHON=${PYTHON:-python}
OUT=${OUT:-runs/$(basename "$0" .sh)}
mkdir -p "$OUT" && failures=$(mktemp) || exit 1
trap 'rm -f "$failures"' EXIT

stop() { # ends the running runs, which write their checkpoints first
    trap - INT TERM
    local running
    running=$(jobs -rp)
    [ -n "$running" ] && kill -TERM $running 2>/dev/null
    wait
    echo "stopped; the same command goes on from here"
    exit 130
}
trap stop INT TERM

is_chosen() { # whether the setting is in RUNS
    [ -z "${RUNS:-}" ] && return 0
    case " $RUNS " in *" $1 "*) return 0 ;; esac
    return 1
}

wait_for_jobs() { # until fewer than $1 are running
    while [ "$(jobs -rp | wc -l)" -ge "$1" ]; do sleep 0.2; done
}

settle() { wait_for_jobs 1; }

# run NAME FLAGS...: a run for each seed, JOBS at a time; @SEED@ in a flag is the seed. `settle` waits for all.
run() {
    local name=$1 seed
    shift
    for seed in $SEEDS; do
        wait_for_jobs "$JOBS"
        run_once "$name-seed$seed" --data "$DATA" --seed "$seed" $FLAGS "${@//@SEED@/$seed}" &
    done
}

run_once() { # NAME FLAGS...
    local name=$1 folder=$OUT/$1 status child
    shift
    if [ -e "$folder" ] && [ -e "$folder.flags" ] && [ "$*" != "$(cat "$folder.flags")" ]; then
        echo "$name: was made with other flags ($(cat "$folder.flags")), expected another OUT" | tee -a "$failures"
        return
    fi
    if [ -e "$folder/results.json" ]; then
        echo "$name: finished before"
        return
    fi
    echo "$*" >"$folder.flags"
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
    wait "$child"
    status=$?
    if kill -0 "$child" 2>/dev/null; then # a signal ended the waiting, not the run, which writes its checkpoint now
        wait "$child"
        status=$?
    fi
    if [ "$status" -eq 0 ]; then
        echo "$name: done"
    else
        echo "$name: exit status $status, $(tail -n 1 "$folder.log")" | tee -a "$failures"
    fi
}

# Waits for all runs, writes the comparison of those that have ended, and names those that failed.
finish() {
    settle
    local folders=() folder
    for folder in "$OUT"/*/; do
        [ -e "$folder/results.json" ] && folders+=("${folder%/}")
    done
    [ ${#folders[@]} -gt 1 ] && "$PYTHON" "$ROOT/evaluation.py" "${folders[@]}" | tee "$OUT/comparison.txt"
    if [ -s "$failures" ]; then
        echo "failed:"
        sed 's/^/  /' "$failures"
        exit 1
    fi
    echo "all runs are finished, in $OUT"
}
