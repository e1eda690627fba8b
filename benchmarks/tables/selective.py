"""BP-low, ZO-high and windows: memory, quality, gradients."""

from benchmarks.tables.markdown import code_note, table


SELECTIVE_ROWS = {
    "naive-bp-high": "BP-high, weights dequantized under autograd",
    "bp-high": "BP-high: backpropagation at full size",
    "bp-high-checkpointing": "the same, gradient checkpointing",
    "bp-low": "BP-low alone",
    "bp-low-checkpointing": "the same, gradient checkpointing",
    "bp-window": "**BP-low through windows**",
    "bp-window-checkpointing": "the same, gradient checkpointing",
    "zo-high": "ZO-high alone",
    "selective": "**a step of each kind**",
    "selective-checkpointing": "**the same, gradient checkpointing**",
}


def selective_memory(result):
    """benchmarks/results/selective_memory.json, as `benchmarks/bench_selective.py` writes it."""
    imports = next(e for e in result["entries"] if e["row"] == "imports")["measured"]
    chosen = [e for e in result["entries"] if e["row"] in SELECTIVE_ROWS]
    rows = []
    for entry in sorted(chosen, key=lambda e: (e["resolution"], list(SELECTIVE_ROWS).index(e["row"]))):
        full = [e for e in chosen if (e["row"], e["resolution"]) == ("bp-high", entry["resolution"])]
        peak, anonymous = (entry["measured"][f"peak_{n}_mb"] for n in ("rss", "anonymous_above_imports"))
        training = entry["measured"]["phases"]["training"]["peak_rss_mb"]
        share = f"{peak / full[0]['measured']['peak_rss_mb']:.0%}" if full else ""
        seconds = " + ".join(f"{seconds:.0f}" for _, seconds in entry["seconds_of_steps"]) + " s"
        sizes = f"{entry['low_resolution']} / {entry['resolution']} px"
        rows.append([SELECTIVE_ROWS[entry["row"]], sizes, f"{peak:.0f} MB", share, f"{training:.0f} MB"])
        rows[-1] += [f"{anonymous:.0f} MB", seconds]
    first = chosen[0]
    header = ["steps", "BP / ZO at", "peak of the whole process", "of BP-high", "while training"]
    note = (
        "Stable Diffusion 1.5 architecture, random weights, INT8, rank 4, float32 activations, batch 1, one step (of"
        " each kind); fresh processes from start to end,"
        f" {first['hardware']['cores']} cores of {first['hardware']['name']}, torch"
        f" {first['versions']['torch']}. A process that only imports the libraries has {imports['peak_rss_mb']:.0f}"
        " MB. The peak counts mapped pages of the weight file (860 MB), which the system can drop. Time: CPU seconds"
        f" (user and system), one thread, beside other processes; ZO-high with n ="
        f" {first['num_perturbations']}, that is {first['num_perturbations'] + 1} forward passes. MB = 2^20. By"
        " `benchmarks/bench_selective.py`." + code_note(chosen)
    )
    return table([*header, "anonymous, above imports", "CPU time of the step"], rows) + "\n\n" + note


SELECTIVE_VARIANTS = {
    "bp-high": "BP-high: backpropagation at full size, the ceiling",
    "bp-low": "BP-low alone",
    "zo-high": "ZO-high alone",
    "selective": "**selective**",
    "no-timestep": "selective without the ramp over timesteps",
    "no-progress": "selective without the ramp over progress",
    "one-adam": "selective, one Adam state for both kinds",
    "window": "**BP-low alone, through windows**",
    "window-selective": "selective, BP-low through windows",
}


