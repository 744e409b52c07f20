"""export and average: the contents of a release, where it loads, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import one_line_error, run_cli
from runs import command
from safetensors import safe_open
from safetensors.torch import save_file

import fastdiss_cli
from fastdiss_cli.checkpoints.checkpoint import Checkpoint
from fastdiss_cli.checkpoints.release import release
from fastdiss_cli.errors import FastdissError

RUN = {"validate_interval_updates": 4, "keep_last": 3, "lr": 1e-2, "ema_decay": 0.5}


@pytest.fixture(scope="module")
def trained(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    done = run_cli(*command(data_bin, folder, **RUN))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def files(trained: Path) -> list[Path]:
    found = sorted(trained.glob("checkpoint_*_*.safetensors"), key=lambda p: p.stat().st_mtime_ns)
    assert [path.stem.split("_")[-1] for path in found] == ["4", "8", "12"]
    return found


def facts_of(path: Path) -> dict[str, object]:
    done = run_cli("card", path)
    assert done.returncode == 0, done.stderr
    _, front, _ = done.stdout.split("---\n", 2)
    return yaml.safe_load(front)


def test_the_same_release_is_the_same_bytes(files: list[Path], tmp_path: Path) -> None:
    """safetensors writes several entries of metadata in random order."""
    out = tmp_path / "model.safetensors"
    found = set()
    for _ in range(6):
        assert run_cli("export", files[0], "--output", out).returncode == 0
        found.add(out.read_bytes())
    assert len(found) == 1


def test_a_checkpoint_of_format_2_is_read(files: list[Path], tmp_path: Path) -> None:
    with safe_open(files[0], framework="pt") as file:
        about = json.loads(file.metadata()["fastdiss"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata = {"fastdiss": "2", "facts": about["facts"], "sha256": about["sha256"]}
    save_file(tensors, tmp_path / "old.safetensors", metadata)
    old, new = Checkpoint.load(tmp_path / "old.safetensors"), Checkpoint.load(files[0])
    assert old.progress == new.progress and old.model_config == new.model_config


def test_an_option_that_was_renamed_is_read(files: list[Path], tmp_path: Path) -> None:
    checkpoint = Checkpoint.load(files[0])
    checkpoint.model_config |= {"mans_told": "token"}
    checkpoint.model_config.pop("mans_time", None)
    checkpoint.save(tmp_path / "old.safetensors")
    config = Checkpoint.load(tmp_path / "old.safetensors").model_config
    assert config["mans_time"] == "token" and "mans_told" not in config


def test_a_checkpoint_of_a_newer_version_is_reported(files: list[Path], tmp_path: Path) -> None:
    checkpoint, newer = Checkpoint.load(files[0]), tmp_path / "newer.safetensors"
    checkpoint.model_config |= {"unheard_of": 1}
    checkpoint.save(newer)
    done = run_cli("generate", "--path", newer, "--input=-", stdin="eins\n")
    one_line_error(done, f"{newer}: model.unheard_of is not an option of this version")


def test_an_option_that_is_newer_than_a_checkpoint_does_not_prevent_a_mean(
    files: list[Path], tmp_path: Path
) -> None:
    """As when a training was resumed with a newer version of the toolkit."""
    for name, options in (("new", {"source_copy": 0.0}), ("other", {"source_copy": 2.0})):
        checkpoint = Checkpoint.load(files[0])
        checkpoint.model_config |= options
        checkpoint.save(tmp_path / f"{name}.safetensors")
    del checkpoint.model_config["source_copy"]  # means 0, the only network there was
    checkpoint.save(tmp_path / "old.safetensors")
    old, new, other = (tmp_path / f"{name}.safetensors" for name in ("old", "new", "other"))
    assert release([new, old], None, None).model_config["source_copy"] == 0
    with pytest.raises(FastdissError, match=r"model\.source_copy differs"):
        release([other, old], None, None)


def test_a_release_generates_what_the_checkpoint_does(files: list[Path], tmp_path: Path) -> None:
    """And it holds only the weights that it generates with, and the tokenizers."""
    done = run_cli("export", files[1], "--output", tmp_path / "model.safetensors")
    assert done.returncode == 0 and done.stdout == ""
    assert f"wrote {tmp_path / 'model.safetensors'}: fastdiss_tiny" in done.stderr
    assert f"reading {files[1]}; to average, name several, or a folder with --last N" in done.stderr
    before, after = Checkpoint.load(files[1]), Checkpoint.load(tmp_path / "model.safetensors")
    assert {name.split(".")[0] for name in after.tensors} == {"model", "tokenizer"}
    for name, weight in before.group("ema").items():
        assert torch.equal(after.tensors[f"model.{name}"], weight)
    sentences = ["drei vier", "neun"]
    one, two = (
        fastdiss_cli.load(path).generate(sentences, steps=2)
        for path in (files[1], tmp_path / "model.safetensors")
    )
    assert one == two
    sizes = [path.stat().st_size for path in (files[1], tmp_path / "model.safetensors")]
    assert sizes[1] < 0.5 * sizes[0]
    text = "\n".join(sentences) + "\n"
    more = ["generate", "--path", tmp_path / "model.safetensors", "--input=-", "--plain"]
    assert run_cli(*more, "--steps=2", stdin=text).stdout.splitlines() == one


def test_several_are_averaged(
    trained: Path, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_name, by_count = tmp_path / "by_name.safetensors", tmp_path / "by_count.safetensors"
    monkeypatch.chdir(tmp_path)
    assert run_cli("average", files[1], files[2]).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["averaged.safetensors"]
    alone = run_cli("average", trained, "--output", by_name)
    one_line_error(alone, "stands for one checkpoint: name several, or --last N", code=2)
    assert run_cli("average", files[1], files[2], "--output", by_name).returncode == 0
    assert run_cli("export", trained, "--last", "2", "-o", by_count).returncode == 0
    one, two, mean, same = (
        Checkpoint.load(path) for path in (files[1], files[2], by_name, by_count)
    )
    assert mean.card == same.card
    assert all(torch.equal(weight, same.tensors[name]) for name, weight in mean.tensors.items())
    for name, weight in mean.group("model").items():
        expected = (one.group("ema")[name].double() + two.group("ema")[name].double()) / 2
        assert torch.equal(weight, expected.float())
    facts = facts_of(by_name)["training"]
    assert (facts["averaged_updates"], facts["updates"]) == ([8, 12], 12)
    assert "best_validation" not in facts  # the mean was never validated
    backwards = tmp_path / "backwards.safetensors"  # as a shell sorts 12 before 4 and 8
    assert run_cli("average", files[2], files[1], "--output", backwards).returncode == 0
    assert facts_of(backwards)["training"] == facts
    # the mean of a release and a checkpoint: of what each would generate with
    assert run_cli("average", by_name, files[0], "-o", by_count).returncode == 0
    assert fastdiss_cli.load(by_count).generate(["drei"], steps=1)


def test_checkpoints_of_an_abandoned_run_are_left_out_of_a_mean(
    trained: Path, files: list[Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "back"))
    shutil.copy(files[1], folder / "checkpoint_last.safetensors")  # set back to update 8 of 12
    out = tmp_path / "mean.safetensors"
    done = run_cli("average", folder, "--last", "2", "-o", out)
    assert facts_of(out)["training"]["averaged_updates"] == [4, 8]
    assert f"leaving out {folder / files[2].name}: later than checkpoint_last" in done.stderr
    one_line_error(run_cli("average", folder, "--last=3", "-o", out), "2 numbered checkpoints")
    (folder / "checkpoint_last.safetensors").unlink()
    assert run_cli("average", folder, "--last=3", "-o", out).returncode == 0


def test_a_copy_counts_once_in_a_mean(trained: Path, files: list[Path], tmp_path: Path) -> None:
    """As where a shell's pattern includes checkpoint_last and checkpoint_best."""
    out, copy = tmp_path / "mean.safetensors", trained / "checkpoint_last.safetensors"
    done = run_cli("average", *files, copy, "-o", out)
    assert done.returncode == 0
    assert f"{copy} has the same weights as {files[2]}, and counts once" in done.stderr
    assert facts_of(out)["training"]["averaged_updates"] == [4, 8, 12]
    same = Checkpoint.load(out)
    assert run_cli("average", *files, "-o", copy.with_name("again.safetensors")).returncode == 0
    again = Checkpoint.load(copy.with_name("again.safetensors"))
    assert all(torch.equal(weight, again.tensors[name]) for name, weight in same.tensors.items())
    one_line_error(run_cli("average", *files, out, "-o", out), "is one of the checkpoints", code=2)
    more = run_cli("average", *files, out, "-o", tmp_path / "more.safetensors")
    assert f"{out} is itself a mean, and counts like a single checkpoint" in more.stderr


