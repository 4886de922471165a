# Makes and activates the environment cs224n_dfp:   source set_up.sh
#
# With conda where conda is installed, with python's venv (in .venv/ beside this file) where it is not; installs
# requirements.txt. A second call only activates. Sourced by bash or zsh it leaves nothing behind but the activation,
# and a failure is a line and a status, never the end of the shell. All work is done by a child process (`bash
# set_up.sh --make`); the shell that sources this only activates.

if [ "${1-}" = "--make" ] && [ -n "${CS224N_DFP_CHILD-}" ]; then
    set -euo pipefail
    name=cs224n_dfp
    here=$(cd "$(dirname "$0")" && pwd)
    fail() { printf 'set_up.sh: %s\n' "$1" >&2; exit 1; }

    if [ -n "$CS224N_DFP_CONDA" ]; then
        if ! "$CS224N_DFP_CONDA" run -n "$name" python -c "" >/dev/null 2>&1; then
            echo "set_up.sh: making the conda environment $name"
            "$CS224N_DFP_CONDA" create -n "$name" "python=3.11" pip -y -q >/dev/null ||
                fail "conda could not make the environment $name, see above"
        fi
        prefix=$("$CS224N_DFP_CONDA" run -n "$name" python -c "import sys; print(sys.prefix)")
    else
        prefix=$here/.venv/$name
        if ! "$prefix/bin/python" -c "import pip" >/dev/null 2>&1; then
            python=
            for candidate in python3.12 python3.11 python3.13 python3 python; do
                if "$candidate" -c "import sys; sys.exit(sys.version_info < (3, 11))" >/dev/null 2>&1; then
                    python=$candidate
                    break
                fi
            done
            [ -n "$python" ] || fail "no Python 3.11 or later found; install one, or conda, and source this again"
            echo "set_up.sh: making the environment $prefix with $("$python" --version)"
            "$python" -m venv --clear "$prefix" ||
                fail "$python cannot make environments; on Debian and Ubuntu: apt-get install python3-venv"
        fi
    fi

    stamp=$prefix/set_up_stamp
    wanted="$(cksum <"$here/requirements.txt") $("$prefix/bin/python" --version)"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "set_up.sh: installing requirements.txt; this takes minutes the first time"
        rm -f "$stamp"
        "$prefix/bin/python" -m pip install -q --disable-pip-version-check -r "$here/requirements.txt" ||
            fail "installing requirements.txt failed, see above; source this again to go on"
        printf '%s\n' "$wanted" >"$stamp"
    fi

    # WordNet for --augment eda. Not having it is no failure, and no password is ever asked for.
    has_wordnet() {
        [ -d /usr/share/wordnet ] || [ -d "$prefix/nltk_data/corpora" ] ||
            ls -d "$HOME"/nltk_data/corpora/wordnet* /usr/share/nltk_data/corpora/wordnet* >/dev/null 2>&1
    }
    if ! has_wordnet && [ ! -e "$prefix/set_up_no_wordnet" ]; then
        if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
            export DEBIAN_FRONTEND=noninteractive
            { apt-get install -y -qq wordnet-base || { apt-get update -qq && apt-get install -y -qq wordnet-base; }; } \
                >/dev/null 2>&1 </dev/null || true
        fi
        if ! has_wordnet && command -v timeout >/dev/null; then
            timeout 30 "$prefix/bin/python" -m nltk.downloader -q -d "$prefix/nltk_data" wordnet >/dev/null 2>&1 || true
        fi
        if ! has_wordnet; then
            touch "$prefix/set_up_no_wordnet"
            echo "set_up.sh: no WordNet to be had; --augment eda needs it: install wordnet-base, or" \
                "python -m nltk.downloader wordnet"
        fi
    fi
    exit 0
fi

_cs224n_dfp() {
    # The values are local to this function; bash and zsh both know `local`.
    local script here conda flags result
    script=$1 result=0
    here=$(cd "$(dirname "$script")" && pwd) || return 1
    conda=${CONDA_EXE-}
    if [ -z "$conda" ] || [ ! -x "$conda" ]; then
        conda=$(command -v conda 2>/dev/null) || conda=
        [ -x "$conda" ] || conda=
    fi
    CS224N_DFP_CHILD=1 CS224N_DFP_CONDA=$conda bash "$here/set_up.sh" --make || return 1
    flags=$-
    set +eu # activation scripts are not written for shells with these options
    if [ -n "$conda" ]; then
        if [ -n "${ZSH_VERSION-}" ]; then eval "$("$conda" shell.zsh hook)"; else eval "$("$conda" shell.bash hook)"; fi
        conda activate cs224n_dfp || result=1
    else
        . "$here/.venv/cs224n_dfp/bin/activate" || result=1
    fi
    case $flags in *e*) set -e ;; esac
    case $flags in *u*) set -u ;; esac
    [ "$result" = 0 ] || printf 'set_up.sh: the environment cs224n_dfp could not be activated\n' >&2
    return "$result"
}

# Sourced, the shell's own name stands in $0; executed, this file's does.
if [ -n "${BASH_VERSION-}" ] && [ "${BASH_SOURCE[0]}" = "$0" ]; then
    _cs224n_dfp "$0" && echo "set_up.sh: ready; to activate the environment in this shell: source set_up.sh"
elif [ -n "${ZSH_VERSION-}" ]; then
    _cs224n_dfp "${(%):-%x}" && { unset -f _cs224n_dfp; true; } || { unset -f _cs224n_dfp; false; }
else
    _cs224n_dfp "${BASH_SOURCE[0]}" && { unset -f _cs224n_dfp; true; } || { unset -f _cs224n_dfp; false; }
fi
