"""Trains a few steps on real photos with the Stable Diffusion 1.5 architecture (random weights), INT8, 512 px.

    python benchmarks/bench_real_photos.py --photos ../shared/data/dreambooth/dog6     # or: make bench-real-photos

Runs the real script by `accelerate launch` in a fresh process and stores what it reports (seconds per step, bytes of
every component, peak memory of the whole process) in `benchmarks/results/real_photos.json`, with the peak memory of a
process that only imports the same libraries beside it.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks import common
from benchmarks.common import CACHE, RESULTS, ROOT
from benchmarks.random_base import build
from personalization.files import write_json


SCRIPT = ROOT / "train_zoodip_textual_inversion.py"
BARE_IMPORT = """
import torch
import train_zoodip_textual_inversion
from personalization.models import memory
print(memory.peak_memory(torch.device("cpu"))["process_mb"])
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, default=ROOT.parent / "shared" / "data" / "dreambooth" / "dog6")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--quantization", nargs="+", default=["int8", "none"])
    parser.add_argument("--resolution", type=int, default=512)
    args = parser.parse_args()
    if not args.photos.is_dir():
        raise SystemExit(f"{args.photos} is not there: give a folder of photos with --photos")
    common.warn_if_busy()
    base = build("sd15", CACHE / "sd15")
    bare = int(common.run([sys.executable, "-c", BARE_IMPORT]).split()[-1])
    runs = {}
    for quantization in args.quantization:
        output = CACHE / f"real_photos_{quantization}"
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", str(SCRIPT)]
        flags = {"--pretrained_model_name_or_path": base, "--train_data_dir": args.photos, "--output_dir": output}
        flags |= {"--placeholder_token": "<my-dog>", "--initializer_token": "toy", "--center_crop": None}
        flags |= {"--resolution": args.resolution, "--quantization": quantization, "--max_train_steps": args.steps}
        flags |= {"--num_validation_samples": 0, "--report_to": "none"}
        command += [str(word) for pair in flags.items() for word in pair if word is not None]
        subprocess.run(command, cwd=ROOT, check=True)
        config = json.loads((output / "zoodip_config.json").read_text())
        runs[quantization] = {key: config[key] for key in ("figures", "components", "versions", "hardware")}
    result = {
        **common.provenance(),
        "architecture": "Stable Diffusion 1.5, random weights, n = 2, batch 1",
        "photos": args.photos.name,
        "resolution": args.resolution,
        "bare_import_mb": bare,
        "runs": runs,
    }
    path = RESULTS / "real_photos.json"
    write_json(path, result)
    for quantization, run in runs.items():
        figures = run["figures"]
        rate, peak = figures["seconds"] / figures["steps"], figures["peak_memory"]["process_mb"]
        print(f"{quantization}: {rate:.1f} s/step, peak {peak} MB (imports alone {bare} MB)")
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
