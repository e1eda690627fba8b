"""What was to be reached, and what was measured."""

import math

from benchmarks.tables.demo import paired_differences
from benchmarks.tables.markdown import loss_name, table
from benchmarks.tables.memory import DRAWING, what_counts
from benchmarks.tables.tuneqdm import official_row


TARGET_HEADER = ["target", "to reach", "measured", ""]


def judged(what, to_reach, value, shown, at_most=None, at_least=None):
    """A row of targets: what was to be reached, what was measured."""
    met = value <= at_most if at_least is None else value >= at_least
    return [what, to_reach, shown, "met" if met else "**missed**"]


PAPER_STEPS = {"demo": 5_000, "sd15": 30_000}  # of n = 2, in which the official loop is the paper's setting


REACHED = ("loss", "CLIP-I", "identity")


# Methods of methods.json that are Gauss-Newton -> what targets call them, and the engine that is projected.
GAUSS_NEWTON = {
    "fast": ("Gauss-Newton in bfloat16", "ours-openvino-bf16"),
    "fast_float32": ("Gauss-Newton in float32", "ours-openvino"),
}


# Of methods_eps.json, by exact derivatives.
EXACT = {
    "tangents": "Gauss-Newton, exact derivatives in bfloat16, base that predicts ε",
    "tangents_float32": "Gauss-Newton, exact derivatives in float32, base that predicts ε",
}


def time_targets(learned, speeds, method):
    """Rows: CPU time to the paper's quality, the official loop's against Gauss-Newton's."""
    reached, rows = learned["summary"][method]["reaches"], []
    title, engine = GAUSS_NEWTON[method]
    budget = learned["summary"]["paper"]["curve"][-1]["forwards"][0]
    ours = [run for run in learned["runs"] if run["name"] == method]
    each = sum(run["seconds"]["training"] for run in ours) / sum(run["forwards"][-1] for run in ours)
    rate = {(row["architecture"], row["row"]): row for row in speeds["rows"]}
    official = rate["demo", "official"]["seconds_per_step"]["median"] * PAPER_STEPS["demo"]
    for name in REACHED:
        words = loss_name(learned) if name == "loss" else name
        faster = official / (each * reached[name]) if reached[name] else 0
        what = f"demo base: CPU time to the paper's {words}, official loop against {title}"
        shown = f"{faster:.1f}x" if faster else "not reached"
        rows.append(judged(what, "at least 10x", faster, shown, at_least=10))
    official = rate["sd15", "official"]["seconds_per_step"]["median"] * PAPER_STEPS["sd15"] / 3600
    each = rate["sd15", engine]["seconds_per_example"]
    hours = (reached["loss"] or math.inf) / budget * 3 * PAPER_STEPS["sd15"] * each / 3600
    what = f"SD 1.5, 256 px, a projection: CPU time of {title} to the paper's {loss_name(learned)}"
    shown = f"{hours:.0f} h" if reached["loss"] else "not reached"
    rows.append(judged(what, "at most 2 h", hours, shown, at_most=2))
    shown = f"{official / hours:.1f}x ({official:.0f} h)" if reached["loss"] else f"not reached ({official:.0f} h)"
    rows.append(judged("the same, against the official loop", "at least 40x", official / hours, shown, at_least=40))
    return rows


def forwards_targets(learned, method, title):
    """Rows: forwards to the paper's quality at its full budget."""
    rows, reached = [], learned["summary"][method]["reaches"]
    budget = learned["summary"]["paper"]["curve"][-1]["forwards"][0]
    for metric in REACHED:
        words = loss_name(learned) if metric == "loss" else metric
        what = f"{title}: forwards to the {words} of the paper's setting at its full budget"
        forwards = reached[metric] or math.inf
        shown = f"{forwards / budget:.0%} of them" if reached[metric] else "not reached"
        rows.append(judged(what, "at most a fifth", forwards, shown, at_most=budget / 5))
    return rows


def precision_targets(learned):
    """Rows: exact derivatives in bfloat16 against float32, at the same forwards."""
    half, full = (learned["summary"][name]["curve"][-1] for name in EXACT)
    rows = []
    for metric in REACHED:
        words = loss_name(learned) if metric == "loss" else metric
        what = f"exact derivatives, base that predicts ε, {half['forwards'][0]:,.0f} forwards: {words} in bfloat16, of"
        share = half[metric][0] / full[metric][0]
        off = abs(share - 1)
        rows.append(judged(f"{what} float32's", "within 5 %", off, f"{share:.1%}", at_most=0.05))
    return rows


