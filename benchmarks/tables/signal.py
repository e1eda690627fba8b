"""How well finite differences see the loss, and Gauss-Newton its evidence."""

from benchmarks.tables.markdown import PREDICTS, code_note, command_on, table


def model_of(result):
    return result["configuration"]["base"].removeprefix("demo/")


def base_of(result):
    """The base of a result, and what it predicts."""
    return f"`demo/{model_of(result)}`, which predicts {PREDICTS[model_of(result)]}"


def signal(result):
    """benchmarks/results/signal*.json, as `benchmarks/bench_signal.py` writes it."""
    steps = sorted({row["mu"] for row in result["rows"]})
    cells = {}
    for row in result["rows"]:
        exact = row["exact"]
        error = "–" if exact["relative_error_median"] is None else f"{exact['relative_error_median']:.0%}"
        shown = f"{exact['correlation_median']:.3f} ({exact['correlation_min']:.2f}), {error}"
        bold = f"**{shown}**" if exact["correlation_median"] >= 0.9 else shown
        cells.setdefault((row["backend"], row["activations"]), {})[row["mu"]] = bold
    rows = [[*name, *(by_step.get(mu, "") for mu in steps)] for name, by_step in cells.items()]
    configuration, hardware = result["configuration"], result["hardware"]
    note = (
        f"Correlation, median (and least) over {configuration['cells']} cells (example x timestep), and median"
        f" relative error of {configuration['directions']} directional derivatives by forward differences against"
        f" float32 autograd of the unquantized model; bold: median at least 0.9. Base: {base_of(result)}. By"
        f" `{command_on(result, model_of(result))}` on {hardware['name']}, torch {result['versions']['torch']},"
        f" {result['seconds']:.0f} s.{code_note([result])}"
    )
    return table(["weights", "activations", *(f"μ = {mu:g}" for mu in steps)], rows) + "\n\n" + note


def evidence(result):
    """benchmarks/results/signal.json: what `benchmarks/bench_signal.py` says of Gauss-Newton's K and y."""
    steps = sorted({row["step"] for row in result["evidence"]})
    cells = {}
    for row in result["evidence"]:
        names = ("matrix", "gradient", "gradient_both_signs")
        errors = [row[name] for name in names]
        shown = ["–" if error is None else f"{error:.1%}" if error < 10 else "> 1000%" for error in errors]
        cells.setdefault((row["backend"], row["activations"]), {})[row["step"]] = " / ".join(shown)
    rows = [[*name, *(by_step.get(step, "") for step in steps)] for name, by_step in cells.items()]
    note = (
        f"Relative error of K / of y / of y as the mean over both signs, medians over"
        f" {result['configuration']['cells']} cells (example x timestep), against forward-mode autograd of the"
        f" unquantized float32 model, in the vocabulary's subspace of 32 directions. Base: {base_of(result)}. By"
        f" `{command_on(result, model_of(result))}` on {result['hardware']['name']}.{code_note([result])}"
    )
    return table(["weights", "activations", *(f"h = {step:g}" for step in steps)], rows) + "\n\n" + note


def tangents(result):
    """benchmarks/results/signal_tangents.json and signal_eps.json: Gauss-Newton's K and y from exact derivatives."""
    names = ("matrix", "matrix_max", "gradient", "gradient_max")
    rows = [
        [row["backend"], row["activations"], *("–" if row[name] is None else f"{row[name]:.2%}" for name in names)]
        for row in result["tangents"]
    ]
    note = (
        f"Relative error, median and largest of {result['configuration']['cells']} cells, against the same as above."
        f" Base: {base_of(result)}. By `{command_on(result, model_of(result))}` on {result['hardware']['name']}, torch"
        f" {result['versions']['torch']}.{code_note([result])}"
    )
    heads = ["weights", "activations", "K", "at most", "y", "at most"]
    return table(heads, rows) + "\n\n" + note
