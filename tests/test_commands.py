"""generate, score, models and the Python API, through the command line as a user calls them."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import sacrebleu
import typer
from conftest import one_line_error, run_cli, run_process

import fastdiss_cli
from fastdiss_cli import logs
from fastdiss_cli.config import TrainConfig, build, read_recipe
from fastdiss_cli.decoding import mbr, systems
from fastdiss_cli.decoding.selection import MBR_WEIGHTS, METHODS
from fastdiss_cli.device import DTYPES
from fastdiss_cli.diffusion.sampler import SELF_COND_MODES
from fastdiss_cli.diffusion.schedule import TIME_GRIDS
from fastdiss_cli.diffusion.solvers import SOLVERS
from fastdiss_cli.errors import FastdissError
from fastdiss_cli.models.embedding import FORMS
from fastdiss_cli.models.fastdiss import FastDiSS
from fastdiss_cli.models.registry import architecture

NETWORK = {"model_dim": 16, "ffn_dim": 32, "heads": 2, "encoder_layers": 1, "decoder_layers": 1}


def preprocess(corpus: Path, destdir: Path, *more: str) -> None:
    prefs = [f"--{split}pref={corpus / split}" for split in ("train", "valid", "test")]
    done = run_cli("preprocess", "-s", "de", "-t", "en", "--destdir", destdir, *prefs, *more)
    assert done.returncode == 0, done.stderr


def train(data_bin: Path, save_dir: Path, arch: str) -> Path:
    latent = [] if arch.startswith("transformer") else ["--set=model.latent_dim=8"]
    done = run_cli(
        "train", data_bin, "--arch", arch, "--save-dir", save_dir, "--max-update", "5",
        "--set=train.valid_sentences=0", *latent,
        *(f"--set=model.{key}={value}" for key, value in NETWORK.items()),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return save_dir / "checkpoint_last.safetensors"


@pytest.fixture(scope="module")
def data_bin(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "bin"
    preprocess(corpus, folder, "--vocab-size", "300")
    return folder


@pytest.fixture(scope="module")
def fastdiss(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(data_bin, tmp_path_factory.mktemp("fastdiss"), "fastdiss_tiny")


@pytest.fixture(scope="module")
def transformer(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(data_bin, tmp_path_factory.mktemp("transformer"), "transformer_tiny")


def lines_of(output: str, kind: str) -> list[list[str]]:
    return [line.split("\t") for line in output.split("\n") if line.startswith(f"{kind}-")]


def test_generate_prints_fairseq_lines_in_corpus_order(
    corpus: Path, data_bin: Path, fastdiss: Path
) -> None:
    done = run_cli("generate", data_bin, "--path", fastdiss, "--steps", "3")
    assert done.returncode == 0, done.stderr
    sources = (corpus / "test.de").read_text(encoding="utf-8").splitlines()
    targets = (corpus / "test.en").read_text(encoding="utf-8").splitlines()
    assert lines_of(done.stdout, "S") == [[f"S-{i}", s] for i, s in enumerate(sources)]
    assert lines_of(done.stdout, "T") == [[f"T-{i}", t] for i, t in enumerate(targets)]
    assert lines_of(done.stdout, "I") == [[f"I-{i}", "3"] for i in range(20)]
    for h, d, p in zip(*(lines_of(done.stdout, kind) for kind in "HDP"), strict=True):
        scores = [float(value) for value in p[1].split()]
        assert float(h[1]) == float(d[1]) == pytest.approx(sum(scores) / len(scores), abs=1e-3)
        assert len(h[2].split()) in (len(scores), len(scores) - 1)  # eos has a score too
    hypotheses = [d[2] for d in lines_of(done.stdout, "D")]
    bleu = sacrebleu.corpus_bleu(hypotheses, [targets])
    summary = done.stdout.splitlines()[-1]
    assert summary.startswith("Generate test with fastdiss_tiny steps=3")
    assert f"= {bleu.score:.2f} " in summary and "tok:13a" in summary and "NFE 3.0" in summary


def test_several_step_counts_make_a_file_each_and_a_table(
    data_bin: Path, fastdiss: Path, tmp_path: Path
) -> None:
    done = run_cli(
        "generate", data_bin, "--path", fastdiss, "--steps", "1,2,5", "--results-path", tmp_path
    )
    assert done.returncode == 0, done.stderr
    head, *rows, signature = done.stdout.splitlines()
    assert head.split() == ["steps", "NFE", "BLEU", "sentences/s"] and "tok:13a" in signature
    assert [row.split()[:2] for row in rows] == [["1", "1.0"], ["2", "2.0"], ["5", "5.0"]]
    # the shared encoder pass changes no answer
    alone = run_cli("generate", data_bin, "--path", fastdiss, "--steps", "5").stdout
    together = (tmp_path / "generate-test.steps5.txt").read_text(encoding="utf-8")
    assert alone.splitlines()[:-1] == together.splitlines()[:-1]


def test_raw_text_from_stdin_needs_only_the_checkpoint(fastdiss: Path) -> None:
    text = "drei vier\n\nneun <s> 😀\n"
    done = run_cli("generate", "--path", fastdiss, "--input", "-", stdin=text)
    assert done.returncode == 0, done.stderr
    assert [line[1] for line in lines_of(done.stdout, "S")] == ["drei vier", "", "neun <s> 😀"]
    assert len(lines_of(done.stdout, "D")) == 3 and not lines_of(done.stdout, "T")


def test_history_shows_every_step(data_bin: Path, fastdiss: Path) -> None:
    done = run_cli(
        "generate", data_bin, "--path", fastdiss, "--steps", "2", "--time-grid", "uniform",
        "--print-history",
    )  # fmt: skip
    history = lines_of(done.stdout, "E")
    assert [row[:2] for row in history[:3]] == [
        ["E-0_1", "t=1.000"],
        ["E-0_2", "t=0.500"],
        ["E-1_1", "t=1.000"],
    ]
    pieces = lines_of(done.stdout, "H")[0][2]
    assert history[1][2] == pieces
    assert not any("\x1b" in row[2] for row in history)  # no colours in a pipe


@pytest.mark.parametrize("select", ["score", "mbr", "rerank"])
def test_candidates_are_chosen_as_requested(
    data_bin: Path, fastdiss: Path, transformer: Path, select: str
) -> None:
    more = ["--rerank-path", transformer] if select == "rerank" else []
    done = run_cli(
        "generate", data_bin, "--path", fastdiss, "--length-beam", "2", "--noise-beam", "2",
        "--select", select, *more,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(lines_of(done.stdout, "D")) == 20


@pytest.mark.parametrize("select", ["mbr", "score"])
def test_nbest_writes_the_chosen_one_first(
    data_bin: Path, fastdiss: Path, tmp_path: Path, select: str
) -> None:
    command = ["generate", data_bin, "--path", fastdiss, "--noise-beam", "4", "--select", select]
    best = run_cli(*command).stdout
    done = run_cli(*command, "--nbest", "3")
    assert done.returncode == 0, done.stderr
    found = [lines_of(done.stdout, kind) for kind in "HDPI"]
    assert {len(rows) for rows in found} == {3 * 20} and len(lines_of(done.stdout, "S")) == 20
    assert found[1][::3] == lines_of(best, "D")
    scores = [float(row[1]) for row in found[1]]
    others = list(zip(scores[1::3], scores[2::3], strict=True))
    assert all(first >= second for first, second in others)
    if select == "mbr":  # the chosen one has the best score only with --select score
        assert any(first > chosen for chosen, (first, _) in zip(scores[::3], others, strict=True))
    (tmp_path / "best").write_text(best, encoding="utf-8")
    (tmp_path / "nbest").write_text(done.stdout, encoding="utf-8")
    metrics = ["--metrics", "bleu,self-bleu,distinct1", "--json"]
    bleu, self_bleu, distinct = json.loads(run_cli("score", tmp_path / "nbest", *metrics).stdout)
    metrics[1] = "bleu,distinct1"
    alone = json.loads(run_cli("score", tmp_path / "best", *metrics).stdout)
    assert [bleu["score"], distinct["score"]] == [row["score"] for row in alone]
    assert 0 <= self_bleu["score"] <= 100


def test_history_is_coloured_with_a_legend_in_a_terminal(
    data_bin: Path, fastdiss: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "stdout_is_terminal", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    command = ["generate", data_bin, "--path", fastdiss, "--steps", "2", "--print-history"]
    done = run_cli(*command)
    assert "\x1b[1;4;31m" in done.stdout
    legend = "confidence of a piece: below 0.5, below 0.8, 0.8 and more"
    assert legend in done.stderr.splitlines()
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as other:
            other.setenv(name, value)
            plain = run_cli(*command)
        assert "\x1b[1;4;31m" not in plain.stdout and "confidence" not in plain.stderr


def test_beam_search_through_the_same_command(data_bin: Path, transformer: Path) -> None:
    done = run_cli("generate", data_bin, "--path", transformer, "--beam", "2", "--max-len-b", "9")
    assert done.returncode == 0 and "beam=2" in done.stdout.splitlines()[-1]


def test_a_checkpoint_is_named_as_it_was_found(fastdiss: Path, tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "checkpoint_last.safetensors").write_bytes(fastdiss.read_bytes())
    line = ["generate", "--input", corpus_line(tmp_path), "--path"]
    assert f"{tmp_path}/c/checkpoint_last.safetensors (" in run_cli(*line, tmp_path / "c").stderr
    above = run_cli(*line, tmp_path)
    one_line_error(above, f"{tmp_path} contains no checkpoint; there are some in {tmp_path / 'c'}")
    best = run_cli(*line, tmp_path / "c" / "checkpoint_best.safetensors")
    one_line_error(best, "has checkpoint_last.safetensors; the best is known after a validation")
    missing = run_cli("generate", "--input", tmp_path / "none", "--path", tmp_path / "c")
    one_line_error(missing, f"--input {tmp_path / 'none'}: no such file")


def test_an_empty_file_has_no_answers_and_is_reported(fastdiss: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    done = run_cli("generate", "--path", fastdiss, "--input", tmp_path / "empty", "--plain")
    assert (done.returncode, done.stdout) == (0, "")
    assert f"warning: {tmp_path / 'empty'} is empty" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "at least 1"),
        (["--steps", "2,x"], "at least 1"),
        (["--beam", "3"], "--beam does not apply to fastdiss_tiny"),
        (["--select", "best"], "'best' is not one of score, mbr, rerank"),
        (["--input", "-"], "--input needs no dataset"),
        (["--select", "rerank"], "--select rerank needs a transformer: --rerank-path"),
        (["--noise-beam", "2", "--nbest", "3"], "a sentence has 2 candidates"),
        (["--diagnose", "--early-exit"], "leave out --early-exit"),
        (["--self-cond", "gold", "--input", "x"], "dataset"),
    ],
)
def test_wrong_usage_exits_with_2(
    data_bin: Path, fastdiss: Path, options: list[str], message: str
) -> None:
    done = run_cli("generate", data_bin, "--path", fastdiss, *options)
    one_line_error(done, message, "(see `fastdiss generate --help`)", code=2)


def test_steps_do_not_apply_to_beam_search(data_bin: Path, transformer: Path) -> None:
    done = run_cli("generate", data_bin, "--path", transformer, "--steps", "5")
    one_line_error(done, "--steps does not apply", code=2)


def test_a_dataset_of_another_tokenizer_is_refused_with_both_hashes(
    corpus: Path, fastdiss: Path, tmp_path: Path
) -> None:
    preprocess(corpus, tmp_path / "other", "--model-type", "char")
    message = one_line_error(run_cli("generate", tmp_path / "other", "--path", fastdiss))
    mine = fastdiss_cli.load(fastdiss).loaded.src.hash[:16]
    assert mine in message and "tokenizer" in message


def test_missing_things_are_named(data_bin: Path, fastdiss: Path, tmp_path: Path) -> None:
    none = tmp_path / "none"
    assert str(none) in one_line_error(run_cli("generate", data_bin, "--path", none))
    assert str(none) in one_line_error(run_cli("generate", none, "--path", fastdiss))
    assert str(none) in one_line_error(run_cli("train", none))
    assert "'dev'; it has train, valid, test" in one_line_error(
        run_cli("generate", data_bin, "--path", fastdiss, "--gen-subset", "dev")
    )


def test_a_truncated_dataset_is_one_line(data_bin: Path, fastdiss: Path, tmp_path: Path) -> None:
    for name, cut in (("train.tgt.bin", 2), ("test.src.idx", 5), ("manifest.json", 40)):
        folder = tmp_path / name
        shutil.copytree(data_bin, folder)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-cut])
        for command in (
            ["train", folder, "--save-dir", tmp_path / "c"],
            ["generate", folder, "--path", fastdiss],
        ):
            assert name.split(".")[0] in one_line_error(run_cli(*command))
    assert not (tmp_path / "c").exists()


def test_train_names_what_it_does_not_know(data_bin: Path, tmp_path: Path) -> None:
    def error_of(*options: str, code: int = 1) -> str:
        done = run_cli("train", data_bin, "--save-dir", tmp_path, *options)
        return one_line_error(done, code=code)

    assert "did you mean 'fastdiss_tiny'" in error_of("--arch", "fastdiss_tny", code=2)
    assert "'gpu' is not one of auto, cpu, cuda and cuda:N" in error_of("--device", "gpu", code=2)
    for wrong, message in (  # errors on the command line are usage errors
        (
            ["--set", "model.nois_factor=2"],
            "model.nois_factor is not an option of fastdiss_small; did",
        ),
        (["--set", "train.lr=fast"], "--set train.lr must be a number, not 'fast'"),
        (["--set", "train.lr="], "--set train.lr must be a number, not empty"),
        (["--set", "train.heads=2"], "--set train.heads is not an option; use model.heads"),
        (["--set", "lr=1"], "--set lr=1: write model.KEY=VALUE"),
        (["--lr", "-1"], "--lr must be above 0, not -1.0"),
        (["--dropout", "1.5"], "--dropout must be in [0, 1), not 1.5"),
        (["--lr-scheduler", "cosin"], "--lr-scheduler must be one of inverse_sqrt, cosine"),
    ):
        assert message in error_of(*wrong, code=2)
    misspelt = error_of("--set", "model.nois_factor=2", code=2)
    assert misspelt.endswith("did you mean 'noise_factor'?")  # the help would not tell
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("modle: {dropout: 0.1}\n")
    assert f"--save-dir {recipe} is a file" in error_of("--save-dir", str(recipe))
    unset = run_process("train", data_bin, "--save-dir", "")
    one_line_error(unset, "an argument is empty", code=2)
    one_line_error(
        run_cli("generate", "--path="), "--path is empty: is a shell variable unset", code=2
    )
    assert "unknown section 'modle'; did you mean 'model'" in error_of("--config", str(recipe))
    recipe.write_text("train: {max_update: 0}\n")
    assert f"{recipe}: train.max_update must be at least 1" in error_of("--config", str(recipe))


def test_flags_override_the_recipe_and_set_overrides_flags(data_bin: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {model_dim: 16, ffn_dim: 32, heads: 2, latent_dim: 8, encoder_layers: 1,\n"
        "  decoder_layers: 1, dropout: 0.5}\n"
        "train: {arch: difformer_tiny, lr: 1e-4, seed: 9, max_update: 1, valid_sentences: 0}\n"
    )
    done = run_cli(
        "train", data_bin, "--save-dir", tmp_path / "c", "--config", recipe, "--lr", "2e-4",
        "--seed", "8", "--set", "train.seed=7",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "the learning rate rises until update 4,000, but training ends at 1" in done.stderr
    from fastdiss_cli.checkpoints.checkpoint import Checkpoint

    checkpoint = Checkpoint.load(tmp_path / "c" / "checkpoint_last.safetensors")
    assert checkpoint.arch == "difformer_tiny"
    assert (checkpoint.train_config["lr"], checkpoint.train_config["seed"]) == (2e-4, 7)
    assert checkpoint.model_config["dropout"] == 0.5


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_disk_that_fills_up_is_reported(tmp_path: Path, unbuffered: str) -> None:
    """Without a buffer, Python would take a partial write for a whole one."""
    words = [sys.executable, "-m", "fastdiss_cli", "models"]
    size = len(subprocess.run(words, capture_output=True).stdout)
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size - 5, size - 5))
    with (tmp_path / "out").open("wb") as out:
        done = subprocess.run(
            words,
            stdout=out,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            preexec_fn=limit,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    one_line_error(done, "stdout: File too large")


def test_without_docstrings_commands_work() -> None:
    words = [sys.executable, "-OO", "-m", "fastdiss_cli", "train", "--help"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and "--save-dir" in done.stdout


def test_models_lists_the_registry() -> None:
    done = run_cli("models")
    names = [line.split()[0] for line in done.stdout.splitlines()[1:]]
    assert {"transformer_base", "difformer_iwslt_de_en", "fastdiss_tiny"} <= set(names)
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize("name", ["transformer_small", "difformer_base", "fastdiss_tiny"])
def test_models_prints_all_options_as_a_recipe(name: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(run_cli("models", name).stdout)
    read = read_recipe(recipe)
    config = architecture(name).config({})
    assert build(type(config), read["model"], "model") == config
    assert build(TrainConfig, read["train"], "train") == TrainConfig(arch=name)
    assert read["model"].keys() == vars(config).keys()
    assert read["train"].keys() == vars(TrainConfig()).keys()
    settings = [line for line in recipe.read_text().splitlines() if line.startswith("  ")]
    assert all(re.search(r"  # \w", line) for line in settings)


def test_a_failure_leaves_older_results(data_bin: Path, fastdiss: Path, tmp_path: Path) -> None:
    generate = ["generate", data_bin, "--path", fastdiss, "--results-path", tmp_path]
    assert run_cli(*generate).returncode == 0
    before = (tmp_path / "generate-test.txt").read_bytes()
    (tmp_path / "short").write_text("one line\n")
    for wrong in (
        ["--ref", tmp_path / "none"],
        ["--ref", tmp_path / "short"],
        ["--device", "cuda:99"],
        ["--gen-subset", "none"],
    ):
        one_line_error(run_cli(*generate, *wrong))
        assert (tmp_path / "generate-test.txt").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_diagnosis_is_written_beside_the_hypotheses(
    data_bin: Path, fastdiss: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, measured = FastDiSS.losses_at, []

    def losses_at(self, batch, t, at):
        measured.append((t, at))
        return right(self, batch, t, at)

    monkeypatch.setattr(FastDiSS, "losses_at", losses_at)
    done = run_cli(
        "generate", data_bin, "--path", fastdiss, "--steps", "2,4", "--diagnose",
        "--time-grid", "uniform", "--results-path", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0
    assert "given no estimate" in done.stdout and "gap: from" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    speeds = [line.split()[-1] for line in done.stdout.splitlines() if " 2.0 " in line[:16]]
    assert speeds == ["-"]  # not that of sampling
    for steps in (2, 4):
        path = tmp_path / f"generate-test.steps{steps}.diagnosis.json"
        tables = json.loads(path.read_text())
        assert [row["t"] for row in tables["by_step"]] == [1 - k / steps for k in range(steps)]
        assert all(row["gap"] > 0 and row["norm"] > 0 for row in tables["by_step"])
        assert [row["t"] for row in tables["by_time"]] == [k / 20 for k in range(1, 20, 2)]
        assert all(row["mse_fresh"] > 0 < row.get("anchor_stale", 1) for row in tables["by_time"])
        assert ["anchor_stale" in row for row in tables["by_time"]] == [
            row["t"] + 1 / steps <= 1 for row in tables["by_time"]
        ]
    assert len(measured) == len(set(measured)) == 10 + 10 + 5 + 8  # none, fresh, stale
    done = run_cli("generate", "--path", fastdiss, "--input", corpus_line(tmp_path), "--diagnose")
    one_line_error(done, "needs a dataset", code=2)


def test_revealing_the_references_is_warned_of(
    data_bin: Path, fastdiss: Path, tmp_path: Path
) -> None:
    unconditioned = [f"--set=model.{key}={value}" for key, value in NETWORK.items()]
    unconditioned += ["--set=model.self_cond_rate=0", "--max-update=1", "--max-tokens=300"]
    unconditioned += ["--arch=difformer_tiny", "--save-dir", tmp_path]
    assert run_cli("train", data_bin, *unconditioned).returncode == 0
    for path, what in ((fastdiss, "the references"), (tmp_path, "the lengths of the references")):
        log = run_cli("generate", data_bin, "--path", path, "--self-cond=gold").stderr
        assert f"gives the model {what}" in log and " sentences of test on cpu" in log
    log = run_cli("generate", data_bin, "--path", tmp_path, "--self-cond=recompute").stderr
    assert "recompute has no effect" in log


def corpus_line(folder: Path) -> Path:
    (folder / "line.de").write_text("eins zwei\n", encoding="utf-8")
    return folder / "line.de"


# score


def test_score_reads_generate_files(data_bin: Path, fastdiss: Path, tmp_path: Path) -> None:
    done = run_cli("generate", data_bin, "--path", fastdiss, "--results-path", tmp_path)
    summary = done.stdout.strip()
    scored = run_cli("score", "--sys", tmp_path / "generate-test.txt", "--metrics", "bleu").stdout
    assert scored.strip() in summary


# the Python API and the entry point


def test_python_api(fastdiss: Path) -> None:
    translator = fastdiss_cli.load(fastdiss)
    sentences = ["drei vier", "neun"]
    answers = translator.generate(sentences, steps=2, noise_beam=2)
    assert len(answers) == 2 and all(isinstance(answer, str) for answer in answers)
    assert answers == translator.generate(sentences, steps=2, noise_beam=2)
    assert translator.generate([]) == []
    with pytest.raises(FastdissError, match="no option 'beam'"):
        translator.generate(sentences, beam=3)


@pytest.mark.parametrize(
    "command",
    ["", "preprocess", "train", "generate", "score", "plot", "export", "average", "card", "models"],
)
def test_help_is_there_without_torch(command: str) -> None:
    """Help must appear at once, so it must not import slow packages."""
    code = (
        "import sys; from fastdiss_cli.__main__ import command_line\n"
        "try: command_line(*sys.argv[1:2])()\n"
        "except SystemExit: pass\n"
        "print(*(name in sys.modules for name in ('torch', 'sacrebleu', 'numpy')))"
    )
    start = [sys.executable, "-c", code, *([command] if command else []), "--help"]
    done = subprocess.run(start, capture_output=True, text=True)
    assert "Usage:" in done.stdout and done.stdout.splitlines()[-1] == "False False False"
    shown = " ".join(done.stdout.replace("│", " ").split())
    for default in {
        "train": ["inverse_sqrt)", "0.0005)", "fastdiss_small)"],
        "generate": ["(default: ddpm)", "(default: 5)", "(default: bleu)"],
        "preprocess": ["[default: 8000]", "[default: unigram]"],
    }.get(command, []):
        assert default in shown


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("scor", "No such command 'scor'. Did you mean 'score'? (see `fastdiss --help`)"),
        ("--sed 1", "No such option: --sed"),
        ("train", "(see `fastdiss train --help`)"),
        ("generate --steps", "'--steps' requires an argument (see `fastdiss generate --help`)"),
        ("generate --nbest x", "Invalid value for '--nbest': "),
    ],
)
def test_a_line_that_cannot_be_parsed_is_one_line(line: str, message: str) -> None:
    one_line_error(run_cli(*line.split()), message, code=2)


def test_a_flag_that_is_given_twice_is_told(tmp_path: Path) -> None:
    """Its first value has no effect, unless it is repeatable."""
    for name in ("hyp", "ref"):
        (tmp_path / name).write_text("one two three four\n")
    twice = ["score", tmp_path / "hyp", *["--ref", tmp_path / "ref"] * 2, "--lowercase"]
    done = run_cli(*twice, "--metrics=ser", "--lowercase", "--metrics", "bleu")
    assert done.stdout.startswith("BLEU") and "SER" not in done.stdout
    assert done.stderr == "warning: --metrics is given more than once: the last one counts\n"


def test_a_narrow_terminal_shows_whole_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    shown = run_cli("generate", "--help").stdout
    assert "--source-lang" in shown and "--rerank-path" in shown
    assert max(map(len, shown.splitlines())) <= 50  # click's least


def test_no_words_ask_for_help() -> None:
    assert run_cli().stdout == run_cli("--help").stdout
    assert run_cli("--version").stdout.startswith("fastdiss ")


@pytest.mark.parametrize("how", [KeyboardInterrupt, typer.Abort])  # by version of typer
def test_an_interrupted_command_says_so(
    monkeypatch: pytest.MonkeyPatch, how: type[BaseException]
) -> None:
    def interrupted(path: Path) -> None:
        raise how

    monkeypatch.setattr(systems, "read_system", interrupted)
    one_line_error(run_cli("score", "--sys", "hyp"), "error: interrupted", code=130)


def test_a_closed_pipe_is_no_crash(data_bin: Path, fastdiss: Path) -> None:
    command = [sys.executable, "-m", "fastdiss_cli", "generate", data_bin, "--path", fastdiss]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        log = process.stderr.read()
    assert "Traceback" not in log and "Exception" not in log


def test_closed_streams_are_no_empty_ones(fastdiss: Path, tmp_path: Path) -> None:
    """As after >&-: no answer is lost, and no input taken for none, without a word."""
    program = f"{sys.executable} -m fastdiss_cli generate --path {fastdiss} --steps 1 --input"
    text = corpus_line(tmp_path)
    score = f"{sys.executable} -m fastdiss_cli score - --ref {text} <&-"
    for closed, name in (
        (f"{program} {text} >&-", "stdout"), (f"{program} - <&-", "stdin"), (score, "stdin"),
    ):  # fmt: skip
        done = subprocess.run(["bash", "-c", closed], capture_output=True, text=True)
        one_line_error(done, f"{name}: ", "Bad file descriptor")
    silent = subprocess.run(["bash", "-c", f"{program} {text} --plain 2>&-"])
    assert silent.returncode == 0


def test_there_are_limits_to_a_beam(data_bin: Path, transformer: Path, fastdiss: Path) -> None:
    for path, wrong, message in (
        (transformer, ["--beam", "1001"], "1000"),
        (transformer, ["--lenpen", "nan"], "from -10 to 10"),
        (fastdiss, ["--length-beam", "130"], "at most 129, one more than"),
    ):
        done = run_cli("generate", data_bin, "--path", path, *wrong)
        one_line_error(done, message, wrong[0], code=2)
    with pytest.raises(FastdissError, match="length_beam must be at most 129"):
        fastdiss_cli.load(fastdiss).generate(["eins"], length_beam=130)


@pytest.mark.parametrize("family", ["difformer", "transformer"])
def test_help_names_the_defaults_of_decoding(family: str) -> None:
    shown = " ".join(run_cli("generate", "--help").stdout.replace("│", " ").split())
    decoding = architecture(f"{family}_tiny").family.Decoding
    for name, default in vars(decoding()).items():
        if default is not False:
            entry = shown.split(f"--{name.replace('_', '-')} ")[1]
            value = re.search(r"\(default: (.*?)\)", entry)[1]
            assert value == (f"{default:g}" if isinstance(default, float) else str(default)), name


def test_help_names_all_choices() -> None:
    shown = " ".join(run_cli("generate", "--help").stdout.replace("│", " ").split())
    for flag, words in {
        "solver": tuple(SOLVERS), "time-grid": TIME_GRIDS, "clamp": FORMS, "dtype": DTYPES,
        "self-cond": SELF_COND_MODES, "select": METHODS, "mbr-metric": mbr.UTILITIES,
        "mbr-weights": MBR_WEIGHTS,
    }.items():  # fmt: skip
        assert f"{', '.join(words[:-1])} or {words[-1]}" in shown.split(f"--{flag} ")[1][:120]