def method_targets(learned, scales_memory, lora_memory, loras, speeds, learned_eps):
    """The targets of the methods: fewer forwards, less time and memory, at which quality."""
    rows, summary = [], learned["summary"]
    for method, (title, _) in GAUSS_NEWTON.items():
        rows += forwards_targets(learned, method, title)
        ours, ceiling = (summary[name]["curve"][-1] for name in (method, "gradient_ti"))
        share, short = (ours[name][0] / ceiling[name][0] for name in ("CLIP-I", "CLIP-T"))
        what = f"{title} at the full budget: CLIP-I against gradient TI's"
        rows.append(judged(what, "at least 98 %", share, f"{share:.1%}", at_least=0.98))
        rows.append(judged("the same, CLIP-T", "no lower", short, f"{short:.1%}", at_least=1))
        rows += time_targets(learned, speeds, method)
    for method, title in EXACT.items():
        rows += forwards_targets(learned_eps, method, title)
    rows += precision_targets(learned_eps)

    peaks = {entry["row"]: entry["measured"]["peak_rss_mb"] for entry in scales_memory["entries"]}
    for row, what, most in (
        ("int8", "TuneQDM (PEQA), 512 px: peak of the process, of the official way's", "half"),
        ("int8-checkpointing", "the same, gradient checkpointing on both sides", "a third"),
        ("int8-tuneqdm-checkpointing", "the same, 4 sets and input scales", "a third"),
    ):
        share = peaks[row] / peaks[official_row(row)]
        rows.append(judged(what, f"at most {most}", share, f"{share:.0%}", at_most={"half": 1 / 2}.get(most, 1 / 3)))

    peaks = {e["row"]: e["measured"]["peak_rss_mb"] for e in lora_memory["entries"] if e["resolution"] == 512}
    for row, words in (("selective", "BP-low / ZO-high"), ("bp-window", "BP-low through windows")):
        share = peaks[row] / peaks["bp-high"]
        what = f"{words}, 512 px: peak of the process, of BP-high's"
        rows.append(judged(what, "at most 60 %", share, f"{share:.1%}", at_most=0.6))
    scores = {(e["variant"], (e["subject"], e["seed"])): e["scores"]["CLIP-I"] for e in loras["entries"]}
    for variant, words in (("selective", "BP-low / ZO-high"), ("window", "BP-low through windows")):
        pairs = [(x, scores["bp-high", run]) for (name, run), x in scores.items() if name == variant]
        share = sum(one for one, _ in pairs) / sum(other for _, other in pairs)
        what = f"{words}: CLIP-I against BP-high's ({len(pairs)} runs)"
        rows.append(judged(what, "at least 97 %", share, f"{share:.1%}", at_least=0.97))
    return table(TARGET_HEADER, rows)


