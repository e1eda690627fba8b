"""Does a token trained with OpenVINO's UNet score like one trained with torch's? The demo, over seeds and backends.

    python benchmarks/bench_quality.py          # a quarter of an hour on two cores

Runs the column of the paper's recipe of `demo/run_demo.py` on some subjects with torch for several seeds, and with
OpenVINO; all images are drawn by the ordinary torch pipeline, so that the score of an OpenVINO token is also the proof
that it transfers. Writes the mean scores of each run and the spread over torch's seeds to
`benchmarks/results/quality.json`.
"""

import argparse
import json
import subprocess
import sys

from benchmarks import common
from benchmarks.common import CACHE, DEMO, RESULTS
from personalization.files import write_json


METRICS = ("CLIP-I", "identity", "CLIP-T")


def run(backend, seed, subjects):
    """One run of the demo: mean scores after training, and seconds of training summed over subjects."""
    output = CACHE / f"quality_{backend}_{seed}"
    command = [sys.executable, str(DEMO / "run_demo.py"), "--columns", "zoodip", "--unet_backend", backend]
    command += ["--seed", str(seed), "--output_dir", str(output), "--subjects", *subjects]
    subprocess.run(command, check=True)
    scores = json.loads((output / "scores.json").read_text())
    words = [row["zoodip"] for row in scores["scores"].values()]
    means = {name: round(sum(word[name] for word in words) / len(words), 4) for name in METRICS}
    seconds = sum(word["training"]["seconds"] for word in words)
    return {"backend": backend, "seed": seed, "after": means, "training_seconds": seconds}


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
    common.warn_if_busy()
    runs = [run(backend, seed, args.subjects) for backend, seed in plan]
    torch_runs = [r["after"] for r in runs if r["backend"] == "torch"]
    spread = {name: [min(r[name] for r in torch_runs), max(r[name] for r in torch_runs)] for name in METRICS}
    result = {**common.provenance(), "subjects": args.subjects, "runs": runs, "torch_spread": spread}
    path = RESULTS / "quality.json"
    write_json(path, result)
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
