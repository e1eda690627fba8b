"""Memory and time of BP-low, ZO-high and backpropagation at full size: whole processes, Stable Diffusion 1.5.

    python benchmarks/bench_selective.py                          # every row: half an hour on two idle cores, 16 GB
    python benchmarks/bench_selective.py --rows bp-high selective
    python benchmarks/bench_selective.py --base BASE --cache_dir CACHE     # weights and INT8 weights that are there

Each row is a fresh process, `train_selective_dreambooth_lora.py` for one step on random weights, and this process
samples what the kernel says about it (as `bench_memory.py` does). The rows called selective take one step of each
kind. The row called naive computes with the flagship's layers, whose dequantized weights autograd keeps. MB are 2^20
bytes.

The result, `benchmarks/results/selective_memory.json` (or `selective_memory_cuda.json`), is written after every row; a
rerun replaces its own entries. On a CPU the time of a step is that of the CPU (user and system), so that other
processes disturb it little; on CUDA it is that of the clock.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import common
from benchmarks.common import CACHE, RESULTS, as_words
from benchmarks.random_base import build
from benchmarks.watching import MB, summarize, watch


# isort: split
import psutil
import torch

import train_selective_dreambooth_lora as script


KEY = ("row", "resolution", "batch_size")
STEPS = 1  # what AdamW keeps from then on is two numbers for each adapter weight, 6 MB at rank 4
PERTURBATIONS = 2  # they come one after the other: memory does not depend on their number, and time grows with it
CPU_SECONDS = "seconds of the steps: "
IMPORTS = (
    "import train_selective_dreambooth_lora; from personalization.models import memory; print(memory.process_memory())"
)

BP = {"bp_timestep_midpoint": 100, "bp_progress_midpoint": 100}
ZO = {"bp_timestep_midpoint": -100}
BOTH = {"max_train_steps": 2, "bp_timestep_midpoint": 100}  # first BP, then ZO:
BOTH |= {"bp_progress_midpoint": 0.25, "bp_progress_width": 1e-3}
CHECKPOINTING = {"gradient_checkpointing": True}
FULL = "full"  # as low_resolution: that of the row
ROWS = {
    "naive-bp-high": BP | {"low_resolution": FULL},
    "bp-high": BP | {"low_resolution": FULL},
    "bp-high-checkpointing": BP | {"low_resolution": FULL} | CHECKPOINTING,
    "bp-low": BP,
    "bp-low-checkpointing": BP | CHECKPOINTING,
    "bp-window": {"bp_view": "window"},
    "bp-window-checkpointing": {"bp_view": "window"} | CHECKPOINTING,
    "zo-high": ZO,
    "selective": BOTH,
    "selective-checkpointing": BOTH | CHECKPOINTING,
}


def run_row(words, naive):
    """`--row`: the script in this process, which prints how long each step took."""
    if naive:
        script.frozen.hand_gradients_through = lambda model: model
    original, steps = script.train_step, []

    def timed(learner, model, *rest):
        clock = time.process_time if model.compute.device.type == "cpu" else time.perf_counter
        started = clock()
        kind, loss = original(learner, model, *rest)
        loss.item()  # waits for the device
        steps.append((kind, round(clock() - started, 2)))
        return kind, loss

    script.train_step = timed
    script.main(script.parse_args(words))
    print(CPU_SECONDS + json.dumps(steps))


def measure(name, resolution, batch_size, base, cache, device, imports):
    """One row: command, `Watched` and what to store."""
    flags = {flag: resolution if value == FULL else value for flag, value in ROWS[name].items()}
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="memory-") as scratch:
        scratch = Path(scratch)
        common.make_pictures(scratch / "images", 1)
        given = {
            "pretrained_model_name_or_path": base,
            "instance_data_dir": scratch / "images",
            "instance_prompt": "a photo of a star",
            "output_dir": scratch / "output",
            "quantized_cache_dir": cache,
            "resolution": resolution,
            "train_batch_size": batch_size,
            "max_train_steps": STEPS,
            "num_perturbations": PERTURBATIONS,
            "report_to": "none",
            **flags,
        }
        mode = "--row-naive" if name.startswith("naive") else "--row"
        command = [sys.executable, str(Path(__file__).resolve()), mode, *as_words(given)]
        watched = watch(command, device)
        if any("once, into" in line for _, line in watched.lines):
            shutil.rmtree(scratch / "output")
            watched = watch(command, device)  # that run has filled the cache; this one finds it filled
        config = json.loads((scratch / "output" / script.PUBLICATION.config_name).read_text())
    (steps,) = (json.loads(line.split(CPU_SECONDS)[1]) for _, line in watched.lines if CPU_SECONDS in line)
    result = {
        "measured": summarize(watched, imports),
        "reported": config["figures"]["peak_memory"],
        "seconds_of_steps": steps,
        "trained_weights": config["figures"]["trained_weights"],
        "low_resolution": config["settings"]["low_resolution"],
        "num_perturbations": config["settings"]["num_perturbations"],
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }
    return command, watched, result


def order(entry):
    return entry["resolution"] or 0, ["imports", *ROWS].index(entry["row"])


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="Which.")
    add("--resolution", type=int, default=512, help="Of the pictures; BP-low has half of it.")
    add("--batch_size", type=int, default=1, help="Examples a step.")
    add("--base", type=Path, help="Folder by random_base.py. Default: made in benchmarks/.cache.")
    add("--cache_dir", type=Path, default=CACHE / "quantized", help="Folder of its INT8 weights, filled if empty.")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu", help="Of models.")
    add("--output", type=Path, help="Default: benchmarks/results/selective_memory.json, or ..._cuda.json.")
    args = parser.parse_args()
    suffix = "_cuda" if args.device == "cuda" else ""
    args.output = args.output or RESULTS / f"selective_memory{suffix}.json"
    return args


def main():
    if sys.argv[1:2] in (["--row"], ["--row-naive"]):
        return run_row(sys.argv[2:], sys.argv[1] == "--row-naive")
    args = parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    common.warn_if_busy()
    base = args.base or build("sd15", CACHE / "sd15")

    def finish(key, command, result):
        entry = {**dict(zip(KEY, key)), **common.provenance(command, args.device), **result}
        common.put(args.output, [entry], KEY, order, unit="MB = 2**20 bytes")

    command = [sys.executable, "-c", IMPORTS]
    imports = summarize(watch(command, args.device))
    finish(("imports", None, None), command, {"measured": imports})
    failed = {}
    for name in args.rows:
        free = psutil.virtual_memory().available // MB
        what = args.resolution, args.batch_size, base, args.cache_dir, args.device, imports
        try:
            command, watched, result = measure(name, *what)
        except RuntimeError as error:  # out of memory, say: the other rows go on
            failed[name] = str(error)
            print(f"{name} failed: {error}", flush=True)
            continue
        result |= {"seconds": round(watched.seconds, 1), "free_before_mb": free}
        finish((name, args.resolution, args.batch_size), command, result)
        measured = result["measured"]
        print(
            f"{name:26}peak {measured['peak_rss_mb']:7.0f} MB, anonymous above imports"
            f" {measured['peak_anonymous_above_imports_mb']:7.0f} MB, steps {result['seconds_of_steps']}",
            flush=True,
        )
    if failed:
        raise SystemExit(f"Failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
