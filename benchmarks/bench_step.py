"""How long does a training step take? The script's own, other ways to train the same token, and the floor below all.

    python benchmarks/bench_step.py --reduced                    # some minutes on two cores
    python benchmarks/bench_step.py --resolutions 256 512        # every row of this machine
    python benchmarks/bench_step.py --rows ours-int8 ours-openvino --num_perturbations 1 2 4 8
    python benchmarks/bench_step.py --processes 2                # data-parallel processes, on demo/base

Real architectures with random weights (`random_base`): the time of a step does not depend on what the weights are. A
machine's speed changes by the minute, so all rows of a configuration (resolution, n, batch) are in memory together and
take turns, in an order that rotates; times are compared within such a group only. Where memory does not hold all rows,
there are several groups, and the reference rows are measured anew in each.

Left out of every row: what happens once a run (loading, the VAE in our case) or once in dozens of steps (the SVD of
Subspace Gradient, about 20 ms every 128 steps; validation; saving).

Rows of `benchmarks/results/step_<device>.json` are keyed by `KEY`: measuring one again replaces it alone.
"""

import argparse
import contextlib
import functools
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks import common
from benchmarks.common import CACHE, DEMO, RESULTS, ROOT, as_words, key_of
from personalization.files import temporary_folder, write_json


# isort: split
import psutil
import torch
from accelerate import PartialState

import train_zoodip_textual_inversion as zoodip
from benchmarks import baselines, random_base
from personalization.data import examples, prompts
from personalization.models import families, memory
from personalization.models.base_model import ModelSource, empty_model, open_base


SUBJECT = DEMO / "subjects" / "striped_star"
KEY = ("architecture", "row", "resolution", "num_perturbations", "batch_size", "device")
PROCESS_KEY = ("architecture", "processes", "resolution", "num_perturbations", "batch_size", "device")
REFERENCES = ("official", "ours-int8", "ours-quanto")  # small models: they stay in memory for every group
FLOAT = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class OurStep:
    """The training script's step: its own chapters, called as its `main` calls them.

    Args:
        base: folder of the model.
        flags: the script's, beside those that `configure` sets: what computes, and in which precision.
        resolution, batch_size, num_perturbations: see `configure`.
        device: torch device, or its name.
        cache_dir: `--quantized_cache_dir`.
    """

    def __init__(
        self,
        base,
        flags=(),
        resolution=512,
        batch_size=1,
        num_perturbations=2,
        device="cpu",
        cache_dir=CACHE / "quantized",
    ):
        self.base_name, self.flags, self.device, self.cache_dir = base, list(flags), torch.device(device), cache_dir
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
        self.layers_dir = temporary_folder(cache_dir)  # of --low_vram
        self.model = self.made_for = None
        self.configure(resolution, batch_size, num_perturbations)

    def configure(self, resolution, batch_size, num_perturbations):
        """Starts training anew with these settings; the networks stay (OpenVINO's UNet is made for one resolution)."""
        words = ["--pretrained_model_name_or_path", self.base_name, "--train_data_dir", SUBJECT]
        words += ["--placeholder_token", "<my-toy>", "--initializer_token", "star", "--report_to", "none"]
        words += ["--resolution", resolution, "--train_batch_size", batch_size]
        words += ["--quantized_cache_dir", self.cache_dir, *self.flags]
        # Gauss-Newton looks along one direction more than its subspace has.
        subspace = ["--gn_subspace_dimension", num_perturbations - 1]
        words += subspace if "gauss_newton" in self.flags else ["--num_perturbations", num_perturbations]
        self.num_perturbations = num_perturbations
        self.args = args = zoodip.parse_args([str(word) for word in words])
        base, placeholder, compute = zoodip.resolve_settings(args, self.device)
        self.dtype = compute.dtype
        if self.model is None or args.unet_backend == "openvino" and self.made_for != resolution:
            self.model = None  # the old networks leave before the new ones come
            text_encoder, unet, *_ = zoodip.load_networks(args, base, compute, self.layers_dir)
            self.made_for = resolution
        else:
            text_encoder, unet = self.model.text_encoder, self.model.denoiser
            if args.torch_compile:
                torch.compiler.reset()  # shapes are static, and after eight of them it would no longer compile
        pictures = zoodip.read_pictures(args)
        captions = prompts.build_prompts(pictures, placeholder, base, args.learnable_property)
        self.concept = random_concept(args, base, captions)
        self.model, initial = zoodip.assemble_model(
            args, base, placeholder, self.concept.prompt_ids, text_encoder, unet, compute
        )
        found = zoodip.OPTIMIZERS[args.optimizer].look_ahead(args, base, placeholder, self.concept.prompt_ids)
        self.learner, self.sampling = zoodip.start_learner(args, initial, found), zoodip.choose_sampling(args)
        self.initial = self.learner.theta.clone()

    def prepare(self):
        """What must be set before a step, as several rows share a process; its time does not count."""
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.args.allow_tf32

    def step(self):
        """One step; returns the loss, on the device."""
        return zoodip.train_step(self.learner, self.model, self.concept, self.sampling)

    @torch.inference_mode()
    def fixed_losses(self, scale=1e-3):
        """Losses `[n + 1]` of a batch and candidates that are the same for every `OurStep` of a configuration."""
        generator = torch.Generator().manual_seed(1)
        batch = zoodip.draw_batch(self.concept, self.sampling, self.model.scheduler, generator)
        directions = torch.randn(self.num_perturbations, *self.initial.shape, generator=generator)
        candidates = torch.cat([self.initial[None], self.initial + scale * directions.to(self.device)])
        return self.model.losses(candidates, batch.to(self.device)).cpu()


