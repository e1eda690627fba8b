#!/usr/bin/env python
"""Every way to learn a token, on every demo subject, at equal cost: quality and held-out loss against forwards.

    python benchmarks/compare_methods.py --subjects all --seeds 0 1 2 --processes 2     # hours; goes on where it was
    python benchmarks/compare_methods.py --collect                                      # what is finished, as it is
    make evaluate                                                                       # three subjects, one seed

Cost is counted in example-forwards through the UNet (candidates x examples), a backward pass as two. A full run has
15,000: the paper's 30,000 steps of n = 2, scaled by the token's dimension (128 here, 768 there), as the variance of a
zeroth-order estimate grows with it. At every milestone θ is judged by the float32, unquantized model: its loss on 256
fixed examples of pictures that nothing is trained on, the same for every method and seed, with t in [500, 900), where
the subject is decided; and pictures of the demo's prompts, from the same noise for all, by `evaluate_personalization`,
and by how often `demo/scorer` reads the subject's shape in them.

A finished run is a JSON file in `--cache_dir`, named by its settings, the base and the code. Other code makes it
again, unless `--other_code` counts what is there; every run in the result has its commit. What an earlier result has
of the same settings goes into the cache first, so a new machine goes on where the last one was. The methods are in
`grids.py`; results go to `benchmarks/results/methods_eps.json` and `docs/methods_eps*.png`.
"""

import base64
import hashlib
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks import common
from benchmarks.common import CACHE, DEMO, DOCS, RESULTS, ROOT


# isort: split
import torch
from accelerate import PartialState
from diffusers import StableDiffusionPipeline
from diffusers.utils import make_image_grid
from PIL import Image
from tqdm.auto import tqdm

import evaluate_personalization as evaluation
import train_zoodip_textual_inversion as zoodip
from benchmarks import ablations, grids
from benchmarks.methods import ForwardCount, Method, prepare
from benchmarks.plot_methods import contact_sheet, plot, plot_kept, plot_timesteps
from benchmarks.summaries import forwards_to_reach, over_seeds, subject_means
from benchmarks.tables.methods import FIGURES, figure_of
from benchmarks.tables.methods import ablation as ablation_table
from benchmarks.tables.methods import methods as methods_table
from demo import world
from personalization import flags
from personalization.errors import RunError, run_script
from personalization.files import atomic_path, sha256, write_json
from personalization.runs import embeddings


BASES = ("base", "base_eps")  # of demo/: the first predicts v with zero terminal SNR, the second ε, as SD 1.5 does
SUBJECTS, SCORER = DEMO / "subjects", DEMO / "scorer"
PLACEHOLDER = "<my-toy>"
GRIDS = {**grids.GRIDS, **ablations.GRIDS}
NAMES = {"CLIP-I": "CLIP-I", "DINO": "identity", "CLIP-T": "CLIP-T"}  # the demo scorer's stand-in for DINO is its own
METRICS = ("loss", *NAMES.values(), "shape")
KEPT = ("steps", "seconds", "commit", "changed", "source")  # of a run's file in a result, beside its curve
REFERENCE = "paper"  # the method whose final quality the others are timed to
PASS = 32  # examples of one pass that judges: 16 pictures with guidance, or held-out examples


# =====================================================================================================
# One run: a method learns a subject and is judged at every milestone
# =====================================================================================================


@dataclass(frozen=True)
class Judging:
    """How a token is judged; a change of it makes other results."""

    held_out: int = 256  # examples of the held-out loss
    pictures: int = 16  # that they are of, twice each background
    images_per_prompt: int = 4
    num_inference_steps: int = 20
    guidance_scale: float = 4.0
    timesteps: tuple = (500, 900)
    unet_backend: str = "openvino"


@dataclass(frozen=True)
class Run:
    """Everything that decides a run's result."""

    grid: str
    name: str  # of the method in its grid
    method: Method
    subject: str
    seed: int
    milestones: tuple  # example-forwards; the last is the budget
    image_milestones: tuple  # those with pictures
    judging: Judging
    base: str  # fingerprint of base and scorer
    source: str = ""  # `source_hash` of the code
    model: str = BASES[0]  # folder of the base in demo/

    def settings(self):
        """JSON-ready, as they are read back, without the code; what a reader calls the method changes nothing."""
        content = json.loads(json.dumps(asdict(self)))
        del content["method"]["title"], content["source"]
        return content

    def length(self, args):
        """Updates in all, which the schedule of the learning rate is as long as."""
        return self.milestones[-1] // self.method.forwards_per_step(args)

    def path(self, cache_dir, source=None):
        """Of its file, by this code; `source` may be a pattern."""
        key = hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()[:8]
        name = f"{self.name}-{self.subject}-{self.seed}-{key}-{self.source if source is None else source}.json"
        return Path(cache_dir) / self.grid / name


