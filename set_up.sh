# Makes and activates the environment cs224n_dfp:   source set_up.sh
#
# With conda where conda is installed, with python's venv (in .venv/ beside this file) where it is not; installs
# requirements.txt. A second call only activates. Sourced by bash or zsh it leaves nothing behind but the activation,
# and a failure is a line and a status, never the end of the shell (under `set -e` a failing command is the end of a
# shell by its own wish; `source set_up.sh || ...` keeps it). All work is done by a child process (`bash set_up.sh
# --make`); the shell that sources this only activates.

if [ "${1-}" = "--make" ] && [ -n "${CS224N_DFP_CHILD-}" ]; then
    set -euo pipefail
    name=cs224n_dfp
    here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd -P)
    say() { printf 'set_up.sh: %s\n' "$1"; }
    fail() { say "$1" >&2; exit 1; }
    trap 'fail "interrupted; source this again to go on"' INT TERM # an exit, no death: that would end the caller too

    is_new_enough() { "$1" -c "import sys; sys.exit(sys.version_info < (3, 11))" >/dev/null 2>&1; }

    if [ -n "$CS224N_DFP_CONDA" ]; then
        conda_prefix() { "$CS224N_DFP_CONDA" run -n "$name" printenv CONDA_PREFIX 2>/dev/null || true; }
        prefix=$(conda_prefix)
        if [ -z "$prefix" ] || [ ! -x "$prefix/bin/python" ]; then
            say "making the conda environment $name"
            verb=create
            [ -z "$prefix" ] || verb=install # half-made: an environment, no Python in it
            "$CS224N_DFP_CONDA" "$verb" -n "$name" python=3.11 pip -y -q >/dev/null ||
                fail "conda could not make the environment $name, see above"
            prefix=$(conda_prefix)
        fi
        is_new_enough "$prefix/bin/python" ||
            fail "conda's $name has no Python 3.11 or later; conda env remove -n $name, then source this again"
    else
        prefix=$here/.venv/$name
        # Sound: activation gives the environment's own Python, so it is neither half-made nor moved with its folder.
        is_sound() {
            set +eu
            . "$prefix/bin/activate" && [ "$(command -v python)" = "$prefix/bin/python" ] && python -c "import pip"
        }
        if ! (is_sound) >/dev/null 2>&1; then
            PATH=${PATH#"$prefix/bin:"} # an unsound environment that is active is not made with its own Python
            python=
            problem="no Python 3.11 or later found; install one, or conda, and source this again"
            for candidate in python3.11 python3.12 python3.13 python3 python; do # 3.11: the one that is tested
                is_new_enough "$candidate" || continue
                if "$candidate" -c "import ensurepip, venv" >/dev/null 2>&1; then
                    python=$candidate
                    break
                fi
                problem="$candidate has no venv or no ensurepip; on Debian and Ubuntu: apt-get install $candidate-venv"
            done
            [ -n "$python" ] || fail "$problem"
            say "making the environment $prefix with $("$python" --version)"
            "$python" -m venv --clear "$prefix" || fail "$python -m venv failed, see above"
        fi
    fi

    stamp=$prefix/set_up_stamp                 # what was installed, written when all of it was
    no_wordnet=$prefix/set_up_stamp_no_wordnet # WordNet was looked for in vain: not again at every call
    wanted="$(cksum <"$here/requirements.txt") $("$prefix/bin/python" --version)"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        say "installing requirements.txt; this takes minutes the first time"
        rm -f "$stamp" "$no_wordnet"
        "$prefix/bin/python" -m pip install -q --disable-pip-version-check --no-input -r "$here/requirements.txt" ||
            fail "installing requirements.txt failed, see above; source this again to go on"
        printf '%s\n' "$wanted" >"$stamp"
        say "installed, $SECONDS s in all"
    fi

    # WordNet for --augment eda. Not having it is no failure, and no password is ever asked for.
    has_wordnet() { # looked for where nltk and eda.py look
        local place IFS=: # NLTK_DATA holds folders with colons between them
        for place in ${NLTK_DATA-} {"${HOME-}","$prefix",/usr/{,local/}share,/usr/{,local/}lib}/nltk_data; do
            if [ -e "$place/corpora/wordnet" ] || [ -e "$place/corpora/wordnet.zip" ]; then return 0; fi
        done
        [ -e /usr/share/wordnet/data.noun ]
    }
    if ! has_wordnet && [ ! -e "$no_wordnet" ]; then
        say "looking for WordNet, which --augment eda needs"
        if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
            apt() {
                DEBIAN_FRONTEND=noninteractive \
                    apt-get -qq -y -o Acquire::Retries=0 -o Acquire::http::Timeout=20 "$@" >/dev/null 2>&1
            }
            apt install wordnet-base || { apt update && apt install wordnet-base; } || true
        fi
        if ! has_wordnet; then
            limit=
            ! command -v timeout >/dev/null || limit="timeout --foreground 30"
            $limit "$prefix/bin/python" -m nltk.downloader -q -d "$prefix/nltk_data" wordnet >/dev/null 2>&1 || true
        fi
        if ! has_wordnet; then
            touch "$no_wordnet"
            say "no WordNet found: for --augment eda, apt-get install wordnet-base or python -m nltk.downloader wordnet"
        fi
    fi
    exit 0
fi

_cs224n_dfp() {
    unset -f _cs224n_dfp # while it runs: gone however it ends
    local here conda flags result=0
    here=$(CDPATH='' cd -- "$(dirname -- "$1")" >/dev/null && pwd -P) || return 1
    conda=${CONDA_EXE-}
    if [ ! -x "$conda" ]; then
        conda=$(command -v conda 2>/dev/null) || conda=
        { [ -x "$conda" ] && "$conda" --version >/dev/null 2>&1; } || conda= # a shim of pyenv's may stand for no conda
    fi
    CS224N_DFP_CHILD=1 CS224N_DFP_CONDA=$conda bash "$here/set_up.sh" --make </dev/null || return 1
    flags=$-
    set +eu # activation scripts are not written for shells with these options
    if [ -n "$conda" ]; then
        if ! typeset -f conda >/dev/null 2>&1; then # `conda activate` is a function, which the hook defines
            if [ -n "${ZSH_VERSION-}" ]; then eval "$("$conda" shell.zsh hook)"
            else eval "$("$conda" shell.bash hook)"; fi
        fi
        conda activate cs224n_dfp || result=1
    else
        . "$here/.venv/cs224n_dfp/bin/activate" || result=1
    fi
    case $flags in *e*) set -e ;; esac
    case $flags in *u*) set -u ;; esac
    [ "$result" = 0 ] || printf 'set_up.sh: the environment cs224n_dfp could not be activated\n' >&2
    return "$result"
}

# Executed, this file's name stands in $0; sourced, the shell's own.
if [ -n "${BASH_VERSION-}" ] && [ "${BASH_SOURCE[0]}" = "$0" ]; then
    _cs224n_dfp "$0" && echo "set_up.sh: ready; to activate the environment in this shell: source set_up.sh"
elif [ -n "${ZSH_VERSION-}" ]; then
    _cs224n_dfp "${(%):-%x}" && echo "set_up.sh: cs224n_dfp is active"
else
    _cs224n_dfp "${BASH_SOURCE[0]}" && echo "set_up.sh: cs224n_dfp is active"
fi
