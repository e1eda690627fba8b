"""The baselines of the benchmarks: they must train what they say they train, or comparisons with them mean nothing."""

import functools
import json

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

import train_zoodip_textual_inversion as zoodip
from benchmarks import baselines
from personalization.models.compute import choose_compute
from personalization.models.families import SD1, TextEncoders


@pytest.fixture(scope="module")
def quanto_models(demo_base):
    models = baselines.load_models(demo_base, quanto=True)
    rows = models.text_encoder.get_input_embeddings().num_embeddings
    models.text_encoder.resize_token_embeddings(rows + 1, mean_resizing=False)
    return models, rows


@pytest.mark.parametrize("batch_size", [1, 2])
def test_official_estimate_equals_the_scripts_on_the_same_models(quanto_models, batch_size):
    models, first = quanto_models
    loop = baselines.OfficialLoop(models, 64, batch_size, placeholder_id=first, perturbation_scale=0.05)
    batch = loop.draw_batch(500, 900)
    theta = loop.theta.clone()
    directions = torch.randn((2, *theta.shape), generator=torch.Generator().manual_seed(3))
    ours, our_loss = loop.estimate(batch, directions)
    assert torch.equal(loop.table[first], theta[0])  # the candidates left nothing behind
    table = models.text_encoder.get_input_embeddings()
    rows = zoodip.PromptRows(table.weight, batch.prompt_ids, first, 3, "cpu", torch.float32)
    models.text_encoder.set_input_embeddings(rows)  # where the script's candidates live
    compute, _ = choose_compute(torch.device("cpu"))
    networks = SD1, TextEncoders(SD1, [models.text_encoder]), models.unet
    model = zoodip.FrozenModel(*networks, models.scheduler, first, None, compute)
    losses = functools.partial(model.losses, batch=batch)
    with torch.inference_mode():
        scripts, scripts_loss = zoodip.estimate_gradient(losses, theta, 2, 0.05, torch.Generator().manual_seed(3))
    models.text_encoder.set_input_embeddings(table)
    torch.testing.assert_close(our_loss, scripts_loss)
    assert ours.norm() > 0 and (ours - scripts).norm() < 1e-3 * ours.norm()


def test_official_step_runs_separate_passes_and_changes_one_row(quanto_models):
    models, first = quanto_models
    loop = baselines.OfficialLoop(models, 64, 2, num_perturbations=3, placeholder_id=first, sg_window=2)
    passes, encodings = [], []
    unet_hook = models.unet.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    vae_hook = models.vae.encoder.register_forward_pre_hook(lambda _, args: encodings.append(len(args[0])))
    before = loop.table.clone()
    for _ in range(3):
        assert loop.step().isfinite()
    unet_hook.remove()
    vae_hook.remove()
    assert passes == [2] * 4 * 3 and encodings == [2] * 3
    changed = (loop.table != before).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [first]
    plain = (torch.nn.Linear, torch.nn.Conv2d)
    assert not [n for m in models[:3] for n, layer in m.named_modules() if type(layer) in plain]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_batch_is_the_noised_encoding_of_its_images(demo_base, kind):
    models = baselines.load_models(demo_base)
    models.scheduler.register_to_config(prediction_type=kind)
    loop = baselines.OfficialLoop(models, 64, 2)
    batch = loop.draw_batch(500, 900)
    share = models.scheduler.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    noisy, target = batch.noisy_latents, batch.target
    if kind == "epsilon":
        latents = (noisy - (1 - share).sqrt() * target) / share.sqrt()
    else:
        latents = share.sqrt() * noisy - (1 - share).sqrt() * target
    with torch.no_grad():
        posterior = models.vae.encode(loop.pixels).latent_dist
    deviation = (latents / models.vae.config.scaling_factor - posterior.mean) / posterior.std
    assert deviation.std() == pytest.approx(1, abs=0.1) and deviation.mean() == pytest.approx(0, abs=0.1)
    assert ((batch.timesteps >= 500) & (batch.timesteps < 900)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_textual_inversion_changes_one_row_and_lowers_the_loss(demo_base, dtype):
    loop = baselines.GradientTextualInversion(demo_base, 64, 2, dtype=dtype, learning_rate=0.05)
    batch, before = loop.draw_batch(500, 900), loop.table.detach().clone()
    losses = [loop.step(batch).item() for _ in range(8)]
    assert losses[-1] < 0.98 * losses[0]
    changed = (loop.table != before).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [loop.placeholder_id]
    assert loop.table.dtype == torch.float32
    assert {p.dtype for p in loop.unet.parameters()} == {dtype}
    assert [p is loop.table for p in loop.text_encoder.parameters() if p.requires_grad] == [True]
    assert not any(p.requires_grad for p in [*loop.unet.parameters(), *loop.vae.parameters()])
    assert loop.step().isfinite()  # on a batch of its own


def test_checkpointing_recomputes_and_gives_the_same_gradient(demo_base):
    gradients, calls = [], []
    for checkpointing in (False, True):
        loop = baselines.GradientTextualInversion(demo_base, 64, gradient_checkpointing=checkpointing)
        seen = []
        for module in (loop.unet.down_blocks[0].resnets[0], loop.text_encoder.get_input_embeddings()):
            module.register_forward_pre_hook(lambda module, _, seen=seen: seen.append(type(module).__name__))
        mlp = next(m for n, m in loop.text_encoder.named_modules() if n.endswith("layers.0.mlp"))
        mlp.register_forward_pre_hook(lambda module, _, seen=seen: seen.append(type(module).__name__))
        loop.loss(loop.draw_batch(500, 900)).backward()
        gradients.append(loop.table.grad[loop.placeholder_id])
        calls.append({name: seen.count(name) for name in seen})
    assert set(calls[0].values()) == {1}
    assert calls[1] == {"Embedding": 1, "CLIPMLP": 2, "ResnetBlock2D": 2}
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients)


