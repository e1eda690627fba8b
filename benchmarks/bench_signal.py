"""How well do finite differences still see the loss? Every backend and activation precision against exact derivatives.

    OMP_NUM_THREADS=1 python benchmarks/bench_signal.py          # half an hour on one core; goes on where it was
    python benchmarks/bench_signal.py --learned demo/output      # also at the tokens that `make demo` has learned

On the trained demo base, forward differences (L(θ + μe) - L(θ)) / μ along Gaussian directions e, made as training
makes them, are compared with the directional derivatives that autograd gives for the unquantized float32 model. A
second comparison, with autograd through the same quantized weights in float32, leaves out what quantizing the weights
changes: what remains is rounding of the activations (small μ) and curvature (large μ). A cell is one example at one
timestep; a row of `benchmarks/results/signal.json` has the median and the worst cell of one backend, precision and μ.

Gauss-Newton's evidence is judged alike: K and y in the vocabulary's subspace, from differences over h, against
forward-mode autograd. A difference over a large h also has curvature in it, which the random signs of training take
out of the mean: so y is judged as the mean over both signs, too. K and y from exact derivatives (`tangents.stacked`)
are judged as well; for those alone:

    python benchmarks/bench_signal.py --mu --evidence_steps --output benchmarks/results/signal_tangents.json
"""

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks import common
from benchmarks.common import CACHE, DEMO, RESULTS
from personalization.files import sha256, write_json


# isort: split
import torch
from safetensors.torch import load_file
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

import train_zoodip_textual_inversion as zoodip
from personalization.data import examples, prompts
from personalization.methods import gauss_newton, tangents
from personalization.models import base_model


BASES = ("base", "base_eps")  # of demo/: the first predicts v, the second ε, as Stable Diffusion 1.5 does
SUBJECTS = DEMO / "subjects"


class Row(NamedTuple):
    """A model to measure: `load(base, device)`, of a folder of demo/, returns a `FrozenModel`."""

    backend: str
    activations: str
    load: Callable
    weights: str | None = None  # the quantization whose float32 autograd has the same weights; None: there is none
    tf32: bool = False
    differentiated: Callable | None = None  # loads one with exact derivatives, where that is another one


class Cell(NamedTuple):
    """A batch of one example at one timestep, and the points θ `[1, d]` by name at which to measure there."""

    batch: examples.Batch
    thetas: dict


def list_rows(cuda):
    """Everything that can be measured on this machine. The text encoder and the UNet may differ in dtype."""
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    precisions = {"float32": (f32, f32), "bfloat16": (bf16, bf16)}
    half = {"float16": (f16, f16)}  # on CPUs so slow that one row must do
    mixed = {"bfloat16, text float32": (bf16, f32)}
    choices = {"none": precisions, "int8": precisions | half | mixed, "quanto-int8": precisions, "nf4": precisions}
    if cuda:
        extra = half | {"tf32": (f32, f32), "float16, text float32": (f16, f32)}
        choices = {backend: chosen | extra for backend, chosen in choices.items()}
    rows = [
        Row(backend, activations, functools.partial(build, backend, *dtypes), backend, activations == "tf32")
        for backend, chosen in choices.items()
        for activations, dtypes in chosen.items()
    ]
    for activations, dtype in {"float32": f32, "bfloat16": bf16}.items():
        load = functools.partial(build, "int8", dtype, f32, engine="openvino")
        exact = functools.partial(load, more=EXACT)
        rows.append(Row("openvino int8", activations, load, "int8", differentiated=exact))
    rows.append(Row("openvino int8", "int8", build_int8, "int8"))
    return rows


CANDIDATES = "--num_perturbations 32 --max_candidates_per_forward 33"
EXACT = "--optimizer gauss_newton --max_candidates_per_forward 33 --mixed_precision no"


