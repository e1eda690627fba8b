"""Does a token trained with OpenVINO's UNet score like one trained with torch's? The demo, over seeds and backends.

    python benchmarks/bench_quality.py          # a quarter of an hour on two cores

Runs `demo/run_demo.py` on some subjects with torch for several seeds, and with OpenVINO; all images are drawn by the
ordinary torch pipeline, so that the score of an OpenVINO token is also the proof that it transfers. Writes the mean
scores of each run and the spread over torch's seeds to `benchmarks/results/quality.json`.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from bench_real_photos import cpu_name


HERE = Path(__file__).resolve().parent
METRICS = ("CLIP-I", "identity", "CLIP-T")


def run(backend, seed, subjects):
    """One run of the demo: mean scores after training, seconds of training summed over subjects, versions."""
    output = HERE / ".cache" / f"quality_{backend}_{seed}"
    command = [sys.executable, str(HERE.parent / "demo" / "run_demo.py"), "--unet_backend", backend]
    command += ["--seed", str(seed), "--output_dir", str(output), "--subjects", *subjects]
    subprocess.run(command, check=True)
    scores = json.loads((output / "scores.json").read_text())
    subjects = scores["scores"].values()
    means = {name: round(sum(s["after"][name] for s in subjects) / len(subjects), 4) for name in METRICS}
    seconds = sum(s["training"]["seconds"] for s in subjects)
    return {"backend": backend, "seed": seed, "after": means, "training_seconds": seconds}, scores["versions"]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    subjects = ["checkered_ring", "dotted_heart", "striped_star"]
    parser.add_argument("--subjects", nargs="+", default=subjects, help="Of demo/subjects.")
    parser.add_argument("--torch_seeds", nargs="+", type=int, default=[0, 1, 2], help="Seeds of the torch runs.")
    parser.add_argument("--openvino_seeds", nargs="+", type=int, default=[0], help="Seeds of the OpenVINO runs.")
    args = parser.parse_args()
    plan = [("torch", seed) for seed in args.torch_seeds] + [("openvino", seed) for seed in args.openvino_seeds]
    runs = []
    for backend, seed in plan:
        figures, versions = run(backend, seed, args.subjects)
        runs.append(figures)
    torch_runs = [r["after"] for r in runs if r["backend"] == "torch"]
    spread = {name: [min(r[name] for r in torch_runs), max(r[name] for r in torch_runs)] for name in METRICS}
    result = {
        "command": shlex.join(["python", "benchmarks/bench_quality.py", *sys.argv[1:]]),
        "subjects": args.subjects,
        "runs": runs,
        "torch_spread": spread,
        "hardware": {"name": cpu_name(), "cores": os.cpu_count()},
        "versions": versions,
    }
    path = HERE / "results" / "quality.json"
    path.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
