"""Pinned regressions: 20 steps on the demo base give the losses and the θ that they gave before.

A change that draws one random number more, or in another order, fails here. `python tests/test_pinned.py` writes the
pins anew, for a change that is meant to alter them.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch


PINS = Path(__file__).with_name("pinned.json")
RUNS = {
    "int8": {},
    "none": {"quantization": "none"},
    "spsa, two vectors, accumulation": {
        "gradient_estimator": "spsa",
        "num_vectors": 2,
        "gradient_accumulation_steps": 2,
        "train_batch_size": 2,
        "lr_scheduler": "cosine",
    },
}
# μ is large, so that the kernels of another processor, which round differently, hardly move θ.
SHARED = {
    "perturbation_scale": 3e-2,
    "max_train_steps": 20,
    "sg_window": 4,
    "sg_threshold": 0.3,  # large enough that directions are removed within these few steps
    "logging_steps": 1,
    "checkpointing_steps": 20,
    "validation_steps": 10,
}


def trajectory(output_dir):
    """Losses of every step, held-out losses and θ, as the last checkpoint has them."""
    state = torch.load(Path(output_dir) / "checkpoint-20" / "state.pt", weights_only=True)
    history = state["history"]
    return {
        "losses": [loss for _, loss in history["loss"]],
        "held-out losses": [loss for _, loss in history["validation_loss"]],
        "theta": state["theta"].tolist(),
        "directions removed": 0.0
        if state["subspace"]["removed"] is None
        else float(len(state["subspace"]["removed"])),
    }


@pytest.mark.parametrize("name", RUNS)
def test_twenty_steps_are_what_they_were(train, demo_base, name):
    pins = json.loads(PINS.read_text())
    assert pins["base"] == fingerprint(demo_base), "demo/base has changed: python tests/test_pinned.py renews the pins"
    found, pinned = trajectory(train(**SHARED, **RUNS[name])), pins["runs"][name]
    assert len(found["losses"]) == 20 and found["directions removed"] > 0
    for part, values in pinned.items():
        torch.testing.assert_close(torch.tensor(found[part]), torch.tensor(values), rtol=1e-5, atol=1e-6, msg=part)


def fingerprint(base):
    """Which demo base the pins are of."""
    return json.loads((Path(base) / "demo_base.json").read_text())["stages"]["unet"]["last"]


def main():
    from conftest import REPO, as_arguments

    import train_zoodip_textual_inversion as zoodip

    subject = sorted((REPO / "demo" / "subjects").glob("*/metadata.jsonl"))[0].parent
    runs = {}
    for name, flags in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            basics = {
                "pretrained_model_name_or_path": REPO / "demo" / "base",
                "train_data_dir": subject,
                "placeholder_token": "<my-toy>",
                "initializer_token": "star",
                "output_dir": folder,
                "report_to": "none",
            }
            zoodip.main(
                zoodip.parse_args(as_arguments({f"--{k}": v for k, v in {**basics, **SHARED, **flags}.items()}))
            )
            runs[name] = trajectory(folder)
    PINS.write_text(json.dumps({"base": fingerprint(REPO / "demo" / "base"), "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
