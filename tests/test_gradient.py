"""The exact gradient of a word: equal to plain autograd of the dequantized model, and a run like any other."""

import json
from itertools import product

import bitsandbytes
import pytest
import torch
from conftest import as_arguments
from safetensors.torch import load_file

import train_zoodip_textual_inversion as zoodip
from personalization.data import prompts
from personalization.errors import InputError
from personalization.methods import windows
from personalization.methods.gradient import loss_gradient, window_gradient
from personalization.models import base_model, frozen


CPU = torch.device("cpu")
SHORT = {"optimizer": "gradient", "logging_steps": 1, "num_validation_samples": 2, "flip_probability": 0}


def build(basics, layers_dir=None, **flags):
    """The `Task` of a command line."""
    words = as_arguments(basics | {"--quantized_cache_dir": "none"} | {f"--{n}": v for n, v in flags.items()})
    args = zoodip.parse_args(words)
    base, placeholder, compute = zoodip.resolve_settings(args, CPU)
    pictures = zoodip.read_pictures(args)
    captions = prompts.build_prompts(pictures, placeholder, base)
    return zoodip.prepare(args, base, placeholder, compute, pictures, captions, layers_dir=layers_dir)


def start_and_batch(task, seed=0):
    theta = task.initial.repeat(task.args.num_vectors, 1)
    theta = theta + 0.01 * torch.randn(theta.shape, generator=torch.Generator().manual_seed(seed))
    return theta, task.draw_batch(torch.Generator().manual_seed(seed))


def stands_for(weight, quantization):
    """A weight `[out, in, ...]` after `--quantization`, in float32."""
    if quantization == "none":
        return weight
    if quantization == "nf4" and weight.ndim == 2:
        packed, state = bitsandbytes.functional.quantize_nf4(weight, blocksize=64, compress_statistics=True)
        return bitsandbytes.functional.dequantize_nf4(packed, state)
    values, scale = zoodip.quantize_per_channel(weight)
    return values * scale


def by_plain_autograd(task, theta, batch):
    """The same gradient in diffusers' and transformers' own models, with the weights that quantized ones stand for."""
    base, model = task.base, task.model
    networks = []
    for part in (*base.family.text_encoders, base.family.denoiser):
        network = base_model.load_component(base, part, torch.float32)
        for layer in network.modules():
            if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
                layer.weight.data.copy_(stands_for(layer.weight.data, task.args.quantization))
        networks.append(network.requires_grad_(False).eval())
    *encoders, denoiser = networks
    point = theta.clone().requires_grad_(True)
    tables = [encoder.get_input_embeddings().weight.detach() for encoder in encoders]
    halves = point.split([table.shape[1] for table in tables], dim=1)
    for encoder, table, rows in zip(encoders, tables, halves):
        whole = torch.cat([table[: model.first_placeholder_id], rows])
        encoder.set_input_embeddings(Lookup(whole))
    text = base.family.encode(encoders, batch.prompt_ids)
    prediction = base.family.predict(denoiser, batch.noisy_latents, batch.timesteps, text, batch.size_ids)
    loss = (prediction - batch.target).square().mean()
    return torch.autograd.grad(loss, point)[0], loss.detach()


class Lookup(torch.nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def forward(self, ids):
        return self.rows[ids]


FLAGS = [
    {},
    {"quantization": "none"},
    {"quantization": "nf4"},
    {"num_vectors": 2, "train_batch_size": 2},
    {"gradient_checkpointing": "none"},
]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: " ".join(flags) or "int8")
def test_it_equals_plain_autograd_of_the_dequantized_model(basics, flags):
    task = build(basics, **SHORT | flags)
    theta, batch = start_and_batch(task)
    with torch.no_grad():
        found, loss = loss_gradient(task.model, theta, batch)
    expected, its_loss = by_plain_autograd(task, theta, batch)
    assert found.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    torch.testing.assert_close(loss, its_loss, rtol=1e-5, atol=0)


def test_it_equals_plain_autograd_on_sdxl(basics, repo):
    task = build(basics | {"--pretrained_model_name_or_path": repo / "demo" / "base_xl"}, **SHORT)
    theta, batch = start_and_batch(task)
    with torch.no_grad():
        found, _ = loss_gradient(task.model, theta, batch)
    expected, _ = by_plain_autograd(task, theta, batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("quantization", ["int8", "nf4", "none"])
def test_checkpointing_changes_no_bit(basics, quantization):
    found = []
    for checkpointing in frozen.CHECKPOINTING:
        task = build(basics, **SHORT, gradient_checkpointing=checkpointing, quantization=quantization)
        with torch.no_grad():
            found.append(loss_gradient(task.model, *start_and_batch(task))[0])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2]) and found[0].abs().max() > 0


