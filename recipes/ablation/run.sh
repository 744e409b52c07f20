#!/usr/bin/env bash
# Do SCP and MANS make five steps as good as many? Train all variants, sample, score, write the tables.
# usage: run.sh CORPUS [TEXT] [WORK]
#   CORPUS   embedded, cmudict_g2p, multi30k or, on a GPU, multi30k_small
#   TEXT     the folder that the corpus's prepare.sh made; not needed for the embedded one
# When run again, it resumes where it was stopped; JOBS=2 trains two models at a time.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
corpus=${1:?usage: run.sh CORPUS [TEXT] [WORK]}
text=${2:-}
work=${3:-work/ablation}/$corpus

case $corpus in
embedded | cmudict_g2p | multi30k | multi30k_small) ;;
*)
    echo "run.sh: no corpus $corpus: embedded, cmudict_g2p, multi30k or multi30k_small" >&2
    exit 2
    ;;
esac
if [ "$corpus" != embedded ] && [ -z "$text" ]; then
    echo "run.sh: $corpus needs the folder with its text" >&2
    exit 2
fi
if ! python -c "import matplotlib" 2> /dev/null; then
    echo "run.sh: the plots need matplotlib: pip install -e '.[plot]'" >&2
    exit 1
fi
mkdir -p "$work/text"
if [ ! -e "$work/data-bin/manifest.json" ]; then
    case $corpus in
    embedded)
        python "$here/../../data/make_corpus.py" "$work/text"
        options=(-s de -t en --vocab-size 800 --model-type bpe)
        ;;
    cmudict_g2p)
        cp "$text"/{train,valid,test}.* "$work/text"
        options=(--model-type word --separate --vocab-size 1000)
        ;;
    multi30k*)
        cp "$text"/{train,valid,test}.* "$work/text"
        options=(-s de -t en --vocab-size 6000)
        ;;
    esac
    fastdiss preprocess "${options[@]}" --trainpref "$work/text/train" \
        --validpref "$work/text/valid" --testpref "$work/text/test" --destdir "$work/data-bin"
fi
python "$here/trials.py" "$corpus" "$work" --jobs "${JOBS:-1}"
python "$here/report.py" "$corpus" "$work"
