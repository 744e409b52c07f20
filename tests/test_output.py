"""fairseq's lines, written and read back; references; the choice among candidates."""

from __future__ import annotations

import io
import pickle
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from sacrebleu.metrics import BLEU

from fastdiss_cli import logs
from fastdiss_cli.checkpoints.loading import Loaded
from fastdiss_cli.data.layout import Layout
from fastdiss_cli.data.sentencepiece import train_tokenizer
from fastdiss_cli.data.tokenizer import Tokenizer
from fastdiss_cli.decoding.output import format_lines
from fastdiss_cli.decoding.report import CorpusBleu
from fastdiss_cli.decoding.selection import (
    by_mbr,
    by_reranking,
    by_score,
    selector,
    with_runners_up,
)
from fastdiss_cli.decoding.systems import read_all_references, read_system, reference_streams
from fastdiss_cli.device import autocast
from fastdiss_cli.errors import FastdissError
from fastdiss_cli.models.registry import HistoryStep, Hypothesis


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["ein Hund läuft", "a dog runs", "the dog ran"] * 9, "word", 300)


def hypothesis(tokenizer: Tokenizer, text: str, score: float = -0.5) -> Hypothesis:
    tokens = tokenizer.encode(text)[:-1]
    return Hypothesis(tokens, score, [score] * (len(tokens) + 1), nfe=5)


def test_what_is_written_is_read_back(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = ["a dog runs", "", "T-0\ta tab\u2028and a separator", "\ta dog"]
    path = tmp_path / "out.txt"
    lines = [
        format_lines(i, "ein Hund", hypothesis(tokenizer, text), tokenizer, reference=text + "!")
        for i, text in enumerate(texts)
    ]
    path.write_text("".join(reversed(lines)) + "Generate test: summary\n", encoding="utf-8")
    read = read_system(path)
    assert read.hypotheses == texts
    assert read.references == [text + "!" for text in texts]


def test_candidates_are_written_and_read_back(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [["a dog runs", "the dog ran", "a dog runs"], ["the dog"], ["", "a"]]
    path = tmp_path / "out.txt"
    with path.open("w", encoding="utf-8") as file:
        for i, row in enumerate(rows):
            best, *others = [hypothesis(tokenizer, text) for text in row]
            best.runners_up = others
            file.write(format_lines(i, "ein Hund", best, tokenizer, reference="a dog"))
    read = read_system(path)
    assert read.candidates == rows
    assert read.hypotheses == ["a dog runs", "the dog", ""]
    assert read.references == ["a dog"] * 3


def test_a_line_break_that_a_model_writes_shifts_no_line(tokenizer: Tokenizer) -> None:
    text = format_lines(0, "x", hypothesis(tokenizer, "a\ndog"), tokenizer)
    assert [line[:2] for line in text.splitlines()] == ["S-", "H-", "D-", "P-", "I-"]


def test_plain_text_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "plain"
    path.write_text("one\n\nthree\n")
    assert read_system(path).hypotheses == ["one", "", "three"]
    assert read_system(path).references is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty"),
        ("D-0\t0\ta\nD-2\t0\tb\n", "no D-1"),
        ("D-0\t0\ta\nD-1\t0\tb\nD-0\t0\tc\n", "D-0 appears twice"),
        ("S-0\tx\nD-0\t0\ta\nS-0\tx\nD-0\t0\ta\n", "S-0 appears twice"),
    ],
)
def test_incomplete_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "out"
    path.write_text(content)
    with pytest.raises(FastdissError, match=message):
        read_system(path)


def test_history_is_coloured_by_confidence_in_a_terminal(tokenizer: Tokenizer) -> None:
    h = hypothesis(tokenizer, "a dog runs")
    h.history = [HistoryStep(0.4, h.tokens, [0.2, 0.7, 0.85, 0.9])]
    plain = format_lines(3, "x", h, tokenizer).splitlines()[1]
    assert plain == "E-3_1\tt=0.400\t▁a ▁dog ▁runs"
    colours = format_lines(3, "x", h, tokenizer, colour=True).splitlines()[1]
    assert colours.endswith("\t\x1b[1;4;31m▁a\x1b[0m \x1b[31m▁dog\x1b[0m ▁runs")