def common_flags(run, cache_dir):
    """Flags of the script that all methods share, which those of a method may overrule."""
    return [
        *("--pretrained_model_name_or_path", DEMO / run.model, "--train_data_dir", SUBJECTS / run.subject),
        *("--placeholder_token", PLACEHOLDER, "--initializer_token", world.SUBJECTS[run.subject].shape),
        *("--flip_probability", 0),  # a moon mirrored is another moon
        *("--quantized_cache_dir", Path(cache_dir) / "weights", "--report_to", "none", "--seed", run.seed),
        *("--unet_backend", run.judging.unet_backend),
    ]


class Judge:
    """The float32, unquantized model, the held-out examples and the scorer for one subject.

    Args:
        run: `Run`.
        cache_dir: of exported weights.
        num_vectors: k of the token that is judged.
    """

    def __init__(self, run, cache_dir, num_vectors=1):
        settings, self.subject = run.judging, run.subject
        least, most = settings.timesteps
        flags = ["--quantization", "none", "--mixed_precision", "no", "--seed", 0, "--num_vectors", num_vectors]
        flags += ["--max_candidates_per_forward", 1, "--train_batch_size", PASS]
        flags += ["--num_validation_samples", settings.held_out]
        flags += ["--puts_min_timestep", least, "--puts_max_timestep", most]
        with tempfile.TemporaryDirectory() as folder:
            world.save_pictures(folder, world.held_out_pictures(run.subject, settings.pictures))
            flags += ["--validation_data_dir", folder]
            self.task = task = prepare([*common_flags(run, cache_dir), *flags])
        self.held_out = zoodip.draw_held_out(task)
        self.pipeline = StableDiffusionPipeline.from_pretrained(DEMO / run.model)
        self.pipeline.unet = task.model.denoiser  # of any engine
        self.pipeline.set_progress_bar_config(disable=True)
        self.encoders = evaluation.Encoders(SCORER, SCORER / "identity", True, torch.device("cpu"), 64)
        self.word = world.SUBJECTS[run.subject].shape
        self.shapes = self.encoders.clip_texts([f"a photo of a {shape}" for shape in world.SHAPES])
        prompts = evaluation.read_prompts(DEMO / "prompts.txt")
        size = task.args.resolution, settings.num_inference_steps, settings.guidance_scale
        self.drawing = evaluation.Drawing("demo", prompts, settings.images_per_prompt, 0, *size)
        paths = sorted((SUBJECTS / run.subject).glob("*.png"))
        self.references = [Image.open(path).convert("RGB") for path in paths]

    @torch.inference_mode()
    def loss(self, theta):
        """The held-out loss of θ `[k, d]`."""
        return zoodip.held_out_loss(self.task.model, theta, self.held_out)

    def draw(self, theta):
        """Pictures of every prompt, P lists of N PIL images; θ None is the plain word."""
        with tempfile.TemporaryDirectory() as folder:
            column = evaluation.Column(evaluation.PLAIN, self.word, None, "")
            if theta is not None:
                embeddings.save_embeds(Path(folder) / evaluation.RESULT_FILE, PLACEHOLDER, theta)
                column = evaluation.Column("learned", PLACEHOLDER, Path(folder), "", base=self.task.base)
            evaluation.draw_missing(folder, [column], self.drawing, self.pipeline, PASS // 2)

            def open_image(p, i):
                return Image.open(evaluation.image_path(folder, column, p, i)).convert("RGB")

            return [
                [open_image(p, i) for i in range(self.drawing.num_images)] for p in range(len(self.drawing.prompts))
            ]

    def scores(self, pictures):
        """The pictures' metrics: name -> mean; "shape" is the share of pictures in which the subject's is read."""
        texts = [prompt.replace("{}", self.word) for prompt in self.drawing.prompts]
        scored = evaluation.score_column(pictures, self.references, texts, self.encoders)
        likeness = self.encoders.clip_images([picture for row in pictures for picture in row]) @ self.shapes.T
        right = likeness.argmax(dim=1) == world.SHAPES.index(self.word)
        return {name: scored[metric].mean for metric, name in NAMES.items()} | {"shape": right.float().mean().item()}


def perform(run, cache_dir):
    """Performs a run and writes its JSON file, and beside it a strip of pictures, the first of each prompt."""
    started = time.process_time()  # on one thread; it stands still while the process is stopped
    PartialState(cpu=True)  # accelerate's logger wants it
    learner, count, args = None, None, None
    if run.method.learner is not None:
        task = prepare([*common_flags(run, cache_dir), *run.method.flags.split()], run.length)
        args = task.args
        learner, count = run.method.make(task), ForwardCount(task.model.denoiser)
    kept = ablations.watch_subspace(learner)
    judge = Judge(run, cache_dir, args.num_vectors if args else 1)
    curve, thetas, strip, steps, seconds, cost = [], {}, None, 0, 0.0, 0
    for milestone in run.milestones:
        began = time.process_time()
        while learner is not None and count.total + cost <= milestone:
            before = count.total
            learner.step()
            steps, cost = steps + 1, count.total - before
        seconds += time.process_time() - began
        theta = judge.task.initial[None] if learner is None else learner.theta.detach().clone()
        if not theta.isfinite().all():
            raise RunError(f"{run.name} on {run.subject}, seed {run.seed}, diverged within {milestone} forwards.")
        point = {"milestone": milestone, "forwards": count.total if count else 0, "loss": judge.loss(theta)}
        if milestone in run.image_milestones:
            pictures = judge.draw(None if learner is None else theta)
            point |= judge.scores(pictures)
            strip = make_image_grid([row[0] for row in pictures], 1, len(pictures))
        curve.append({name: round(value, 6) for name, value in point.items()})
        thetas[str(milestone)] = base64.b64encode(theta.float().numpy().tobytes()).decode()
    path = run.path(cache_dir)
    if strip is not None:
        with atomic_path(path.with_suffix(".png")) as temporary:
            strip.save(temporary)
    whole = time.process_time() - started
    times = {"training": round(seconds, 1), "whole": round(whole, 1)}
    content = {"settings": run.settings(), "curve": curve, "thetas": thetas, "steps": steps, "seconds": times}
    content |= {**common.CODE, "source": run.source}
    write_json(path, content if kept is None else {**content, "kept": kept})


# =====================================================================================================
# Many runs
# =====================================================================================================


def list_runs(grid, names, subjects, seeds, milestones, image_milestones, judging, base, source="", model=BASES[0]):
    """All runs: every method and subject of the first seed, then the next. The plain word has no seed and no steps.

    Without milestones, those of the ablations' cells.
    """
    listed, folder = [], ablations.FOLDER if grid in ablations.GRIDS else grid
    for seed, name, subject in itertools.product(seeds, names, subjects):
        method = GRIDS[grid][name]
        if method.learner is None:
            if seed == seeds[0]:
                listed.append(Run(folder, name, method, subject, 0, (0,), (0,), judging, base, source, model))
        else:
            when = (milestones, image_milestones) if milestones else (ablations.milestones(name),) * 2
            if method.budget:
                when = [tuple(each for each in one if each <= method.budget) for one in when]
                when[1] = when[1] or when[0][-1:]  # its end is drawn
            listed.append(Run(folder, name, method, subject, seed, *when, judging, base, source, model))
    return listed


def finished(run, cache_dir):
    """The content of a run's file; None where there is none of these settings by this code."""
    try:
        content = json.loads(run.path(cache_dir).read_text(encoding="utf-8"))
        return content if content["settings"] == run.settings() else None
    except (OSError, ValueError, KeyError):
        return None


def with_finished(run, cache_dir):
    """The run, of whatever code there is a finished one: of this code or else of the newest."""
    if finished(run, cache_dir) is None:
        paths = run.path(cache_dir).parent.glob(run.path(cache_dir, "*").name)
        for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True):
            other = replace(run, source=path.stem.rsplit("-", 1)[1])
            if finished(other, cache_dir) is not None:
                return other
    return run


