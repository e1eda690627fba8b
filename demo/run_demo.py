"""`make demo`: teach the demo base three subjects offline, by the paper's method and by ours, and judge the results.

    python demo/run_demo.py                                            # three subjects, some minutes on two cores
    python demo/run_demo.py --subjects all --columns zoodip gradient gauss_newton
    python demo/run_demo.py --base base_flow --subjects striped_star   # a Z-Image instead of a Stable Diffusion

Each word is learned by the real script, starting from the plain word for the subject's shape. Each subject is drawn
and scored by `evaluate_personalization.py`: the plain word and every learned one by the same prompts, from the same
noise. The judge is `demo/scorer`, a model that the bases have never seen. Every process has one thread, and as many
run at a time as there are processors. Written to `demo/output/`: `before_after.png`, `scores.json`, and for each
subject the output of its processes, its learned words and all its pictures.
"""

import argparse
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks import common


# isort: split
import world
from PIL import Image, ImageDraw
from tqdm.auto import tqdm


DEMO = Path(__file__).resolve().parent
TRAINER = DEMO.parent / "train_zoodip_textual_inversion.py"
JUDGE = DEMO.parent / "evaluate_personalization.py"
BASES = sorted(path.parent.name for path in DEMO.glob("base*/model_index.json"))
SUBJECTS = sorted(path.parent.name for path in (DEMO / "subjects").glob("*/metadata.jsonl"))
SHOWN = ["striped_star", "twotone_moon", "dotted_circle"]  # a pattern, two halves of a shape, and a shape that is hard
PLACEHOLDER = "<my-toy>"
PLAIN = "plain-word"  # `evaluate_personalization.PLAIN`, which imports torch
NAMES = {"CLIP-I": "CLIP-I", "DINO": "identity", "CLIP-T": "CLIP-T"}  # the scorer's stand-in for DINO is its own
SCORES = (*NAMES.values(), "shape")


@dataclass(frozen=True)
class Way:
    """A way to learn a word: a column of the picture.

    Args:
        title: over the column.
        optimizer: what it is, for the output.
        flags: of the training script.
    """

    title: str
    optimizer: str
    flags: dict


# The paper's recipe for as many of its 30,000 steps as the time allows; ours until they gain little.
WAYS = {
    "zoodip": Way(
        "ZOODiP: the paper's recipe",
        "zeroth-order Adam with Subspace Gradient and PUTS (--recipe paper), forward passes alone",
        {"--recipe": "paper", "--max_train_steps": 2000},
    ),
    "gradient": Way(
        "ours: exact gradient, INT8",
        "AdamW on the exact gradient through the INT8 model (--optimizer gradient)",
        {
            "--optimizer": "gradient",
            "--gradient_checkpointing": "none",  # a small model has room for its activations
            "--max_train_steps": 400,  # after 200 the moon has the wrong colours
        },
    ),
    "gauss_newton": Way(
        "ours: Gauss-Newton, INT8",
        "Gauss-Newton from whole predictions (--optimizer gauss_newton), forward passes alone",
        {"--optimizer": "gauss_newton", "--max_candidates_per_forward": 17, "--max_train_steps": 150},
    ),
}
# What a base needs beside, by way: a language model's word of one vector says its shape and hardly its looks.
OF_BASE = {
    "base_flow": {
        "zoodip": {"--num_vectors": 8},
        "gradient": {"--num_vectors": 8, "--learning_rate": 3e-2, "--max_train_steps": 200},
        "gauss_newton": {"--num_vectors": 8},
    }
}
COLUMNS = {"torch": ["zoodip", "gradient"], "openvino": ["zoodip", "gauss_newton"]}  # by engine: which ways
SETTINGS = {  # of every way
    "--flip_probability": 0,  # a moon mirrored is another moon: with flips that subject is hardly learned
    "--num_validation_samples": 32,
    "--checkpointing_steps": 1_000_000,  # a minute of training needs no checkpoints
    "--save_steps": 1_000_000,
    "--report_to": "none",
}
VALIDATIONS = 4  # of the validation loss in a run
DRAWING = {
    "--prompts": DEMO / "prompts.txt",
    "--num_images_per_prompt": 4,
    "--batch_size": 16,
    "--num_inference_steps": 25,
    "--guidance_scale": 4,  # steps and guidance as in check_demo_base.py
    "--clip_model": DEMO / "scorer",
    "--dino_model": DEMO / "scorer" / "identity",
    "--trust_remote_code": True,
}


