"""BP-low, ZO-high and choosing between them on the demo base: what each is worth beside backpropagation at full size.

    python benchmarks/compare_selective.py                                     # everything: some hours on a core
    python benchmarks/compare_selective.py --subjects striped_star --seeds 0   # or less; what is there stays
    python benchmarks/compare_selective.py --plot_only

Every variant is trained by the script's own `train_step` in this process; then an untouched diffusers pipeline loads
the LoRA and `evaluate_personalization` judges what it draws (the demo's prompts, four images of each). One entry for
each (variant, subject, seed) is added to `benchmarks/results/selective_quality.json` as soon as it is done; those that
are there are not computed again, so a run that was stopped goes on. At the end `docs/selective_sheet.png` (pictures)
and `docs/selective_probability.png` (p_BP) are drawn anew.
"""

import argparse
import itertools
import time
from pathlib import Path

from benchmarks import common
from benchmarks.common import CACHE, DEMO, DOCS, RESULTS, as_words
from benchmarks.compare_tuneqdm import GUIDANCE, IMAGES, INFERENCE_STEPS, Judge


# isort: split
import numpy as np
import torch
from PIL import Image, ImageDraw

import train_selective_dreambooth_lora as script
from demo import world
from personalization.files import atomic_path, write_json
from personalization.methods import dreambooth


RESULT, GRADIENTS = RESULTS / "selective_quality.json", RESULTS / "selective_gradients.json"
PICTURES = CACHE / "selective"  # of each entry, its first image of each prompt
SHEET, PROBABILITY = DOCS / "selective_sheet.png", DOCS / "selective_probability.png"
KEY = ("variant", "subject", "seed", "changes")

ALWAYS, NEVER = 100.0, -100.0  # midpoints of a ramp that is 1, or 0, everywhere
BP_ONLY = {"bp_timestep_midpoint": ALWAYS, "bp_progress_midpoint": ALWAYS}
VARIANTS = {  # flags of the script
    "bp-high": BP_ONLY | {"low_resolution": 64},
    "bp-low": BP_ONLY,
    "zo-high": {"bp_timestep_midpoint": NEVER},
    "selective": {},
    "no-timestep": {"bp_timestep_midpoint": ALWAYS},
    "no-progress": {"bp_progress_midpoint": ALWAYS},
    "one-adam": {},  # selective, but both kinds of step share an optimizer's moments
    "window": {"bp_view": "window"},
    "window-selective": {"bp_view": "window", "bp_timestep_midpoint": 0.6, "bp_progress_midpoint": 0.9},
}


def script_args(subject, seed, variant, steps, **more):
    """The script's settings of one run."""
    flags = {
        "pretrained_model_name_or_path": DEMO / "base",
        "instance_data_dir": DEMO / "subjects" / subject,
        "subject_name": world.SUBJECTS[subject].shape,
        "seed": seed,
        "train_batch_size": 4,
        "learning_rate": 2e-3,  # the demo model's
        "zo_learning_rate": 2e-3,
        "max_train_steps": steps,
        "report_to": "none",
        **VARIANTS[variant],
        **more,
    }
    return script.parse_args(as_words(flags))


def prepare(settings):
    """Everything a run of the script starts from: `Learner`, `Model`, `Subject`s by kind, `Sampling`."""
    base, compute = script.resolve_settings(settings, torch.device("cpu"))
    pictures = dreambooth.read_instances(settings)
    texts = dreambooth.instance_texts(pictures, settings.instance_prompt, settings.subject_name)
    subjects, _ = script.load_subjects(settings, pictures, texts, None, base, compute)
    conditioning, _, _ = dreambooth.encode_texts(settings, texts, base, compute)
    model, _ = script.load_model(settings, base, compute, conditioning)
    return script.start_learner(settings, model), model, subjects, script.choose_sampling(settings)


