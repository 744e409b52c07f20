"""--user-module: models and solvers of the user's own, and one line for each mistake in them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import one_line_error, run_cli, run_ranks
from runs import command

import fastdiss_cli
from fastdiss_cli.config import build
from fastdiss_cli.diffusion import schedule
from fastdiss_cli.diffusion.solvers import SOLVERS
from fastdiss_cli.errors import USER_MODULE, FastdissError
from fastdiss_cli.models import difformer, registry

MODEL = """
from fastdiss_cli.models.difformer import Difformer
from fastdiss_cli.models.registry import register


class Loud(Difformer):
    pass


register("loud_tiny", Loud, "a model of one's own", model_dim=16, ffn_dim=32, heads=2,
         encoder_layers=1, decoder_layers=1, latent_dim=8)
"""


TYPES = "must be a bool, int, float, str, one of these | None, or a tuple"


def decoding(field: str) -> str:
    """Return the module with decoding options of its own."""
    own = f"    @dataclass(frozen=True)\n    class Decoding:\n        {field}"
    imports = "from dataclasses import dataclass\nfrom typing import Literal\n"
    return imports + MODEL.replace("    pass", own)


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget the modules of a test, which would otherwise be imported once in this process."""
    registry.architectures()
    monkeypatch.setattr(registry, "_ARCHITECTURES", dict(registry._ARCHITECTURES))
    monkeypatch.setitem(SOLVERS, "half", None)
    yield
    for name in [name for name in sys.modules if name.startswith(USER_MODULE)]:
        del sys.modules[name]


