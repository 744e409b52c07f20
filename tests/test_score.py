"""score and plot: sacreBLEU through the command line, systems side by side, plots."""

from __future__ import annotations

import errno
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import sacrebleu
from conftest import one_line_error, run_cli

from fastdiss_cli import metrics
from fastdiss_cli.commands import score
from fastdiss_cli.decoding.report import Summary
from fastdiss_cli.decoding.systems import by_steps, parse_summary

REFERENCES = [f"the {n} small cats sat on {n} mats" for n in range(30)]
POOR = [line.replace("small", "big") if n % 2 else line for n, line in enumerate(REFERENCES)]


def write(path: Path, lines: Sequence[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def summary(arch: str, speed: float, **options: object) -> str:
    """Return what `generate` writes at the end of a file."""
    run = SimpleNamespace(
        options=SimpleNamespace(**options), sentences=3000, seconds=3000 / speed, nfe=0, empty=0
    )
    bleu = sacrebleu.corpus_bleu(["a b"], [["a c"]])
    return Summary(run, bleu, "nrefs:1|tok:13a").line("test", arch)  # type: ignore[arg-type]


def generated(path: Path, answers: Sequence[str], end: str = "") -> Path:
    """Write a generate file whose references are `REFERENCES`."""
    lines = []
    for i, (answer, reference) in enumerate(zip(answers, REFERENCES, strict=True)):
        lines += [f"S-{i}\tx", f"T-{i}\t{reference}", f"H-{i}\t-1\tx", f"D-{i}\t-1\t{answer}"]
    return write(path, [*lines, *([end] if end else [])])


def test_score_is_sacrebleu(tmp_path: Path) -> None:
    hypotheses = ["the cat sat on the mat .", "a dog", "it is raining today"]
    references = ["the cat sat on a mat .", "the dog", "it rains today"]
    (tmp_path / "hyp").write_text("\n".join(hypotheses) + "\n")
    (tmp_path / "ref").write_text("\n".join(references) + "\n")
    done = run_cli("score", "--sys", tmp_path / "hyp", "--ref", tmp_path / "ref", "--json")
    scores = {row["name"]: row for row in json.loads(done.stdout)}
    for name, expected in (
        ("BLEU", sacrebleu.corpus_bleu(hypotheses, [references])),
        ("chrF2", sacrebleu.corpus_chrf(hypotheses, [references])),
        ("TER", sacrebleu.corpus_ter(hypotheses, [references])),
    ):
        assert scores[name]["score"] == pytest.approx(expected.score, abs=1e-9)
    assert "tok:13a" in scores["BLEU"]["signature"]
    plain = run_cli("score", "--sys", tmp_path / "hyp", "--ref", tmp_path / "ref").stdout
    assert plain.startswith("BLEU|nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")


def test_bleu_of_tokenized_and_of_lower_case_text(tmp_path: Path) -> None:
    """sacreBLEU's -tok and -lc; and --ignore-case of fairseq-score."""
    hypotheses = ["The cat sat, on a mat .", "it rains-today"]
    references = ["the cat sat , on a mat.", "It rains - today"]
    hyp, ref = write(tmp_path / "hyp", hypotheses), write(tmp_path / "ref", references)
    command = ["score", "--sys", hyp, "--ref", ref, "--metrics", "bleu", "--json"]
    for flags, options in (
        (["--tokenize", "none"], {"tokenize": "none"}),
        (["-tok", "intl", "-lc"], {"tokenize": "intl", "lowercase": True}),
        (["--ignore-case"], {"lowercase": True}),
    ):
        (row,) = json.loads(run_cli(*command, *flags).stdout)
        expected = sacrebleu.corpus_bleu(hypotheses, [references], **options)
        assert row["score"] == pytest.approx(expected.score, abs=1e-9)
        assert f"tok:{options.get('tokenize', '13a')}" in row["signature"]
        assert ("case:lc" in row["signature"]) == ("lowercase" in options)
    message = one_line_error(run_cli(*command, "--tokenize", "intll"), code=2)
    assert (
        "--tokenize must be one of none, zh, 13a, intl" in message
        and "did you mean 'intl'?" in message
    )
    tested = run_cli(*command[:5], "--paired", write(tmp_path / "other", hypotheses), "-lc").stdout
    assert "case:lc" in tested and f"{expected.score:.2f}" in tested


def test_any_of_several_references_is_right(tmp_path: Path) -> None:
    (tmp_path / "hyp").write_text("on August the third\nat half past three in the morning\n")
    (tmp_path / "refs.tsv").write_text(
        "on the third of August\ton August the third\nat half past three in the morning\n"
    )
    done = run_cli("score", "--sys", tmp_path / "hyp", "--ref", tmp_path / "refs.tsv", "--json")
    bleu, chrf, ter = json.loads(done.stdout)
    assert (bleu["score"], chrf["score"], ter["score"]) == pytest.approx((100, 100, 0))
    assert "nrefs:var" in bleu["signature"]


def test_unequal_line_counts_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "hyp").write_text("one\ntwo\n")
    (tmp_path / "ref").write_text("one\n")
    message = one_line_error(run_cli("score", "--sys", tmp_path / "hyp", "--ref", tmp_path / "ref"))
    assert "1 line" in message and "2" in message
    message = one_line_error(run_cli("score", "--sys", tmp_path / "hyp"))
    assert "--ref" in message


def test_names_are_those_of_the_metrics() -> None:
    assert set(score.SUMS) == set(metrics.METRICS)
    assert set(score.DIVERSITY) == set(metrics.DIVERSITY)
    assert {name for group in score.GROUPS.values() for name in group} < set(score.NAMES)
    assert set(metrics.METRICS) > metrics.LOWER_IS_BETTER


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--metrics", "bleu,ruge"], "ruge: choose from bleu, chrf, ter, rouge1"),
        (["--metrics", "bleu,", "chrF"], "chrF: no such file; metrics are one word, as in --m"),
        (["--metrics", "bleu", "chrf,", "ter"], "chrf, ter: no such file; metrics are one word"),
        (["--metrics", "destinct"], "did you mean 'distinct'?"),
        (["--paired-test", "bs"], "--paired-test needs --paired BASELINE"),
        (["--metrics", "chrf", "--tokenize", "none"], "--tokenize applies to --metrics bleu"),
        (["--metrics", "chrf", "-lc"], "--lowercase applies to --metrics bleu"),
        (["--bertscore-model", "x"], "--bertscore-model applies to --metrics bertscore"),
        (["--plot", "out.gif"], "must end in .png, .svg, .pdf"),
    ],
)
def test_wrong_usage_exits_with_2(tmp_path: Path, options: list[str], message: str) -> None:
    done = run_cli("score", "--sys", write(tmp_path / "hyp", ["a"]), *options)
    line = one_line_error(done, message, code=2)
    assert ("did you mean" in line) != line.endswith("(see `fastdiss score --help`)")


