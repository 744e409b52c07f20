"""generate: what batches, order and padding must not change, and how signals end it."""

from __future__ import annotations

import importlib
import os
import random
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ranks, one_line_error, run_cli
from runs import command, full_disk, signalled_in_batch

from fastdiss_cli import logs
from fastdiss_cli.checkpoints.checkpoint import Checkpoint
from fastdiss_cli.checkpoints.loading import load_model
from fastdiss_cli.decoding import translation
from fastdiss_cli.errors import FastdissError
from fastdiss_cli.models.beam_search import BeamDecoding
from fastdiss_cli.signals import Stop, stop_on_signal

TYPES = ["transformer_tiny", "difformer_tiny", "fastdiss_tiny"]


@pytest.fixture(scope="module")
def checkpoints(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a checkpoint of each family."""
    found = {}
    for arch in TYPES:
        folder = tmp_path_factory.mktemp(arch)
        updates = 100 if arch == "transformer_tiny" else 30  # at first, all its answers are alike
        more = {"max_update": updates, "lr": 1e-2, "ema_decay": 0, "valid_sentences": 0}
        done = run_cli(*command(data_bin, folder, arch, **more))
        assert done.returncode == 0, done.stderr
        found[arch] = folder / "checkpoint_last.safetensors"
    return found


@pytest.fixture(scope="module")
def raw() -> list[str]:
    """Return 64 sentences of one to twelve words."""
    draw = random.Random(3)
    words = ["null", "eins", "zwei", "drei", "vier", "fünf"]
    return [" ".join(draw.choices(words, k=draw.randint(1, 12))) for _ in range(64)]


def answers(done) -> dict[str, str]:
    """Return the hypotheses by source; the sources may be in any order."""
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    sources = [row[1] for row in rows if row[0].startswith("S-")]
    texts = [row[2] for row in rows if row[0].startswith("D-")]
    assert len(sources) == len(texts) == 64
    return dict(zip(sources, texts, strict=True))


def generate(checkpoint: Path, *more: str, stdin: str = ""):
    limit = (
        ["--max-len-b", "12", "--beam", "2"]
        if "transformer" in str(checkpoint)
        else ["--noise-beam", "2"]
    )
    return run_cli(
        "generate", "--path", checkpoint, "--input", "-", "--device=cpu", *limit, *more,
        stdin=stdin,
    )  # fmt: skip


@pytest.mark.parametrize("arch", TYPES)
def test_hypotheses_do_not_depend_on_windows_and_batches(
    checkpoints: dict[str, Path], raw: list[str], arch: str
) -> None:
    """Batches of 1, 7 and 64 sentences, by window and by size; padding differs in all of them."""
    text = "\n".join(raw) + "\n"
    found = [
        answers(generate(checkpoints[arch], *how, stdin=text))
        for how in (
            ["--buffer-size", "1"],
            ["--buffer-size", "7"],
            ["--buffer-size", "64"],
            ["--buffer-size", "64", "--max-tokens", "1"],
            ["--buffer-size", "64", "--max-tokens", "900"],
        )
    ]
    assert len(set(found[0].values())) > 5
    assert all(other == found[0] for other in found[1:])


@pytest.mark.parametrize("arch", TYPES)
def test_hypotheses_do_not_depend_on_the_order_of_the_corpus(
    checkpoints: dict[str, Path], raw: list[str], arch: str
) -> None:
    checkpoint = checkpoints[arch]
    texts = ["\n".join(lines) + "\n" for lines in (raw, sorted(raw), raw[::-1])]
    found = [answers(generate(checkpoint, "--buffer-size", "20", stdin=text)) for text in texts]
    assert found[0] == found[1] == found[2]


# signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_leaves_the_beginning_of_the_output(
    data_bin: Path, checkpoints: dict[str, Path], number: int
) -> None:
    """Windows of 6 sentences; the signal comes in the second one."""
    more = ["generate", data_bin, "--path", checkpoints["fastdiss_tiny"], "--device=cpu"]
    more += ["--buffer-size", "6"]
    whole = run_cli(*more).stdout
    wound = partial(signalled_in_batch, on=0, number=2, signals=(number,))
    (done,) = Ranks(1, *more, prepare=wound).results()
    assert done.returncode == 128 + number
    assert whole.startswith(done.stdout) and done.stdout.splitlines()[-1].startswith("I-11\t")
    _, stopping, message = done.stderr.splitlines()
    assert stopping == "stopping: finishing this batch (again to stop at once)"
    assert message == f"stopped by signal {number}; sentences written: 12 of 20"


def test_a_signal_in_a_window_leaves_no_gap(data_bin: Path, checkpoints: dict[str, Path]) -> None:
    """Batches are sorted by length, so finished sentences may be anywhere in a window."""
    more = ["generate", data_bin, "--path", checkpoints["fastdiss_tiny"], "--device=cpu"]
    more += ["--max-tokens", "60"]
    whole = run_cli(*more).stdout
    before = run_cli(*more[:-1], "1000").stderr
    wound = partial(signalled_in_batch, on=0, number=7, signals=(signal.SIGTERM,))
    (done,) = Ranks(1, *more, prepare=wound).results()
    assert done.returncode == 128 + signal.SIGTERM and "stopp" not in before
    assert whole.startswith(done.stdout) and len(done.stdout) < len(whole)
    assert "Generate" not in done.stdout and " of 20\n" in done.stderr


def test_the_answers_to_a_file_bear_its_name(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    model = ["--path", checkpoints["fastdiss_tiny"], "--results-path", tmp_path / "out"]
    for name in ("a.de", "b c.de", os.fsdecode(b"caf\xe9"), "e" * 240):  # Latin-1, too long
        (tmp_path / name).write_text("drei\n")
        done = run_cli("generate", *model, "--input", tmp_path / name, "--steps", "1")
        assert done.returncode == 0 and "replaced" not in done.stderr
    files = sorted((tmp_path / "out").iterdir())
    names = ["a.de", "b_c.de", "caf_", "e" * 64]
    assert [file.name for file in files] == [f"generate-{name}.txt" for name in names]
    assert run_cli("score", *files, "--metrics", "distinct").returncode == 0


def test_a_signal_leaves_whole_files_and_what_was_done(
    data_bin: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    more = ["generate", data_bin, "--path", checkpoints["fastdiss_tiny"], "--device=cpu"]
    more += ["--buffer-size", "6", "--results-path", tmp_path, "--steps", "1,2"]
    (tmp_path / "generate-test.steps1.txt").write_text("older")
    wound = partial(signalled_in_batch, on=0, number=4, signals=(signal.SIGTERM,))
    (done,) = Ranks(1, *more, prepare=wound).results()
    assert done.returncode == 128 + signal.SIGTERM and done.stdout == ""
    names = [f"generate-test.steps{steps}.txt.part" for steps in (1, 2)]
    where = ", ".join(str(tmp_path / name) for name in names)
    assert done.stderr.endswith(f"stopped by signal 15; sentences in {where}: 12 of 20\n")
    older = tmp_path / "generate-test.steps1.txt"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([older.name, *names])
    assert older.read_text() == "older"
    for name in names:
        assert (tmp_path / name).read_text().splitlines()[-1].startswith("I-11\t")


def test_a_signal_in_a_window_leaves_what_was_done_in_files(
    data_bin: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """The longest sentences are decoded first, wherever they are in the corpus."""
    more = ["generate", data_bin, "--path", checkpoints["fastdiss_tiny"], "--device=cpu"]
    more += ["--max-tokens", "60", "--results-path", tmp_path]
    wound = partial(signalled_in_batch, on=0, number=5, signals=(signal.SIGTERM,))
    (done,) = Ranks(1, *more, prepare=wound).results()
    assert done.returncode == 128 + signal.SIGTERM
    part = tmp_path / "generate-test.txt.part"
    lines = part.read_text().splitlines()
    numbers = [int(line.split("\t")[0][2:]) for line in lines if line.startswith("D-")]
    assert numbers == sorted(numbers) and 0 < len(numbers) < 20 and 0 not in numbers
    assert f"sentences in {part}: {len(numbers)} of 20" in done.stderr
    whole = run_cli(*more)
    assert not part.exists()  # all of it is in the complete file
    complete = set((tmp_path / "generate-test.txt").read_text().splitlines())
    assert whole.returncode == 0 and complete > set(lines)


def test_a_second_signal_ends_generate_at_once(
    data_bin: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    more = ["generate", data_bin, "--path", checkpoints["fastdiss_tiny"], "--device=cpu"]
    more += ["--buffer-size", "6", "--results-path", tmp_path]
    signals = (signal.SIGINT, signal.SIGINT)
    wound = partial(signalled_in_batch, on=0, number=1, signals=signals)
    (done,) = Ranks(1, *more, prepare=wound).results()
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert "stopped" not in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("when", ["conclude", "diagnose"])
def test_a_signal_ends_a_diagnosis(
    data_bin: Path, checkpoints: dict[str, Path], tmp_path: Path, when: str
) -> None:
    """What was decoded is in its file by then."""
    more = ["generate", data_bin, "--path", checkpoints["fastdiss_tiny"], "--device=cpu"]
    more += ["--diagnose", "--results-path", tmp_path]
    (done,) = Ranks(1, *more, prepare=partial(signalled_at_the_end, when=when)).results()
    # the default action of the signal, or our own exit
    assert done.returncode == (-signal.SIGTERM if when == "diagnose" else 128 + signal.SIGTERM)
    assert [file.name for file in tmp_path.iterdir()] == ["generate-test.txt"]
    assert "| 20 sentences" in (tmp_path / "generate-test.txt").read_text()


def signalled_at_the_end(rank: int, when: str) -> None:
    """Send a signal while the results are written, or in the diagnosis that follows."""
    module = importlib.import_module("fastdiss_cli.commands.generate")
    right = getattr(module, f"_{when}")

    def wrong(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        right(*given)

    setattr(module, f"_{when}", wrong)


def test_a_signal_may_interrupt_a_line_of_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    def reentrant(message: str) -> None:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    monkeypatch.setattr(logs, "info", reentrant)
    stop = Stop()
    with stop_on_signal(stop, "saving"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.signal == signal.SIGTERM


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As SIGINT is for what a script starts in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_on_signal(stop := Stop(), "saving"):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == 0 and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        with stop_on_signal(stop, "saving"):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_ends_the_wait_for_input(checkpoints: dict[str, Path]) -> None:
    more = ["generate", "--path", checkpoints["fastdiss_tiny"], "--input", "-", "--device=cpu"]
    (done,) = Ranks(1, *more, prepare=waiting_input).results()
    assert done.returncode == 130, done.stderr
    assert [line[:2] for line in done.stdout.splitlines()] == ["S-", "H-", "D-", "P-", "I-"]
    assert done.stderr.endswith("\nstopped by signal 2; sentences written: 1\n")


def test_a_signal_at_the_end_of_the_wait_is_one_in_it() -> None:
    class Late(Stop):
        def __setattr__(self, name: str, value: object) -> None:
            if name == "waiting" and not value and self.__dict__.get("waiting") and not self.signal:
                os.kill(os.getpid(), signal.SIGTERM)
            super().__setattr__(name, value)

    stop = Late()
    with stop_on_signal(stop, "finishing this batch"):
        assert translation._read(translation.Input(iter([[([5], None)]])), stop) == []
    assert stop.signal == signal.SIGTERM and not stop.waiting


def test_a_signal_between_two_batches_leaves_no_wait_for_input(
    checkpoints: dict[str, Path],
) -> None:
    more = ["generate", "--path", checkpoints["fastdiss_tiny"], "--input", "-", "--device=cpu"]
    (done,) = Ranks(1, *more, prepare=signalled_in_output).results()
    assert done.returncode == 143 and done.stdout.splitlines()[-1].startswith("I-0\t"), done.stderr
    assert done.stderr.endswith("\nstopped by signal 15; sentences written: 1\n")


def signalled_in_output(rank: int) -> None:
    """Give a line, send a signal while its answer is written, and allow no further read."""

    def lines(*_):
        yield "drei vier"
        raise AssertionError("waited for input after the signal")

    def write(output: translation.Output, written: str) -> None:
        right(output, written)
        os.kill(os.getpid(), signal.SIGTERM)

    right, translation.Output.write = translation.Output.write, write
    translation.decode_lines = lines


def waiting_input(rank: int) -> None:
    """Give a line, and then nothing more but a signal."""

    def lines(*_):
        yield "drei vier"
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()

    translation.decode_lines = lines


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_full_disk_is_reported_with_the_file_name(
    data_bin: Path,
    checkpoints: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real_open = Path.open

    def full(path: Path, *args: Any, **kwargs: Any) -> Any:
        return real_open(Path("/dev/full") if path.suffix == ".tmp" else path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    model = checkpoints["fastdiss_tiny"]
    done = run_cli("generate", data_bin, "--path", model, "--results-path", tmp_path)
    assert "generate-test.txt: cannot write: No space left" in one_line_error(done)
    assert not list(tmp_path.iterdir())


def test_what_is_written_before_a_failure_is_kept(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "in").write_bytes(b"eins\nzwei\ndrei\n\xff\n")
    more = ["--path", checkpoints["fastdiss_tiny"], "--buffer-size=2", "--results-path"]
    done = run_cli("generate", "--input", tmp_path / "in", *more, tmp_path / "out")
    one_line_error(done, "line 4 is not valid UTF-8")
    (part,) = (tmp_path / "out").iterdir()
    assert f"the lines written before the failure are in {part}" in done.stderr
    assert [line[:3] for line in part.read_text().splitlines() if line[0] == "D"] == ["D-0", "D-1"]


def test_hypotheses_are_kept_where_only_the_summary_cannot_be_written(
    data_bin: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    more = ["generate", data_bin, "--path", checkpoints["fastdiss_tiny"], "--device=cpu"]
    more += ["--results-path", tmp_path]
    assert run_cli(*more).returncode == 0
    whole = (tmp_path / "generate-test.txt").read_text()
    (tmp_path / "generate-test.txt").unlink()
    tight = partial(full_disk, size=len(whole.encode()) - 10)
    (done,) = Ranks(1, *more, prepare=tight).results()
    one_line_error(done, "generate-test.txt: cannot write: File too large")
    (part,) = tmp_path.iterdir()
    assert f"the lines written before the failure are in {part}" in done.stderr
    assert part.read_text().split("Generate ")[0] == whole.split("Generate ")[0]


@pytest.mark.parametrize("arch", ["fastdiss_tiny", "transformer_tiny"])
def test_an_empty_line_has_an_empty_answer(checkpoints: dict[str, Path], arch: str) -> None:
    more = ["generate", "--path", checkpoints[arch], "--input=-", "--plain", "--buffer-size=9"]
    lines = ["", "eins zwei", "", " \t"]
    done = run_cli(*more, stdin="\n".join(lines) + "\n")
    empty, answer, *rest = done.stdout.split("\n")
    assert (empty, rest) == ("", ["", "", ""]) and answer
    summary = done.stderr.splitlines()[-1]
    assert "4 sentences in" in summary
    assert "transformer" in arch or summary.endswith("NFE 5.0")  # of the one that is decoded


def test_a_blank_source_of_a_dataset_has_an_empty_answer(
    data_bin: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """As one that is read from text."""
    (tmp_path / "test.de").write_text("eins\n \t\n")
    (tmp_path / "test.en").write_text("one\ntwo\n")
    tokenizers = ",".join(str(data_bin / f"tokenizer.{side}") for side in ("src", "tgt"))
    done = run_cli(
        "preprocess", "-s", "de", "-t", "en", "--testpref", tmp_path / "test", "--destdir",
        tmp_path / "bin", "--tokenizer", tokenizers,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plain = ["generate", "--path", checkpoints["fastdiss_tiny"], "--plain"]
    from_text = run_cli(*plain, "--input", tmp_path / "test.de").stdout
    assert run_cli(*plain, tmp_path / "bin").stdout == from_text
    assert from_text.endswith("\n\n") and from_text.strip()


def test_the_other_direction_is_refused(
    corpus: Path, data_bin: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """A joined tokenizer does not reveal it."""
    more = ["-s", "en", "-t", "de", "--tokenizer", data_bin / "tokenizer.src"]
    more += ["--testpref", corpus / "test", "--destdir", tmp_path / "d"]
    assert run_cli("preprocess", *more).returncode == 0
    done = run_cli("generate", tmp_path / "d", "--path", checkpoints["transformer_tiny"])
    assert "translates from de to en" in one_line_error(done, "from en to de")


def test_other_languages_are_reported(
    corpus: Path, data_bin: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    for side, language in (("de", "nl"), ("en", "en")):
        shutil.copy(corpus / f"test.{side}", tmp_path / f"test.{language}")
    more = ["-s", "nl", "-t", "en", "--tokenizer", data_bin / "tokenizer.src"]
    more += ["--testpref", tmp_path / "test", "--destdir", tmp_path / "d"]
    assert run_cli("preprocess", *more).returncode == 0
    found = [
        run_cli("generate", data, "--path", checkpoints["fastdiss_tiny"])
        for data in (tmp_path / "d", data_bin)
    ]
    assert [done.returncode for done in found] == [0, 0]
    warned = ["the checkpoint translates from de to en" in done.stderr for done in found]
    assert warned == [True, False]


def test_a_reranker_that_goes_the_other_way_is_refused(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    reranker = Checkpoint.load(checkpoints["transformer_tiny"])
    reranker.dataset |= {"source": "en", "target": "de"}
    reranker.save(tmp_path / "backward.safetensors")
    more = ["--path", checkpoints["fastdiss_tiny"], "--input=-", "--noise-beam=2", "--rerank-path"]
    assert run_cli("generate", *more, checkpoints["transformer_tiny"], stdin="eins\n").stdout
    done = run_cli("generate", *more, tmp_path / "backward.safetensors", stdin="eins\n")
    one_line_error(done, "the reranker translates from en to de, the model from de to en")


@pytest.mark.parametrize("from_text", [True, False])
def test_the_references_that_were_given_are_those_of_the_file(
    data_bin: Path, corpus: Path, checkpoints: dict[str, Path], tmp_path: Path, from_text: bool
) -> None:
    """So that scoring the file gives the BLEU of its summary."""
    lines = (corpus / "test.en").read_text().upper().splitlines()
    (tmp_path / "ref.tsv").write_text("".join(f"{line}\tother\n" for line in lines))
    (tmp_path / "one").write_text("".join(f"{line}\n" for line in lines))
    text = ["--input", corpus / "test.de"] if from_text else [data_bin]
    generate = ["generate", *text, "--path", checkpoints["transformer_tiny"], "--max-len-b", "12"]
    for name, count in (("one", "nrefs:1"), ("ref.tsv", "nrefs:2")):
        done = run_cli(*generate, "--ref", tmp_path / name)
        found = [line[2:] for line in done.stdout.splitlines() if line.startswith("T-")]
        assert found == [f"{n}\t{line}" for n, line in enumerate(lines)] and count in done.stdout
    (tmp_path / "out").write_text(run_cli(*generate, "--ref", tmp_path / "one").stdout)
    bleu = run_cli("score", tmp_path / "out", "--metrics=bleu").stdout.strip()
    assert f": {bleu} | 20 sentences" in (tmp_path / "out").read_text()


def test_hypotheses_are_kept_where_references_are_too_few(
    corpus: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "ref").write_text("one\ntwo\n")
    more = ["--input=-", "--ref", tmp_path / "ref", "--results-path", tmp_path / "out"]
    lines = "eins\nzwei\ndrei\n"
    done = run_cli("generate", "--path", checkpoints["fastdiss_tiny"], *more, stdin=lines)
    one_line_error(done, "--ref has 2 lines, but the input has 3 sentences")
    (kept,) = (tmp_path / "out").iterdir()
    assert f"failure are in {kept}" in done.stderr and kept.read_text().count("\nD-") == 3


def test_an_option_that_a_checkpoint_does_not_know_is_as_before_it(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """The weights do not show it: a source copy has none, and the first checkpoints had no copy."""
    checkpoint = Checkpoint.load(checkpoints["fastdiss_tiny"])
    assert checkpoint.model_config.pop("source_copy") == 1.0
    checkpoint.save(tmp_path / "old.safetensors")
    device = torch.device("cpu")
    assert load_model(tmp_path / "old.safetensors", device).model.config.source_copy == 0
    assert load_model(checkpoints["fastdiss_tiny"], device).model.config.source_copy == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--input=-", "--gen-subset", "valid"], "--gen-subset applies to a dataset"),
        (
            ["--input=-", "--mbr-metric", "chrf", "--select", "score"],
            "--mbr-metric applies to mbr, not to score",
        ),
        (
            ["--input=-", "--mbr-weights", "equal", "--select", "score"],
            "--mbr-weights applies to mbr, not to score",
        ),
        (["--input=-", "--solver", "dimm"], "--solver must be one of ddpm, ddim, dpm-solver++"),
        (["--input=-", "--solver=ddim", "--temperature=1"], "--temperature must be 0 with ddim"),
        (["data", "--self-cond=gold", "--length-beam=3"], "--length-beam must be 1 with"),
        (["data", "--diagnose", "--buffer-size", "3"], "leave out --buffer-size"),
    ],
)
def test_options_that_could_not_count_are_wrong_usage(
    checkpoints: dict[str, Path], more: list[str], message: str
) -> None:
    done = run_cli("generate", "--path", checkpoints["fastdiss_tiny"], *more, stdin="eins\n")
    one_line_error(done, message, code=2)


def test_one_candidate_leaves_nothing_to_select(checkpoints: dict[str, Path]) -> None:
    line = ["generate", "--path", checkpoints["fastdiss_tiny"], "--input=-", "--select", "mbr"]
    done = run_cli(*line, stdin="eins\n")
    assert done.returncode == 0 and "--select has no effect: there is one" in done.stderr
    assert "has no effect" not in run_cli(*line, "--noise-beam", "2", stdin="eins\n").stderr
    for flag, value in (("--mbr-metric", "chrf"), ("--mbr-weights", "equal")):
        told = run_cli(*line[:-2], flag, value, stdin="eins\n").stderr
        assert f"{flag} has no effect: there is one" in told
    alike = [*line, "--mbr-weights", "equal", "--noise-beam", "2"]
    done = run_cli(*alike, stdin="eins\n")
    assert "--mbr-weights has no effect without --length-beam" in done.stderr
    assert "mbr_weights" not in done.stdout
    done = run_cli(*alike, "--length-beam", "2", stdin="eins\n")
    assert "no effect" not in done.stderr and " mbr_weights=equal" in done.stdout


def test_the_least_length_is_at_most_the_largest() -> None:
    assert BeamDecoding(min_len=5, max_len_b=5).min_len == 5
    with pytest.raises(FastdissError, match="min_len must be at most max_len_b"):
        BeamDecoding(min_len=6, max_len_b=5)
