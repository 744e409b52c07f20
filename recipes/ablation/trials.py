"""Train every model of the ablation and sample from it; what is finished is skipped.

Each trial has a folder WORK/NAME/seedK with its checkpoints and, for each way of sampling, a folder
of `fastdiss generate` files.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fastdiss_cli.device import dtype_name, machine, pick_device, pick_dtype

HERE = Path(__file__).parent
ALL_STEPS = "1,2,3,5,10,20,50,100"
FEW_STEPS = "1,2,5,20"

# One network; the unrolled SCP is the default. MANS has a pass of its own and gives the network the
# time of the sentence, unless the name says: shared pass; given t_i, the time of each token.
DIFFORMER = {"family": "difformer"}
SCP = {"family": "fastdiss", "scp_unroll": "0", "mans_strength": "0"}
SCP_MANS = SCP | {
    "mans_strength": "0.25",
    "mans_shared_pass": "false",
    "mans_time": "sentence",
}
VARIANTS: dict[str, dict[str, str]] = {
    "no self-conditioning": DIFFORMER | {"self_cond_rate": "0"},
    "difformer": DIFFORMER,
    "+SCP": SCP,
    "+SCP, unrolled": SCP | {"scp_unroll": "0.5"},
    "+MANS": SCP_MANS | {"scp_offset": "none", "self_cond_rate": "0.5"},
    "+SCP+MANS": SCP_MANS,
    "+SCP+MANS, shared pass": SCP_MANS | {"mans_shared_pass": "true"},
    "+SCP+MANS, given t_i": SCP_MANS | {"mans_time": "token"},
}
DEFAULT = "+SCP, unrolled"

# The open choices of fastdiss_tiny, with SCP and on validation data: what a setting changes in the
# base, whose options (besides the sizes) are given in full: a new default does not change them.
BASE = {
    "noise_factor": "4",
    "noise_schedule": "sqrt",
    "logit_scale": "matched",
    "label_smoothing": "0.1",
    "self_cond_rate": "1",
    "self_cond_form": "expected",
    "latent_dim": "64",
    "source_copy": "1",
    "scp_offset": "step-matched",
    "scp_step_counts": "[2,3,5,10,20]",
    "scp_grid": "uniform",
    "scp_coupling": "markov",
    "scp_unroll": "0.5",
    "length_loss": "0.1",
    "max_length_offset": "128",
    "mans_strength": "0",
    "mans_confidence": "distance",
    "mans_anchors": "[0.1,1.0]",
    "mans_start_update": "0",
    "mans_shared_pass": "false",
    "mans_time": "sentence",
}
MANS = {"mans_strength": "0.25"}
SWEEPS: dict[str, dict[str, dict[str, str]]] = {
    "SCP: t'": {
        "step-matched to the log-SNR grid": {"scp_grid": "log-snr"},
        # these two never reach t' > 1: self_cond is zeros only where there is no first pass
        "t (standard self-conditioning)": {"scp_offset": "none", "self_cond_rate": "0.5"},
        "uniform on (t, 1]": {"scp_offset": "uniform", "self_cond_rate": "0.5"},
        "t + 0.05": {"scp_offset": "fixed", "scp_gap": "0.05"},
        "t + 0.2": {"scp_offset": "fixed", "scp_gap": "0.2"},
        "t + 0.5": {"scp_offset": "fixed", "scp_gap": "0.5"},
    },
    "SCP: rate": {"0.5": {"self_cond_rate": "0.5"}},
    "SCP: coupling": {
        "shared noise": {"scp_coupling": "shared"},
        "independent": {"scp_coupling": "independent"},
    },
    "SCP: unrolled share": {
        "0": {"scp_unroll": "0"},
        "0.25": {"scp_unroll": "0.25"},
        "1": {"scp_unroll": "1"},
    },
    "MANS": {
        "own pass": MANS,
        "own pass, strength 0.1": MANS | {"mans_strength": "0.1"},
        "own pass, strength 0.5": MANS | {"mans_strength": "0.5"},
        "own pass, by probability": MANS
        | {"mans_confidence": "probability", "mans_anchors": "[0.9,0.1]"},
        "own pass, anchors 0.02 and 0.5": MANS | {"mans_anchors": "[0.02,0.5]"},
        "own pass, from half of the updates on": MANS | {"mans_start_update": "300"},
        "shared pass": MANS | {"mans_shared_pass": "true"},
        "own pass, given t_i": MANS | {"mans_time": "token"},
    },
    "Self-conditioning": {
        "raw estimate": {"self_cond_form": "raw"},
        "nearest embedding": {"self_cond_form": "nearest"},
    },
    "Logits": {
        "scale 1/sqrt(D)": {"logit_scale": "rsqrt"},
        "scale 1": {"logit_scale": "one"},
        "scale learned": {"logit_scale": "learned"},
        "no label smoothing, scale 1/sqrt(D)": {"logit_scale": "rsqrt", "label_smoothing": "0"},
    },
    "Noise": {
        "factor 1": {"noise_factor": "1"},
        "factor 2": {"noise_factor": "2"},
        "factor 8": {"noise_factor": "8"},
        "factor 16": {"noise_factor": "16"},
        "linear schedule": {"noise_schedule": "linear"},
        "cosine schedule": {"noise_schedule": "cosine"},
    },
    "Source copy": {
        "none": {"source_copy": "0"},
        "width 0.3": {"source_copy": "0.3"},
        "width 3": {"source_copy": "3"},
    },
    "Embedding": {
        "dimension 32": {"latent_dim": "32"},
        "dimension 128": {"latent_dim": "128"},
    },
}
# Open choices of sampling, the default first: for the base; CLAMPS for "Self-conditioning", too.
CLAMPS = ("expected", "raw", "nearest")
GRIDS = ("log-snr", "uniform", "quadratic")
TEMPERATURES = ("0.25", "1", "0")

MBR = ["--length-beam", "5", "--noise-beam", "3", "--select", "mbr", "--mbr-weights", "equal"]


def trial_folder(work: Path, name: str, seed: int) -> Path:
    return work / name / f"seed{seed}"


@dataclass(frozen=True)
class Trial:
    """One model: how it is trained, and how it is sampled (folder -> flags of generate)."""

    folder: Path
    arch: str
    seed: int
    updates: int
    validate: int  # updates between validations
    settings: dict[str, str]
    split: str
    sampling: dict[str, list[str]] = field(default_factory=dict)

    def run(self, corpus: Path, data: Path) -> None:
        """Train, which ends at once where it is done and refuses other options, and sample."""
        self.folder.mkdir(parents=True, exist_ok=True)
        best = self.folder / "checkpoint_best.safetensors"
        options = [f"train.max_update={self.updates}"]
        options += [f"model.{key}={value}" for key, value in self.settings.items()]
        fastdiss(
            self.folder, "train", data, "--config", corpus, "--arch", self.arch,
            "--seed", self.seed, "--validate-interval-updates", self.validate,
            "--save-dir", self.folder,
            *(part for option in options for part in ("--set", option)),
        )  # fmt: skip
        for name, flags in self.sampling.items():
            sample(data, best, self.split, self.folder / name, flags)


def sample(data: Path, checkpoint: Path, split: str, results: Path, flags: list[str]) -> None:
    """Generate a split unless its files are there."""
    counts = flags[flags.index("--steps") + 1].split(",") if "--steps" in flags else [""]
    ends = [f".steps{count}" if len(counts) > 1 else "" for count in counts]
    kinds = [".txt", ".diagnosis.json"] if "--diagnose" in flags else [".txt"]
    files = [results / f"generate-{split}{end}{kind}" for end in ends for kind in kinds]
    if not all(file.exists() for file in files):
        fastdiss(
            checkpoint.parent, "generate", data, "--path", checkpoint, "--gen-subset", split,
            "--results-path", results, *flags,
        )  # fmt: skip


def fastdiss(log_folder: Path, *arguments: object) -> None:
    """Run a command, its output appended to ``log.txt``."""
    command = [sys.executable, "-m", "fastdiss_cli", *map(str, arguments)]
    with open(log_folder / "log.txt", "a", encoding="utf-8") as log:
        done = subprocess.run(command, stdout=log, stderr=log)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {done.returncode}, see {log.name}")


def measure_speed(work: Path, data: Path, plan: dict[str, Any]) -> None:
    """Sample once more from the models of seed 1, one run at a time and with all cores."""
    counts = plan.get("steps", ALL_STEPS) + (",2000" if plan.get("many_steps") else "")
    ways = {
        "single": (DEFAULT, ["--steps", counts]),
        "mbr": (DEFAULT, ["--steps", FEW_STEPS, *MBR]),
        "greedy": ("transformer", ["--beam", "1"]),
        "beam": ("transformer", ["--beam", "5"]),
    }
    for way, (name, flags) in ways.items():
        checkpoint = trial_folder(work, name, 1) / "checkpoint_best.safetensors"
        sample(data, checkpoint, "test", work / "speed" / way, flags)


def variant_trials(work: Path, plan: dict[str, Any]) -> Iterator[Trial]:
    """Yield the variants and the autoregressive reference, seed by seed."""
    steps = plan.get("steps", ALL_STEPS)
    every_seed = {
        "reuse": ["--steps", steps],
        "recompute": ["--steps", FEW_STEPS, "--self-cond", "recompute"],
        "mbr": ["--steps", "2,5", *MBR],
    }
    first_seed = {
        "ddim": ["--steps", steps, "--solver", "ddim"],
        **{f"temperature {t}": ["--steps", steps, "--temperature", t] for t in TEMPERATURES[1:]},
        "none": ["--steps", FEW_STEPS, "--self-cond", "none"],
        "gold": ["--steps", FEW_STEPS, "--self-cond", "gold"],
        "diagnosis": ["--steps", "5,20", "--diagnose"],
    }
    beams = {"greedy": ["--beam", "1"], "beam": ["--beam", "5"]}
    size, updates = plan.get("size", "tiny"), plan["updates"]
    validate = plan.get("validate", updates)
    for seed in range(1, plan["seeds"] + 1):
        sampling = every_seed | (first_seed if seed == 1 else {})
        for name in plan.get("variants", VARIANTS):
            options = dict(VARIANTS[name])
            arch = f"{options.pop('family')}_{size}"
            folder = trial_folder(work, name, seed)
            yield Trial(folder, arch, seed, updates, validate, options, "test", sampling)
        folder = trial_folder(work, "transformer", seed)
        yield Trial(folder, f"transformer_{size}", seed, updates, validate, {}, "test", beams)


def sweep_trials(work: Path, plan: dict[str, Any]) -> Iterator[Trial]:
    """Yield the open choices, on validation data."""
    steps = ["--steps", FEW_STEPS]
    clamps = {f"clamp {form}": [*steps, "--clamp", form] for form in CLAMPS[1:]}
    grids = {f"grid {grid}": [*steps, "--time-grid", grid] for grid in GRIDS[1:]}
    colder = {f"temperature {t}": [*steps, "--temperature", t] for t in TEMPERATURES[1:]}
    for seed in range(1, plan["sweep_seeds"] + 1):
        trials = {"base": (BASE, {"default": steps} | clamps | grids | colder)}
        for name, settings in SWEEPS.items():
            sampling = {"default": steps} | (clamps if name == "Self-conditioning" else {})
            for setting, changes in settings.items():
                trials[f"{name} {setting}"] = (BASE | changes, sampling)
        for name, (options, sampling) in trials.items():
            folder = trial_folder(work, f"sweep/{name}", seed)
            updates = plan["sweep_updates"]
            yield Trial(folder, "fastdiss_tiny", seed, updates, updates, options, "valid", sampling)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus")
    parser.add_argument("work", type=Path)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", choices=("sweep", "variants", "speed"))
    arguments = parser.parse_args()
    config = HERE / f"{arguments.corpus}.yaml"
    plan = yaml.safe_load((HERE / "plan.yaml").read_text())[arguments.corpus]
    work = arguments.work
    note = work / "machine.txt"
    if not note.exists():
        device = pick_device("auto")
        dtype = dtype_name(pick_dtype("auto", device))
        note.write_text(f"{machine(device)}, {dtype}\n", encoding="utf-8")
    trials = []
    if arguments.only in (None, "sweep"):
        trials += sweep_trials(work, plan)
    if arguments.only in (None, "variants"):
        trials += variant_trials(work, plan)
    if arguments.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // arguments.jobs, 1))
    with ThreadPoolExecutor(arguments.jobs) as pool:
        done = {pool.submit(trial.run, config, work / "data-bin"): trial for trial in trials}
        for future in as_completed(done):
            if future.exception() is not None:  # the others need not begin
                pool.shutdown(cancel_futures=True)
            future.result()
            print(done[future].folder, file=sys.stderr)
    if arguments.jobs > 1:
        del os.environ["OMP_NUM_THREADS"]  # speed is that of the whole machine
    if arguments.only in (None, "speed"):
        measure_speed(work, work / "data-bin", plan)


if __name__ == "__main__":
    main()
