"""Peak memory of whole processes, loading included, and whether `--estimate_memory` had predicted it.

    python benchmarks/bench_memory.py                          # Stable Diffusion 1.5, every row: an hour on two cores
    python benchmarks/bench_memory.py --reduced                # or: make benchmark; some minutes
    python benchmarks/bench_memory.py --rows int8 nf4 official --resolutions 512

Each row is a fresh process on a real architecture with random weights: the training script itself, the official loop
or gradient Textual Inversion (`baselines.py`), all for two steps, or the loading of the UNet alone. While it runs,
this process samples what the kernel says about it. MB are 2^20 bytes.

The result, `benchmarks/results/memory_cpu.json` (or `memory_cuda.json`), is written after every row; a rerun replaces
its own entries (same architecture, row, resolution, n and batch size) and keeps the others.
"""

import argparse
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks import common
from benchmarks.common import CACHE, DEMO, RESULTS, ROOT, as_words
from benchmarks.watching import SAMPLE_SECONDS, last_json, megabytes, summarize, watch


# isort: split
import torch

import train_zoodip_textual_inversion as zoodip
from benchmarks import baselines, random_base
from personalization.models import memory
from personalization.models.base_model import ModelSource, empty_model, open_base
from personalization.models.compute import choose_compute


SCRIPT = ROOT / "train_zoodip_textual_inversion.py"
STEPS = 2  # the second step of gradient Textual Inversion holds AdamW's moments, too
KEY = ("architecture", "row", "resolution", "num_perturbations", "batch_size")
IMPORTS = (
    "import train_zoodip_textual_inversion; from personalization.models import memory; print(memory.process_memory())"
)
# The script's own --estimate_memory, with its figures as JSON instead of a table.
ESTIMATE = """
import dataclasses, json
import train_zoodip_textual_inversion as zoodip
from personalization.models.memory import MemoryPrediction
MemoryPrediction.table = lambda self: json.dumps(dataclasses.asdict(self) | {"peak": self.peak})
zoodip.main(zoodip.parse_args())
"""


class Row(NamedTuple):
    """What one process does: "script", "official", "ti" or "load", with flags (script) or keyword arguments."""

    kind: str
    settings: dict
    cache: str = "kept"  # --quantized_cache_dir: a folder that stays filled, a "fresh" one, or "none"
    num_perturbations: int | None = None  # instead of the command line's
    cpu_only: bool = False


OPENVINO = {"quantization": "int8", "unet_backend": "openvino"}
GAUSS_NEWTON = {"quantization": "int8", "optimizer": "gauss_newton"}
DIFFERENCES = {**GAUSS_NEWTON, "perturbation_scale": 3e-4}
IN_BFLOAT16, ONE_PASS = {"mixed_precision": "bf16", "perturbation_scale": 5e-2}, {"gn_subspace_dimension": 7}
IN_FLOAT32 = {"mixed_precision": "no", **ONE_PASS}
VALIDATION = {"validation_prompt": "a photo of {}", "num_validation_images": 1, "num_inference_steps": 1}
ROWS = {
    "int8-first": Row("script", {"quantization": "int8"}, "fresh"),
    "int8": Row("script", {"quantization": "int8"}),
    "int8-no-cache": Row("script", {"quantization": "int8"}, "none"),
    "int8-bf16": Row("script", {"quantization": "int8", "mixed_precision": "bf16"}),
    "int8-low-vram": Row("script", {"quantization": "int8", "low_vram": True}),
    "int8-images": Row("script", {"quantization": "int8", **VALIDATION}),
    "int8-n8": Row("script", {"quantization": "int8"}, num_perturbations=8),
    "int8-gauss-newton": Row("script", {**DIFFERENCES, "max_candidates_per_forward": 3}),  # as n = 2 has
    # One pass a step, of 9 rows; more directions are more passes.
    "int8-gauss-newton-differences": Row("script", {**DIFFERENCES, **ONE_PASS}),
    "int8-gauss-newton-exact": Row("script", {**GAUSS_NEWTON, **ONE_PASS}),
    "int8-gauss-newton-bf16-differences": Row("script", {**DIFFERENCES, **ONE_PASS, **IN_BFLOAT16}),
    "int8-gauss-newton-bf16-exact": Row("script", {**GAUSS_NEWTON, **ONE_PASS, "mixed_precision": "bf16"}),
    "int8-gradient": Row("script", {"quantization": "int8", "optimizer": "gradient"}),
    "int8-gradient-kept": Row(
        "script", {"quantization": "int8", "optimizer": "gradient", "gradient_checkpointing": "none"}
    ),
    "int8-n8-split": Row("script", {"quantization": "int8", "max_candidates_per_forward": 1}, num_perturbations=8),
    "nf4": Row("script", {"quantization": "nf4"}),
    "quanto-int8": Row("script", {"quantization": "quanto-int8"}),
    "none": Row("script", {"quantization": "none"}),
    "none-low-vram": Row("script", {"quantization": "none", "low_vram": True}),
    "openvino-first": Row("script", OPENVINO, "fresh", cpu_only=True),
    "openvino": Row("script", OPENVINO, cpu_only=True),
    "openvino-gauss-newton-differences": Row("script", {**OPENVINO, **DIFFERENCES, **IN_FLOAT32}, cpu_only=True),
    "openvino-gauss-newton-exact": Row("script", {**OPENVINO, **GAUSS_NEWTON, **IN_FLOAT32}, cpu_only=True),
    "official": Row("official", {}),
    "ti-fp32": Row("ti", {"dtype": "float32"}),
    "ti-fp32-checkpointing": Row("ti", {"dtype": "float32", "gradient_checkpointing": True}),
    "ti-bf16": Row("ti", {"dtype": "bfloat16"}),
    "ti-bf16-checkpointing": Row("ti", {"dtype": "bfloat16", "gradient_checkpointing": True}),
    "load-int8-first": Row("load", {}, "fresh"),
    "load-int8-no-cache": Row("load", {}, "none"),
    "load-int8": Row("load", {}),
}
REDUCED = ["int8", "openvino", "none", "official", "ti-fp32"]


