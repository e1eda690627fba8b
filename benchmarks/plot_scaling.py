"""Draws docs/scaling.png from the stored results: step time and memory against n, batch, resolution and processes.

python benchmarks/plot_scaling.py
"""

import matplotlib.pyplot as plt

from benchmarks.common import DOCS, RESULTS, read


plt.switch_backend("Agg")

START = {"resolution": 256, "num_perturbations": 2, "batch_size": 1}  # what stays while one of them grows
NAMES = {"ours-int8": "torch INT8", "ours-openvino": "OpenVINO INT8"}
AXES = {"num_perturbations": "n", "batch_size": "batch", "resolution": "resolution, px"}


def line(entries, name, axis, value):
    """(x, y) of one row's entries along `axis`, the other settings as at the start."""
    others = [key for key in START if key != axis]
    chosen = [e for e in entries if e["row"] == name and e["architecture"] == "sd15"]
    chosen = [e for e in chosen if all(e[key] == START[key] for key in others)]
    return sorted((e[axis], value(e)) for e in chosen)


def main():
    steps, memory = (read(RESULTS / name) for name in ("step_cpu.json", "memory_cpu.json"))
    figure, axes = plt.subplots(2, 4, figsize=(14, 6), constrained_layout=True)
    for column, (axis, label) in enumerate(AXES.items()):
        for name, words in NAMES.items():
            points = line(steps["rows"], name, axis, lambda e: e["seconds_per_step"]["median"])
            if points:
                axes[0, column].plot(*zip(*points), "o-", label=words)
        points = line(memory["entries"], "int8", axis, lambda e: e["measured"]["peak_anonymous_above_imports_mb"])
        if points:
            axes[1, column].plot(*zip(*points), "o-", color="tab:blue", label=NAMES["ours-int8"])
        axes[0, column].set(xlabel=label, ylim=0)
        axes[1, column].set(xlabel=label, ylim=0)
    axes[0, 0].set_ylabel("seconds per step")
    axes[1, 0].set_ylabel("anonymous memory above imports, MB")
    axes[0, 0].legend()
    counts = [entry["processes"] for entry in steps["processes"]]
    axes[0, 3].plot(counts, [entry["forward_passes_per_second"] for entry in steps["processes"]], "o-")
    axes[0, 3].set(xlabel="processes (demo base)", ylabel="examples per second, all together", ylim=0, xticks=counts)
    axes[1, 3].axis("off")
    figure.savefig(DOCS / "scaling.png", dpi=90)


if __name__ == "__main__":
    main()
