#!/usr/bin/env python
"""docs/frontier.png: memory against time of every way to a word, from `benchmarks/results`.

    python benchmarks/plot_frontier.py

Time is that of the way to the paper's final loss, a projection (see docs/results/frontier.md); memory, that of the
training loop above imported libraries.
"""

import json

import matplotlib.pyplot as plt

from benchmarks.common import DOCS, RESULTS
from benchmarks.tables.frontier import ROWS, SIZES, points
from personalization.files import atomic_path


plt.switch_backend("Agg")

MARKERS = "osD^vP*XhH<>pd"


def main():
    result, methods = (json.loads((RESULTS / name).read_text()) for name in ("frontier_cpu.json", "methods_eps.json"))
    figure, axis = plt.subplots(figsize=(10, 5), constrained_layout=True)
    sizes, names = [], list(ROWS)
    for entry, loop, seconds, steps in points(result, methods):
        size = f"{SIZES[entry['architecture']]}, {entry['resolution']} px"
        if size not in sizes:
            sizes.append(size)
        look = {"marker": MARKERS[names.index(entry["row"])], "color": f"C{sizes.index(size)}"}
        axis.scatter(seconds * steps / 3600, loop, s=60, **look)
    for position, size in enumerate(sizes):
        axis.scatter([], [], s=60, marker="s", color=f"C{position}", label=size)
    for marker, (name, _) in zip(MARKERS, ROWS.values()):
        axis.scatter([], [], s=60, marker=marker, color="gray", label=name.replace("*", "").replace("`", ""))
    axis.set(xscale="log", yscale="log", xlabel="hours to the paper's final loss, one thread (projected)")
    axis.set(ylabel="memory of the loop above imports, MB")
    axis.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper", fontsize=8)
    with atomic_path(DOCS / "frontier.png") as temporary:
        figure.savefig(temporary, dpi=90)


if __name__ == "__main__":
    main()