def targets(steps, memories, signals, scores):
    """Every target of the project for speed and memory: what was to be reached, what was measured."""
    rows = []

    def judge(*given, **bound):
        rows.append(judged(*given, **bound))

    sd15 = {e["row"]: e for e in memories["entries"] if e["architecture"] == "sd15" and e["resolution"] in (None, 256)}
    for name, words in (("load-int8-first", "into the cached file"), ("load-int8-no-cache", "without a cache")):
        facts = sd15[name]["loading"]
        peak, bound = facts["peak_rss_above_start_mb"], facts["bound_mb"]
        judge(f"loading the INT8 UNet {words}: peak", f"at most {bound:.0f} MB", peak, f"{peak:.0f} MB", at_most=bound)
    seconds = sd15["load-int8"]["loading"]["load_seconds"]
    judge("loading it from the cached file", "about 1 s", seconds, f"{seconds:.1f} s", at_most=1.5)
    for resolution, most in ((256, 700), (512, 1100)):
        for entry in memories["entries"]:
            if (entry["row"], entry["resolution"], entry["num_perturbations"]) == ("int8", resolution, 2):
                if entry["architecture"] == "sd15" and entry["batch_size"] == 1:
                    peak = entry["measured"]["peak_anonymous_above_imports_mb"]
                    what = f"CPU, {resolution} px, INT8 from the cache: anonymous memory above imports"
                    judge(what, f"at most {most} MB", peak, f"{peak:.0f} MB", at_most=most)
    for entry in memories["entries"]:
        if (entry["architecture"], entry["row"], entry["resolution"]) == ("sdxl", "int8", 512):
            peak = entry["measured"]["peak_anonymous_above_imports_mb"]
            what = "SDXL, CPU, 512 px, INT8 from the cache: anonymous memory above imports"
            judge(what, "at most 1500 MB", peak, f"{peak:.0f} MB", at_most=1500)
    largest = {e["row"]: e for e in memories["entries"] if (e["architecture"], e["resolution"]) == ("sdxl", 1024)}
    if {"int8-gradient", DRAWING} <= set(largest):
        share = what_counts(largest["int8-gradient"])[0] / what_counts(largest[DRAWING])[0]
        what = "SDXL, CPU, 1024 px: anonymous memory above imports of the exact gradient, of drawing's"
        judge(what, "at most 1.6 times", share, f"{share:.1f} times", at_most=1.6)
    deviations = {
        (e["row"], e["resolution"], e["num_perturbations"], e["batch_size"], e["architecture"]): e["deviation_percent"]
        for e in memories["entries"]
        if e.get("deviation_percent") is not None
    }
    worst = max(deviations, key=lambda key: abs(deviations[key]))
    where = f"{worst[4]}, {worst[0]}, {worst[1]} px, n = {worst[2]}"
    shown = f"worst {deviations[worst]:+.1f} % ({where}) of {len(deviations)} runs"
    judge("`--estimate_memory` against the measured peak", "within 10 %", abs(deviations[worst]), shown, at_most=10)
    of = {
        (r["row"], r["resolution"]): r
        for r in steps["rows"]
        if (r["architecture"], r["num_perturbations"], r["batch_size"]) == ("sd15", 2, 1)
    }
    for resolution, least in ((256, 2.5), (512, 1.5)):
        if row := of.get(("ours-openvino", resolution)):
            of_floor = 1 / row["arithmetic_floor"]["ratio"]
            for name, words in (("official", "the official loop"), ("ours-quanto", "our batched loop with quanto")):
                speed = 1 / row["ratio_to"][name]
                what = f"OpenVINO step against quanto-INT8 in fp32, {resolution} px, n = 2: {words}"
                shown = f"{speed:.2f}x (it runs at {of_floor:.0%} of the matmul peak)"
                judge(what, f"at least {least}x", speed, shown, at_least=least)
            deviation = row["loss_deviation_from_ours_int8"]
            judge(
                f"its losses against torch INT8, {resolution} px",
                "within 1 %",
                deviation,
                f"{deviation:.1e}",
                at_most=0.01,
            )
    differences = paired_differences(scores)
    share = max(differs / width for differs, width in differences.values())
    shown = f"at most {share:.0%} of the distance between torch's seeds"
    judge("its demo scores against torch's at the same seed", "within the seeds' spread", share, shown, at_most=1)
    defaults = {"float32": 1e-3, "float16": 1e-3, "bfloat16": 1e-2}
    least = min(
        r["exact"]["correlation_median"]
        for r in signals["rows"]
        if r["backend"] in ("int8", "openvino int8") and defaults.get(r["activations"]) == r["mu"]
        if (r["backend"], r["activations"]) != ("openvino int8", "bfloat16")
    )
    judge("correlation of differences at every default μ (INT8)", "at least 0.9", least, f"{least:.3f}", at_least=0.9)
    for what, to_reach in (
        ("CUDA, SD 1.5, 512 px, n = 2: reserved, INT8", "at most 1.4 GB"),
        ("the same, NF4 + INT8 convolutions", "at most 1.25 GB"),
        ("the same, `--low_vram`", "at most 0.5 GB, at most 2x the time at n = 8"),
        ("CUDA, step against the official loop, n = 2", "at least 2x"),
        ("CUDA, per direction against the official loop, n = 8", "at least 3x"),
        ("CUDA, share of the floor's speed", "at least 70 %"),
        ("CUDA, SDXL INT8, 1024 px: reserved", "at most 3.5 GB"),
        ("the same, `--low_vram`", "at most 1.5 GB"),
    ):
        rows.append([what, to_reach, "not measured: no GPU", "**open**"])
    return table(TARGET_HEADER, rows)
