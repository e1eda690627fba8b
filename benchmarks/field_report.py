#!/usr/bin/env python
"""A report from the field: what this project cannot measure, by one command on a machine that can.

    python benchmarks/field_report.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --train_data_dir ./my-dog --initializer_token dog --clip_model openai/clip-vit-base-patch32

About 20 minutes on a GPU; it goes on where it was. In `--output_dir` are then `report.json`, without a path or a
picture of yours, `report.md`, to be pasted into an issue, and `sheet.png`, what each learned word draws (it shows your
subject: share it only if you like). A `report.json` in `benchmarks/results/field/` is shown in docs/results/field.md.

What is measured, by the project's own scripts: memory of some sets of flags beside its prediction, and seconds a step;
how well differences of losses still see the gradient at the default μ; the share of the gradient that Gauss-Newton's
subspace holds; and a short run of each optimizer, all with as many forward passes, with its validation loss and, where
a CLIP is given, its scores.
"""

import argparse
import functools
import json
import os
import re
import statistics
import sys
import time
import traceback
from pathlib import Path

from benchmarks import common
from benchmarks.common import ROOT, as_words
from personalization.files import atomic_path, write_json


# isort: split
import torch
from PIL import Image, ImageDraw

import train_zoodip_textual_inversion as zoodip
from benchmarks.methods import prepare
from benchmarks.tables.field import field
from personalization.methods.gradient import loss_gradient


TRAINER, JUDGE = ROOT / "train_zoodip_textual_inversion.py", ROOT / "evaluate_personalization.py"
PLACEHOLDER = "<field-report>"
GAUSS_NEWTON = {"optimizer": "gauss_newton"}
# What memory and time are measured of: name -> flags of the script.
ROWS = {
    "int8": {},
    "nf4": {"quantization": "nf4"},
    "not quantized": {"quantization": "none"},
    "int8, n = 8": {"num_perturbations": 8},
    "int8, low_vram": {"low_vram": True},
    "int8, gradient": {"optimizer": "gradient"},
    "int8, gauss_newton": GAUSS_NEWTON,
}
OPTIMIZERS = {"zo_adam": {"recipe": "paper"}, "gradient": {"optimizer": "gradient"}, "gauss_newton": GAUSS_NEWTON}
SCALES = (0.1, 1.0, 10.0)  # of the default μ


# =====================================================================================================
# The parts of a report
# =====================================================================================================


def given_flags(args):
    """Flags of the script that all runs share."""
    shared = ["pretrained_model_name_or_path", "train_data_dir", "initializer_token", "resolution"]
    shared += ["validation_data_dir"]
    given = {name: getattr(args, name) for name in shared if getattr(args, name) is not None}
    cache = args.output_dir / "weights"
    return given | {"placeholder_token": PLACEHOLDER, "quantized_cache_dir": cache, "report_to": "none", "seed": 0}


def start(script, flags):
    """Runs a script in a process of its own and returns what it printed."""
    return run_words(script, as_words(flags))


def run_words(script, words):
    """Those of `start`. The Hub may be asked, unless whoever starts this says otherwise."""
    return common.run([sys.executable, script, *words], HF_HUB_OFFLINE=os.environ.get("HF_HUB_OFFLINE", "0"))


def config_of(folder, flags):
    """The zoodip_config.json of a run, which is made unless it is there."""
    path = folder / "zoodip_config.json"
    if not path.is_file():
        start(TRAINER, {**flags, "output_dir": folder})
    return json.loads(path.read_text(encoding="utf-8"))


def measure_row(args, name):
    """Peak memory of a run of some steps beside its prediction, and seconds a step."""
    flags = given_flags(args) | ROWS[name] | {"max_train_steps": args.steps, "num_validation_samples": 0}
    flags.pop("validation_data_dir", None)
    said = start(TRAINER, {**flags, "estimate_memory": True, "output_dir": args.output_dir / "unused"})
    predicted = int(re.search(r"^ *peak +(\d+) MB", said, flags=re.M)[1])
    config = config_of(args.output_dir / "rows" / re.sub(r"\W+", "-", name), flags)
    figures, settings = config["figures"], config["settings"]
    return {
        "flags": " ".join(as_words(ROWS[name])),
        "predicted_mb": predicted,
        "peak_memory": figures["peak_memory"],
        "seconds_per_step": round(figures["seconds"] / figures["steps"], 4),
        "forwards_per_step": figures["forward_passes"] // figures["steps"],
        "activations": config["hardware"]["activations"],
        "resolution": settings["resolution"],
    }