def test_a_system_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    one_line_error(run_cli("score"), "stdin is empty: give --sys FILE")
    monkeypatch.setattr("fastdiss_cli.logs.stdin_is_terminal", lambda: True)
    one_line_error(run_cli("score"), "error: give --sys FILE, or several files (see", code=2)


def test_a_system_comes_from_stdin(tmp_path: Path) -> None:
    ref, text = write(tmp_path / "ref", REFERENCES), "".join(f"{line}\n" for line in POOR)
    expected = run_cli("score", write(tmp_path / "hyp", POOR), "--ref", ref, "--metrics=ser").stdout
    for named in ([], ["-"], ["--sys", "-"]):
        done = run_cli("score", *named, "--ref", ref, "--metrics=ser", stdin=text)
        assert done.stdout == expected and " = 50.00" in expected
    one_line_error(run_cli("score", "-", "-", "--ref", ref), "stdin can be read only once", code=2)
    truncated = run_cli("score", "-", "--metrics=ser", stdin="T-0\ta\nD-0\t-1\ta\n")
    assert "warning: stdin has no last line" in truncated.stderr
    one_line_error(run_cli("score", "-", stdin="D-1\t-1\ta\n"), "stdin: no D-0 line")


def test_a_folder_stands_for_its_generate_files(tmp_path: Path) -> None:
    files = [generated(tmp_path / f"x/generate-test.steps{n}.txt", POOR) for n in (5, 20)]
    assert run_cli("score", tmp_path / "x").stdout == run_cli("score", *files).stdout
    single = generated(tmp_path / "y/generate-test.txt", REFERENCES)
    results = [run_cli("score", files[0], "--paired", p).stdout for p in (tmp_path / "y", single)]
    assert results[0] == results[1] != ""
    several = run_cli("score", single, "--paired", tmp_path / "x")
    assert f"--paired {tmp_path / 'x'}: it has several" in one_line_error(several, code=2)
    message = one_line_error(run_cli("score", tmp_path))
    assert f"without generate-*.txt; there are some in {tmp_path / 'x'}" in message
    generated(tmp_path / "generate-test.txt.part", POOR)
    message = one_line_error(run_cli("score", tmp_path))
    assert message.endswith("generate-test.txt.part is of a run that did not finish")


