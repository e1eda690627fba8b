"""BP-low and ZO-high: gradients against autograd, which kind when, and updates against loops of one kind."""

import copy
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import as_arguments
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import save_file
from single_files import old_unet_name
from tiny_base import SIZE

import train_selective_dreambooth_lora as script
import train_zoodip_textual_inversion as zoodip
from personalization.errors import InputError
from personalization.methods import dreambooth
from personalization.models import base_model, single_file
from personalization.models.frozen import hand_gradients_through


BACKPROPAGATE = {"scaled": script.bp_low, "window": script.bp_window}
ALWAYS, NEVER = 100.0, -100.0  # midpoints of a ramp that is 1, or 0, everywhere


@pytest.fixture
def prepare(tiny):
    """The parts of a run: `Learner`, `Model`, `Subject`s by kind, `Sampling`; flags as keywords."""

    def make(**flags):
        given = {"pretrained_model_name_or_path": tiny / "base", "instance_data_dir": tiny / "pictures"}
        given |= {"subject_name": "star", "max_train_steps": 10, **flags}
        args = script.parse_args(as_arguments({f"--{name}": value for name, value in given.items()}))
        base, compute = script.resolve_settings(args, torch.device("cpu"))
        pictures = dreambooth.read_instances(args)
        texts = dreambooth.instance_texts(pictures, None, "star")
        subjects, _ = script.load_subjects(args, pictures, texts, None, base, compute)
        conditioning, _, _ = dreambooth.encode_texts(args, texts, base, compute)
        model, _ = script.load_model(args, base, compute, conditioning)
        return script.start_learner(args, model), model, subjects, script.choose_sampling(args)

    return make


def spread(learner, by=0.1):
    """Moves all adapters off their start, where the second factors are zero and the first have no gradient."""
    learner.theta += by * torch.randn(learner.theta.shape, generator=torch.Generator().manual_seed(3))


def draw(subjects, kind, sampling, model, seed=0):
    g = torch.Generator().manual_seed(seed)
    return script.draw_batch(subjects[kind], sampling, torch.ones(1000), model.scheduler, g)


def test_the_rates_follow_the_family(tiny):
    """Those of other trainers of LoRAs, and not those of the demo model, which wants twenty times as much."""
    basics = {"pretrained_model_name_or_path": tiny / "base", "instance_data_dir": tiny / "pictures"}
    for chosen, wanted in (({}, (1e-4, 1e-4)), ({"learning_rate": 2e-3}, (2e-3, 1e-4))):
        words = as_arguments({f"--{name}": value for name, value in {**basics, "subject_name": "x", **chosen}.items()})
        args = script.parse_args(words)
        script.resolve_settings(args, torch.device("cpu"))
        assert (args.learning_rate, args.zo_learning_rate) == wanted


# ------------------------------------------------------------------------------------------- layers against autograd

