"""The frontier: memory and time of a step of every way to learn a word."""

from benchmarks.tables.markdown import code_note, table


ROWS = {  # row -> its name, and when to take it
    "paper": ("ZOODiP, the paper's step (n = 2)", "the paper, to the letter"),
    "paper-one-candidate": ("the same, one candidate a pass", "the paper in less memory"),
    "paper-low-vram": ("the same, `--low_vram`", "a GPU that cannot hold the INT8 weights"),
    "gauss-newton": ("Gauss-Newton, float32", "an engine without a backward pass"),
    "gauss-newton-bf16": ("Gauss-Newton, bfloat16", "the same, with bfloat16 units"),
    "gauss-newton-openvino": (
        "Gauss-Newton, OpenVINO, float32",
        "engines without PyTorch; on this CPU it gains nothing over PyTorch",
    ),
    "gauss-newton-openvino-bf16": ("Gauss-Newton, OpenVINO, bfloat16", "the same, with bfloat16 units"),
    "gradient": ("**exact gradient, INT8, checkpointed by block**", "whenever PyTorch computes"),
    "gradient-layer": ("the same, by layer", "the least memory, pictures of 512 px and more"),
    "gradient-window": ("the same, `--bp_view window`", "the shortest step at 512 px and more"),
    "gradient-low-vram": ("the same, `--low_vram`", "a GPU that cannot hold the INT8 weights"),
    "gradient-bf16": ("the same, bfloat16 activations", "a CPU with units for bfloat16 (AMX): half the time"),
    "gradient-everything-kept": ("exact gradient, INT8, everything kept", "memory to spare"),
    "ti-fp32": ("Textual Inversion as diffusers has it, float32", "never: the exact gradient above is the same"),
}
# Steps to where the paper ends: its own length, or the forwards that a method took on the demo model that predicts ε,
# as Stable Diffusion 1.5 does, over those of a step.
PAPERS_STEPS = 30_000
LIKE = {"paper": None, "ti-fp32": ("gradient_ti", 3)}
LIKE |= {"gauss-newton": ("tangents_float32", 38), "gauss-newton-bf16": ("tangents", 38)}
LIKE |= {"gauss-newton-openvino-bf16": ("tangents_openvino", 38)}
LIKE |= {"gradient-bf16": ("gradient_bf16", 4)}
LIKE |= {"gradient": ("gradient_1500", 4), "gradient-window": ("gradient_window", 2)}
SIZES = {"sd15": "SD 1.5", "sdxl": "SDXL", "demo": "demo"}


def steps_to_the_papers(measure, row, methods):
    """Of a row, by `methods_eps.json`; None: it ends before it is there."""
    like = max((name for name in LIKE if row.startswith(name)), key=len)
    if LIKE[like] is None:
        return PAPERS_STEPS
    method, forwards = LIKE[like]
    reached = methods["summary"][method]["reaches"][measure]
    return None if reached is None else round(reached / forwards)


def points(result, methods):
    """Of every entry: itself, MB of the loop above imports, seconds of a step, steps to the paper's loss."""
    entries = sorted(result["entries"], key=lambda e: (e["architecture"], e["resolution"], list(ROWS).index(e["row"])))
    for entry in entries:
        measured, seconds = entry["measured"], entry["cpu_seconds_of_steps"][1:]
        imports = measured["peak_anonymous_mb"] - measured["peak_anonymous_above_imports_mb"]
        loop = measured["phases"]["training"]["peak_anonymous_mb"] - imports
        yield entry, loop, sum(seconds) / len(seconds), steps_to_the_papers("loss", entry["row"], methods)


def frontier(result, methods):
    """benchmarks/results/frontier_cpu.json, as `benchmarks/bench_frontier.py` writes it, and methods_eps.json."""
    rows = []
    for entry, loop, seconds, steps in points(result, methods):
        measured, (name, when) = entry["measured"], ROWS[entry["row"]]
        size = f"{SIZES[entry['architecture']]}, {entry['resolution']} px"
        memory = [measured["peak_anonymous_above_imports_mb"], loop, measured["peak_rss_mb"]]
        memory = [f"{megabytes:.0f} MB" for megabytes in memory]
        hours = f"{seconds * steps / 3600:.{1 if seconds * steps < 36_000 else 0}f} h"
        others = [steps_to_the_papers(measure, entry["row"], methods) for measure in ("CLIP-I", "identity")]
        others = " / ".join("never" if count is None else f"{count:,}" for count in others)
        rows.append([size, name, *memory, f"{seconds:.1f} s", f"{steps:,}", others, hours, when])
    first = result["entries"][0]
    note = (
        f"Random weights, batch 1, float32 activations unless said, one thread of {first['hardware']['name']}, torch"
        f" {first['versions']['torch']}. Time: CPU seconds of a step, the mean of the second and third. Anonymous"
        " memory above imports is the most of any phase: where the loop has less, it is the VAE's, which encodes the"
        " pictures first. Peak: with mapped pages of the weight file, which the system can"
        f" drop; a process that only imports the libraries has {first['imports_peak_rss_mb']:.0f} MB. MB = 2^20."
        " Steps: the paper's own 30,000, and what the others took on a demo model to where it ends"
        f" ([methods](methods.md), the one that predicts ε, {len(methods['subjects'])} subjects): a projection, nobody"
        " has trained so long here. By `benchmarks/bench_frontier.py`." + code_note(result["entries"])
    )
    header = [
        "model",
        "a step of",
        "anonymous, above imports",
        "of it in the loop",
        "peak of the process",
        "CPU time",
        "steps to the paper's loss",
        "to its CLIP-I / identity",
        "time to its loss",
        "take it for",
    ]
    return table(header, rows) + "\n\n" + note


def heap(before, after):
    """frontier_amx_heap.json and frontier_amx.json: what is measured in both, where the heap is told other things."""
    earlier = {tuple(e[k] for k in ("architecture", "row", "resolution")): e for e in before["entries"]}
    pairs = [(earlier.get((e["architecture"], e["row"], e["resolution"])), e) for e in after["entries"]]
    pairs = [(old, new) for old, new in pairs if old is not None and old["commit"] != new["commit"]]
    pairs.sort(key=lambda pair: (pair[1]["architecture"], pair[1]["resolution"], list(ROWS).index(pair[1]["row"])))

    def figures(entry):
        memory, seconds = entry["measured"]["peak_anonymous_above_imports_mb"], entry["cpu_seconds_of_steps"][1:]
        return [f"{memory:.0f} MB", f"{sum(seconds) / len(seconds):.1f} s"]

    rows = [
        [f"{SIZES[new['architecture']]}, {new['resolution']} px", ROWS[new["row"]][0], *figures(old), *figures(new)]
        for old, new in pairs
    ]
    header = ["model", "a step of", "a heap of all sizes", "CPU time", "huge pages", "CPU time"]
    note = (
        "Anonymous memory above imports, and CPU seconds of a step, the mean of the second and third, of one machine"
        " on several days. By `benchmarks/bench_frontier.py`."
    )
    return table(header, rows) + "\n\n" + note + code_note([entry for pair in pairs for entry in pair])
