"""The `sh` blocks of the README and of docs/ run, on a small corpus; all links are valid.

docs/api.md and docs/fairseq.md are run by the tests of their subjects.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import run_cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# appended flags override those of the pages, to keep the models small
SMALL = [
    "--max-update=2", "--max-tokens=300", "--set=model.encoder_layers=1",
    "--set=model.decoder_layers=1", "--set=model.model_dim=16", "--set=model.ffn_dim=16",
    "--set=model.heads=2",
]  # fmt: skip


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def run(line: str) -> str:
    """Run a command line as written, except for sizes; return its output."""
    command, *words = shlex.split(line, comments=True)
    assert command == "fastdiss"
    expanded: list[str] = []
    for word in words:
        expanded += sorted(map(str, Path().glob(word))) if "*" in word else [word]
    if words[0] == "train":
        expanded += SMALL
    elif words[0] == "preprocess" and "--trainpref" in words:
        expanded += ["--vocab-size", "300"]
    elif "transformer" in line and words[0] == "generate":
        expanded += ["--max-len-b", "5"]  # it has learned nothing, and would not end
    done = run_cli(*expanded)
    assert done.returncode == 0, (line, done.stderr)
    return done.stdout


@pytest.fixture
def here(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small version of the text that the README uses."""
    (tmp_path / "text").mkdir()
    for path in corpus.glob("*.*"):
        lines = path.read_text(encoding="utf-8").split("\n")[:60]
        (tmp_path / "text" / path.name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_every_command_of_the_documentation_runs(here: Path) -> None:
    readme = [line for block in blocks(ROOT / "README.md", "sh") for line in block.splitlines()]
    assert len(readme) == 7
    for line in readme:
        run(line)
    assert Path("quality.svg").stat().st_size > 1000 and Path("curves.svg").stat().st_size > 1000
    module = blocks(ROOT / "docs" / "extending.md", "python")[0]
    Path("mine.py").write_text(module, encoding="utf-8")
    shown = [
        run(line)
        for page in ("extending", "formats")
        for block in blocks(ROOT / "docs" / f"{page}.md", "sh")
        for line in block.splitlines()
    ]
    assert "half_conditioned_tiny" in shown[0] and len(shown) == 6
    assert "license: mit" in shown[-1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    for link in links:
        assert link.startswith("http") or (page.parent / link).exists(), link


def test_flags_in_the_documentation_exist() -> None:
    """A flag that a page names belongs to a command, or to a tool that the page describes."""
    commands = ["preprocess", "train", "generate", "score", "plot", "export", "card", "models"]
    known = set()
    for command in commands:
        known |= set(re.findall(r"--[a-z][a-z-]+", run_cli(command, "--help").stdout))
    tool = [sys.executable, ROOT / "recipes" / "bench" / "preprocess.py", "--help"]
    output = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    known |= set(re.findall(r"--[a-z][a-z-]+", output))
    others = {"--install-completion", "--nproc-per-node"}
    for page in PAGES:
        if page.name in ("fairseq.md", "cluster.md"):  # tables of other programs' flags
            continue
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page.read_text(encoding="utf-8")))
        assert named <= known | others, (page.name, named - known - others)


def test_every_test_that_the_list_of_tests_names_exists() -> None:
    """``..._`` stands for the beginning of a name, ``...test_`` for the file named last."""
    missing, names = [], []
    for row in (ROOT / "tests" / "README.md").read_text(encoding="utf-8").splitlines():
        for file, name in re.findall(r"`(test_\w+\.py)?(?:::)?((?:\.\.\.)?\w*(?:\.\.\.)?)`", row):
            if file:
                text = (ROOT / "tests" / file).read_text(encoding="utf-8")
                names = re.findall(r"^def (test_\w+)\(", text, re.MULTILINE)
            wanted = name.strip(".").strip("_")
            names_a_test = file or name.startswith("...")
            if wanted and names_a_test and not any(wanted in known for known in names):
                missing.append(f"{file} {name}")
    assert not missing