def random_concept(args, base, captions):
    """The `Concept` of the subject with random latents in place of encoded pictures; scaled they are about N(0, 1)."""
    prompt_ids, prompts_of_image = captions
    size, channels = args.resolution // base.vae_factor, base.vae_config["latent_channels"]
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(2, len(prompts_of_image), channels, size, size, generator=generator)
    mean /= base.vae_config["scaling_factor"]
    moments = torch.cat([mean, torch.full_like(mean, -10.0)], dim=2)
    size_ids = None
    if base.family.crops:
        side = args.resolution
        size_ids = torch.tensor([side, side, 0, 0, side, side]).float().expand(2, len(prompts_of_image), 6)
    of_family = base.family, base.vae_config
    return examples.Concept(moments, args.flip_probability, *of_family, prompt_ids, prompts_of_image, size_ids)


class Baseline:
    """A class of `baselines` as a row: the models stay, the loop around them is made anew for a configuration.

    Args:
        kind: "official", "ti" or "floor".
        models: `baselines.Models` with the placeholder's row as the last of the token table; rows may share them.
        dtype: of the activations.
        device: torch device.
        checkpointing: gradient checkpointing, for "ti".
        compiled: torch.compile of the UNet, for "official".
    """

    def __init__(self, kind, models, dtype, device, checkpointing=False, compiled=False):
        self.kind, self.models, self.dtype, self.device = kind, models, dtype, device
        self.checkpointing, self.compiled = checkpointing, compiled
        self.loop = None

    def configure(self, resolution, batch_size, num_perturbations):
        self.loop = None  # the old optimizer leaves before the new one comes
        where = {"device": self.device, "dtype": self.dtype, "batch_size": batch_size}
        last = baselines.text_encoders(self.models)[0].get_input_embeddings().num_embeddings - 1
        if self.kind == "official":
            where |= {"num_perturbations": num_perturbations, "placeholder_id": last, "torch_compile": self.compiled}
            self.loop = baselines.OfficialLoop(self.models, resolution, **where)
        elif self.kind == "ti":
            self.loop = baselines.GradientTextualInversion(self.models, resolution, placeholder_id=last, **where)
        else:
            latent = resolution // 2 ** (len(self.models.vae.config.block_out_channels) - 1)
            where |= {"num_perturbations": num_perturbations, "latent": latent}
            self.loop = baselines.BareForwards(self.models.unet, **where)

    def prepare(self):
        """PyTorch's own TF32 settings, and checkpointing as this row has it."""
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True
        unet, text_encoder = self.models.unet, self.models.text_encoder
        if self.kind == "floor":  # it is to be the fastest that plain PyTorch does
            unet.eval()
            if self.device.type == "cuda":
                self.loop.inputs["sample"] = self.loop.inputs["sample"].to(memory_format=torch.channels_last)
        elif self.kind == "ti":
            unet.train(self.checkpointing)
            if self.checkpointing:
                unet.enable_gradient_checkpointing()
                text_encoder.gradient_checkpointing_enable()
            else:
                unet.disable_gradient_checkpointing()
                text_encoder.gradient_checkpointing_disable()

    def step(self):
        return self.loop.step()


