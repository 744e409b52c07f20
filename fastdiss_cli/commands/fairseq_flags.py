"""The flags of fairseq and Difformer, by command, and what they are here.

`rewrite_flags` rewrites a command line before it is parsed, and says so in a line for each flag.
Flags that are spelt alike in both and mean the same (``--max-tokens``, ``--lr``, ``--beam``, ...)
are not in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastdiss_cli import logs

SEGMENTATIONS = (
    "@@ ",
    "@@",
    "subword_nmt",
    "fastbpe",
    "sentencepiece",
)  # what --remove-bpe may name


class NoEquivalent(Exception):
    """An old flag, or its value, that nothing here stands for; the message says what to do."""


@dataclass(frozen=True)
class OldFlag:
    """What becomes of a flag.

    Attributes:
        takes: whether it has a value: "none", "one", or "maybe" (one of `SEGMENTATIONS`).
        become: from its value ("" if it has none) to the arguments in its place; raises
            `NoEquivalent`.
        remark: what is said of it besides the arguments in its place.
    """

    takes: str
    become: Callable[[str], list[str]]
    remark: str = ""

    def is_value(self, word: str) -> bool:
        """Tell whether the word behind the flag is its value."""
        return self.takes == "one" or (self.takes == "maybe" and word in SEGMENTATIONS)


def renamed(name: str, remark: str = "") -> OldFlag:
    """The same value under another name."""
    return OldFlag("one", lambda value: [name, value], remark)


def setting(key: str, remark: str = "") -> OldFlag:
    """An option that has no flag here, but a key of the configuration."""
    return OldFlag("one", lambda value: ["--set", f"{key}={value}"], remark)


def means(*arguments: str, remark: str = "") -> OldFlag:
    """A switch that stands for some arguments."""
    return OldFlag("none", lambda value: list(arguments), remark)


def needless(remark: str, takes: str = "none") -> OldFlag:
    """Something that is always so here, or has no effect on the result."""
    return OldFlag(takes, lambda value: [], remark)


def only(*values: str, remark: str) -> OldFlag:
    """A choice of which these values alone are there, and need no saying."""

    def become(value: str) -> list[str]:
        if value not in values:
            raise NoEquivalent(f"{remark}; {value!r} is not there")
        return []

    return OldFlag("one", become, remark)


def without(remark: str, takes: str = "one") -> OldFlag:
    """Something that is not there."""

    def become(value: str) -> list[str]:
        raise NoEquivalent(remark)

    return OldFlag(takes, become)


def _segmentation(value: str) -> list[str]:
    if value not in ("", *SEGMENTATIONS):
        raise NoEquivalent(f"a segmentation by {value!r} cannot be undone")
    return []


def _best_by(value: str) -> list[str]:
    if value not in ("bleu", "loss"):
        raise NoEquivalent("the best checkpoint is that by BLEU, or by loss")
    return [] if value == "bleu" else ["--set", "train.valid_sentences=0"]


def _one_more(value: str) -> list[str]:
    if not value.isdecimal():
        raise NoEquivalent(f"{value!r} is no number of iterations; use --steps")
    return ["--steps", str(int(value) + 1)]


def _early_stopping(value: str) -> list[str]:
    if value != "0":
        raise NoEquivalent(
            "sampling always ends at time 0: for as many evaluations, give --steps what "
            f"--decoding-steps had, less {value}"
        )
    return []


def _list(key: str) -> Callable[[str], list[str]]:
    return lambda value: ["--set", f"{key}=[{value.strip('()[] ')}]"]


_LINES = "D- and T- lines are text, H- lines show the pieces"
_BOTH = {
    "--user-dir": without("its plugins are fairseq's; for a model of your own see --user-module"),
    "--task": needless("the data and --arch say what is to be done", "one"),
    "--batch-size": without("batches are counted in tokens: --max-tokens"),
    "--max-sentences": without("batches are counted in tokens: --max-tokens"),
    "--fp16": means("--dtype", "bfloat16", remark="there is no float16"),
    "--memory-efficient-fp16": means("--dtype", "bfloat16", remark="there is no float16"),
    "--bf16": means("--dtype", "bfloat16"),
    "--cpu": means("--device", "cpu"),
    "--num-workers": needless("batches are read from mapped files", "one"),
    "--no-progress-bar": needless("there is a bar in terminals only"),
    "--log-format": needless("train writes metrics.jsonl besides", "one"),
    "--dataset-impl": only("mmap", remark="datasets are mmap"),
    "--skip-invalid-size-inputs-valid-test": needless("what training leaves out is told"),
    "--num-shards": without("under torchrun the processes share the work by themselves"),
    "--shard-id": without("under torchrun the processes share the work by themselves"),
    "--required-batch-size-multiple": needless("batches are counted in tokens", "one"),
    "--left-pad-source": needless("padding changes no result", "one"),
    "--left-pad-target": needless("padding changes no result", "one"),
}
_SIZES = {
    "--encoder-layers": setting("model.encoder_layers"),
    "--decoder-layers": setting("model.decoder_layers"),
    "--model-dim": setting("model.model_dim"),
    "--latent-dim": setting("model.latent_dim"),
    "--encoder-embed-dim": setting("model.model_dim", "of encoder and decoder"),
    "--encoder-ffn-embed-dim": setting("model.ffn_dim", "of encoder and decoder"),
    "--encoder-attention-heads": setting("model.heads", "of encoder and decoder"),
    "--decoder-embed-dim": without("the decoder has what --encoder-embed-dim says"),
    "--decoder-ffn-embed-dim": without("the decoder has what --encoder-ffn-embed-dim says"),
    "--decoder-attention-heads": without("the decoder has what --encoder-attention-heads says"),
}
_RESET = "to begin anew with trained weights give --finetune-from-model and a new --save-dir"
_TRAIN = {
    "-a": renamed("--arch"),
    "--decoding-steps": renamed("--valid-steps"),
    "--keep-last-epochs": renamed("--keep-last"),
    "--keep-interval-updates": renamed("--keep-last"),
    "--no-epoch-checkpoints": means("--keep-last", "0"),
    "--keep-best-checkpoints": without("one best checkpoint is kept, checkpoint_best"),
    "--log-interval": setting("train.log_interval"),
    "--adam-betas": OldFlag("one", _list("train.adam_betas")),
    "--noise-schedule": setting("model.noise_schedule"),
    "--noise-factor": setting("model.noise_factor", "in training and sampling alike"),
    "--length-loss-factor": setting("model.length_loss"),
    "--max-source-positions": without("one limit for both sides: --set train.max_positions=N"),
    "--max-target-positions": without("one limit for both sides: --set train.max_positions=N"),
    "--attention-dropout": without("there is one rate, --dropout"),
    "--activation-dropout": without("there is one rate, --dropout"),
    "--relu-dropout": without("there is one rate, --dropout"),
    "--activation-fn": only("relu", remark="it is relu"),
    "--encoder-normalize-before": needless("layers are pre-norm"),
    "--decoder-normalize-before": needless("layers are pre-norm"),
    "--adam-eps": only("1e-8", "1e-08", remark="it is 1e-8"),
    "--train-subset": only("train", remark="training is on the split train"),
    "--valid-subset": only("valid", remark="validation is on the split valid"),
    "--reset-optimizer": without(_RESET, "none"),
    "--reset-dataloader": without(_RESET, "none"),
    "--reset-lr-scheduler": without(_RESET, "none"),
    "--reset-meters": without(_RESET, "none"),
    "--noise": without("masks are of masked models; here see --set model.noise_schedule"),
    "--save-interval": only("1", remark="saved every --save-interval-updates and at validations"),
    "--no-save": without("a training always saves: give a --save-dir that you delete", "none"),
    "--no-last-checkpoints": without("a training can always be resumed", "none"),
    "--report-accuracy": needless("metrics.jsonl has what there is"),
    "--fp16-init-scale": needless("there is no float16, and bfloat16 needs no scale", "one"),
    "--wandb-project": without("metrics.jsonl in --save-dir has all figures"),
    "--max-tokens-valid": needless("validation has the batches of --max-tokens", "one"),
    "--lr-shrink": without("the rate falls as --lr-scheduler says"),
    "--optimizer": only("adam", "adamw", remark="the optimizer is AdamW"),
    "--criterion": needless("the loss belongs to --arch", "one"),
    "--share-all-embeddings": needless(
        "transformer_* shares by itself, the diffusion models have a table for each side"
    ),
    "--share-decoder-input-output-embed": needless("it is always so"),
    "--self-cond": needless("every diffusion model has it"),
    "--embed-norm": needless("every diffusion model has it"),
    "--embed-norm-affine": without("embeddings are normalised without learned factors", "none"),
    "--rescale-timesteps": needless("time runs from 0 to 1"),
    "--diffusion-steps": needless("time is continuous in training", "one"),
    "--pred-length-offset": needless("it is always so"),
    "--apply-bert-init": without("there is one initialisation", "none"),
    "--encoder-learned-pos": without("positions are sinusoidal", "none"),
    "--decoder-learned-pos": without("positions are sinusoidal", "none"),
    "--min-lr": without("the rate falls as --lr-scheduler says, without a floor"),
    "--stop-min-lr": without("training ends at --max-update, --max-epoch or --patience"),
    "--warmup-init-lr": without("warm-up begins at --lr / --warmup-updates"),
    "--ddp-backend": needless("start it under torchrun for several GPUs", "one"),
    "--distributed-world-size": without("start it under torchrun: --nproc-per-node"),
    "--tensorboard-logdir": without("--set train.tensorboard=true writes to --save-dir"),
    "--fixed-validation-seed": needless("validation always draws the same noise", "one"),
    "--eval-bleu": needless("validation always has BLEU"),
    "--eval-bleu-remove-bpe": OldFlag("maybe", _segmentation, "BLEU is always of words"),
    "--eval-bleu-detok": needless("validation decodes with the dataset's tokenizer", "one"),
    "--eval-bleu-args": needless("validation has no beam; its steps are --valid-steps", "one"),
    "--eval-bleu-print-samples": needless("`fastdiss generate --gen-subset valid` shows all"),
    "--eval-tokenized-bleu": without("BLEU is sacreBLEU's, tokenised by 13a", "none"),
    "--best-checkpoint-metric": OldFlag("one", _best_by, "by BLEU; by loss where there is none"),
    "--maximize-best-checkpoint-metric": needless("the best BLEU is the highest"),
    "--validate-interval": only("1", remark="see --validate-interval-updates; 0: every epoch"),
    "--restore-file": without("it resumes from checkpoint_last in --save-dir by itself"),
}
_GENERATE = {
    "--decoding-steps": renamed("--steps"),
    "--iter-decode-max-iter": OldFlag("one", _one_more, "it left out the first pass"),
    "--iter-decode-force-max-iter": needless("--steps N is N evaluations, always"),
    "--iter-decode-eos-penalty": only("0", "0.0", remark="only edit-based models have it"),
    "--iter-decode-with-beam": renamed("--length-beam"),
    "--length-beam-size": renamed("--length-beam"),
    "--noise-beam-size": renamed("--noise-beam"),
    "--bleu-mbr": means("--select", "mbr"),
    "--ppl-mbr": means("--select", "rerank", remark="name the transformer with --rerank-path"),
    "--clamping": means("--clamp", "nearest"),
    "--decoding-early-stopping": OldFlag("one", _early_stopping, "sampling ends at time 0"),
    "--decoding-noise-schedule": without("sampling has the schedule of training"),
    "--decoding-noise-factor": only(
        "1", remark="with 4 in training it is --temperature 0.25 (one over the other), the default"
    ),
    "--decoding-rescale-factor": without("sampling has the schedule of training"),
    "--decoding-fixed-t": without("the network is told the true time"),
    "--retain-iter-history": means("--print-history"),
    "--retain-z-0-hat": needless("--print-history shows z0_hat"),
    "--print-step": needless("I- lines are always there"),
    "--print-alignment": without("there are no alignments", "none"),
    "--remove-bpe": OldFlag("maybe", _segmentation, _LINES),
    "--post-process": OldFlag("maybe", _segmentation, _LINES),
    "--bpe": only(*SEGMENTATIONS, remark="the words of the dictionary show their segmentation"),
    "--tokenizer": without("detokenise the D- lines with the tokeniser's own tool"),
    "--sacrebleu": needless("BLEU is always sacreBLEU's"),
    "--scoring": only("sacrebleu", remark="BLEU is sacreBLEU's"),
    "--batch-size": needless("batches are counted in tokens: --max-tokens", "one"),
    "--max-sentences": needless("batches are counted in tokens: --max-tokens", "one"),
    "--score-reference": without("--diagnose measures the losses on the answers", "none"),
    "--prefix-size": without("answers are made as a whole"),
    "--no-repeat-ngram-size": without("nothing is forbidden to an answer"),
    "--unkpen": without("<unk> is scored like any other piece"),
    "--replace-unk": without("<unk> stays as it is", "maybe"),
    "--no-early-stop": without("a beam is done when it is full", "none"),
    "--lm-path": without("there is no language model beside the model"),
    "--match-source-len": without("see --max-len-a and --max-len-b", "none"),
    "--sampling": without("beam search is the one way of `transformer`", "none"),
    "--diverse-beam-groups": without("beam search is the one way of `transformer`"),
    "--quiet": without("with --results-path only the summary is printed", "none"),
    "--model-overrides": without("a checkpoint holds its options, and they stay"),
}
_PREPROCESS = {
    "--joined-dictionary": means("--joined"),
    "--nbpe": renamed("--vocab-size"),
    "--nwordssrc": without("text is cut into --vocab-size pieces, not words"),
    "--nwordstgt": without("text is cut into --vocab-size pieces, not words"),
    "--thresholdsrc": without("no word is unknown: rare ones are spelt in bytes"),
    "--thresholdtgt": without("no word is unknown: rare ones are spelt in bytes"),
    "--srcdict": without("both dictionaries go into --tokenizer SRC,TGT"),
    "--tgtdict": without("both dictionaries go into --tokenizer SRC,TGT"),
    "--bpe": without("the tokenizer is trained on raw text: --model-type bpe"),
    "--only-source": without("for sources alone use `fastdiss generate --input`", "none"),
    "--align-suffix": without("there are no alignments"),
    "--padding-factor": needless("the vocabulary has the size that it has", "one"),
    "--dataset-impl": _BOTH["--dataset-impl"],
}
_SCORE = {
    "-s": renamed("--sys"),
    "-r": renamed("--ref"),
    "--sacrebleu": needless("BLEU is always sacreBLEU's"),
    "--ignore-case": means("--lowercase"),
    "--sentence-bleu": without("scores are of the corpus", "none"),
    # sacreBLEU's own
    "-i": without("sacreBLEU's REF -i HYP is --sys HYP --ref REF"),
    "-m": renamed("--metrics"),
}
OLD_FLAGS: dict[str, dict[str, OldFlag]] = {
    "preprocess": _PREPROCESS,
    "train": {**_BOTH, **_SIZES, **_TRAIN},
    "generate": {**_BOTH, **_GENERATE},
    "score": _SCORE,
}


def rewrite_flags(arguments: Sequence[str]) -> list[str]:
    """Return a command line with the flags of fairseq and Difformer replaced by ours.

    Args:
        arguments: the command line, its first word the command.

    Raises:
        SystemExit: with code 2, after one line that names every flag which has no equivalent.
    """
    table = OLD_FLAGS.get(arguments[0], {}) if arguments else {}
    rest, translated, refused = list(arguments), [], []
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        old = table.get(flag)
        if old is None:
            translated.append(word)
            continue
        if not equals and rest and old.is_value(rest[0]):
            value = rest.pop(0)
        try:
            new = old.become(value)
        except NoEquivalent as reason:
            refused.append(f"{flag} ({reason})")
            continue
        translated += new
        _say(f"{flag} is {' '.join(new) if new else 'not needed'} here", old.remark)
    if refused:
        logs.error(f"no equivalent, leave out: {'; '.join(refused)}")
        raise SystemExit(2)
    return translated


def _say(what: str, remark: str) -> None:
    """Say a line, once where several processes read the same command line."""
    if logs.speaks_for_all():
        logs.info(f"{what}: {remark}" if remark else what)