def script_args(base, subject, quantization="none", engine="torch", more=CANDIDATES):
    """The training script's settings for a demo subject, whose last word is its shape."""
    words = ["--pretrained_model_name_or_path", DEMO / base, "--train_data_dir", SUBJECTS / subject, "--quantization"]
    words += [quantization, "--placeholder_token", "<my-toy>", "--initializer_token", subject.split("_")[-1]]
    words += ["--quantized_cache_dir", "none", "--unet_backend", engine]
    return zoodip.parse_args([*map(str, words), *more.split()])


def build(quantization, dtype, text_dtype, folder, device, engine="torch", more=CANDIDATES):
    """A `FrozenModel` as the training script makes it, but for the dtypes, and with all words in its table."""
    args = script_args(
        folder, "striped_star", quantization, engine, more
    )  # any subject: only the model's settings are read
    base, placeholder, compute = zoodip.resolve_settings(args, device)
    text_encoder, unet, *_ = zoodip.load_networks(args, base, compute._replace(dtype=dtype))
    compute = compute._replace(dtype=text_dtype)
    if text_dtype != dtype:
        text_encoder, _ = zoodip.load_text_encoder(base, zoodip.BACKENDS[quantization], compute)
        unet.register_forward_pre_hook(
            lambda _, inputs: tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
        )
    words = torch.arange(placeholder.first_id)
    return zoodip.assemble_model(args, base, placeholder, words, text_encoder, unet, compute)[0]


def build_int8(folder, device):
    """The same with activations in INT8, calibrated on the pictures of one subject."""
    words = "--optimizer gauss_newton --openvino_precision int8"
    args = script_args(folder, "striped_star", "int8", "openvino", words)
    base, placeholder, compute = zoodip.resolve_settings(args, device)
    pictures = zoodip.read_pictures(args)
    captions = prompts.build_prompts(pictures, placeholder, base)
    directions = gauss_newton.choose_directions(args, base, placeholder, captions[0])
    model = zoodip.prepare(args, base, placeholder, compute, pictures, captions, directions).model
    networks = model.text_encoder, model.denoiser, compute
    return zoodip.assemble_model(args, base, placeholder, torch.arange(placeholder.first_id), *networks)[0]


def draw_cells(args, device):
    """One (image, caption) pair of each subject, noised to every timestep; the same for all rows."""
    generator = torch.Generator().manual_seed(args.seed)
    cells = []
    for subject in args.subjects:
        settings = script_args(args.base, subject)
        base, placeholder, compute = zoodip.resolve_settings(settings, torch.device("cpu"))
        pictures = zoodip.read_pictures(settings)
        captions = prompts.build_prompts(pictures, placeholder, base)
        concept, _ = examples.load_concept(pictures, captions, base, flip_probability=0.0, compute=compute)
        table = base_model.load_token_table(base)
        thetas = {"initial": table[placeholder.initializer_id].float()[None].to(device)}
        if args.learned:
            learned = load_file(args.learned / subject / "learned_embeds.safetensors", str(device))
            (thetas["learned"],) = learned.values()
        latents, ids, *_ = examples.draw_examples(concept, 1, generator)
        for t in args.timesteps:
            batch = examples.noise_batch(base.family, latents, ids, torch.tensor([t]), generator, base.scheduler)
            cells.append(Cell(batch.to(device), thetas))
    return cells


@contextlib.contextmanager
def tf32(enabled):
    """Allows or forbids TF32 in CUDA's float32 products; cuDNN's convolutions use it unless forbidden."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = enabled
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def errors_at(theta, batch, model):
    """The script's prediction errors `[M]` as a differentiable function of θ `[1, d]`; see `loss_at`."""
    return with_token(theta, model, lambda row: model.errors(row, batch)[0])


def loss_at(theta, batch, model):
    """The script's loss as a differentiable function of θ `[1, d]`."""
    return with_token(theta, model, lambda row: model.losses(row, batch)[0])


def with_token(theta, model, function):
    """`function` of a candidate, whose row a hook replaces by θ after the token table."""

    def put_in(_, inputs, output):
        return torch.where((inputs[0] == model.first_placeholder_id)[..., None], theta[0], output)

    hook = model.text_encoder.get_input_embeddings().register_forward_hook(put_in)
    try:
        row = torch.zeros((1, *theta.shape), device=theta.device)  # written to the table, and replaced by the hook
        return function(row)
    finally:
        hook.remove()