class Row(NamedTuple):
    """What to measure: `flags` of the script (ours) or a kind of `Baseline`, and where that runs by default."""

    defaults: tuple = ()  # devices on whose default list it is
    flags: str | None = None
    kind: str | None = None
    precision: str | None = None
    checkpointing: bool = False
    compiled: bool = False
    # Bytes in memory for every parameter of the UNet, other models included.
    size: float = 1.2
    note: str | None = None


BOTH = ("cpu", "cuda")
ROWS = {
    "ours-int8": Row(BOTH, ""),
    "ours-int8-fp32": Row(("cuda",), "--mixed_precision no"),
    "ours-int8-bf16": Row((), "--mixed_precision bf16"),
    "ours-none": Row(BOTH, "--quantization none", size=4.5),
    "ours-none-fp32": Row(("cuda",), "--quantization none --mixed_precision no", size=4.5),
    "ours-nf4": Row(BOTH, "--quantization nf4"),
    "ours-quanto": Row(BOTH, "--quantization quanto-int8 --mixed_precision no"),
    "ours-quanto-fp16": Row(("cuda",), "--quantization quanto-int8 --mixed_precision fp16"),
    "ours-openvino": Row(("cpu",), "--unet_backend openvino", size=5.3),
    "ours-openvino-bf16": Row(
        ("cpu",), "--unet_backend openvino --mixed_precision bf16", size=5.3, note="for pictures only, not training"
    ),
    "ours-low-vram": Row(BOTH, "--low_vram", size=0.3),
    "ours-compile": Row(("cuda",), "--torch_compile", note="compiling, at the first step, is not counted"),
    **{
        f"gauss-newton{suffix}{way}": Row((), f"--optimizer gauss_newton --mixed_precision {precision}{step}")
        for suffix, precision, scale in (("", "no", "3e-4"), ("-bf16", "bf16", "5e-2"))
        for way, step in (("", ""), ("-differences", f" --perturbation_scale {scale}"))
    },
    **{
        f"gauss-newton-openvino{way}": Row(
            (), f"--optimizer gauss_newton --unet_backend openvino --mixed_precision no{step}", size=5.3
        )
        for way, step in (("", ""), ("-differences", " --perturbation_scale 3e-4"))
    },
    "official": Row(BOTH, kind="official", precision="fp32", size=1.6),
    "official-compiled": Row((), kind="official", precision="fp32", compiled=True, size=1.6),
    "official-fp16": Row(("cuda",), kind="official", precision="fp16", size=1.6),
    "ti-fp32": Row(BOTH, kind="ti", precision="fp32", size=6.0),
    "ti-fp32-checkpointing": Row(BOTH, kind="ti", precision="fp32", checkpointing=True, size=6.0),
    "ti-bf16": Row(BOTH, kind="ti", precision="bf16", size=4.0),
    "ti-bf16-checkpointing": Row(BOTH, kind="ti", precision="bf16", checkpointing=True, size=4.0),
    "floor-fp32": Row(BOTH, kind="floor", precision="fp32", size=5.0),
    "floor-bf16": Row((), kind="floor", precision="bf16", size=2.5),
    "floor-fp16": Row(("cuda",), kind="floor", precision="fp16", size=2.5),
}
REDUCED_ROWS = "ours-int8 ours-openvino ours-quanto official ti-fp32 ti-fp32-checkpointing floor-fp32".split()

# What backpropagation without checkpointing keeps, per entry of the latent's plane and byte of an activation: measured
# on SD 1.5. A CPU that runs out of memory kills the process, so it is not tried.
KEPT_PER_PIXEL = 136_000


unet_flop = functools.cache(baselines.unet_flops)
matmul_peak = functools.cache(baselines.matmul_peak)


