#!/bin/bash
# Makes environments that hold itself; its pip, its nltk and its venv only note that they were called.
case "$1 ${2-}" in
    "--version ") echo "Python ${FAKE_VERSION:-3.11.7}" ;;
    "-c import sys, ensurepip"*) [ "${FAKE_VERSION:-3.11.7}" != 3.8.1 ] ;;
    "-c import pip"*) ;;
    "-c import nltk; nltk.data.find"*) [ -d "$HOME/nltk_data/corpora/wordnet" ] ;;
    "-c import nltk, socket"*) echo nltk >>"$FAKE_LOG"; exit 1 ;;
    "-m venv")
        [ "$3" = --clear ] || exit 1 # else what was half-made or moved stays
        echo venv >>"$FAKE_LOG"
        mkdir -p "$4/bin" && cp "$FAKE_BIN/python3.11" "$4/bin/python"
        [ -z "${FAKE_VENV_STOPS-}" ] || exit 1
        printf 'VIRTUAL_ENV="%s"\nexport VIRTUAL_ENV\nPATH="$VIRTUAL_ENV/bin:$PATH"\ndeactivate () { :; }\n' "$4" \
            >"$4/bin/activate"
        ;;
    "-m pip")
        echo "pip for $0" >>"$FAKE_LOG"
        [ -z "${FAKE_PIP_WAITS-}" ] || sleep 20
        [ -z "${FAKE_PIP_FAILS-}" ] || { echo "ERROR: no such package" >&2; exit 1; }
        ;;
    *) echo "unexpected: $*" >>"$FAKE_LOG"; exit 1 ;;
esac