def exact_slopes(cells, directions, model):
    """Per θ name, per cell: the derivative along every direction, from one backward pass (float64 `[n]`, host)."""
    slopes = {}
    for cell in cells:
        for name, theta in cell.thetas.items():
            theta = theta.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(loss_at(theta, cell.batch, model), theta)
            product = torch.tensordot(directions.double(), gradient.double(), dims=2)
            slopes.setdefault(name, []).append(product.cpu())
    return slopes


def forward_mode_slopes(cell, directions, model):
    """Derivatives at the initial θ by forward-mode differentiation, one by one: a check on `exact_slopes`."""
    slopes = []
    for direction in directions:
        # Of the attention kernels only the plain one has a forward derivative.
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            theta = forward_ad.make_dual(cell.thetas["initial"], direction)
            loss = loss_at(theta, cell.batch, model)
            slopes.append(forward_ad.unpack_dual(loss).tangent.double().cpu())
    return torch.stack(slopes)


def difference_slopes(cells, name, mu, directions, model):
    """Per cell: forward differences from batched passes, as training makes them; nan where a loss is."""
    slopes = []
    for cell in cells:
        losses = functools.partial(model.losses, batch=cell.batch)
        slopes.append(zoodip.rge_slopes(losses, cell.thetas[name], directions, mu)[0].double().cpu())
    return slopes


def exact_evidence(cells, directions, model):
    """Per cell: K and y at the initial θ from derivatives of the whole prediction (float64, host)."""
    found = []
    for cell in cells:
        theta = cell.thetas["initial"]
        (row,), derivatives = theta[None], []
        for direction in directions:
            with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
                errors = errors_at(forward_ad.make_dual(row, direction), cell.batch, model)
                primal, tangent = forward_ad.unpack_dual(errors)
            derivatives.append(tangent.double().cpu())
        jacobian, error = torch.stack(derivatives), primal.double().cpu()
        found.append((jacobian @ jacobian.T / len(error), jacobian @ error / len(error)))
    return found


def measure_evidence(cells, directions, step, model, reference):
    """Median relative errors over cells of K, of y, and of y as the mean over both signs of the directions."""
    errors = {"matrix": [], "gradient": [], "gradient_both_signs": []}
    for cell, (exact_matrix, exact_gradient) in zip(cells, reference):
        error_fn, theta = functools.partial(model.errors, batch=cell.batch), cell.thetas["initial"]
        (matrix, plus), (_, minus) = (
            evidence_of(*gauss_newton.differences(error_fn, theta, sign * directions, step)) for sign in (1, -1)
        )
        pairs = (matrix, exact_matrix), (plus, exact_gradient), ((plus - minus) / 2, exact_gradient)
        for values, (found, exact) in zip(errors.values(), pairs):
            values.append(relative_error(found, exact))
    return {name: rounded(statistics.median(values)) for name, values in errors.items()}


def measure_tangents(cells, directions, model, reference):
    """Relative errors of K and of y from exact derivatives: the median over cells, and the largest."""
    errors = {"matrix": [], "gradient": []}
    for cell, exact in zip(cells, reference):
        found = evidence_of(*tangents.stacked(model, cell.thetas["initial"], directions, cell.batch))
        for values, pair in zip(errors.values(), zip(found, exact)):
            values.append(relative_error(*pair))
    medians = {name: rounded(statistics.median(values)) for name, values in errors.items()}
    return medians | {f"{name}_max": rounded(max(values)) for name, values in errors.items()}


def evidence_of(error, derivatives):
    """K and y (float64, host)."""
    return [part.double().cpu() for part in gauss_newton.gauss_newton_evidence(error, derivatives)[:2]]


def relative_error(found, exact):
    """‖found - exact‖ / ‖exact‖, infinite where it is no number."""
    value = ((found - exact).norm() / exact.norm()).item()
    return value if math.isfinite(value) else math.inf


