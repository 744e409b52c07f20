# The steps of all recipes: preprocess, distil, train, average, generate, score. A recipe's run.sh
# sets these variables and sources this file:
#   text, src, tgt      the folder that prepare.sh wrote, and the file extensions of the two sides
#   work                the output folder
#   arch, teacher       the architectures of the model and of its teacher
#   tokenizer           options of `fastdiss preprocess`
#   distill, average    1: train on the teacher's outputs; average the numbered checkpoints
#   metrics             --metrics of `fastdiss score`
# Environment variables override some of them: WORK, ARCH, TEACHER, DISTILL, AVERAGE. There are also
#   STEPS       step counts to generate with (default: 1,2,5,20)
#   MAX_UPDATE  updates of each training (default: that of config.yaml)
#   LAUNCH      the command that starts train and generate (default: fastdiss), such as
#               "torchrun --nproc-per-node 8 -m fastdiss_cli"
# TEACHER and MAX_UPDATE, if set, are in the names of the folders of distilled text and its models.
# When run again, preprocess, distil and train resume where they were stopped, or are skipped if they
# are complete; average, generate and score are repeated.

recipe=$(cd "$(dirname "$0")" && pwd)
work=${WORK:-$work} arch=${ARCH:-$arch} teacher=${TEACHER:-$teacher}
distill=${DISTILL:-$distill} average=${AVERAGE:-$average}
if [ "$src" = "$tgt" ]; then
    echo "run.sh: source and target are both $src; name the two languages" >&2
    exit 2
fi
read -ra launch <<< "${LAUNCH:-fastdiss}"

preprocess() {  # FOLDER TRAINING_TEXT OPTION...
    if [ ! -e "$1/manifest.json" ]; then
        fastdiss preprocess -s "$src" -t "$tgt" --destdir "$1" --trainpref "$2" \
            --validpref "$text/valid" --testpref "$text/test" "${@:3}"
    fi
}

train() {  # DATA SAVE_DIR ARCH
    "${launch[@]}" train "$1" --save-dir "$2" --arch "$3" --config "$recipe/config.yaml" \
        -s "$src" -t "$tgt" ${MAX_UPDATE:+--max-update "$MAX_UPDATE"}
}

data=$work/data-bin save=$work/$arch
preprocess "$data" "$text/train" "${tokenizer[@]}"
steps=${STEPS:-1,2,5,20} answers=generate-test.txt
case $arch in
transformer*) decoding=(--beam 5) distill=0 ;;
*)
    decoding=(--steps "$steps")
    if [ "$steps" != "${steps%,*}" ]; then  # several: one file each
        answers=$(printf 'generate-test.steps%s.txt ' ${steps//,/ })
    fi
    ;;
esac

if [ "$distill" = 1 ]; then
    # the answers of another teacher, or of a trial run, are another training set
    name=distilled${TEACHER:+.$TEACHER}${MAX_UPDATE:+.$MAX_UPDATE}
    distilled=$work/$name
    if [ ! -e "$distilled/train.$tgt" ]; then
        train "$data" "$work/$teacher" "$teacher"
        "${launch[@]}" generate "$data" --path "$work/$teacher/checkpoint_best.safetensors" \
            -s "$src" -t "$tgt" --gen-subset train --beam 5 --results-path "$distilled"
        cp "$text/train.$src" "$distilled/train.$src"
        awk '/^D-/ { sub(/^[^\t]*\t[^\t]*\t/, ""); print }' "$distilled/generate-train.txt" \
            > "$distilled/answers"
        mv "$distilled/answers" "$distilled/train.$tgt"
    fi
    preprocess "$data.$name" "$distilled/train" \
        --tokenizer "$data/tokenizer.src,$data/tokenizer.tgt"
    data=$data.$name save=$save.$name
fi

train "$data" "$save" "$arch"
checkpoint=$save/checkpoint_best.safetensors
if [ "$average" = 1 ]; then
    checkpoint=$save/checkpoint_average.safetensors
    fastdiss average "$save"/checkpoint_[0-9]*.safetensors --output "$checkpoint"
fi
scoring=(--metrics "$metrics")
if [ -e "$text/test.refs.tsv" ]; then
    decoding+=(--ref "$text/test.refs.tsv") scoring+=(--ref "$text/test.refs.tsv")
fi
"${launch[@]}" generate "$data" --path "$checkpoint" --results-path "$save/generate" \
    -s "$src" -t "$tgt" "${decoding[@]}"
files=()
for name in $answers; do
    files+=("$save/generate/$name")
done
fastdiss score "${files[@]}" "${scoring[@]}"
