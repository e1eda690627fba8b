"""Pinned regressions: short runs on the demo bases give the losses and the result that they gave before.

A change that draws one random number more, or in another order, fails here; tests/compare_checkouts.py compares more,
and to the last bit, but needs both checkouts on one machine. `python tests/test_pinned.py [NAME ...]` writes the pins
(those of these names) anew, for a change that is meant to alter them.
"""

import importlib
import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch


PINS = Path(__file__).with_name("pinned.json")
WORD, SCALES, LORA = ("train_zoodip_textual_inversion", "train_tuneqdm_dreambooth", "train_selective_dreambooth_lora")
BASICS = {
    WORD: {"placeholder_token": "<my-toy>", "initializer_token": "star"},
    SCALES: {"subject_name": "star"},
    LORA: {"subject_name": "star", "learning_rate": 2e-3, "zo_learning_rate": 2e-3},
}
# Steps of the finite difference are large, and so is AdamW's ε (or a gradient's sign would decide): kernels of another
# processor, which round differently, then hardly move the result. bfloat16 is too coarse for that.
ZO_ADAM = {
    "perturbation_scale": 3e-2,
    "max_train_steps": 20,
    "sg_window": 4,
    "sg_threshold": 0.3,  # large enough that directions are removed within these few steps
    "validation_steps": 10,
}
GAUSS_NEWTON = {
    "optimizer": "gauss_newton",
    "max_train_steps": 6,
    "gn_subspace_dimension": 8,
    "gn_subspace_steps": 4,  # then all directions
    "gn_subspace_words": 400,  # more than a word has entries: all directions are the vocabulary's, and definite
    "num_validation_samples": 4,
    "validation_steps": 3,
}
ADAMW = {"max_train_steps": 6, "adam_epsilon": 1e-2}
RUNS = {
    "int8": (WORD, ZO_ADAM),
    "none": (WORD, ZO_ADAM | {"quantization": "none"}),
    "spsa, two vectors, accumulation": (
        WORD,
        ZO_ADAM
        | {
            "gradient_estimator": "spsa",
            "num_vectors": 2,
            "gradient_accumulation_steps": 2,
            "train_batch_size": 2,
            "lr_scheduler": "cosine",
        },
    ),
    "low_vram": (WORD, ZO_ADAM | {"low_vram": True}),
    "sdxl, two vectors": (
        WORD,
        ZO_ADAM | {"base": "base_xl", "num_vectors": 2, "max_train_steps": 10, "num_validation_samples": 4},
    ),
    "gauss_newton": (WORD, GAUSS_NEWTON),
    "gauss_newton, all directions, two vectors": (
        WORD,
        {name: value for name, value in GAUSS_NEWTON.items() if name not in ("gn_subspace_steps", "gn_subspace_words")}
        | {"gn_subspace": "none", "num_vectors": 2, "gn_subspace_dimension": 4, "perturbation_scale": 0.1},
    ),
    "gauss_newton, sdxl": (WORD, GAUSS_NEWTON | {"base": "base_xl", "max_train_steps": 5, "gn_subspace_steps": 3}),
    "openvino": (WORD, ZO_ADAM | {"unet_backend": "openvino", "max_train_steps": 8}),
    "peqa": (SCALES, ADAMW),
    "s2, input scales, int4": (SCALES, ADAMW | {"scale_sets": 2, "train_input_scales": True, "bits": 4}),
    "lora, window": (LORA, ADAMW | {"bp_view": "window", "bp_progress_midpoint": 0.5}),
    "lora, scaled": (LORA, ADAMW | {"bp_progress_midpoint": 0.5}),
}
# Rounding of other kernels (AVX2's for AVX-512's, of PyTorch, oneDNN and MKL) moves θ by 2e-6, Gauss-Newton's by 3e-5;
# another random number moves it by 1e-2.
TOLERANCE, OF_GAUSS_NEWTON = {"rtol": 1e-4, "atol": 1e-5}, {"rtol": 1e-3, "atol": 2e-4}
SAME_AS = {"low_vram": "int8"}  # which only spares memory


