#!/usr/bin/env bash
# Multi30k German-English, either direction: preprocess, distil, train, average, generate, score.
# usage: run.sh TEXT [SOURCE TARGET]      (TEXT as prepare.sh wrote it; options in ../steps.sh)
set -euo pipefail
text=${1:?usage: run.sh TEXT [SOURCE TARGET]}
src=${2:-de} tgt=${3:-en}
work=work/multi30k_${src}_$tgt
arch=fastdiss_small teacher=transformer_small distill=0 average=0
tokenizer=(--vocab-size 6000)
metrics=bleu,chrf
source "$(dirname "$0")/../steps.sh"
