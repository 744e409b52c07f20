"""The Python API: its examples, its errors, and that it changes no global state."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import typing
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
import torch
from conftest import run_cli
from runs import command

import fastdiss_cli
from fastdiss_cli.api import GenerateOptions, Translator
from fastdiss_cli.errors import FastdissError, OptionError
from fastdiss_cli.models.beam_search import BeamDecoding
from fastdiss_cli.models.diffusion_decoding import DiffusionDecoding

DOCS = Path(__file__).parents[1] / "docs" / "api.md"
SENTENCES = ["drei vier", "neun", "eins zwei drei vier fünf"]


def train(data_bin: Path, folder: Path, arch: str) -> Path:
    done = run_cli(*command(data_bin, folder, arch, max_update=20, lr=1e-2, valid_sentences=0))
    assert done.returncode == 0, done.stderr
    return folder / "checkpoint_last.safetensors"


@pytest.fixture(scope="module")
def diffusion(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(data_bin, tmp_path_factory.mktemp("diffusion"), "fastdiss_tiny")


@pytest.fixture(scope="module")
def autoregressive(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(data_bin, tmp_path_factory.mktemp("autoregressive"), "transformer_tiny")


def test_the_examples_of_the_documentation_run(
    diffusion: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(diffusion, tmp_path / "checkpoints" / "checkpoint_best.safetensors")
    (tmp_path / "text").symlink_to(corpus)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, object] = {}
    output = []
    for block in blocks:
        exec(block, names)
        output.append(capsys.readouterr().out.splitlines())
    assert len(output[0]) == 2
    assert output[1][0].startswith("1 15 chosen: ") and output[1][4].startswith("2 15 chosen: ")
    assert re.fullmatch(r" 5 steps: BLEU \d+\.\d\d, chrF \d+\.\d\d", output[2][2])
    assert output[2][4].startswith("BLEU|nrefs:1|")


def test_the_answers_are_those_of_the_command(diffusion: Path) -> None:
    more = ["--steps=2", "--length-beam=2", "--noise-beam=3", "--seed=7", "--device=cpu"]
    done = run_cli(
        "generate", "--path", diffusion, "--input=-", *more, stdin="\n".join(SENTENCES) + "\n"
    )
    output = [line.split("\t")[2] for line in done.stdout.splitlines() if line.startswith("D-")]
    options = {"steps": 2, "length_beam": 2, "noise_beam": 3, "seed": 7}
    assert fastdiss_cli.load(diffusion, "cpu").generate(SENTENCES, **options) == output
    typed = fastdiss_cli.load(diffusion, torch.device("cpu"), torch.float32)
    assert typed.generate(SENTENCES, **options) == output
    assert typed.generate(SENTENCES, **options | {"steps": np.int64(2)}) == output
    assert repr(typed) == "<Translator fastdiss_tiny, de to en>"


def test_an_open_file_is_a_list_of_sentences(diffusion: Path) -> None:
    """A line break is never part of a sentence, as in `generate --input`."""
    translator, sentences = fastdiss_cli.load(diffusion), ["drei vier", "neun eins zwei", ""]
    answers = translator.generate(sentences)
    for end in ("\n", "\r\n"):
        assert translator.generate(f"{sentence}{end}" for sentence in sentences) == answers
    assert translator.generate(["drei\nvier"]) == answers[:1]


def test_what_is_not_asked_for_is_not_kept(
    diffusion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """15 candidates of each sentence would be twenty times the memory."""
    monkeypatch.setattr("fastdiss_cli.api.with_runners_up", None)
    assert fastdiss_cli.load(diffusion).generate(SENTENCES, steps=1, noise_beam=15)


def test_candidates_are_all_with_the_chosen_one_first(
    diffusion: Path, autoregressive: Path
) -> None:
    translator = fastdiss_cli.load(str(diffusion))
    options = {"steps": 3, "length_beam": 2, "noise_beam": 3, "max_tokens": 1, "temperature": 1.0}
    rows = translator.candidates(SENTENCES, **options)
    assert [len(row) for row in rows] == [6, 6, 6]
    assert [row[0].text for row in rows] == translator.generate(SENTENCES, **options)
    for row in rows:
        scores = [candidate.score for candidate in row[1:]]
        assert scores == sorted(scores, reverse=True) and max(scores) < 0
        assert len({candidate.score for candidate in row}) == 6  # each of them once
    by_score = translator.candidates(SENTENCES, **options, select="score")
    assert all(row[0].score == max(c.score for c in row) for row in by_score)
    ranker = fastdiss_cli.load(autoregressive)
    reranked = translator.candidates(SENTENCES, **options, reranker=ranker)
    assert [{c.text for c in row} for row in reranked] == [{c.text for c in row} for row in rows]
    other = translator.generate(SENTENCES, **{**options, "seed": 2})
    assert other != [row[0].text for row in rows]
    assert len(ranker.candidates(["drei"], beam=3)[0]) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 5}, "no option 'step'; did you mean 'steps'?"),
        ({"beam": 3}, "no option 'beam'"),
        ({"history": True}, "no option 'history'"),
        ({"steps": "5"}, "steps must be a whole number, not '5'"),
        ({"steps": 0}, "steps must be from 1 to 10000,"),
        ({"noise_beam": 10**9}, "noise_beam must be from 1 to 1000,"),
        ({"max_tokens": True}, "max_tokens must be a whole number above 0, not True"),
        ({"solver": "euler"}, "solver must be one of ddpm"),
        ({"temperature": "cold"}, "temperature must be a number, not 'cold'"),
        ({"temperature": 0.5, "solver": "ddim"}, "temperature must be 0 with ddim"),
        ({"self_cond": "gold"}, "self_cond='gold'"),
        ({"select": ""}, "select : choose from"),
        ({"select": "best"}, "select best: choose from score, mbr, rerank"),
        ({"mbr_metric": "ter"}, "mbr_metric ter: choose from bleu, chrf"),
        ({"mbr_weights": "score"}, "mbr_weights score: choose from length, equal"),
        ({"select": "rerank"}, "select rerank needs a transformer"),
        ({"select": "score", "mbr_metric": "chrf"}, "mbr_metric applies to mbr, not to score"),
    ],
)
def test_a_wrong_option_is_named(diffusion: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(FastdissError, match=re.escape(message)):
        fastdiss_cli.load(diffusion).generate(SENTENCES, **options)


def test_the_annotations_can_be_read() -> None:
    for function in (fastdiss_cli.load, fastdiss_cli.score, Translator.generate):
        assert "return" in typing.get_type_hints(function)


def test_a_translator_can_be_a_key(diffusion: Path) -> None:
    one, other = fastdiss_cli.load(diffusion), fastdiss_cli.load(diffusion)
    assert len({one, other, one}) == 2


def test_errors_travel_between_processes() -> None:
    error = pickle.loads(pickle.dumps(OptionError("steps", "must be positive")))
    assert (error.option, str(error)) == ("steps", "steps must be positive")


def test_other_wrong_use_is_named(diffusion: Path, corpus: Path, tmp_path: Path) -> None:
    translator = fastdiss_cli.load(diffusion)
    with pytest.raises(FastdissError, match="give a list of strings, not str"):
        translator.generate("drei vier")
    with pytest.raises(FastdissError, match="item 1 is NoneType, not a string"):
        translator.generate(["drei", None])
    for wrong in (
        ("a b", ["a"]),
        (["a"], "a"),
        (["a"], None),
        (["a"], [None]),
        (["a"], [[]]),
        (["a", "b"], {"a", "b"}),
    ):
        with pytest.raises(FastdissError, match=r"string|needs a reference"):
            fastdiss_cli.score(*wrong)
    assert fastdiss_cli.load(diffusion, device=torch.device("cpu", 0)).generate(["drei"], steps=1)
    for device in ("abacus", "meta", "cpu:1", None):
        with pytest.raises(FastdissError, match="no such device"):
            fastdiss_cli.load(diffusion, device=device)
    for wrong in ({"max_tokens": 0}, {"max_tokens": "a"}, {"reranker": "x"}):
        with pytest.raises(FastdissError, match="must be"):
            translator.generate(["drei"], **wrong)
    # without an order, without one for strings, without items
    for several in ({"a", "b"}, {"a": 1}, b"a", np.array("a"), 3):
        with pytest.raises(FastdissError, match="give a list of strings, not "):
            translator.generate(several)
    for wrong in ({"path": None}, {"path": 5}, {"path": diffusion, "user_module": 5}):
        with pytest.raises(FastdissError, match="give a string or a Path, not "):
            fastdiss_cli.load(**wrong)
    with pytest.raises(FastdissError, match="references of sentence 0: one of several is empty"):
        fastdiss_cli.score(["a"], [["a", ""]])
    with pytest.raises(FastdissError, match="item 0 contains a lone surrogate"):
        translator.generate(["a\ud800"])
    with pytest.raises(FastdissError, match=r"dtype must be one of auto, .*, not 'half'"):
        fastdiss_cli.load(diffusion, dtype="half")
    prefs = [f"--{split}pref={corpus / split}" for split in ("train", "valid")]
    more = ["-s", "de", "-t", "en", "--model-type=word", "--destdir", tmp_path / "bin"]
    assert run_cli("preprocess", *more, *prefs).returncode == 0
    foreign = train(tmp_path / "bin", tmp_path, "transformer_tiny")
    with pytest.raises(FastdissError, match=r"the source tokenizer of the reranker .* is not"):
        translator.generate(SENTENCES, reranker=fastdiss_cli.load(foreign))


def test_every_decoding_option_is_annotated() -> None:
    """So that editors know all options of all families."""
    known = set(GenerateOptions.__annotations__)
    for family in (DiffusionDecoding, BeamDecoding):
        assert set(family.__dataclass_fields__) - {"history", "diagnose"} <= known


def test_scores_are_those_of_sacrebleu() -> None:
    hypotheses = ["the cat sat on the mat", "a dog runs fast"]
    references = [["the cat sat on a mat", "a cat sat"], ["a dog runs quickly"]]
    found = fastdiss_cli.score(hypotheses, references, ["bleu", "chrf"])
    streams = [["the cat sat on a mat", "a dog runs quickly"], ["a cat sat", None]]
    assert found["bleu"].value == sacrebleu.corpus_bleu(hypotheses, streams).score
    assert found["chrf"].value == sacrebleu.corpus_chrf(hypotheses, streams).score
    assert "nrefs:var" in found["bleu"].signature and found["bleu"].signature in str(found["bleu"])
    single = fastdiss_cli.score(["a b c d"], ["a b c d"])
    assert list(single) == ["bleu", "chrf", "ter"] and single["bleu"].value == pytest.approx(100)
    with pytest.raises(FastdissError, match="no metric 'blue'; did you mean 'bleu'"):
        fastdiss_cli.score(hypotheses, references, ["blue"])
    for hyps, refs in ((["a"], []), ([], []), (["a", "b"], ["a"])):
        with pytest.raises(FastdissError, match="give one of each per sentence"):
            fastdiss_cli.score(hyps, refs)


ALONE = """
import os, random, signal, sys, threading
import numpy, rich.style, torch  # rich draws a number as it is imported
numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
def state():
    return (
        [signal.getsignal(number) for number in numbers], torch.get_rng_state().tolist(),
        random.getstate(), str(numpy.random.get_state()), dict(os.environ), os.getcwd(),
        torch.get_num_threads(), torch.is_grad_enabled(), threading.active_count(),
        sys.stdout, sys.stderr, sys.excepthook, torch.are_deterministic_algorithms_enabled(),
    )