# several systems


def test_systems_are_shown_side_by_side(tmp_path: Path) -> None:
    good, poor = write(tmp_path / "good", REFERENCES), write(tmp_path / "poor", POOR)
    ref = write(tmp_path / "ref", REFERENCES)
    command = ["score", "--sys", good, "--sys", poor, "--ref", ref, "--metrics", "BLEU,ser"]
    head, first, second, *signatures = run_cli(*command).stdout.splitlines()
    alone = run_cli("score", "--sys", poor, "--ref", ref, "--metrics", "bleu").stdout
    bleu = alone.split(" = ")[1].split()[0]
    assert head.split() == ["system", "BLEU", "SER"]
    assert first.split() == [str(good), "100.00", "0.00"]
    assert second.split() == [str(poor), bleu, "50.00"]
    assert [line.split("|")[0] for line in signatures] == ["BLEU", "SER"]
    assert f"{signatures[0]} = {bleu} " in alone
    # as a shell's * gives them
    assert run_cli("score", good, poor, *command[5:]).stdout.splitlines()[0] == head
    rows = json.loads(run_cli(*command, "--json").stdout)
    assert [(row["system"], row["name"]) for row in rows] == [
        (str(system), name) for system in (good, poor) for name in ("BLEU", "SER")
    ]
    assert rows[3]["score"] == 50 and "p_value" not in rows[3]


def test_references_of_generate_files_must_agree(tmp_path: Path) -> None:
    good = generated(tmp_path / "good", REFERENCES)
    plain = write(tmp_path / "plain", POOR)
    rows = json.loads(run_cli("score", good, plain, "--metrics=ser", "--json").stdout)
    assert [row["score"] for row in rows] == [0, 50]  # scored by the references of the first
    other = write(tmp_path / "other", good.read_text().replace("T-3\t", "T-3\tnot ").splitlines())
    message = one_line_error(run_cli("score", good, other))
    assert "hold different references: give --ref" in message
    short = write(tmp_path / "short", ["one line"])
    assert "1 sentences" in one_line_error(run_cli("score", good, short), "30")


def test_systems_on_different_texts_are_told(tmp_path: Path) -> None:
    """Their references may be the same: those of --ref."""
    one, other = (generated(tmp_path / name, POOR) for name in ("one", "other"))
    assert "S- lines" not in run_cli("score", one, other).stderr
    other.write_text(other.read_text().replace("S-3\tx", "S-3\ty").replace("S-4\tx", "S-4\tz"))
    done = run_cli("score", one, other, "--metrics=bleu")
    assert done.returncode == 0
    assert f"{other} and {one} differ in 2 sources (S- lines)" in done.stderr


