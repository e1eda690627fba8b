"""Fills the tables of the pages (`PAGES`) from the stored results, so that no figure is typed by hand.

    python benchmarks/make_tables.py            # or --check: exit 1 where a page is out of date

Between `<!-- BEGIN name -->` and `<!-- END name -->` stands what `name` makes of its JSON file; a missing file leaves
the sentence that it has not been measured.
"""

import argparse
import json
import math
import re
import statistics
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent


def table(header, rows):
    """A markdown table of strings."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def demo_scores(result):
    """docs/demo_scores.json, as `demo/run_demo.py` writes it."""
    names = ("CLIP-I", "identity", "CLIP-T")
    rows = []
    for subject, scores in result["scores"].items():
        pairs = [f"{scores['before'][n]:.3f} → {scores['after'][n]:.3f}" for n in names]
        rows.append([subject.replace("_", " "), *pairs, f"{scores['training']['seconds']:.0f} s"])
    means = {
        when: {n: sum(s[when][n] for s in result["scores"].values()) / len(rows) for n in names}
        for when in ("before", "after")
    }
    rows.append(["**mean**", *(f"**{means['before'][n]:.3f} → {means['after'][n]:.3f}**" for n in names), ""])
    settings = ", ".join(f"`{flag} {value}`" for flag, value in result["settings"].items())
    command = (
        "make demo" if result.get("base", "base") == "base" else f"python demo/run_demo.py --base {result['base']}"
    )
    note = (
        f"`{command}` on {result['hardware']['cpus']} CPU cores: {result['training_seconds']:.0f} s of training for"
        f" all subjects ({result['hardware']['jobs']} at a time, one thread each), {result['total_seconds']:.0f} s"
        f" in all; torch {result['versions']['torch']}. INT8 UNet and text encoder. Flags: {settings}. CLIP-I and"
        " identity: mean cosine of (reference, generated) pairs; CLIP-T: prompt against image; all by `demo/scorer`."
    )
    return table(["subject", *(f"{n}, before → after" for n in names), "training"], rows) + "\n\n" + note


def demo_quality(result):
    """demo/quality.json, as `demo/check_demo_base.py` writes it."""
    names = {
        "vae.psnr_db": f"VAE: PSNR on {result['figures']['vae']['renders']} fresh renders, dB",
        "scorer.shape": "scorer: shape read right on fresh renders",
        "scorer.colour": "scorer: whole set of colours read right",
        "scorer.background": "scorer: background read right",
        "generated.background": "generated from fresh captions: background read back",
        "generated.shape": "generated: shape read back",
        "generated.colour": "generated: whole set of colours read back",
    }
    rows = []
    for key, target in result["targets"].items():
        shown = (f"{target[k]:.1f}" if "psnr" in key else f"{target[k]:.1%}" for k in ("at_least", "measured"))
        rows.append([names.get(key, key), *shown, "met" if target["met"] else "**missed**"])
    note = f"By `{result['command']}` on {result['hardware']}, {result['seconds']:.0f} s."
    return table(["figure", "to reach", "measured", ""], rows) + "\n\n" + note


def real_photos(result):
    """benchmarks/results/real_photos.json, as `benchmarks/bench_real_photos.py` writes it."""
    rows = []
    for quantization, run in result["runs"].items():
        figures, unet = run["figures"], run["components"]["unet"]
        rows.append(
            [
                f"`{quantization}`",
                f"{unet['bytes'] / 1e6:.0f} MB ({unet['quantized_share']:.1%} quantized)",
                f"{run['components']['text_encoder']['bytes'] / 1e6:.0f} MB",
                f"{figures['seconds'] / figures['steps']:.1f} s",
                f"{figures['peak_memory']['process_mb']} MB",
            ]
        )
    header = ["quantization", "UNet", "text encoder", "time per step", "peak memory of the process"]
    versions = next(iter(result["runs"].values()))["versions"]
    note = (
        f"{result['architecture']}, {result['resolution']} px, photos of `{result['photos']}`, float32 activations;"
        f" {result['cpu_count']} cores of {result['cpu']}, torch {versions['torch']}, diffusers"
        f" {versions['diffusers']}. A process that only imports the libraries peaks at {result['bare_import_mb']} MB;"
        " the peak counts memory-mapped weight files, too. Reproduce with `make bench-real-photos`."
    )
    return table(header, rows) + "\n\n" + note


def signal(result):
    """benchmarks/results/signal*.json, as `benchmarks/bench_signal.py` writes it."""
    steps = sorted({row["mu"] for row in result["rows"]})
    cells = {}
    for row in result["rows"]:
        exact = row["exact"]
        error = "–" if exact["relative_error_median"] is None else f"{exact['relative_error_median']:.0%}"
        shown = f"{exact['correlation_median']:.3f} ({exact['correlation_min']:.2f}), {error}"
        bold = f"**{shown}**" if exact["correlation_median"] >= 0.9 else shown
        cells.setdefault((row["backend"], row["activations"]), {})[row["mu"]] = bold
    rows = [[*name, *(by_step.get(mu, "") for mu in steps)] for name, by_step in cells.items()]
    configuration, hardware = result["configuration"], result["hardware"]
    note = (
        f"Correlation, median (and least) over {configuration['cells']} cells (example x timestep), and median"
        f" relative error of {configuration['directions']} directional derivatives by forward differences against"
        " float32 autograd of the unquantized model; bold: median at least 0.9. By"
        f" `{result['command']}` on {hardware['name']}, torch {result['versions']['torch']},"
        f" {result['seconds']:.0f} s."
    )
    return table(["weights", "activations", *(f"μ = {mu:g}" for mu in steps)], rows) + "\n\n" + note


def hardening(result):
    """docs/hardening.json, as `tests/count_hardening.py` writes it."""
    rows = [[kind, counted["what"], counted["tests"], counted["cases"]] for kind, counted in result.items()]
    totals = [f"**{sum(counted[name] for counted in result.values())}**" for name in ("tests", "cases")]
    return table(["tried", "what it is", "tests", "cases"], [*rows, ["**all**", "", *totals]])


def paired_differences(result):
    """Per metric: the largest difference between OpenVINO and torch of one seed, and the width of torch's seeds."""
    after = {(run["backend"], run["seed"]): run["after"] for run in result["runs"]}
    seeds = [seed for backend, seed in after if backend == "openvino" and ("torch", seed) in after]
    return {
        name: (max(abs(after["openvino", s][name] - after["torch", s][name]) for s in seeds), high - low)
        for name, (low, high) in result["torch_spread"].items()
    }