LAYERS = {
    "linear": (torch.nn.Linear(6, 10), (3, 5, 6)),
    "linear without bias": (torch.nn.Linear(7, 3, bias=False), (3, 7)),
    "conv": (torch.nn.Conv2d(4, 6, 3, padding=1), (3, 4, 7, 7)),
    "conv with stride": (torch.nn.Conv2d(4, 6, 3, stride=2, padding=1), (3, 4, 8, 8)),
    "conv in groups": (torch.nn.Conv2d(4, 6, 3, groups=2, dilation=2), (3, 4, 9, 9)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_frozen_layer_equals_autograd_on_the_dequantized_one(name):
    plain, shape = LAYERS[name]
    layer = zoodip.BACKENDS["int8"].new_layer(plain, torch.float32, zoodip.DequantizationBuffer())
    frozen = hand_gradients_through(layer.requires_grad_(False))
    plain = copy.deepcopy(plain).requires_grad_(False)
    plain.weight.copy_(frozen.weight * frozen.scale)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    outputs = [layer(x) for layer in (frozen, plain)]
    torch.testing.assert_close(*outputs)
    direction = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(*(torch.autograd.grad((y * direction).sum(), x)[0] for y in outputs))


def test_adapters_on_int8_have_the_gradients_of_peft_on_the_dequantized_unet(prepare, tiny):
    learner, model, subjects, sampling = prepare(train_batch_size=2)
    spread(learner)
    batch = draw(subjects, script.BP_LOW, sampling, model)
    found, loss = script.bp_low(learner, model, batch, sampling)

    plain = UNet2DConditionModel.from_pretrained(tiny / "base", subfolder="unet").requires_grad_(False)
    for layer in plain.modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            weight, scale = zoodip.quantize_per_channel(layer.weight)
            layer.weight.copy_(weight * scale)
    plain.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    weights = dict(plain.named_parameters())
    trained = [name for name, weight in model.unet.named_parameters() if weight.requires_grad]
    with torch.no_grad():
        for name, weight in zip(trained, model.weights):
            weights[name].copy_(weight)
    prediction = plain(batch.noisy_latents, batch.timesteps, model.conditioning[batch.prompt_ids]).sample
    expected = F.mse_loss(prediction, batch.target)
    gradients = torch.autograd.grad(expected, [weights[name] for name in trained])
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(found, torch.cat([g.flatten() for g in gradients]), rtol=1e-4, atol=1e-6)


def test_autograd_keeps_no_dequantized_weight(prepare, monkeypatch):
    """Beside the flagship's layers, with which it keeps nearly the whole UNet in float32."""

    def kept():
        learner, model, subjects, sampling = prepare()
        frozen = [m for m in model.unet.modules() if isinstance(m, zoodip.Int8Layer)]
        tensors = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
            model.errors(draw(subjects, script.BP_LOW, sampling, model))
        buffers = {memory.untyped_storage()._cdata for memory in frozen[0].buffer.memory.values()}
        assert not buffers & {t.untyped_storage()._cdata for t in tensors}  # the next layer overwrites it
        weights = [(m.weight * m.scale).flatten(1) for m in frozen]
        alike = [w for w in weights for t in tensors if t.numel() == w.numel() and is_weight(t, w)]
        return len({id(w) for w in alike}), len(weights)

    def is_weight(tensor, weight):
        tensor = tensor.detach()
        tensor = tensor if tensor.shape[0] == len(weight) else tensor.movedim(-1, 0)  # as it is, or transposed
        return torch.allclose(tensor.reshape(weight.shape), weight)

    assert kept()[0] == 0
    monkeypatch.setattr(script.frozen, "hand_gradients_through", lambda model: model)
    found, layers = kept()
    assert found >= layers / 2  # the gradient goes through no layer before the first adapter


@pytest.mark.parametrize("view", ["scaled", "window"])
def test_gradient_checkpointing_changes_no_gradient(prepare, view):
    found = []
    for checkpointing in (None, True):
        learner, model, subjects, sampling = prepare(bp_view=view, gradient_checkpointing=checkpointing)
        spread(learner)
        found.append(BACKPROPAGATE[view](learner, model, draw(subjects, script.BP_LOW, sampling, model), sampling)[0])
    assert torch.equal(*found) and found[0].any()


@pytest.mark.parametrize("view", ["scaled", "window"])
@pytest.mark.parametrize("quantization, precision", [("nf4", "no"), ("none", "bf16"), ("int8", "bf16")])
def test_other_backends_and_precisions_take_both_steps(prepare, quantization, precision, view):
    flags = {"quantization": quantization, "mixed_precision": precision, "bp_view": view}
    learner, model, subjects, sampling = prepare(**flags)
    assert all(weight.dtype == torch.float32 for weight in model.weights)
    for progress, kind in ((0.0, script.BP_LOW), (1.0, script.ZO_HIGH)):
        before = learner.theta.clone()
        chosen = sampling.selection._replace(over_timesteps=script.Ramp(ALWAYS, 0.1))
        chosen = chosen._replace(over_progress=script.Ramp(0.5, 1e-3))
        sampling = replace(sampling, selection=chosen)
        found, loss = script.train_step(learner, model, subjects, sampling, progress)
        assert found == kind and loss.isfinite() and learner.theta.isfinite().all()
        assert not torch.equal(before, learner.theta)


# ------------------------------------------------------------------------------------------------------------ ZO-high


def test_the_estimate_is_the_mean_of_slopes_along_its_directions():
    """Against numpy, on a loss whose differences are exact."""
    theta, calls = torch.linspace(-1, 1, 32), []

    def loss_fn(point):
        calls.append(point.clone())
        return (point**2).sum()

    kept = theta.clone()
    estimate, loss = script.zo_gradient(loss_fn, theta, 3, 0.5, torch.Generator().manual_seed(7))
    g = torch.Generator().manual_seed(7)
    e = np.stack([torch.randn(32, generator=g).numpy() for _ in range(3)]).astype(np.float64)
    point = kept.double().numpy()
    slopes = [(((point + 0.5 * d) ** 2).sum() - (point**2).sum()) / 0.5 for d in e]
    np.testing.assert_allclose(estimate, (np.array(slopes)[:, None] * e).mean(axis=0), rtol=1e-4, atol=1e-4)
    assert len(calls) == 4 and torch.equal(calls[0], kept) and torch.equal(theta, kept)
    assert loss == (kept**2).sum()


def test_the_mean_of_many_estimates_is_autograds_gradient(prepare):
    flags = {"rank": 1, "num_perturbations": 1500, "quantization": "int8"}
    learner, model, subjects, sampling = prepare(**flags)
    spread(learner)
    batch = draw(subjects, script.ZO_HIGH, sampling, model)
    estimate, loss = script.zo_high(learner, model, batch, sampling)
    gradient, expected = script.bp_low(learner, model, batch, sampling)
    assert F.cosine_similarity(estimate, gradient, dim=0) > 0.9
    torch.testing.assert_close(loss, expected)
    assert 0.7 < estimate.norm() / gradient.norm() < 1.4  # brought to the gradient's length, whatever n is


def test_estimating_moves_no_bit_of_the_adapters(prepare):
    learner, model, subjects, sampling = prepare()
    spread(learner)
    before = learner.theta.clone()
    for seed in range(3):
        script.zo_high(learner, model, draw(subjects, script.ZO_HIGH, sampling, model, seed), sampling)
    assert torch.equal(learner.theta, before)
    flat = torch.cat([weight.flatten() for weight in model.weights])
    assert torch.equal(flat, before)
    start, end = learner.theta.data_ptr(), learner.theta.data_ptr() + 4 * len(before)
    assert all(start <= weight.data_ptr() < end for weight in model.weights)  # views again: there is no second copy


def test_bp_is_never_at_full_resolution_and_zo_never_records(prepare):
    learner, model, subjects, sampling = prepare(num_perturbations=2, bp_timestep_midpoint=0.5)
    seen = []

    def watch(unet, args):
        seen.append((args[0].shape[-1], torch.is_grad_enabled(), torch.is_inference_mode_enabled()))

    model.unet.register_forward_pre_hook(watch)
    kinds = [script.train_step(learner, model, subjects, sampling, 0.5)[0] for _ in range(16)]
    assert set(kinds) == set(script.KINDS)
    low, high = SIZE // 4, SIZE // 2  # latents of the tiny base are half as large as its pictures
    expected = [(low, True, False)] * kinds.count(script.BP_LOW) + [(high, False, True)] * 3 * kinds.count("zo_high")
    assert sorted(seen) == sorted(expected)
    assert learner.updates == {kind: kinds.count(kind) for kind in script.KINDS}


# ------------------------------------------------------------------------------------------------------ windows


@pytest.mark.parametrize("quantization", ["int8", "none"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_window_predicts_what_the_whole_picture_does_there(prepare, quantization, checkpointing):
    flags = {"bp_view": "window", "train_batch_size": 3, "quantization": quantization}
    flags |= {"gradient_checkpointing": True} if checkpointing else {}
    learner, model, subjects, sampling = prepare(**flags)
    spread(learner)
    batch, surroundings = draw(subjects, script.BP_LOW, sampling, model), model.surroundings
    whole, height = predict(model, batch), batch.noisy_latents.shape[2]
    inner = [(grid := surroundings.grid, 0), (0, height - surroundings.side), (grid, 2 * grid)]  # not only tiles
    inside = script.windows.Windows(inner, surroundings.side, height, height)
    generator = torch.Generator().manual_seed(0)
    for drawn in (inside, *(surroundings.draw_windows(batch.noisy_latents, generator) for _ in range(3))):
        with torch.no_grad(), surroundings.kept(drawn):
            assert torch.equal(predict(model, batch), whole)
        with surroundings.standing_in():
            parts = predict(model, batch._replace(noisy_latents=drawn.of(batch.noisy_latents)))
        for part, one, (top, left) in zip(parts, whole, drawn.corners):
            expected = one[:, top : top + drawn.side, left : left + drawn.side]
            torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(predict(model, batch), whole)  # nothing stays


@pytest.mark.parametrize("height, width", [(16, 16), (16, 24), (20, 12), (8, 8)])
def test_every_entry_of_a_picture_counts_alike_in_what_is_drawn(height, width):
    """By expectation: the weighed windows of 4,000 draws add up to nearly the same everywhere, edges included."""
    surroundings = script.windows.Surroundings(
        SimpleNamespace(config=SimpleNamespace(block_out_channels=[1, 1, 1]), modules=list), 8
    )
    latents, generator = torch.zeros(4000, 1, height, width), torch.Generator().manual_seed(0)
    drawn = surroundings.draw_windows(latents, generator)
    weights = surroundings.weigh(torch.empty(4000, 0), drawn)
    weights = torch.ones(4000, 1, 8, 8) if weights.numel() == 0 else weights
    assert (height % 8, width % 8) == (0, 0) or weights.std() > 0
    seen = torch.zeros(height, width)
    for (top, left), square in zip(drawn.corners, weights[:, 0].square()):
        assert top % surroundings.grid == left % surroundings.grid == 0
        seen[top : top + 8, left : left + 8] += square * height * width / 64 / 4000
    assert (seen - 1).abs().max() < 0.15, seen
    masks = torch.rand(4000, 1, height, width, generator=generator)  # with a mask, its weights come on top
    torch.testing.assert_close(surroundings.weigh(masks, drawn), weights * drawn.of(masks))


def predict(model, batch):
    with torch.enable_grad():
        conditioning = model.conditioning[batch.prompt_ids]
        return model.unet(batch.noisy_latents, batch.timesteps, conditioning, return_dict=False)[0].detach()


def test_the_window_of_a_whole_picture_gives_its_gradient(prepare):
    flags = {"low_resolution": SIZE, "train_batch_size": 2}
    found = []
    for view in ("scaled", "window"):
        learner, model, subjects, sampling = prepare(bp_view=view, **flags)
        spread(learner)
        found.append(BACKPROPAGATE[view](learner, model, draw(subjects, script.BP_LOW, sampling, model), sampling))
    (gradient, loss), (through_windows, loss_of_windows) = found
    assert loss_of_windows.item() == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(through_windows, gradient, rtol=1e-3, atol=1e-6)


def test_gradients_of_all_windows_sum_up_to_nearly_that_of_the_picture(prepare):
    """On a trained model: what leaves a window and comes back is little."""
    demo = Path(__file__).parent.parent / "demo"
    data = {"instance_data_dir": demo / "subjects" / "twotone_moon", "train_batch_size": 2, "bp_view": "window"}
    learner, model, subjects, sampling = prepare(pretrained_model_name_or_path=demo / "base", **data)
    spread(learner, by=0.02)
    batch, surroundings = draw(subjects, script.BP_LOW, sampling, model), model.surroundings
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(model.errors(batch).mean(), model.weights)])
    total, (height, width) = torch.zeros_like(exact), batch.noisy_latents.shape[2:]
    for corner in itertools.product(range(0, height, surroundings.side), range(0, width, surroundings.side)):
        windows = script.windows.Windows([corner] * len(batch.timesteps), surroundings.side, height, width)
        total += script.bp_window(learner, model, batch, sampling, windows)[0] / 4
    assert torch.nn.functional.cosine_similarity(total, exact, dim=0) > 0.85
    assert total.norm().item() == pytest.approx(exact.norm().item(), rel=0.3)


def test_a_unet_with_other_layers_cannot_be_seen_through_windows():
    unet = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.Conv2d(4, 4, 1), torch.nn.GroupNorm(2, 4))
    script.windows.check_layers(unet)
    for layer in (torch.nn.Conv2d(4, 4, 3, stride=2), torch.nn.Conv2d(4, 4, 5, padding=2)):
        with pytest.raises(InputError, match=r"'3', Conv2d\): give --bp_view scaled"):
            script.windows.check_layers(torch.nn.Sequential(*unet, layer))


def test_autograd_keeps_the_activations_of_a_window(prepare):
    kept = {}
    for view in ("scaled", "window"):
        learner, model, subjects, sampling = prepare(
            bp_view=view, low_resolution=SIZE // 2 if view == "window" else SIZE
        )
        sizes = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            BACKPROPAGATE[view](learner, model, draw(subjects, script.BP_LOW, sampling, model), sampling)
        kept[view] = sum(sizes)
    assert kept["window"] < 0.6 * kept["scaled"], kept


# ------------------------------------------------------------------------------------------------------ which one when

ramps = st.tuples(st.floats(-2, 2), st.floats(0.01, 2))
shares = st.floats(0, 1)


@settings(deadline=None)
@given(ramps, ramps, shares, shares, shares)
def test_the_probability_falls_with_timestep_and_progress(over_timesteps, over_progress, fixed, one, other):
    selection = script.Selection(script.Ramp(*over_timesteps), script.Ramp(*over_progress))
    low, high = sorted((one, other))
    assert 0 <= selection.bp_probability(high, fixed) <= selection.bp_probability(low, fixed) <= 1
    assert selection.bp_probability(fixed, high) <= selection.bp_probability(fixed, low)


def test_the_probability_is_the_product_of_two_logistic_ramps():
    selection = script.Selection(script.Ramp(0.6, 0.1), script.Ramp(0.7, 0.2))
    expected = 1 / (1 + np.exp((0.5 - 0.6) / 0.1)) / (1 + np.exp((0.9 - 0.7) / 0.2))
    assert selection.bp_probability(0.5, 0.9).item() == pytest.approx(expected, rel=1e-12)
    switched_off = script.Selection(script.Ramp(ALWAYS, 0.1), script.Ramp(ALWAYS, 0.1))
    never = script.Selection(script.Ramp(NEVER, 0.1), script.Ramp(ALWAYS, 0.1))
    assert switched_off.bp_probability(0.999, 1.0) == 1 and never.bp_probability(0, 0) == 0


def test_drawn_shares_match_the_probability():
    """Each example's timestep is uniform, and given that it is learned from by BP-low with probability p."""
    selection = script.Selection(script.Ramp(0.5, 0.15), script.Ramp(0.6, 0.2))
    p = selection.bp_probability(torch.arange(1000) / 1000, 0.4)
    choice, data = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    of_kind = {True: torch.zeros(1000), False: torch.zeros(1000)}
    for _ in range(20_000):
        is_bp, weights = script.draw_kind(p, choice)
        drawn = torch.multinomial(weights, 4, replacement=True, generator=data)
        of_kind[is_bp] += torch.bincount(drawn, minlength=1000)
    bp, both = (x.view(10, 100).sum(dim=1) for x in (of_kind[True], of_kind[True] + of_kind[False]))
    assert (both / 8000).sub(1).abs().max() < 0.1  # uniform
    assert (bp / both - p.view(10, 100).mean(dim=1)).abs().max() < 0.03
    assert bp.sum() / both.sum() == pytest.approx(p.mean().item(), abs=0.015)


# ---------------------------------------------------------------------------------------- one kind alone, to the bit


def pure_loop(kind, learner, model, subjects, sampling, steps, n, scale, seeds):
    """One method by itself, written with nothing but PyTorch: no choice, no second optimizer."""
    theta = learner.theta.clone()
    optimizer = torch.optim.AdamW([theta], lr={"bp_low": 1e-2, "zo_high": 3e-3}[kind], weight_decay=1e-4, eps=1e-8)
    data, directions = (torch.Generator().manual_seed(seed) for seed in seeds)
    for _ in range(steps):
        batch = script.draw_batch(subjects[kind], sampling, torch.ones(1000).double(), model.scheduler, data)
        torch.nn.utils.vector_to_parameters(theta, model.weights)
        if kind == "bp_low":
            gradients = torch.autograd.grad(model.errors(batch).mean(), model.weights)
            theta.grad = torch.cat([g.flatten() for g in gradients])
        else:
            with torch.no_grad():
                base = model.errors(batch).mean()
                gradient = torch.zeros_like(theta)
                for _ in range(n):
                    e = torch.randn(theta.shape, generator=directions)
                    torch.nn.utils.vector_to_parameters(theta + scale * e, model.weights)
                    gradient += e * ((model.errors(batch).mean() - base) / scale / n)
            theta.grad = gradient / ((len(theta) + n - 1) / n) ** 0.5
        optimizer.step()
    return theta


@pytest.mark.parametrize("kind, midpoint", [("bp_low", ALWAYS), ("zo_high", NEVER)])
def test_with_p_one_or_zero_a_run_is_the_pure_method_to_the_bit(prepare, kind, midpoint):
    flags = {"learning_rate": 1e-2, "zo_learning_rate": 3e-3, "num_perturbations": 3, "max_grad_norm": 1e9}
    flags |= {"bp_timestep_midpoint": midpoint, "bp_progress_midpoint": ALWAYS, "train_batch_size": 2}
    flags |= {"perturbation_scale": 1e-2}
    learner, *parts = prepare(**flags)
    seeds = learner.data.initial_seed(), learner.perturbations.initial_seed()
    _, model, subjects, sampling = parts_of_another = prepare(**flags)
    expected = pure_loop(kind, *parts_of_another, 5, 3, 1e-2, seeds)
    start = learner.theta.clone()
    kinds = [script.train_step(learner, *parts, step / 5)[0] for step in range(5)]
    assert kinds == [kind] * 5 and not torch.equal(start, learner.theta)
    assert torch.equal(learner.theta, expected)


def test_accumulated_batches_are_averaged(prepare):
    flags = {"bp_timestep_midpoint": ALWAYS, "bp_progress_midpoint": ALWAYS, "gradient_accumulation_steps": 3}
    learner, model, subjects, sampling = prepare(**flags, max_grad_norm=1e9)
    g = torch.Generator().manual_seed(learner.data.initial_seed())
    uniform = torch.ones(1000).double()
    batches = [script.draw_batch(subjects["bp_low"], sampling, uniform, model.scheduler, g) for _ in range(3)]
    loss = torch.stack([model.errors(batch).mean() for batch in batches]).mean()
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.weights)])
    seen, optimizer = [], learner.optimizers["bp_low"]
    optimizer.register_step_pre_hook(lambda *_: seen.append(learner.theta.grad.clone()))
    found = script.train_step(learner, model, subjects, sampling, 0.0)[1]
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(seen[0], wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("midpoint", [ALWAYS, NEVER], ids=["bp_low", "zo_high"])
def test_long_gradients_are_shortened(prepare, midpoint):
    learner, *parts = prepare(bp_timestep_midpoint=midpoint, bp_progress_midpoint=midpoint, max_grad_norm=1e-4)
    seen = []
    for optimizer in learner.optimizers.values():
        optimizer.register_step_pre_hook(lambda *_: seen.append(learner.theta.grad.norm().item()))
    script.train_step(learner, *parts, 0.0)
    assert seen == [pytest.approx(1e-4, rel=1e-3)]


# ---------------------------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize("name", ["diffusers", "kohya"])
def test_an_untouched_pipeline_predicts_the_same_with_the_adapters(prepare, tiny, tmp_path, name):
    """alpha is not the rank: it is in the matrices, so that nobody needs to know it."""
    learner, model, _, _ = prepare(quantization="none", rank=2, lora_alpha=6)
    spread(learner)
    if name == "kohya":
        save_file(script.kohya_tensors(model.unet), tmp_path / "weights.safetensors")
    else:
        (tmp_path / "weights.safetensors").write_bytes(script.adapter_content(model.unet))
    pipeline = StableDiffusionPipeline.from_pretrained(tiny / "base")
    g = torch.Generator().manual_seed(0)
    sample, text = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 32, 16, generator=g)
    with torch.no_grad():
        ours, before = (unet(sample, torch.tensor(500), text).sample for unet in (model.unet, pipeline.unet))
        pipeline.load_lora_weights(tmp_path, weight_name="weights.safetensors")
        torch.testing.assert_close(pipeline.unet(sample, torch.tensor(500), text).sample, ours, rtol=1e-5, atol=1e-6)
    assert (before - ours).abs().max() > 1e-3


