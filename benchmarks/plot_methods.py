"""The figures of `compare_methods.py`: curves against forwards, and pictures at the full budget."""

import matplotlib
from PIL import Image, ImageDraw

from personalization import runs


matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402


TITLES = {"loss": "held-out loss", "CLIP-I": "CLIP-I", "identity": "identity"}


def plot(result, path):
    """Held-out loss, CLIP-I and identity against forwards; the band is one standard deviation of the seeds' means."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.8), constrained_layout=True)
    for axis, metric in zip(axes, TITLES):
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
        axis.set(xscale="log", xlabel="example-forwards (a backward counts as two)", title=TITLES[metric])
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    seeds = max(len(found["seeds"]) for found in result["summary"].values())
    band = f"; band: ± one standard deviation of that mean over {seeds} seeds" if seeds > 1 else ", one seed"
    figure.suptitle(f"Mean over {len(result['subjects'])} subjects{band}", fontsize=10)
    with runs.atomic_path(path) as temporary:
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
    for x, title in enumerate(["references", *(result["methods"][name]["title"] for name in names)]):
        words = title.replace(", ", ",\n").replace(" (", "\n(")
        ink.multiline_text((x * width + 2, 2), words, fill="black", font_size=11)
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
    with runs.atomic_path(path) as temporary:
        canvas.save(temporary)
