"""The paper's ablations on the demo base: a grid for each table, which `compare_methods.py --grid NAME` fills.

    python benchmarks/compare_methods.py --grid sg_puts      # goes on where it was; --collect shows what is finished
    make ablations                                           # all of them, projected: 3 hours on 2 free cores

Every cell is the paper's setting (of "gauss_newton": ours) but for what its table is about, with the same budget:
4,500 example-forwards (1,500 steps of n = 2). A cell that stands in several tables has one name, one set of flags and
one run for each subject and seed. What the tables show is made by `ablation_rows`, from the finished runs alone.
"""

import statistics
from dataclasses import dataclass, field

import torch

from benchmarks import ideas
from benchmarks.grids import PAPER, PUTS, UNIFORM
from benchmarks.methods import FlagshipLearner, Method
from benchmarks.summaries import spread_over_seeds
from evaluate_personalization import bootstrap_interval


FOLDER = "ablations"  # of the runs of all grids: cells with the same name are the same
BUDGET, STEPS = ideas.BUDGET, 1500  # example-forwards of a run, and the updates of the paper's setting with them
SUBJECTS = ["striped_star", "striped_cross", "dotted_heart"]
SEEDS = [0, 1]
RUN_SECONDS = 50  # CPU time of a run until one is finished: 1,500 steps of 21 ms and 13 s of judging, as measured
REFERENCE = "paper"
NAMES = {"n": "n", "μ": "mu"}  # in those of files
FEWEST_PAIRS = 3  # that an interval is worth showing for


@dataclass(frozen=True)
class Ablation:
    """A table of the paper.

    Args:
        where: its number there.
        cells: name -> `Method`, in the order of the table.
        published: name -> what the paper reports; for cells of several budgets, the one with as many steps as its own.
    """

    where: str
    cells: dict
    published: dict = field(default_factory=dict)


def cell(title, changes="", timesteps=PUTS, learner="flagship", **options):
    """The paper's setting, changed by flags, of which the last counts, or by a learner of `ideas`."""
    return Method(title, " ".join(f"{PAPER} {changes} {timesteps}".split()), learner, options)


def timestep_range(least, most):
    """Name and `Method` of the paper's setting with t ~ U(least, most)."""
    flags = f"--puts_min_timestep {least} --puts_max_timestep {most}"
    name = REFERENCE if flags == PUTS else f"t_{least}_{most}"
    return name, cell(f"t in [{least}, {most})", timesteps=flags)


def ours(title, changes="", precision="--mixed_precision bf16 --perturbation_scale 5e-2"):
    """Gauss-Newton by finite differences, changed by flags."""
    settings = f"--optimizer gauss_newton --quantization int8 --train_batch_size 1 {precision}"
    return Method(title, f"{settings} {changes} {PUTS}")


FLOAT32 = ours("Gauss-Newton in float32, h = 3e-4", precision="--mixed_precision no --perturbation_scale 3e-4")


def idea(title, learner):
    """Gauss-Newton in float32, changed by a learner of `ideas`."""
    return Method(title, FLOAT32.flags, learner)


def number(flag, letter, paper, values):
    """Name -> `Method` of the paper's setting with other values of one flag."""
    cells = {}
    for value in values:
        if value == paper:
            cells[REFERENCE] = cell(f"{letter} = {value} (paper)")
        else:
            cells[f"{NAMES[letter]}_{value}"] = cell(f"{letter} = {value}", f"--{flag} {value}")
    return cells


def tau_nu():
    """τ: the paper's 64, 128 and 256 of 768 dimensions, scaled to the demo base's 128; 21 is the script's default."""
    cells = {}
    for window in (11, 21, 43):
        for threshold in ("1e-4", "1e-3", "1e-2", "1e-1"):
            title, paper = f"τ = {window}, ν = {threshold}", (window, threshold) == (21, "1e-3")
            flags = "" if paper else f"--sg_window {window} --sg_threshold {threshold}"
            cells[REFERENCE if paper else f"sg_{window}_{threshold}"] = cell(title + " (paper)" * paper, flags)
    return cells


HEAT_MAP = {"least": (0, 300, 500, 700), "most": (500, 700, 900, 1000)}  # T_L and T_U
TIMESTEPS = [(low, high) for low in HEAT_MAP["least"] for high in HEAT_MAP["most"] if low < high]
SAMPLING = [(0, 1000), (500, 900), (0, 500), (300, 700), (500, 1000), (700, 900), (900, 1000), (700, 701)]
SPSA = "--gradient_estimator spsa"
BF16 = "--mixed_precision bf16 --perturbation_scale 1e-2"  # the paper's μ for bfloat16
TORCH = "--unet_backend torch"