def test_feed_forwards_in_parts_are_the_same(basics, monkeypatch):
    found = []
    for tokens, wide in ((10**6, 10**6), (3, 10**6), (10**6, 10), (3, 10)):
        monkeypatch.setattr(frozen, "TOKENS_AT_A_TIME", tokens)
        monkeypatch.setattr(frozen, "WIDE", wide)
        task = build(basics, **SHORT, gradient_checkpointing="layer")
        with torch.no_grad():
            found.append(loss_gradient(task.model, *start_and_batch(task))[0])
    for gradient in found[1:]:
        torch.testing.assert_close(found[0], gradient, rtol=1e-4, atol=1e-5 * found[0].abs().max().item())


def test_a_backward_pass_in_slices_of_weights_is_the_same(basics, monkeypatch):
    found = []
    for size in (2**25, 2**12):
        monkeypatch.setattr(zoodip, "SLICE_BYTES", size)
        task = build(basics, **SHORT)
        with torch.no_grad():
            found.append(loss_gradient(task.model, *start_and_batch(task))[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5 * found[0].abs().max().item())
    assert not torch.equal(*found)  # sums in another order: they were slices


def test_checkpointing_keeps_less(basics):
    kept = {}
    for checkpointing in ("none", "block"):
        task, sizes = build(basics, **SHORT, gradient_checkpointing=checkpointing), []
        theta, batch = start_and_batch(task)
        pack = lambda tensor, sizes=sizes: sizes.append(tensor.numel()) or tensor  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.enable_grad():
            task.model.losses(theta[None].requires_grad_(True), batch)
        kept[checkpointing] = sum(sizes)
    assert kept["block"] < 0.5 * kept["none"], kept


def test_streamed_weights_change_no_bit(basics, tmp_path):
    """Also those of norms, whose gradient needs them: they are gone between the passes."""
    for more in ({}, {"quantization": "none"}, {"gradient_checkpointing": "none"}):
        found = []
        for low_vram in (False, True):
            layers = zoodip.temporary_folder(tmp_path) if low_vram else None
            task = build(basics, layers, **SHORT | more | ({"low_vram": True} if low_vram else {}))
            with torch.no_grad():
                found.append(loss_gradient(task.model, *start_and_batch(task)))
        assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_windows_in_turn_are_the_whole_gradient(basics):
    """The mean over all windows, but for ways that leave a window and come back; and exactly, of a window of all."""
    whole = build(basics, **SHORT)
    theta, batch = start_and_batch(whole)
    with torch.no_grad():
        expected, its_loss = loss_gradient(whole.model, theta, batch)
    side = whole.args.resolution
    for low in (side, side // 2):
        task = build(basics, **SHORT, bp_view="window", low_resolution=low)
        surroundings, (height, width) = task.model.surroundings, batch.target.shape[2:]
        starts = windows.tile_starts(height, surroundings.side, surroundings.grid)
        tiles = [windows.Windows([corner], surroundings.side, height, width) for corner in product(starts, starts)]
        parts = []
        with torch.no_grad():
            for tile in tiles:
                gradient, loss = window_gradient(task.model, theta, batch, tile)
                torch.testing.assert_close(loss, its_loss, rtol=1e-5, atol=0)
                parts.append(gradient)
        found = torch.stack(parts).mean(dim=0)
        if low == side:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
        assert torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.85


def test_windows_keep_less(basics):
    def need(**more):
        args = zoodip.parse_args(as_arguments(basics | {f"--{name}": value for name, value in (SHORT | more).items()}))
        base, _, compute = zoodip.resolve_settings(args, CPU)
        return zoodip.estimate_memory(args, base, compute).activations

    plain, window = need(gradient_checkpointing="none"), need(gradient_checkpointing="none", bp_view="window")
    assert window < 0.75 * plain


def test_a_window_is_of_the_pictures(train):
    with pytest.raises(InputError, match="--low_resolution 64 is above --resolution 32"):
        train(bp_view="window", resolution=32, low_resolution=64, **SHORT)


def test_a_small_step_along_it_lowers_the_loss_as_it_says(basics):
    task = build(basics, **SHORT, quantization="none")
    theta, batch = start_and_batch(task)
    with torch.no_grad():
        gradient, loss = loss_gradient(task.model, theta, batch)
        step = 1e-3 * gradient / gradient.norm()
        moved = task.model.losses((theta - step)[None], batch)[0]
    assert (loss - moved).item() == pytest.approx((gradient * step).sum().item(), rel=0.05)


def learned(out, name="learned_embeds.safetensors"):
    return load_file(out / name)["<my-toy>"]


@pytest.mark.parametrize(
    "flags",
    [{}, {"num_vectors": 2, "gradient_accumulation_steps": 2}, {"bp_view": "window"}],
    ids=lambda flags: " ".join(flags) or "plain",
)
def test_a_resumed_run_equals_the_uninterrupted_one(train, tmp_path, flags):
    length = {"max_train_steps": 4, "checkpointing_steps": 2, **SHORT, **flags}
    whole = train(output_dir=tmp_path / "whole", **length)
    part = {**length, "output_dir": tmp_path / "part"}
    train(**part)
    for path in (tmp_path / "part").glob("learned_embeds*"):
        path.unlink()
    out = train(**part | {"resume_from_checkpoint": tmp_path / "part" / "checkpoint-2"})
    assert torch.equal(learned(whole), learned(out))


def test_it_learns_and_says_what_it_was(train):
    out = train(max_train_steps=30, validation_steps=10, **SHORT | {"num_validation_samples": 8})
    config = json.loads((out / "zoodip_config.json").read_text())
    losses = [loss for _, loss in config["figures"]["validation_losses"]]
    assert losses[-1] < losses[0] and config["figures"]["forward_passes"] == 4 * 30
    assert config["method"].startswith("Textual Inversion by the exact gradient")
    card = (out / "README.md").read_text()
    assert "exact gradient" in card and "\n- zoodip\n" not in card


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ({"low_vram": True, "bp_view": "window"}, "--low_vram streams weights that --bp_view window looks at"),
        ({"low_resolution": 32}, "--low_resolution is the side of windows"),
        ({"unet_backend": "openvino"}, "has no backward pass"),
        ({"quantization": "quanto-int8"}, "not quanto-int8"),
        ({"torch_compile": True}, "--torch_compile compiles forward passes"),
        ({"num_perturbations": 3}, "--num_perturbations belongs to --optimizer zo_adam, this is gradient"),
        ({"perturbation_scale": 1e-3}, "belongs to --optimizer zo_adam or gauss_newton, this is gradient"),
        ({"recipe": "paper"}, "--recipe paper is one of --optimizer zo_adam"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_it_cannot_do_is_one_sentence(basics, capsys, flags, sentence):
    words = as_arguments(basics | {"--optimizer": "gradient"})
    for name, value in flags.items():
        words += [f"--{name}"] + ([] if value is True else [str(value)])
    with pytest.raises(SystemExit) as end:
        zoodip.parse_args(words)
    assert end.value.code == 2 and sentence in capsys.readouterr().err


def test_gradient_checkpointing_is_not_for_forward_passes(basics, capsys):
    with pytest.raises(SystemExit):
        zoodip.parse_args(as_arguments(basics) + ["--gradient_checkpointing"])
    assert "--gradient_checkpointing belongs to --optimizer gradient, this is zo_adam" in capsys.readouterr().err


def test_the_fast_recipe_is_it_where_there_is_a_backward_pass(basics):
    fast = basics | {"--recipe": "fast"}
    assert zoodip.parse_args(as_arguments(fast)).optimizer == "gradient"
    assert zoodip.parse_args(as_arguments(fast | {"--unet_backend": "openvino"})).optimizer == "gauss_newton"
    assert zoodip.parse_args(as_arguments(fast | {"--optimizer": "gauss_newton"})).optimizer == "gauss_newton"


def test_a_prompt_may_be_drawn_while_it_learns(train):
    out = train(
        max_train_steps=2,
        validation_steps=1,
        validation_prompt="a photo of {}",
        num_inference_steps=1,
        num_validation_images=1,
        **SHORT,
    )
    assert len(list((out / "samples").glob("*.png"))) == 1


@pytest.mark.parametrize("flags, said", [({}, True), ({"mixed_precision": "no"}, False), ({"optimizer": None}, False)])
def test_a_cpu_that_is_faster_in_bfloat16_is_said_once(flags, said, train, caplog, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    with caplog.at_level("INFO"):
        train(**{"optimizer": "gradient"} | flags)
    assert caplog.text.count("with --mixed_precision bf16 a step takes about half the time") == said
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False})
    caplog.clear()
    train(optimizer="gradient", output_dir=train.folder / "another")
    assert "bf16" not in caplog.text
