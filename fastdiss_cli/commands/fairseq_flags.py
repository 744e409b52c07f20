"""The flags of fairseq and Difformer, by command, and their equivalents here.

`rewrite_flags` rewrites a command line before it is parsed, and logs a line for each flag. Flags
with the same name and meaning in both (``--max-tokens``, ``--lr``, ``--beam``, ...) are not in the
table.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastdiss_cli import logs

# values of --remove-bpe that H- and D- lines answer, and those that they do not
SEGMENTATIONS = ("@@ ", "@@", "subword_nmt", "fastbpe", "sentencepiece")
OTHER_SEGMENTATIONS = ("wordpiece", "letter", "_EOW", "silence", "none")


class NoEquivalent(Exception):
    """An old flag, or its value, that has no equivalent; the message says what to do."""


@dataclass(frozen=True)
class OldFlag:
    """How to translate a flag.

    Attributes:
        takes: whether it has a value: "none", "one", or "maybe" (a segmentation).
        translate: from its value ("" if it has none) to the arguments that replace it; raises
            `NoEquivalent`.
        remark: logged along with these arguments.
    """

    takes: str
    translate: Callable[[str], list[str]]
    remark: str = ""

    def is_value(self, word: str) -> bool:
        """Return whether the word after the flag is its value."""
        return self.takes == "one" or (
            self.takes == "maybe" and word in SEGMENTATIONS + OTHER_SEGMENTATIONS
        )


def renamed(name: str, remark: str = "") -> OldFlag:
    """Return a flag that has another name here."""
    return OldFlag("one", lambda value: [name, value], remark)


def setting(key: str, remark: str = "") -> OldFlag:
    """Return a flag that is a key of the configuration here."""
    return OldFlag("one", lambda value: ["--set", f"{key}={value}"], remark)


def means(*arguments: str, remark: str = "") -> OldFlag:
    """Return a switch that stands for the given arguments."""
    return OldFlag("none", lambda value: list(arguments), remark)


def not_needed(remark: str, takes: str = "none") -> OldFlag:
    """Return a flag that is always on here, or has no effect on the result."""
    return OldFlag(takes, lambda value: [], remark)


def only(*values: str, remark: str) -> OldFlag:
    """Return a flag of which only these values are supported, and have no effect."""

    def translate(value: str) -> list[str]:
        if value not in values:
            raise NoEquivalent(f"{remark}; {value!r} is not supported")
        return []

    return OldFlag("one", translate, remark)


def unsupported(remark: str, takes: str = "one") -> OldFlag:
    """Return a flag without an equivalent."""

    def translate(value: str) -> list[str]:
        raise NoEquivalent(remark)

    return OldFlag(takes, translate)


def _segmentation(value: str) -> list[str]:
    if value not in ("", *SEGMENTATIONS):
        raise NoEquivalent(f"a segmentation by {value!r} cannot be undone")
    return []


def _best_by(value: str) -> list[str]:
    if value not in ("bleu", "loss"):
        raise NoEquivalent("the best checkpoint is chosen by BLEU or by loss")
    return [] if value == "bleu" else ["--set", "train.valid_sentences=0"]


def _one_more(value: str) -> list[str]:
    if not value.isdecimal():
        raise NoEquivalent(f"{value!r} is not a number of iterations; use --steps")
    return ["--steps", str(int(value) + 1)]


def _early_stopping(value: str) -> list[str]:
    if value != "0":
        raise NoEquivalent(
            "sampling always ends at time 0: for the same number of evaluations, give --steps the "
            f"value of --decoding-steps less {value}"
        )
    return []


def _list(key: str) -> Callable[[str], list[str]]:
    return lambda value: ["--set", f"{key}=[{value.strip('()[] ')}]"]


_HALF = "bfloat16 on GPUs that have it; there is no float16"
_LINES = "D- and T- lines are text, H- lines show the pieces"
_BOTH = {
    "--user-dir": unsupported(
        "fairseq's plugins do not load; for your own model see --user-module"
    ),
    "--task": not_needed("the data and --arch determine the task", "one"),
    "--batch-size": unsupported("batches are counted in tokens: --max-tokens"),
    "--max-sentences": unsupported("batches are counted in tokens: --max-tokens"),
    "--fp16": means("--dtype", "auto", remark=_HALF),
    "--memory-efficient-fp16": means("--dtype", "auto", remark=_HALF),
    "--bf16": means("--dtype", "bfloat16"),
    "--cpu": means("--device", "cpu"),
    "--num-workers": not_needed("batches are read from memory-mapped files", "one"),
    "--no-progress-bar": not_needed("progress bars are shown in terminals only"),
    "--log-format": not_needed("train also writes metrics.jsonl", "one"),
    "--dataset-impl": only("mmap", remark="datasets are mmap"),
    "--skip-invalid-size-inputs-valid-test": not_needed("training warns of what it leaves out"),
    "--num-shards": unsupported("under torchrun the processes share the work automatically"),
    "--shard-id": unsupported("under torchrun the processes share the work automatically"),
    "--required-batch-size-multiple": not_needed("batches are counted in tokens", "one"),
    "--left-pad-source": not_needed("padding does not affect results", "one"),
    "--left-pad-target": not_needed("padding does not affect results", "one"),
}
_SIZES = {
    "--encoder-layers": setting("model.encoder_layers"),
    "--decoder-layers": setting("model.decoder_layers"),
    "--model-dim": setting("model.model_dim"),
    "--latent-dim": setting("model.latent_dim"),
    "--encoder-embed-dim": setting("model.model_dim", "for encoder and decoder"),
    "--encoder-ffn-embed-dim": setting("model.ffn_dim", "for encoder and decoder"),
    "--encoder-attention-heads": setting("model.heads", "for encoder and decoder"),
    "--decoder-embed-dim": unsupported("the decoder also uses --encoder-embed-dim"),
    "--decoder-ffn-embed-dim": unsupported("the decoder also uses --encoder-ffn-embed-dim"),
    "--decoder-attention-heads": unsupported("the decoder also uses --encoder-attention-heads"),
}
_ONE_A_VALIDATION = "there is one per validation, see --validate-interval-updates"
_RESET = "to start anew from trained weights, give --finetune-from-model and a new --save-dir"
_TRAIN = {
    "-a": renamed("--arch"),
    "--decoding-steps": renamed("--valid-steps"),
    "--keep-last-epochs": renamed("--keep-last", _ONE_A_VALIDATION),
    "--keep-interval-updates": renamed("--keep-last", _ONE_A_VALIDATION),
    "--no-epoch-checkpoints": means("--keep-last", "0"),
    "--keep-best-checkpoints": unsupported("one best checkpoint is kept, checkpoint_best"),
    "--log-interval": setting("train.log_interval"),
    "--adam-betas": OldFlag("one", _list("train.adam_betas")),
    "--noise-schedule": setting("model.noise_schedule"),
    "--noise-factor": setting("model.noise_factor", "in training and sampling"),
    "--length-loss-factor": setting("model.length_loss"),
    "--max-source-positions": unsupported("both sides have one limit: --set train.max_positions=N"),
    "--max-target-positions": unsupported("both sides have one limit: --set train.max_positions=N"),
    "--attention-dropout": unsupported("there is one rate, --dropout"),
    "--activation-dropout": unsupported("there is one rate, --dropout"),
    "--relu-dropout": unsupported("there is one rate, --dropout"),
    "--activation-fn": only("relu", remark="it is always relu"),
    "--encoder-normalize-before": not_needed("layers are pre-norm"),
    "--decoder-normalize-before": not_needed("layers are pre-norm"),
    "--adam-eps": only("1e-8", "1e-08", remark="it is always 1e-8"),
    "--train-subset": only("train", remark="training uses the split train"),
    "--valid-subset": only("valid", remark="validation uses the split valid"),
    "--reset-optimizer": unsupported(_RESET, "none"),
    "--reset-dataloader": unsupported(_RESET, "none"),
    "--reset-lr-scheduler": unsupported(_RESET, "none"),
    "--reset-meters": unsupported(_RESET, "none"),
    "--noise": unsupported("it is for masked models; see --set model.noise_schedule"),
    "--save-interval": only("1", remark="saved every --save-interval-updates and at validations"),
    "--no-save": unsupported("training always saves: use a --save-dir that you can delete", "none"),
    "--no-last-checkpoints": unsupported("training can always be resumed", "none"),
    "--report-accuracy": not_needed("metrics.jsonl has all figures"),
    "--fp16-init-scale": not_needed("there is no float16, and bfloat16 needs no scale", "one"),
    "--wandb-project": unsupported("metrics.jsonl in --save-dir has all figures"),
    "--max-tokens-valid": not_needed("validation also uses --max-tokens", "one"),
    "--lr-shrink": unsupported("the learning rate decays as --lr-scheduler says"),
    "--optimizer": only("adam", "adamw", remark="the optimizer is AdamW"),
    "--criterion": not_needed("--arch determines the loss", "one"),
    "--share-all-embeddings": not_needed(
        "transformer_* shares them automatically, diffusion models have one table per side"
    ),
    "--share-decoder-input-output-embed": not_needed("it is always on"),
    "--self-cond": not_needed("every diffusion model has it"),
    "--embed-norm": not_needed("every diffusion model has it"),
    "--embed-norm-affine": unsupported("embeddings are normalised without parameters", "none"),
    "--rescale-timesteps": not_needed("time runs from 0 to 1"),
    "--diffusion-steps": not_needed("time is continuous in training", "one"),
    "--pred-length-offset": not_needed("it is always on"),
    "--apply-bert-init": unsupported("there is one initialisation", "none"),
    "--encoder-learned-pos": unsupported("positions are sinusoidal", "none"),
    "--decoder-learned-pos": unsupported("positions are sinusoidal", "none"),
    "--min-lr": unsupported("the learning rate decays as --lr-scheduler says, without a floor"),
    "--stop-min-lr": unsupported("training ends at --max-update, --max-epoch or --patience"),
    "--warmup-init-lr": unsupported("warm-up begins at --lr / --warmup-updates"),
    "--ddp-backend": not_needed("for several GPUs, start it under torchrun", "one"),
    "--distributed-world-size": unsupported("start it under torchrun: --nproc-per-node"),
    "--tensorboard-logdir": unsupported("--set train.tensorboard=true writes to --save-dir"),
    "--fixed-validation-seed": not_needed("validation always draws the same noise", "one"),
    "--eval-bleu": not_needed("validation always computes BLEU"),
    "--eval-bleu-remove-bpe": OldFlag("maybe", _segmentation, "BLEU is always computed on words"),
    "--eval-bleu-detok": not_needed("validation decodes with the dataset's tokenizer", "one"),
    "--eval-bleu-args": not_needed("validation has no beam; its steps are --valid-steps", "one"),
    "--eval-bleu-print-samples": not_needed("`fastdiss generate --gen-subset valid` shows all"),
    "--eval-tokenized-bleu": unsupported("BLEU is sacreBLEU's, tokenized by 13a", "none"),
    "--best-checkpoint-metric": OldFlag("one", _best_by, "by BLEU, or by loss if there is none"),
    "--maximize-best-checkpoint-metric": not_needed("the best BLEU is the highest"),
    "--validate-interval": only("1", remark="see --validate-interval-updates; 0: every epoch"),
    "--restore-file": unsupported(
        "training resumes automatically from checkpoint_last in --save-dir"
    ),
}
_GENERATE = {
    "--skip-invalid-size-inputs-valid-test": not_needed("every sentence is decoded"),
    "--decoding-steps": renamed("--steps"),
    "--iter-decode-max-iter": OldFlag("one", _one_more, "it did not count the first pass"),
    "--iter-decode-force-max-iter": not_needed("--steps N always means N evaluations"),
    "--iter-decode-eos-penalty": only("0", "0.0", remark="only edit-based models have it"),
    "--iter-decode-with-beam": renamed("--length-beam"),
    "--length-beam-size": renamed("--length-beam"),
    "--noise-beam-size": renamed("--noise-beam"),
    "--bleu-mbr": means("--select", "mbr", "--mbr-weights", "equal"),
    "--ppl-mbr": means("--select", "rerank", remark="name the transformer with --rerank-path"),
    "--clamping": means("--clamp", "nearest"),
    "--decoding-early-stopping": OldFlag("one", _early_stopping, "sampling ends at time 0"),
    "--decoding-noise-schedule": unsupported("sampling uses the schedule of training"),
    "--decoding-noise-factor": only(
        "1", remark="1, with 4 in training, is --temperature 0.25 (their ratio), the default"
    ),
    "--decoding-rescale-factor": unsupported("sampling uses the schedule of training"),
    "--decoding-fixed-t": unsupported("the network always gets the true time"),
    "--retain-iter-history": means("--print-history"),
    "--retain-z-0-hat": not_needed("--print-history shows z0_hat"),
    "--print-step": not_needed("I- lines are always there"),
    "--print-alignment": unsupported("there are no alignments", "none"),
    "--remove-bpe": OldFlag("maybe", _segmentation, _LINES),
    "--post-process": OldFlag("maybe", _segmentation, _LINES),
    "--bpe": only(*SEGMENTATIONS, remark="the words of the dictionary reveal the segmentation"),
    "--tokenizer": unsupported("detokenize the D- lines with the tokenizer's own tool"),
    "--sacrebleu": not_needed("BLEU is always sacreBLEU's"),
    "--scoring": only("sacrebleu", remark="BLEU is sacreBLEU's"),
    "--batch-size": not_needed("batches are counted in tokens: --max-tokens", "one"),
    "--max-sentences": not_needed("batches are counted in tokens: --max-tokens", "one"),
    "--score-reference": unsupported("--diagnose measures the losses on the references", "none"),
    "--prefix-size": only("0", remark="answers are generated as a whole"),
    "--no-repeat-ngram-size": only("0", remark="answers may repeat n-grams"),
    "--unkpen": only("0", remark="<unk> is scored like any other piece"),
    "--replace-unk": unsupported("<unk> stays as it is", "maybe"),
    "--no-early-stop": unsupported("search always ends when the beam is full", "none"),
    "--lm-path": unsupported("there is no language model"),
    "--match-source-len": unsupported("see --max-len-a and --max-len-b", "none"),
    "--sampling": unsupported("`transformer` decodes by beam search only", "none"),
    "--diverse-beam-groups": unsupported("`transformer` decodes by beam search only"),
    "--quiet": unsupported("with --results-path only the summary is printed", "none"),
    "--model-overrides": unsupported("the options in a checkpoint cannot be changed"),
}
_PREPROCESS = {
    "--joined-dictionary": means("--joined"),
    "--nbpe": renamed("--vocab-size"),
    "--nwordssrc": unsupported("text is cut into --vocab-size pieces, not words"),
    "--nwordstgt": unsupported("text is cut into --vocab-size pieces, not words"),
    "--thresholdsrc": unsupported("there are no unknown words: rare ones are spelt in bytes"),
    "--thresholdtgt": unsupported("there are no unknown words: rare ones are spelt in bytes"),
    "--srcdict": unsupported("give both dictionaries as --tokenizer SRC,TGT"),
    "--tgtdict": unsupported("give both dictionaries as --tokenizer SRC,TGT"),
    "--bpe": unsupported("the tokenizer is trained on raw text: --model-type bpe"),
    "--only-source": unsupported("for sources alone use `fastdiss generate --input`", "none"),
    "--align-suffix": unsupported("there are no alignments"),
    "--padding-factor": not_needed("the vocabulary is not padded", "one"),
    "--dataset-impl": _BOTH["--dataset-impl"],
}
_SCORE = {
    "-s": renamed("--sys"),
    "-r": renamed("--ref"),
    "--sacrebleu": not_needed("BLEU is always sacreBLEU's"),
    "--ignore-case": means("--lowercase"),
    "--sentence-bleu": unsupported("scores are corpus-level", "none"),
    # sacreBLEU's own
    "-i": unsupported("sacreBLEU's REF -i HYP is --sys HYP --ref REF"),
    "-m": renamed("--metrics"),
}
_AVERAGE = {  # of scripts/average_checkpoints.py
    "--inputs": OldFlag("one", lambda value: [value]),
    "--num-epoch-checkpoints": renamed("--last"),
    "--num-update-checkpoints": renamed("--last"),
    "--checkpoint-upper-bound": unsupported("name the files to average"),
}
OLD_FLAGS: dict[str, dict[str, OldFlag]] = {
    "preprocess": _PREPROCESS,
    "train": {**_BOTH, **_SIZES, **_TRAIN},
    "generate": {**_BOTH, **_GENERATE},
    "score": _SCORE,
    "average": _AVERAGE,
}


def rewrite_flags(arguments: Sequence[str]) -> list[str]:
    """Return a command line with the flags of fairseq and Difformer replaced by ours.

    Args:
        arguments: the command line, its first word the command.

    Raises:
        SystemExit: with code 2, after one line that names every flag which has no equivalent, or
            one that lacks its value or has one that it does not take.
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
        if not equals and old.takes == "one" and (not rest or rest[0].startswith("--")):
            logs.error(f"{flag} needs a value")
            raise SystemExit(2)
        if equals and old.takes == "none":
            logs.error(f"{flag} takes no value")
            raise SystemExit(2)
        if not equals and rest and old.is_value(rest[0]):
            value = rest.pop(0)
        try:
            new = old.translate(value)
        except NoEquivalent as reason:
            refused.append(f"{flag} ({reason})")
            continue
        translated += new
        _log(f"{flag} is {shlex.join(new) if new else 'not needed'} here", old.remark)
    if refused:
        logs.error(f"no equivalent, leave out: {'; '.join(refused)}")
        raise SystemExit(2)
    return translated


def _log(what: str, remark: str) -> None:
    """Log a line, but only once if several processes read the same command line."""
    if logs.is_main_process():
        logs.info(f"{what}: {remark}" if remark else what)
