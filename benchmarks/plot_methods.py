"""The figures of `compare_methods.py`: curves against forwards, pictures at the full budget, and the ablations'."""

import re

import matplotlib.pyplot as plt
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from benchmarks.tables.markdown import loss_name
from personalization.files import atomic_path


plt.switch_backend("Agg")

SHOWN = ("loss", "CLIP-I", "identity")


def title_of(metric, result):
    """The name of a metric in a figure."""
    return loss_name(result) if metric == "loss" else metric


def plot(result, path):
    """Loss, CLIP-I and identity against forwards; the band is one standard deviation of the seeds' means."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.8), constrained_layout=True)
    for axis, metric in zip(axes, SHOWN):
        for i, (name, found) in enumerate(result["summary"].items()):
            points = [point for point in found["curve"] if metric in point]
            label, colour = result["methods"][name]["title"], f"C{i % 10}"
            forwards, means = ([point[key][0] for point in points] for key in ("forwards", metric))
            if forwards == [0]:  # nothing is learned, and a logarithmic axis has no zero
                axis.axhline(means[0], color="black", linestyle=":", label=label)
                continue
            axis.plot(forwards, means, "o-", color=colour, label=label, markersize=4)
            if points[0][metric][1] is not None:
                low, high = ([p[metric][0] + sign * p[metric][1] for p in points] for sign in (-1, 1))
                axis.fill_between(forwards, low, high, color=colour, alpha=0.2, linewidth=0)
        axis.set(xscale="log", xlabel="example-forwards (a backward counts as two)", title=title_of(metric, result))
        judged = result["configuration"]["milestones" if metric == "loss" else "image_milestones"]
        axis.set_xticks(judged, [f"{forwards:,}" for forwards in judged])
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    seeds = max(len(found["seeds"]) for found in result["summary"].values())
    band = f"; band: ± one standard deviation of that mean over {seeds} seeds" if seeds > 1 else ", one seed"
    figure.suptitle(f"Mean over {len(result['subjects'])} subjects{band}", fontsize=10)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=90)
    plt.close(figure)


def contact_sheet(result, subjects, strips, path, side=80, shown=2):
    """Rows: subjects; columns: references, then every method at the full budget.

    Args:
        result: `methods.json`.
        subjects: folder of the subjects' pictures.
        strips: (method, subject) -> file with one square picture of every prompt, side by side.
        path: of the sheet.
        side: of a picture in it, px.
        shown: pictures of each cell, of as many prompts.
    """
    names = [name for name in result["methods"] if any(name == method for method, _ in strips)]
    width, top = shown * side + 8, 50
    canvas = Image.new("RGB", (width * (1 + len(names)), top + side * len(result["subjects"])), "white")
    ink = ImageDraw.Draw(canvas)
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 10)  # Pillow's own has no η
    for x, title in enumerate(["references", *(result["methods"][name]["title"] for name in names)]):
        words = title.replace(", ", ",\n").replace(" (", "\n(")
        ink.multiline_text((x * width + 2, 2), words, fill="black", font=font)
    for y, subject in enumerate(result["subjects"]):
        cells = {0: [Image.open(p).convert("RGB") for p in sorted((subjects / subject).glob("*.png"))[:shown]]}
        for x, name in enumerate(names, start=1):
            if (name, subject) in strips:
                strip = Image.open(strips[name, subject]).convert("RGB")
                edge = strip.height
                cells[x] = [strip.crop((i * edge, 0, (i + 1) * edge, edge)) for i in range(shown)]
        for x, cell in cells.items():
            for i, image in enumerate(cell):
                image = image.resize((side, side), Image.Resampling.LANCZOS)
                canvas.paste(image, (x * width + i * side, top + y * side))
    with atomic_path(path) as temporary:
        canvas.save(temporary)


def plot_kept(result, path, bins=20):
    """A histogram of i*/τ, the share of directions that SG keeps, over all rebuilds, for each cell that has SG."""
    figure, axis = plt.subplots(figsize=(6, 4), constrained_layout=True)
    for name, method in result["methods"].items():
        shares, runs_with = shares_kept(result, name)
        if shares:
            label = f"{method['title']}: {len(shares)} rebuilds of {runs_with} runs"
            axis.hist(shares, bins=bins, range=(0, 1), histtype="stepfilled", alpha=0.5, label=label)
    axis.set(xlabel="i*/τ", ylabel="rebuilds", title="Directions that Subspace Gradient keeps")
    if axis.has_data():
        axis.legend(fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=90)
    plt.close(figure)


def shares_kept(result, name):
    """i*/τ of every rebuild of a cell's runs, and how many runs those are."""
    found = [run["kept"] for run in result["runs"] if run["name"] == name and run.get("kept")]
    return [count / kept["window"] for kept in found for count in kept["counts"]], len(found)


def plot_timesteps(result, path):
    """Heat maps over (T_L, T_U): the difference to the paper's setting on the same subjects and seeds."""
    limits = {}
    for row in result["rows"]:
        least, most = map(int, re.search(r"\[(\d+), (\d+)\)", row["title"]).groups())
        limits[least, most] = row
    lows, highs = sorted({low for low, _ in limits}), sorted({high for _, high in limits})
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    for axis, metric in zip(axes, SHOWN):
        values = {key: row.get(f"{metric} difference", [0.0])[0] for key, row in limits.items()}  # paper's own is 0
        grid = [[values.get((low, high)) for high in highs] for low in lows]
        grid = [[float("nan") if value is None else value for value in line] for line in grid]
        largest = max((abs(value) for value in values.values() if value is not None), default=0) or 1
        colours = "RdYlGn_r" if metric == "loss" else "RdYlGn"  # green is better
        axis.imshow(grid, cmap=colours, vmin=-largest, vmax=largest)
        for (low, high), value in values.items():
            row, shown = limits[low, high], "–" if value is None else f"{value:+.{4 if metric == 'loss' else 3}f}"
            words = f"{shown}\n{row['runs']} of {row['of']} runs"
            axis.text(highs.index(high), lows.index(low), words, ha="center", va="center", fontsize=8)
        axis.set_xticks(range(len(highs)), highs)
        axis.set_yticks(range(len(lows)), lows)
        axis.set(xlabel="T_U", ylabel="T_L", title=f"{title_of(metric, result)}, difference to the paper's 500 to 900")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=90)
    plt.close(figure)
