"""Trains a few steps on real photos with the Stable Diffusion 1.5 architecture (random weights), INT8, 512 px.

    python benchmarks/bench_real_photos.py --photos ../shared/data/dreambooth/dog6     # or: make bench-real-photos

Runs the real script by `accelerate launch` in a fresh process and stores what it reports (seconds per step, bytes of
every component, peak memory of the whole process) in `benchmarks/results/real_photos.json`, with the peak memory of a
process that only imports the same libraries beside it.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

from random_base import HERE, build


SCRIPT = HERE.parent / "train_zoodip_textual_inversion.py"
BARE_IMPORT = """
import torch
import train_zoodip_textual_inversion
from personalization import memory
print(memory.peak_memory(torch.device("cpu"))["process_mb"])
"""


def cpu_name():
    """The processor's marketing name, where Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, default=HERE.parent.parent / "shared" / "data" / "dreambooth" / "dog6")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--quantization", nargs="+", default=["int8", "none"])
    parser.add_argument("--resolution", type=int, default=512)
    args = parser.parse_args()
    if not args.photos.is_dir():
        raise SystemExit(f"{args.photos} is not there: give a folder of photos with --photos")
    base = build("sd15", HERE / ".cache" / "sd15")
    bare = subprocess.run(
        [sys.executable, "-c", BARE_IMPORT], cwd=HERE.parent, capture_output=True, text=True, check=True
    )
    runs = {}
    for quantization in args.quantization:
        output = HERE / ".cache" / f"real_photos_{quantization}"
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", str(SCRIPT)]
        flags = {"--pretrained_model_name_or_path": base, "--train_data_dir": args.photos, "--output_dir": output}
        flags |= {"--placeholder_token": "<my-dog>", "--initializer_token": "toy", "--center_crop": None}
        flags |= {"--resolution": args.resolution, "--quantization": quantization, "--max_train_steps": args.steps}
        flags |= {"--num_validation_samples": 0, "--report_to": "none"}
        command += [str(word) for pair in flags.items() for word in pair if word is not None]
        subprocess.run(command, cwd=HERE.parent, check=True)
        config = json.loads((output / "zoodip_config.json").read_text())
        runs[quantization] = {key: config[key] for key in ("figures", "components", "versions", "hardware")}
    result = {
        "command": f"python benchmarks/bench_real_photos.py --steps {args.steps} --resolution {args.resolution}",
        "architecture": "Stable Diffusion 1.5, random weights, n = 2, batch 1",
        "photos": args.photos.name,
        "resolution": args.resolution,
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "bare_import_mb": int(bare.stdout.split()[-1]),
        "runs": runs,
    }
    path = HERE / "results" / "real_photos.json"
    path.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")
    for quantization, run in runs.items():
        figures = run["figures"]
        rate, peak = figures["seconds"] / figures["steps"], figures["peak_memory"]["process_mb"]
        print(f"{quantization}: {rate:.1f} s/step, peak {peak} MB (imports alone {bare.stdout.strip()} MB)")
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