def share_moments(learner):
    """Both kinds of step from now on move by the same Adam moments, each at its own rate."""
    states = [learner.optimizers[kind].state for kind in script.KINDS]
    theta = learner.theta
    for state in states:
        state[theta] = (
            states[0][theta]
            if theta in states[0]
            else {"step": torch.zeros(()), "exp_avg": torch.zeros_like(theta), "exp_avg_sq": torch.zeros_like(theta)}
        )


def train(settings, variant):
    """Trains one run; returns its `Model`, what it cost, and its mean last losses by kind."""
    learner, model, subjects, sampling = prepare(settings)
    if variant == "one-adam":
        share_moments(learner)
    losses, started = {kind: [] for kind in script.KINDS}, time.process_time()
    for step in range(settings.max_train_steps):
        progress = step / settings.max_train_steps
        kind, loss = script.train_step(learner, model, subjects, sampling, progress)
        losses[kind].append(loss.item())
    figures = {
        "updates": learner.updates,
        "cpu_seconds": round(time.process_time() - started, 1),
        "loss": {kind: round(float(np.mean(values[-20:])), 4) for kind, values in losses.items() if values},
    }
    return model, figures


def draw_with_adapters(judge, tensors, subject):
    """What an untouched pipeline draws with a LoRA, of any names that diffusers reads."""
    judge.pipeline.load_lora_weights(tensors)
    try:
        return judge.draw(judge.pipeline.unet, subject)
    finally:
        judge.pipeline.unload_lora_weights()


def compare_gradients(subject, seed=0, updates=12, batches=8):
    """How the two kinds of gradient differ, weight by weight, after a few updates: root mean squares over batches.

    Returns:
        JSON-ready: quantiles over the D weights of both, and of their ratio; mean cosine of estimates with the
        gradient of the same batch; n and D.
    """
    settings = script_args(subject, seed, "selective", 200)
    learner, model, subjects, sampling = prepare(settings)
    for step in range(updates):
        script.train_step(learner, model, subjects, sampling, step / 200)
    uniform, bp, zo, cosines = torch.ones(1000, dtype=torch.float64), [], [], []
    for number in range(batches):
        generator = torch.Generator().manual_seed(number)
        low, high = (
            script.draw_batch(subjects[kind], sampling, uniform, model.scheduler, generator) for kind in script.KINDS
        )
        bp.append(script.bp_low(learner, model, low, sampling)[0])
        zo.append(script.zo_high(learner, model, high, sampling)[0])
        truth, _ = script.bp_low(learner, model, high, sampling)
        cosines.append(torch.nn.functional.cosine_similarity(zo[-1], truth, dim=0).item())
    sizes = {kind: torch.stack(found).square().mean(dim=0).sqrt() for kind, found in zip(script.KINDS, (bp, zo))}
    sizes["ratio"] = sizes[script.ZO_HIGH] / sizes[script.BP_LOW].clamp(min=1e-12)
    shares = torch.tensor([0.05, 0.5, 0.95])
    return {
        "quantiles": {name: [float(f"{x:.3g}") for x in size.quantile(shares)] for name, size in sizes.items()},
        "cosine": round(float(np.mean(cosines)), 4),
        "num_perturbations": sampling.num_perturbations,
        "weights": len(learner.theta),
        **{"subject": subject, "seed": seed, "updates_before": updates, "batches": batches},
        **common.provenance(),
    }


