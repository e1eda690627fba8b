"""TuneQDM: memory beside the official way, and what its strategies learn."""

import statistics

from benchmarks.summaries import spread_over_seeds
from benchmarks.tables.markdown import code_note, table


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


def official_row(row):
    """The official way's row to compare one with: scales and checkpointing alike."""
    kind = "tuneqdm" if "tuneqdm" in row else "peqa"
    return f"official-{kind}" + "-checkpointing" * row.endswith("-checkpointing")


def tuneqdm_memory(result):
    """benchmarks/results/tuneqdm_memory.json, as `benchmarks/bench_tuneqdm.py` writes it."""
    imports = next(e for e in result["entries"] if e["row"] == "imports")["measured"]
    chosen = [e for e in result["entries"] if e["row"] in TUNEQDM_ROWS]
    peaks = {(e["row"], e["resolution"]): e["measured"]["peak_rss_mb"] for e in chosen}
    rows = []
    for entry in sorted(chosen, key=lambda e: (e["resolution"], list(TUNEQDM_ROWS).index(e["row"]))):
        anonymous, peak = (entry["measured"][f"peak_{n}_mb"] for n in ("anonymous_above_imports", "rss"))
        official = peaks.get((official_row(entry["row"]), entry["resolution"]))
        share = f"{peak / official:.0%}" if official else ""
        cells = [f"{entry['resolution']} px", TUNEQDM_ROWS[entry["row"]], f"{peak:.0f} MB", share]
        load = max(entry["load_average"][:2])  # of the last one and five minutes
        busy = f" (load {load:.0f}: not alone)" if load > entry["hardware"]["cores"] + 0.5 else ""
        rows.append([*cells, f"{anonymous:.0f} MB", f"{entry['seconds_per_step']:.0f} s{busy}"])
    header = ["", "process", "peak of the whole process", "of the official way", "anonymous, above imports", "step"]
    first = chosen[0]
    note = (
        "Stable Diffusion 1.5 architecture, random weights, float32 activations, batch 1, two steps; fresh processes"
        f" from start to end, {first['hardware']['cores']} cores of {first['hardware']['name']}, torch"
        f" {first['versions']['torch']}. A process that only imports the libraries has {imports['peak_rss_mb']:.0f}"
        " MB. Official way: the same script and integer weights, the weight of each layer dequantized under autograd;"
        " shares are of its INT8 row with as many scales and the same checkpointing. The peak counts mapped pages of"
        " the weight file (860 MB), which the system can drop. MB = 2^20. By `benchmarks/bench_tuneqdm.py`."
        f"{code_note(chosen)}"
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
        + code_note(result["entries"])
    )
    return table(["weights", "trained", "steps", *names, "runs"], rows) + "\n\n" + note