import ctypes
libc, tuned = ctypes.CDLL, []
ctypes.CDLL = lambda name, *more: tuned.append(name) if name is None else libc(name, *more)
before = state()
import fastdiss_cli
translator = fastdiss_cli.load(sys.argv[1])
answers = translator.generate(["drei vier", "neun"], steps=2, noise_beam=2)
fastdiss_cli.score(answers, ["three four", "nine"])
assert before == state() and not tuned
"""


def test_a_notebook_is_left_as_it_was(diffusion: Path, tmp_path: Path) -> None:
    """Only the file is needed, and no state of the process changes, not even malloc's."""
    shutil.copy(diffusion, tmp_path / "model.safetensors")
    env = {"PYTHONPATH": str(DOCS.parents[1]), "RANK": "3", "WORLD_SIZE": "4"}  # of another job
    done = subprocess.run(
        [sys.executable, "-c", ALONE, "model.safetensors"],
        cwd=tmp_path, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_translator_travels_to_another_process(
    diffusion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(diffusion.parent)
    translator = fastdiss_cli.load(diffusion.name, "cpu", "bfloat16")
    pickled = pickle.dumps(translator)
    assert len(pickled) < 1000  # not the weights
    monkeypatch.chdir(tmp_path)
    copy = pickle.loads(pickled)
    assert copy.loaded.dtype == torch.bfloat16
    assert copy.generate(SENTENCES) == translator.generate(SENTENCES)


def test_the_default_type_of_the_caller_changes_nothing(diffusion: Path) -> None:
    wanted = fastdiss_cli.load(diffusion, "cpu").generate(SENTENCES)
    torch.set_default_dtype(torch.float64)
    try:
        assert fastdiss_cli.load(diffusion, "cpu").generate(SENTENCES) == wanted
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_forked_process_does_not_hang(diffusion: Path) -> None:
    """With several threads, which a fork does not copy."""
    script = (
        "import os, sys, fastdiss_cli\n"
        "translator = fastdiss_cli.load(sys.argv[1], 'cpu')\n"
        "wanted = translator.generate(['drei vier'])\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(translator.generate(['drei vier']) != wanted)\n"
        "sys.exit(os.waitpid(child, 0)[1])\n"
    )
    line = [sys.executable, "-c", script, str(diffusion)]
    done = subprocess.run(line, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert done.returncode == 0


def test_several_threads(diffusion: Path) -> None:
    expected = fastdiss_cli.load(diffusion).generate(SENTENCES, steps=2)
    shared = fastdiss_cli.load(diffusion)
    found: list[list[str]] = []

    def work(translator: Translator) -> None:
        found.append(translator.generate(SENTENCES, steps=2))

    threads = [threading.Thread(target=work, args=(shared,)) for _ in range(2)]
    threads.append(threading.Thread(target=lambda: work(fastdiss_cli.load(diffusion))))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 3
    assert torch.is_grad_enabled()