ABLATIONS = {
    "sg_puts": Ablation(
        "Table 3",
        {
            "no_sg_t_0_1000": cell("neither", "--sg_window 0", UNIFORM),
            "t_0_1000": cell("SG only", timesteps=UNIFORM),
            "no_sg": cell("PUTS only", "--sg_window 0"),
            REFERENCE: cell("SG and PUTS (paper)"),
        },
        {
            "no_sg_t_0_1000": "0.736 / 0.505 / 0.273",
            "t_0_1000": "0.747 / 0.527 / 0.265",
            "no_sg": "0.744 / 0.562 / 0.277",
            REFERENCE: "0.759 / 0.569 / 0.266",
        },
    ),
    "n": Ablation(
        "Table S6",
        number("num_perturbations", "n", 2, (1, 2, 4, 8)),
        {"n_1": "0.736 / 0.495", REFERENCE: "0.796 / 0.613", "n_4": "0.784 / 0.584", "n_8": "0.798 / 0.627"},
    ),
    "mu": Ablation("Table S5", number("perturbation_scale", "μ", "1e-3", ("1e-5", "1e-4", "1e-3", "1e-2", "1e-1"))),
    "rge_spsa": Ablation(
        "Table S4",
        {
            "n_1": cell("RGE, n = 1", "--num_perturbations 1"),
            REFERENCE: cell("RGE, n = 2 (paper)"),
            "spsa_1": cell("SPSA, n = 1", f"{SPSA} --num_perturbations 1"),
            "spsa_2": cell("SPSA, n = 2", SPSA),
        },
    ),
    "tau_nu": Ablation("Table 4", tau_nu()),
    "sampling": Ablation("Table 5", dict(timestep_range(*limits) for limits in SAMPLING)),
    "precision": Ablation(
        "Table S8",
        {
            REFERENCE: cell("INT8 weights, float32, OpenVINO (paper)"),
            "int8_torch": cell("INT8 weights, float32, torch", TORCH),
            "none": cell("float32 weights, float32, OpenVINO", "--quantization none"),
            "nf4_torch": cell("NF4 and INT8 weights, float32, torch", f"--quantization nf4 {TORCH}"),
            "bf16": cell("INT8 weights, bfloat16, OpenVINO, μ = 1e-2", BF16),
            "bf16_torch": cell("INT8 weights, bfloat16, torch, μ = 1e-2", f"{BF16} {TORCH}"),
            "none_bf16": cell("float32 weights, bfloat16, OpenVINO, μ = 1e-2", f"--quantization none {BF16}"),
        },
    ),
    "gauss_newton": Ablation(
        "ours",
        {
            REFERENCE: cell("ZOODiP (paper)"),
            "gn": ours("Gauss-Newton, as the fast recipe has it"),
            "gn_float32": FLOAT32,
            "gn_steps_15": ours("15 steps in the subspace", "--gn_subspace_steps 15"),
            "gn_steps_60": ours("60 steps in the subspace", "--gn_subspace_steps 60"),
            "gn_fixed": ours("the subspace to the end", "--gn_subspace_steps 1000000"),
            "gn_random": ours(
                "no subspace: 33 of all 128 directions", "--gn_subspace none --gn_subspace_dimension 32"
            ),
            "gn_everywhere": ours("no subspace: all 128 directions", "--gn_subspace none --gn_subspace_dimension 127"),
            "gn_16": ours("16 directions", "--gn_subspace_dimension 16"),
            "gn_64": ours("64 directions", "--gn_subspace_dimension 64"),
            "gn_prompt_words": ours("the prompts' words", "--gn_subspace prompt_words"),
            "gn_words_300": ours("the 300 longest words", "--gn_subspace_words 300"),
            "gn_ridge_1": ours("λ = 1", "--gn_ridge 1"),
            "gn_ridge_10": ours("λ = 10", "--gn_ridge 10"),
            "gn_memory_50": ours("ρ = 0.5", "--gn_memory 0.5"),
            "gn_memory_90": ours("ρ = 0.9", "--gn_memory 0.9"),
            "gn_last": ours("the last θ, no average", "--gn_averaging 0"),
            "gn_batch_2": ours("two examples a step", "--gradient_accumulation_steps 2"),
        },
    ),
    "ideas": Ablation(
        "none",
        {
            REFERENCE: cell("ZOODiP (paper)"),
            "radazo": cell("ZOODiP with R-AdaZO", learner="radazo"),
            "n_8": cell("ZOODiP, n = 8", "--num_perturbations 8"),
            "fzoo_2e-3": cell("FZOO, n = 8, η = 2e-3", "--num_perturbations 8", learner="fzoo", learning_rate=2e-3),
            "fzoo_1e-2": cell("FZOO, n = 8, η = 1e-2", "--num_perturbations 8", learner="fzoo", learning_rate=1e-2),
            "gn_float32": FLOAT32,
            "gn_fixed_norm": idea("the norm fixed at the vocabulary's", "fixed_norm"),
            "gn_summed_words": idea("from the sum of the subject's words", "summed_words"),
            "gn_falling_steps": idea("steps shortened along a cosine", "falling_steps"),
            "gn_informed_timesteps": idea("timesteps by information", "informed_timesteps"),
        },
    ),
    "timesteps": Ablation("Fig. 7", dict(timestep_range(*limits) for limits in TIMESTEPS)),
}
GRIDS = {name: ablation.cells for name, ablation in ABLATIONS.items()}

