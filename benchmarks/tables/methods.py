"""Methods at equal cost, and the paper's ablations."""

from benchmarks.tables.markdown import code_note, command_on, loss_name, model_of, on_base, table


def shown_metrics(result, point):
    """Key in a point -> name in a table; older results have no shape."""
    metrics = {"loss": loss_name(result), "CLIP-I": "CLIP-I", "identity": "identity", "CLIP-T": "CLIP-T"}
    return metrics | ({"shape": "shape"} if "shape" in point else {})


def methods(result):
    """benchmarks/results/methods*.json, as `benchmarks/compare_methods.py` writes it."""
    metrics = shown_metrics(result, next(iter(result["summary"].values()))["curve"][-1])

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
        f" two.{reached_where if targets else ''} {on_base(result)} Loss: {judging['held_out']} fixed examples of"
        f" {judged_pictures(judging)}, t in [{low}, {high}), float32, unquantized, as are the pictures (CLIP-I,"
        f" identity and CLIP-T by `demo/scorer`{shape_note(metrics)}). A run: CPU time on one thread, judging"
        f" included, with other work on the machine. By `{command_on(result, model_of(result))}` on"
        f" {hardware['name']}, torch {result['versions']['torch']}.{code_note(result['runs'])}"
    )
    return table(header, rows) + "\n\n" + note


def judged_pictures(judging):
    """The pictures that a loss was judged on, in words."""
    if "pictures" in judging:
        return f"{judging['pictures']} pictures of each subject that nothing is trained on"
    return "the training pictures, with noise that training does not draw"


def shape_note(metrics):
    return "; shape: share of pictures in which it reads the subject's" if "shape" in metrics else ""


FIGURES = {  # that `compare_methods.py` draws of a grid of ablations, in docs, and what they show
    "sg_puts": ("ablation_sg.png", "Histogram of i*/τ at every rebuild"),
    "timesteps": ("ablation_timesteps.png", "Heat maps over T_L and T_U: loss, CLIP-I and identity"),
}


def figure_of(result):
    """The name of the figure of an ablation's result and what it shows, or None."""
    if result["grid"] not in FIGURES:
        return None
    name, shows = FIGURES[result["grid"]]
    ending = model_of(result).removeprefix("base")
    return name.replace(".png", f"{ending}.png"), shows


PUBLISHED = {"sg_puts": "CLIP-I / DINO / CLIP-T", "n": "CLIP-I / DINO"}  # what the paper reports, by grid


def ablation(result):
    """benchmarks/results/ablation_*.json, as `benchmarks/compare_methods.py` writes it for a grid of ablations."""
    metrics = shown_metrics(result, result["rows"][0])
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
        " interval over those pairs (none of fewer than three); bold: the interval is without 0."
        f" {on_base(result)} Loss of {judged_pictures(result['configuration']['judging'])}{shape_note(metrics)}. By"
        f" `benchmarks/compare_methods.py --base {model_of(result)} --grid {result['grid']}` on {hardware['name']},"
        f" torch {result['versions']['torch']}.{code_note(result['runs'])}"
    )
    name, shows = figure_of(result) or (None, None)
    figure = f"\n\n![{shows}](../{name})" if name else ""  # the pages of results are a folder below
    return table(header, rows) + "\n\n" + note + figure
