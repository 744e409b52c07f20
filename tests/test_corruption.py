"""Damaged datasets and checkpoints: refused in one line or read correctly, nothing else.

Every case writes a damaged file and reads it as the commands do. Memory is limited meanwhile, so
that a size which is trusted before it is checked raises a MemoryError, which fails the test.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import json
import os
import pickle
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_cli
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_binarized import Tokens, make_dataset, tokens_of

import fastdiss_cli
from fastdiss_cli.checkpoints.checkpoint import Checkpoint, Progress, digest
from fastdiss_cli.checkpoints.loading import load_model, vocabulary
from fastdiss_cli.data.binarized import BinarizedDataset
from fastdiss_cli.data.dataset import SideInfo, TokenFile
from fastdiss_cli.errors import FastdissError
from fastdiss_cli.models.registry import architecture
from fastdiss_cli.training.optimizer import pack_optimizer

CPU = torch.device("cpu")
HUGE = [2**31 - 1, 2**31, 2**40, 2**53, 2**60, 2**63 - 1, 2**63, 2**64 - 1]
NETWORK = {"model_dim": 8, "ffn_dim": 8, "heads": 2, "encoder_layers": 1, "decoder_layers": 1}
KINDS = ["flip", "number", "set", "cut", "drop", "grow", "swap", "repeat"]  # of damage
NAMES = ["", "\0", "../../x", "a\nb", "\ud800", "src"]  # that keys get instead
INDEX = {"magic": (0, 9), "version": (9, 17), "dtype": (17, 18), "count": (18, 26)}


def cases(count: int) -> Callable:
    """Draw ``count`` cases, the same ones on every run."""
    unsuited = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(
        max_examples=count, derandomize=True, deadline=None, suppress_health_check=unsuited
    )


@pytest.fixture(autouse=True, scope="module")
def little_memory() -> Iterator[None]:
    """Limit memory to two gigabytes more than are in use."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**31, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@st.composite
def damages(draw: st.DrawFn, data: bytes, regions: dict[str, tuple[int, int]]) -> bytes:
    """Damage a file: flip, overwrite, cut, grow, swap or repeat, somewhere in one of its regions.

    Args:
        data: the whole file.
        regions: parts that get equal shares of the damage, by name: start and end.
    """
    start, end = regions[draw(st.sampled_from(sorted(regions)))]
    place = draw(st.integers(start, end - 1))
    some = st.binary(min_size=1, max_size=12)
    kind = draw(st.sampled_from(KINDS))
    if kind == "flip":
        flipped = data[place] ^ (1 << draw(st.integers(0, 7)))
        return data[:place] + bytes([flipped]) + data[place + 1 :]
    if kind == "number":
        form = draw(st.sampled_from(["<Q", "<I", "<H"]))
        number = draw(st.sampled_from([0, 1, *HUGE])) % 2 ** (8 * struct.calcsize(form))
        return data[:place] + struct.pack(form, number) + data[place + struct.calcsize(form) :]
    if kind == "set":
        new = draw(some)
        return data[:place] + new + data[place + len(new) :]
    if kind == "cut":
        return data[:place]
    if kind == "drop":
        return data[:place] + data[place + draw(st.integers(1, 16)) :]
    if kind == "grow":
        at = draw(st.sampled_from([place, len(data)]))
        return data[:at] + draw(some) + data[at:]
    other = draw(st.integers(0, len(data) - 1))
    if kind == "swap":
        swapped = bytearray(data)
        swapped[place], swapped[other] = data[other], data[place]
        return bytes(swapped)
    return data[:place] + data[min(place, other) : max(place, other)] + data[place:]


json_values = st.one_of(
    st.sampled_from([None, True, "", "x", "\0", "\ud800", "../x", "\n", [], {}, -1, 2.5, 1e400]),
    st.sampled_from([*HUGE, 10**40, [[[[]]]], {"x": {"y": 1}}, "a" * 10_000, float("nan")]),
)


def places(facts: Any) -> list[tuple[str | int, ...]]:
    """Return the path to every value inside nested dictionaries and lists."""
    items: list[tuple[Any, Any]] = []
    if isinstance(facts, dict):
        items = list(facts.items())
    elif isinstance(facts, list):
        items = list(enumerate(facts))
    return [(key, *rest) for key, value in items for rest in [(), *places(value)]]


