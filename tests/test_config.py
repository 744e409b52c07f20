"""Configuration: types, ranges, quirks of YAML, and suggestions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from fastdiss_cli.config import (
    TrainConfig,
    build,
    build_saved,
    idle,
    option,
    parse_settings,
    read_recipe,
)
from fastdiss_cli.errors import FastdissError, OptionError
from fastdiss_cli.models.registry import architecture


def test_values_of_yaml_become_the_types_of_the_fields() -> None:
    values = parse_settings(["train.lr=5e-4", "train.adam_betas=[0.9, 0.95]", "train.compile=true"])
    config = build(TrainConfig, values["train"], "train")
    assert (config.lr, config.adam_betas, config.compile) == (5e-4, (0.9, 0.95), True)


def test_an_older_checkpoint_keeps_what_it_was_trained_with() -> None:
    """It was written before an option existed."""
    family = architecture("fastdiss_tiny").family.Config
    assert (family().source_copy, family().mans_time) == (1.0, "sentence")
    oldest = build_saved(family, {}, "model")
    assert (oldest.source_copy, oldest.mans_time) == (0.0, "token")
    newer = build_saved(family, {"source_copy": 0.5, "embedding_scale": False}, "model")
    assert (newer.source_copy, newer.mans_time) == (0.5, "token")
    with pytest.raises(OptionError, match=r"model\.embedding_scale is not .* from an older one"):
        build_saved(family, {"embedding_scale": True}, "model")

    @dataclass(frozen=True)
    class Own:
        embedding_scale: bool = option(True, "of a user's model")

    assert not build_saved(Own, {"embedding_scale": False}, "model").embedding_scale


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("train.lr=fast", "train.lr must be a number"),
        ("train.lr=.inf", "train.lr must be a number"),
        ("train.max_update=1.5", "train.max_update must be a whole number"),
        ("train.max_update=true", "train.max_update must be a whole number"),
        ("train.max_update=9223372036854775808", "train.max_update must fit into 64 bits"),
        ("train.compile=2", "train.compile must be true or false"),
        ("train.adam_betas=0.9", "train.adam_betas must be a list of 2"),
        ("train.adam_betas=[1.5, 1]", "adam_betas must be a pair in"),
        ("train.max_updat=3", "did you mean 'max_update'"),
        ("train.1=3", "train.1 is not an option; `fastdiss models ARCH` lists all"),
        ("train.heads=3", "train.heads is not an option; `fastdiss models ARCH` lists all"),
        ("train.warmup_updates=0", "warmup_updates must be at least 1 with inverse_sqrt"),
        ("train.lr_scheduler=cosin", "did you mean 'cosine'"),
        ("train.save_interval_updates=0", "at least 1"),
        ("train.keep_last=-1", "at least 0, not -1"),
        ("train.patience=-1", r"at least 0 \(0: no limit\), not -1"),
        ("train.dtype=fp16", "auto, float32, bfloat16"),
    ],
)
def test_what_is_wrong_is_named(item: str, message: str) -> None:
    with pytest.raises(FastdissError, match=message):
        build(TrainConfig, parse_settings([item])["train"], "train")


def test_a_setting_that_is_given_twice_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["train.lr=1", "model.lr=2", "train.lr=3"]
    assert parse_settings(settings) == {"model": {"lr": 2}, "train": {"lr": 3}}
    told = "warning: --set train.lr is given more than once: the last one counts\n"
    assert capsys.readouterr().err == told


def test_a_duplicate_option_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    for text in ("train:\n  lr: 1\n  seed: 3\n  lr: 2\n", "train:\n  <<:\n   lr: 1\n   lr: 2\n"):
        path.write_text(text)
        with pytest.raises(FastdissError, match=r"valid recipe: duplicate key 'lr' in line 4"):
            read_recipe(path)
    merged = "model: &a\n  <<: {dropout: 0.1}\n  dropout: 0.2\ntrain:\n  <<: *a\n"
    path.write_text(merged)  # a merged value is overridden, as YAML defines it
    assert read_recipe(path) == {"model": {"dropout": 0.2}, "train": {"dropout": 0.2}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  lr: [1\n  seed: 2\n", "line 3: expected ',' or ']', but got ':'"),
        ("train:\n\tlr: 1\n", "line 2: found character"),
        ("train: *x\n", "line 1: found undefined alias 'x'"),
    ],
)
def test_invalid_yaml_is_reported_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(FastdissError) as failed:
        read_recipe(path)
    assert str(failed.value).startswith(f"{path} is not a valid recipe: {message}")


def test_an_option_in_the_wrong_section_is_reported() -> None:
    with pytest.raises(FastdissError, match=r"is not an option of fastdiss_tiny; use train.lr$"):
        architecture("fastdiss_tiny").config({"lr": 1})


@pytest.mark.parametrize("item", ["lr=3", "train.lr", "optim.lr=3", "train.lr=[1"])
def test_settings_have_a_form(item: str) -> None:
    with pytest.raises(FastdissError, match="--set"):
        parse_settings([item])


@pytest.mark.parametrize(
    "content",
    ["train: [1, 2]", "- train", "trian: {}", "train: {lr: [", "\x00", "train: {}\ntrain: {}"],
)
def test_an_invalid_recipe_is_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(FastdissError, match=str(path)) as refused:
        read_recipe(path)
    assert "\n" not in str(refused.value)


def test_nothing_in_a_recipe_is_executed(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"train: {{arch: !!python/object/apply:os.mkdir ['{tmp_path}/made']}}")
    with pytest.raises(FastdissError):
        read_recipe(path)
    assert not (tmp_path / "made").exists()


def test_a_section_may_be_empty(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model:\n#  dropout: 0.2\ntrain:\n  lr: 0.1\n")
    assert read_recipe(path) == {"model": {}, "train": {"lr": 0.1}}


def test_options_that_an_other_one_switches_off_are_idle() -> None:
    options = {"scp_offset": "none", "scp_gap": 0.1, "mans_strength": 0.0}
    config = architecture("fastdiss_tiny").config(options)
    off = {"scp_gap", "scp_unroll", "scp_step_counts", "scp_grid", "mans_time"}
    assert off <= idle(config).keys()
    config = architecture("fastdiss_tiny").config({"scp_offset": "fixed"})
    assert {"scp_gap", "scp_unroll"}.isdisjoint(idle(config)) and "scp_grid" in idle(config)
    config = architecture("fastdiss_tiny").config({"self_cond_rate": 0.0})
    # what is switched off switches off in turn; the reason is the first of them
    off = {"scp_offset", "scp_coupling", "scp_unroll", "scp_grid", "self_cond_form"}
    assert {name: idle(config)[name] for name in off} == dict.fromkeys(off, "self_cond_rate")


@pytest.mark.parametrize("name", ["quickstart", "multi30k_de_en"])
def test_the_recipes_here_are_valid(name: str) -> None:
    from fastdiss_cli.models.registry import architecture

    path = Path(__file__).parent.parent / "recipes" / name / "config.yaml"
    recipe = read_recipe(path)
    config = build(TrainConfig, recipe["train"], "train")
    architecture(config.arch).config(recipe["model"])
