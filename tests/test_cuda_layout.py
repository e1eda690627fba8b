"""What CUDA does, as far as a CPU can do it: channels-last memory and float16 activations through whole runs."""

import json

import pytest
import torch
from conftest import as_arguments
from safetensors.torch import load_file

import train_zoodip_textual_inversion as zoodip
from personalization.models import compute
from personalization.models.compute import Compute


@pytest.fixture
def cuda_layout(monkeypatch):
    """Makes the CPU compute as a GPU would; returns a function that chooses the precision."""

    def choose(precision):
        layout = compute.DeviceLayout(precision, torch.channels_last)
        monkeypatch.setattr(compute, "device_layout", lambda device: layout)

    return choose


@pytest.mark.parametrize("quantization", ["int8", "none", "quanto-int8"])
def test_channels_last_trains_the_same_token(train, cuda_layout, quantization):
    flags = {"quantization": quantization, "num_vectors": 2, "perturbation_scale": 1e-2}
    flags |= {"max_candidates_per_forward": 2, "train_batch_size": 2}
    plain = load_file(train(output_dir=train.folder / "plain", **flags) / "learned_embeds.safetensors")["<my-toy>"]
    cuda_layout("no")
    out = train(output_dir=train.folder / "channels-last", **flags)
    torch.testing.assert_close(load_file(out / "learned_embeds.safetensors")["<my-toy>"], plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("flags", [{}, {"optimizer": "gauss_newton", "gn_subspace_dimension": 2}], ids=str)
def test_predictions_and_their_errors_are_channels_last(train, cuda_layout, monkeypatch, flags):
    """Layout decides what a `view` allows: here losses are computed from channels-last memory, as on a GPU."""
    seen, original = [], zoodip.prediction_errors

    def watched(*model, **options):
        for errors in original(*model, **options):
            seen.append(errors[0].is_contiguous(memory_format=torch.channels_last) and not errors[0].is_contiguous())
            yield errors

    monkeypatch.setattr(zoodip, "prediction_errors", watched)
    cuda_layout("no")
    train(max_train_steps=1, **flags)
    assert seen and all(seen)


@pytest.mark.parametrize("flags", [{}, {"validation_prompt": "a photo of {}", "num_inference_steps": 1}])
def test_float16_is_what_a_gpu_trains_in(train, cuda_layout, flags):
    cuda_layout("fp16")
    out = train(max_train_steps=2, **flags)
    config = json.loads((out / "zoodip_config.json").read_text())
    assert config["hardware"]["activations"] == config["settings"]["activations"] == "float16"
    assert config["settings"]["perturbation_scale"] == 1e-3
    assert load_file(out / "learned_embeds.safetensors")["<my-toy>"].isfinite().all()


@pytest.mark.parametrize("low_vram", [False, True])
def test_pictures_are_encoded_on_the_host_where_a_gpu_is_to_be_spared(basics, monkeypatch, low_vram):
    flags = basics | ({"--low_vram": True} if low_vram else {})
    args = zoodip.parse_args(as_arguments(flags))
    base, placeholder, _ = zoodip.resolve_settings(args, torch.device("cpu"))
    seen = []

    def load_concept(pictures, captions, base, flip_probability, compute):
        seen.append(compute)
        raise InterruptedError

    monkeypatch.setattr(zoodip.examples, "load_concept", load_concept)
    on_gpu = Compute(torch.device("cuda"), torch.float16, torch.channels_last)
    with pytest.raises(InterruptedError):
        zoodip.prepare(args, base, placeholder, on_gpu, [], None)
    assert seen == [Compute(torch.device("cpu"), torch.float32, torch.channels_last) if low_vram else on_gpu]


def test_a_checkpoint_of_another_precision_is_refused(train, cuda_layout):
    """A float32 checkpoint of a CPU must not go on in float16 on CUDA unnoticed: no flag differs."""
    flags = {"perturbation_scale": 1e-3, "max_train_steps": 2, "checkpointing_steps": 1}
    train(**flags)
    cuda_layout("fp16")
    with pytest.raises(zoodip.InputError, match="activations \\('float32', now 'float16'\\)"):
        train(**flags, resume_from_checkpoint="latest")
