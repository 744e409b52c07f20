#!/usr/bin/env bash
# The whole pipeline on the embedded corpus: text, dataset, training, hypotheses, table.
# usage: run.sh [WORK]      (when run again, it resumes where it was stopped)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=${1:-work/quickstart}

if [ ! -e "$work/data-bin/manifest.json" ]; then
    python "$here/../../data/make_corpus.py" "$work/text"
    fastdiss preprocess -s de -t en --trainpref "$work/text/train" --validpref "$work/text/valid" \
        --testpref "$work/text/test" --vocab-size 800 --model-type bpe --destdir "$work/data-bin"
fi
fastdiss train "$work/data-bin" --config "$here/config.yaml" --save-dir "$work/checkpoints"
fastdiss generate "$work/data-bin" --path "$work/checkpoints/checkpoint_best.safetensors" \
    --steps 1,2,5,20 --ref "$work/text/test.refs.tsv" --results-path "$work/generate"