def in_another_process(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return run_ranks(1, *args)[0]


@pytest.fixture(scope="module")
def trained(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the module loud.py and a training of its model."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "loud.py").write_text(MODEL)
    options = ["--set=train.valid_sentences=0", "--max-update", "2", "--save-dir", folder]
    mine = ["--arch", "loud_tiny", "--user-module", folder / "loud.py"]
    assert in_another_process("train", data_bin, *options, *mine).returncode == 0
    return folder


def test_a_model(trained: Path, data_bin: Path) -> None:
    module = ["--user-module", trained / "loud.py"]
    assert "loud_tiny" in in_another_process("models", *module).stdout
    generate = ["generate", data_bin, "--path", trained / "checkpoint_last.safetensors"]
    assert in_another_process(*generate, *module).returncode == 0
    assert "--user-module" in one_line_error(in_another_process(*generate))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\nraise RuntimeError('no')", "loud.py: RuntimeError: no (loud.py:2)"),
        ("raise RuntimeError('no' * 900)", "nono... (all of it with FASTDISS_TRACEBACK=1) "
         "(loud.py:1)"),
        ("exec(compile('1/0', '', 'exec'))", "loud.py: ZeroDivisionError: division by zero "
         "(loud.py:1)"),
        ("no python", "loud.py: SyntaxError: invalid syntax (loud.py, line 1)"),
        ("raise SystemExit(0)", "loud.py: SystemExit: 0 (loud.py:1)"),  # it ends nothing else
        (MODEL.replace("loud_tiny", "fastdiss_tiny"), "'fastdiss_tiny' is registered twice"),
        (MODEL.replace("heads=2", "head=2"), "model.head is not an option of loud_tiny; did you "
         "mean 'heads'?"),
        (MODEL.replace("(Difformer)", ""), "'loud_tiny': Loud has no dataclass Config"),
        (decoding("beam: int = 1"), "'loud_tiny': Decoding has no property candidates"),
        (decoding("beam: list[int] = ()"), f"Decoding.beam {TYPES}"),
        (decoding("beam: Literal[1] = 1"), f"Decoding.beam {TYPES}"),
        (decoding("beam: int | str = 1"), f"Decoding.beam {TYPES}"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_module(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "loud.py").write_text(text)
    line = one_line_error(run_cli("models", "--user-module", tmp_path / "loud.py"))
    assert f"--user-module {tmp_path / 'loud.py'}: " in line and line.endswith(message)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("__init__(self, *_):\n        1 / 0",
         "making loud_tiny: ZeroDivisionError: division by zero (loud.py:8)"),
        ("misfits(self, *_):\n        return self.no",
         "AttributeError: 'Loud' object has no attribute 'no' (loud.py:8)"),
        ("loss(self, batch, update):\n        return super().loss(None, update)",
         "AttributeError: 'NoneType' object has no attribute 'src_tokens' (loud.py:8)"),
    ],
)  # fmt: skip
def test_a_mistake_in_training(data_bin: Path, tmp_path: Path, method: str, message: str) -> None:
    module = tmp_path / "loud.py"
    module.write_text(MODEL.replace("    pass", f"    def {method}"))
    train = command(data_bin, tmp_path / "new", "loud_tiny")
    assert one_line_error(run_cli(*train, "--user-module", module)).endswith(message)


def test_a_mistake_that_is_met_outside_the_module(
    trained: Path, data_bin: Path, tmp_path: Path
) -> None:
    module = tmp_path / "loud.py"
    module.write_text(MODEL.replace("    pass", "    def decode(self, *_):\n        return None"))
    generate = ["generate", data_bin, "--path", trained / "checkpoint_last.safetensors"]
    line = one_line_error(run_cli(*generate, "--user-module", module))
    assert "object is not iterable (generation.py:" in line
    assert line.endswith(f", with --user-module {module})")


def test_the_traceback_is_shown_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loud.py").write_text("1 / 0")
    monkeypatch.setenv("FASTDISS_TRACEBACK", "1")
    done = run_cli("models", "--user-module", tmp_path / "loud.py")
    assert done.stderr.startswith("Traceback")


def test_a_module_may_print_and_import_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_loud.py").write_text("print('loud')")  # stdout is for data
    (tmp_path / "loud.py").write_text("import neighbour_of_loud")
    before = list(sys.path)
    done = run_cli("models", "--user-module", tmp_path / "loud.py")
    assert done.returncode == 0 and "loud" in done.stderr and "loud" not in done.stdout
    assert sys.path == before


def test_what_is_no_module(tmp_path: Path) -> None:
    (tmp_path / "loud.txt").write_text(MODEL)
    no_file, no_module = "no such file", "must be a .py file"
    for name, message in (("loud.txt", no_module), (".", no_module), ("loud.py", no_file)):
        one_line_error(run_cli("models", "--user-module", tmp_path / name), message)


def test_a_repaired_module_can_be_loaded(trained: Path, tmp_path: Path) -> None:
    """In a notebook."""
    module = tmp_path / "loud.py"
    module.write_text(f"{MODEL}undefined\n")
    with pytest.raises(FastdissError, match=r"name 'undefined' is not defined \(loud.py:12\)"):
        fastdiss_cli.load(trained, "cpu", user_module=module)
    module.write_text(MODEL)
    assert fastdiss_cli.load(trained, "cpu", user_module=module).loaded.arch.name == "loud_tiny"


@pytest.mark.parametrize("hint", ["int | None", "None | int"])
def test_an_option_that_may_be_none(tmp_path: Path, hint: str) -> None:
    module = tmp_path / "loud.py"
    module.write_text(decoding(f"beam: {hint} = None\n        candidates = 1"))
    assert run_cli("models", "--user-module", module).returncode == 0
    options = registry.architecture("loud_tiny").family.Decoding
    assert build(options, {"beam": 2}).beam == 2 and build(options, {"beam": None}).beam is None


def test_a_schedule(data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "ABAR", dict(schedule.ABAR))
    monkeypatch.setattr(difformer, "ABAR", schedule.ABAR)
    module = tmp_path / "power.py"
    module.write_text(
        "from fastdiss_cli.diffusion import schedule\n"
        "schedule.ABAR['power'] = lambda t: 1 - t**0.7\n"
    )
    train = command(data_bin, tmp_path / "c", max_update=1)
    own = ["--set=model.noise_schedule=power", "--user-module", module]
    done = run_cli(*train, *own)
    assert done.returncode == 0, done.stderr
    del schedule.ABAR["power"]  # as in another process
    line = ["generate", data_bin, "--path", tmp_path / "c" / "checkpoint_last.safetensors"]
    one_line_error(run_cli(*line), "not 'power'; if that is your own, give --user-module")
    done = run_cli("export", tmp_path / "c", "--output", tmp_path / "model.safetensors")
    assert done.returncode == 0, done.stderr  # it does not build the model


def test_a_solver(trained: Path, tmp_path: Path) -> None:
    module = tmp_path / "mine.py"
    module.write_text(
        (trained / "loud.py").read_text()
        + "from fastdiss_cli.diffusion.solvers import SOLVERS, Deterministic\n"
        "class Half(Deterministic):\n"
        "    def __call__(self, *args): return super().__call__(*args) / 2\n"
        "SOLVERS['half'] = Half\n"
    )
    line = ["generate", "--path", trained / "checkpoint_last.safetensors", "--input=-"]
    line += ["--user-module", module, "--solver"]
    halved = run_cli(*line, "half", stdin="eins zwei drei\n")
    plain = run_cli(*line, "ddim", stdin="eins zwei drei\n")
    assert halved.returncode == plain.returncode == 0, halved.stderr
    assert halved.stdout.splitlines()[:4] != plain.stdout.splitlines()[:4]
    assert "solver=half" in halved.stderr
    SOLVERS["half"] = lambda schedule: None
    refused = run_cli(*line, "half", stdin="eins\n")
    one_line_error(refused, "--solver must be a subclass of diffusion.solvers.Solver", code=2)
