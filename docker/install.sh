#!/usr/bin/env bash
# Make a virtual environment and install distillabse into it, from the source folder that holds this script.
#
#   docker/install.sh cpu PREFIX     export, verify, bench, encode: ONNX Runtime for CPUs
#   docker/install.sh gpu PREFIX     training: ONNX Runtime for GPUs, DeepSpeed, mteb
#
# A second call into the same PREFIX installs the source again and keeps every dependency that still fits.
#
#   PYTHON      the interpreter that makes the environment (python3)
#   PIP_EXTRA   more options for pip, as in the Makefile: another index, for instance
#   DRY_RUN     1 prints the commands instead of running them
set -euo pipefail

if [ $# -ne 2 ]; then
    echo "usage: $0 cpu|gpu PREFIX" >&2
    exit 2
fi
case $1 in
    cpu) extras=cpu,demo ;;
    gpu) extras=gpu,deepspeed,eval,demo ;;
    *)
        echo "$0: $1: cpu or gpu is wanted" >&2
        exit 2
        ;;
esac
prefix=$2
source=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
read -ra more <<<"${PIP_EXTRA:-}"

run() {
    if [ "${DRY_RUN:-0}" = 1 ]; then
        echo "$*"
    else
        "$@"
    fi
}

run "${PYTHON:-python3}" -m venv "$prefix"
run "$prefix/bin/python" -m pip install --disable-pip-version-check --constraint "$source/constraints.txt" \
    ${more[@]+"${more[@]}"} torch==2.13.0 "${source}[$extras]"