def restore(result, listed, cache_dir):
    """Makes files of the runs that an earlier result has, each with its code and commit, where the cache has none.

    They have neither θ nor pictures, which no result keeps.
    """
    known, methods = result["configuration"], result["methods"]
    rows = {(row["name"], row["subject"], row["seed"]): row for row in result["runs"] if "source" in row}
    for run in listed:
        row, settings = rows.get((run.name, run.subject, run.seed)), run.settings()
        if row is None or finished(with_finished(run, cache_dir), cache_dir) is not None:
            continue
        shared = {key: known.get(key) for key in ("judging", "model", "base")}
        method = {key: value for key, value in methods[run.name].items() if key != "title"}
        points = list(zip(*(row[key] for key in ("forwards", *METRICS))))
        judged = [milestone for milestone, point in zip(run.milestones, points) if point[-1] is not None]
        if shared | {"method": method} != {key: settings[key] for key in (*shared, "method")}:
            continue
        if len(points) != len(run.milestones) or judged != list(run.image_milestones):
            continue
        curve = [
            {"milestone": milestone}
            | {key: value for key, value in zip(("forwards", *METRICS), point) if value is not None}
            for milestone, point in zip(run.milestones, points)
        ]
        content = {"settings": settings, "curve": curve}
        content |= {key: row[key] for key in (*KEPT, "kept") if key in row}
        path = replace(run, source=row["source"]).path(cache_dir)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)