# =====================================================================================================
# What the processes do
# =====================================================================================================


def script_flags(row, base, images, output, cache, resolution, n, batch_size):
    """The training script's arguments."""
    flags = {
        "pretrained_model_name_or_path": base,
        "train_data_dir": images,
        "output_dir": output,
        "placeholder_token": "<my-toy>",
        "initializer_token": "star",
        "quantized_cache_dir": cache,
        "resolution": resolution,
        "num_perturbations": n,
        "train_batch_size": batch_size,
        "max_train_steps": STEPS,
        "num_validation_samples": 0,
        "report_to": "none",
        **row.settings,
    }
    if flags.get("optimizer", "zo_adam") != "zo_adam":
        del flags["num_perturbations"]
    return as_words(flags)


def run_child(kind, settings):
    """`--child`: a baseline or the loading of the UNet, in this process; prints a JSON object at the end."""
    base, device = settings.pop("base"), settings.pop("device")
    if kind == "load":
        load_unet(base, torch.device(device), settings.pop("cache"))
        return
    dtype = getattr(torch, settings.pop("dtype", "float16" if device == "cuda" else "float32"))
    make = baselines.OfficialLoop if kind == "official" else baselines.GradientTextualInversion
    loop = make(base, device=device, dtype=dtype, **settings)
    print("phase: training")
    for _ in range(STEPS):
        print(f"loss {loop.step().item():.4f}")
    print("phase: results")
    print(json.dumps(memory.peak_memory(torch.device(device))))


def load_unet(name, device, cache):
    """Loads the INT8 UNet as the script does, and says how large it and its largest layer in float32 are."""
    memory.prepare_loading()  # as `main` does
    base, backend = open_base(ModelSource(name)), zoodip.BACKENDS["int8"]
    compute, _ = choose_compute(device)
    cache_dir = None if cache == "none" else cache
    layers = [layer for layer in empty_model(base, "unet").modules() if backend.quantizes(layer)]
    largest = 4 * max(layer.weight.numel() for layer in layers)
    print("phase: loading")
    time.sleep(10 * SAMPLE_SECONDS)  # what was there before must be sampled
    started = time.perf_counter()
    unet, _ = zoodip.load_frozen(base, "unet", backend, compute, cache_dir)
    seconds = time.perf_counter() - started
    time.sleep(10 * SAMPLE_SECONDS)
    print("phase: results")
    facts = {"quantized_mb": megabytes(memory.tensor_bytes(unet)), "largest_layer_mb": megabytes(largest)}
    print(json.dumps({**facts, "load_seconds": round(seconds, 1)}))