def compare_windows(subject, seed=0, timesteps=(100, 400, 700, 950), spread=0.02):
    """How far the gradients of the four windows that tile a picture add up to its own.

    Adapters are Gaussian around their start, by `spread`. JSON-ready: a cosine for each timestep.
    """
    settings = script_args(subject, seed, "window", 200)
    learner, model, subjects, sampling = prepare(settings)
    learner.theta += spread * torch.randn(learner.theta.shape, generator=torch.Generator().manual_seed(seed))
    cosines = {}
    for t in timesteps:
        weights = torch.zeros(1000).scatter_(0, torch.tensor([t]), 1.0)
        generator = torch.Generator().manual_seed(seed)
        batch = script.draw_batch(subjects[script.BP_LOW], sampling, weights, model.scheduler, generator)
        whole = torch.autograd.grad(model.errors(batch).mean(), model.weights)
        side, (height, width) = model.surroundings.side, batch.noisy_latents.shape[2:]
        total = torch.zeros_like(learner.theta)
        for corner in itertools.product(range(0, height, side), range(0, width, side)):
            tile = script.windows.Windows([corner] * len(batch.timesteps), side, height, width)
            total += script.bp_window(learner, model, batch, sampling, tile)[0]
        whole = torch.cat([gradient.flatten() for gradient in whole])
        cosines[str(t)] = round(torch.nn.functional.cosine_similarity(total, whole, dim=0).item(), 3)
    return {"cosines": cosines, "subject": subject, "seed": seed, "spread": spread, "examples": len(batch.timesteps)}


# =====================================================================================================
# Results
# =====================================================================================================


def read_result(path):
    return {"entries": [], "plain_word": {}} | common.read(path)


def store(path, entries=(), plain_word=None):
    """Adds entries, or scores of the plain word, to the file."""
    settings = {"images": IMAGES, "guidance": GUIDANCE, "inference_steps": INFERENCE_STEPS}
    plain_word = read_result(path)["plain_word"] | (plain_word or {})
    common.put(path, entries, KEY, settings=settings, plain_word=plain_word)