def quality(result):
    """benchmarks/results/quality.json, as `benchmarks/bench_quality.py` writes it."""
    names = list(result["torch_spread"])
    rows = [[run["backend"], run["seed"], *(f"{run['after'][n]:.3f}" for n in names)] for run in result["runs"]]
    differences = paired_differences(result)
    words = ", ".join(f"{n} {differs:.3f} of {width:.3f}" for n, (differs, width) in differences.items())
    spread = result["torch_spread"]
    below = [n for r in result["runs"] for n in names if r["backend"] == "openvino" and r["after"][n] < spread[n][0]]
    outside = f" OpenVINO's {' and '.join(below)} lie just below the lowest of torch's seeds." if below else ""
    note = (
        f"Mean scores after training over {', '.join(s.replace('_', ' ') for s in result['subjects'])}. Difference"
        f" between the engines at the same seed, and how far torch's own seeds lie apart: {words}.{outside} By"
        f" `{result['command']}` on {result['hardware']['name']}."
    )
    return table(["UNet in training", "seed", *names], rows) + "\n\n" + note


def evidence(result):
    """benchmarks/results/signal.json: what `benchmarks/bench_signal.py` says of Gauss-Newton's K and y."""
    steps = sorted({row["step"] for row in result["evidence"]})
    cells = {}
    for row in result["evidence"]:
        names = ("matrix", "gradient", "gradient_both_signs")
        errors = [row[name] for name in names]
        shown = ["–" if error is None else f"{error:.1%}" if error < 10 else "> 1000%" for error in errors]
        cells.setdefault((row["backend"], row["activations"]), {})[row["step"]] = " / ".join(shown)
    rows = [[*name, *(by_step.get(step, "") for step in steps)] for name, by_step in cells.items()]
    note = (
        f"Relative error of K / of y / of y as the mean over both signs, medians over"
        f" {result['configuration']['cells']} cells (example x timestep), against forward-mode autograd of the"
        f" unquantized float32 model, in the vocabulary's subspace of 32 directions. By `{result['command']}` on"
        f" {result['hardware']['name']}."
    )
    return table(["weights", "activations", *(f"h = {step:g}" for step in steps)], rows) + "\n\n" + note


def methods(result):
    """benchmarks/results/methods*.json, as `benchmarks/compare_methods.py` writes it."""
    metrics = {"loss": "held-out loss", "CLIP-I": "CLIP-I", "identity": "identity", "CLIP-T": "CLIP-T"}

    def shown(name, value):
        mean, spread = value
        digits = 4 if name == "loss" else 3
        return f"{mean:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")

    rows, targets = [], ("loss", "CLIP-I", "identity")
    if not any("reaches" in found for found in result["summary"].values()):
        targets = ()  # a grid without the paper's settings
    for name, found in result["summary"].items():
        last, reached = found["curve"][-1], found.get("reaches")
        cells = [f"{last['forwards'][0]:,.0f}", *(shown(metric, last[metric]) for metric in metrics)]
        for metric in targets:
            cells.append("" if reached is None else f"{reached[metric]:,.0f}" if reached[metric] else "never")
        rows.append([result["methods"][name]["title"], *cells, f"{found['seconds']:.0f} s"])
    reaching = [f"forwards to the paper's {name}" for name in targets]
    header = ["method", "forwards", *metrics.values(), *reaching, "a run"]
    seeds = sorted({len(found["seeds"]) for found in result["summary"].values() if len(found["curve"]) > 1})
    judging, hardware = result["configuration"]["judging"], result["hardware"]
    low, high = judging["timesteps"]
    reached_where = (
        " \"To the paper's ...\": where the mean curve is first as good as that of the paper's settings at its end,"
        " between milestones by interpolation in log forwards."
    )
    note = (
        f"Means over {len(result['subjects'])} subjects and {' or '.join(map(str, seeds))} seed(s) (±: one standard"
        " deviation of the mean over subjects, over seeds). Forwards: examples through the UNet, a backward pass as"
        f" two.{reached_where if targets else ''} Loss:"
        f" {judging['held_out']} fixed examples, t in [{low}, {high}), float32, unquantized, as are the pictures"
        " (CLIP-I, identity and CLIP-T by `demo/scorer`). A run: CPU time on one thread, judging included,"
        f" with other work on the machine. By `{result['command']}` on {hardware['name']}, torch"
        f" {result['versions']['torch']}."
    )
    return table(header, rows) + "\n\n" + note


FIGURES = {  # that `compare_methods.py` draws of a grid of ablations, in docs, and what they show
    "sg_puts": ("ablation_sg.png", "Histogram of i*/τ at every rebuild"),
    "timesteps": ("ablation_timesteps.png", "Heat maps over T_L and T_U: loss, CLIP-I and identity"),
}
PUBLISHED = {"sg_puts": "CLIP-I / DINO / CLIP-T", "n": "CLIP-I / DINO"}  # what the paper reports, by grid


