"""The binarized dataset: fairseq's bytes, and all damage is noticed."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fastdiss_cli.data.binarized import BinarizedDataset, Manifest
from fastdiss_cli.data.dataset import SideInfo, TokenFile, TokenWriter, token_dtype
from fastdiss_cli.data.files import replace_folder
from fastdiss_cli.data.sentencepiece import train_tokenizer
from fastdiss_cli.errors import FastdissError

U2, I4 = np.dtype("<u2"), np.dtype("<i4")
TOKENIZER = train_tokenizer(["eins zwei drei vier"], "char", 400)
SPLITS = {"train": 7, "valid": 2}
Tokens = dict[tuple[str, str], list[list[int]]]

sentence_lists = st.lists(arrays(np.int32, st.integers(0, 9), elements=st.integers(0, 60_000)))


def write_split(stem: Path, sentences: list[np.ndarray], dtype: np.dtype = U2) -> SideInfo:
    """Write sentences in two parts, as `preprocess` does with the chunks of its workers."""
    middle = len(sentences) // 2
    with TokenWriter(stem, dtype) as writer:
        for part in (sentences[:middle], sentences[middle:]):
            sizes = np.array([len(sentence) for sentence in part], np.int32)
            writer.add(sizes, np.concatenate([*part, np.zeros(0, np.int32)]), unknown=len(part))
        return writer.finish()


def make_dataset(folder: Path, seed: int = 1) -> Path:
    """Write a dataset of a few random sentences."""
    folder.mkdir()
    draw = np.random.default_rng(seed)
    manifest = Manifest(
        source="de",
        target="en",
        joined=True,
        dtype="uint16",
        tokenizers={"src": TOKENIZER.hash, "tgt": TOKENIZER.hash},
        vocab_sizes={"src": TOKENIZER.vocab_size, "tgt": TOKENIZER.vocab_size},
        sentences=SPLITS,
        splits={split: {} for split in SPLITS},
    )
    for side in ("src", "tgt"):
        (folder / f"tokenizer.{side}").write_bytes(TOKENIZER.model)
        for split, count in SPLITS.items():
            lengths = draw.integers(1, 6, count)
            sentences = [draw.integers(4, TOKENIZER.vocab_size, length) for length in lengths]
            manifest.splits[split][side] = write_split(folder / f"{split}.{side}", sentences)
    manifest.write(folder)
    return folder


def tokens_of(dataset: BinarizedDataset) -> Tokens:
    return {
        (split, side): [file[i].tolist() for i in range(len(file))]
        for split, sides in dataset.splits.items()
        for side, file in sides.items()
    }


def open_or_refuse(folder: Path, verify: bool = True) -> Tokens | None:
    """Return all tokens, or nothing if the dataset is refused in a single line."""
    try:
        return tokens_of(BinarizedDataset(folder, verify=verify))
    except FastdissError as error:
        assert "\n" not in str(error)
        return None


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("original") / "data-bin")


@pytest.fixture
def dataset(tmp_path: Path, original: Path) -> Path:
    """Return a dataset that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "data-bin"))