def test_models_of_different_directions_have_no_mean(files: list[Path], tmp_path: Path) -> None:
    checkpoint = Checkpoint.load(files[0])
    source, target = (checkpoint.dataset[side] for side in ("source", "target"))
    checkpoint.dataset |= {"source": target, "target": source}
    checkpoint.save(tmp_path / "back.safetensors")
    differ = rf"the directions differ \({source}-{target} and {target}-{source}\)"
    with pytest.raises(FastdissError, match=differ):
        release([files[1], tmp_path / "back.safetensors"], None, None)


def test_without_averages_the_weights_themselves_are_taken(data_bin: Path, tmp_path: Path) -> None:
    more = command(data_bin, tmp_path, "transformer_tiny", max_update=2, ema_decay=0)
    assert run_cli(*more).returncode == 0
    assert run_cli("export", tmp_path, "-o", tmp_path / "x.safetensors").returncode == 0
    newest = Checkpoint.load(tmp_path / "checkpoint_last.safetensors")
    exported = Checkpoint.load(tmp_path / "x.safetensors")
    assert all(torch.equal(w, exported.group("model")[n]) for n, w in newest.group("model").items())


def test_the_card(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All commands work with defaults, and the card says where the model comes from."""
    (tmp_path / "checkpoints").symlink_to(trained)
    (tmp_path / "words.md").write_text("# Numbers\n\nFür Zahlen.", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    before = run_cli("card").stdout
    assert "license: unknown" in before and before.endswith("---\n") and "toolkit" not in before
    assert run_cli("export", "--license", "cc-by-4.0", "--card", "words.md").returncode == 0
    shown = run_cli("card", "model.safetensors").stdout
    assert shown.endswith("---\n# Numbers\n\nFür Zahlen.\n")
    card = facts_of(Path("model.safetensors"))
    assert list(card)[:4] == ["architecture", "license", "source", "target"]
    assert card["architecture"] == "fastdiss_tiny" and card["license"] == "cc-by-4.0"
    assert (card["source"], card["target"]) == ("de", "en")
    assert card["toolkit"] == f"fastdiss {fastdiss_cli.__version__}"
    model = fastdiss_cli.load("model.safetensors").loaded.model
    untouched = type(model)(model.config, model.src, model.tgt)
    assert card["parameters"] == untouched.num_parameters()
    assert card["vocabulary"] == {"source": model.src.size, "target": model.tgt.size}
    assert card["model"]["model_dim"] == 16 and card["model"]["latent_dim"] == 8
    best = Checkpoint.load(trained / "checkpoint_best.safetensors").progress
    assert card["training"] == {
        "dataset_sha256": Checkpoint.load(trained / "checkpoint_last.safetensors").dataset_hash,
        "sentences": 200,
        "updates": best.update,
        "epochs": best.epoch,
        "best_validation": {
            "bleu": round(best.best, 3),
            "update": best.best_update,
            "sentences": 4,
        },
    }
    with safe_open("model.safetensors", framework="pt") as file:  # for other tools than ours
        about = json.loads(file.metadata()["fastdiss"])
        assert json.loads(about["facts"])["card"]["license"] == "cc-by-4.0"
    # a release of a release keeps what is not given again
    assert run_cli("export", "model.safetensors", "-o", "again.safetensors").returncode == 0
    assert run_cli("card", "again.safetensors").stdout == shown


def test_no_training_goes_on_from_a_release(trained: Path, data_bin: Path, tmp_path: Path) -> None:
    assert run_cli("export", trained, "-o", tmp_path / "x.safetensors").returncode == 0
    shutil.copy(tmp_path / "x.safetensors", tmp_path / "checkpoint_last.safetensors")
    message = one_line_error(run_cli(*command(data_bin, tmp_path, **RUN)))
    assert "is a release without optimizer state" in message and "--save-dir" in message


def test_what_does_not_belong_together_is_refused(
    trained: Path, corpus: Path, data_bin: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"

    def other(name: str, arch: str = "fastdiss_tiny", data: Path = data_bin, **model: int) -> Path:
        more = command(data, tmp_path / name, arch, max_update=1)
        sets = [f"--set=model.{key}={value}" for key, value in model.items()]
        assert run_cli(*more, *sets).returncode == 0
        return tmp_path / name

    prefs = [f"--{split}pref={corpus / split}" for split in ("train", "valid")]
    more = ["-s", "de", "-t", "en", "--model-type=word", "--destdir", tmp_path / "bin"]
    assert run_cli("preprocess", *more, *prefs).returncode == 0
    for folder, message in (
        (other("arch", "difformer_tiny"), "architectures differ (fastdiss_tiny and difformer_tiny"),
        (other("width", ffn_dim=64), "model.ffn_dim differs"),
        (other("words", data=tmp_path / "bin"), "the src tokenizers differ ("),
    ):
        refused = run_cli("average", trained, folder, "-o", out)
        assert message in one_line_error(refused, "cannot be averaged", str(folder))
    assert not out.exists()
    assert run_cli(*command(data_bin, tmp_path / "seed", max_update=1, seed=7)).returncode == 0
    done = run_cli("average", trained, tmp_path / "seed", "-o", out)
    assert done.returncode == 0 and "averaging trainings with the seeds 1, 7: unless" in done.stderr


def test_what_is_missing_is_named(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one_line_error(run_cli("export"), "checkpoints: no such checkpoint")
    for line in (["card"], ["generate", "--input=-"]):
        one_line_error(run_cli(*line), "checkpoints: no such checkpoint")
    one_line_error(run_cli("average", trained, "--last=4"), "3 numbered", "--keep-last 4")
    one_line_error(run_cli("export", trained, "--card=none.md"), "none.md")
    for wrong in (["--last=2", trained / "checkpoint_best.safetensors"], [trained, "--last=-1"]):
        assert run_cli("average", *wrong).returncode == 2
    taken = run_cli("export", trained, "-o", trained / "checkpoint_last.safetensors")
    one_line_error(taken, "reserved for", code=2)
    pickled = run_cli("export", tmp_path, "--output", tmp_path / "model.pt")
    one_line_error(pickled, "must end in .safetensors", code=2)
    assert not list(tmp_path.iterdir())
    (tmp_path / "m.safetensors").mkdir()
    folder = run_cli("export", trained, "--output", tmp_path / "m.safetensors")
    one_line_error(folder, "is a folder", code=2)
    assert not list((tmp_path / "m.safetensors").iterdir())
