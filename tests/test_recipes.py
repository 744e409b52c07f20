"""The recipes on small samples of their corpora, in the official formats: archive to scores."""

from __future__ import annotations

import http.server
import json
import os
import select
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import one_line_error, run_cli
from cuts import HELD_OUT, ORIGINALS, TRAIN, column, originals_of, text, write

RECIPES = Path(__file__).parent.parent / "recipes"
sys.path.insert(0, str(RECIPES))  # its scripts import each other like this

import prepare  # noqa: E402
from corpora import CORPORA  # noqa: E402

SHIM = """#!/usr/bin/env bash
# hands its arguments to the test, which runs them
printf '%s\\n' "$@" > "$CALLS/arguments"
echo > "$CALLS/go"
read -r code < "$CALLS/done"
cat "$CALLS/stdout"
cat "$CALLS/stderr" >&2
exit "$code"
"""


class Bench:
    """A folder where the scripts of recipes run; `fastdiss` in them runs in this process.

    Attributes:
        commands: the arguments of each `fastdiss`, in turn.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, folder / "calls"
        self.calls.mkdir()
        self.commands: list[list[str]] = []
        for name in ("go", "done"):
            os.mkfifo(self.calls / name)
        for name, script in (
            ("fastdiss", SHIM), ("python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'),
        ):  # fmt: skip
            path = folder / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(script)
            path.chmod(0o755)

    def run(
        self, script: str, *args: str | Path, **settings: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a script of the recipes' folder with settings in its environment."""
        python_path = f"{RECIPES.parent}:{os.environ.get('PYTHONPATH', '')}"
        env = {
            **os.environ, **settings, "CALLS": str(self.calls), "PYTHONPATH": python_path,
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
        }  # fmt: skip
        process = subprocess.Popen(
            ["bash", str(RECIPES / script), *map(str, args)],
            cwd=self.folder, env=env, encoding="utf-8",
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        go, done = (os.open(self.calls / name, os.O_RDWR) for name in ("go", "done"))
        while process.poll() is None:
            if select.select([go], [], [], 0.02)[0]:
                os.read(go, 1)
                os.write(done, f"{self._answer()}\n".encode())
        os.close(go)
        os.close(done)
        out, err = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def _answer(self) -> int:
        args = (self.calls / "arguments").read_text(encoding="utf-8").splitlines()
        self.commands.append(args)
        here = os.getcwd()
        os.chdir(self.folder)
        try:
            done = run_cli(*args)
        finally:
            os.chdir(here)
        (self.calls / "stdout").write_text(done.stdout, encoding="utf-8")
        (self.calls / "stderr").write_text(done.stderr, encoding="utf-8")
        return done.returncode


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def read(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


# from archive to scores


@pytest.mark.slow
@pytest.mark.parametrize("name", ORIGINALS)
def test_from_the_official_files_to_scores(name: str, bench: Bench) -> None:
    local = originals_of(name, bench.folder / "local")
    done = bench.run(f"{name}/prepare.sh", "text", "--from", local, "--cut")
    assert done.returncode == 0, done.stderr
    sides = CORPORA[name].sides
    for split in ("train", "valid", "test"):
        counts = {len(read(bench.folder / "text" / f"{split}.{side}")) for side in sides}
        assert len(counts) == 1 and counts != {0}

    small = {"ARCH": "difformer_tiny", "MAX_UPDATE": "2", "STEPS": "2,10", "WORK": "work"}
    done = bench.run(f"{name}/run.sh", "text", **small, DISTILL="0", AVERAGE="0")
    assert done.returncode == 0, done.stderr
    names = [command[0] for command in bench.commands]
    assert names == ["preprocess", "train", "generate", "score"]
    files = [f"work/difformer_tiny/generate/generate-test.steps{steps}.txt" for steps in (2, 10)]
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("work/")]
    assert [row[0] for row in rows] == files and all(len(row) > 1 for row in rows)
    test = read(bench.folder / "text" / f"test.{sides[0]}")
    for answers in files:
        lines = read(bench.folder / answers)
        assert [x.split("\t")[1] for x in lines if x.startswith("S-")] == test
    metric = "BLEU|" if "bleu" in " ".join(bench.commands[-1]) else "SER|"
    assert done.stdout.count(metric) == 1
    several = (bench.folder / "text" / "test.refs.tsv").exists()
    assert all(("--ref" in command) == several for command in bench.commands[2:])


def test_every_recipe_is_here() -> None:
    folders = {path.parent.name for path in RECIPES.glob("*/prepare.sh")}
    assert folders == set(CORPORA) == set(ORIGINALS)
    for name in folders:
        for file in ("config.yaml", "run.sh", "README.md"):
            assert (RECIPES / name / file).is_file(), name


@pytest.mark.slow
def test_distillation_trains_on_the_answers_of_a_teacher(bench: Bench) -> None:
    """Only once: a second run only samples and scores again."""
    for side, language in enumerate(("de", "en")):
        for split, count, start in (("train", 12, 0), ("valid", 2, 300), ("test", 2, 400)):
            write(bench.folder / "text", {f"{split}.{language}": text(column(side, count, start))})
    settings = {
        "ARCH": "difformer_tiny", "TEACHER": "transformer_tiny", "MAX_UPDATE": "1", "STEPS": "1",
        "WORK": "work", "AVERAGE": "0",
    }  # fmt: skip
    run = ["iwslt14_de_en/run.sh", "text", "en", "de"]
    done = bench.run(*run, **settings)
    assert done.returncode == 0, done.stderr
    work = bench.folder / "work"
    name = "distilled.transformer_tiny.1"  # of this teacher and this number of updates
    lines = read(work / name / "generate-train.txt")
    answers = [line.split("\t", 2)[2] for line in lines if line.startswith("D-")]
    sources = [line.split("\t", 1)[1] for line in lines if line.startswith("S-")]
    assert read(work / name / "train.de") == answers
    assert read(work / name / "train.en") == sources == read(bench.folder / "text/train.en")
    manifests = [
        json.loads((work / folder / "manifest.json").read_text())
        for folder in ("data-bin", f"data-bin.{name}")
    ]
    assert manifests[0]["tokenizers"] == manifests[1]["tokenizers"]
    trained = [command[1:4:2] for command in bench.commands if command[0] == "train"]
    assert trained == [
        ["work/data-bin", "work/transformer_tiny"],
        [f"work/data-bin.{name}", f"work/difformer_tiny.{name}"],
    ]
    told = [c[c.index("-s") : c.index("-s") + 4] for c in bench.commands if c[0] != "score"]
    assert told == [["-s", "en", "-t", "de"]] * 6  # a dataset of the other direction is refused

    bench.commands.clear()
    done = bench.run(*run, **settings)
    assert done.returncode == 0, done.stderr
    assert [command[0] for command in bench.commands] == ["train", "generate", "score"]
    assert "done after update 1" in done.stderr

    other = bench.run("iwslt14_de_en/run.sh", "text", "de", "en", **settings)
    assert other.returncode == 1 and "goes from en to de" in other.stderr


@pytest.mark.slow
def test_the_transformer_is_trained_by_the_same_recipe(bench: Bench) -> None:
    local = originals_of("qqp", bench.folder / "local")
    bench.run("qqp/prepare.sh", "text", "--from", local, "--cut")
    done = bench.run(
        "qqp/run.sh", "text", ARCH="transformer_tiny", TEACHER="transformer_tiny", DISTILL="1",
        MAX_UPDATE="1", WORK="work",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [c[0] for c in bench.commands] == ["preprocess", "train", "generate", "score"]
    assert "--beam" in bench.commands[2] and "BLEU" in done.stdout


@pytest.mark.slow
def test_the_numbered_checkpoints_are_averaged(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The average is what is sampled; `fastdiss average` itself has its own tests."""
    right = run_cli

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        if args[0] != "average":
            return right(*args)
        shutil.copy(args[1], args[-1])
        return subprocess.CompletedProcess(args, 0, "", "")

    monkeypatch.setattr(sys.modules[__name__], "run_cli", run)
    local = originals_of("qqp", bench.folder / "local")
    bench.run("qqp/prepare.sh", "text", "--from", local, "--cut")
    settings = {"ARCH": "difformer_tiny", "MAX_UPDATE": "1", "STEPS": "1", "WORK": "work"}
    save = "work/difformer_tiny"
    write(bench.folder / save / "generate", {"generate-test.steps7.txt": "of another day\n"})
    done = bench.run("qqp/run.sh", "text", **settings, AVERAGE="1")
    assert done.returncode == 0, done.stderr
    assert f"wrote {save}/generate/generate-test.txt\n" in done.stderr
    assert "steps7" not in done.stdout + done.stderr
    averaged = f"{save}/checkpoint_average.safetensors"
    average, generate = bench.commands[2:4]
    assert average == ["average", f"{save}/checkpoint_1_1.safetensors", "--output", averaged]
    assert generate[generate.index("--path") + 1] == averaged


def test_a_step_that_fails_ends_the_recipe(bench: Bench) -> None:
    done = bench.run("qqp/run.sh", "nowhere")
    assert [command[0] for command in bench.commands] == ["preprocess"]
    one_line_error(done, "nowhere/train.src")
    assert bench.run("wmt14_en_de/run.sh", "text", "de").returncode == 2  # de to de


# text


def prepared(name: str, folder: Path, *more: str | Path) -> subprocess.CompletedProcess[str]:
    """Run prepare.py in a new process on a local copy beside the folder that it writes."""
    command = [sys.executable, RECIPES / "prepare.py", name, folder / "text"]
    return subprocess.run(
        [*command, "--from", folder / "local", *more], capture_output=True, encoding="utf-8"
    )


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_iwslt14_is_cleaned_as_usual(tmp_path: Path) -> None:
    """Metadata of talks is dropped, titles kept; lower case; every 23rd pair is for validation."""
    local = originals_of("iwslt14_de_en", tmp_path / "local")
    done = prepared("iwslt14_de_en", tmp_path, "--cut")
    assert done.returncode == 0, done.stderr
    train, valid, test = (read(tmp_path / "text" / f"{s}.en") for s in ("train", "valid", "test"))
    assert train[:3] == ["anna b's title in en", "what it is about en", "zero zero zero ."]
    everything = [*train[:22], valid[0], *train[22:44], valid[1], *train[44:]]
    assert len(valid) == 2 and len(everything) == TRAIN + 2
    assert everything[2:] == [f"{line} ." for line in column(1, TRAIN)]
    assert test[0] == f"{column(1, 1, 500)[0]} & so" and len(test) == 10
    assert local.joinpath("de-en.tgz").exists() and not (tmp_path / "text" / "unfinished").exists()


def test_pairs_of_unfit_length_are_left_out_and_counted(tmp_path: Path) -> None:
    wmt = originals_of("wmt16_en_ro", tmp_path / "local")
    good, long = ["a b c"] * 4, " ".join(["x"] * 251)
    rows = [("", "a"), ("a b c", "a"), (long, long), ("a b . , ;", "a b"), ("a b c", "a, b.")]
    for side, language in enumerate(("ro", "en")):
        lines = good + [row[side] for row in rows]
        write(wmt, {f"europarl-v8.ro-en.{language}": text(lines)})
    (wmt / "training-parallel-ep-v8.tgz").unlink()
    done = prepared("wmt16_en_ro", tmp_path, "--cut")
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "text" / "train.ro")[:6] == [*good, "a b c", column(0, 1, TRAIN // 2)[0]]
    assert f"train: left out 4 of {TRAIN // 2 + 9} pairs" in done.stderr


def test_without_a_test_set_half_of_valid_becomes_one(tmp_path: Path) -> None:
    originals_of("tatoeba_deen", tmp_path / "local")
    assert prepared("tatoeba_deen", tmp_path, "--cut").returncode == 0
    valid, test = (read(tmp_path / "text" / f"{split}.refs.tsv") for split in ("valid", "test"))
    assert len(valid) == HELD_OUT and test[0].split("\t")[1].startswith("or ")
    assert [line.split("\t")[0] for line in valid + test] == column(1, 2 * HELD_OUT, 300)


def test_too_little_text_for_all_splits_is_one_line(tmp_path: Path) -> None:
    local = originals_of("tatoeba_deen", tmp_path / "local")
    for path in local.rglob("valid*"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:1]))
    one_line_error(prepared("tatoeba_deen", tmp_path, "--cut"), "no pairs for test: it is too")
    assert list((tmp_path / "text").iterdir()) == []


@pytest.mark.parametrize("name", ["multi30k_de_en", "iwslt14_de_en", "qqp"])
def test_a_wrong_number_of_pairs_is_refused(tmp_path: Path, name: str) -> None:
    originals_of(name, tmp_path / "local")
    official = f"{sum(part.pairs for part in CORPORA[name].splits['train']):,}"
    count = TRAIN + 2 * (name == "iwslt14_de_en")
    one_line_error(prepared(name, tmp_path), f"{count} pairs", official, "--cut")
    assert list((tmp_path / "text").iterdir()) == []


def test_sides_of_unequal_length_are_refused(tmp_path: Path) -> None:
    local = originals_of("gigaword", tmp_path / "local")
    write(local, {"sumdata/Giga/input.txt": "one line\n"})
    message = one_line_error(prepared("gigaword", tmp_path, "--cut"), "ends after 1 sentences")
    assert "input.txt" in message and "task1_ref0.txt" in message


def test_a_second_run_changes_nothing_and_needs_no_originals(tmp_path: Path) -> None:
    local = originals_of("multi30k_de_en", tmp_path / "local")
    assert prepared("multi30k_de_en", tmp_path, "--cut").returncode == 0
    before = snapshot(tmp_path / "text")
    for path in local.iterdir():
        path.unlink()
    done = prepared("multi30k_de_en", tmp_path, "--cut")
    assert done.returncode == 0 and f"complete: train {TRAIN}, valid 6, test 6" in done.stderr
    one_line_error(prepared("multi30k_de_en", tmp_path), "was made of a part of multi30k_de_en")
    assert snapshot(tmp_path / "text") == before


@pytest.mark.parametrize("damage", ["cut", "changed", "removed"])
def test_damaged_text_is_made_again(tmp_path: Path, damage: str) -> None:
    local = originals_of("multi30k_de_en", tmp_path / "local")
    prepared("multi30k_de_en", tmp_path, "--cut")
    before = {name: data for name, (_, data) in snapshot(tmp_path / "text").items()}
    path = tmp_path / "text" / "valid.de"
    whole = path.read_bytes()
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(whole[:-20] if damage == "cut" else b"x" + whole[1:])
    assert prepared("multi30k_de_en", tmp_path, "--cut").returncode == 0
    assert {name: data for name, (_, data) in snapshot(tmp_path / "text").items()} == before

    path.unlink()
    write(local, {"val.de.gz": text(column(0, HELD_OUT, 900))})  # not what was read before
    one_line_error(prepared("multi30k_de_en", tmp_path, "--cut"), "val.de.gz", "the last time")


def test_a_kill_at_any_moment_is_repaired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each rename, and in the middle of the writing, where it leaves half a file."""
    local = originals_of("multi30k_de_en", tmp_path / "local")
    arguments = (local, True)
    prepare.prepare("multi30k_de_en", tmp_path / "whole", *arguments)
    whole = {name: data for name, (_, data) in snapshot(tmp_path / "whole").items()}
    right = os.replace
    for moment in range(len(whole)):
        folder = tmp_path / f"killed{moment}"
        left = [moment]

        def replace_or_die(source: Path, target: Path, left: list[int] = left) -> None:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            right(source, target)

        monkeypatch.setattr(prepare.os, "replace", replace_or_die)
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare("multi30k_de_en", folder, *arguments)
        monkeypatch.setattr(prepare.os, "replace", right)
        write(folder / "unfinished" / "text", {"train.de": "half a li", "old.de": "x"})
        prepare.prepare("multi30k_de_en", folder, *arguments)
        assert {name: data for name, (_, data) in snapshot(folder).items()} == whole


def test_what_was_not_made_here_is_not_overwritten(tmp_path: Path) -> None:
    originals_of("multi30k_de_en", tmp_path / "local")
    write(tmp_path / "text", {"train.de": "mine\n"})
    one_line_error(prepared("multi30k_de_en", tmp_path, "--cut"), "train.de", "not made here")
    assert read(tmp_path / "text" / "train.de") == ["mine"]
    (tmp_path / "text" / "train.de").unlink()
    assert prepared("multi30k_de_en", tmp_path, "--cut").returncode == 0
    one_line_error(prepared("qqp", tmp_path), "holds multi30k_de_en")


def test_a_bad_archive_is_one_line(tmp_path: Path) -> None:
    local = originals_of("wmt14_en_de", tmp_path / "local")
    archive = local / "training-parallel-commoncrawl.tgz"
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    one_line_error(prepared("wmt14_en_de", tmp_path, "--cut"), archive.name, "damaged")
    archive.unlink()
    one_line_error(prepared("wmt14_en_de", tmp_path, "--cut"), "no commoncrawl.de-en.en", "tgz")
    archive.write_bytes(whole)
    write(local, {"test-full.tgz": "of another content"})
    one_line_error(prepared("wmt14_en_de", tmp_path, "--cut"), "test-full.tgz", "a8cd784e006f")


class HalfAnswers(http.server.SimpleHTTPRequestHandler):
    """Serves files, but breaks off in the middle of the first answer."""

    broken: list[str]

    def do_GET(self) -> None:
        if self.broken:
            self.broken.pop()
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"not all of it")
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Serve a local copy of Multi30k over HTTP; the first answer breaks off."""
    local = originals_of("multi30k_de_en", tmp_path / "local")

    class Handler(HalfAnswers):
        broken = ["once"]  # noqa: RUF012

        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(local))  # type: ignore[arg-type, misc]

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}/"
        serving.shutdown()


def test_downloads_are_whole_or_not_there(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = CORPORA["multi30k_de_en"]
    here = {
        split: tuple(replace(part, url=server) for part in parts)
        for split, parts in corpus.splits.items()
    }
    monkeypatch.setitem(CORPORA, "multi30k_de_en", replace(corpus, splits=here))
    folder = tmp_path / "text"
    with pytest.raises(prepare.FastdissError, match="broke off"):
        prepare.prepare("multi30k_de_en", folder, None, True)
    assert not (folder / "originals" / "train.de.gz").exists()
    prepare.prepare("multi30k_de_en", folder, None, True)
    assert read(folder / "train.de") == column(0, TRAIN)
    record = json.loads((folder / "prepared.json").read_text())
    assert set(record["originals"]) == {path.name for path in (tmp_path / "local").iterdir()}