def ablation(result):
    """benchmarks/results/ablation_*.json, as `benchmarks/compare_methods.py` writes it for a grid of ablations."""
    metrics = {"loss": "held-out loss", "CLIP-I": "CLIP-I", "identity": "identity", "CLIP-T": "CLIP-T"}
    compared, rows = ("loss", "CLIP-I", "identity"), []
    has_published = any(row.get("published") for row in result["rows"])
    shows_kept = result["grid"] in ("sg_puts", "tau_nu")

    def digits(metric):
        return 4 if metric == "loss" else 3

    for row in result["rows"]:
        cells = [row["title"], f"{row['forwards']:,}", f"{row['steps']:,}", f"{row['runs']} of {row['of']}"]
        for metric in metrics:
            mean, spread = row[metric]
            cells.append(f"{mean:.{digits(metric)}f}" + ("" if spread is None else f" ± {spread:.{digits(metric)}f}"))
        for metric in compared:
            mean, low, high = row.get(f"{metric} difference", [None] * 3)
            shown = "" if mean is None else f"{mean:+.{digits(metric)}f}"
            if low is not None:
                shown += f" [{low:+.{digits(metric)}f}, {high:+.{digits(metric)}f}]"
                shown = f"**{shown}**" if low > 0 or high < 0 else shown
            cells.append(shown)
        if shows_kept:
            cells.append(f"{row['kept'][0]:.2f}" if "kept" in row else "")
        if has_published:
            cells.append(row.get("published") or "")
        rows.append(cells)
    header = ["setting", "forwards", "steps", "runs", *metrics.values(), *(f"Δ {metrics[name]}" for name in compared)]
    header += ["i*/τ"] if shows_kept else []
    header += [f"published {PUBLISHED[result['grid']]}"] if has_published else []
    subjects = ", ".join(subject.replace("_", " ") for subject in result["subjects"])
    hardware, seeds = result["hardware"], " and ".join(map(str, result["seeds"]))
    note = (
        f"Mean over the finished runs ({subjects}; seeds {seeds}), ± one standard deviation of the seeds' means where"
        " two seeds have all subjects. Δ: to the paper's setting on the same subject and seed, mean and 95 % bootstrap"
        " interval over those pairs (none of fewer than three); bold: the interval is without 0. By"
        f" `benchmarks/compare_methods.py --grid {result['grid']}` on {hardware['name']}, torch"
        f" {result['versions']['torch']}."
    )
    name, shows = FIGURES.get(result["grid"], (None, None))
    figure = f"\n\n![{shows}](../{name})" if name else ""  # the pages of results are a folder below
    return table(header, rows) + "\n\n" + note + figure


STEP_NAMES = {
    "ours-int8": "**ours, INT8, torch**",
    "ours-openvino": "**ours, INT8, OpenVINO**",
    "ours-openvino-bf16": "ours, INT8, OpenVINO in bf16 (not for training)",
    "ours-quanto": "ours, quanto-INT8",
    "ours-none": "ours, unquantized",
    "ours-nf4": "ours, NF4",
    "ours-low-vram": "ours, INT8, `--low_vram`",
    "official": "official loop, quanto-INT8",
    "ti-fp32": "gradient Textual Inversion, fp32",
    "ti-fp32-checkpointing": "the same, gradient checkpointing",
    "ti-bf16": "gradient Textual Inversion, bf16",
    "ti-bf16-checkpointing": "the same, gradient checkpointing",
    "floor-fp32": "floor: n + 1 bare UNet passes, fp32",
}


def step(result):
    """benchmarks/results/step_cpu.json, as `benchmarks/bench_step.py` writes it: everything at n = 2, batch 1."""
    chosen = [r for r in result["rows"] if r["architecture"] == "sd15" and r["num_perturbations"] == 2]
    chosen = [r for r in chosen if r["batch_size"] == 1]
    rows = []
    for row in sorted(chosen, key=lambda r: (r["resolution"], list(STEP_NAMES).index(r["row"]))):
        times, ratios, floor = row["seconds_per_step"], row["ratio_to"], row["arithmetic_floor"]
        faster = [f"{1 / ratios[name]:.2f}x" if name in ratios else "" for name in ("official", "ours-quanto")]
        arithmetic = f"{1 / floor['ratio']:.0%}" if floor else ""
        measured = f"{times['median']:.1f} s ({times['min']:.1f}–{times['max']:.1f})"
        rows.append([f"{row['resolution']} px", STEP_NAMES[row["row"]], measured, *faster, arithmetic])
    header = [
        "",
        "step",
        "median (range)",
        "speed-up over the official loop",
        "over ours with quanto",
        "of matmul peak",
    ]
    first = chosen[0]
    note = (
        f"Stable Diffusion 1.5 architecture, random weights, n = 2, batch 1, {first['hardware']['cpu_count']} cores of"
        f" {first['hardware']['cpu']}, torch {first['versions']['torch']}, OpenVINO {first['versions']['openvino']}."
        " Rows of one resolution take turns in one process; speed-ups are ratios of medians. A step of Textual"
        " Inversion is one example forward and backward, one of ours n + 1 examples forward. `make benchmark`."
    )
    return table(header, rows) + "\n\n" + note


def scaling(step_result, memory_result):
    """Step time and memory against n, batch and resolution, one at a time from n = 2, batch 1, 256 px."""
    times = {
        (r["row"], r["resolution"], r["num_perturbations"], r["batch_size"]): r["seconds_per_step"]["median"]
        for r in step_result["rows"]
        if r["architecture"] == "sd15"
    }
    memory = {
        (e["row"], e["resolution"], e["num_perturbations"], e["batch_size"]): e["measured"]
        for e in memory_result["entries"]
        if e["architecture"] == "sd15"
    }
    points = sorted({key[1:] for key in times if key[0] == "ours-int8"})
    rows = []
    for resolution, n, batch in points:
        cells = [times.get((name, resolution, n, batch)) for name in ("ours-int8", "ours-openvino")]
        cells = ["" if value is None else f"{value:.1f} s" for value in cells]
        peak = memory.get(("int8", resolution, n, batch))
        cells.append(f"{peak['peak_anonymous_above_imports_mb']:.0f} MB" if peak else "")
        rows.append([resolution, n, batch, (n + 1) * batch, *cells])
    header = ["px", "n", "batch", "examples a pass", "torch INT8", "OpenVINO INT8", "memory above imports (torch)"]
    return table(header, rows)


def processes(result):
    """Data-parallel processes on demo/base, one thread each."""
    rows = []
    for entry in result["processes"]:
        speed = entry["forward_passes_per_second"] / result["processes"][0]["forward_passes_per_second"]
        rows.append(
            [
                entry["processes"],
                f"{entry['steps_per_second']['median']:.1f}",
                f"{entry['forward_passes_per_second']:.1f}",
            ]
        )
        rows[-1].append(f"{speed:.2f}x")
    return table(["processes", "steps/s", "examples/s", "speed-up"], rows)