@pytest.mark.parametrize("dtype", [U2, I4], ids=["uint16", "int32"])
@settings(
    max_examples=30,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(sentences=sentence_lists)
def test_what_is_written_is_read(
    tmp_path: Path, dtype: np.dtype, sentences: list[np.ndarray]
) -> None:
    info = write_split(tmp_path / "x.src", sentences, dtype)
    file = TokenFile(tmp_path / "x.src")
    assert len(file) == len(sentences)
    assert file.tokens.dtype == dtype
    for i, sentence in enumerate(sentences):
        np.testing.assert_array_equal(file[i], sentence)
    some = np.arange(len(sentences))[::-2].repeat(2)  # in another order, some not, some twice
    chosen = [sentences[i] for i in some]
    np.testing.assert_array_equal(file.gather(some), np.concatenate([np.zeros(0), *chosen]))
    lengths = [len(sentence) for sentence in sentences]
    assert file.sizes.tolist() == lengths
    assert (info.tokens, info.longest) == (sum(lengths), max(lengths, default=0))
    assert info.unknown == len(sentences)
    file.verify(info, vocab_size=60_001)


@pytest.mark.parametrize(("dtype", "code"), [(U2, 8), (I4, 4)], ids=["uint16", "int32"])
def test_the_bytes_are_those_of_fairseq(tmp_path: Path, dtype: np.dtype, code: int) -> None:
    sentences = [np.array([5, 6, 2]), np.array([2]), np.array([7, 2])]
    info = write_split(tmp_path / "x.src", sentences, dtype)
    index = (tmp_path / "x.src.idx").read_bytes()
    # as in fairseq.data.indexed_dataset.MMapIndexedDataset.Index
    assert index[:9] == b"MMIDIDX\x00\x00"
    assert struct.unpack("<Q", index[9:17]) == (1,)
    assert struct.unpack("<B", index[17:18]) == (code,)
    assert struct.unpack("<Q", index[18:26]) == (3,)
    assert struct.unpack("<3i", index[26:38]) == (3, 1, 2)
    width = dtype.itemsize
    assert struct.unpack("<3q", index[38:]) == (0, 3 * width, 4 * width)
    data = (tmp_path / "x.src.bin").read_bytes()
    assert struct.unpack(f"<6{'H' if code == 8 else 'i'}", data) == (5, 6, 2, 2, 7, 2)
    hashes = {"bin": hashlib.sha256(data), "idx": hashlib.sha256(index)}
    assert info.sha256 == {ending: digest.hexdigest() for ending, digest in hashes.items()}


@pytest.mark.parametrize(("vocab_size", "dtype"), [(4, U2), (65_499, U2), (65_500, I4)])
def test_the_smallest_type_is_chosen(vocab_size: int, dtype: np.dtype) -> None:
    assert token_dtype(vocab_size) == dtype


def test_large_ids_survive_in_the_chosen_type(tmp_path: Path) -> None:
    for largest in (65_498, 65_499, 2**31 - 1):
        write_split(tmp_path / "x.src", [np.array([largest])], token_dtype(largest + 1))
        assert TokenFile(tmp_path / "x.src")[0].tolist() == [largest]


def test_a_dataset_opens_with_its_tokens(dataset: Path) -> None:
    opened = BinarizedDataset(dataset, verify=True)
    assert {split: len(opened[split]["src"]) for split in opened.splits} == SPLITS
    assert opened.src_tokenizer.hash == TOKENIZER.hash
    assert Manifest.read(dataset) == opened.manifest
    with pytest.raises(FastdissError, match=r"no split 'test'; it has train, valid"):
        opened["test"]


def test_the_hash_is_that_of_tokens_and_tokenizers(tmp_path: Path, dataset: Path) -> None:
    original = BinarizedDataset(dataset).hash
    assert BinarizedDataset(make_dataset(tmp_path / "same")).hash == original
    assert BinarizedDataset(make_dataset(tmp_path / "other", seed=2)).hash != original
    for change, changes_hash in (
        (lambda manifest: manifest.made_with.update(vocab_size=9), False),
        (lambda manifest: manifest.tokenizers.update(tgt="0" * 64), True),
        (lambda manifest: manifest.splits["valid"]["tgt"].sha256.update(bin="0" * 64), True),
        (lambda manifest: manifest.splits.update(test=manifest.splits["valid"]), False),
    ):
        changed = BinarizedDataset(dataset)
        change(changed.manifest)
        assert (changed.hash != original) == changes_hash


def test_verify_finds_ids_outside_the_vocabulary(tmp_path: Path) -> None:
    info = write_split(tmp_path / "x.src", [np.array([5, 9])])
    TokenFile(tmp_path / "x.src").verify(info, vocab_size=10)
    with pytest.raises(FastdissError, match="id 9 is outside the vocabulary of 9"):
        TokenFile(tmp_path / "x.src").verify(info, vocab_size=9)


@pytest.mark.parametrize(
    ("change", "when_opened"),
    [
        (lambda facts: facts.update(dtype="int64"), True),
        (lambda facts: facts["sentences"].update(train=1), True),
        (lambda facts: facts["splits"]["valid"]["src"].update(tokens=9), False),
        (lambda facts: facts["splits"]["valid"]["tgt"].update(longest=99), False),
    ],
)
def test_counts_of_the_manifest_that_are_wrong(
    dataset: Path, change: Callable[[dict[str, Any]], object], when_opened: bool
) -> None:
    edit_manifest(dataset, change)
    with pytest.raises(FastdissError, match="but the manifest says"):
        BinarizedDataset(dataset, verify=not when_opened)


def test_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(FastdissError, match="no such folder"):
        BinarizedDataset(tmp_path / "nowhere")
    with pytest.raises(FastdissError, match="make it with `fastdiss preprocess`"):
        BinarizedDataset(tmp_path)


def test_another_version_is_refused(dataset: Path) -> None:
    edit_manifest(dataset, lambda facts: facts.update(version=2, new_field={}))
    with pytest.raises(FastdissError, match="dataset format 2; this fastdiss reads format 1"):
        BinarizedDataset(dataset)


def test_another_tokenizer_is_refused_with_both_hashes(dataset: Path) -> None:
    other = train_tokenizer(["fünf"], "char", 400)
    (dataset / "tokenizer.tgt").write_bytes(other.model)
    with pytest.raises(FastdissError) as caught:
        BinarizedDataset(dataset)
    assert other.hash[:16] in str(caught.value)
    assert TOKENIZER.hash[:16] in str(caught.value)


def damages(data: bytes, positions: int) -> list[bytes]:
    """Return a file with a bit or a byte flipped, truncated or extended, at many places each."""
    damaged = [data + b"\0", data + b" \n", data + data, b""]
    for i in {*range(0, len(data), max(1, len(data) // positions)), len(data) - 1}:
        for flip in (0x01, 0x80, 0xFF):
            damaged.append(data[:i] + bytes([data[i] ^ flip]) + data[i + 1 :])
        damaged += [data[:i], data[:i] + data[i + 1 :], data[:i] + b"0" + data[i:]]
    return damaged


FILES = ["manifest.json", "tokenizer.src", "tokenizer.tgt"]
STEMS = [f"{split}.{side}" for split in SPLITS for side in ("src", "tgt")]
FILES += [f"{stem}.{ending}" for stem in STEMS for ending in ("bin", "idx")]


@pytest.mark.parametrize("name", FILES)
def test_damage_is_refused_or_harmless(dataset: Path, name: str) -> None:
    path = dataset / name
    expected = tokens_of(BinarizedDataset(dataset))
    for data in damages(path.read_bytes(), positions=40 if name == "manifest.json" else 8):
        path.write_bytes(data)
        found = open_or_refuse(dataset)
        assert found is None or found == expected
        if name != "manifest.json":
            assert found is None  # the manifest's hash covers every byte
        open_or_refuse(dataset, verify=False)  # must not crash either


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(dataset: Path, name: str) -> None:
    path = dataset / name
    path.unlink()
    with pytest.raises(FastdissError, match=r"is not a fastdiss dataset|No such file"):
        BinarizedDataset(dataset)


@pytest.mark.parametrize("ending", ["idx", "bin"])
def test_sizes_and_offsets_are_checked_without_verify(dataset: Path, ending: str) -> None:
    path = dataset / f"train.src.{ending}"
    whole = path.read_bytes()
    for start in range(26, 26 + 12 * SPLITS["train"], 4) if ending == "idx" else [len(whole)]:
        for number in (-1, 1, 99):
            field = struct.unpack_from("<i", whole + b"\0\0\0\0", start)[0] + number
            path.write_bytes(whole[:start] + struct.pack("<i", field) + whole[start + 4 :])
            assert open_or_refuse(dataset, verify=False) is None


@pytest.mark.parametrize("cut", [-2, 2, 4000])
def test_a_file_of_another_length_is_reported_on_opening(dataset: Path, cut: int) -> None:
    path = dataset / "train.tgt.bin"
    data = path.read_bytes()
    path.write_bytes(data[:cut] if cut < 0 else data + b"\5\0" * (cut // 2))
    with pytest.raises(FastdissError, match=r"train\.tgt\.bin: \d+ bytes, but the index ends at"):
        BinarizedDataset(dataset)


def by_hand(stem: Path, sizes: list[int], offsets: list[int]) -> TokenFile:
    """Open the tokens 0 to 5 with a handmade index of three sentences."""
    head = struct.pack("<9sQBQ", b"MMIDIDX\0\0", 1, 8, 3)
    Path(f"{stem}.idx").write_bytes(head + struct.pack("<3i3q", *sizes, *offsets))
    Path(f"{stem}.bin").write_bytes(struct.pack("<6H", *range(6)))
    return TokenFile(stem)


def test_sizes_and_offsets_that_are_wrong_in_agreement(tmp_path: Path) -> None:
    file = by_hand(tmp_path / "right", [2, 1, 3], [0, 4, 6])
    assert [row.tolist() for row in file] == [[0, 1], [2], [3, 4, 5]]
    assert (file[-1].tolist(), file.sizes.tolist()) == ([3, 4, 5], [2, 1, 3])
    with pytest.raises(FastdissError, match="do not match"):
        by_hand(tmp_path / "begins-late", [1, 1, 3], [2, 4, 6])
    file = by_hand(tmp_path / "below-nothing", [5, -2, 3], [0, 10, 6])
    for read in (lambda: file[1], lambda: file.sizes, lambda: file.gather(np.array([0]))):
        with pytest.raises(FastdissError, match="do not match"):
            read()


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    change(facts)
    path.write_text(json.dumps(facts), encoding="utf-8")


def paths_into(facts: Any) -> list[tuple[str, ...]]:
    """Return the path of keys to every value inside nested dictionaries."""
    if not isinstance(facts, dict):
        return []
    return [(key, *rest) for key, value in facts.items() for rest in [(), *paths_into(value)]]


def test_manifest_fields_that_are_missing_or_wrong(dataset: Path) -> None:
    expected = tokens_of(BinarizedDataset(dataset))
    original = json.loads((dataset / "manifest.json").read_text(encoding="utf-8"))
    for *parents, key in paths_into(original):
        for value in ("missing", None, "x", -1, 2.5, [], {"train": 1}):

            def change(
                facts: dict, parents: list[str] = parents, key: str = key, value: Any = value
            ) -> None:
                for parent in parents:
                    facts = facts[parent]
                facts[key] = value
                if value == "missing":
                    del facts[key]

            edit_manifest(dataset, change)
            for verify in (True, False):
                assert open_or_refuse(dataset, verify) in (None, expected)
            (dataset / "manifest.json").write_text(json.dumps(original), encoding="utf-8")


@pytest.mark.parametrize("text", ["null", "[]", "3", '"x"', "{}", '{"version": 1}', "\ufeff{}"])
def test_a_manifest_that_is_none(dataset: Path, text: str) -> None:
    (dataset / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(FastdissError, match=r"manifest\.json is damaged"):
        BinarizedDataset(dataset)


def test_replacing_a_dataset_leaves_nothing_of_the_old_one(tmp_path: Path, dataset: Path) -> None:
    (dataset / "test.src.bin").write_bytes(b"old")
    new = make_dataset(tmp_path / "new", seed=2)
    expected = tokens_of(BinarizedDataset(new))
    replace_folder(new, dataset)
    assert tokens_of(BinarizedDataset(dataset, verify=True)) == expected
    assert not (dataset / "test.src.bin").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["data-bin"]


def test_the_old_dataset_comes_back_when_it_cannot_be_replaced(
    tmp_path: Path, dataset: Path
) -> None:
    expected = tokens_of(BinarizedDataset(dataset))
    with pytest.raises(OSError):
        replace_folder(tmp_path / "nowhere", dataset)
    assert tokens_of(BinarizedDataset(dataset, verify=True)) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["data-bin"]


def test_an_unfinished_dataset_is_refused(dataset: Path, tmp_path: Path) -> None:
    """Without its manifest, which is written last, a folder is not a dataset."""
    shutil.copytree(dataset, tmp_path / "cut", ignore=shutil.ignore_patterns("manifest.json"))
    with pytest.raises(FastdissError, match="is not a fastdiss dataset"):
        BinarizedDataset(tmp_path / "cut")