@pytest.mark.parametrize(("test", "drawn"), [("bs", 1000), ("ar", 10000)])
def test_paired_tests_mark_what_differs_from_the_baseline(
    tmp_path: Path, test: str, drawn: int
) -> None:
    ref = write(tmp_path / "ref", REFERENCES)
    good, poor = write(tmp_path / "good", REFERENCES), write(tmp_path / "poor", POOR)
    same = write(tmp_path / "same", POOR)
    # the baseline among the systems is not compared with itself
    spelt_otherwise = tmp_path / "x" / ".." / "poor"
    (tmp_path / "x").mkdir()
    command = ["score", good, spelt_otherwise, same, "--ref", ref]
    command += ["--paired", poor, "--paired-test", test]
    command += ["--metrics", "bleu,ser,distinct1,chrf"]
    done = run_cli(*command)
    assert ("p-values of ser, which count errors" in done.stderr) == (test == "ar")
    head, *rows, _, _, _, _, legend = done.stdout.splitlines()
    assert head.split() == ["system", "BLEU", "p", "SER", "p", "distinct-1", "chrF2", "p"]
    assert [row.split()[0] for row in rows] == [str(poor), str(good), str(same)]
    assert rows[0].split().count("-") == 3 and rows[1].count("*") == 3
    assert "*" not in rows[0] + rows[2]
    assert rows[2].count("1.0000") == 3  # no significant difference
    assert legend.startswith(f"* differs from the baseline, {poor}, with p < 0.05")
    found = json.loads(run_cli(*command, "--json").stdout)
    assert [row["p_value"] is None for row in found[:4]] == [True] * 4
    bleu, ser, distinct, chrf = found[4:8]
    assert bleu["score"] == pytest.approx(100) and bleu["p_value"] < 0.01
    assert f"{test}:{drawn}" in bleu["signature"] and ser["score"] == 0
    assert distinct["p_value"] is None  # it is not a sum over sentences
    assert ["mean" in row for row in (bleu, ser, chrf)] == [test == "bs"] * 3
    plain = json.loads(run_cli(*command[:6], "--metrics=bleu", "--json").stdout)
    assert plain[0].keys() == bleu.keys() - {"p_value", "mean", "ci"}
    others = [write(tmp_path / name, [name] * len(REFERENCES)) for name in ("wrong", "bad")]
    equal = run_cli("score", *others, "--ref", ref, "--paired", others[0], "--metrics=bleu,ser")
    assert equal.stdout.count("1.0000") == 2  # as wrong, with other words
    untested = run_cli("score", good, "--paired", poor, "--metrics=distinct,self-bleu")
    one_line_error(untested, "no test for --metrics distinct,self-bleu", code=2)
    alone = run_cli("score", poor, "--ref", ref, "--paired", poor)
    one_line_error(alone, "needs another system", code=2)


def test_lines_with_their_numbers_are_no_references(tmp_path: Path) -> None:
    ref = write(tmp_path / "ref", [f"T-{n}\t{line}" for n, line in enumerate(POOR)])
    hyp = write(tmp_path / "hyp", POOR)
    assert "`cut -f2-`" in one_line_error(run_cli("score", hyp, "--ref", ref), "has numbered lines")
    one_line_error(run_cli("score", ref, "--ref", hyp), "but no D- lines")


def test_a_file_of_no_sentences_is_no_text(tmp_path: Path) -> None:
    none = write(tmp_path / "none", [summary("fastdiss_tiny", 9, steps=5)])
    ref = write(tmp_path / "ref", ["a"])
    one_line_error(run_cli("score", none, "--ref", ref), "holds no sentences")
    one_line_error(run_cli("score", ref, "--ref", write(tmp_path / "empty", [])), "empty is empty")


def test_pieces_are_not_scored_as_text(tmp_path: Path) -> None:
    pieces = write(tmp_path / "pieces", ["H-0\t-0.1\t▁a ▁b", "H-1\t-0.2\t▁c"])
    ref = write(tmp_path / "ref", ["a b", "c"])
    assert "no D- lines" in one_line_error(run_cli("score", pieces, "--ref", ref))


def test_diversity_needs_no_references(tmp_path: Path) -> None:
    hyp = write(tmp_path / "hyp", ["a a", "b"])
    output = run_cli("score", hyp, "--metrics", "distinct").stdout.splitlines()
    assert [line.split(" = ")[1] for line in output] == ["66.67", "100.00"]
    assert "--nbest" in one_line_error(run_cli("score", hyp, "--metrics", "self-bleu"))
    more = ("--metrics", "distinct,repetition")
    assert run_cli("score", hyp, *more).stdout.splitlines()[-1].split(" = ")[1] == "100.00"
    other = write(tmp_path / "other", ["a b", "b"])
    compared = run_cli("score", other, "--paired", hyp, "--metrics", "repetition")
    assert compared.returncode == 0 and " 0.00" in compared.stdout, compared.stderr


