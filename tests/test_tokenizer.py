"""Tokenizers restore every text, number their special symbols, and reject foreign files."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import sentencepiece as spm
from conftest import GERMAN
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastdiss_cli.data.sentencepiece import MODEL_TYPES, SentencePiece, train_tokenizer
from fastdiss_cli.data.tokenizer import Tokenizer
from fastdiss_cli.data.tokenizer_file import load_tokenizer
from fastdiss_cli.errors import FastdissError

LINES = [f"{a} {b}  {c}" for a in GERMAN for b in GERMAN for c in GERMAN[:3]]
FIXED = 260  # 256 bytes and 4 special symbols
SMALL = {"unigram": 285, "bpe": 300, "char": 270, "word": 265}  # not all that the text has

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\u2581"))
sentences = st.lists(st.sampled_from([*GERMAN, "", "Haus", "<s>", "."])).map(" ".join)


@cache
def trained(model_type: str) -> Tokenizer:
    return train_tokenizer(LINES, model_type, SMALL[model_type])


KEEPS_BLANKS = {"remove_extra_whitespaces": False}
UNUSUAL = [
    {"add_dummy_prefix": False},
    {"treat_whitespace_as_suffix": True},
    {"normalization_rule_name": "nmt_nfkc_cf"},
    {"normalization_rule_name": "identity", "byte_fallback": False, **KEEPS_BLANKS},
    {"byte_fallback": True, "vocab_size": 300, "hard_vocab_limit": False},
    {"user_defined_symbols": "eins,\u2581zwei", **KEEPS_BLANKS},
]


@cache
def foreign(**options: int | str) -> Tokenizer:
    """Train with SentencePiece's own defaults, as others would."""
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=model,
        minloglevel=3,
        **{"model_type": "bpe", "vocab_size": 40, **options},
    )
    return SentencePiece(model.getvalue())


def failure(lines: list[str], model_type: str, vocab_size: int) -> str:
    """Return the error message of training: always a single line."""
    with pytest.raises(FastdissError) as caught:
        train_tokenizer(lines, model_type, vocab_size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@settings(max_examples=200, derandomize=True, deadline=None)
@given(text=st.one_of(texts, sentences))
@example("")
@example("  ")
@example(" eins")
@example(" Haus")
@example("eins  Haus ")
@example(" <unk> </s><pad> <0x41>")
@example("\0\t\r\x85\u2028\ufeff\u3000\ufffd\u2585\u2047")
def test_round_trip(model_type: str, text: str) -> None:
    tokenizer = trained(model_type)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids[:-1]) == text  # eos is not text
    assert ids[-1] == tokenizer.eos
    assert all(tokenizer.unk < i < tokenizer.vocab_size for i in ids[:-1])


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@settings(max_examples=50, derandomize=True, deadline=None)
@given(text=st.one_of(texts, sentences))
@example(" a")
@example(" b b")
def test_round_trip_where_almost_nothing_is_known(model_type: str, text: str) -> None:
    tokenizer = trained_on_one_letter(model_type)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@cache
def trained_on_one_letter(model_type: str) -> Tokenizer:
    return train_tokenizer(["a"], model_type, 300)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_special_symbols_are_numbered_as_in_fairseq(model_type: str) -> None:
    tokenizer = trained(model_type)
    assert (tokenizer.bos, tokenizer.pad, tokenizer.eos, tokenizer.unk) == (0, 1, 2, 3)
    assert tokenizer.encode("") == [2]
    padded = [0, *tokenizer.encode("eins zwei"), 1, 1]
    assert tokenizer.decode(padded) == "eins zwei"


def test_special_symbols_in_the_text_stay_text() -> None:
    tokenizer = train_tokenizer([*LINES, "<s> <unk> </s> <pad> <0x41>"] * 3, "bpe", 400)
    ids = tokenizer.encode("<s> </s> <pad> <unk>")
    assert not {0, 1, 2, 3} & set(ids[:-1])
    assert tokenizer.decode(ids) == "<s> </s> <pad> <unk>"


@pytest.mark.parametrize(
    ("options", "bos_pad_eos"),
    [
        ({}, (1, 40, 2)),
        ({"bos_id": -1, "eos_id": -1, "pad_id": -1}, (40, 41, 42)),
        ({"bos_id": -1, "pad_id": 5}, (40, 5, 2)),
    ],
    ids=["defaults", "none", "no-bos"],
)
def test_foreign_model(options: dict[str, int], bos_pad_eos: tuple[int, int, int]) -> None:
    tokenizer = foreign(**options)
    bos, pad, eos = bos_pad_eos
    assert (tokenizer.bos, tokenizer.pad, tokenizer.eos, tokenizer.unk) == (*bos_pad_eos, 0)
    assert tokenizer.vocab_size == max(40, *(i + 1 for i in bos_pad_eos))
    ids = tokenizer.encode("eins zwei")
    assert ids[-1] == eos and max(ids[:-1]) < 40
    assert tokenizer.decode([bos, *ids, pad, pad]) == "eins zwei"
    assert len(tokenizer.pieces([bos, *ids, pad])) == len(ids) + 2