def hash_code():
    """Of all code that decides what a run finds; what its method is stands in its settings."""
    no_part = "common.py grids.py ablations.py plot_methods.py summaries.py tables/".split()
    files = ("benchmarks/compare_methods.py", "benchmarks/ideas.py")
    return common.source_hash(*files, without=[f"benchmarks/{name}" for name in no_part])


def fingerprint(*folders):
    """Of the content of all files in folders."""
    files = sorted(path for folder in folders for path in folder.rglob("*.*") if path.suffix != ".pyc")
    known = [(path.relative_to(ROOT).as_posix(), sha256(path)) for path in files]
    return hashlib.sha256(repr(known).encode()).hexdigest()[:16]


def start_worker():
    """A worker computes on one thread, says nothing, and ends with the process that started it."""
    torch.set_num_threads(1)

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def attempt(run, cache_dir):
    """Performs a run; returns the traceback of what went wrong, or None."""
    try:
        perform(run, cache_dir)
    except Exception:
        return traceback.format_exc()


def perform_missing(listed, cache_dir, processes):
    """Performs the runs that are not finished, in order, and returns how many that were.

    Raises:
        RunError: some failed; all others are done.
    """
    missing = [run for run in listed if finished(run, cache_dir) is None]
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}  # of the workers, which are yet to import
    failures = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, start_worker) as pool:
        futures = {pool.submit(attempt, run, cache_dir): run for run in missing}
        try:
            for future in tqdm(as_completed(futures), total=len(futures), desc="Runs", disable=False):
                if failure := future.result():
                    run = futures[future]
                    failures.append(f"{run.name} on {run.subject}, seed {run.seed}")
                    tqdm.write(f"{failures[-1]}:\n{failure}", file=sys.stderr)
        except BrokenProcessPool:
            raise RunError("a worker was killed; the same command goes on with what is not finished.") from None
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failures:
        raise RunError(f"{len(failures)} of {len(missing)} runs failed ({'; '.join(failures)}); the others are done.")
    return len(missing)


# =====================================================================================================
# What comes out
# =====================================================================================================


def summarise(contents, names, subjects):
    """Method -> seeds, curve (`over_seeds`) and forwards to the reference's final quality, for methods with a seed."""
    of = {name: [c for c in contents if c["settings"]["name"] == name] for name in names}
    means = {name: subject_means(of[name], subjects) for name in names}
    summary = {
        name: {"seeds": sorted(by_seed), "curve": over_seeds(by_seed)} for name, by_seed in means.items() if by_seed
    }
    for name, found in summary.items():
        found["seconds"] = statistics.fmean(c["seconds"]["whole"] for c in of[name])
        if REFERENCE in summary and name != REFERENCE and len(found["curve"]) > 1:
            last = summary[REFERENCE]["curve"][-1]
            found["reaches"] = {m: forwards_to_reach(found["curve"], m, last[m][0]) for m in METRICS if m in last}
    return summary


def collect(listed, cache_dir, subjects):
    """The content of `methods.json`: what was run and where, all curves, and their summary."""
    pairs = [(run, content) for run in listed if (content := finished(run, cache_dir)) is not None]
    names = list(dict.fromkeys(run.name for run in listed))
    longest = max(listed, key=lambda run: run.milestones[-1])
    columns = ("forwards", *METRICS)
    curves = [
        {
            **{key: content["settings"][key] for key in ("name", "subject", "seed")},
            **{key: [point.get(key) for point in content["curve"]] for key in columns},
            **{key: content[key] for key in KEPT},
            **({"kept": content["kept"]} if "kept" in content else {}),
        }
        for _, content in pairs
    ]
    return {
        **common.provenance(),
        "subjects": list(subjects),
        "methods": {run.name: asdict(run.method) for run in listed},
        "configuration": {
            "milestones": longest.milestones,
            "image_milestones": longest.image_milestones,
            "judging": asdict(longest.judging),
            "model": longest.model,
            "base": longest.base,
        },
        "summary": summarise([content for _, content in pairs], names, subjects),
        "runs": curves,
    }