MEMORY_NAMES = {
    "int8": "**ours, INT8, later runs (mapped file)**",
    "int8-first": "ours, INT8, first run (quantizes into the file)",
    "int8-no-cache": "ours, INT8, `--quantized_cache_dir none`",
    "int8-low-vram": "ours, INT8, `--low_vram`",
    "int8-gauss-newton": "ours, INT8, Gauss-Newton with 32 directions, 3 candidates a pass",
    "int8-gauss-newton-default": "the same, 9 candidates a pass (its default)",
    "int8-n8": "ours, INT8, n = 8",
    "int8-n8-split": "ours, INT8, n = 8, `--max_candidates_per_forward 1`",
    "nf4": "ours, NF4 + INT8 convolutions",
    "quanto-int8": "ours, quanto-INT8",
    "none": "ours, unquantized",
    "openvino": "ours, OpenVINO, later runs",
    "openvino-first": "ours, OpenVINO, first run (exports)",
    "official": "official loop, quanto-INT8",
    "ti-fp32": "gradient Textual Inversion, fp32",
    "ti-fp32-checkpointing": "the same, gradient checkpointing",
    "ti-bf16": "gradient Textual Inversion, bf16",
    "ti-bf16-checkpointing": "the same, gradient checkpointing",
}


def memory(result):
    """benchmarks/results/memory_cpu.json, as `benchmarks/bench_memory.py` writes it."""
    imports = next(e for e in result["entries"] if e["row"] == "imports")["measured"]
    chosen = [e for e in result["entries"] if e["architecture"] == "sd15" and e["row"] in MEMORY_NAMES]
    chosen = [e for e in chosen if e["num_perturbations"] in (None, 2) or e["row"].startswith("int8-n8")]
    chosen = [e for e in chosen if e["batch_size"] == 1]
    rows = []
    for entry in sorted(chosen, key=lambda e: (e["resolution"], list(MEMORY_NAMES).index(e["row"]))):
        measured, predicted = entry["measured"], entry.get("predicted_mb")
        cells = [f"{measured['peak_anonymous_above_imports_mb']:.0f} MB", f"{measured['peak_rss_mb']:.0f} MB"]
        cells.append(f"{predicted['peak']:.0f} MB ({entry['deviation_percent']:+.1f} %)" if predicted else "")
        rows.append([f"{entry['resolution']} px", MEMORY_NAMES[entry["row"]], *cells])
    header = [
        "",
        "process",
        "anonymous, above imports",
        "peak of the whole process",
        "predicted by `--estimate_memory`",
    ]
    first = chosen[0]
    note = (
        "Fresh processes, from start to the second trained step (baselines: first), n = 2 unless said, batch 1,"
        f" {first['hardware']['cores']} cores of {first['hardware']['name']}. A process that only imports the"
        f" libraries has {imports['peak_rss_mb']:.0f} MB, {imports['peak_anonymous_mb']:.0f} MB of it anonymous."
        " The peak counts mapped pages of the weight file, too, which the system can drop."
        " MB = 2^20. By `benchmarks/bench_memory.py`."
    )
    return table(header, rows) + "\n\n" + note


def spread_over_seeds(values, subjects):
    """Standard deviation of the seeds' means; None unless two seeds have all subjects.

    Args:
        values: (subject, seed) -> value.
        subjects: names.
    """
    by_seed = {}
    for (_, seed), value in values.items():
        by_seed.setdefault(seed, []).append(value)
    means = [statistics.fmean(found) for found in by_seed.values() if len(found) == len(subjects)]
    return statistics.stdev(means) if len(means) > 1 else None


TUNEQDM_ROWS = {
    "int8": "**ours, PEQA, INT8**",
    "int8-checkpointing": "**the same, gradient checkpointing**",
    "int8-tuneqdm": "ours, 4 sets and input scales, INT8",
    "int8-tuneqdm-checkpointing": "the same, gradient checkpointing",
    "int4-checkpointing": "ours, PEQA, INT4, gradient checkpointing",
    "official-peqa": "official way, PEQA, INT8",
    "official-peqa-checkpointing": "the same, gradient checkpointing",
    "official-tuneqdm": "official way, 4 sets and input scales, INT8",
    "official-tuneqdm-checkpointing": "the same, gradient checkpointing",
}


def tuneqdm_memory(result):
    """benchmarks/results/tuneqdm_memory.json, as `benchmarks/bench_tuneqdm.py` writes it."""
    imports = next(e for e in result["entries"] if e["row"] == "imports")["measured"]
    chosen = [e for e in result["entries"] if e["row"] in TUNEQDM_ROWS]
    rows = []
    for entry in sorted(chosen, key=lambda e: (e["resolution"], list(TUNEQDM_ROWS).index(e["row"]))):
        kind = "tuneqdm" if "tuneqdm" in entry["row"] else "peqa"
        official = [e for e in chosen if (e["row"], e["resolution"]) == (f"official-{kind}", entry["resolution"])]
        anonymous, peak = (entry["measured"][f"peak_{n}_mb"] for n in ("anonymous_above_imports", "rss"))
        share = f"{peak / official[0]['measured']['peak_rss_mb']:.0%}" if official else ""
        cells = [f"{entry['resolution']} px", TUNEQDM_ROWS[entry["row"]], f"{peak:.0f} MB", share]
        load = max(entry["load_average"][:2])  # of the last one and five minutes
        busy = f" (load {load:.0f}: not alone)" if load > entry["hardware"]["cores"] + 0.5 else ""
        rows.append([*cells, f"{anonymous:.0f} MB", f"{entry['seconds_per_step']:.0f} s{busy}"])
    header = ["", "process", "peak of the whole process", "of the official way", "anonymous, above imports", "step"]
    first = chosen[0]
    peaks = {e["row"]: e["measured"]["peak_rss_mb"] for e in chosen}
    both = {
        words: f"{peaks[f'int8{ours}-checkpointing'] / peaks[f'official-{kind}-checkpointing']:.0%} ({words})"
        for words, ours, kind in (("PEQA", "", "peqa"), ("4 sets and input scales", "-tuneqdm", "tuneqdm"))
        if f"official-{kind}-checkpointing" in peaks
    }
    alike = f"; with checkpointing on both sides they are {' and '.join(both.values())}" if both else ""
    note = (
        "Stable Diffusion 1.5 architecture, random weights, float32 activations, batch 1, two steps; fresh processes"
        f" from start to end, {first['hardware']['cores']} cores of {first['hardware']['name']}, torch"
        f" {first['versions']['torch']}. A process that only imports the libraries has {imports['peak_rss_mb']:.0f}"
        " MB. Official way: the same script and integer weights, the weight of each layer dequantized under autograd;"
        f" shares are of its row without checkpointing{alike}. The peak counts mapped pages of the weight file (860"
        " MB), which the system can drop. MB = 2^20. By `benchmarks/bench_tuneqdm.py`."
    )
    return table(header, rows) + "\n\n" + note


