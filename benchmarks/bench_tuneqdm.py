"""Memory and time of TuneQDM's training beside the official way: whole processes, Stable Diffusion 1.5's architecture.

    python benchmarks/bench_tuneqdm.py                              # every row: half an hour on two idle cores, 16 GB
    python benchmarks/bench_tuneqdm.py --rows int8 int8-checkpointing official-peqa

Each row is a fresh process, `train_tuneqdm_dreambooth.py` for two steps on random weights, and this process samples
what the kernel says about it (as `bench_memory.py` does). The rows called official are the same script with the same
integer weights in memory, but layers that compute as the official code does: they dequantize their weight under
autograd, which keeps the result and the factors for the backward pass. MB are 2^20 bytes.

The result, `benchmarks/results/tuneqdm_memory.json` (or `tuneqdm_memory_cuda.json`), is written after every row; a
rerun replaces its own entries. Times of a machine that does other things, too, say little: the load is noted.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks import common
from benchmarks.common import CACHE, RESULTS, ROOT, as_words
from benchmarks.random_base import build
from benchmarks.watching import MB, summarize, watch


# isort: split
import psutil
import torch
import torch.nn.functional as F

import train_tuneqdm_dreambooth as script
import tuneqdm_pipeline as tuneqdm
from personalization.models import memory


SCRIPT = ROOT / "train_tuneqdm_dreambooth.py"
KEY = ("row", "resolution", "batch_size")
STEPS = 2  # the second has AdamW's moments beside it
BATCH_SIZE = 1  # the official layers have one set of scales for a batch
IMPORTS = "import train_tuneqdm_dreambooth; from personalization.models import memory; print(memory.process_memory())"

TUNEQDM = {"scale_sets": 4, "train_input_scales": True}  # the official script's setting
CHECKPOINTING = {"gradient_checkpointing": True}
ROWS = {  # flags, and whether the layers are the official ones
    "int8": ({}, False),
    "int8-checkpointing": (CHECKPOINTING, False),
    "int8-tuneqdm": (TUNEQDM, False),
    "int8-tuneqdm-checkpointing": (TUNEQDM | CHECKPOINTING, False),
    "int4-checkpointing": ({"bits": 4} | CHECKPOINTING, False),
    "official-peqa": ({}, True),
    "official-peqa-checkpointing": (CHECKPOINTING, True),
    "official-tuneqdm": (TUNEQDM, True),
    "official-tuneqdm-checkpointing": (TUNEQDM | CHECKPOINTING, True),
}


def official_forward(self, input):
    """A `QuantizedLayer` as the official code computes it: one set for the batch, the weight under autograd."""
    if self.bits == 4:
        space = torch.empty(self.shape.numel(), dtype=input.dtype, device=input.device)
        integers = tuneqdm.unpack(self.integers, space).view(self.shape)
    else:
        integers = self.integers.to(input.dtype)
    out_change, in_change = (self.selection.choose(change) for change in (self.out_change, self.in_change))
    rest = [1] * (len(self.shape) - 2)
    weight = (integers - self.zero.to(input.dtype)) * (self.scale * (1 + out_change).view(-1, 1, *rest)).to(
        input.dtype
    )
    if in_change is not None:
        weight = weight * (1 + in_change).view(1, -1, *rest).to(input.dtype)
    if self.channel == -1:
        return F.linear(input, weight, self.bias)
    return F.conv2d(input, weight, self.bias, *self.options)


def run_official(words):
    """`--official`: the script with official layers, in this process, and with a heap as the system manages it."""
    memory.prepare_training = lambda **_: memory.keep_freed_memory(32, 64)  # what glibc comes to
    tuneqdm.QuantizedLayer.forward = official_forward
    script.main(script.parse_args(words))


def measure(name, resolution, base, device, imports):
    """One row: command, `Watched` and what to store."""
    flags, official = ROWS[name]
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="memory-") as scratch:
        scratch = Path(scratch)
        common.make_pictures(scratch / "images", 2)
        given = {
            "pretrained_model_name_or_path": base,
            "instance_data_dir": scratch / "images",
            "instance_prompt": "a photo of a star",
            "output_dir": scratch / "output",
            "quantized_cache_dir": CACHE / "quantized",
            "resolution": resolution,
            "train_batch_size": BATCH_SIZE,
            "max_train_steps": STEPS,
            "report_to": "none",
            **flags,
        }
        start = [str(Path(__file__).resolve()), "--official"] if official else [str(SCRIPT)]
        command = [sys.executable, *start, *as_words(given)]
        watched = watch(command, device)
        if any("once, into" in line for _, line in watched.lines):
            shutil.rmtree(scratch / "output")
            watched = watch(command, device)  # that run has filled the cache; this one finds it filled
        config = json.loads((scratch / "output" / tuneqdm.CONFIG_FILE).read_text())
    figures = config["figures"]
    result = {
        "measured": summarize(watched, imports),
        "reported": figures["peak_memory"],
        "seconds_per_step": round(figures["seconds"] / figures["steps"], 2),
        "trained_scales": figures["trained_scales"],
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
    add("--resolution", type=int, default=512, help="Of the pictures.")
    add("--base", type=Path, help="Folder by random_base.py. Default: made in benchmarks/.cache.")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu", help="Of models.")
    add("--output", type=Path, help="Default: benchmarks/results/tuneqdm_memory.json, or ..._cuda.json.")
    args = parser.parse_args()
    suffix = "_cuda" if args.device == "cuda" else ""
    args.output = args.output or RESULTS / f"tuneqdm_memory{suffix}.json"
    return args


def main():
    if sys.argv[1:2] == ["--official"]:
        return run_official(sys.argv[2:])
    args = parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    common.warn_if_busy()
    base = args.base or build("sd15", CACHE / "sd15")

    def finish(key, command, result):
        entry = {**dict(zip(KEY, key)), **common.provenance(command, args.device), **result}
        common.put(args.output, [entry], KEY, order, unit="MB = 2**20 bytes", steps=STEPS)

    command = [sys.executable, "-c", IMPORTS]
    imports = summarize(watch(command, args.device))
    finish(("imports", None, None), command, {"measured": imports})
    failed = {}
    for name in args.rows:
        free = psutil.virtual_memory().available // MB
        try:
            command, watched, result = measure(name, args.resolution, base, args.device, imports)
        except RuntimeError as error:  # out of memory, say: the other rows go on
            failed[name] = str(error)
            print(f"{name} failed: {error}", flush=True)
            continue
        result |= {"seconds": round(watched.seconds, 1), "free_before_mb": free}
        finish((name, args.resolution, BATCH_SIZE), command, result)
        measured = result["measured"]
        print(
            f"{name:32}peak {measured['peak_rss_mb']:7.0f} MB, anonymous above imports"
            f" {measured['peak_anonymous_above_imports_mb']:7.0f} MB, {result['seconds_per_step']:.1f} s a step",
            flush=True,
        )
    if failed:
        raise SystemExit(f"Failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