@st.composite
def changes(draw: st.DrawFn, facts: dict[str, Any], values: st.SearchStrategy) -> dict[str, Any]:
    """Change, remove, rename or add values in nested JSON, in one to three places."""
    changed = copy.deepcopy(facts)
    for _ in range(draw(st.integers(1, 3))):
        *parents, key = draw(st.sampled_from(places(changed) or [("new",)]))
        inside: Any = changed
        for parent in parents:
            inside = inside[parent]
        kind = draw(st.sampled_from(["change", "remove", "rename", "add", "copy"]))
        if kind == "change":
            inside[key] = copy.deepcopy(draw(values))
        elif kind == "copy":  # from another place
            inside[key] = copy.deepcopy(draw(st.sampled_from(list_of(changed))))
        elif isinstance(inside, list):
            del inside[key:]
        elif kind == "add":
            inside[draw(st.text(max_size=3))] = copy.deepcopy(draw(values))
        else:
            value = inside.pop(key, None)
            if kind == "rename":
                inside[draw(st.sampled_from(NAMES))] = value
    return changed


def list_of(facts: dict[str, Any]) -> list[Any]:
    """Return all values inside nested JSON."""
    found = [facts]
    for *parents, key in places(facts):
        inside: Any = facts
        for parent in parents:
            inside = inside[parent]
        found.append(inside[key])
    return found


def check_message(error: FastdissError) -> None:
    """Check that an error is one useful line."""
    assert "\n" not in str(error) and len(str(error)) > 20


# datasets


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("dataset") / "data-bin")


def check_dataset(folder: Path, name: str, content: bytes, expected: Tokens) -> bool:
    """Read a dataset with one file replaced; return whether it was refused.

    If it is not refused, it must be right where hashes are compared. Without hashes, tokens may
    differ, but no other exception may be raised.
    """
    path = folder / name
    whole = path.read_bytes()
    path.write_bytes(content)
    refused = False
    try:
        for verify in (False, True):
            try:
                found = tokens_of(BinarizedDataset(folder, verify=verify))
            except FastdissError as error:
                check_message(error)
                refused = True
            else:
                # a manifest may lack a split altogether; whoever needs that split gets an error
                assert all(expected[key] == found[key] for key in found) or not verify
                refused = False
    finally:
        path.write_bytes(whole)
    return refused


def regions_of(name: str, data: bytes) -> dict[str, tuple[int, int]]:
    """Return the parts of a dataset's file."""
    if not name.endswith(".idx"):
        return {"all": (0, len(data))}
    middle = 26 + (len(data) - 26) // 3
    return {**INDEX, "sizes": (26, middle), "offsets": (middle, len(data))}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("manifest.json", 500),
        ("tokenizer.src", 150),
        ("train.src.idx", 900),
        ("train.tgt.bin", 300),
        ("valid.tgt.idx", 300),
    ],
)
def test_a_damaged_dataset_is_refused_or_right(dataset: Path, name: str, count: int) -> None:
    whole = (dataset / name).read_bytes()
    expected = tokens_of(BinarizedDataset(dataset))
    refused = []

    @cases(count)
    @given(damaged=damages(whole, regions_of(name, whole)))
    def damage(damaged: bytes) -> None:
        assume(damaged != whole)
        refused.append(check_dataset(dataset, name, damaged, expected))

    damage()
    assert len(refused) > count // 2
    assert all(refused) or name == "manifest.json"  # it may have other flags, or more blanks


def test_a_damaged_index_alone_is_refused_or_right(dataset: Path, tmp_path: Path) -> None:
    """Without hashes, and if only a part of it is used: each sentence by itself."""
    whole = (dataset / "train.src.idx").read_bytes()
    stem = tmp_path / "x"
    shutil.copy(dataset / "train.src.bin", f"{stem}.bin")
    original = TokenFile(dataset / "train.src")
    expected = [row.tolist() for row in original]
    opened = []

    @cases(1000)
    @given(damaged=damages(whole, regions_of("x.idx", whole)))
    def damage(damaged: bytes) -> None:
        stem.with_suffix(".idx").write_bytes(damaged)
        try:
            file = TokenFile(stem)
        except FastdissError as error:
            check_message(error)
            return
        assert len(file) == len(expected)
        refused = 0
        for i in range(len(file)):
            try:
                assert file[i].tolist() == expected[i]
            except FastdissError as error:
                check_message(error)
                refused += 1
        try:
            assert file.sizes.tolist() == original.sizes.tolist() and not refused
        except FastdissError as error:
            check_message(error)
            assert refused
        opened.append(refused)

    damage()
    assert len(opened) > 200 and max(opened) > 1