def parse_args():
    parser = argparse.ArgumentParser(description="Learn and judge the demo subjects, by the paper's method and ours.")
    add = parser.add_argument
    add("--subjects", nargs="+", choices=["all", *SUBJECTS], default=SHOWN, help="Which; default: three that show.")
    add("--columns", nargs="+", choices=list(WAYS), help="Ways to learn a word. Default: zoodip and ours.")
    add("--max_train_steps", type=int, help="Steps per word. Default: each way's own.")
    add("--num_inference_steps", type=int, default=DRAWING["--num_inference_steps"], help="Steps per picture.")
    add("--output_dir", type=Path, default=DEMO / "output", help="Where results are written.")
    add("--seed", type=int, default=0, help="Of training.")
    add(
        "--base",
        choices=BASES,
        default="base_eps",
        help="Which; base_eps predicts noise, as SD 1.5 does, base v, base_xl is an SDXL, base_flow a Z-Image.",
    )
    add(
        "--unet_backend",
        choices=list(COLUMNS),
        default="torch",
        help="What computes the UNet in training; the images are always drawn by diffusers on torch.",
    )
    add("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="Processes at a time, one thread each.")
    args = parser.parse_args()
    args.subjects = SUBJECTS if "all" in args.subjects else list(dict.fromkeys(args.subjects))
    args.columns = list(dict.fromkeys(args.columns or COLUMNS[args.unet_backend]))
    return args


# =====================================================================================================
# Processes
# =====================================================================================================


def flags_of(way, args):
    """What a way is run with beside the names of files: flag -> value."""
    flags = {**SETTINGS, **WAYS[way].flags, **OF_BASE.get(args.base, {}).get(way, {})}
    if args.max_train_steps is not None:
        flags["--max_train_steps"] = args.max_train_steps
    return {**flags, "--validation_steps": max(1, flags["--max_train_steps"] // VALIDATIONS)}


def run(script, flags, log):
    """Runs a script in a process with one thread, its command and output in a file; returns its CPU seconds.

    Args:
        script: path.
        flags: flag -> value; a list has several, True none.
        log: path.
    """
    command = [sys.executable, str(script)]
    for flag, value in flags.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        command += [flag, *map(str, values)]
    # Threads that share a core with other work spend their time waiting for each other.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w", encoding="utf-8") as file:
        file.write(shlex.join(command) + "\n")
        file.flush()
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{script.name} failed (exit {process.returncode}): see {log}")
    return usage.ru_utime + usage.ru_stime


def cpu_seconds():
    """CPU seconds of this process and of all that it has waited for."""
    times = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in times)


def train(subject, way, args):
    """Learns a word; returns its zoodip_config.json, with the CPU seconds of the whole process among the figures."""
    folder = args.output_dir / subject / way
    folder.mkdir(parents=True)
    flags = {
        **flags_of(way, args),
        "--seed": args.seed,
        "--unet_backend": args.unet_backend,
        "--pretrained_model_name_or_path": DEMO / args.base,
        "--train_data_dir": DEMO / "subjects" / subject,
        "--placeholder_token": PLACEHOLDER,
        "--initializer_token": world.SUBJECTS[subject].shape,
        "--output_dir": folder,
    }
    seconds = run(TRAINER, flags, folder / "train.log")
    config = json.loads((folder / "zoodip_config.json").read_text(encoding="utf-8"))
    return {**config, "figures": {**config["figures"], "cpu_seconds": round(seconds, 1)}}


def judge(subject, trained, args):
    """Draws and scores a subject once its words are learned; returns metric -> mean of each column."""
    for word in trained:
        word.result()
    folder = args.output_dir / subject
    (folder / "evaluation").mkdir()
    flags = {
        **DRAWING,
        "--num_inference_steps": args.num_inference_steps,
        "--pretrained_model_name_or_path": DEMO / args.base,
        "--reference_images": DEMO / "subjects" / subject,
        "--class_word": world.SUBJECTS[subject].shape,
        "--results": [f"{way}={folder / way}" for way in args.columns],
        "--output_dir": folder / "evaluation",
    }
    run(JUDGE, flags, folder / "evaluation" / "evaluation.log")
    scores = json.loads((folder / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))["scores"]
    return {way: {NAMES[m]: score["mean"] for m, score in row.items() if m in NAMES} for way, row in scores.items()}


def read_shapes(scores, args):
    """Adds to the scores "shape": the share of a column's pictures in which the scorer reads the subject's shape."""
    from scoring import Scorer  # and torch, which the processes have done without so far

    scorer = Scorer()
    for subject, row in scores.items():
        for key, found in row.items():
            paths = sorted((args.output_dir / subject / "evaluation" / "images" / key).glob("*.png"))
            shapes = scorer.read([Image.open(path) for path in paths])["shape"]
            found["shape"] = shapes.count(world.SUBJECTS[subject].shape) / len(shapes)


def work(args):
    """All processes, the longest first, as many at a time as `--jobs`; returns configs and scores.

    Returns:
        subject -> way -> zoodip_config.json, and subject -> column -> metric -> mean.
    """
    total = len(args.subjects) * (len(args.columns) + 1)
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=total, desc="Words learned, subjects drawn") as bar:

        def start(*call):
            future = pool.submit(*call)
            future.add_done_callback(lambda _: bar.update())
            return future

        words = {(s, way): start(train, s, way, args) for way in args.columns for s in args.subjects}
        judged = {s: start(judge, s, [words[s, way] for way in args.columns], args) for s in args.subjects}
        try:
            scores = {subject: future.result() for subject, future in judged.items()}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {s: {way: words[s, way].result() for way in args.columns} for s in args.subjects}, scores


# =====================================================================================================
# What is shown
# =====================================================================================================


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def columns_of(args, configs):
    """What the columns are: key -> title, optimizer, flags, and what a word costs in the mean."""
    columns = {PLAIN: {"title": "the plain word", "optimizer": "nothing is learned"}}
    for way in args.columns:
        figures = [configs[subject][way]["figures"] for subject in args.subjects]
        columns[way] = {
            "title": WAYS[way].title,
            "optimizer": WAYS[way].optimizer,
            "flags": flags_of(way, args),
            "steps": figures[0]["steps"],
            "forward_passes": figures[0]["forward_passes"],
            "seconds": round(mean(f["seconds"] for f in figures), 1),  # by the clock, without the start
            "cpu_seconds": round(mean(f["cpu_seconds"] for f in figures), 1),  # with it
        }
    return columns


def cost(column):
    """The second line over a column; seconds of one thread, which other work on the machine hardly changes."""
    if "steps" not in column:
        return column["optimizer"]
    return f"{column['steps']:,} steps, {column['forward_passes']:,} forwards, {column['cpu_seconds']:.0f} s"


def open_pictures(subject, columns, args):
    """The references, and of each column the first picture of each prompt: key -> PIL images."""
    pictures = {"references": sorted((DEMO / "subjects" / subject).glob("*.png"))}
    for key in columns:
        pictures[key] = sorted((args.output_dir / subject / "evaluation" / "images" / key).glob("*-00.png"))
    return {key: [Image.open(path).convert("RGB") for path in paths] for key, paths in pictures.items()}


def before_after_picture(rows, columns, path, scale=2):
    """A row for each subject; in each column, references first, four pictures in a square.

    Args:
        rows: of each subject what `open_pictures` returned.
        columns: as of `columns_of`.
        path: of the file.
        scale: of the pictures, which have 64 px.
    """
    side, gap, top = 64 * scale, 12, 40
    titles = {"references": ("references", "four of five"), **{k: (c["title"], cost(c)) for k, c in columns.items()}}
    width, height = 2 * side + gap, 2 * side + gap
    canvas = Image.new("RGB", (len(titles) * width - gap, top + len(rows) * height - gap), "white")
    ink = ImageDraw.Draw(canvas)
    for i, (key, (title, words)) in enumerate(titles.items()):
        ink.text((i * width + 2, 3), title, fill="black", font_size=15)
        ink.text((i * width + 2, 22), words, fill="dimgray", font_size=12)
        for j, row in enumerate(rows):
            for k, image in enumerate(row[key][:4]):
                corner = (i * width + k % 2 * side, top + j * height + k // 2 * side)
                canvas.paste(image.resize((side, side), Image.Resampling.LANCZOS), corner)
    canvas.save(path)


def print_scores(columns, scores):
    """What each column is, and its scores of each subject."""
    print("\nThe columns:")
    for key, column in columns.items():
        words = f"; {cost(column)} of one thread a word" if "steps" in column else ""
        print(f"  {key:13}{column['title']}: {column['optimizer']}{words}")
    print(f"\n{'subject':18}{'column':13}" + "".join(f"{name:>10}" for name in SCORES))
    for subject, row in {**scores, "mean": mean_scores(scores, columns)}.items():
        for key in columns:
            numbers = "".join(f"{row[key][name]:10.3f}" for name in SCORES)
            print(f"{subject:18}{key:13}{numbers}")


def mean_scores(scores, columns):
    """The mean over subjects: column -> metric -> value."""
    return {k: {n: mean(row[k][n] for row in scores.values()) for n in SCORES} for k in columns}


def main():
    args = parse_args()
    for subject in args.subjects:
        shutil.rmtree(args.output_dir / subject, ignore_errors=True)  # of an earlier demo
    started = time.perf_counter()
    print(
        f"{len(args.subjects)} subjects, each learned by {' and '.join(args.columns)}; {args.jobs} processes at a"
        f" time, whose logs are below {args.output_dir}"
    )
    configs, scores = work(args)
    read_shapes(scores, args)
    columns = columns_of(args, configs)
    rows = [open_pictures(subject, columns, args) for subject in args.subjects]
    before_after_picture(rows, columns, args.output_dir / "before_after.png")
    seconds = time.perf_counter() - started
    figures = {
        "command": common.command_line(),
        **common.CODE,
        "seed": args.seed,
        "base": args.base,
        "unet_backend": args.unet_backend,
        "columns": columns,
        "total_seconds": round(seconds, 1),
        "total_cpu_seconds": round(cpu_seconds(), 1),
        "hardware": {"cpus": os.cpu_count(), "jobs": args.jobs},
        "versions": configs[args.subjects[0]][args.columns[0]]["versions"],
        "scores": {
            subject: {
                key: {**row[key], **({"training": configs[subject][key]["figures"]} if key in args.columns else {})}
                for key in columns
            }
            for subject, row in scores.items()
        },
    }
    (args.output_dir / "scores.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print_scores(columns, scores)
    print(f"\nEverything took {seconds:.0f} s, {cpu_seconds():.0f} s of CPU.")
    print(f"Look at {args.output_dir / 'before_after.png'}")


if __name__ == "__main__":
    main()
