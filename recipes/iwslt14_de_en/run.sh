#!/usr/bin/env bash
# IWSLT14 German-English, either direction: preprocess, distil, train, average, generate, score.
# usage: run.sh TEXT [SOURCE TARGET]      (TEXT as prepare.sh wrote it; options in ../steps.sh)
set -euo pipefail
text=${1:?usage: run.sh TEXT [SOURCE TARGET]}
src=${2:-de} tgt=${3:-en}
work=work/iwslt14_${src}_$tgt
arch=fastdiss_iwslt_de_en teacher=transformer_iwslt_de_en distill=1 average=1
tokenizer=(--vocab-size 10000)
metrics=bleu,chrf
source "$(dirname "$0")/../steps.sh"