def test_a_manifest_of_other_values_is_refused_or_right(dataset: Path) -> None:
    facts = json.loads((dataset / "manifest.json").read_text("utf-8"))
    expected = tokens_of(BinarizedDataset(dataset))

    @cases(700)
    @given(changed=changes(facts, json_values))
    def change(changed: dict[str, Any]) -> None:
        check_dataset(dataset, "manifest.json", json.dumps(changed).encode(), expected)

    change()


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"version": 1, "x": ' + b"[" * 100_000,
        b'{"version": ' + b"9" * 5000 + b"}",
        b'{"version": 1e999}',
        b'{"version": "1\\n2"}',
        b'{"version": [1]}',
        b"\xff\xfe",
        b"",
    ],
    ids=lambda content: str(content[:15]),
)
def test_a_manifest_that_is_no_manifest(dataset: Path, content: bytes) -> None:
    assert check_dataset(dataset, "manifest.json", content, {})


@pytest.mark.parametrize("name", ["", "\0", "../x", "a/b", "\ud800", "a\nb", "x" * 300])
def test_a_split_of_another_name(dataset: Path, name: str) -> None:
    facts = json.loads((dataset / "manifest.json").read_text("utf-8"))
    for part in ("sentences", "splits"):
        facts[part][name] = facts[part].pop("valid")
    assert check_dataset(dataset, "manifest.json", json.dumps(facts).encode(), {})