TUNEQDM_VARIANTS = {
    "full": "full fine-tuning, float32",
    "peqa": "PEQA",
    "peqa-inputs": "PEQA, input scales",
    "s1-0-500": "S1, 0-500",
    "s1-250-750": "S1, 250-750",
    "s1-500-900": "S1, 500-900",
    "s1-500-1000": "S1, 500-1000",
    "s1-700-1000": "S1, 700-1000",
    "s2-2": "S2, 2 sets",
    "s2-4": "S2, 4 sets",
    "s2-2-inputs": "S2, 2 sets, input scales",
    "s2-4-inputs": "S2, 4 sets, input scales",
}


def tuneqdm_quality(result):
    """benchmarks/results/tuneqdm_quality.json, as `benchmarks/compare_tuneqdm.py` writes it."""
    names, groups = ("CLIP-I", "identity", "CLIP-T"), {}
    for entry in result["entries"]:
        groups.setdefault((entry["bits"], entry["variant"], entry["learning_rate"]), []).append(entry)
    rows, order = [], list(TUNEQDM_VARIANTS)

    def add(bits, what, length, scores):
        """`scores`: (subject, seed) -> metric -> value."""
        cells = []
        for name in names:
            values = {run: score[name] for run, score in scores.items()}
            spread = spread_over_seeds(values, result["bases"])
            cells.append(f"{statistics.fmean(values.values()):.3f}" + ("" if spread is None else f" ± {spread:.3f}"))
        rows.append([f"INT{bits}" if bits else "float32", what, length, *cells, len(scores)])

    for bits in (0, 8, 4):
        add(bits, "nothing: the plain word", 0, {(name, 0): s[str(bits)] for name, s in result["bases"].items()})
        for key in sorted((key for key in groups if key[0] == bits), key=lambda key: (order.index(key[1]), key[2])):
            entries, rates = groups[key], {other[2] for other in groups if other[:2] == key[:2]}
            what = TUNEQDM_VARIANTS[key[1]] + (f", rate {key[2]:g}" if len(rates) > 1 else "")
            for length in (200, 400):  # the picture has the others
                long = [entry for entry in entries if str(length) in entry["scores"]]
                if long:
                    add(bits, what, length, {(e["subject"], e["seed"]): e["scores"][str(length)] for e in long})
    note = (
        f"Means over runs, of {len(result['bases'])} subjects, ± one standard deviation of the seeds' means; CLIP-I"
        " and identity: mean cosine of (reference, generated) pairs, CLIP-T: prompt against image, all by"
        f" `demo/scorer`. By `benchmarks/compare_tuneqdm.py` on {result['entries'][0]['hardware']['name']}."
    )
    return table(["weights", "trained", "steps", *names, "runs"], rows) + "\n\n" + note


FAMILIES = {"sdxl": "SDXL", "sd21": "SD 2.1"}
FAMILY_ROWS = {"int8": "**ours, INT8, later runs (mapped file)**", "official": "official loop, quanto-INT8"}


def families_memory(result):
    """The entries of other architectures than Stable Diffusion 1.5's in benchmarks/results/memory_cpu.json."""
    chosen = [e for e in result["entries"] if e["architecture"] in FAMILIES and e["row"] in FAMILY_ROWS]
    if not chosen:
        return "Not measured yet."
    rows = []
    for entry in sorted(chosen, key=lambda e: (list(FAMILIES).index(e["architecture"]), e["resolution"], e["row"])):
        anonymous, peak = (entry["measured"][f"peak_{n}_mb"] for n in ("anonymous_above_imports", "rss"))
        cells = [FAMILIES[entry["architecture"]], f"{entry['resolution']} px", FAMILY_ROWS[entry["row"]]]
        predicted = entry.get("predicted_mb", {}).get("peak")
        shown = f"{predicted:.0f} MB ({entry['deviation_percent']:+.1f} %)" if predicted else ""
        rows.append([*cells, f"{anonymous:.0f} MB", f"{peak:.0f} MB", shown])
    header = ["", "", "process", "anonymous, above imports", "peak of the whole process"]
    note = (
        "Random weights, float32 activations, n = 2, batch 1, two steps; fresh processes from start to end on"
        f" {chosen[0]['hardware']['name']}. The peak counts mapped pages of the weight file, which the system can"
        " drop. MB = 2^20. By `benchmarks/bench_memory.py --architecture`."
    )
    return table([*header, "predicted by `--estimate_memory`"], rows) + "\n\n" + note


def families_step(result):
    """The rows of other architectures than Stable Diffusion 1.5's in benchmarks/results/step_cpu.json."""
    chosen = [row for row in result["rows"] if row["architecture"] in FAMILIES]
    if not chosen:
        return "Not measured yet."
    rows = []
    for row in sorted(
        chosen, key=lambda r: (list(FAMILIES).index(r["architecture"]), r["resolution"], -len(r["row"]))
    ):
        times, ratios = row["seconds_per_step"], row["ratio_to"]
        cells = [FAMILIES[row["architecture"]], f"{row['resolution']} px", STEP_NAMES[row["row"]]]
        cells.append(f"{times['median']:.0f} s ({times['min']:.0f}–{times['max']:.0f})")
        rows.append([*cells, f"{1 / ratios['official']:.2f}x" if "official" in ratios else ""])
    header = ["", "", "step", "CPU seconds, median (range)", "speed-up over the official loop"]
    note = (
        "Random weights, n = 2, batch 1, float32 activations, one thread, CPU time of the process: the machine had"
        f" other work. {chosen[0]['hardware']['cpu']}, torch {chosen[0]['versions']['torch']}. SDXL's official loop is"
        " the published one for Stable Diffusion 1.5 extended to two text encoders and sizes (the repository has no"
        " SDXL code). By `benchmarks/bench_step.py --architecture ... --cpu_seconds`."
    )
    return table(header, rows) + "\n\n" + note