@settings(max_examples=60, derandomize=True, deadline=None)
@given(many=st.lists(st.one_of(texts, sentences, st.sampled_from(["\u2581", "a\u2581b", "ﬁ"]))))
@example(many=["eins  zwei", " eins", "eins ", "  ", "eins", "", "漢", "eins\u2581zwei", "<0x41>"])
def test_many_texts_at_once(many: list[str]) -> None:
    """The ids are those of single texts; texts that do not round-trip are found."""
    own = [trained(model_type) for model_type in MODEL_TYPES]
    others = [foreign(), foreign(bos_id=-1, eos_id=-1, pad_id=-1), foreign(**KEEPS_BLANKS)]
    others += [foreign(**options) for options in UNUSUAL]
    for tokenizer in (*own, *others):
        rows = tokenizer.encode_all(many)
        assert rows == [tokenizer.encode(text) for text in many]
        decoded = [tokenizer.decode(row) for row in rows]
        pairs = enumerate(zip(decoded, many, strict=True))
        different = {i for i, (found, text) in pairs if found != text}
        assert tokenizer.altered(many, rows) == different
        assert tokenizer.lossless == (tokenizer in own)


def test_a_model_that_decodes_to_other_letters(tmp_path: Path) -> None:
    """Its pieces show what was encoded, and its denormalizer determines the output."""
    (tmp_path / "rules.tsv").write_text("65\t45\n")  # e becomes E
    tokenizer = foreign(denormalization_rule_tsv=str(tmp_path / "rules.tsv"))
    texts = ["eins", "acht"]
    assert tokenizer.altered(texts, tokenizer.encode_all(texts)) == {0}


def test_hash_is_that_of_the_bytes(tmp_path: Path) -> None:
    tokenizer = trained("unigram")
    path = tmp_path / "spm.model"
    path.write_bytes(tokenizer.model)
    loaded = load_tokenizer(path)
    assert loaded.hash == tokenizer.hash == hashlib.sha256(path.read_bytes()).hexdigest()
    assert loaded.encode("eins Haus") == tokenizer.encode("eins Haus")
    assert len({trained(model_type).hash for model_type in MODEL_TYPES}) == len(MODEL_TYPES)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_training_is_repeatable(model_type: str) -> None:
    again = train_tokenizer(LINES, model_type, SMALL[model_type])
    assert again.hash == trained(model_type).hash


def test_training_on_a_sample_is_repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdiss_cli.data.sentencepiece._TRAINING_LINES", 300)
    lines = [f"{word} {i}" for i in range(2000) for word in ("eins", "Haus")]
    found = [train_tokenizer(lines, "char", 300, total).hash for total in (4000, 4000, 0)]
    assert found[0] == found[1]
    # characters come from the whole text, not only from its beginning
    late = [*lines, *["ü" * 20] * 1000]
    assert "ü" in train_tokenizer(late, "char", 300, len(late)).pieces([*range(260, 290)])


@pytest.mark.parametrize(
    "data",
    [b"", b"\0", b"# fairseq dictionary\nthe 100\n", b"\xff" * 64, bytes(range(256)), b"\x0a" * 9],
    ids=lambda data: repr(data[:6]),
)
def test_other_bytes_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "spm.model"
    path.write_bytes(data)
    with pytest.raises(FastdissError, match=r"spm\.model: not a SentencePiece model$"):
        load_tokenizer(path)


def test_half_a_model_is_refused_or_works() -> None:
    model = trained("bpe").model
    for end in range(1, len(model), 37):
        try:
            half = SentencePiece(model[:end])
        except FastdissError:
            continue
        assert half.encode("eins")[-1] == half.eos


def test_missing_model(tmp_path: Path) -> None:
    with pytest.raises(FastdissError, match=r"spm\.model: cannot read the tokenizer: No such file"):
        load_tokenizer(tmp_path / "spm.model")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_vocabulary_larger_than_the_text_is_smaller(model_type: str) -> None:
    tokenizer = train_tokenizer(LINES, model_type, 8000)
    assert SMALL[model_type] < tokenizer.vocab_size < 500


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("vocab_size", [-1, 0, 1, FIXED - 1])
def test_a_vocabulary_that_is_too_small(model_type: str, vocab_size: int) -> None:
    message = failure(LINES, model_type, vocab_size)
    assert f"--vocab-size {vocab_size} is too small" in message
    least = FIXED + len(set("".join(LINES)))  # which unigram and bpe find out for themselves
    assert f"the bytes alone need {FIXED} ids" in message or f"use at least {least}" in message
    assert "character_coverage" not in message  # not one of our options


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_the_smallest_vocabulary_is_reported(model_type: str) -> None:
    least = FIXED + len(set("".join(LINES)))
    assert f"use at least {least}" in failure(LINES, model_type, least - 1)
    assert train_tokenizer(LINES, model_type, least).vocab_size == least


@pytest.mark.parametrize("lines", [[], ["", ""]], ids=["no lines", "empty lines"])
def test_no_text(lines: list[str]) -> None:
    assert "every line is empty" in failure(lines, "unigram", 300)


def test_only_lines_that_are_too_long() -> None:
    assert "longer than 65,536 bytes" in failure(["eins " * 20_000], "bpe", 300)


@pytest.mark.parametrize("good", [0, 1, 300])
def test_a_failure_in_the_text_is_reported_unchanged(good: int) -> None:
    def lines() -> Iterator[str]:
        yield from LINES[:good]
        raise FastdissError("x.de: line 7 is not valid UTF-8")

    with pytest.raises(FastdissError) as caught:
        train_tokenizer(lines(), "bpe", 300)
    assert str(caught.value) == "x.de: line 7 is not valid UTF-8"


def test_lines_that_cannot_train_a_tokenizer_are_reported(
    capsys: pytest.CaptureFixture[str],
) -> None:
    train_tokenizer(["eins zwei drei"] * 50 + ["Ω" * 40_000], "bpe", 300)
    assert "1 of 51 lines are longer than 65,536 bytes" in " ".join(capsys.readouterr().err.split())