def rounded(value):
    """To three digits; None: infinite."""
    return float(f"{value:.3g}") if math.isfinite(value) else None


def compare(measured, reference):
    """Correlation over the directions (median and least cell) and relative error (median); None: not to be had.

    Correlation forgives an error that all differences share, the rounding of L(θ) itself; the relative error does not.
    """
    if reference is None:
        return None
    correlations = [torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in zip(measured, reference)]
    errors = [((slopes - exact).norm() / exact.norm()).item() for slopes, exact in zip(measured, reference)]
    correlations = [r if math.isfinite(r) else 0.0 for r in correlations]  # constant or overflown: nothing is seen
    error = statistics.median(e if math.isfinite(e) else math.inf for e in errors)
    return {
        "correlation_median": round(statistics.median(correlations), 5),
        "correlation_min": round(min(correlations), 5),
        "relative_error_median": float(f"{error:.4g}") if math.isfinite(error) else None,
    }


def print_row(result):
    """One line of the table; `main` prints what the columns are."""
    print(f"{result['backend']:15}{result['activations']:24}{result['theta']:9}{result['mu']:7.0e}", end="")
    for figures in (result["exact"], result["own_weights"]):
        r, least, error = figures.values() if figures else (math.nan,) * 3
        print(f" |{r:8.3f}{least:8.3f}{math.nan if error is None else error:10.1%}", end="")
    print(flush=True)


def parse_args():
    backends = list(dict.fromkeys(row.backend for row in list_rows(cuda=True)))
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    kinds = list(dict.fromkeys(row.activations for row in list_rows(cuda=True)))
    subjects = ["striped_star", "dotted_circle", "twotone_moon"]
    add = parser.add_argument
    add("--base", choices=BASES, default="base_eps", help="Of demo/.")
    add("--backends", nargs="+", choices=backends, default=backends, help="Which weights to measure.")
    add("--activations", nargs="+", choices=kinds, default=kinds, help="Which activations to measure.")
    add("--subjects", nargs="+", default=subjects, help="Folders of demo/subjects; one (image, caption) of each.")
    add("--timesteps", nargs="+", type=int, default=[500, 700, 899], help="Timesteps of each example.")
    add("--mu", nargs="*", type=float, default=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2], help="Steps of the differences.")
    add(
        "--evidence_steps",
        nargs="*",
        type=float,
        default=[1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 2e-2, 5e-2, 0.15],
        help="Steps h of Gauss-Newton's differences.",
    )
    add("--directions", type=int, default=64, help="Gaussian directions, the same in every cell.")
    add("--learned", type=Path, help="Folder of SUBJECT/learned_embeds.safetensors: measure at these tokens, too.")
    add("--seed", type=int, default=0, help="Of examples, noise and directions.")
    add("--output", type=Path, help="The result. Default: in benchmarks/results, signal_eps.json or signal.json.")
    add("--cache_dir", type=Path, default=CACHE / "signal", help="Of finished rows.")
    args = parser.parse_args()
    args.output = args.output or RESULTS / f"signal{args.base.removeprefix('base')}.json"
    return args


