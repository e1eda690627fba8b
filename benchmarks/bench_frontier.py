"""Memory and time of a step of every way to learn a word, side by side: which one for which machine.

    python benchmarks/bench_frontier.py                              # Stable Diffusion 1.5 at 256 and 512 px
    python benchmarks/bench_frontier.py --rows paper gradient --resolutions 256
    python benchmarks/bench_frontier.py --architecture sdxl --resolutions 512

Each row is a fresh process on a real architecture with random weights: the training script, or diffusers' Textual
Inversion in float32 (`baselines.py`), for three steps on one thread. What the kernel says of its memory is sampled;
the CPU seconds of a step are those of the last two, in a process that is not sampled by anything else. The rows take
turns, so that whatever else the machine does meets all alike. `benchmarks/results/frontier_cpu.json` is written after
every row; a rerun replaces its own entries.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import bench_memory, common
from benchmarks.common import CACHE, DEMO, RESULTS
from benchmarks.watching import last_json, summarize, watch


# isort: split
import train_zoodip_textual_inversion as zoodip
from benchmarks import random_base


STEPS = 3
INT8 = {"quantization": "int8"}
GN = {**INT8, "optimizer": "gauss_newton"}
GRADIENT = {**INT8, "optimizer": "gradient"}
ROWS = {
    "paper": INT8,
    "paper-one-candidate": {**INT8, "max_candidates_per_forward": 1},
    "paper-low-vram": {**INT8, "low_vram": True},
    "gauss-newton": {**GN, "mixed_precision": "no"},
    "gauss-newton-bf16": {**GN, "mixed_precision": "bf16"},
    "gauss-newton-openvino": {**GN, "unet_backend": "openvino", "mixed_precision": "no"},
    "gauss-newton-openvino-bf16": {**GN, "unet_backend": "openvino", "mixed_precision": "bf16"},
    "gradient": GRADIENT,
    "gradient-layer": {**GRADIENT, "gradient_checkpointing": "layer"},
    "gradient-window": {**GRADIENT, "bp_view": "window"},
    "gradient-low-vram": {**GRADIENT, "low_vram": True},
    "gradient-bf16": {**GRADIENT, "mixed_precision": "bf16"},
    "gradient-everything-kept": {**GRADIENT, "gradient_checkpointing": "none"},
    "ti-fp32": None,  # diffusers' own way, see baselines.py
}
KEY = ("architecture", "row", "resolution")


def run_script(words):
    """`--script`: the training script in this process, which prints the CPU seconds of each step."""
    original, seconds = zoodip.train_step, []

    def timed(*rest, **named):
        started = time.process_time()
        loss = original(*rest, **named)
        loss.item()
        seconds.append(round(time.process_time() - started, 2))
        return loss

    zoodip.train_step = timed
    zoodip.main(zoodip.parse_args(words))
    print(json.dumps({"cpu_seconds_of_steps": seconds}))


def run_baseline(settings):
    """`--baseline`: gradient Textual Inversion in float32, likewise."""
    from benchmarks import baselines

    loop, seconds = baselines.GradientTextualInversion(settings.pop("base"), device="cpu", **settings), []
    print("phase: training")
    for _ in range(STEPS):
        started = time.process_time()
        loop.step().item()
        seconds.append(round(time.process_time() - started, 2))
    print("phase: results")
    print(json.dumps({"cpu_seconds_of_steps": seconds}))


def command_of(name, base, images, output, resolution):
    """The words of a row's process."""
    here = [sys.executable, str(Path(__file__).resolve())]
    if ROWS[name] is None:
        settings = {"base": str(base), "resolution": resolution, "batch_size": 1}
        return [*here, "--baseline", json.dumps(settings)]
    row = bench_memory.Row("script", {**ROWS[name], "max_train_steps": STEPS})
    flags = bench_memory.script_flags(row, base, images, output, CACHE / "quantized", resolution, 2, 1)
    return [*here, "--script", *flags]


def measure(name, base, resolution, imports):
    """A row's `Watched` process and its figures."""
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="memory-") as scratch:
        scratch = Path(scratch)
        common.make_pictures(scratch / "images", 2)
        command = command_of(name, base, scratch / "images", scratch / "output", resolution)
        watched = watch(command, "cpu")
        if any("once, into" in line for _, line in watched.lines):  # it has filled the cache; now it is filled
            watched = watch(command, "cpu")
        return command, {"measured": summarize(watched, imports), **last_json(watched)}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--architecture",
        choices=[*random_base.ARCHITECTURES, "demo"],
        default="sd15",
        help="Model, with random weights.",
    )
    add("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="Rows to measure. Default: all.")
    add("--resolutions", nargs="+", type=int, default=[256, 512], help="Sides of the pictures.")
    add("--output", type=Path, default=RESULTS / "frontier_cpu.json", help="File of the results.")
    add("--baseline", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    if "--script" in sys.argv:
        return run_script(sys.argv[sys.argv.index("--script") + 1 :])
    args = parse_args()
    if args.baseline:
        return run_baseline(json.loads(args.baseline))
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    CACHE.mkdir(exist_ok=True)
    demo = args.architecture == "demo"
    base = DEMO / "base" if demo else random_base.build(args.architecture, CACHE / args.architecture)
    imports = summarize(watch([sys.executable, "-c", bench_memory.IMPORTS], "cpu"))
    for resolution in args.resolutions:
        for name in args.rows:
            try:
                command, result = measure(name, base, resolution, imports)
            except RuntimeError as error:  # memory ended, say: the other rows go on
                print(f"{name} failed: {str(error)[-300:]}", flush=True)
                continue
            entry = dict(zip(KEY, (args.architecture, name, resolution))) | common.provenance(command) | result
            entry["imports_peak_rss_mb"] = imports["peak_rss_mb"]
            common.put(args.output, [entry], KEY, lambda e: [str(e[k]).rjust(6, "0") for k in KEY], steps=STEPS)
            measured = result["measured"]
            figures = f"{measured['peak_anonymous_above_imports_mb']:6.0f} MB, {result['cpu_seconds_of_steps'][1:]} s"
            print(f"{args.architecture} {resolution} px {name:28} {figures}", flush=True)


if __name__ == "__main__":
    main()
