#!/bin/bash
# Its environment is the folder $FAKE_CONDA/cs224n_dfp; `hook` prints the function that activates it.
prefix=$FAKE_CONDA/cs224n_dfp
[ "$1" = --version ] || echo "conda $*" >>"$FAKE_LOG"
case $1 in
    --version) echo "conda 25.1" ;;
    run) [ -d "$prefix" ] && echo "$prefix" ;;
    create | install) mkdir -p "$prefix"/{bin,conda-meta} && cp "$FAKE_BIN/python3.11" "$prefix/bin/python" ;;
    shell.bash | shell.zsh) echo 'conda() { [ $1 = activate ] && export CONDA_DEFAULT_ENV=$2; }' ;;
esac