def test_score_does_not_wait_for_torch(tmp_path: Path) -> None:
    """sacreBLEU itself takes a quarter of a second; torch takes two."""
    hyp = generated(tmp_path / "hyp", POOR, summary("fastdiss_tiny", 40, steps=5))
    code = (
        "import sys; from fastdiss_cli.__main__ import command_line\n"
        "try: command_line(*sys.argv[1:2])()\n"
        "except SystemExit: pass\n"
        "print(*(name in sys.modules for name in ('torch', 'numpy', 'rich', 'matplotlib')))"
    )
    start = [sys.executable, "-c", code, "score", hyp, "--metrics", "bleu,chrf,ter,distinct"]
    done = subprocess.run(start, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False False False False", done.stderr


# plots


def test_a_summary_line_is_read_back() -> None:
    figures = parse_summary(summary("fastdiss_tiny", 1234.5, steps=5, noise_beam=3, solver="ddpm"))
    assert figures is not None and (figures.arch, figures.steps) == ("fastdiss_tiny", 5)
    assert figures.speed == pytest.approx(1234.5, abs=0.1)
    assert figures.options == {"steps": "5", "noise_beam": "3", "solver": "ddpm"}
    beam = parse_summary(summary("transformer_base", 8, beam=5, lenpen=1.0))
    assert beam is not None and beam.steps is None and beam.speed == 8
    slow = parse_summary(summary("transformer_base", 0.0498, beam=5))
    assert slow is not None and slow.speed == pytest.approx(0.0498)
    ours = parse_summary(summary("mine_tiny", 8))  # a model of one's own, without options
    assert ours is not None and (ours.arch, ours.options) == ("mine_tiny", {})
    blank = parse_summary(summary("mine_tiny", 8, grid=(1, 2)))
    assert blank is not None and blank.options == {"grid": "(1,2)"}
    assert parse_summary("Generate poems with words: 5 sentences") is None
    switches = dict(steps=5, early_exit=True, history=True, diagnose=False)
    output = parse_summary(summary("fastdiss_tiny", 8, **switches))
    assert output is not None
    assert output.options == {"steps": "5", "early_exit": "True", "history": "True"}


needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="the extra plot"
)


def systems(folder: Path) -> list[Path]:
    """Write files of two diffusion models at three step counts, and of an autoregressive one."""
    paths = [generated(folder / "ar/out.txt", REFERENCES, summary("transformer_tiny", 40, beam=5))]
    for arch, right in (("difformer_tiny", 1), ("fastdiss_tiny", 2)):
        for steps in (1, 5, 20):
            count = right * steps // 3
            answers = [*REFERENCES[:count], *POOR[count:]]
            path = folder / arch / f"generate-test.steps{steps}.txt"
            end = summary(arch, 900 / steps, steps=steps, solver="ddpm")
            paths.append(generated(path, answers, end))
    return paths


@needs_matplotlib
@pytest.mark.parametrize("ending", ["svg", "png", "pdf"])
def test_quality_is_drawn_against_steps_and_speed(tmp_path: Path, ending: str) -> None:
    out = tmp_path / "new" / f"front.{ending}"
    done = run_cli("score", *systems(tmp_path), "--metrics", "ser,bleu", "--plot", out)
    assert done.returncode == 0 and f"wrote {out}" in done.stderr.replace("\n", "")
    assert done.stdout.startswith("system")
    drawn = out.read_bytes()
    assert drawn.startswith({"svg": b"<?xml", "png": b"\x89PNG", "pdf": b"%PDF"}[ending])
    run_cli("score", *systems(tmp_path), "--metrics", "ser,bleu", "--plot", out)
    assert out.read_bytes() == drawn
    if ending == "svg":
        for text in (
            "SER (lower is better)", "denoising steps", "sentences/s", ">20<",
            ">difformer_tiny<", ">fastdiss_tiny<", ">ar<",
        ):  # fmt: skip
            assert text in drawn.decode()
        assert "steps=" not in drawn.decode()
        page = drawn.decode().split('<g id="patch_1">')[1].split("</g>")[0]
        assert "fill: #ffffff" in page  # not the reader's, which may be dark


@needs_matplotlib
def test_the_speed_of_a_diagnosis_is_not_drawn(tmp_path: Path) -> None:
    out = tmp_path / "out.svg"
    lines = [summary("fastdiss_tiny", 8, steps=77, **more) for more in ({}, {"diagnose": True})]
    paths = [generated(tmp_path / str(n), POOR, line) for n, line in enumerate(lines)]
    for files, count in ((paths, 2), (paths[1:], 1)):  # at the points, and under the axis of steps
        assert run_cli("score", *files, "--metrics=bleu", "--plot", out).returncode == 0
        assert out.read_text().count(">77<") == count