# Cells that are judged at the budget of the paper's setting and at its number of steps, too.
EQUAL_STEPS = {"n_1": 2 * STEPS, "n_4": 5 * STEPS, "n_8": 9 * STEPS}


def milestones(name):
    """Example-forwards at which a cell is judged, the last being the longest."""
    return tuple(sorted({BUDGET, EQUAL_STEPS.get(name, BUDGET)}))


# =====================================================================================================
# i* of Subspace Gradient
# =====================================================================================================


def watch_subspace(learner):
    """The list to which a learner's SG adds i*, the directions that it keeps, at every rebuild; None without SG."""
    subspace = getattr(learner.learner.rule, "subspace", None) if isinstance(learner, FlagshipLearner) else None
    if subspace is None or subspace.window == 0:
        return None
    kept, find = [], subspace._noise_directions

    def watched(trajectory):
        removed = find(trajectory)
        on_host = trajectory.cpu().double()
        rank = torch.linalg.matrix_rank(on_host - on_host.mean(dim=0)).item()  # at most τ - 1
        kept.append(rank - (0 if removed is None else len(removed)))
        return removed

    subspace._noise_directions = watched
    return {"window": subspace.window, "counts": kept}


# =====================================================================================================
# Tables
# =====================================================================================================


def paired_difference(values, reference):
    """Mean of value - reference over the (subject, seed) that both have, and its 95 % bootstrap interval.

    Returns:
        [mean, low, high]; the ends are None of fewer pairs than say anything, all three without a pair.
    """
    pairs = [value - reference[key] for key, value in values.items() if key in reference]
    if not pairs:
        return [None] * 3
    return [statistics.fmean(pairs), *(bootstrap_interval(pairs) if len(pairs) >= FEWEST_PAIRS else (None, None))]


def ablation_rows(grid, contents, subjects, seeds, metrics):
    """What the table of a grid shows: a row for each cell and budget that has a finished run.

    Args:
        grid: key of `ABLATIONS`.
        contents: of the finished runs' files.
        subjects, seeds: that were asked for.
        metrics: names in a curve's points.
    """
    points, kept = {}, {}
    for content in contents:
        settings, counts = content["settings"], content.get("kept")
        key = settings["subject"], settings["seed"]
        for point in content["curve"]:
            if metrics[-1] in point:
                steps = content["steps"] * point["forwards"] // content["curve"][-1]["forwards"]
                points.setdefault((settings["name"], point["milestone"]), {})[key] = {**point, "steps": steps}
        if counts:
            kept.setdefault(settings["name"], []).extend(count / counts["window"] for count in counts["counts"])
    budget = min((milestone for name, milestone in points if name == REFERENCE), default=None)
    rows = []
    for name, method in ABLATIONS[grid].cells.items():
        for milestone in sorted(m for other, m in points if other == name):
            found = points[name, milestone]
            row = {"name": name, "title": method.title, "runs": len(found), "of": len(subjects) * len(seeds)}
            row |= {key: round(statistics.fmean(p[key] for p in found.values())) for key in ("forwards", "steps")}
            row["pairs"] = len(found.keys() & points.get((REFERENCE, budget), {}).keys())
            for metric in metrics:
                values = {key: point[metric] for key, point in found.items()}
                row[metric] = [statistics.fmean(values.values()), spread_over_seeds(values, subjects)]
                if name != REFERENCE:
                    reference = {key: p[metric] for key, p in points.get((REFERENCE, budget), {}).items()}
                    row[f"{metric} difference"] = paired_difference(values, reference)
            if milestone == EQUAL_STEPS.get(name, milestone):
                row["published"] = ABLATIONS[grid].published.get(name)
            if name in kept:
                row["kept"] = [statistics.fmean(kept[name]), len(kept[name])]
            rows.append(row)
    return rows