def as_automatic1111(name):
    """The layer of the original model that Automatic1111 looks up for a LoRA's key, where blocks have 2 layers."""
    way, i, j, rest = re.fullmatch(r"lora_unet_(down|up)_blocks_(\d+)_attentions_(\d+)_(.+)", name).groups()
    number, half = 3 * int(i) + int(j), {"down": "input", "up": "output"}[way]
    return f"diffusion_model_{half}_blocks_{number + (way == 'down')}_1_{rest}"


def test_the_names_of_layers_are_those_that_automatic1111_and_comfyui_look_up():
    """On the real architecture: ComfyUI makes its names of diffusers' layers, Automatic1111 of the original ones."""
    config = json.loads((single_file.CONFIGS / "sd1" / "unet" / "config.json").read_text())
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    layers = [name for name, _ in unet.named_modules() if name.endswith(("to_k", "to_q", "to_v", "to_out.0"))]
    adapters = {f"unet.{layer}.lora_{half}.weight": torch.zeros(1, 1) for layer in layers for half in "AB"}
    kohya = script.convert_state_dict_to_kohya(adapters)  # as `kohya_tensors` writes them
    names = {name.removesuffix(".alpha") for name in kohya if name.endswith(".alpha")}
    assert len(names) == len(layers) == 128
    assert names == {"lora_unet_" + layer.replace(".", "_") for layer in layers}
    old = {old_unet_name(f"{layer}.weight", 2, lambda i: i > 0).removesuffix(".weight") for layer in layers}
    middle = {name for name in names if "mid_block" in name}
    found = {as_automatic1111(name) for name in names - middle}
    found |= {name.replace("lora_unet_mid_block_attentions_0", "diffusion_model_middle_block_1") for name in middle}
    assert found == {"diffusion_model_" + name.replace(".", "_") for name in old}


# ---------------------------------------------------------------------------------------------------------- bad input


def test_low_resolutions():
    assert base_model.check_low_resolution(None, 64, 8) == 32
    assert base_model.check_low_resolution(64, 64, 8) == 64  # backpropagation at full size, the ceiling
    for low, high, expected in [
        (72, 64, "--low_resolution 72 is above --resolution 64: give at most that"),
        (36, 64, "--low_resolution 36 must be divisible by 8 for this model: try --low_resolution 32"),
        (None, 72, "half of --resolution 72, 36, must be divisible by 8 for this model: try --low_resolution 32"),
        (None, 8, "half of --resolution 8, 4, must be divisible by 8 for this model: try --low_resolution 8"),
    ]:
        with pytest.raises(InputError, match=expected):
            base_model.check_low_resolution(low, high, 8)