def cache_of_rows(args):
    """The folder for rows of these settings on this base by this code."""
    choices = "backends", "activations", "output", "cache_dir"
    facts = {name: str(value) for name, value in vars(args).items() if name not in choices}
    folder = DEMO / args.base
    facts |= {path.relative_to(folder).as_posix(): sha256(path) for path in folder.glob("*/*.safetensors")}
    facts["code"] = common.source_hash("benchmarks/bench_signal.py", without=["benchmarks/common.py"])
    return args.cache_dir / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def main():
    args = parse_args()
    common.warn_if_busy()
    started = time.perf_counter()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    cells = draw_cells(args, device)
    shape = next(iter(cells[0].thetas.values())).shape
    generator = torch.Generator().manual_seed(args.seed + 1)
    directions = torch.randn((args.directions, *shape), generator=generator).to(device)

    @functools.cache
    def reference(quantization):
        """Exact slopes with these weights in float32; None where a backend has no autograd."""
        try:
            with tf32(False):
                model = build(quantization, torch.float32, torch.float32, args.base, device)
                return exact_slopes(cells, directions, model)
        except Exception as error:  # libraries refuse autograd each in its own way
            left_out[f"{quantization}, autograd"] = f"{type(error).__name__}: {error}"

    base = base_model.open_base(base_model.ModelSource(str(DEMO / args.base)))
    subspace = gauss_newton.vocabulary_directions(base_model.load_token_table(base), 32, 80)[:, None, :].to(device)

    results, evidence, by_tangents, left_out, cache = [], [], [], {}, cache_of_rows(args)
    cache.mkdir(parents=True, exist_ok=True)
    with tf32(False):
        model = build("none", torch.float32, torch.float32, args.base, device)
        check = forward_mode_slopes(cells[0], directions[:8], model)
        exact_matrices = exact_evidence(cells, subspace, model)
    exact = reference("none")["initial"][0][:8]
    deviation = float(f"{((check - exact).norm() / exact.norm()).item():.2g}")
    print(f"Forward-mode differentiation deviates from autograd by {deviation}.")
    print(f"{'r: median and least cell; error':55} |{'against exact':^26}|{'against own weights':^26}")
    for row in list_rows(cuda):
        if row.backend not in args.backends or row.activations not in args.activations:
            continue
        label = {"backend": row.backend, "activations": row.activations}
        finished = cache / f"{row.backend} {row.activations}.json".replace(" ", "_")
        if finished.is_file():
            found = json.loads(finished.read_text())
            results, evidence = results + found["rows"], evidence + found["evidence"]
            by_tangents += found["tangents"]
            continue
        own = reference(row.weights) if row.weights and args.mu else None
        of_row, evidence_of_row, tangents_of_row = [], [], []
        try:
            model = row.load(args.base, device)
            for name, mu in itertools.product(cells[0].thetas, args.mu):
                with tf32(row.tf32), torch.inference_mode():
                    slopes = difference_slopes(cells, name, mu, directions, model)
                result = {
                    "exact": compare(slopes, reference("none")[name]),
                    "own_weights": compare(slopes, own[name]) if own else None,
                }
                of_row.append({**label, "theta": name, "mu": mu, **result})
                print_row(of_row[-1])
            for step in args.evidence_steps:
                with tf32(row.tf32), torch.inference_mode():
                    found = measure_evidence(cells, subspace, step, model, exact_matrices)
                evidence_of_row.append({**label, "step": step, **found})
                print(evidence_of_row[-1], flush=True)
            if row.differentiated is not None:
                model = None
                model = row.differentiated(args.base, device)
            if row.activations != "int8":  # which has no graph of derivatives
                with tf32(row.tf32), torch.inference_mode():
                    found = measure_tangents(cells, subspace, model, exact_matrices)
                tangents_of_row.append({**label, **found})
                print(tangents_of_row[-1], flush=True)
            write_json(finished, {"rows": of_row, "evidence": evidence_of_row, "tangents": tangents_of_row})
            results, evidence = results + of_row, evidence + evidence_of_row
            by_tangents += tangents_of_row
        except Exception as error:  # not installed, or without kernels for this machine: the other rows go on
            left_out[", ".join(label.values())] = f"{type(error).__name__}: {error}"
        model = None
    for what, reason in left_out.items():
        print(f"Left out {what}: {reason}")
    settings = {key: value for key, value in vars(args).items() if key not in ("output", "cache_dir")}
    settings["learned"] = args.learned and common.public(str(args.learned))
    write_json(
        args.output,
        {
            **common.provenance(device=device.type),
            "configuration": {**settings, "base": f"demo/{args.base}", "cells": len(cells)},
            "forward_mode_deviation": deviation,
            "rows": results,
            "evidence": evidence,
            "tangents": by_tangents,
            "left_out": left_out,
            "seconds": round(time.perf_counter() - started, 1),
        },
    )
    print(f"Wrote {args.output} after {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
