"""The demo: its scores, its base, and the engine that trains it."""

from benchmarks.tables.markdown import code_note, table


def time_of(figures):
    """CPU seconds of a training process, or what the clock said where nobody counted them."""
    return (
        f"{figures['cpu_seconds']:.0f} s" if "cpu_seconds" in figures else f"{figures['seconds']:.0f} s by the clock"
    )


def demo_scores(result):
    """docs/demo_scores.json, as `demo/run_demo.py` writes it."""
    names, columns, rows = ["CLIP-I", "identity", "CLIP-T"], result["columns"], []
    shaped = all("shape" in scores for row in result["scores"].values() for scores in row.values())
    names += ["shape"] * shaped  # which older results have not
    learned = [column for column in columns.values() if "flags" in column]
    for subject, row in result["scores"].items():
        for key, scores in row.items():
            seconds = time_of(scores["training"]) if "training" in scores else ""
            figures = [f"{scores[name]:.3f}" for name in names]
            rows.append([subject.replace("_", " "), columns[key]["title"], *figures, seconds])
    for key, column in columns.items():
        found = [row[key] for row in result["scores"].values()]
        figures = [f"**{sum(scores[name] for scores in found) / len(found):.3f}**" for name in names]
        seconds = f"**{time_of(column)}**" if "seconds" in column else ""
        rows.append(["**mean**", column["title"], *figures, seconds])
    costs = [
        f"- *{column['title']}*: {column['optimizer']}; {column['steps']:,} steps, {column['forward_passes']:,}"
        " forward passes of an example, a backward pass counted as two:"
        f" {', '.join(f'`{flag} {value}`' for flag, value in column['flags'].items())}."
        for column in learned
    ]
    command = "make demo" if result["command"] == "python demo/run_demo.py" else result["command"]
    cpu = f", {result['total_cpu_seconds']:.0f} s of CPU" if "total_cpu_seconds" in result else ""
    if cpu and result["total_seconds"] > 1.5 * result["total_cpu_seconds"] / result["hardware"]["jobs"]:
        cpu += " (the machine was busy with other work)"
    denoiser = "transformer" if result.get("base") == "base_flow" else "UNet"
    note = (
        f"By `{command}` on {result['hardware']['cpus']} CPU cores, {result['hardware']['jobs']} processes of one"
        f" thread at a time: {result['total_seconds']:.0f} s in all{cpu}; torch {result['versions']['torch']}. INT8"
        f" {denoiser} and text encoder. CLIP-I and identity: mean cosine of (reference, generated) pairs; CLIP-T:"
        f" prompt against image{'; shape: share of pictures in which it is read' * shaped}; all by `demo/scorer`."
        + code_note([result])
    )
    return "\n\n".join([table(["subject", "", *names, "CPU time of training"], rows), "\n".join(costs), note])


def demo_quality(result):
    """demo/quality.json, as `demo/check_demo_base.py` writes it."""
    names = {
        "vae.psnr_db": f"VAE: PSNR on {result['figures']['vae']['renders']} fresh renders, dB",
        "scorer.shape": "scorer: shape read right on fresh renders",
        "scorer.colour": "scorer: whole set of colours read right",
        "scorer.background": "scorer: background read right",
        "generated.background": "generated from fresh captions: background read back",
        "generated.shape": "generated: shape read back",
        "generated.colour": "generated: whole set of colours read back",
    }
    rows = []
    for key, target in result["targets"].items():
        shown = (f"{target[k]:.1f}" if "psnr" in key else f"{target[k]:.1%}" for k in ("at_least", "measured"))
        rows.append([names.get(key, key), *shown, "met" if target["met"] else "**missed**"])
    note = f"By `{result['command']}` on {result['hardware']}, {result['seconds']:.0f} s.{code_note([result])}"
    return table(["figure", "to reach", "measured", ""], rows) + "\n\n" + note


def paired_differences(result):
    """Per metric: the largest difference between OpenVINO and torch of one seed, and the width of torch's seeds."""
    after = {(run["backend"], run["seed"]): run["after"] for run in result["runs"]}
    seeds = [seed for backend, seed in after if backend == "openvino" and ("torch", seed) in after]
    return {
        name: (max(abs(after["openvino", s][name] - after["torch", s][name]) for s in seeds), high - low)
        for name, (low, high) in result["torch_spread"].items()
    }


def quality(result):
    """benchmarks/results/quality.json, as `benchmarks/bench_quality.py` writes it."""
    names = list(result["torch_spread"])
    rows = [[run["backend"], run["seed"], *(f"{run['after'][n]:.3f}" for n in names)] for run in result["runs"]]
    differences = paired_differences(result)
    words = ", ".join(f"{n} {differs:.3f} of {width:.3f}" for n, (differs, width) in differences.items())
    spread = result["torch_spread"]
    below = [n for r in result["runs"] for n in names if r["backend"] == "openvino" and r["after"][n] < spread[n][0]]
    outside = f" OpenVINO's {' and '.join(below)} lie just below the lowest of torch's seeds." if below else ""
    note = (
        f"Mean scores after training over {', '.join(s.replace('_', ' ') for s in result['subjects'])}. Difference"
        f" between the engines at the same seed, and how far torch's own seeds lie apart: {words}.{outside} By"
        f" `{result['command']}` on {result['hardware']['name']}.{code_note([result])}"
    )
    return table(["UNet in training", "seed", *names], rows) + "\n\n" + note
