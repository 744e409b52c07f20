"""Reading raw text: what a line is, and one clear message for every invalid file."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastdiss_cli.data.text import ParallelText, read_lines
from fastdiss_cli.decoding.systems import read_all_references, read_references
from fastdiss_cli.errors import FastdissError

PAIRS = [("ein Hund", "a dog"), ("", "nothing"), ("zwei\u2028Hunde", "two\rdogs"), ("ö\x85", "𝔬")]
BOM = b"\xef\xbb\xbf"

# Any text that UTF-8 can hold, a line long, not ending as a Windows line end would.
all_texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n")).filter(
    lambda line: not line.endswith("\r")
)
line_texts = all_texts.filter(lambda line: not line.startswith("\ufeff"))


def write(path: Path, data: bytes | str) -> Path:
    """Write a file, gzipped if its name says so."""
    data = data if isinstance(data, bytes) else data.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_format(folder: Path, format: str, gz: str, pairs: list[tuple[str, str]]) -> str:
    """Write pairs as ``format`` and return the prefix to read them by."""
    if format == "text":
        write(folder / f"x.de{gz}", "".join(f"{src}\n" for src, _ in pairs))
        write(folder / f"x.en{gz}", "".join(f"{tgt}\n" for _, tgt in pairs))
    elif format == "tsv":
        write(folder / f"x.tsv{gz}", "".join(f"{src}\t{tgt}\n" for src, tgt in pairs))
    else:
        rows = [json.dumps({"de": src, "en": tgt, "id": 1}) + "\n" for src, tgt in pairs]
        write(folder / f"x.jsonl{gz}", "".join(rows))
    return str(folder / "x")


def pairs_of(prefix: Path | str, format: str = "text") -> list[tuple[str, str]]:
    return list(ParallelText(str(prefix), "de", "en", format).pairs())


def failure(prefix: Path | str, format: str = "text") -> str:
    """Return the error message of reading the pairs: always a single line."""
    with pytest.raises(FastdissError) as caught:
        pairs_of(prefix, format)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("format", ["text", "jsonl", "tsv"])
def test_every_format_gives_the_same_pairs(tmp_path: Path, format: str, gz: str) -> None:
    prefix = write_format(tmp_path, format, gz, PAIRS)
    assert pairs_of(prefix, format) == PAIRS


@pytest.mark.parametrize("format", ["jsonl", "tsv"])
def test_one_file_may_be_named_in_full(tmp_path: Path, format: str) -> None:
    write_format(tmp_path, format, ".gz", PAIRS)
    for name in (f"x.{format}.gz", f"x.{format}"):
        assert pairs_of(tmp_path / name, format) == PAIRS


@settings(max_examples=60, derandomize=True, deadline=None)
@given(lines=st.lists(line_texts, max_size=6), end=st.sampled_from(["\n", "\r\n"]))
def test_lines_end_at_a_line_feed_only(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], end: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "lines.txt"
    assert list(read_lines(write(path, "".join(line + end for line in lines)))) == lines


@pytest.mark.parametrize("split", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r"])
def test_no_other_character_splits_a_line(tmp_path: Path, split: str) -> None:
    path = write(tmp_path / "x", f"a{split}b\n{split}c\n")
    assert list(read_lines(path)) == [f"a{split}b", f"{split}c"]


def test_bom_and_windows_line_ends_are_not_text(tmp_path: Path) -> None:
    path = write(tmp_path / "x", BOM + b"a\r\n\r\n" + BOM + b"b\r\r\nlast")
    assert list(read_lines(path)) == ["a", "", "\ufeffb\r", "last"]
    assert list(read_lines(write(tmp_path / "bom", BOM + b"\n"))) == [""]


@pytest.mark.parametrize("format", ["jsonl", "tsv"])
def test_bom_and_windows_line_ends_in_other_formats(tmp_path: Path, format: str) -> None:
    row = b'{"de": "a", "en": "b"}' if format == "jsonl" else b"a\tb"
    write(tmp_path / f"x.{format}", BOM + row + b"\r\n" + row + b"\r\n")
    assert pairs_of(tmp_path / "x", format) == [("a", "b"), ("a", "b")]


def test_a_line_feed_inside_json_stays_one_sentence(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", json.dumps({"de": "a\nb", "en": "c"}))
    assert pairs_of(tmp_path / "x", "jsonl") == [("a b", "c")]
    write(tmp_path / "x.jsonl", '{"de": "a", "de": "b", "en": "c"}')
    with pytest.raises(FastdissError, match=r"line 1 is .* \(the field 'de' is repeated"):
        pairs_of(tmp_path / "x", "jsonl")


def test_tsv_has_two_columns(tmp_path: Path) -> None:
    write(tmp_path / "x.tsv", "a\tb\n\t\n")
    assert pairs_of(tmp_path / "x", "tsv") == [("a", "b"), ("", "")]
    write(tmp_path / "x.tsv", "a\tb\n17\ta\tb\n")  # which of them is the source?
    assert "line 2 has 3 columns" in failure(tmp_path / "x", "tsv")


@pytest.mark.parametrize("format", ["text", "jsonl", "tsv"])
def test_missing_file(tmp_path: Path, format: str) -> None:
    path = tmp_path / "x"
    if format == "text":
        assert f"{path}.de: no such file (nor {path}.de.gz)" in failure(path, format)
        return
    named = tmp_path / f"x.{format}"
    assert f"{path}: no such file (nor {named}, {named}.gz)" in failure(path, format)
    assert f"{named}: no such file (nor {named}.gz)" in failure(named, format)


def test_missing_target(tmp_path: Path) -> None:
    write(tmp_path / "x.de", "a\n")
    message = failure(tmp_path / "x")
    assert "x.en: no such file" in message
    assert message.endswith("there are x.de (-s and -t name the languages)")


@pytest.mark.parametrize(("longer", "shorter"), [("de", "en"), ("en", "de")])
@pytest.mark.parametrize("few", [0, 3, 1024, 3000])
def test_unequal_counts_are_both_reported(
    tmp_path: Path, longer: str, shorter: str, few: int
) -> None:
    write(tmp_path / f"x.{longer}", "a\n" * 5011)
    write(tmp_path / f"x.{shorter}", "a\n" * few)
    message = failure(tmp_path / "x")
    assert f"x.{longer} has 5,011 lines" in message
    assert f"x.{shorter} has {few:,}" in message


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    lines=st.lists(st.tuples(all_texts, all_texts), min_size=1, max_size=12),
    size=st.integers(1, 13),
    end=st.sampled_from(["\n", "\r\n"]),
    last=st.booleans(),
)
@example(lines=[("a", "b"), ("\ufeffc", "\ufeff")], size=1, end="\n", last=True)
def test_blocks_of_any_size_hold_the_same_lines(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[tuple[str, str]],
    size: int,
    end: str,
    last: bool,
) -> None:
    """With a byte order mark in front, and with or without a line end at the end."""
    prefix = tmp_path_factory.getbasetemp() / "blocks"
    for side, language in enumerate(("de", "en")):
        text = end.join(pair[side] for pair in lines) + end * (last or not lines[-1][side])
        write(Path(f"{prefix}.{language}"), BOM + text.encode())
    found = []
    for block in ParallelText(str(prefix), "de", "en", "text").blocks(size):
        sides = block.sides()
        assert block.first == len(found) + 1
        assert len(sides[0]) == len(sides[1]) == min(size, len(lines) - len(found))
        found += zip(*sides, strict=True)
    assert found == lines


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_a_bad_line_is_located_in_any_block(tmp_path: Path, size: int) -> None:
    rows = {"text": b"schl\xe4cht\n", "jsonl": b'{"de": "a"}\n', "tsv": b"no tab\n"}
    good = {"text": b"gut\n", "jsonl": b'{"de": "a", "en": "b"}\n', "tsv": b"a\tb\n"}
    for format, bad in rows.items():
        names = ("de", "en") if format == "text" else (format,)
        for name in names:
            ending = bad if name != "en" else b"fine\n"
            write(tmp_path / f"x.{name}", BOM + 4 * good[format] + ending + good[format])
        blocks = list(ParallelText(str(tmp_path / "x"), "de", "en", format).blocks(size))
        bad_block = next(block for block in reversed(blocks) if block.first <= 5)
        for block in blocks:
            if block is not bad_block:
                assert len(block.sides()[0]) <= size
        with pytest.raises(FastdissError, match=rf"x\.{names[0]}: line 5 "):
            bad_block.sides()


@pytest.mark.parametrize("gz", ["", ".gz"])
def test_bad_utf8_is_located(tmp_path: Path, gz: str) -> None:
    write(tmp_path / f"x.de{gz}", b"gut\nauch gut\nschl\xe4cht\n")
    write(tmp_path / f"x.en{gz}", "a\nb\nc\n")
    message = failure(tmp_path / "x")
    assert f"x.de{gz}: line 3 is not valid UTF-8 (byte 5 of the line)" in message


def test_bytes_of_a_surrogate_are_bad_utf8(tmp_path: Path) -> None:
    with pytest.raises(FastdissError, match="line 1 is not valid UTF-8"):
        list(read_lines(write(tmp_path / "x", b"\xed\xa0\x80\n")))


@pytest.mark.parametrize("format", ["text", "jsonl", "tsv"])
def test_empty_file(tmp_path: Path, format: str) -> None:
    assert "empty" in failure(write_format(tmp_path, format, "", []), format)


@pytest.mark.parametrize(
    ("row", "reported"),
    [
        ('{"de": "a"}', "lacks the text field 'en' (it has de): name the fields with -s and -t"),
        ('{"en": "a"}', "lacks the text field 'de' (it has en)"),
        ('{"de": "a", "en": 3}', "has 3 for 'en', not a string in quotes"),
        ('{"de": "a", "en": null}', "has null for 'en', not a string in quotes"),
        (f'{{"de": {[1] * 50}}}', "has [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, ... for 'de'"),
        ("{}", "lacks the text fields 'de' and 'en' (it has none)"),
        ('["a", "b"]', "is not a JSON object"),
        ('"de"', "is not a JSON object"),
        ("null", "is not a JSON object"),
        ("", "is empty: remove it"),
        ('{"de": "a", "en": "b"', "is not valid JSON (Expecting ',' delimiter, column 22)"),
        ('{"de": "a", "de": "b"}', "is not valid JSON (the field 'de' is repeated)"),
        ("[" * 100_000, "is not valid JSON"),
    ],
    ids=lambda text: text[:12] or "blank",
)
def test_json_lines_that_hold_no_pair(tmp_path: Path, row: str, reported: str) -> None:
    write(tmp_path / "x.jsonl", f'{{"de": "a", "en": "b"}}\n{row}\n')
    message = failure(tmp_path / "x", "jsonl")
    assert f"x.jsonl: line 2 {reported}" in message


@pytest.mark.parametrize(
    ("text", "encoding"),
    [("grün\n", "utf-16"), ("Hi\nand more\n", "utf-16-le"), ("two words\n", "utf-16-be")],
)
def test_text_with_nul_bytes_may_be_utf_16(tmp_path: Path, text: str, encoding: str) -> None:
    (tmp_path / "x").write_bytes(text.encode(encoding))
    with pytest.raises(FastdissError, match="x is not text, or text in UTF-16"):
        list(read_lines(tmp_path / "x"))


@pytest.mark.parametrize("text", ["\\ud800", "a\\udfffb", "\\udc00\\ud800"])
@pytest.mark.parametrize("side", ["de", "en"])
def test_lone_surrogates_in_json_are_refused(tmp_path: Path, side: str, text: str) -> None:
    other = "en" if side == "de" else "de"
    write(tmp_path / "x.jsonl", f'{{"{side}": "{text}", "{other}": "b"}}\n')
    message = failure(tmp_path / "x", "jsonl")
    assert "x.jsonl: line 1" in message and "surrogate" in message


def test_a_surrogate_pair_in_json_is_one_character(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", '{"de": "\\ud83d\\ude00", "en": "b"}\n')
    assert pairs_of(tmp_path / "x", "jsonl") == [("😀", "b")]


def test_tsv_line_without_a_tab(tmp_path: Path) -> None:
    write(tmp_path / "x.tsv", "a\tb\na b\n")
    assert "x.tsv: line 2 has no tab" in failure(tmp_path / "x", "tsv")


def test_damaged_gzip_gives_one_line_or_the_same_text(tmp_path: Path) -> None:
    lines = [f"Zeile {i * i}" for i in range(40)]
    whole = gzip.compress("".join(f"{line}\n" for line in lines).encode(), mtime=0)
    path = tmp_path / "x.gz"
    refused = 0
    for i in range(len(whole)):
        flipped = whole[:i] + bytes([whole[i] ^ 0x10]) + whole[i + 1 :]
        for data, is_prefix in ((whole[:i], True), (flipped, False)):
            path.write_bytes(data)
            try:
                found = list(read_lines(path))
            except FastdissError as error:
                refused += 1
                assert "x.gz" in str(error) and "\n" not in str(error)
            else:  # nothing at all is an empty file; some header bytes do not matter
                assert found == ([] if is_prefix else lines)
                assert not is_prefix or i == 0
    assert refused > len(whole)


def test_text_that_is_not_gzip(tmp_path: Path) -> None:
    path = tmp_path / "x.gz"
    path.write_bytes(b"plain text\n")
    with pytest.raises(FastdissError, match=r"x\.gz is not gzipped: its name must"):
        list(read_lines(path))


def test_reading_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FastdissError, match="is a folder: give a file"):
        list(read_lines(tmp_path))


@pytest.mark.parametrize("gz", ["", ".gz"])
def test_references(tmp_path: Path, gz: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = "one\tuno\n\nthree\t\tdrei\n"
    several = read_references(write(tmp_path / f"ref.tsv{gz}", text))
    assert several == [["one", "uno"], [""], ["three", "drei"]]
    assert f"ref.tsv{gz}: ignoring empty alternatives in 1 line" in capsys.readouterr().err
    single = read_references(write(tmp_path / f"ref.txt{gz}", text))
    assert single == [["one\tuno"], [""], ["three\t\tdrei"]]
    told = f"ref.txt{gz}: 2 lines with tabs, each taken as one reference: for alternatives, the"
    assert told in capsys.readouterr().err
    loud = (tmp_path / f"ref.tsv{gz}").rename(tmp_path / f"LOUD.TSV{gz.upper()}")
    assert read_references(loud) == several


def test_an_empty_line_among_several_references_counts_and_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in sacreBLEU; a lone empty reference, or a missing alternative, is nothing to tell."""
    paths = [write(tmp_path / "a", "one\n\n"), write(tmp_path / "b.tsv", "uno\tun\n\n")]
    assert read_all_references(paths[:1], 2) == [["one"], [""]]
    assert "empty" not in capsys.readouterr().err
    assert read_all_references([paths[1], write(tmp_path / "c", "\n\n")], 2)[0] == ["uno", "un", ""]
    assert "--ref: 2 sentences with an empty reference beside others" in capsys.readouterr().err
