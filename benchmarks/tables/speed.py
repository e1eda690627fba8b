"""Time of a step."""

from benchmarks.tables.markdown import code_note, table
from benchmarks.tables.memory import FAMILIES


STEP_NAMES = {
    "ours-int8": "**ours, INT8, torch**",
    "ours-openvino": "**ours, INT8, OpenVINO**",
    "ours-openvino-bf16": "ours, INT8, OpenVINO in bf16 (not for training)",
    "ours-quanto": "ours, quanto-INT8",
    "ours-none": "ours, unquantized",
    "ours-nf4": "ours, NF4",
    "ours-low-vram": "ours, INT8, `--low_vram`",
    "official": "official loop, quanto-INT8",
    "official-compiled": "the same, `torch.compile` as its script has it",
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
    count = first["hardware"]["cpu_count"]
    what, command = f"{count} cores", "make benchmark"
    if first.get("cpu_seconds"):  # which older files do not say
        what, command = "CPU time of one thread", first["command"]
    note = (
        f"Stable Diffusion 1.5 architecture, random weights, n = 2, batch 1, {what} of {first['hardware']['cpu']},"
        f" torch {first['versions']['torch']}, OpenVINO {first['versions']['openvino']}. Rows of one resolution take"
        " turns in one process; speed-ups are ratios of medians. A step of Textual Inversion is one example forward"
        f" and backward, one of ours n + 1 examples forward. By `{command}`." + code_note(chosen)
    )
    return table(header, rows) + "\n\n" + note


GAUSS_NEWTON_NAMES = {
    "gauss-newton": ("float32", "exact derivatives"),
    "gauss-newton-differences": ("float32", "finite differences"),
    "gauss-newton-bf16": ("bfloat16", "exact derivatives"),
    "gauss-newton-bf16-differences": ("bfloat16", "finite differences"),
    "gauss-newton-openvino": ("float32, OpenVINO", "exact derivatives"),
    "gauss-newton-openvino-differences": ("float32, OpenVINO", "finite differences"),
}


def step_gauss_newton(result):
    """benchmarks/results/step_gauss_newton.json: a row of derivatives and a candidate of differences, in turns."""
    times = {(r["resolution"], r["row"]): r["seconds_per_example"] for r in result["rows"]}
    rows = []
    for row in sorted(result["rows"], key=lambda r: (r["resolution"], list(GAUSS_NEWTON_NAMES).index(r["row"]))):
        seconds, others = row["seconds_per_step"], times.get((row["resolution"], f"{row['row']}-differences"))
        cells = [f"{row['resolution']} px", *GAUSS_NEWTON_NAMES[row["row"]], row["examples_per_step"]]
        cells += [f"{seconds['median']:.1f} s ({seconds['min']:.1f}–{seconds['max']:.1f})"]
        cells += [
            f"{row['seconds_per_example']:.2f} s",
            f"{row['seconds_per_example'] / others:.2f}" if others else "",
        ]
        rows.append(cells)
    header = ["", "activations", "", "rows of a pass", "a pass (range)", "a row", "of a difference's"]
    first = result["rows"][0]
    note = (
        "Stable Diffusion 1.5 architecture, random weights, INT8, batch 1; a pass is one step, its text encoder"
        f" included. CPU time of one thread of {first['hardware']['cpu']}, torch {first['versions']['torch']}; rows of"
        " one resolution take turns in one process. By `benchmarks/bench_step.py --cpu_seconds`."
        + code_note(result["rows"])
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
        " SDXL code). By `benchmarks/bench_step.py --architecture ... --cpu_seconds`." + code_note(chosen)
    )
    return table(header, rows) + "\n\n" + note
