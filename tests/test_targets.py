"""Each trainer's loss against numpy: what is noised how far, what is to be predicted, and how far off the model is.

For every family and both prediction types the betas come from the scheduler's file, and the prediction from a hook on
the UNet itself: nothing here asks the code under test what the target is.
"""

import json

import numpy as np
import pytest
import torch
from conftest import as_arguments
from tiny_base import build_pictures, build_tiny_base, build_tiny_xl_base

import train_selective_dreambooth_lora as selective
import train_tuneqdm_dreambooth as tuneqdm
import train_zoodip_textual_inversion as zoodip
from personalization.data import examples, prompts
from personalization.methods import dreambooth


CPU, PREDICTIONS = torch.device("cpu"), ["epsilon", "v_prediction"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("targets")
    for name, build in (("sd", build_tiny_base), ("xl", build_tiny_xl_base)):
        for prediction in PREDICTIONS:
            build(folder / f"{name}-{prediction}")
            path = folder / f"{name}-{prediction}" / "scheduler" / "scheduler_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": prediction}))
    build_pictures(folder / "pictures")
    return folder


@pytest.fixture
def given(monkeypatch):
    """What families noise from here on: (latents, noise, timesteps) of every call, on the host."""
    calls = []
    for family in zoodip.families.FAMILIES.values():
        original = family.noise

        def watched(latents, noise, timesteps, scheduler, original=original):
            calls.append((latents.numpy(), noise.numpy(), timesteps.numpy()))
            return original(latents, noise, timesteps, scheduler)

        monkeypatch.setattr(family, "noise", watched)
    return calls


def by_hand(base, latents, noise, timesteps):
    """Noisy latents and target `[b, C, h, w]` by the formulas of DDPM and of the velocity (Salimans and Ho)."""
    config = json.loads((base / "scheduler" / "scheduler_config.json").read_text())
    assert config["beta_schedule"] == "scaled_linear"
    ends = config["beta_start"] ** 0.5, config["beta_end"] ** 0.5
    betas = np.linspace(*ends, config["num_train_timesteps"], dtype=np.float64) ** 2
    kept = np.cumprod(1 - betas)[timesteps][:, None, None, None]
    noisy = np.sqrt(kept) * latents + np.sqrt(1 - kept) * noise
    velocity = np.sqrt(kept) * noise - np.sqrt(1 - kept) * latents
    return noisy, {"epsilon": noise, "v_prediction": velocity}[config["prediction_type"]]