class Bench:
    """Builds rows, lets them take turns and keeps the results. `args` are those of `parse_args`."""

    def __init__(self, args):
        self.args, self.device = args, torch.device(args.device)
        demo = args.architecture == "demo"
        self.base = DEMO / "base" if demo else random_base.build(args.architecture, CACHE / args.architecture)
        base = open_base(ModelSource(str(self.base)), accepted=families.FAMILIES.values())
        self.factor = base.vae_factor
        self.parameters = sum(p.numel() for p in empty_model(base, "unet").parameters())
        self.measured = set()  # keys of this run: a reference row counts with its first group

    def source(self, name):
        """Which models a row uses. On CUDA the floor's UNet has another memory layout than the others have."""
        row = ROWS[name]
        if row.kind is None:
            return name
        alone = row.kind == "official" or row.kind == "floor" and self.device.type == "cuda"
        return f"{row.kind if alone else 'unquantized'} {row.precision}{' compiled' * row.compiled}"

    def groups(self):
        """Lists of row names whose models fit in `--memory_gb` together, the reference rows in each."""
        references = [name for name in self.args.rows if name in REFERENCES]
        sources, sizes = {}, {}
        for name in self.args.rows:
            sources.setdefault(self.source(name), []).append(name)
            size = ROWS[name].size * self.parameters
            sizes[self.source(name)] = max(size, sizes.get(self.source(name), 0))
        kept = sum(sizes.pop(self.source(name)) for name in references)
        groups, used = [list(references)], kept
        for source, size in sizes.items():
            if used + size > self.args.memory_gb * 1e9 and len(groups[-1]) > len(references):
                groups.append(list(references))
                used = kept
            groups[-1] += sources[source]
            used += size
        return groups

    def load(self, names, built):
        """Fills `built`, row name -> row at work, with what is missing; returns the failures, name -> reason."""
        failures, models = {}, {}
        resolution, batch_size, n = self.args.resolutions[0], self.args.batch_sizes[0], self.args.num_perturbations[0]
        for name in [name for name in names if name not in built]:
            row, source = ROWS[name], self.source(name)
            started = time.perf_counter()
            try:
                if row.kind is None:
                    built[name] = OurStep(
                        self.base, row.flags.split(), resolution, batch_size, n, self.device, self.args.cache_dir
                    )
                else:
                    if source not in models:
                        models[source] = self.load_baseline(row)
                    dtype = FLOAT[row.precision]
                    how = row.checkpointing, row.compiled
                    built[name] = Baseline(row.kind, models[source], dtype, self.device, *how)
            except Exception as error:  # not installed, or not made for this machine: the other rows go on
                failures[name] = f"{type(error).__name__}: {error}"
            print(f"  {name}: built in {time.perf_counter() - started:.0f} s", flush=True)
            memory.release_freed_memory()
        return failures

    def load_baseline(self, row):
        """Models with one row more in the token table: making a loop for them again adds no other."""
        official = row.kind == "official"
        text_dtype = None if official else torch.float32  # as diffusers' textual inversion keeps it
        models = baselines.load_models(self.base, self.device, FLOAT[row.precision], text_dtype, quanto=official)
        baselines.add_row(models)
        if row.kind == "floor" and self.device.type == "cuda":
            models.unet.to(memory_format=torch.channels_last)
        return models

    def timed(self, step, steps):
        """Seconds per step of `steps` steps, the device's work included."""
        step.prepare()
        self.wait()
        clock = time.process_time if self.args.cpu_seconds else time.perf_counter
        started = clock()
        for _ in range(steps):
            step.step()
        self.wait()
        return (clock() - started) / steps

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def too_large(self, name, resolution, batch_size):
        """Why a row must not be tried on a CPU, or None."""
        row = ROWS[name]
        if row.kind != "ti" or row.checkpointing or self.device.type != "cpu" or self.args.architecture == "demo":
            return None
        need = KEPT_PER_PIXEL * batch_size * (resolution // self.factor) ** 2 * FLOAT[row.precision].itemsize
        free = psutil.virtual_memory().available
        return f"needs about {need / 1e9:.0f} GB more, {free / 1e9:.0f} GB are free" if need > 0.9 * free else None

    def measure(self, names, built, configuration):
        """One group in one configuration.

        Returns:
            Seconds per step of every round by row name (the first step, which warms up, in a second dict), and the
            failures, name -> reason.
        """
        resolution, batch_size, n = configuration
        seconds, first, failures = {}, {}, {}

        def attempt(name, action, *arguments):
            try:
                return action(*arguments)
            except Exception as error:  # out of memory, say: the other rows go on
                seconds.pop(name, None)
                failures[name] = f"{type(error).__name__}: {error}"
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()

        for name in names:
            if reason := self.too_large(name, resolution, batch_size):
                failures[name] = reason
                continue
            seconds[name] = []
            attempt(name, built[name].configure, resolution, batch_size, n)
        for name in list(seconds):
            first[name] = attempt(name, self.timed, built[name], 1)
        for name in list(seconds):
            if self.args.warmup > 1:
                attempt(name, self.timed, built[name], self.args.warmup - 1)
        memory.release_freed_memory()
        for i in range(self.args.rounds):
            order = list(seconds)
            shift = i % max(1, len(order))
            for name in order[shift:] + order[:shift]:
                taken = attempt(name, self.timed, built[name], self.args.steps)
                if taken is not None:
                    seconds[name].append(taken)
        return seconds, first, failures

    def agreement(self, names, built):
        """By row: the largest relative difference of its losses from ours-int8's, where the weights are the same."""
        same = [name for name in names if ROWS[name].kind is None and built[name].args.quantization == "int8"]
        if "ours-int8" not in same:
            return {}
        built["ours-int8"].prepare()
        exact = built["ours-int8"].fixed_losses()
        others = {name: built[name].fixed_losses() for name in same if name != "ours-int8"}
        return {name: float(f"{((x - exact).abs() / exact).max().item():.3g}") for name, x in others.items()}

    def results(self, seconds, first, built, configuration):
        """The JSON rows of one group in one configuration."""
        resolution, batch_size, n = configuration
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        agreement = self.agreement(list(seconds), built)
        rows = []
        for name, values in seconds.items():
            row, step, median = ROWS[name], built[name], medians[name]
            zeroth_order = row.kind != "ti"
            examples = (n + 1 if zeroth_order else 1) * batch_size
            floor = None
            if zeroth_order:  # backward passes have another count
                flop = examples * unet_flop(self.base / "unet" / "config.json", 1, resolution // self.factor)
                rate = matmul_peak(self.device, step.dtype)
                floor = {
                    "unet_tflop": significant(flop / 1e12),
                    "matmul_gflop_per_second": significant(rate / 1e9),
                    "seconds": significant(flop / rate),
                    "ratio": significant(median * rate / flop),
                }
            rows.append(
                {
                    **self.key(name, configuration),
                    "flags": row.flags,
                    "activations": str(step.dtype).removeprefix("torch."),
                    "note": row.note,
                    "seconds_per_step": {
                        "median": significant(median),
                        "min": significant(min(values)),
                        "max": significant(max(values)),
                        "rounds": [significant(value) for value in values],
                        "first": significant(first[name]),
                    },
                    "steps_per_second": significant(1 / median),
                    "seconds_per_direction": significant(median / n) if zeroth_order else None,
                    "seconds_per_example": significant(median / examples),
                    "examples_per_step": examples,
                    "ratio_to": {
                        other: significant(median / value)
                        for other, value in medians.items()
                        if other != name and (other in REFERENCES or ROWS[other].kind == "floor")
                    },
                    "cpu_seconds": self.args.cpu_seconds,
                    "arithmetic_floor": floor,
                    "loss_deviation_from_ours_int8": agreement.get(name),
                    "interleaved_with": [other for other in seconds if other != name],
                    "rounds": self.args.rounds,
                    "steps_per_round": self.args.steps,
                    **provenance(self.device),
                }
            )
        return rows

    def key(self, name, configuration):
        return dict(zip(KEY, (self.args.architecture, name, *self.order(configuration), self.device.type)))

    def order(self, configuration):
        resolution, batch_size, n = configuration
        return resolution, n, batch_size

    def run(self):
        built = {}
        for names in self.groups():
            for name in [name for name in built if name not in names]:
                del built[name]
            memory.release_freed_memory()
            print(f"{self.args.architecture} on {self.device}: {', '.join(names)}", flush=True)
            unbuilt = self.load(names, built)
            for resolution, batch_size, n in itertools.product(
                self.args.resolutions, self.args.batch_sizes, self.args.num_perturbations
            ):
                configuration = resolution, batch_size, n
                present = [name for name in names if name in built]
                seconds, first, failures = self.measure(present, built, configuration)
                rows = self.results(seconds, first, built, configuration)
                print(f"{resolution} px, n = {n}, batch {batch_size}")
                print_rows(rows)
                left_out = []
                for name, reason in (unbuilt | failures).items():
                    print(f"  left out {name}: {reason}", flush=True)
                    left_out.append({**self.key(name, configuration), "reason": reason, **provenance(self.device)})
                new = [row for row in rows if key_of(row, KEY) not in self.measured]
                self.measured.update(key_of(row, KEY) for row in new)
                merge(self.args.output, rows=new, left_out=left_out)


def significant(value, digits=4):
    return float(f"{value:.{digits}g}")


def print_rows(rows):
    """A table for the terminal: seconds per step, and in how many of the reference's steps it would be done."""
    for row in rows:
        times, ratios = row["seconds_per_step"], row["ratio_to"]
        floor = row["arithmetic_floor"]
        line = f"  {row['row']:24}{times['median']:9.3f} s ({times['min']:.3f} to {times['max']:.3f})"
        line += "".join(f"{ratios[name]:8.3f} x {name}" for name in ("official", "ours-quanto") if name in ratios)
        line += f"{floor['ratio']:8.2f} x arithmetic" if floor else ""
        if row["loss_deviation_from_ours_int8"] is not None:
            line += f"  losses within {row['loss_deviation_from_ours_int8']:.1e}"
        print(line, flush=True)


def provenance(device):
    """What an entry was measured with; the rows of this file name the processor and the GPU apart."""
    found = common.provenance(device=device.type)
    hardware = {"cpu": common.cpu_name(), "cpu_count": found["hardware"]["cores"]}
    hardware["threads"] = found["hardware"]["threads"]
    if device.type == "cuda":
        hardware["gpu"] = found["hardware"]["name"]
    return {**found, "hardware": hardware}


def merge(path, rows=(), left_out=(), processes=()):
    """Puts new entries into the result: each replaces the one with its key, all others stay."""
    content = common.read(path)

    def merged(old, new, key):
        together = {key_of(entry, key): entry for entry in [*old, *new]}
        return [together[k] for k in sorted(together)]

    done = {key_of(row, KEY) for row in rows}
    failed = [entry for entry in content.get("left_out", []) if key_of(entry, KEY) not in done]
    write_json(
        path,
        {
            "rows": merged(content.get("rows", []), rows, KEY),
            "left_out": merged(failed, left_out, KEY),
            "processes": merged(content.get("processes", []), processes, PROCESS_KEY),
        },
    )


def scale_processes(args):
    """The real script on demo/base in 1, 2, 4, ... data-parallel processes of one thread; they take turns, too."""
    counts = [2**i for i in range(args.processes.bit_length()) if 2**i <= args.processes]
    resolution, n, batch_size = args.resolutions[0], args.num_perturbations[0], args.batch_sizes[0]
    figures = {count: [] for count in counts}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    flags = {
        "pretrained_model_name_or_path": DEMO / "base",
        "train_data_dir": SUBJECT,
        "placeholder_token": "<my-toy>",
        "initializer_token": "star",
        "report_to": "none",
        "max_train_steps": args.process_steps,
        "logging_steps": args.process_steps,
        "num_validation_samples": 0,
        "quantized_cache_dir": args.cache_dir,
        "resolution": resolution,
        "num_perturbations": n,
        "train_batch_size": batch_size,
    }
    for i in range(args.rounds):
        for count in counts[i % len(counts) :] + counts[: i % len(counts)]:
            with tempfile.TemporaryDirectory() as folder:
                command = [*launcher, count, ROOT / "train_zoodip_textual_inversion.py"]
                command += as_words({**flags, "output_dir": folder})
                common.run(command, ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
                figures[count].append(json.loads((Path(folder) / "zoodip_config.json").read_text())["figures"])
            print(f"  {count} processes: {figures[count][-1]['steps_per_second']} steps/s", flush=True)
    entries, alone = [], None
    for count, measured in figures.items():
        rates = [run["steps_per_second"] for run in measured]
        passes = statistics.median(rates) * measured[0]["forward_passes"] / measured[0]["steps"]
        alone = alone or passes
        source = provenance(torch.device("cpu"))
        source["hardware"]["threads"] = 1  # of each process
        entries.append(
            {
                **dict(zip(PROCESS_KEY, ("demo", count, resolution, n, batch_size, "cpu"))),
                "steps": args.process_steps,
                "steps_per_second": {"median": statistics.median(rates), "min": min(rates), "max": max(rates)},
                "forward_passes_per_second": significant(passes),
                "efficiency": significant(passes / (count * alone)),
                "rounds": args.rounds,
                **source,
            }
        )
        print(f"{count} processes: {passes:.1f} forward passes/s, efficiency {entries[-1]['efficiency']:.0%}")
    merge(args.output, processes=entries)


def parse_args(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="Rows: " + ", ".join(ROWS))
    add = parser.add_argument
    add(
        "--architecture",
        choices=["sd15", "sd21", "sdxl", "demo"],
        help="Default: sd15; demo is demo/base itself, quick.",
    )
    add("--rows", nargs="+", choices=ROWS, metavar="ROW", help="What to measure. Default: what suits the device.")
    add("--resolutions", nargs="+", type=int, help="Default: 256 on a CPU, 512 on CUDA, 64 for demo.")
    add("--num_perturbations", nargs="+", type=int, default=[2], help="n, each. Default: 2.")
    add("--batch_sizes", nargs="+", type=int, default=[1], help="Default: 1.")
    add("--rounds", type=int, help="Measurements of each row. Default: 3.")
    add("--steps", type=int, help="Steps of one measurement. Default: 1 on a CPU, 10 on CUDA.")
    add("--warmup", type=int, help="Steps before. Default: 1 on a CPU, 3 on CUDA (compiled graphs are recorded late).")
    add("--device", choices=["cpu", "cuda"], help="Default: cuda where there is one.")
    add(
        "--cpu_seconds",
        action="store_true",
        help="Take the process's CPU time instead of the clock's, on a machine with other work; with one thread only.",
    )
    add("--memory_gb", type=float, help="For models at one time. Default: 65%% of what is free now.")
    add("--reduced", action="store_true", help="The short comparison on a CPU: SD 1.5, 256 px, n = 2, 2 rounds.")
    add(
        "--processes", type=int, help="Measure only this: data-parallel runs of the script in up to so many processes."
    )
    add("--process_steps", type=int, default=60, help="Steps of each such run. Default: 60.")
    add("--cache_dir", type=Path, default=CACHE / "quantized", help="The script's --quantized_cache_dir.")
    add("--output", type=Path, help="The result. Default: benchmarks/results/step_<device>.json.")
    args = parser.parse_args(words)
    if args.cpu_seconds and torch.get_num_threads() > 1:
        parser.error("--cpu_seconds counts all threads together: set OMP_NUM_THREADS=1.")
    if args.processes:
        args.architecture, args.device = "demo", "cpu"
    if args.reduced:
        args.rows, args.rounds = args.rows or REDUCED_ROWS, args.rounds or 2
        args.device = args.device or "cpu"
    args.architecture = args.architecture or "sd15"
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cuda = args.device == "cuda"
    args.rows = list(dict.fromkeys(args.rows or [name for name, row in ROWS.items() if args.device in row.defaults]))
    args.resolutions = args.resolutions or [64 if args.architecture == "demo" else 512 if cuda else 256]
    args.rounds, args.steps = args.rounds or 3, args.steps or (10 if cuda else 1)
    args.warmup = args.warmup or (3 if cuda else 1)
    free = torch.cuda.mem_get_info()[0] if cuda else psutil.virtual_memory().available
    args.memory_gb = args.memory_gb or 0.65 * free / 1e9
    args.output = args.output or RESULTS / f"step_{args.device}.json"
    return args


def main(words=None):
    args = parse_args(words)
    PartialState()  # what the package's warnings want, such as the one about pictures far smaller than the resolution
    common.warn_if_busy()
    started = time.perf_counter()
    if args.processes:
        scale_processes(args)
    else:
        Bench(args).run()
    print(f"Wrote {args.output} after {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):  # what was measured is written
        main()
