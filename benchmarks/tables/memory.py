"""Memory of whole processes."""

from benchmarks.tables.markdown import code_note, table


MEMORY_NAMES = {
    "int8": "**ours, INT8, later runs (mapped file)**",
    "int8-first": "ours, INT8, first run (quantizes into the file)",
    "int8-no-cache": "ours, INT8, `--quantized_cache_dir none`",
    "int8-low-vram": "ours, INT8, `--low_vram`",
    "int8-gauss-newton": "ours, INT8, Gauss-Newton with 32 directions, differences, 3 candidates a pass",
    "int8-gauss-newton-differences": "ours, INT8, Gauss-Newton, differences, 9 candidates a pass",
    "int8-gauss-newton-exact": "the same with exact derivatives (its default), 9 rows a pass",
    "int8-gauss-newton-bf16-differences": "ours, INT8, Gauss-Newton in bfloat16, differences, 9 candidates a pass",
    "int8-gauss-newton-bf16-exact": "the same with exact derivatives, 9 rows a pass",
    "int8-n8": "ours, INT8, n = 8",
    "int8-n8-split": "ours, INT8, n = 8, `--max_candidates_per_forward 1`",
    "nf4": "ours, NF4 + INT8 convolutions",
    "quanto-int8": "ours, quanto-INT8",
    "none": "ours, unquantized",
    "openvino": "ours, OpenVINO, later runs",
    "openvino-gauss-newton-exact": "ours, OpenVINO, Gauss-Newton in float32, exact derivatives, 9 rows a pass",
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
    first, names = chosen[0], dict.fromkeys(entry["hardware"]["name"] for entry in chosen)
    note = (
        "Fresh processes, from start to the second trained step (baselines: first), n = 2 unless said, batch 1,"
        f" {first['hardware']['cores']} cores of {' or '.join(names)}. A process that only imports the"
        f" libraries has {imports['peak_rss_mb']:.0f} MB, {imports['peak_anonymous_mb']:.0f} MB of it anonymous."
        " The peak counts mapped pages of the weight file, too, which the system can drop."
        " MB = 2^20. By `benchmarks/bench_memory.py`." + code_note(chosen)
    )
    return table(header, rows) + "\n\n" + note


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


DRAWING = "int8-images"  # a run that draws, of which only that is shown
FAMILIES = {"sdxl": "SDXL", "sd21": "SD 2.1", "z_image": "Z-Image"}
FAMILY_ROWS = {
    "int8": "**ours, INT8, later runs (mapped file)**",
    "int8-gradient": "**the same, exact gradient**",
    DRAWING: "drawing a picture with these layers",
    "official": "official loop, quanto-INT8",
}


def what_counts(entry):
    """MB of an entry: anonymous above imports, and resident; of the whole process, or of its drawing alone."""
    measured = entry["measured"]
    anonymous, peak = measured["peak_anonymous_above_imports_mb"], measured["peak_rss_mb"]
    if entry["row"] != DRAWING:
        return anonymous, peak
    drawing = measured["phases"]["results"]
    return anonymous + drawing["peak_anonymous_mb"] - measured["peak_anonymous_mb"], drawing["peak_rss_mb"]


def families_memory(result):
    """The entries of other architectures than Stable Diffusion 1.5's in benchmarks/results/memory_cpu.json."""
    chosen = [e for e in result["entries"] if e["architecture"] in FAMILIES and e["row"] in FAMILY_ROWS]
    if not chosen:
        return "Not measured yet."
    rows = []
    for entry in sorted(chosen, key=lambda e: (list(FAMILIES).index(e["architecture"]), e["resolution"], e["row"])):
        anonymous, peak = what_counts(entry)
        cells = [FAMILIES[entry["architecture"]], f"{entry['resolution']} px", FAMILY_ROWS[entry["row"]]]
        predicted = None if entry["row"] == DRAWING else entry.get("predicted_mb", {}).get("peak")
        shown = f"{predicted:.0f} MB ({entry['deviation_percent']:+.1f} %)" if predicted else ""
        rows.append([*cells, f"{anonymous:.0f} MB", f"{peak:.0f} MB", shown])
    header = ["", "", "process", "anonymous, above imports", "peak of the whole process"]
    machines = " or ".join(dict.fromkeys(entry["hardware"]["name"] for entry in chosen))
    note = (
        "Random weights, float32 activations, n = 2, batch 1, two steps; fresh processes from start to end on"
        f" {machines}. The peak counts mapped pages of the weight file, which the system can drop. MB = 2^20. By"
        " `benchmarks/bench_memory.py --architecture`." + code_note(chosen)
    )
    return table([*header, "predicted by `--estimate_memory`"], rows) + "\n\n" + note