@pytest.mark.parametrize("count", [8, *HUGE])
def test_an_index_that_claims_petabytes(dataset: Path, count: int) -> None:
    whole = (dataset / "train.src.idx").read_bytes()
    claimed = struct.pack("<Q", count % 2**64)
    assert check_dataset(dataset, "train.src.idx", whole[:18] + claimed + whole[26:], {})
    longer = whole[:26] + struct.pack("<i", 2**31 - 1) * ((len(whole) - 26) // 4)
    assert check_dataset(dataset, "train.src.idx", longer, {})


def test_ids_outside_the_vocabulary_are_found_below_zero_too(tmp_path: Path) -> None:
    content = struct.pack("<9sQBQiq", b"MMIDIDX\0\0", 1, 4, 1, 2, 0)
    (tmp_path / "x.idx").write_bytes(content)
    (tmp_path / "x.bin").write_bytes(struct.pack("<2i", 5, -7))
    hashes = {
        ending: hashlib.sha256((tmp_path / f"x.{ending}").read_bytes()).hexdigest()
        for ending in ("bin", "idx")
    }
    with pytest.raises(FastdissError, match="id -7 is outside the vocabulary of 10"):
        TokenFile(tmp_path / "x").verify(SideInfo(2, 2, 0, hashes), vocab_size=10)


def test_another_size_of_the_vocabulary_is_refused(dataset: Path) -> None:
    facts = json.loads((dataset / "manifest.json").read_text("utf-8"))
    facts["vocab_sizes"]["tgt"] += 1
    content = json.dumps(facts).encode()
    assert check_dataset(dataset, "manifest.json", content, {})


# checkpoints


@pytest.fixture(scope="module")
def original(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Return a checkpoint of a very small model with all groups of tensors."""
    opened = BinarizedDataset(dataset)
    arch = architecture("fastdiss_tiny")
    config = {**NETWORK, "latent_dim": 4, "max_length_offset": 4}
    tokenizers = (opened.src_tokenizer, opened.tgt_tokenizer)
    model = arch.family(arch.config(config), *map(vocabulary, tokenizers))
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    tensors = {f"{kind}.{n}": p.clone() for kind in ("model", "ema") for n, p in weights.items()}
    tensors |= {f"optimizer.{n}": t for n, t in pack_optimizer(model, optimizer).items()}
    for side, tokenizer in zip(("src", "tgt"), tokenizers, strict=True):
        tensors[f"tokenizer.{side}"] = torch.tensor(list(tokenizer.model), dtype=torch.uint8)
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint_last.safetensors"
    made = Checkpoint(arch.name, config, {"seed": 1}, Progress(7), "0" * 64, 1, tensors)
    made.save(path)
    return Checkpoint.load(path)


@pytest.fixture(scope="module")
def saved(original: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "x.safetensors"
    original.save(path)
    return path.read_bytes()


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header and the tensors of a safetensors file."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:end]), data[end:]


def joined(header: dict[str, Any], tensors: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + tensors


def check_checkpoint(path: Path, content: bytes, original: Checkpoint) -> bool:
    """Load a damaged checkpoint; return whether it was refused. Otherwise it must be right."""
    path.write_bytes(content)
    try:
        found = Checkpoint.load(path)
    except FastdissError as error:
        check_message(error)
        assert str(path) in str(error)
        with pytest.raises(FastdissError):
            load_model(path, CPU)
        return True
    assert {**vars(found), "tensors": None} == {**vars(original), "tensors": None}
    assert found.tensors.keys() == original.tensors.keys()
    for name, tensor in original.tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)
    load_model(path, CPU)
    return False


def test_a_damaged_checkpoint_is_refused_or_right(
    saved: bytes, original: Checkpoint, tmp_path: Path
) -> None:
    header, tensors = parts(saved)
    begin = len(saved) - len(tensors)
    # JSON within JSON
    facts, digest = (saved.index(name) for name in (b'\\"facts\\"', b'\\"sha256\\"'))
    regions = {
        "length": (0, 8),
        "header": (8, begin),
        "version": (saved.index(b'"fastdiss"'), saved.index(b'"fastdiss"') + 16),
        "facts": (facts, facts + 600),
        "sha256": (digest, digest + 80),
    }
    for group in ("model", "ema", "optimizer", "tokenizer"):
        ends = [v["data_offsets"] for n, v in header.items() if n.startswith(f"{group}.")]
        regions[group] = (begin + min(ends)[0], begin + max(ends)[1])
    refused = []

    @cases(1200)
    @given(damaged=damages(saved, regions))
    def damage(damaged: bytes) -> None:
        assume(damaged != saved)
        refused.append(check_checkpoint(tmp_path / "x.safetensors", damaged, original))

    damage()
    assert len(refused) > 1000
    assert sum(refused) > 0.98 * len(refused)  # a blank in the header may change nothing


def test_a_header_of_other_values_is_refused_or_right(
    saved: bytes, original: Checkpoint, tmp_path: Path
) -> None:
    header, tensors = parts(saved)
    types = ["F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F4", "C64", "F8_E8M0", "x"]

    @cases(400)
    @given(changed=changes(header, st.one_of(json_values, st.sampled_from(types))))
    def change(changed: dict[str, Any]) -> None:
        content = joined(changed, tensors)
        check_checkpoint(tmp_path / "x.safetensors", content, original)

    change()


def test_every_number_type_is_read_or_refused(
    saved: bytes, original: Checkpoint, tmp_path: Path
) -> None:
    """The same bytes under another type are other numbers."""
    width = {"I32": 4, "U32": 4, "F16": 2, "BF16": 2, "U16": 2, "C64": 8, "F4": 0.5}
    width |= {"F6_E2M3": 0.75, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "BOOL": 1, "I8": 1}
    for dtype in width:
        header, tensors = parts(saved)
        name = "model.latent_in.weight"
        begin, end = header[name]["data_offsets"]
        header[name] |= {"dtype": dtype, "shape": [int((end - begin) / width[dtype])]}
        assert check_checkpoint(tmp_path / "x", joined(header, tensors), original), dtype


@pytest.mark.parametrize("length", [0, 1, 99, *HUGE])
def test_a_header_length_that_is_not_there(
    saved: bytes, original: Checkpoint, tmp_path: Path, length: int
) -> None:
    content = struct.pack("<Q", length % 2**64) + saved[8:]
    assert check_checkpoint(tmp_path / "x.safetensors", content, original)


def test_a_shape_that_claims_petabytes(saved: bytes, original: Checkpoint, tmp_path: Path) -> None:
    for size in HUGE:
        header, tensors = parts(saved)
        header["model.latent_in.weight"] |= {"shape": [size], "data_offsets": [0, 4 * size]}
        assert check_checkpoint(tmp_path / "x", joined(header, tensors), original)


@pytest.mark.parametrize("version", ["1", "4", "10", "", "2\n3", "0"])
@pytest.mark.parametrize("alone", [True, False])  # as until format 2, and since
def test_another_version_of_a_checkpoint_says_so(
    saved: bytes, tmp_path: Path, version: str, alone: bool
) -> None:
    header, tensors = parts(saved)
    header["__metadata__"]["fastdiss"] = version if alone else json.dumps({"format": version})
    (tmp_path / "x").write_bytes(joined(header, tensors))
    with pytest.raises(FastdissError) as caught:
        Checkpoint.load(tmp_path / "x")
    check_message(caught.value)
    assert f"checkpoint format {version!r}; this fastdiss reads '3'" in str(caught.value)


@pytest.mark.parametrize("text", ["eins\n", "a line that is longer than a header's length\n"])
def test_a_file_that_is_no_checkpoint_says_so(tmp_path: Path, text: str) -> None:
    (tmp_path / "x").write_text(text)
    with pytest.raises(FastdissError, match=r"x is not a checkpoint: give a .safetensors file"):
        Checkpoint.load(tmp_path / "x")


def test_an_ensemble_is_refused() -> None:
    with pytest.raises(
        FastdissError, match=r"a.safetensors:b.safetensors: .* there are no ensembles"
    ):
        Checkpoint.load(Path("a.safetensors:b.safetensors"))


def test_a_flipped_bit_in_the_facts_is_damage(saved: bytes, tmp_path: Path) -> None:
    """The message does not quote them."""
    path = tmp_path / "x.safetensors"
    header, tensors = parts(saved)
    header["__metadata__"]["fastdiss"] = "x" + header["__metadata__"]["fastdiss"]
    path.write_bytes(joined(header, tensors))
    with pytest.raises(FastdissError, match=r"x.safetensors is damaged \(its facts are not JSON\)"):
        Checkpoint.load(path)


def test_an_empty_checkpoint_is_damaged(tmp_path: Path) -> None:
    """As after a save to a full disk by another program."""
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(FastdissError, match=r"x.safetensors is damaged .*: use another one"):
        Checkpoint.load(tmp_path / "x.safetensors")


def test_facts_that_are_incomplete_under_a_right_hash(
    saved: bytes, original: Checkpoint, tmp_path: Path
) -> None:
    """Written by another program, with the correct hash."""
    header, tensors = parts(saved)
    facts = json.loads(json.loads(header["__metadata__"]["fastdiss"])["facts"])
    path = tmp_path / "x.safetensors"
    wrong = st.sampled_from([None, True, "", "x", [], {}, -1, 2.5, 0, [1], {"x": 1}])

    @cases(150)
    @given(changed=changes(facts, wrong))
    def change(changed: dict[str, Any]) -> None:
        text = json.dumps(changed)
        sha256 = digest(text, dict(sorted(original.tensors.items())))
        about = {"format": "3", "facts": text, "sha256": sha256}
        forged = {"fastdiss": json.dumps(about)}
        path.write_bytes(joined({**header, "__metadata__": forged}, tensors))
        for read in (Checkpoint.load, lambda path: load_model(path, CPU)):
            try:
                read(path)
            except FastdissError as error:
                check_message(error)

    change()
    lacking = Checkpoint(**{**vars(original), "tensors": original.group("none")})
    lacking.save(path)
    with pytest.raises(FastdissError, match=r"tokenizer\.src: not a SentencePiece model"):
        load_model(path, CPU)


# through the commands


def test_damage_through_the_commands(dataset: Path, saved: bytes, tmp_path: Path) -> None:
    """Each command exits with one line, or does the same as with intact files."""
    checkpoint, folder = tmp_path / "c" / "checkpoint_last.safetensors", tmp_path / "data-bin"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(saved)
    shutil.copytree(dataset, folder)
    run = {
        "preprocess": ["preprocess", "--verify", "--destdir", folder],
        "generate": ["generate", folder, "--path", checkpoint, "--gen-subset=valid", "--steps=1"],
        "train": ["train", folder, "--save-dir", checkpoint.parent, "--max-update=1",
                  "--arch=fastdiss_tiny"],
    }  # fmt: skip
    right = run_cli(*run["generate"])
    assert right.returncode == 0, right.stderr
    files = [checkpoint, *sorted(folder.iterdir())]
    codes = []

    @cases(150)
    @given(data=st.data())
    def damage(data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(files))
        reading = ["generate", "train"] if path == checkpoint else list(run)
        whole = path.read_bytes()
        path.write_bytes(data.draw(damages(whole, regions_of(path.name, whole))))
        done = run_cli(*run[data.draw(st.sampled_from(reading))])
        path.write_bytes(whole)
        codes.append(done.returncode)
        assert "Traceback" not in done.stderr
        if done.returncode:
            assert done.returncode == 1
            assert done.stderr.splitlines()[-1].startswith("fastdiss: error: ")
            assert done.stderr.count("error: ") == 1
        elif done.stdout:
            assert done.stdout.splitlines()[:-1] == right.stdout.splitlines()[:-1]

    damage()
    assert codes.count(1) > 75


# pickles


class Bomb:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


def planted(kind: str, mark: Path) -> bytes:
    """Return the bytes of a pickle bomb, as different libraries write them."""
    if kind == "pickle":
        return pickle.dumps(Bomb(mark))
    aside = mark.with_name("bomb")
    if kind == "torch":
        torch.save({"model": Bomb(mark)}, aside)
    elif kind == "torch-legacy":
        torch.save(Bomb(mark), aside, _use_new_zipfile_serialization=False)
    else:
        with open(aside, "wb") as file:
            np.save(file, np.array([Bomb(mark)], object), allow_pickle=True)
    return aside.read_bytes()


@pytest.mark.parametrize("kind", ["pickle", "torch", "torch-legacy", "numpy"])
def test_a_pickle_does_not_go_off(dataset: Path, saved: bytes, tmp_path: Path, kind: str) -> None:
    mark = tmp_path / "gone-off"
    bomb = planted(kind, mark)
    checkpoint, folder = tmp_path / "c" / "checkpoint_last.safetensors", tmp_path / "data-bin"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(saved)
    shutil.copytree(dataset, folder)
    train = ["train", folder, "--save-dir", checkpoint.parent, "--arch=fastdiss_tiny"]
    ways = {
        checkpoint: [["generate", folder, "--path", checkpoint, "--gen-subset=valid"], train],
        tmp_path / "model.pt": [["generate", folder, "--path", tmp_path / "model.pt"]],
        tmp_path / "recipe.yaml": [[*train, "--config", tmp_path / "recipe.yaml"]],
        tmp_path / "spm": [["preprocess", "--tokenizer", tmp_path / "spm", "--testpref", "x",
                            "--destdir", tmp_path / "d"]],
        tmp_path / "hyp": [["score", "--sys", tmp_path / "hyp", "--ref", tmp_path / "hyp"]],
    }  # fmt: skip
    for path in folder.iterdir():
        ways[path] = [ways[checkpoint][0], train, ["preprocess", "--verify", "--destdir", folder]]
    for path, commands in ways.items():
        whole = path.read_bytes() if path.exists() else b""
        path.write_bytes(bomb)
        for command in commands:
            done = run_cli(*command)
            assert not mark.exists(), command
            assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        path.write_bytes(whole)
    with pytest.raises((FastdissError, UnicodeDecodeError)):
        (tmp_path / "x").write_bytes(bomb)
        fastdiss_cli.load(tmp_path / "x")
    assert not mark.exists()
    if kind == "pickle":  # the bomb is live
        pickle.loads(bomb)
        assert mark.exists()


def test_nothing_in_the_package_loads_pickles() -> None:
    """No import and no call of anything that unpickles or evaluates what it reads.

    `torch.distributed` exchanges objects between the processes of one run as pickles; they come
    from no file.
    """
    modules = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "_pickle"}
    calls = {"torch.load", "np.load", "numpy.load", "torch.jit.load", "torch.hub.load"}
    calls |= {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "os.system"}
    for path in sorted(Path(fastdiss_cli.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{a.name}" for a in node.names)]
            elif isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in calls, f"{path}:{node.lineno}"
                assert not [k for k in node.keywords if k.arg == "allow_pickle"]
            for name in names:
                assert name.split(".")[0] not in modules and name not in calls, path