def predict(flags, device):
    """What `--estimate_memory` says about a run with the same flags, in MB."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    said = common.run([sys.executable, "-c", ESTIMATE, *flags, "--estimate_memory"], **hidden)
    figures = json.loads(said.splitlines()[-1])
    figures.pop("denoiser_label")
    libraries, phases = figures["libraries"], figures.pop("phases")  # a phase of 0 bytes does not take place
    sums = {f"while {name}": megabytes(size + libraries) for name, size in phases.items() if size}
    return {name: megabytes(size) for name, size in figures.items()} | sums


def measure_script(row, where, place, device, imports):
    """The training script in a process of its own, beside its own prediction."""
    output, cache = place["scratch"] / "output", place[row.cache]
    flags = script_flags(row, place["base"], place["images"], output, cache, *where[2:])
    predicted = predict(flags, device)
    command = [sys.executable, str(SCRIPT), *flags]
    watched = watch(command, device)
    if row.cache == "kept" and any("once, into" in line for _, line in watched.lines):
        watched = watch(command, device)  # that run has filled the cache; this one finds it filled
    config = json.loads((output / "zoodip_config.json").read_text())
    shutil.rmtree(output)
    measured = summarize(watched, imports)
    training = measured["phases"]["training"]
    measured["activations_mb"] = round(training["peak_anonymous_mb"] - training["anonymous_at_begin_mb"], 1)
    measured["reported"] = config["figures"]["peak_memory"]
    measured["components_mb"] = {name: megabytes(c["bytes"]) for name, c in config["components"].items()}
    # On CUDA the prediction is of tensors; the CUDA context and the allocator's reserve are not part of it.
    peak = measured["peak_rss_mb"] if device == "cpu" else measured["reported"]["cuda_allocated_mb"]
    deviation = round(100 * (predicted["peak"] / peak - 1), 1)
    return command, watched, {"measured": measured, "predicted_mb": predicted, "deviation_percent": deviation}


def measure_child(row, where, place, device, imports):
    """A baseline, or the loading of the UNet."""
    _, _, resolution, n, batch_size = where
    settings = {"base": str(place["base"]), "device": device, **row.settings}
    if row.kind == "load":
        settings["cache"] = str(place[row.cache])
    else:
        settings |= {"resolution": resolution, "batch_size": batch_size}
    if row.kind == "official":
        settings["num_perturbations"] = n
    command = [sys.executable, str(Path(__file__).resolve()), "--child", row.kind, json.dumps(settings)]
    watched = watch(command, device)
    if row.kind == "load" and row.cache == "kept" and any("once, into" in line for _, line in watched.lines):
        watched = watch(command, device)
    measured = summarize(watched, imports)
    if row.kind != "load":
        return command, watched, {"measured": {**measured, "reported": last_json(watched)}}
    facts, loading = last_json(watched), measured["phases"]["loading"]
    begin = {"rss": loading["rss_at_begin_mb"], "anonymous": loading["anonymous_at_begin_mb"]}
    for name, size in begin.items():
        peak = max(phase[f"peak_{name}_mb"] for phase in measured["phases"].values())
        facts[f"peak_{name}_above_start_mb"] = round(peak - size, 1)
    facts["bound_mb"] = round(1.1 * (facts["quantized_mb"] + facts["largest_layer_mb"]), 1)
    facts["within_bound"] = facts["peak_rss_above_start_mb"] <= facts["bound_mb"]
    return command, watched, {"measured": measured, "loading": facts}


# =====================================================================================================
# Results
# =====================================================================================================


def order(entry):
    return [str(entry[name] or "").rjust(6, "0") for name in KEY]


def print_entry(entry):
    key = [str(entry[name] if entry[name] is not None else "-") for name in KEY]
    measured = entry["measured"]
    line = f"{key[0]:6}{key[1]:24}{key[2]:>4} px  n={key[3]:2} b={key[4]:2}"
    line += f"peak {measured['peak_rss_mb']:7.0f} MB, anonymous {measured['peak_anonymous_mb']:7.0f} MB"
    if "reported" in measured and "cuda_allocated_mb" in measured["reported"]:
        reported = measured["reported"]
        line += f", CUDA {reported['cuda_allocated_mb']} MB ({reported['cuda_reserved_mb']} MB reserved)"
    if "predicted_mb" in entry:
        line += f", predicted {entry['predicted_mb']['peak']:7.0f} MB ({entry['deviation_percent']:+.1f} %)"
    if "loading" in entry:
        facts = entry["loading"]
        line += f", loading +{facts['peak_rss_above_start_mb']:.0f} MB of {facts['bound_mb']:.0f} MB allowed"
    print(line + f", {entry['seconds']:.0f} s", flush=True)


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add(
        "--architecture",
        choices=[*random_base.ARCHITECTURES, "demo"],
        default="sd15",
        help="demo: the repository's small base.",
    )
    add("--rows", nargs="+", choices=list(ROWS), help="Default: all that make sense on the device.")
    add("--resolutions", nargs="+", type=int, help="Default: 256 and 512 px, or 64 px for demo.")
    add("--num_perturbations", type=int, default=2, help="n, unless the row has its own.")
    add("--batch_sizes", nargs="+", type=int, default=[1], help="Examples a step.")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu", help="Of models.")
    add("--reduced", action="store_true", help=f"Only {', '.join(REDUCED)} of SD 1.5 at 256 px.")
    add("--output", type=Path, help="Default: benchmarks/results/memory_DEVICE.json.")
    add("--child", nargs=2, metavar=("KIND", "JSON"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.reduced:
        args.architecture, args.resolutions = "sd15", [256]
    rows = args.rows or (REDUCED if args.reduced else list(ROWS))
    args.rows = [name for name in rows if args.device == "cpu" or not ROWS[name].cpu_only]
    args.resolutions = args.resolutions or ([64] if args.architecture == "demo" else [256, 512])
    args.output = args.output or RESULTS / f"memory_{args.device}.json"
    return args


def list_keys(args):
    """Every (architecture, row, resolution, n, batch size); what loading does not depend on is None."""
    keys = []
    for name, resolution, batch_size in itertools.product(args.rows, args.resolutions, args.batch_sizes):
        row = ROWS[name]
        n = row.num_perturbations or args.num_perturbations if row.kind in ("script", "official") else None
        keys.append((args.architecture, name, *((None,) * 3 if row.kind == "load" else (resolution, n, batch_size))))
    return list(dict.fromkeys(keys))


def main():
    args = parse_args()
    if args.child:
        return run_child(args.child[0], json.loads(args.child[1]))
    if not Path("/proc/self/status").is_file():
        raise SystemExit("bench_memory.py reads /proc/PID/status: it needs Linux.")
    started = time.monotonic()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    common.warn_if_busy()
    demo = args.architecture == "demo"
    base = DEMO / "base" if demo else random_base.build(args.architecture, CACHE / args.architecture)

    def finish(key, command, watched, result):
        entry = {**dict(zip(KEY, key)), **common.provenance(command, args.device), **result}
        entry |= {"seconds": round(watched.seconds, 1)}
        common.put(args.output, [entry], KEY, order, unit="MB = 2**20 bytes", steps=STEPS)
        print_entry(entry)

    command = [sys.executable, "-c", IMPORTS]
    watched = watch(command, args.device)
    imports = summarize(watched)
    finish((None, "imports", None, None, None), command, watched, {"measured": imports})
    failed = {}
    CACHE.mkdir(exist_ok=True)
    for key in list_keys(args):
        row = ROWS[key[1]]
        with tempfile.TemporaryDirectory(dir=CACHE, prefix="memory-") as scratch:
            scratch = Path(scratch)
            place = {"base": base, "scratch": scratch, "images": scratch / "images", "fresh": scratch / "fresh"}
            place |= {"none": "none", "kept": CACHE / "quantized"}
            common.make_pictures(place["images"], 2)
            try:
                measure = measure_script if row.kind == "script" else measure_child
                finish(key, *measure(row, key, place, args.device, imports))
            except RuntimeError as error:  # a library is missing, say: the other rows go on
                failed[key[1]] = str(error)
                print(f"{key[1]} failed: {error}", flush=True)
    print(f"Wrote {args.output} after {time.monotonic() - started:.0f} s")
    if failed:
        raise SystemExit(f"Failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