def selective_quality(result):
    """benchmarks/results/selective_quality.json, as `benchmarks/compare_selective.py` writes it."""
    names, entries = ("CLIP-I", "identity", "CLIP-T"), result["entries"]
    of_variant = {name: [e for e in entries if e["variant"] == name] for name in SELECTIVE_VARIANTS}
    ceiling = {(e["subject"], e["seed"]): e["scores"] for e in of_variant["bp-high"]}

    def mean(scores, name):
        return sum(score[name] for score in scores) / len(scores)

    judged = {e["subject"] for e in entries}
    plain = [scores for subject, scores in result["plain_word"].items() if subject in judged]
    rows = [["nothing: the plain word", *(f"{mean(plain, name):.3f}" for name in names), "", "", "", len(plain)]]
    for variant, chosen in of_variant.items():
        if not chosen:
            continue
        scores = [e["scores"] for e in chosen]
        paired = [
            (e["scores"], ceiling[e["subject"], e["seed"]]) for e in chosen if (e["subject"], e["seed"]) in ceiling
        ]
        share = ""
        if paired:
            ours, theirs = zip(*paired)
            share = f"{mean(ours, 'CLIP-I') / mean(theirs, 'CLIP-I'):.0%}"
        bp = sum(e["updates"]["bp_low"] for e in chosen) / sum(sum(e["updates"].values()) for e in chosen)
        seconds = sum(e["cpu_seconds"] for e in chosen) / len(chosen)
        cells = [f"{mean(scores, name):.3f}" for name in names]
        rows.append([SELECTIVE_VARIANTS[variant], *cells, share, f"{bp:.0%}", f"{seconds:.0f} s", len(chosen)])
    settings, first = entries[0]["settings"], entries[0]
    note = (
        f"Means over runs, of up to {len(judged)} subjects; {first['steps']} steps of batch"
        f" {settings['train_batch_size']}, rank {settings['rank']}, n = {settings['num_perturbations']}; BP-low at 32"
        " px, everything else, and what is judged, at 64 px. CLIP-I and identity: mean cosine of (reference,"
        " generated) pairs, CLIP-T: prompt against image, all by `demo/scorer`. Share of the ceiling: of the same"
        f" subjects and seeds. Time: CPU seconds of training on one thread of {first['hardware']['name']}. By"
        " `benchmarks/compare_selective.py`." + code_note(entries)
    )
    header = ["steps", *names, "CLIP-I of the ceiling's", "BP steps", "training", "runs"]
    return table(header, rows) + "\n\n" + note


def selective_pilots(result):
    """benchmarks/results/selective_pilots.json, as `benchmarks/compare_selective.py --set ...` writes it."""
    names, settings = ("CLIP-I", "identity", "CLIP-T"), ("learning_rate", "zo_learning_rate", "num_perturbations")
    ramps, rows = ("bp_timestep_midpoint", "bp_progress_midpoint"), []
    order = list(SELECTIVE_VARIANTS)
    for entry in sorted(result["entries"], key=lambda e: (order.index(e["variant"]), e["scores"]["CLIP-I"])):
        bp_rate, zo_rate, n = (f"{entry['settings'][name]:g}" for name in settings)
        used = [entry["updates"][kind] > 0 for kind in ("bp_low", "zo_high")]
        midpoints = [f"{entry['settings'][name]:g}" if all(used) else "" for name in ramps]
        cells = [bp_rate if used[0] else "", *((zo_rate, n) if used[1] else ("", "")), *midpoints]
        name = SELECTIVE_VARIANTS[entry["variant"]].split(":")[0].strip("*")
        schedule = entry["settings"]["lr_scheduler"]
        name += f", {schedule} schedule" if schedule != "constant" else ""
        rows.append([name, *cells, *(f"{entry['scores'][score]:.3f}" for score in names)])
    header = ["steps", "rate of BP-low", "of ZO-high", "n", "m_t", "m_s", *names]
    first = result["entries"][0]
    note = f"One run each: {first['subject']}, seed {first['seed']}, {first['steps']} steps of batch"
    note += f" {first['settings']['train_batch_size']}. By `benchmarks/compare_selective.py --set ...`."
    note += code_note(result["entries"])
    return table(header, rows) + "\n\n" + note


def selective_gradients(result):
    """benchmarks/results/selective_gradients.json, as `benchmarks/compare_selective.py --gradients` writes it."""
    names = {"bp_low": "BP-low", "zo_high": "ZO-high", "ratio": "ZO-high / BP-low, weight by weight"}
    rows = [
        [words, *(f"{x:.1e}" if x < 0.01 else f"{x:.2g}" for x in result["quantiles"][name])]
        for name, words in names.items()
    ]
    note = (
        f"Root mean square of each adapter weight's gradient over {result['batches']} batches ({result['subject']},"
        f" after {result['updates_before']} steps), quantiles over the {result['weights']} weights. Cosine of an"
        f" estimate with the gradient of the same batch: {result['cosine']:.4f} on average, where sqrt(n / D) is"
        f" {(result['num_perturbations'] / result['weights']) ** 0.5:.4f}. By `benchmarks/compare_selective.py"
        " --gradients`." + code_note([result])
    )
    return table(["gradient", "5 %", "median", "95 %"], rows) + "\n\n" + note


def selective_windows(result):
    """The windows of benchmarks/results/selective_gradients.json."""
    windows = result["windows"]
    header = [f"t = {t}" for t in windows["cosines"]]
    note = (
        "Cosine of the sum of the gradients of four windows that tile a picture with the picture's own gradient, at"
        f" {windows['subject'].replace('_', ' ')}, {windows['examples']} examples, adapters"
        f" {windows['spread']:g} (Gaussian) from their start. By `benchmarks/compare_selective.py --gradients`."
        + code_note([result])
    )
    return table(header, [[f"{cosine:.3f}" for cosine in windows["cosines"].values()]]) + "\n\n" + note
