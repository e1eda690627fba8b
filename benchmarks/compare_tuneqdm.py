"""TuneQDM's strategies and full fine-tuning on the demo base: subject against prompt fidelity over training length.

    python benchmarks/compare_tuneqdm.py                                     # everything: a night on two cores
    python benchmarks/compare_tuneqdm.py --subjects striped_star --seeds 0   # or less; what is there stays
    python benchmarks/compare_tuneqdm.py --plot_only

Every variant is trained by the script's own `train_step` in this process and judged at several lengths by
`evaluate_personalization` (the demo's prompts, four images of each, the scales in place). One entry for each
(variant, bits, learning rate, subject, seed) is added to `benchmarks/results/tuneqdm_quality.json` as soon as it is
done; those that are there are not computed again, so a run that was stopped goes on. `docs/tuneqdm_tradeoff.png` is
drawn anew at the end.
"""

import argparse
import itertools
import time
from pathlib import Path

from benchmarks import common
from benchmarks.common import DEMO, DOCS, RESULTS, as_words


# isort: split
import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image

import evaluate_personalization as evaluation
import train_tuneqdm_dreambooth as script
from demo import world
from personalization.files import atomic_path
from personalization.methods import dreambooth
from personalization.models import base_model
from tuneqdm_pipeline import quantize_unet


RESULT, PICTURE = RESULTS / "tuneqdm_quality.json", DOCS / "tuneqdm_tradeoff.png"
NAMES = {"CLIP-I": "CLIP-I", "DINO": "identity", "CLIP-T": "CLIP-T"}  # the scorer's stand-in for DINO is its own
IMAGES, GUIDANCE, INFERENCE_STEPS, IMAGE_SEED = 4, 4.0, 25, 0
KEY = ("variant", "bits", "learning_rate", "subject", "seed")
BATCH_SIZE, CALIBRATION = 4, "minmax"

# Flags of the script; None: all weights of the UNet, unquantized, are trained.
VARIANTS = {
    "full": None,
    "peqa": {},
    "s1-0-500": {"scale_intervals": "0-500"},
    "s1-250-750": {"scale_intervals": "250-750"},
    "s1-500-900": {"scale_intervals": "500-900"},
    "s1-500-1000": {"scale_intervals": "500-1000"},
    "s1-700-1000": {"scale_intervals": "700-1000"},
    "s2-2": {"scale_sets": 2},
    "s2-4": {"scale_sets": 4},
    "s2-2-inputs": {"scale_sets": 2, "train_input_scales": True},
    "s2-4-inputs": {"scale_sets": 4, "train_input_scales": True},
    "peqa-inputs": {"train_input_scales": True},
}
FULL_LEARNING_RATE = 1e-4


def script_args(subject, seed, bits, variant, learning_rate, args):
    """The script's settings of one run."""
    flags = {
        "pretrained_model_name_or_path": DEMO / "base",
        "instance_data_dir": DEMO / "subjects" / subject,
        "subject_name": world.SUBJECTS[subject].shape,
        "seed": seed,
        "bits": bits or 8,
        "calibration": CALIBRATION,
        "learning_rate": learning_rate,
        "train_batch_size": BATCH_SIZE,
        "max_train_steps": max(args.steps),
        "report_to": "none",
        **(VARIANTS[variant] or {}),
    }
    return script.parse_args(as_words(flags))