def keep_pictures(folder, label, subject, pictures):
    """The first image of each prompt, two in a row."""
    side = pictures[0][0].width
    grid = Image.new("RGB", (2 * side, side * ((len(pictures) + 1) // 2)))
    for i, (first, *_) in enumerate(pictures):
        grid.paste(first, (i % 2 * side, i // 2 * side))
    with atomic_path(folder / f"{label}-{subject}.png") as path:
        grid.save(path)


def draw_sheet(folder, subjects, path, side=128, top=20):
    """Rows: subjects; columns: two of the pictures learned from, the plain word, and every variant at seed 0."""
    labels = [
        label for label in ["plain", *VARIANTS] if all((folder / f"{label}-{s}.png").is_file() for s in subjects)
    ]
    sheet = Image.new("RGB", ((side + 4) * (len(labels) + 1), top + (side + 4) * len(subjects)), "white")
    ink = ImageDraw.Draw(sheet)
    for column, label in enumerate(["pictures", *labels]):
        ink.text((column * (side + 4) + 4, 3), label, fill="black", font_size=12)
    for row, subject in enumerate(subjects):
        paths = sorted((DEMO / "subjects" / subject).glob("*.png"))[:4]
        cells = [[Image.open(one).convert("RGB")] for one in paths]
        keep_pictures(folder, "pictures", subject, cells)
        for column, label in enumerate(["pictures", *labels]):
            cell = Image.open(folder / f"{label}-{subject}.png").resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(cell, (column * (side + 4), top + row * (side + 4)))
    with atomic_path(path) as temporary:
        sheet.save(temporary)


def plot_probability(path):
    """p_BP of the script's defaults over timesteps and progress, and the share of BP-low that comes of it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings = script.parse_args(["--pretrained_model_name_or_path", "x", "--instance_data_dir", "x"])
    selection = script.choose_sampling(settings).selection
    timesteps, progress = torch.arange(0, 1, 0.002), torch.arange(0, 1.001, 0.002)
    table = torch.stack([selection.bp_probability(timesteps, float(x)) for x in progress], dim=1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    shown = left.imshow(table, origin="lower", extent=(0, 1, 0, 1), aspect="auto", vmin=0, vmax=1, cmap="viridis")
    left.contour(progress, timesteps, table, levels=[0.1, 0.5, 0.9], colors="white", linewidths=0.8)
    left.set(xlabel="progress", ylabel="t / T", title="p_BP: probability that an example is learned by BP-low")
    figure.colorbar(shown, ax=left)
    right.plot(progress, table.mean(dim=0), label="all timesteps")
    for t in (0.1, 0.5, 0.9):
        right.plot(progress, table[int(t * len(timesteps))], "--", label=f"t / T = {t}")
    right.set(xlabel="progress", ylabel="share of BP-low", title="Share of BP-low", ylim=(0, 1))
    right.legend(loc="lower left")
    right.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100)
    plt.close(figure)


def parse_args():
    subjects = sorted(path.parent.name for path in (DEMO / "subjects").glob("*/metadata.jsonl"))
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--subjects", nargs="+", choices=subjects, default=subjects, help="Of demo/subjects.")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="Of training.")
    add("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="Which.")
    add("--set", nargs="+", default=[], metavar="FLAG=VALUE", help="Other settings of the script, for pilots.")
    add("--steps", type=int, default=200, help="Of training, of four examples each.")
    add("--output", type=Path, default=RESULT, help="JSON file that is added to.")
    add(
        "--gradients",
        action="store_true",
        help="Only compare gradients: BP-low's with ZO-high's, windows' with whole pictures'; on the first subject.",
    )
    add("--anew", action="store_true", help="Train again what other code has trained.")
    add("--plot_only", action="store_true", help="Train nothing, draw the pictures from what is there.")
    return parser.parse_args()


def main():
    args = parse_args()
    if args.gradients:
        found = compare_gradients(args.subjects[0]) | {"windows": compare_windows(args.subjects[0])}
        return write_json(GRADIENTS, found)
    if not args.plot_only:
        compare(args)
    if args.output == RESULT:
        plot_probability(PROBABILITY)
        draw_sheet(PICTURES, args.subjects, SHEET)
        print(f"Wrote {PROBABILITY} and {SHEET}")


def compare(args):
    """Trains and judges what is not there yet, seeds outermost, so that a stopped run is as even as can be."""
    common.warn_if_busy()
    judge, source = Judge(), common.source_hash("benchmarks/compare_selective.py", without=["benchmarks/common.py"])
    for subject in (name for name in args.subjects if name not in read_result(args.output)["plain_word"]):
        pictures = judge.draw(judge.pipeline.unet, subject)
        keep_pictures(PICTURES, "plain", subject, pictures)
        store(args.output, plain_word={subject: judge.score(pictures, subject)})
    runs = itertools.product(args.seeds, args.subjects, args.variants)
    keys = [(variant, subject, seed, " ".join(args.set)) for seed, subject, variant in runs]
    done = {common.key_of(e, KEY): e for e in read_result(args.output)["entries"]}
    done = {key: entry for key, entry in done.items() if key in keys}
    if args.anew:
        done = {key: entry for key, entry in done.items() if entry.get("source") == source}
    common.say_what_is_kept(done.values(), source)
    for key in (key for key in keys if key not in done):
        variant, subject, seed, _ = key
        settings = script_args(subject, seed, variant, args.steps, **dict(one.split("=") for one in args.set))
        model, figures = train(settings, variant)
        pictures = draw_with_adapters(judge, script.adapter_tensors(model.unet), subject)
        if seed == 0 and not args.set:
            keep_pictures(PICTURES, variant, subject, pictures)
        scores = judge.score(pictures, subject)
        entry = {**dict(zip(KEY, key)), "scores": scores, **figures}
        entry |= {"steps": args.steps, "settings": {name: getattr(settings, name) for name in RECORDED}}
        store(args.output, [entry | common.provenance() | {"source": source}])
        print(*key, " ".join(f"{name} {x:.3f}" for name, x in scores.items()), figures, flush=True)


RECORDED = (
    "bp_view low_resolution resolution rank lora_alpha learning_rate zo_learning_rate num_perturbations"
    " perturbation_scale bp_timestep_midpoint bp_timestep_width bp_progress_midpoint bp_progress_width"
    " train_batch_size lr_scheduler"
).split()


if __name__ == "__main__":
    main()
