#!/usr/bin/env bash
# WMT16 English-Romanian, either direction: preprocess, distil, train, average, generate, score.
# usage: run.sh TEXT [SOURCE TARGET]      (TEXT as prepare.sh wrote it; options in ../steps.sh)
set -euo pipefail
text=${1:?usage: run.sh TEXT [SOURCE TARGET]}
src=${2:-en} tgt=${3:-ro}
work=work/wmt16_${src}_$tgt
arch=fastdiss_base teacher=transformer_base distill=1 average=1
tokenizer=(--vocab-size 32000)
metrics=bleu,chrf
source "$(dirname "$0")/../steps.sh"