def test_backpropagation_and_forward_differences_agree(demo_base):
    """The two kinds of baseline train the same loss: slope along a direction against the gradient's share of it."""
    gradient_loop = baselines.GradientTextualInversion(demo_base, 64)
    official = baselines.OfficialLoop(
        baselines.load_models(demo_base), 64, num_perturbations=1, perturbation_scale=1e-3
    )
    batch = gradient_loop.draw_batch(500, 900)
    gradient_loop.loss(batch).backward()
    gradient = gradient_loop.table.grad[gradient_loop.placeholder_id]
    direction = (gradient / gradient.norm())[None]
    estimate, _ = official.estimate(batch, direction[None])
    assert (estimate * direction).sum() == pytest.approx(gradient.norm().item(), rel=0.01)  # curvature is 0.4 %


def test_bare_forwards(demo_base):
    ready = UNet2DConditionModel.from_pretrained(demo_base, subfolder="unet").eval()
    for unet in (demo_base, ready):
        bare = baselines.BareForwards(unet, latent=16, batch_size=2, num_perturbations=3)
        assert bare.inputs["sample"].shape == (8, 4, 16, 16)
        with torch.no_grad():
            expected = ready(**bare.inputs)[0].square().mean()
        torch.testing.assert_close(bare.step(), expected)


def test_flops_equal_the_hand_formulas():
    with torch.device("meta"):
        linear, conv = torch.nn.Linear(24, 40), torch.nn.Conv2d(8, 12, 3, stride=2, padding=1)
        rows, image, query = torch.empty(5, 24), torch.empty(2, 8, 16, 16), torch.empty(2, 4, 64, 16)
        key = torch.empty(2, 4, 77, 16)
    assert baselines.count_flops(lambda: linear(rows)) == 2 * 5 * 24 * 40
    assert baselines.count_flops(lambda: conv(image)) == 2 * (2 * 12 * 8 * 8) * (8 * 3 * 3)
    attention = functools.partial(torch.nn.functional.scaled_dot_product_attention, query, key, key)
    assert baselines.count_flops(attention) == 2 * 2 * (2 * 4) * 64 * 77 * 16


def test_unet_flops_count_attention_and_grow_with_the_batch():
    config = json.loads((baselines.HERE / "configs" / "sd15" / "unet.json").read_text())
    one = baselines.unet_flops(config, 1, 64)
    assert baselines.unet_flops("sd15", 3, 64) == 3 * one
    # Self- and cross-attention by hand: blocks of each width (down + up), tokens, and the 77 of the text.
    blocks = [(5, 320, 64**2), (5, 640, 32**2), (5, 1280, 16**2), (1, 1280, 8**2)]
    attention = sum(count * 4 * width * tokens * (tokens + 77) for count, width, tokens in blocks)
    assert one - attention == pytest.approx(2 * 338.6e9, rel=0.001)  # Linear and Conv2d: 338.6 G multiply-adds


@pytest.mark.parametrize("architecture, millions", [("sd15", 859.5), ("sd21", 865.9), ("sdxl", 2567.5)])
def test_architectures_have_the_size_of_the_real_ones(architecture, millions):
    folder = baselines.HERE / "configs" / architecture
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads((folder / "unet.json").read_text()))
        vae = AutoencoderKL.from_config(json.loads((folder / "vae.json").read_text()))
    assert parameters_in_millions(unet) == pytest.approx(millions, abs=0.05)
    assert parameters_in_millions(vae) == pytest.approx(83.65, abs=0.01)
    text = {"sd15": 123.06, "sd21": 340.39}
    if architecture in text:
        config = CLIPTextConfig(**json.loads((folder / "text_encoder.json").read_text()))
        assert config.hidden_size == unet.config.cross_attention_dim
        with torch.device("meta"):
            assert parameters_in_millions(CLIPTextModel(config)) == pytest.approx(text[architecture], abs=0.01)


def parameters_in_millions(model):
    return sum(p.numel() for p in model.parameters()) / 1e6


def test_matmul_peak_is_a_rate():
    small = baselines.matmul_peak(size=64, repeats=3)
    assert 1e6 < small < 1e14