SELECTIVE_ROWS = {
    "naive-bp-high": "BP-high, weights dequantized under autograd",
    "bp-high": "BP-high: backpropagation at full size",
    "bp-high-checkpointing": "the same, gradient checkpointing",
    "bp-low": "BP-low alone",
    "bp-low-checkpointing": "the same, gradient checkpointing",
    "bp-window": "**BP-low through windows**",
    "bp-window-checkpointing": "the same, gradient checkpointing",
    "zo-high": "ZO-high alone",
    "selective": "**a step of each kind**",
    "selective-checkpointing": "**the same, gradient checkpointing**",
}


def selective_memory(result):
    """benchmarks/results/selective_memory.json, as `benchmarks/bench_selective.py` writes it."""
    imports = next(e for e in result["entries"] if e["row"] == "imports")["measured"]
    chosen = [e for e in result["entries"] if e["row"] in SELECTIVE_ROWS]
    rows = []
    for entry in sorted(chosen, key=lambda e: (e["resolution"], list(SELECTIVE_ROWS).index(e["row"]))):
        full = [e for e in chosen if (e["row"], e["resolution"]) == ("bp-high", entry["resolution"])]
        peak, anonymous = (entry["measured"][f"peak_{n}_mb"] for n in ("rss", "anonymous_above_imports"))
        training = entry["measured"]["phases"]["training"]["peak_rss_mb"]
        share = f"{peak / full[0]['measured']['peak_rss_mb']:.0%}" if full else ""
        seconds = " + ".join(f"{seconds:.0f}" for _, seconds in entry["seconds_of_steps"]) + " s"
        sizes = f"{entry['low_resolution']} / {entry['resolution']} px"
        rows.append([SELECTIVE_ROWS[entry["row"]], sizes, f"{peak:.0f} MB", share, f"{training:.0f} MB"])
        rows[-1] += [f"{anonymous:.0f} MB", seconds]
    first = chosen[0]
    header = ["steps", "BP / ZO at", "peak of the whole process", "of BP-high", "while training"]
    note = (
        "Stable Diffusion 1.5 architecture, random weights, INT8, rank 4, float32 activations, batch 1, one step (of"
        " each kind); fresh processes from start to end,"
        f" {first['hardware']['cores']} cores of {first['hardware']['name']}, torch"
        f" {first['versions']['torch']}. A process that only imports the libraries has {imports['peak_rss_mb']:.0f}"
        " MB. The peak counts mapped pages of the weight file (860 MB), which the system can drop. Time: CPU seconds"
        f" (user and system), one thread, beside other processes; ZO-high with n ="
        f" {first['num_perturbations']}, that is {first['num_perturbations'] + 1} forward passes. MB = 2^20. By"
        " `benchmarks/bench_selective.py`."
    )
    return table([*header, "anonymous, above imports", "CPU time of the step"], rows) + "\n\n" + note


SELECTIVE_VARIANTS = {
    "bp-high": "BP-high: backpropagation at full size, the ceiling",
    "bp-low": "BP-low alone",
    "zo-high": "ZO-high alone",
    "selective": "**selective**",
    "no-timestep": "selective without the ramp over timesteps",
    "no-progress": "selective without the ramp over progress",
    "one-adam": "selective, one Adam state for both kinds",
    "window": "**BP-low alone, through windows**",
    "window-selective": "selective, BP-low through windows",
}


def selective_quality(result):
    """benchmarks/results/selective_quality.json, as `benchmarks/compare_selective.py` writes it."""
    names, entries = ("CLIP-I", "identity", "CLIP-T"), result["entries"]
    of_variant = {name: [e for e in entries if e["variant"] == name] for name in SELECTIVE_VARIANTS}
    ceiling = {(e["subject"], e["seed"]): e["scores"] for e in of_variant["bp-high"]}

    def mean(scores, name):
        return sum(score[name] for score in scores) / len(scores)

    judged = {e["subject"] for e in entries}
    plain = [scores for subject, scores in result["plain_word"].items() if subject in judged]
    rows = [["nothing: the plain word", *(f"{mean(plain, name):.3f}" for name in names), "", "", "", len(plain)]]
    for variant, chosen in of_variant.items():
        if not chosen:
            continue
        scores = [e["scores"] for e in chosen]
        paired = [
            (e["scores"], ceiling[e["subject"], e["seed"]]) for e in chosen if (e["subject"], e["seed"]) in ceiling
        ]
        share = ""
        if paired:
            ours, theirs = zip(*paired)
            share = f"{mean(ours, 'CLIP-I') / mean(theirs, 'CLIP-I'):.0%}"
        bp = sum(e["updates"]["bp_low"] for e in chosen) / sum(sum(e["updates"].values()) for e in chosen)
        seconds = sum(e["cpu_seconds"] for e in chosen) / len(chosen)
        cells = [f"{mean(scores, name):.3f}" for name in names]
        rows.append([SELECTIVE_VARIANTS[variant], *cells, share, f"{bp:.0%}", f"{seconds:.0f} s", len(chosen)])
    settings, first = entries[0]["settings"], entries[0]
    note = (
        f"Means over runs, of up to {len(judged)} subjects; {first['steps']} steps of batch"
        f" {settings['train_batch_size']}, rank {settings['rank']}, n = {settings['num_perturbations']}; BP-low at 32"
        " px, everything else, and what is judged, at 64 px. CLIP-I and identity: mean cosine of (reference,"
        " generated) pairs, CLIP-T: prompt against image, all by `demo/scorer`. Share of the ceiling: of the same"
        f" subjects and seeds. Time: CPU seconds of training on one thread of {first['hardware']['name']}. By"
        " `benchmarks/compare_selective.py`."
    )
    header = ["steps", *names, "CLIP-I of the ceiling's", "BP steps", "training", "runs"]
    return table(header, rows) + "\n\n" + note


