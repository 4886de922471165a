# What the sweeps share; sourced by them, not run. A sweep names its settings with `choose`, calls `run NAME FIRST
# FLAGS...` for each that is chosen, and `finish` at its end. From the environment:
#
#   MODEL   minilm (default), a hub name, a directory       DATA     sample (default) or a directory
#   SEEDS   "0 1 2" (default): every setting runs with each OUT      where the runs go, default runs/<sweep>
#   RUNS    names of the settings to run, default all       JOBS     runs at a time, default 1
#   FLAGS   flags for every run, such as "--amp bf16"       PYTHON   default python
#
# A finished run is not repeated, a stopped one goes on, a failed one is named at the end, with those that needed it; the
# others still run.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 1
MODEL=${MODEL:-minilm} DATA=${DATA:-sample} SEEDS=${SEEDS:-0 1 2} JOBS=${JOBS:-1} FLAGS=${FLAGS:-} PYTHON=${PYTHON:-python}
OUT=${OUT:-runs/$(basename "$0" .sh)}

choose() { # NAMES...: RUNS is all of them, or those that are asked for; makes OUT
    local name
    for name in ${RUNS:=$*}; do
        case " $* " in
            *" $name "*) ;;
            *) echo "RUNS: $name is no setting, expected some of: $*" >&2; exit 2 ;;
        esac
    done
    mkdir -p "$OUT" && failures=$(mktemp) || exit 1
    trap 'rm -f "$failures"' EXIT
    trap stop INT TERM
}

stop() { # ends the running runs, which write their checkpoints first
    trap - INT TERM
    kill -TERM $(jobs -rp) 2>/dev/null
    wait
    echo "stopped; the same command goes on from here"
    exit 130
}

wait_for_jobs() { # until fewer than $1 are running
    while [ "$(jobs -rp | wc -l)" -ge "$1" ]; do sleep 0.2; done
}

settle() { wait_for_jobs 1; }

# run NAME FIRST FLAGS...: a run for each seed, JOBS at a time. FIRST names a settled run whose checkpoint it starts
# from, or is empty; @seed in FLAGS is seed0 and so on.
run() {
    local name=$1 first=$2 seed
    shift 2
    for seed in $SEEDS; do
        wait_for_jobs "$JOBS"
        run_once "$name-seed$seed" "${first:+$first-seed$seed}" --data "$DATA" --seed "$seed" --name "$name" $FLAGS \
            ${first:+--checkpoint "$OUT/$first-seed$seed"} "${@//@seed/seed$seed}" &
    done
}

run_once() { # NAME FIRST FLAGS...
    local name=$1 first=$2 folder=$OUT/$1 status child
    shift 2
    if [ -n "$first" ] && grep -q "^$first: " "$failures"; then
        echo "$name: not started, it needs $first" | tee -a "$failures"
    elif [ -e "$folder" ] && [ -e "$folder.flags" ] && [ "$*" != "$(cat "$folder.flags")" ]; then
        echo "$name: was made with other flags ($(cat "$folder.flags")), expected another OUT" | tee -a "$failures"
    elif [ -e "$folder/results.json" ]; then
        echo "$name: finished before"
    else
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
        while # a signal ends the waiting, not the run, which writes its checkpoint then
            wait "$child"
            status=$?
            kill -0 "$child" 2>/dev/null
        do :; done
        if [ "$status" -eq 0 ]; then echo "$name: done"
        else echo "$name: exit status $status, $(tail -n 1 "$folder.log")" | tee -a "$failures"; fi
    fi
}

# Waits for all runs, writes the comparison of those that have ended, and names those that failed.
finish() {
    settle
    local folders=("$OUT"/*/results.json)
    [ ${#folders[@]} -gt 1 ] && "$PYTHON" "$ROOT/evaluation.py" "${folders[@]%/results.json}" | tee "$OUT/comparison.txt"
    if [ -s "$failures" ]; then
        echo "failed:"
        sed 's/^/  /' "$failures"
        exit 1
    fi
    echo "all runs are finished, in $OUT"
}
