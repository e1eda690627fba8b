"""`make demo`: teach the demo base every subject of `demo/subjects`, offline, and judge the result.

    python demo/run_demo.py                        # all subjects, a few minutes on two cores
    python demo/run_demo.py --subjects striped_star --max_train_steps 300

Each subject is trained by the real script (one `accelerate launch` per core, one thread each), starting from the
plain word for its shape. Before and after, the same prompts and the same noise are drawn and scored by `demo/scorer`,
a model that the base has never seen. Written to `demo/output/`: `before_after.png`, `scores.json`, and the whole
output of each training run.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import common


# isort: split
import torch
import world
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

import evaluate_personalization as evaluation
from personalization.models import families
from personalization.models.base_model import ModelSource, open_base


DEMO = Path(__file__).resolve().parent
SCRIPT = DEMO.parent / "train_zoodip_textual_inversion.py"
PLACEHOLDER = "<my-toy>"

# The fast recipe for as many forward passes as fit into a minute.
SETTINGS = {
    "--recipe": "fast",
    "--max_train_steps": 150,
    "--max_candidates_per_forward": 17,  # half of a step's: a small model has room for them
    "--flip_probability": 0,  # a moon mirrored is another moon: with flips that subject is hardly learned
    "--validation_steps": 50,
    "--num_validation_samples": 32,
    "--checkpointing_steps": 1_000_000,  # a minute of training needs no checkpoints
    "--save_steps": 1_000_000,
    "--report_to": "none",
}
SCENES = range(4)  # the prompts of `prompts.txt`
SEEDS = 4  # images per scene and subject
GUIDANCE, INFERENCE_STEPS = 4.0, 25  # as in check_demo_base.py
NAMES = {"CLIP-I": "CLIP-I", "DINO": "identity", "CLIP-T": "CLIP-T"}  # the scorer's stand-in for DINO is its own


def parse_args():
    subjects = sorted(path.parent.name for path in (DEMO / "subjects").glob("*/metadata.jsonl"))
    parser = argparse.ArgumentParser(description="Train and judge the demo subjects.")
    parser.add_argument("--subjects", nargs="+", choices=subjects, default=subjects, help="Which; default: all.")
    parser.add_argument(
        "--max_train_steps", type=int, default=SETTINGS["--max_train_steps"], help="Steps per subject."
    )
    parser.add_argument("--output_dir", type=Path, default=DEMO / "output", help="Where results are written.")
    parser.add_argument("--seed", type=int, default=0, help="Of training.")
    parser.add_argument("--base", choices=("base", "base_xl"), default="base", help="Which base; base_xl is an SDXL.")
    parser.add_argument(
        "--unet_backend",
        choices=("torch", "openvino"),
        default="torch",
        help="What computes the UNet in training; the images are always drawn by diffusers on torch.",
    )
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="Subjects trained at a time.")
    return parser.parse_args()


def train(subject, args):
    """Runs the training script on one subject, its output in `train.log`; returns its zoodip_config.json."""
    output = args.output_dir / subject
    shutil.rmtree(output, ignore_errors=True)  # of an earlier demo
    output.mkdir(parents=True)
    flags = {
        **SETTINGS,
        "--max_train_steps": args.max_train_steps,
        "--seed": args.seed,
        "--unet_backend": args.unet_backend,
        "--pretrained_model_name_or_path": DEMO / args.base,
        "--train_data_dir": DEMO / "subjects" / subject,
        "--placeholder_token": PLACEHOLDER,
        "--initializer_token": world.SUBJECTS[subject].shape,
        "--output_dir": output,
    }
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--mixed_precision=no"]
    command += ["--num_machines=1", "--dynamo_backend=no", "--num_cpu_threads_per_process=1", str(SCRIPT)]
    command += [str(word) for pair in flags.items() for word in pair]
    with (output / "train.log").open("w") as log:
        log.write(" ".join(command) + "\n")
        log.flush()
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        raise SystemExit(f"training {subject} failed (exit {done.returncode}): see {output / 'train.log'}")
    return json.loads((output / "zoodip_config.json").read_text())


def evaluate(subject, folder, pipeline, encoders, base):
    """Draws and judges one subject by `evaluate_personalization`: the plain word before, the learned token after.

    Returns:
        References and, before and after, the first image of each scene (PIL), and metric -> mean before and after.
    """
    shape, pictures = world.SUBJECTS[subject].shape, DEMO / "subjects" / subject
    references = [Image.open(path).convert("RGB") for path in sorted(pictures.glob("*.png"))]
    columns = evaluation.read_columns([f"learned={folder}"], shape, base)
    prompts = evaluation.read_prompts(DEMO / "prompts.txt")
    drawing = evaluation.Drawing("demo", prompts, SEEDS, 0, base.resolution, INFERENCE_STEPS, GUIDANCE)
    evaluation.draw_missing(folder / "evaluation", columns, drawing, pipeline, SEEDS)
    row, scores, texts = {"references": references}, {}, [prompt.replace("{}", shape) for prompt in prompts]
    for name, column in zip(("before", "after"), columns):
        paths = [[evaluation.image_path(folder / "evaluation", column, p, i) for i in range(SEEDS)] for p in SCENES]
        images = [[Image.open(path).convert("RGB") for path in scene] for scene in paths]
        scored = evaluation.score_column(images, references, texts, encoders)
        scores[name] = {NAMES[metric]: value.mean for metric, value in scored.items() if metric in NAMES}
        row[name] = [scene[0] for scene in images]
    return row, scores


def before_after_picture(rows, path, scale=2):
    """One row per subject: two references, a "before" image per scene, an "after" image per scene."""
    side, gap, top = 64 * scale, 16, 22
    widths = [2, len(SCENES), len(SCENES)]
    canvas = Image.new("RGB", (sum(widths) * side + 2 * gap, top + len(rows) * side), "white")
    ink = ImageDraw.Draw(canvas)
    x = 0
    for title, count in zip(("references", "before: the plain word", "after: the learned token"), widths):
        ink.text((x + 4, 5), title, fill="black", font_size=13)
        for y, row in enumerate(rows):
            images = row[title.split(":")[0]][:count]
            for j, image in enumerate(images):
                canvas.paste(image.resize((side, side), Image.Resampling.LANCZOS), (x + j * side, top + y * side))
        x += count * side + gap
    canvas.save(path)


def main():
    args = parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    print(f"Training {len(args.subjects)} subjects, {args.jobs} at a time; logs: {args.output_dir}/*/train.log")
    with ThreadPoolExecutor(args.jobs) as pool:
        work = pool.map(lambda subject: train(subject, args), args.subjects)
        configs = dict(zip(args.subjects, tqdm(work, total=len(args.subjects), desc="Subjects")))
    training_seconds = time.perf_counter() - started

    print("Drawing and scoring before/after images ...")
    rows, scores = [], {}
    encoders = evaluation.Encoders(DEMO / "scorer", DEMO / "scorer" / "identity", True, torch.device("cpu"), 64)
    base = open_base(ModelSource(str(DEMO / args.base)), accepted=families.FAMILIES.values())
    pipeline = base.family.pipeline.from_pretrained(DEMO / args.base)
    pipeline.set_progress_bar_config(disable=True)
    for subject in tqdm(args.subjects, desc="Subjects"):
        row, scores[subject] = evaluate(subject, args.output_dir / subject, pipeline, encoders, base)
        scores[subject]["training"] = configs[subject]["figures"]
        rows.append(row)
    before_after_picture(rows, args.output_dir / "before_after.png")

    names = NAMES.values()
    print(f"\n{'subject':18}" + "".join(f"{name:>22}" for name in names))
    for subject, result in scores.items():
        pairs = (f"{result['before'][n]:.3f} -> {result['after'][n]:.3f}" for n in names)
        print(f"{subject:18}" + "".join(f"{pair:>22}" for pair in pairs))
    figures = {
        "command": common.command_line(),
        **common.CODE,
        "settings": {**SETTINGS, "--max_train_steps": args.max_train_steps},
        "seed": args.seed,
        "base": args.base,
        "unet_backend": args.unet_backend,
        "training_seconds": round(training_seconds, 1),
        "total_seconds": round(time.perf_counter() - started, 1),
        "hardware": {"cpus": os.cpu_count(), "jobs": args.jobs},
        "versions": next(iter(configs.values()))["versions"],
        "scores": scores,
    }
    (args.output_dir / "scores.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(f"\nTraining took {training_seconds:.0f} s, everything {figures['total_seconds']:.0f} s.")
    print(f"Look at {args.output_dir / 'before_after.png'}")


if __name__ == "__main__":
    main()