def selective_pilots(result):
    """benchmarks/results/selective_pilots.json, as `benchmarks/compare_selective.py --set ...` writes it."""
    names, settings = ("CLIP-I", "identity", "CLIP-T"), ("learning_rate", "zo_learning_rate", "num_perturbations")
    ramps, rows = ("bp_timestep_midpoint", "bp_progress_midpoint"), []
    order = list(SELECTIVE_VARIANTS)
    for entry in sorted(result["entries"], key=lambda e: (order.index(e["variant"]), e["scores"]["CLIP-I"])):
        bp_rate, zo_rate, n = (f"{entry['settings'][name]:g}" for name in settings)
        used = [entry["updates"][kind] > 0 for kind in ("bp_low", "zo_high")]
        midpoints = [f"{entry['settings'][name]:g}" if all(used) else "" for name in ramps]
        cells = [bp_rate if used[0] else "", *((zo_rate, n) if used[1] else ("", "")), *midpoints]
        name = SELECTIVE_VARIANTS[entry["variant"]].split(":")[0].strip("*")
        schedule = entry["settings"]["lr_scheduler"]
        name += f", {schedule} schedule" if schedule != "constant" else ""
        rows.append([name, *cells, *(f"{entry['scores'][score]:.3f}" for score in names)])
    header = ["steps", "rate of BP-low", "of ZO-high", "n", "m_t", "m_s", *names]
    first = result["entries"][0]
    note = f"One run each: {first['subject']}, seed {first['seed']}, {first['steps']} steps of batch"
    note += f" {first['settings']['train_batch_size']}. By `benchmarks/compare_selective.py --set ...`."
    return table(header, rows) + "\n\n" + note


def selective_gradients(result):
    """benchmarks/results/selective_gradients.json, as `benchmarks/compare_selective.py --gradients` writes it."""
    names = {"bp_low": "BP-low", "zo_high": "ZO-high", "ratio": "ZO-high / BP-low, weight by weight"}
    rows = [
        [words, *(f"{x:.1e}" if x < 0.01 else f"{x:.2g}" for x in result["quantiles"][name])]
        for name, words in names.items()
    ]
    note = (
        f"Root mean square of each adapter weight's gradient over {result['batches']} batches ({result['subject']},"
        f" after {result['updates_before']} steps), quantiles over the {result['weights']} weights. Cosine of an"
        f" estimate with the gradient of the same batch: {result['cosine']:.4f} on average, where sqrt(n / D) is"
        f" {(result['num_perturbations'] / result['weights']) ** 0.5:.4f}. By `benchmarks/compare_selective.py"
        " --gradients`."
    )
    return table(["gradient", "5 %", "median", "95 %"], rows) + "\n\n" + note


def selective_windows(result):
    """The windows of benchmarks/results/selective_gradients.json."""
    windows = result["windows"]
    header = [f"t = {t}" for t in windows["cosines"]]
    note = (
        "Cosine of the sum of the gradients of four windows that tile a picture with the picture's own gradient, at"
        f" {windows['subject'].replace('_', ' ')}, {windows['examples']} examples, adapters"
        f" {windows['spread']:g} (Gaussian) from their start. By `benchmarks/compare_selective.py --gradients`."
    )
    return table(header, [[f"{cosine:.3f}" for cosine in windows["cosines"].values()]]) + "\n\n" + note


def loading(result):
    """What loading the UNet costs, from the "load-" rows of memory_cpu.json."""
    names = {
        "load-int8-first": "empty cache: quantizes into the file",
        "load-int8-no-cache": "no cache: quantizes into memory",
        "load-int8": "filled cache: maps the file",
    }
    rows = []
    for name, words in names.items():
        entry = next((e for e in result["entries"] if e["row"] == name and e["architecture"] == "sd15"), None)
        if entry:
            m = entry["loading"]
            rows.append(
                [words, f"{m['peak_anonymous_above_start_mb']:.0f} MB", f"{m['peak_rss_above_start_mb']:.0f} MB"]
            )
            rows[-1] += [f"{m['bound_mb']:.0f} MB", f"{m['load_seconds']:.1f} s"]
    header = ["loading the INT8 UNet", "anonymous, above start", "resident, above start", "to stay below", "time"]
    return table(header, rows)


TARGET_HEADER = ["target", "to reach", "measured", ""]


def judged(what, to_reach, value, shown, at_most=None, at_least=None):
    """A row of targets: what was to be reached, what was measured."""
    met = value <= at_most if at_least is None else value >= at_least
    return [what, to_reach, shown, "met" if met else "**missed**"]


PAPER_STEPS = {"demo": 5_000, "sd15": 30_000}  # of n = 2, in which the official loop is the paper's setting
REACHED = {"loss": "held-out loss", "CLIP-I": "CLIP-I", "identity": "identity"}


