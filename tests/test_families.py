"""A new kind of model is one file and one line: a flow-matching transformer from outside, trained by the script."""

import json

import numpy as np
import pytest
import torch
from conftest import as_arguments, short_run
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from safetensors.torch import load_file
from tiny_base import build_pictures, build_tiny_base
from tiny_flow import TINY_FLOW, WIDTHS, build_tiny_flow_base

import train_tuneqdm_dreambooth as tuneqdm
import train_zoodip_textual_inversion as zoodip
from personalization.data import examples
from personalization.errors import InputError
from personalization.models import families
from personalization.models.base_model import ModelSource, open_base


TOKEN = "<my-toy>"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flow")
    build_tiny_flow_base(folder / "base")
    build_tiny_base(folder / "sd")
    build_pictures(folder / "pictures")
    return folder


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(families.FAMILIES, TINY_FLOW.name, TINY_FLOW)


@pytest.fixture
def train(place, tmp_path):
    def run(**more):
        basics = short_run(place / "base", place / "pictures", place / "cache", tmp_path / "out", "star")
        zoodip.main(zoodip.parse_args(as_arguments(basics | {f"--{name}": value for name, value in more.items()})))
        return tmp_path / "out"

    return run


def opened(place):
    return open_base(ModelSource(str(place / "base")), accepted=families.FAMILIES.values())


@pytest.mark.parametrize(
    "more",
    [
        {"validation_prompt": "a {}", "num_validation_images": 1, "num_inference_steps": 2},
        {"optimizer": "gauss_newton", "gn_subspace_dimension": 4, "num_vectors": 2},
    ],
    ids=["zo_adam", "gauss_newton"],
)
def test_the_script_trains_it(train, place, more):
    out = train(**more)
    learned, k = load_file(out / "learned_embeds.safetensors"), more.get("num_vectors", 1)
    word = opened(place).tokenizer.convert_tokens_to_ids("star</w>")
    for key, width, component in zip(("clip_l", "clip_g"), WIDTHS, TINY_FLOW.text_encoders):
        (table,) = (
            value
            for name, value in load_file(place / "base" / component / "model.safetensors").items()
            if name.endswith("token_embedding.weight")
        )
        assert learned[key].shape == (k, width) and learned[key].isfinite().all()
        assert ((learned[key] - table[word]).abs().amax(dim=1) > 1e-6).all()
    config = json.loads((out / "zoodip_config.json").read_text())
    assert config["family"] == "tiny_flow" and set(config["components"]) == {"vae", "text_encoder", "transformer"}
    assert config["components"]["transformer"]["quantized_share"] > 0.5
    assert (config["settings"]["puts_min_timestep"], config["settings"]["puts_max_timestep"]) == (200, 800)
    assert (out / "samples" / "image_0.png").is_file() == ("validation_prompt" in more)


def test_openvino_computes_it(train):
    """The engine takes the call of a denoiser that it knows nothing of, from training and from the pipeline."""
    pytest.importorskip("openvino")
    more = {"validation_prompt": "a {}", "num_validation_images": 1, "num_inference_steps": 1}
    out = train(unet_backend="openvino", max_train_steps=1, **more)
    assert (out / "samples" / "image_0.png").is_file()


def test_its_conditioning_is_the_pipelines(place):
    base = opened(place)
    pipeline = StableDiffusion3Pipeline.from_pretrained(place / "base", **TINY_FLOW.pipeline_options)
    text = ["a photo of a star"]
    with torch.no_grad():
        found = TINY_FLOW.encode([pipeline.text_encoder, pipeline.text_encoder_2], base.tokenize(text))
        states, _, pooled, _ = pipeline.encode_prompt(text, None, None, do_classifier_free_guidance=False)
    assert torch.equal(found.states, states) and torch.equal(found.pooled, pooled)


def test_one_step_from_the_target_brings_the_latents_back(place):
    base, draw = opened(place), torch.Generator().manual_seed(0)
    sample, noise = (torch.randn(1, 4, 8, 8, generator=draw) for _ in range(2))
    latents = TINY_FLOW.to_latents(sample, base.vae_config)
    np.testing.assert_allclose(latents.numpy(), (sample.numpy() - 0.06) * 1.5, rtol=1e-6)
    for t in (1, 250, 999):
        noisy, target = TINY_FLOW.noise(latents, noise, torch.tensor([t]), base.scheduler)
        scheduler = FlowMatchEulerDiscreteScheduler()
        torch.testing.assert_close(scheduler.scale_noise(latents, torch.tensor([float(t)]), noise), noisy)
        scheduler.set_timesteps(sigmas=[t / 1000])
        back = scheduler.step(target, scheduler.timesteps[0], noisy).prev_sample
        torch.testing.assert_close(back, latents, rtol=1e-4, atol=1e-5)


def test_the_loss_is_of_what_the_transformer_says(place):
    """The script's loss against the whole path in diffusers' and transformers' own models, in numpy at its end."""
    base, args = opened(place), {"pretrained_model_name_or_path": place / "base", "train_data_dir": place / "pictures"}
    args |= {"placeholder_token": TOKEN, "initializer_token": "star", "quantization": "none", "output_dir": "unused"}
    args = zoodip.parse_args(as_arguments({f"--{name}": value for name, value in args.items()}))
    base, placeholder, compute = zoodip.resolve_settings(args, torch.device("cpu"))
    ids = base.tokenize([placeholder.expand("a {}")])
    networks = zoodip.load_networks(args, base, compute)[:2]
    model, start = zoodip.assemble_model(args, base, placeholder, ids, *networks, compute)
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 8, 8, generator=draw)
    batch = examples.noise_batch(base.family, latents, ids, torch.tensor([300]), draw, base.scheduler)
    with torch.inference_mode():
        found = model.losses(start[None, None], batch).item()
    pipeline = StableDiffusion3Pipeline.from_pretrained(place / "base", **TINY_FLOW.pipeline_options)
    with torch.no_grad():  # the word starts as its initializer
        states, _, pooled, _ = pipeline.encode_prompt("a star", None, None, do_classifier_free_guidance=False)
        given = {"hidden_states": batch.noisy_latents, "encoder_hidden_states": states, "pooled_projections": pooled}
        prediction = pipeline.transformer(**given, timestep=torch.tensor([300])).sample.numpy()
    noise = (batch.noisy_latents - 0.7 * latents).numpy() / 0.3
    assert found == pytest.approx(np.mean((prediction - (noise - latents.numpy())) ** 2), rel=1e-4)


def test_who_cannot_serve_it_says_so(place, tmp_path, monkeypatch):
    words = {"pretrained_model_name_or_path": place / "base", "instance_data_dir": place / "pictures"}
    words |= {"output_dir": tmp_path / "out", "subject_name": "sks star"}
    args = tuneqdm.parse_args(as_arguments({f"--{name}": value for name, value in words.items()}))
    sentence = "is a model of the kind Tiny Flow; this script trains Stable Diffusion 1.x and 2.x: choose one of those"
    with pytest.raises(InputError, match=sentence):
        tuneqdm.main(args)
    monkeypatch.delitem(families.FAMILIES, TINY_FLOW.name)
    with pytest.raises(
        InputError, match="not known here, 'StableDiffusion3Pipeline'; .* XL, Z-Image and FLUX.2 klein: choose"
    ):
        opened(place)


def test_with_it_the_others_are_recognised_as_before(place):
    assert open_base(ModelSource(str(place / "sd")), accepted=families.FAMILIES.values()).family is families.SD1