@needs_matplotlib
def test_curves_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    out = tmp_path / "out.svg"
    long = "n" * 70  # a name that would be wider than the picture
    one, two = ("transformer_tiny, beam=1", "transformer_tiny, beam=5")
    for paths, beams, labels in (
        (["one/x/out", "two/x/out"], [1, 5], ["one", "two"]),  # the common ending is uninformative
        (["x/one", "x/two"], [1, 5], [one, two]),
        ([f"{long}1/out", f"{long}2/out"], [1, 5], [one, two]),
        ([f"{long}1/out", f"{long}2/out"], [5, 5], [f"{long}1", f"{long}2"]),
        (["x/one"], [5], ["transformer_tiny"]),
        (["_one/out", "$b^{$/out"], [5, 5], [" _one", "$b^{$"]),  # not a formula, nor hidden
    ):
        files = [
            generated(tmp_path / path, POOR, summary("transformer_tiny", 9, beam=beam, lenpen=1.0))
            for path, beam in zip(paths, beams, strict=True)
        ]
        assert run_cli("score", *files, "--metrics=bleu", "--plot", out).returncode == 0
        shown = out.read_text()
        assert all(f">{label}<" in shown for label in labels)


def test_what_stops_early_is_drawn_at_the_steps_it_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = summary("fastdiss_tiny", 9, steps=20, early_exit=True).replace("NFE 0.0", "NFE 2.8")
    file, out = generated(tmp_path / "out.txt", POOR, end), tmp_path / "out.svg"
    drawn: list[Sequence[float]] = []
    axes = pytest.importorskip("matplotlib.axes").Axes
    right = axes.plot

    def plot(self: object, x: Sequence[float], y: Sequence[float], **how: object) -> object:
        drawn.append(x)
        return right(self, x, y, **how)

    monkeypatch.setattr(axes, "plot", plot)
    assert run_cli("score", file, "--metrics=bleu", "--plot", out).returncode == 0
    assert drawn[0] == [2.8] and ">20 (2.8)<" in out.read_text()


@needs_matplotlib
@pytest.mark.parametrize("ending", ["svg", "png", "pdf"])
def test_a_picture_is_whole_or_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    picture = write(tmp_path / "folder" / f"out.{ending}", ["the older one"])
    file = generated(tmp_path / "out.txt", POOR, summary("fastdiss_tiny", 9, steps=5))

    def full(path: Path, content: bytes) -> None:
        path.open("wb").close()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    message = one_line_error(run_cli("score", file, "--metrics=bleu", "--plot", picture))
    assert f"out.{ending}: cannot write: No space left on device" in message
    assert picture.read_text() == "the older one\n" and len(list(picture.parent.iterdir())) == 1