class Judge:
    """Draws the demo's prompts with a UNet, and scores them."""

    def __init__(self):
        scorer = DEMO / "scorer"
        self.encoders = evaluation.Encoders(str(scorer), str(scorer / "identity"), True, torch.device("cpu"), 16)
        self.pipeline = StableDiffusionPipeline.from_pretrained(
            DEMO / "base", dtype=torch.float32, safety_checker=None, requires_safety_checker=False
        )
        self.pipeline.scheduler = DPMSolverMultistepScheduler.from_config(self.pipeline.scheduler.config)
        self.pipeline.set_progress_bar_config(disable=True)
        self.prompts = evaluation.read_prompts(DEMO / "prompts.txt")

    def texts(self, subject):
        return [prompt.replace("{}", world.SUBJECTS[subject].shape) for prompt in self.prompts]

    @torch.inference_mode()
    def draw(self, unet, subject):
        """`IMAGES` PIL images of each prompt."""
        self.pipeline.unet, pictures = unet, []
        for i, text in enumerate(self.texts(subject)):
            seeds = (IMAGE_SEED + 1000 * i + j for j in range(IMAGES))
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            options = {"num_inference_steps": INFERENCE_STEPS, "guidance_scale": GUIDANCE, "generator": generators}
            pictures.append(self.pipeline([text] * IMAGES, **options).images)
        return pictures

    def score(self, pictures, subject):
        """Metric -> mean, of what `draw` has drawn."""
        paths = sorted((DEMO / "subjects" / subject).glob("*.png"))
        references = [Image.open(path).convert("RGB") for path in paths]
        scores = evaluation.score_column(pictures, references, self.texts(subject), self.encoders)
        return {NAMES[name]: round(value.mean, 4) for name, value in scores.items() if name in NAMES}

    def __call__(self, unet, subject):
        """Metric -> mean, of a subject."""
        return self.score(self.draw(unet, subject), subject)


def train_and_judge(settings, bits, subject, judge, lengths):
    """One run: steps -> scores, and seconds of training in all."""
    base, compute, table = script.resolve_settings(settings, torch.device("cpu"))
    pictures = script.read_instances(settings)
    texts = script.instance_texts(pictures, settings.instance_prompt, settings.subject_name)
    loaded, _ = dreambooth.encode_pictures(pictures, texts, None, base, settings.flip_probability, compute)
    conditioning, _, _ = dreambooth.encode_texts(settings, texts, base, compute)
    if bits:
        model, changes, _ = script.load_model(settings, base, compute, table, conditioning)
    else:
        unet = base_model.load_component(base, "unet")
        changes = dict(unet.requires_grad_(True).named_parameters())
        model = script.Model(base.family, unet, None, base.scheduler, conditioning, compute)
    learner = script.start_learner(settings, changes, compute)
    sampling = script.choose_sampling(settings, table)
    scores, seconds, losses = {}, 0.0, []
    for step in range(1, max(lengths) + 1):
        started = time.perf_counter()
        losses.append(script.train_step(learner, model, loaded, sampling).item())
        seconds += time.perf_counter() - started
        if step in lengths:
            scores[str(step)] = {**judge(model.unet, subject), "loss": round(float(np.mean(losses[-20:])), 4)}
    return scores, round(seconds, 1)


def judge_bases(judge, subjects):
    """What the base draws for the plain word, unquantized and quantized: subject -> bits -> scores."""
    scores = {subject: {} for subject in subjects}
    for bits in (0, 8, 4):
        unet = base_model.load_component(base_model.open_base(base_model.ModelSource(str(DEMO / "base"))), "unet")
        if bits:
            quantize_unet(unet, bits, CALIBRATION)
        for subject in subjects:
            scores[subject][str(bits)] = judge(unet, subject)
    return scores


# =====================================================================================================
# Results
# =====================================================================================================


def read_result(path):
    return {"entries": [], "bases": {}} | common.read(path)


def store(path, entries=(), bases=None):
    """Adds entries, or scores of bases, to the file."""
    settings = {"images": IMAGES, "guidance": GUIDANCE, "inference_steps": INFERENCE_STEPS}
    common.put(path, entries, KEY, settings=settings, bases=read_result(path)["bases"] | (bases or {}))


def means(entries, length, name):
    """The mean of a metric at a training length over those entries that have it."""
    values = [entry["scores"][length][name] for entry in entries if length in entry["scores"]]
    return sum(values) / len(values)