def check(base, batch, given, unet, losses):
    """Makes sure that a `Batch` is by the formulas, and `losses()` the mean squared error of what the UNet returns.

    Args:
        base: folder of the model.
        batch: `Batch`.
        given: what it was made of.
        unet: module.
        losses: computes them, `[b]` or a mean; the UNet is called once for it.
    """
    (made_of,) = given
    noisy, target = by_hand(base, *made_of)
    np.testing.assert_allclose(batch.noisy_latents.numpy(), noisy, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(batch.target.numpy(), target, rtol=1e-4, atol=1e-5)
    assert len(set(made_of[2].tolist())) > 1  # timesteps
    said = []
    hook = unet.register_forward_hook(lambda _, inputs, output: said.append((inputs[0], output[0].detach().numpy())))
    with torch.no_grad():
        found = losses()
    hook.remove()
    ((seen, prediction),) = said
    assert torch.equal(seen, batch.noisy_latents)
    errors = ((prediction - target) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(found.numpy(), errors if found.dim() else errors.mean(), rtol=1e-4)


def command_line(base, script, **more):
    words = {"pretrained_model_name_or_path": base, "output_dir": "unused", "train_batch_size": 4, **more}
    return script.parse_args(as_arguments({f"--{name}": value for name, value in words.items()}))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", ["sd", "xl"])
def test_textual_inversion(place, given, name, prediction):
    base_folder = place / f"{name}-{prediction}"
    more = {"train_data_dir": place / "pictures", "placeholder_token": "<my-toy>", "initializer_token": "star"}
    args = command_line(base_folder, zoodip, **more, quantization="none")
    base, placeholder, compute = zoodip.resolve_settings(args, CPU)
    pictures = zoodip.read_pictures(args)
    captions = prompts.build_prompts(pictures, placeholder, base)
    concept, _ = examples.load_concept(pictures, captions, base, 0.0, compute)
    networks = zoodip.load_networks(args, base, compute)[:2]
    model, start = zoodip.assemble_model(args, base, placeholder, concept.prompt_ids, *networks, compute)
    sampling, generator = zoodip.choose_sampling(args), torch.Generator().manual_seed(0)
    batch = zoodip.draw_batch(concept, sampling, model.scheduler, generator)
    check(base_folder, batch, given, model.denoiser, lambda: model.losses(start[None, None], batch)[0])
    # Gauss-Newton's errors are the same differences, one by one.
    with torch.no_grad():
        errors, losses = model.errors(start[None, None], batch), model.losses(start[None, None], batch)
    torch.testing.assert_close(errors.square().mean(dim=1), losses)


def dreambooth_run(script, base_folder, place, **more):
    """(args, `Base`, `Compute`, `Subject`, text embeddings) of a DreamBooth trainer's run, by its own chapters."""
    more |= {"instance_data_dir": place / "pictures", "subject_name": "sks star"}
    args = command_line(base_folder, script, **more)
    base, compute, *rest = script.resolve_settings(args, CPU)
    pictures = dreambooth.read_instances(args)
    texts = dreambooth.instance_texts(pictures, args.instance_prompt, args.subject_name)
    subject, _ = dreambooth.encode_pictures(pictures, texts, None, base, 0.0, compute)
    conditioning, *_ = dreambooth.encode_texts(args, texts, base, compute)
    return args, base, compute, subject, conditioning, *rest


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_tuneqdm(place, given, prediction):
    base_folder = place / f"sd-{prediction}"
    args, base, compute, subject, conditioning, table = dreambooth_run(tuneqdm, base_folder, place)
    model, _, _ = tuneqdm.load_model(args, base, compute, table, conditioning)
    sampling, generator = tuneqdm.choose_sampling(args, table), torch.Generator().manual_seed(0)
    batch = tuneqdm.draw_batch(subject, sampling, model.scheduler, generator)
    check(base_folder, batch, given, model.unet, lambda: model.errors(batch))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_lora(place, given, prediction):
    base_folder = place / f"sd-{prediction}"
    args, base, compute, subject, conditioning = dreambooth_run(selective, base_folder, place)
    model, _ = selective.load_model(args, base, compute, conditioning)
    sampling, generator = selective.choose_sampling(args, 1), torch.Generator().manual_seed(0)
    weights = torch.ones(base.scheduler.config.num_train_timesteps)
    batch = selective.draw_batch(subject, sampling, weights, model.scheduler, generator)
    check(base_folder, batch, given, model.unet, lambda: model.errors(batch))


def test_the_order_of_draws(place):
    """Latents, caption, timestep, noise: a generator that is asked by hand in this order gives the same batch."""
    base_folder = place / "sd-epsilon"
    more = {"train_data_dir": place / "pictures", "placeholder_token": "<my-toy>", "initializer_token": "star"}
    args = command_line(base_folder, zoodip, **more)
    base, placeholder, compute = zoodip.resolve_settings(args, CPU)
    pictures = zoodip.read_pictures(args)
    captions = prompts.build_prompts(pictures, placeholder, base)
    concept, _ = examples.load_concept(pictures, captions, base, 0.5, compute)
    sampling = zoodip.choose_sampling(args)
    batch = zoodip.draw_batch(concept, sampling, base.scheduler, torch.Generator().manual_seed(5))
    g, b = torch.Generator().manual_seed(5), sampling.batch_size
    chosen = torch.randint(len(pictures), (b,), generator=g)
    flipped = (torch.rand(b, generator=g) < 0.5).long()
    mean, logvar = concept.moments[flipped, chosen].chunk(2, dim=1)
    latents = (mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=g)) * base.vae_config["scaling_factor"]
    rows = [concept.prompts_of_image[i] for i in chosen.tolist()]
    ids = concept.prompt_ids[[row[int(torch.randint(len(row), (1,), generator=g))] for row in rows]]
    timesteps = torch.randint(500, 900, (b,), generator=g)
    noise = torch.randn(latents.shape, generator=g)
    assert torch.equal(batch.timesteps, timesteps) and torch.equal(batch.prompt_ids, ids)
    assert torch.equal(batch.target, noise)
    noisy, _ = by_hand(base_folder, latents.numpy(), noise.numpy(), timesteps.numpy())
    np.testing.assert_allclose(batch.noisy_latents.numpy(), noisy, rtol=1e-4, atol=1e-5)
