"""What others have measured with `benchmarks/field_report.py`, on machines and weights that are not here."""

from benchmarks.tables.markdown import code_note, table


def field(*reports):
    """benchmarks/results/field/*.json: memory and time of each set of flags, the signal, and what was learned."""
    if not reports:
        return "No report yet."
    return "\n\n".join(one(report) for report in reports)


def one(report):
    """The tables of one report; a part that failed says why."""
    parts, settings = report["parts"], report["settings"]
    base = settings["pretrained_model_name_or_path"]
    lines = [f"**{base}** on {report['hardware']['name']}, torch {report['versions']['torch']}:"]
    failed = {name: part["failed"] for name, part in parts.items() if "failed" in part}
    found = {name: part for name, part in parts.items() if name not in failed}

    rows = [memory_row(name.removeprefix("row: "), part) for name, part in found.items() if name.startswith("row: ")]
    if rows:
        header = ["flags", "px", "activations", "memory, predicted", "memory, measured", "a step", "a forward"]
        lines.append(table(header, rows))
    if "signal" in found:
        lines.append(signal_line(found["signal"]))
    scores = found.get("scores", {})
    runs = {name.removeprefix("run: "): part for name, part in found.items() if name.startswith("run: ")}
    if runs:
        metrics = sorted({metric for row in scores.values() if isinstance(row, dict) for metric in row})
        held_out = all(run["held_out"] for run in runs.values())
        loss = "held-out loss" if held_out else "validation loss (training pictures)"
        header = ["optimizer", "steps", "forwards", "time", f"{loss}, first to last", "subspace holds", *metrics]
        plain = [[label, "", "", "", "", "", *shown(row, metrics)] for label, row in plain_words(scores, runs)]
        rows = [[*run_row(name, run), *shown(scores.get(name, {}), metrics)] for name, run in runs.items()]
        lines.append(table(header, plain + rows))
    if runs:
        lines.append("Each optimizer's loss is of its own draws (of noise and timesteps): compare its ends, not rows.")
    lines += [f"*{name}* failed: {reason}" for name, reason in failed.items()]
    lines.append(f"By `{report['command']}`.{code_note([report])}")
    return "\n\n".join(lines)


def memory_row(name, part):
    peak = part["peak_memory"]
    measured = peak.get("cuda_reserved_mb", peak["process_mb"])  # what a process takes, on a GPU or of the host
    seconds = part["seconds_per_step"]
    memory = f"{part['predicted_mb']} MB", f"{measured} MB ({measured / part['predicted_mb'] - 1:+.0%})"
    times = f"{seconds:.3g} s", f"{seconds / part['forwards_per_step']:.3g} s"
    return [name, part["resolution"], part["activations"], *memory, *times]


def signal_line(part):
    """How well differences of losses see the gradient, at some steps μ."""
    words = ", ".join(
        f"{median:.3f} ({least:.2f}) at μ = {mu}"
        for mu, (median, least) in part["correlation_median_and_least"].items()
    )
    return (
        f"Differences of losses in {part['activations']} against the exact gradient of the same weights in float32:"
        f" correlation over {part['directions']} directions, median (and least) of {part['examples']} examples:"
        f" {words}; the default is {part['default_mu']:g}."
    )


def run_row(name, run):
    losses = [loss for _, loss in run["validation_losses"]]
    change = f"{losses[0]:.4f} to {losses[-1]:.4f}" if losses else ""
    share = f"{run['share']:.0%}" if "share" in run else ""
    return [name, f"{run['steps']:,}", f"{run['forward_passes']:,}", f"{run['seconds']:.0f} s", change, share]


def plain_words(scores, runs):
    """What is scored beside the runs: the plain word."""
    return [(label, row) for label, row in scores.items() if isinstance(row, dict) and label not in runs]


def shown(row, metrics):
    return [f"{row[metric]:.3f}" if metric in row else "" for metric in metrics]
