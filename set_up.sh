# Makes the environment cs224n_dfp and activates it:   source set_up.sh   (in bash or zsh)
#
# With conda where conda is installed, else with python's venv in .venv/ beside this file; installs requirements.txt and
# requirements-dev.txt. A second call only activates. Executed, this makes the environment; sourced, it executes itself
# and activates what was made, so that a failure is a line and a status, never the end of the shell.

if [ -n "${BASH_VERSION-}" ] && [ "${BASH_SOURCE[0]}" = "$0" ]; then
    say() { printf 'set_up.sh: %s\n' "$1" >&2; }
    fail() { say "$1"; exit 1; }
    trap 'fail "interrupted; source this again to go on"' INT TERM
    here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd -P) || exit 1
    prefix=$here/.venv/cs224n_dfp conda=${CONDA_EXE:-conda}
    is_new_enough() { "$1" -c "import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))" >/dev/null 2>&1; }
    describe() { echo "$prefix, $("$prefix/bin/python" --version), $(cat "$here"/requirements*.txt | cksum)"; }
    find_prefix() { prefix=$("$conda" run -n cs224n_dfp printenv CONDA_PREFIX 2>/dev/null) && [ -n "$prefix" ]; }

    if ! "$conda" --version >/dev/null 2>&1; then conda= # a shim of pyenv's may stand for no conda
    elif verb=create && ! { find_prefix && verb=install && [ -x "$prefix/bin/python" ]; }; then
        say "making the conda environment cs224n_dfp" # install: it is half-made, an environment without a Python
        "$conda" "$verb" -n cs224n_dfp python=3.11 pip -y -q >/dev/null && find_prefix ||
            fail "conda could not make the environment cs224n_dfp, see above"
    fi

    if [ "$(cat "$prefix/set_up_stamp" 2>/dev/null)" != "$(describe 2>/dev/null)" ]; then
        if [ -n "$conda" ]; then
            is_new_enough "$prefix/bin/python" ||
                fail "conda's cs224n_dfp has no Python 3.11 or later; conda env remove -n cs224n_dfp, then source this again"
        elif [ "$(. "$prefix/bin/activate" 2>/dev/null && command -v python)" != "$prefix/bin/python" ] ||
            ! "$prefix/bin/python" -c "import pip" 2>/dev/null; then # absent, half-made, or moved with its folder
            PATH=${PATH#"$prefix/bin:"}
            for python in python3.11 python3.12 python3.13 python3 python ""; do # 3.11: the one that is tested
                is_new_enough "$python" && break
            done
            [ -n "$python" ] || fail "no Python 3.11 or later with venv found; install one (Debian: python3-venv) or conda"
            say "making the environment $prefix with $("$python" --version)"
            "$python" -m venv --clear "$prefix" >&2 || fail "$python -m venv failed, see above"
        fi
        say "installing the requirements; this takes minutes the first time"
        "$prefix/bin/python" -m pip install -q --disable-pip-version-check --no-input \
            -r "$here/requirements.txt" -r "$here/requirements-dev.txt" >&2 ||
            fail "installing the requirements failed, see above; source this again to go on"

        # WordNet for --augment eda. Not having it is no failure, and no password is ever asked for.
        has_wordnet() {
            [ -e /usr/share/wordnet/data.noun ] ||
                "$prefix/bin/python" -c "import nltk; nltk.data.find('corpora/wordnet/')" 2>/dev/null
        }
        apt() { DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o Acquire::http::Timeout=20 "$@" >/dev/null 2>&1; }
        install_wordnet() { [ "$(id -u)" = 0 ] && { apt install "$1" || { apt update && apt install "$1"; }; }; }
        has_wordnet || install_wordnet wordnet-base || "$prefix/bin/python" -c "import nltk, socket, sys
socket.setdefaulttimeout(20)
sys.exit(not nltk.download('wordnet', sys.prefix + '/nltk_data', quiet=True))" >/dev/null 2>&1 ||
            say "no WordNet found: for --augment eda, apt-get install wordnet-base or python -m nltk.downloader wordnet"
        describe >"$prefix/set_up_stamp"
        say "installed, $SECONDS s in all"
    fi
    if [ "${1-}" = sourced ]; then echo "$prefix"
    else say "ready; to activate the environment in this shell: source set_up.sh"; fi
    exit 0
fi

_cs224n_dfp() { # $1: this file
    unset -f _cs224n_dfp # while it runs: gone however it ends
    local prefix flags=$- result
    prefix=$(bash "$1" sourced </dev/null) || return 1
    set +eu # activation scripts are not written for shells with these options
    if [ -d "$prefix/conda-meta" ]; then
        typeset -f conda >/dev/null 2>&1 || # `conda activate` is a function, which the hook defines
            eval "$("${CONDA_EXE:-conda}" "shell.${ZSH_VERSION:+zsh}${BASH_VERSION:+bash}" hook)"
        conda activate cs224n_dfp
    else
        . "$prefix/bin/activate"
    fi
    result=$?
    case $flags in *e*) set -e ;; esac
    case $flags in *u*) set -u ;; esac
    [ "$result" = 0 ] && echo "set_up.sh: cs224n_dfp is active"
}
if [ -n "${ZSH_VERSION-}" ]; then _cs224n_dfp "${(%):-%x}"; else _cs224n_dfp "${BASH_SOURCE[0]}"; fi
