#!/usr/bin/env bash
# Multi30k German-English: preprocess, train, generate at several step counts, score.
# usage: run.sh TEXT [WORK] [ARCH]
#   TEXT   the folder with train, valid and test2016, each as .de and .en
#   ARCH   fastdiss_small (default), difformer_small, ...
# Run again, it goes on where it was stopped.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
text=${1:?usage: run.sh TEXT [WORK] [ARCH]}
work=${2:-work/multi30k_de_en}
arch=${3:-fastdiss_small}

if [ ! -e "$work/data-bin/manifest.json" ]; then
    fastdiss preprocess -s de -t en --trainpref "$text/train" --validpref "$text/valid" \
        --testpref "$text/test2016" --vocab-size 6000 --destdir "$work/data-bin"
fi
fastdiss train "$work/data-bin" --config "$here/config.yaml" --arch "$arch" \
    --save-dir "$work/$arch"
fastdiss generate "$work/data-bin" --path "$work/$arch/checkpoint_best.safetensors" \
    --steps 1,2,5,10,20 --results-path "$work/$arch/generate"
fastdiss score --sys "$work/$arch/generate/generate-test.steps5.txt"