@needs_matplotlib
def test_a_picture_is_there_though_nobody_reads_the_table(tmp_path: Path) -> None:
    file = generated(tmp_path / "out.txt", POOR, summary("fastdiss_tiny", 9, steps=5))
    command = [sys.executable, "-m", "fastdiss_cli", "score", file, "--plot", tmp_path / "out.svg"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.close()
    assert process.returncode == 141 and (tmp_path / "out.svg").stat().st_size


def test_what_cannot_be_plotted_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("matplotlib"):
        plain = generated(tmp_path / "plain", POOR)
        message = one_line_error(run_cli("score", plain, "--plot", tmp_path / "out.png"))
        assert "plain does not end with the summary of `fastdiss generate`" in message
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = one_line_error(run_cli("score", "no-file", "--plot", tmp_path / "out.png"))
    assert "a plot needs matplotlib: pip install 'fastdiss[plot]'" in message


def log(path: Path, validations: bool = True) -> Path:
    rows = [
        {"update": n, "epoch": 1, "split": "train", "loss": 9 / n, "lr": 1e-3 / n, "skipped": 0}
        for n in (1, 2, 3)
    ]
    if validations:
        rows.append({"update": 3, "epoch": 1, "split": "valid", "loss": 3.5, "bleu": 12.0})
    return write(path, map(json.dumps, rows))


@needs_matplotlib
def test_training_curves_of_several_runs(tmp_path: Path) -> None:
    runs = [log(tmp_path / name / "metrics.jsonl", name != "b") for name in "abc"]
    out = tmp_path / "curves.svg"
    done = run_cli("plot", runs[0].parent, *runs[1:], runs[1], "--output", out)
    assert done.returncode == 0, done.stderr
    shown = out.read_text()
    for text in (">loss<", ">learning rate<", ">validation BLEU<", ">updates<", ">training<"):
        assert text in shown
    assert all(shown.count(f">{name}<") == 1 for name in "abc")
    assert "skipped" not in shown  # nothing but zeros


@needs_matplotlib
def test_a_run_within_the_folder_of_another_has_a_name(tmp_path: Path) -> None:
    log(tmp_path / "run" / "metrics.jsonl"), log(tmp_path / "run" / "sub" / "metrics.jsonl")
    out = tmp_path / "curves.svg"
    done = run_cli("plot", tmp_path / "run", tmp_path / "run" / "sub", "-o", out)
    assert done.returncode == 0, done.stderr
    assert ">sub<" in out.read_text()


def test_tokenized_text_is_reported(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("one two .\n" * 100)
    done = run_cli("score", "--sys", text, "--ref", text, "--metrics", "bleu")
    (warning,) = done.stderr.splitlines()
    assert f"{text}: 100 lines end in a tokenized full stop" in warning
    more = ["--ref", text, "--metrics", "bleu", "--tokenize", "none"]  # it is meant to be
    assert not run_cli("score", "--sys", text, *more).stderr


@pytest.mark.parametrize("line", ["▁one ▁two", "on@@ e two"])
def test_subwords_are_reported(line: str, tmp_path: Path) -> None:
    """As `grep ^H | cut -f3` takes them from a generate file."""
    pieces = write(tmp_path / "pieces", [line, line, ""])
    text = write(tmp_path / "text", ["one two", "an @@ in it", "or ▁"])
    done = run_cli("score", "--sys", pieces, "--ref", text)
    assert f"warning: {pieces}: the lines hold subwords" in done.stderr
    assert not run_cli("score", "--sys", text, "--ref", text).stderr


def test_several_references_of_a_generate_file_are_asked_for(tmp_path: Path) -> None:
    """Its T- lines have one of them."""
    line = summary("fastdiss_tiny", 8, steps=5)
    paths = [
        generated(tmp_path / f"{i}", POOR, line.replace("nrefs:1", f"nrefs:{n}"))
        for i, n in enumerate((1, "var", 12))
    ]
    told = "the last line has BLEU against several references a sentence"
    assert f"{paths[1]} and 1 more: {told}" in run_cli("score", *paths).stderr
    assert f"{paths[2]}: {told}" in run_cli("score", paths[2]).stderr
    refs = write(tmp_path / "refs", REFERENCES)
    assert not run_cli("score", *paths, "--ref", refs).stderr
    assert not run_cli("score", paths[0]).stderr


def test_a_truncated_generate_file_is_reported(tmp_path: Path) -> None:
    whole = generated(tmp_path / "whole", POOR, summary("fastdiss_tiny", 8, steps=5))
    assert "may be truncated" not in run_cli("score", whole).stderr
    cut = generated(tmp_path / "cut", POOR)
    assert f"may be truncated: scoring its {len(POOR)} sentences" in run_cli("score", cut).stderr


def test_a_log_before_the_lines_is_passed_over(tmp_path: Path) -> None:
    """As written by `generate > job.log 2>&1`."""
    path = generated(tmp_path / "out.txt", POOR, summary("fastdiss_tiny", 8, steps=5))
    plain = run_cli("score", path).stdout
    path.write_text("checkpoints: 5 sentences on cpu\n" + path.read_text() + "wrote it\n")
    assert run_cli("score", path).stdout == plain and plain


def test_a_file_of_fairseq_is_scored(tmp_path: Path) -> None:
    """It starts with log lines, too, and has another last line."""
    start = "2024-05-01 12:00:00 | INFO | fairseq_cli.generate | {'task': 'translation'}"
    end = "Generate test with beam=5: BLEU4 = 80.04, 90.2/82.1/75.4/73.5 (BP=1.000, ratio=1.000)"
    path = generated(tmp_path / "generate-test.txt", POOR, end)
    path.write_text(f"{start}\n{path.read_text()}")
    done = run_cli("score", path)
    plain = run_cli(
        "score", write(tmp_path / "h", POOR), "--ref", write(tmp_path / "r", REFERENCES)
    )
    assert (done.stdout, done.stderr) == (plain.stdout, "") and plain.stdout


def test_an_empty_hypothesis_may_have_lost_its_tab(tmp_path: Path) -> None:
    """As many editors strip the blanks at the end of a line."""
    path = generated(tmp_path / "out", ["", *POOR[1:]], summary("fastdiss_tiny", 8, steps=5))
    whole = run_cli("score", path).stdout
    path.write_text(path.read_text().replace("D-0\t-1\t\n", "D-0\t-1\n"))
    assert run_cli("score", path).stdout == whole and whole
    path.write_text(re.sub(r"(D-\d+)\t-1\t(.)", r"\1\t\2", path.read_text()))  # cut -f1,3
    assert run_cli("score", path).stdout == whole


def test_files_of_a_run_come_in_the_order_of_their_steps(tmp_path: Path) -> None:
    paths = [generated(tmp_path / f"{n}/out.steps{k}.txt", POOR) for n in "ba" for k in (1, 20, 5)]
    rows = run_cli("score", *paths, "--metrics", "bleu").stdout.splitlines()[1:7]
    assert [re.search(r"([ab])/out.steps(\d+)", row).groups() for row in rows] == [
        (n, k) for n in "ba" for k in ("1", "5", "20")
    ]
    trial = [generated(tmp_path / f"t.steps7/out.steps{k}.txt", POOR) for k in (20, 1)]
    assert by_steps(trial) == trial[::-1]


@pytest.mark.parametrize("seed", ["x", "1.5", ""])
def test_a_seed_of_the_paired_test_is_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: str
) -> None:
    monkeypatch.setenv("SACREBLEU_SEED", seed)
    reference = write(tmp_path / "ref", REFERENCES)
    paths = [generated(tmp_path / f"{n}.txt", POOR) for n in "ab"]
    done = run_cli("score", *paths, "--ref", reference, "--paired", paths[0], "--metrics=bleu")
    one_line_error(done, f"SACREBLEU_SEED is {seed!r}, not a number")


@needs_matplotlib
def test_no_training_curves_without_a_log(tmp_path: Path) -> None:
    message = one_line_error(run_cli("plot", tmp_path))
    assert f"{tmp_path}: no metrics.jsonl; `fastdiss train` writes it" in message
    message = one_line_error(run_cli("plot", generated(tmp_path / "out.txt", POOR)))
    assert "line 1 is not a record of metrics.jsonl" in message and "score --plot" in message
    checkpoint = write(tmp_path / "model.safetensors", ["x"])
    one_line_error(run_cli("plot", checkpoint), "is a checkpoint: give the folder of the training")
    log(tmp_path / "a" / "metrics.jsonl")
    one_line_error(run_cli("plot", tmp_path), f"no metrics.jsonl; there is one in {tmp_path / 'a'}")
    assert "is empty" in one_line_error(run_cli("plot", write(tmp_path / "metrics.jsonl", [])))
    path = log(tmp_path / "metrics.jsonl")
    path.write_text(path.read_text() + '{"update": 4, "spl')  # the disk was full, or it was killed
    done = run_cli("plot", tmp_path, "-o", tmp_path / "curves.png")
    assert done.returncode == 0 and "ignoring the last line, which is incomplete" in done.stderr
    path.write_text(
        path.read_text() + 'it": "train"}\n{"epoch": 5}\n'
    )  # complete, but not a record
    one_line_error(run_cli("plot", tmp_path), "line 6 is not a record")
    path.write_text("{\n" + path.read_text())
    one_line_error(run_cli("plot", tmp_path), "line 1 is not a record")
    path.write_text(json.dumps({"update": 1, "split": "train", "loss": 10**400}) + "\n")
    one_line_error(run_cli("plot", tmp_path), "line 1 is not a record")
    path.write_text('{"update": 1, "split": "train"}\n')
    one_line_error(run_cli("plot", tmp_path), "metrics.jsonl has no figures to plot yet")