def list_strips(listed, cache_dir):
    """(Method, subject) -> strip of pictures of its first finished seed that has them here."""
    strips = {}
    for run in listed:
        path = run.path(cache_dir).with_suffix(".png")
        if finished(run, cache_dir) is not None and path.is_file():
            strips.setdefault((run.name, run.subject), path)
    return strips


def write_compact(path, content):
    """JSON with one line for every run, and otherwise one for every key."""
    lines = []
    for key, value in content.items():
        shown = json.dumps(value)
        if isinstance(value, list) and key == "runs" and value:
            shown = "[\n" + ",\n".join(json.dumps(row) for row in value) + "\n]"
        lines.append(f"{json.dumps(key)}: {shown}")
    with atomic_path(path) as temporary:
        temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


# =====================================================================================================
# Main
# =====================================================================================================


def parse_args(input_args=None):
    """Parses and checks the command line; bad input exits with code 2."""
    known = sorted(path.parent.name for path in SUBJECTS.glob("*/metadata.jsonl"))
    parser = flags.new_parser(__file__, "Compare ways to learn a token at equal cost.", "%(prog)s [options]")
    add = parser.add_argument
    add("--grid", choices=list(GRIDS), default="main", help="Which set of methods, see grids.py.")
    add("--methods", nargs="+", help="Of the grid; default: all.")
    add("--base", choices=BASES, default="base_eps", help="Of demo/: base predicts v, base_eps ε. Results name it.")
    of_ablations = "of an ablation's grid as in ablations.py"
    add("--subjects", nargs="+", choices=["all", *known], help=f"Of demo/subjects. Default: all; {of_ablations}.")
    add("--seeds", nargs="+", type=int, help=f"Of training. Default: 0 1 2; {of_ablations}.")
    milestones = [300, 750, 1500, 3000, 6000, 15000]
    default = " ".join(map(str, milestones))
    add(
        "--milestones",
        nargs="+",
        type=int,
        help=f"Forwards; the last is the budget. Default: {default}; {of_ablations}.",
    )
    add(
        "--image_milestones", nargs="+", type=int, help="Those with pictures. Default: all from a tenth of the budget."
    )
    add("--num_inference_steps", type=int, default=20, help="Denoising steps of a picture.")
    add("--unet_backend", choices=["openvino", "torch"], default="openvino", help="What computes forward passes.")
    add("--processes", type=int, default=2, help="Runs at a time, one thread each.")
    add("--other_code", action="store_true", help="Count finished runs of other code, too; each has its commit.")
    add("--collect", action="store_true", help="Run nothing; write results from what is finished.")
    add("--cache_dir", type=Path, default=CACHE / "compare", help="Where runs and weights are kept.")
    add("--output_dir", type=Path, help="Of results and figures. Default: benchmarks/results and docs.")
    args = parser.parse_args(input_args)
    several = flags.Range(1, 10**9)
    limits = {"processes": flags.Range(1, 64), "num_inference_steps": flags.Range(1, 1000)}
    limits |= {"milestones": several, "image_milestones": several, "seeds": flags.Range(0, 10**5)}
    for name, limit in limits.items():
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value not in limit:
                parser.error(f"--{name} {value} must be {limit}.")
    ablation = args.grid in ablations.GRIDS
    args.subjects = args.subjects or (ablations.SUBJECTS if ablation else ["all"])
    args.subjects = known if "all" in args.subjects else list(dict.fromkeys(args.subjects))
    args.seeds = list(dict.fromkeys(args.seeds or (ablations.SEEDS if ablation else [0, 1, 2])))
    args.methods = args.methods or list(GRIDS[args.grid])
    if unknown := [name for name in args.methods if name not in GRIDS[args.grid]]:
        parser.error(
            f"--methods: {unknown[0]!r} is not in --grid {args.grid}: choose of {', '.join(GRIDS[args.grid])}."
        )
    if ablation and args.milestones is None:
        if args.image_milestones:
            parser.error("--image_milestones needs --milestones with this grid, whose cells have their own.")
        return args
    args.milestones = sorted(set(args.milestones or milestones))
    if args.image_milestones is None:
        args.image_milestones = [m for m in args.milestones if 10 * m >= args.milestones[-1]]
    args.image_milestones = sorted(set(args.image_milestones))
    if other := set(args.image_milestones) - set(args.milestones):
        parser.error(f"--image_milestones {min(other)} is not one of --milestones: add it there.")
    if args.image_milestones[-1] != args.milestones[-1]:
        parser.error(f"--image_milestones must have the last of --milestones, {args.milestones[-1]}.")
    return args