def test_references_of_several_files_are_alternatives(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("one\tuno\ntwo\n")
    (tmp_path / "b").write_text("eins\nzwei\n")
    rows = read_all_references([tmp_path / "a.tsv", tmp_path / "b"], 2)
    assert rows == [["one", "uno", "eins"], ["two", "zwei"]]
    assert reference_streams(rows) == [["one", "two"], ["uno", "zwei"], ["eins", None]]


def test_selection_by_score_and_by_agreement(tokenizer: Tokenizer) -> None:
    row = [
        hypothesis(tokenizer, "ein Hund läuft", -0.1),
        hypothesis(tokenizer, "the dog runs", -0.8),
        hypothesis(tokenizer, "a dog runs", -0.9),
    ]
    assert by_score([[2]], [row]) == [row[0]]
    for weights in ("equal", "length"):  # the outlier agrees with none
        assert by_mbr(tokenizer, "bleu", weights)([[2]], [row])[0] in row[1:]
        assert by_mbr(tokenizer, "chrf", weights)([[2]], [row[:1]]) == row[:1]
    row[0].weight = 9.0  # but is what the model expects
    assert by_mbr(tokenizer, "bleu", "length")([[2]], [row]) == row[:1]
    assert by_mbr(tokenizer, "bleu", "equal")([[2]], [row])[0] in row[1:]


def test_reranking_takes_what_the_reranker_finds_most_likely(tokenizer: Tokenizer) -> None:
    class Prefers(torch.nn.Linear):
        """A reranker that prefers short answers."""

        device = torch.device("cpu")

        class src:
            pad = 1

        def encode(self, tokens: torch.Tensor, layout: Layout) -> torch.Tensor:
            return tokens

        def log_likelihood(self, memory: torch.Tensor, answers: list[list[int]]) -> torch.Tensor:
            return torch.tensor([-float(len(answer)) for answer in answers])

    rows = [
        [hypothesis(tokenizer, text) for text in ("a dog runs", "a", "the dog")],
        [hypothesis(tokenizer, "a dog")],  # fewer candidates than the other sentence
    ]
    chosen = by_reranking(Prefers(1, 1))([[5, 2], [2]], rows)
    assert chosen == [rows[0][1], rows[1][0]]
    with pytest.raises(FastdissError, match="the reranker must be"):
        by_reranking(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reranker_computes_in_its_own_type(tokenizer: Tokenizer, dtype: torch.dtype) -> None:
    computed_in: list[torch.dtype] = []

    class Reranker(torch.nn.Linear):
        device = torch.device("cpu")

        class src:
            pad = 1

        def encode(self, tokens: torch.Tensor, layout: Layout) -> None:
            computed_in.append(self(torch.zeros(1, 1)).dtype)

        def log_likelihood(self, memory: None, answers: list[list[int]]) -> torch.Tensor:
            return torch.zeros(len(answers))

    loaded = Loaded(Reranker(1, 1), tokenizer, tokenizer, None, ("de", "en"), dtype)
    method, choose = selector(loaded, None, None, None, loaded)
    assert method == "rerank"
    for of_the_model in (torch.float32, torch.bfloat16):
        with autocast(torch.device("cpu"), of_the_model):
            choose([[5, 2]], [[hypothesis(tokenizer, "a"), hypothesis(tokenizer, "a dog")]])
    assert computed_in == [dtype, dtype]


@pytest.mark.parametrize("most", [1, 3])
def test_bleu_by_sentence_is_that_of_the_corpus(most: int) -> None:
    """In two parts, as by two ranks, and without keeping the sentences."""
    draw = random.Random(most)
    words = ["a", "dog", "runs", "and", "a cat , too", "", "isn't it?"]
    text = lambda: " ".join(draw.choices(words, k=draw.randint(0, 9)))  # noqa: E731
    pairs = [(text(), [text() for _ in range(draw.randint(1, most))]) for _ in range(200)]
    parts = CorpusBleu(), CorpusBleu()
    sizes = []
    for n, (hypothesis, references) in enumerate(pairs):
        parts[n % 2].add(hypothesis, references)
        sizes.append(len(pickle.dumps(parts[n % 2])))
    score, signature = CorpusBleu.total(parts).result()
    metric = BLEU(force=True)
    hypotheses, references = ([pair[side] for pair in pairs] for side in (0, 1))
    expected = metric.corpus_score(hypotheses, reference_streams(references))
    by_metric = expected.format(signature=metric.get_signature().format())
    assert score.format(signature=signature) == by_metric
    assert ("nrefs:var" in signature) == (most > 1) and max(sizes) - sizes[0] < 50
    assert CorpusBleu().result() == (None, "")


def test_the_best_of_the_others_are_shown_in_their_order(tokenizer: Tokenizer) -> None:
    row = [hypothesis(tokenizer, "a dog runs", score) for score in (-0.1, -0.2, -0.3, -0.4)]
    second = lambda sources, candidates: [row[1] for row in candidates]  # noqa: E731
    (best,) = with_runners_up(second, 2)([[2]], [row])
    assert best is row[1] and best.runners_up == [row[0], row[2]]


def test_a_narrow_terminal_shows_all_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=62, color_system=None)
    monkeypatch.setattr(logs, "_console", lambda: console)
    with logs.progress("training", 600, 20) as bar:
        bar.advance(loss="9.186", **{"tok/s": "3,209"})
    output = r"training 21/600 0:00:0\d < -:--:-- loss 9.186  tok/s 3,209"
    assert re.search(output, shown.getvalue())


def test_the_time_left_counts_from_the_first_item(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Start-up, such as a trial of the largest batch, or a running validation does not count."""
    now = [0.0]
    monkeypatch.setattr(logs, "time", SimpleNamespace(monotonic=lambda: now[0]))
    bar = logs.Bar("training", 105, 0, None)
    for now[0], count in ((60.0, 5), (80.0, 10), (100.0, 0)):
        bar.advance(count)
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == "training 5/105 (5 %), 1:00 < ?"
    assert second == "training 15/105 (14 %), 1:20 < 3:00"
    assert third == "training 15/105 (14 %), 1:40 < 3:00"
