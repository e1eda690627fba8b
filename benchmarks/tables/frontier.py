"""The frontier: memory and time of a step of every way to learn a word."""

from benchmarks.tables.markdown import code_note, table


ROWS = {  # row -> its name, and when to take it
    "paper": ("ZOODiP, the paper's step (n = 2)", "the paper, to the letter"),
    "paper-one-candidate": ("the same, one candidate a pass", "the paper in less memory"),
    "paper-low-vram": ("the same, `--low_vram`", "a GPU that cannot hold the INT8 weights"),
    "gauss-newton": ("Gauss-Newton, float32", "an engine without a backward pass"),
    "gauss-newton-bf16": ("Gauss-Newton, bfloat16", "the same, with bfloat16 units"),
    "gauss-newton-openvino": ("Gauss-Newton, OpenVINO, float32", "a CPU with memory to spare"),
    "gauss-newton-openvino-bf16": ("Gauss-Newton, OpenVINO, bfloat16", "the same, with bfloat16 units"),
    "gradient": ("**exact gradient, INT8, checkpointed**", "whenever PyTorch computes"),
    "gradient-layer": ("the same, `--gradient_checkpointing layer`", "the least memory, pictures of 512 px and more"),
    "gradient-bf16": ("the same, bfloat16 activations", "the same, with bfloat16 units"),
    "gradient-everything-kept": ("exact gradient, INT8, everything kept", "memory to spare"),
    "ti-fp32": ("Textual Inversion as diffusers has it, float32", "never: the exact gradient above is the same"),
}
SIZES = {"sd15": "SD 1.5", "sdxl": "SDXL", "demo": "demo"}


def frontier(result):
    """benchmarks/results/frontier_cpu.json, as `benchmarks/bench_frontier.py` writes it."""
    entries = sorted(result["entries"], key=lambda e: (e["architecture"], e["resolution"], list(ROWS).index(e["row"])))
    rows = []
    for entry in entries:
        measured, seconds = entry["measured"], entry["cpu_seconds_of_steps"][1:]
        name, when = ROWS[entry["row"]]
        size = f"{SIZES[entry['architecture']]}, {entry['resolution']} px"
        imports = measured["peak_anonymous_mb"] - measured["peak_anonymous_above_imports_mb"]
        loop = measured["phases"]["training"]["peak_anonymous_mb"] - imports
        memory = [measured["peak_anonymous_above_imports_mb"], loop, measured["peak_rss_mb"]]
        memory = [f"{megabytes:.0f} MB" for megabytes in memory]
        rows.append([size, name, *memory, f"{sum(seconds) / len(seconds):.1f} s", when])
    first = entries[0]
    note = (
        f"Random weights, batch 1, float32 activations unless said, one thread of {first['hardware']['name']}, torch"
        f" {first['versions']['torch']}. Time: CPU seconds of a step, the mean of the second and third. Anonymous"
        " memory above imports is the most of any phase: where the loop has less, it is the VAE's, which encodes the"
        " pictures first. Peak: with mapped pages of the weight file, which the system can"
        f" drop; a process that only imports the libraries has {first['imports_peak_rss_mb']:.0f} MB. MB = 2^20. By"
        " `benchmarks/bench_frontier.py`." + code_note(entries)
    )
    header = [
        "model",
        "a step of",
        "anonymous, above imports",
        "of it in the loop",
        "peak of the process",
        "CPU time",
        "take it for",
    ]
    return table(header, rows) + "\n\n" + note