def say_how_long(listed, cache_dir, processes):
    """Prints how many runs are missing and how long they take, judged by the finished ones."""
    contents = [finished(run, cache_dir) for run in listed]
    seconds = [content["seconds"]["whole"] for content in contents if content and content["steps"]]
    missing = contents.count(None)
    words = f"{missing} of {len(listed)} runs are missing"
    if missing and (seconds or listed[0].grid == ablations.FOLDER):
        each = statistics.fmean(seconds) if seconds else ablations.RUN_SECONDS
        reason = "as long as the finished ones took" if seconds else "a projection"
        words += f": {missing * each / processes / 3600:.1f} h on {processes} free cores, {reason}"
    print(f"{words}.", flush=True)


def stem_of(args):
    """Of the names of the result and its figures."""
    name = f"ablation_{args.grid}" if args.grid in ablations.GRIDS else f"methods_{args.grid}"
    return ("methods" if args.grid == "main" else name) + args.base.removeprefix("base")


def show(args, result, strips, results, figures):
    """Writes results and figures, and returns the table and where to look."""
    stem = stem_of(args)
    write_compact(results / f"{stem}.json", result)
    if args.grid not in ablations.GRIDS:
        plot(result, figures / f"{stem}.png")
        look = f"Look at {figures / stem}.png"
        if any((name, subject) not in strips for name in result["summary"] for subject in result["subjects"]):
            look += "; there is no new contact sheet, as pictures of some runs are not in the cache"
        else:
            contact_sheet(result, SUBJECTS, strips, figures / f"{stem}_sheet.png")
            look += f" and {stem}_sheet.png"
        return f"{methods_table(result)}\n\n{look}"
    look = ""
    if args.grid in FIGURES:
        path = figures / figure_of(result)[0]
        (plot_kept if args.grid == "sg_puts" else plot_timesteps)(result, path)
        look = f"\n\nLook at {path}"
    return ablation_table(result) + look


def main(args):
    judging = Judging(num_inference_steps=args.num_inference_steps, unet_backend=args.unet_backend)
    milestones = (tuple(given) if given else None for given in (args.milestones, args.image_milestones))
    plan = args.grid, args.methods, args.subjects, args.seeds, *milestones
    listed = list_runs(*plan, judging, fingerprint(DEMO / args.base, SCORER), hash_code(), args.base)
    results, figures = (args.output_dir,) * 2 if args.output_dir else (RESULTS, DOCS)
    (args.cache_dir / "weights").mkdir(parents=True, exist_ok=True)
    alike = "ablation_*" if args.grid in ablations.GRIDS else stem_of(args)  # grids of ablations share cells
    for path in sorted(results.glob(f"{alike}.json")):
        restore(json.loads(path.read_text(encoding="utf-8")), listed, args.cache_dir)
    if args.other_code:
        listed = [with_finished(run, args.cache_dir) for run in listed]
    try:
        if not args.collect:
            say_how_long(listed, args.cache_dir, args.processes)
            perform_missing(listed, args.cache_dir, args.processes)
    finally:  # what is finished counts, too
        result = collect(listed, args.cache_dir, args.subjects)
        if args.grid in ablations.GRIDS:
            contents = [content for run in listed if (content := finished(run, args.cache_dir)) is not None]
            rows = ablations.ablation_rows(args.grid, contents, args.subjects, args.seeds, METRICS)
            del result["summary"]
            result |= {"grid": args.grid, "seeds": args.seeds, "rows": rows}
        there = result.get("summary") or result.get("rows")
        if there:
            print(show(args, result, list_strips(listed, args.cache_dir), results, figures))
    if not there:
        raise RunError("no method is finished on all these subjects yet, so there is nothing to show.")


if __name__ == "__main__":
    run_script(lambda: main(parse_args()), __file__)
