"""The command lines that must work on CUDA, and what each has to leave behind."""

import json
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file


REPO = Path(__file__).resolve().parents[2]
SCRIPT = REPO / "train_zoodip_textual_inversion.py"
TOKEN = "<my-toy>"


class Case(NamedTuple):
    """A command line (or two in one folder) and its outcome.

    Attributes:
        name: what the table shows.
        flags: beside those of `BASICS`; True is a bare flag.
        then: what a second run in the same folder changes; None: there is none.
        writes: files beside the embedding and its config.
        says: words that the last run must print.
        stops_early: it ends before `--max_train_steps`.
        needs: what the pretended device cannot do; "" where it can.
    """

    name: str
    flags: dict
    then: dict | None = None
    writes: tuple = ()
    says: str = ""
    stops_early: bool = False
    needs: str = ""


BASICS = {
    "--pretrained_model_name_or_path": REPO / "demo" / "base",
    "--train_data_dir": next(iter(sorted((REPO / "demo" / "subjects").glob("*/metadata.jsonl"))), Path()).parent,
    "--placeholder_token": TOKEN,
    "--initializer_token": "star",
    "--max_train_steps": 3,
    "--num_validation_samples": 3,
    "--report_to": "none",
}
IMAGES = {"--validation_prompt": "a photo of {}", "--num_validation_images": 2, "--num_inference_steps": 3}
RISING_LOSS = {"--learning_rate": 5.0, "--adam_epsilon": 1e-8, "--max_train_steps": 20, "--validation_steps": 1}
SUBSPACE = {"--sg_window": 3, "--sg_threshold": 0.6}  # a window of 3 has two directions; this much removes the second
GAUSS_NEWTON = {"--optimizer": "gauss_newton", "--gn_subspace_dimension": 4}

MATRIX = (
    Case("int8", {}),
    Case("quanto-int8", {"--quantization": "quanto-int8"}),
    Case("no quantization", {"--quantization": "none"}),
    Case("rge, 3 vectors, subspace", SUBSPACE | {"--num_vectors": 3, "--max_train_steps": 5}),
    Case("spsa, 3 vectors", {"--num_vectors": 3, "--gradient_estimator": "spsa"}),
    Case("gauss_newton, left subspace", GAUSS_NEWTON | {"--gn_subspace_steps": 2}),
    Case(
        "gauss_newton, bf16, 2 vectors",
        GAUSS_NEWTON | {"--mixed_precision": "bf16", "--num_vectors": 2, "--gradient_accumulation_steps": 2},
    ),
    Case(
        "bf16, accumulation, batches of 2",
        {"--mixed_precision": "bf16", "--gradient_accumulation_steps": 2, "--train_batch_size": 2},
    ),
    Case(
        "float32, split candidates",
        {"--mixed_precision": "no", "--num_perturbations": 4, "--max_candidates_per_forward": 2},
    ),
    Case(
        "full pipeline, .pt",
        {"--save_as_full_pipeline": True, "--save_a1111": True},
        writes=("pipeline/model_index.json", f"{TOKEN.strip('<>')}.pt"),
    ),
    Case("no cache", {"--quantized_cache_dir": "none"}),
    Case(
        "resume",
        SUBSPACE | {"--checkpointing_steps": 4, "--max_train_steps": 6, "--lr_scheduler": "cosine"},
        then={"--resume_from_checkpoint": "latest"},
        writes=("checkpoint-4/state.pt",),
        says="Resumed from",
    ),
    Case("early stopping", RISING_LOSS | {"--early_stopping_patience": 2}, stops_early=True),
    Case(
        "images, tensorboard",
        IMAGES | {"--report_to": "tensorboard"},
        writes=("samples/image_1.png", "validation/step-000003.png"),
    ),
    Case("memory estimate", {"--estimate_memory": True}, says="Predicted peak on cuda"),
    Case("nf4", {"--quantization": "nf4"}, needs="the kernels of bitsandbytes"),
    Case("low_vram", IMAGES | {"--low_vram": True}, needs="streams"),
    Case("torch_compile", IMAGES | {"--torch_compile": True}, needs="CUDA graphs"),
)


def command_line(flags):
    """{"--flag": value} as words; True is a bare flag."""
    return [word for flag, value in flags.items() for word in ([flag] if value is True else [flag, str(value)])]


def command_lines(case, output_dir, cache_dir):
    """The arguments of each run of a case."""
    first = BASICS | {"--quantized_cache_dir": cache_dir} | case.flags | {"--output_dir": output_dir}
    return [command_line(first)] + ([command_line(first | case.then)] if case.then else [])


def faults(case, output_dir, printed):
    """What the finished runs of a case lack, as sentences; [] if it is as it should be."""
    found = [f"it did not print {case.says!r}"] if case.says not in printed else []
    if "--estimate_memory" in case.flags:
        return found + ["it trained"] * (output_dir / "learned_embeds.safetensors").exists()
    flags = BASICS | case.flags | (case.then or {})
    expected = ("learned_embeds.safetensors", "zoodip_config.json", "loss_curve.png", "README.md", *case.writes)
    if missing := [name for name in expected if not (output_dir / name).is_file()]:
        return found + [f"it did not write {', '.join(missing)}"]
    config = json.loads((output_dir / "zoodip_config.json").read_text(encoding="utf-8"))
    steps, limit = config["figures"]["steps"], flags["--max_train_steps"]
    if steps >= limit if case.stops_early else steps != limit:
        found.append(f"it made {steps} of {limit} steps")
    if config["hardware"]["device"] != "cuda":
        found.append(f"it ran on {config['hardware']['device']}")
    learned = load_file(output_dir / "learned_embeds.safetensors")[TOKEN]
    if len(learned) != flags.get("--num_vectors", 1) or not learned.isfinite().all():
        found.append(f"its embedding is {list(learned.shape)}, finite: {bool(learned.isfinite().all())}")
    return found