# Methods of methods.json that are Gauss-Newton -> what targets call them, and the engine that is projected.
GAUSS_NEWTON = {
    "fast": ("Gauss-Newton in bfloat16", "ours-openvino-bf16"),
    "fast_float32": ("Gauss-Newton in float32", "ours-openvino"),
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
    for name, words in REACHED.items():
        faster = official / (each * reached[name]) if reached[name] else 0
        what = f"demo base: CPU time to the paper's {words}, official loop against {title}"
        shown = f"{faster:.1f}x" if faster else "not reached"
        rows.append(judged(what, "at least 10x", faster, shown, at_least=10))
    official = rate["sd15", "official"]["seconds_per_step"]["median"] * PAPER_STEPS["sd15"] / 3600
    each = rate["sd15", engine]["seconds_per_example"]
    hours = (reached["loss"] or math.inf) / budget * 3 * PAPER_STEPS["sd15"] * each / 3600
    what = f"SD 1.5, 256 px, a projection: CPU time of {title} to the paper's held-out loss"
    shown = f"{hours:.0f} h" if reached["loss"] else "not reached"
    rows.append(judged(what, "at most 2 h", hours, shown, at_most=2))
    shown = f"{official / hours:.1f}x ({official:.0f} h)" if reached["loss"] else f"not reached ({official:.0f} h)"
    rows.append(judged("the same, against the official loop", "at least 40x", official / hours, shown, at_least=40))
    return rows


def method_targets(learned, scales_memory, lora_memory, loras, speeds):
    """The targets of the methods: fewer forwards, less time and memory, at which quality."""
    rows, summary = [], learned["summary"]
    budget = summary["paper"]["curve"][-1]["forwards"][0]
    for method, (title, _) in GAUSS_NEWTON.items():
        reached = summary[method]["reaches"]
        for metric, words in REACHED.items():
            what = f"{title}: forwards to the {words} of the paper's setting at its full budget"
            forwards = reached[metric] or math.inf
            shown = f"{forwards / budget:.0%} of them" if reached[metric] else "not reached"
            rows.append(judged(what, "at most a fifth", forwards, shown, at_most=budget / 5))
        ours, ceiling = (summary[name]["curve"][-1] for name in (method, "gradient_ti"))
        share, short = (ours[name][0] / ceiling[name][0] for name in ("CLIP-I", "CLIP-T"))
        what = f"{title} at the full budget: CLIP-I against gradient TI's"
        rows.append(judged(what, "at least 98 %", share, f"{share:.1%}", at_least=0.98))
        rows.append(judged("the same, CLIP-T", "no lower", short, f"{short:.1%}", at_least=1))
        rows += time_targets(learned, speeds, method)

    peaks = {entry["row"]: entry["measured"]["peak_rss_mb"] for entry in scales_memory["entries"]}
    for row, most in (("int8", "half"), ("int8-checkpointing", "a third")):
        share = peaks[row] / peaks["official-peqa"]
        what = "TuneQDM (PEQA), 512 px: peak of the process, of the official way's"
        what += ", ours with gradient checkpointing, it without" if row != "int8" else ""
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


ABLATIONS = "sg_puts tau_nu sampling rge_spsa mu n precision timesteps gauss_newton ideas".split()
TABLES = {
    "evidence": (evidence, "benchmarks/results/signal.json"),
    "demo_scores": (demo_scores, "docs/demo_scores.json"),
    "demo_scores_xl": (demo_scores, "docs/demo_scores_xl.json"),
    "demo_quality": (demo_quality, "demo/quality.json"),
    "demo_quality_xl": (demo_quality, "demo/quality_xl.json"),
    "signal": (signal, "benchmarks/results/signal.json"),
    "hardening": (hardening, "docs/hardening.json"),
    "signal_float32": (signal, "benchmarks/results/signal_float32.json"),
    "methods": (methods, "benchmarks/results/methods.json"),
    **{f"ablation_{name}": (ablation, f"benchmarks/results/ablation_{name}.json") for name in ABLATIONS},
    "quality": (quality, "benchmarks/results/quality.json"),
    "step": (step, "benchmarks/results/step_cpu.json"),
    "scaling": (scaling, "benchmarks/results/step_cpu.json", "benchmarks/results/memory_cpu.json"),
    "processes": (processes, "benchmarks/results/step_cpu.json"),
    "memory": (memory, "benchmarks/results/memory_cpu.json"),
    "families_memory": (families_memory, "benchmarks/results/memory_cpu.json"),
    "families_step": (families_step, "benchmarks/results/step_cpu.json"),
    "tuneqdm_memory": (tuneqdm_memory, "benchmarks/results/tuneqdm_memory.json"),
    "tuneqdm_rates": (tuneqdm_quality, "benchmarks/results/tuneqdm_learning_rate.json"),
    "tuneqdm_quality": (tuneqdm_quality, "benchmarks/results/tuneqdm_quality.json"),
    "selective_memory": (selective_memory, "benchmarks/results/selective_memory.json"),
    "selective_quality": (selective_quality, "benchmarks/results/selective_quality.json"),
    "selective_pilots": (selective_pilots, "benchmarks/results/selective_pilots.json"),
    "selective_gradients": (selective_gradients, "benchmarks/results/selective_gradients.json"),
    "selective_windows": (selective_windows, "benchmarks/results/selective_gradients.json"),
    "loading": (loading, "benchmarks/results/memory_cpu.json"),
    "method_targets": (
        method_targets,
        "benchmarks/results/methods.json",
        "benchmarks/results/tuneqdm_memory.json",
        "benchmarks/results/selective_memory.json",
        "benchmarks/results/selective_quality.json",
        "benchmarks/results/step_projection.json",
    ),
    "targets": (
        targets,
        "benchmarks/results/step_cpu.json",
        "benchmarks/results/memory_cpu.json",
        "benchmarks/results/signal.json",
        "benchmarks/results/quality.json",
    ),
}
PAGES = ["README.md", *sorted(page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").rglob("*.md"))]


def fill(text):
    """A page's text with every marked block made anew."""

    def block(match):
        name = match[1]
        make, *paths = TABLES[name]
        files = [ROOT / path for path in paths]
        if all(file.is_file() for file in files):
            content = make(*(json.loads(file.read_text(encoding="utf-8")) for file in files))
        else:
            content = "Not measured yet."
        return f"<!-- BEGIN {name} -->\n{content}\n<!-- END {name} -->"

    return re.sub(r"<!-- BEGIN (\w+) -->.*?<!-- END \1 -->", block, text, flags=re.S)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="Change nothing; exit 1 where a page is out of date.")
    args = parser.parse_args()
    pages = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
    unused = [name for name in TABLES if not any(f"<!-- BEGIN {name} -->" in text for text in pages.values())]
    if unused:
        raise SystemExit(f"no page has a block named {', '.join(unused)}")
    for page, text in pages.items():
        if args.check and fill(text) != text:
            sys.exit(f"{page} is out of date: run python benchmarks/make_tables.py")
        if not args.check:
            (ROOT / page).write_text(fill(text), encoding="utf-8")


if __name__ == "__main__":
    main()