def plot(result, path, steps):
    """CLIP-I against CLIP-T over training length, a line for each variant, a panel for each number of bits."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(12, 5), sharex=True, sharey=True, constrained_layout=True)
    for bits, axes in zip((8, 4), panels):
        for number, variant in enumerate(VARIANTS):
            rate = [e["learning_rate"] for e in result["entries"] if e["variant"] == variant]
            rate = max(set(rate), key=rate.count) if rate else None  # the one that most was measured with
            chosen = [e for e in result["entries"] if (e["variant"], e["learning_rate"]) == (variant, rate)]
            chosen = [e for e in chosen if e["bits"] in (0, bits)]
            lengths = [str(step) for step in sorted(steps) if any(str(step) in e["scores"] for e in chosen)]
            if not lengths:
                continue
            points = [[means(chosen, length, name) for length in lengths] for name in ("CLIP-T", "CLIP-I")]
            style = {"color": f"C{number % 10}", "marker": "os^"[number // 10], "markersize": 4}
            axes.plot(*points, linestyle="--" if variant == "full" else "-", label=variant, **style)
            axes.annotate(lengths[-1], (points[0][-1], points[1][-1]), fontsize=7)
        axes.set(title=f"INT{bits} (full: float32)", xlabel="CLIP-T (prompt)")
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="CLIP-I (subject)")
    panels[0].legend(fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
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
    add("--bits", nargs="+", type=int, choices=[8, 4], default=[8, 4], help="Of quantized variants.")
    add("--steps", nargs="+", type=int, default=[50, 100, 200, 400], help="Lengths at which to judge.")
    add("--learning_rates", nargs="+", type=float, default=[1e-2], help="Relative, of quantized variants.")
    add("--full_learning_rates", nargs="+", type=float, default=[FULL_LEARNING_RATE], help="Of full fine-tuning.")
    add("--output", type=Path, default=RESULT, help="JSON file that is added to.")
    add("--anew", action="store_true", help="Train again what other code has trained.")
    add("--plot_only", action="store_true", help="Train nothing, draw the picture from what is there.")
    return parser.parse_args()


def list_runs(args):
    """Every `KEY` that is asked for, seeds outermost: what is there of a stopped run is as even as can be."""
    for seed, subject, variant in itertools.product(args.seeds, args.subjects, args.variants):
        if VARIANTS[variant] is None:
            yield from ((variant, 0, rate, subject, seed) for rate in args.full_learning_rates)
        else:
            pairs = itertools.product(args.bits, args.learning_rates)
            yield from ((variant, bits, rate, subject, seed) for bits, rate in pairs)


def main():
    args = parse_args()
    if not args.plot_only:
        compare(args)
    result = read_result(args.output)
    if result["entries"] and args.output == RESULT:
        plot(result, PICTURE, args.steps)
        print(f"Wrote {PICTURE}")


def compare(args):
    """Trains and judges what is not there yet."""
    common.warn_if_busy()
    judge, lengths = Judge(), {str(step) for step in args.steps}
    source = common.source_hash("benchmarks/compare_tuneqdm.py", without=["benchmarks/common.py"])
    if missing := [name for name in args.subjects if name not in read_result(args.output)["bases"]]:
        store(args.output, bases=judge_bases(judge, missing))
    there = {common.key_of(e, KEY): e for e in read_result(args.output)["entries"]}
    done = {key: there[key] for key in list_runs(args) if key in there and lengths <= there[key]["scores"].keys()}
    if args.anew:
        done = {key: entry for key, entry in done.items() if entry.get("source") == source}
    common.say_what_is_kept(done.values(), source)
    for key in (key for key in list_runs(args) if key not in done):
        variant, bits, rate, subject, seed = key
        settings = script_args(subject, seed, bits, variant, rate, args)
        scores, seconds = train_and_judge(settings, bits, subject, judge, args.steps)
        if there.get(key, {}).get("source") == source:  # those of other lengths stay
            scores = there[key]["scores"] | scores
        entry = {**dict(zip(KEY, key)), "scores": scores, "training_seconds": seconds}
        entry |= {"train_batch_size": BATCH_SIZE, "calibration": CALIBRATION}
        store(args.output, [entry | common.provenance() | {"source": source}])
        last = scores[str(max(args.steps))]
        print(*key, " ".join(f"{name} {last[name]:.3f}" for name in NAMES.values()), f"{seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