def measure_signal(args):
    """Differences of losses in the default precision against the exact gradient of the same INT8 weights in float32.

    Correlation over random directions, of some examples: the median and the least, by multiples of the default μ.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    words = as_words(given_flags(args) | {"flip_probability": 0.0})
    generator = torch.Generator().manual_seed(0)
    exact = prepare([*words, "--optimizer", "gradient", "--mixed_precision", "no"], device=device)
    batches = [exact.draw_batch(generator).to(device) for _ in range(args.examples)]
    theta = exact.initial.expand(1, -1)
    gradients = [loss_gradient(exact.model, theta, batch)[0].flatten().double().cpu() for batch in batches]
    exact.model = None  # before the next one comes
    directions = torch.randn((args.directions, *theta.shape), generator=generator)
    many = ["--num_perturbations", args.directions, "--max_candidates_per_forward", 9]
    task = prepare([*words, "--optimizer", "zo_adam", *many], device=device)
    default, found = task.args.perturbation_scale, {}
    for scale in SCALES:
        correlations = []
        for batch, gradient in zip(batches, gradients):
            with torch.inference_mode():
                losses = functools.partial(task.model.losses, batch=batch)
                slopes = zoodip.rge_slopes(losses, theta, directions.to(theta), scale * default)[0].double().cpu()
            pair = torch.stack([slopes, directions.flatten(1).double() @ gradient])
            correlations.append(torch.corrcoef(pair)[0, 1].nan_to_num().item())
        found[f"{scale * default:g}"] = [round(statistics.median(correlations), 4), round(min(correlations), 4)]
    return {
        "default_mu": default,
        "activations": task.args.activations,
        "correlation_median_and_least": found,
        "examples": args.examples,
        "directions": args.directions,
    }


def learn(args, name):
    """A short run of an optimizer, with as many forward passes as the others."""
    settings = zoodip.parse_args(as_words(given_flags(args) | OPTIMIZERS[name]))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    zoodip.resolve_settings(settings, device)
    steps = max(1, args.forwards // zoodip.OPTIMIZERS[name].num_forwards(settings))
    flags = given_flags(args) | OPTIMIZERS[name] | {"max_train_steps": steps, "validation_steps": max(1, steps // 5)}
    flags |= {"checkpointing_steps": max(1, steps // 5), "resume_from_checkpoint": "latest", "flip_probability": 0.0}
    flags |= {"num_validation_samples": args.examples_judged}
    config = config_of(args.output_dir / name, flags)
    figures, kept = config["figures"], ("steps", "forward_passes", "seconds", "validation_losses", "share")
    return {
        **{key: figures[key] for key in kept if key in figures},
        "held_out": args.validation_data_dir is not None,  # of pictures; else the loss is of the training pictures
        "activations": config["hardware"]["activations"],
        "mu_or_h": config["settings"]["perturbation_scale"],
    }


def judge(args):
    """Pictures of what each optimizer has learned, and their scores where a CLIP is given; label -> metric -> mean."""
    learned = [name for name in OPTIMIZERS if (args.output_dir / name / "zoodip_config.json").is_file()]
    folder = args.output_dir / "pictures"
    flags = {
        "pretrained_model_name_or_path": args.pretrained_model_name_or_path,
        "class_word": args.initializer_token,
        "num_images_per_prompt": 1,
        "num_inference_steps": args.num_inference_steps,
        "output_dir": folder,
    }
    if args.clip_model is None:
        flags["draw_only"] = True
    else:
        flags |= {"reference_images": args.train_data_dir, "clip_model": args.clip_model}
        flags |= {"trust_remote_code": True} if args.trust_remote_code else {}
        flags |= {"dino_model": args.dino_model} if args.dino_model else {}
    flags |= {name: getattr(args, name) for name in ("prompts", "resolution") if getattr(args, name) is not None}
    words = [*as_words(flags), "--results", *(f"{name}={args.output_dir / name}" for name in learned)]
    run_words(JUDGE, words)
    draw_sheet(folder / "images", args.output_dir / "sheet.png")
    if args.clip_model is None:
        return {}
    scores = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["scores"]
    return {label: {metric: round(score["mean"], 4) for metric, score in row.items()} for label, row in scores.items()}


def draw_sheet(images, path, side=192, shown=6):
    """A row for each folder of pictures in `images`, with its name; the first ones of each."""
    folders = sorted((f for f in images.iterdir() if f.is_dir()), key=lambda f: (f.name in OPTIMIZERS, f.name))
    shown = min(shown, len(list(folders[0].glob("*.png"))))
    sheet = Image.new("RGB", (shown * side, len(folders) * (side + 20)), "white")
    for row, folder in enumerate(folders):
        top = row * (side + 20)
        ImageDraw.Draw(sheet).text((4, top + 3), folder.name, fill="black", font_size=13)
        for column, picture in enumerate(sorted(folder.glob("*.png"))[:shown]):
            picture = Image.open(picture).convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(picture, (column * side, top + 20))
    with atomic_path(path) as temporary:
        sheet.save(temporary)


# =====================================================================================================
# The report
# =====================================================================================================


def list_parts(args):
    """Name -> function that measures a part."""
    parts = {f"row: {name}": functools.partial(measure_row, args, name) for name in args.rows}
    parts["signal"] = functools.partial(measure_signal, args)
    parts |= {f"run: {name}": functools.partial(learn, args, name) for name in args.optimizers}
    return parts | {"scores": functools.partial(judge, args)}


def measure(args, path):
    """All parts that are not in the report yet; each is written as soon as it is there. Returns the report.

    One that fails, as for want of memory or of a package, says why, and the others go on; the next call tries again.
    """
    report = common.read(path)
    if report.get("settings") != settings_of(args):
        report = {"settings": settings_of(args), **common.provenance(device=device_name()), "parts": {}}
    for name, part in list_parts(args).items():
        if "failed" in report["parts"].get(name, {"failed": True}):
            print(f"{name} ...", flush=True)
            began = time.perf_counter()
            try:
                found = part()
            except Exception as error:  # whatever it is, it is what the report is for
                traceback.print_exc()
                found = {"failed": common.public(str(error).strip().splitlines()[-1][:300])}
            report["parts"][name] = found | {"took_seconds": round(time.perf_counter() - began, 1)}
            write_json(path, report)
    return report


def device_name():
    return "cuda" if torch.cuda.is_available() else "cpu"


def settings_of(args):
    """What a report belongs to, without a path of this machine."""
    named = vars(args).items()
    return {k: common.public(str(v)) if isinstance(v, (str, Path)) else v for k, v in named if k != "output_dir"}


def as_text(report):
    """The report in markdown, to be pasted."""
    settings = report["settings"]
    lines = [f"Field report: `{settings['pretrained_model_name_or_path']}` on {report['hardware']['name']}", ""]
    lines += [field(report), "", "<details><summary>report.json</summary>", "", "```json"]
    return "\n".join([*lines, json.dumps(report, indent=1), "```", "", "</details>", ""])


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True, help="Base model, a folder or on the Hub.")
    add("--train_data_dir", type=Path, required=True, help="Folder with 3 to 20 pictures of one subject.")
    add("--initializer_token", required=True, help="One word for what they show: dog.")
    add("--validation_data_dir", type=Path, help="More pictures of it, which the validation loss is then of.")
    add("--resolution", type=int, help="Side of the pictures. Default: the model's own.")
    add("--clip_model", help="CLIP to judge by; without one there are pictures and no scores.")
    add("--dino_model", help="Image encoder to judge by; default: that of evaluate_personalization.py.")
    add("--trust_remote_code", action="store_true", help="Run model code beside the weights of --dino_model.")
    add("--prompts", type=Path, help="File of prompts to judge by; default: that of evaluate_personalization.py.")
    add("--rows", nargs="*", choices=list(ROWS), default=list(ROWS), help="Sets of flags that memory is measured of.")
    add("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS), help="Which learn.")
    add("--forwards", type=int, default=3000, help="Forward passes of each learning run.")
    add("--steps", type=int, default=20, help="Steps of a run for memory and time.")
    add("--examples", type=int, default=6, help="Examples of the signal.")
    add("--examples_judged", type=int, default=64, help="Examples of the validation loss.")
    add("--directions", type=int, default=32, help="Directions of the signal.")
    add("--num_inference_steps", type=int, default=25, help="Denoising steps of a picture.")
    add("--output_dir", type=Path, default=Path("field-report"), help="Where everything is written.")
    return parser.parse_args(input_args)


def main(args):
    common.warn_if_busy()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    report = measure(args, args.output_dir / "report.json")
    text = as_text(report)
    with atomic_path(args.output_dir / "report.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(text.split("<details>")[0])
    print(f"Please paste {args.output_dir / 'report.md'} into an issue; thank you.")


if __name__ == "__main__":
    main(parse_args())