def learn(name, demo, folder):
    """Trains one of `RUNS` into a folder by the script's `main`; returns what its last checkpoint has."""
    from conftest import as_arguments

    script, flags = RUNS[name]
    steps = flags["max_train_steps"]
    subject = sorted((demo / "subjects").glob("*/metadata.jsonl"))[0].parent
    chosen = {
        "pretrained_model_name_or_path": demo / flags.get("base", "base"),
        "train_data_dir" if script == WORD else "instance_data_dir": subject,
        "output_dir": folder,
        "report_to": "none",
        "logging_steps": 1,
        "checkpointing_steps": steps,
        **BASICS[script],
        **{flag: value for flag, value in flags.items() if flag != "base"},
    }
    module = importlib.import_module(script)
    module.main(module.parse_args(as_arguments({f"--{flag}": value for flag, value in chosen.items()})))
    state = torch.load(Path(folder) / f"checkpoint-{steps}" / "state.pt", weights_only=True)
    losses = [loss for _, loss in state["history"]["loss"]]
    assert len(losses) == steps
    found = {"losses": losses, "held-out losses": [loss for _, loss in state["history"]["validation_loss"]]}
    if script == WORD:
        found["theta"] = state["theta"].tolist()
    else:
        found["sample of the result"] = sample(state["theta"] if script == LORA else state["changes"])
        del found["held-out losses"]
    if flags.get("optimizer") == "gauss_newton":
        found["mean"] = state["mean"].tolist()
    elif script == WORD:
        removed = state["subspace"]["removed"]
        found["directions removed"] = 0.0 if removed is None else float(len(removed))
        assert found["directions removed"] > 0
    if script == LORA:
        found["updates"] = [float(state["updates"][kind]) for kind in sorted(state["updates"])]
    return found


def sample(result, count=64):
    """So many numbers of many, evenly spread, and the length of all; of a tensor, or of a dict of tensors."""
    parts = [result[name] for name in sorted(result)] if isinstance(result, dict) else [result]
    flat = torch.cat([part.detach().flatten() for part in parts])
    return [*flat[:: len(flat) // count][:count].tolist(), flat.norm().item()]


@pytest.mark.parametrize("name", RUNS)
def test_runs_are_what_they_were(repo, demo_base, tmp_path, name):
    if "openvino" in name:
        pytest.importorskip("openvino")
    pins = json.loads(PINS.read_text())
    assert pins["bases"] == fingerprints(repo), "a demo base has changed: python tests/test_pinned.py renews the pins"
    found, pinned = learn(name, repo / "demo", tmp_path), pins["runs"][SAME_AS.get(name, name)]
    assert found.keys() == pinned.keys()
    bounds = OF_GAUSS_NEWTON if "gauss_newton" in name else TOLERANCE
    for part, values in pinned.items():
        both = torch.tensor(found[part]), torch.tensor(values)
        torch.testing.assert_close(*both, **bounds, msg=lambda said, part=part: f"{part}: {said}")


def fingerprints(repo):
    """Which demo bases the pins are of."""
    return {
        name: json.loads((repo / "demo" / name / "demo_base.json").read_text())["stages"][stage]["last"]
        for name, stage in (("base", "unet"), ("base_xl", "unet_xl"))
    }


def main(names):
    from conftest import REPO

    pins = json.loads(PINS.read_text())["runs"] if PINS.exists() else {}
    for name in names or RUNS:
        if name not in SAME_AS:
            with tempfile.TemporaryDirectory() as folder:
                pins[name] = learn(name, REPO / "demo", folder)
    rounded = {name: {part: shorter(values) for part, values in run.items()} for name, run in pins.items()}
    lines = [
        f" {json.dumps(name)}: {{\n"
        + ",\n".join(f"  {json.dumps(part)}: {json.dumps(values)}" for part, values in run.items())
        + "\n }"
        for name, run in rounded.items()
    ]
    runs = ",\n".join(lines)
    PINS.write_text(f'{{"bases": {json.dumps(fingerprints(REPO))}, "runs": {{\n{runs}\n}}}}\n')


def shorter(values):
    """Numbers to six digits, of which a comparison looks at five."""
    return [shorter(value) for value in values] if isinstance(values, list) else float(f"{values:.6g}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main(sys.argv[1:])
