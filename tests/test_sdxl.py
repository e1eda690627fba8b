"""SDXL: words as pairs, trained, saved and drawn with; on a tiny random base that has SDXL's peculiarities."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import as_arguments, short_run
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_base import build_pictures, build_tiny_base, build_tiny_xl_base
from transformers import CLIPTextModel, CLIPTextModelWithProjection

import evaluate_personalization as evaluate
import train_tuneqdm_dreambooth as tuneqdm
import train_zoodip_textual_inversion as zoodip
from benchmarks import baselines
from personalization.data import examples, images, prompts
from personalization.errors import InputError
from personalization.models import families
from personalization.models.base_model import ModelSource, open_base
from personalization.runs import hub


TOKEN, CPU = "<my-toy>", torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl")
    build_tiny_base(folder / "sd")
    build_tiny_xl_base(folder / "xl")
    build_pictures(folder / "pictures")
    return folder


@pytest.fixture
def flags(place, tmp_path):
    """The shortest command line of a run on the base, as a dict; of another with flags(name=value)."""

    def make(**more):
        basics = short_run(place / "xl", place / "pictures", place / "cache", tmp_path / "out", "star")
        return basics | {f"--{name}": value for name, value in more.items()}

    return make


@pytest.fixture
def train(flags, tmp_path):
    def run(**more):
        chosen = flags(**more)
        zoodip.main(zoodip.parse_args(as_arguments(chosen)))
        return chosen["--output_dir"]

    return run


def assembled(flags, **more):
    """(args, base, placeholder, model, θ's start `[k, d]`, `Concept`) of a run, by the script's own chapters."""
    args = zoodip.parse_args(as_arguments(flags(**more)))
    base, placeholder, compute = zoodip.resolve_settings(args, CPU)
    pictures = zoodip.read_pictures(args)
    captions = prompts.build_prompts(pictures, placeholder, base)
    concept, _ = examples.load_concept(pictures, captions, base, args.flip_probability, compute)
    networks = zoodip.load_networks(args, base, compute)[:2]
    model, start = zoodip.assemble_model(args, base, placeholder, concept.prompt_ids, *networks, compute)
    return args, base, placeholder, model, start.repeat(args.num_vectors, 1), concept


# ---------------------------------------------------------------------------------------------------------- training


def autograds_gradient(folder, theta, batch, first_id, width):
    """Loss and its gradient `[k, d]` by backpropagation through transformers' and diffusers' own models."""
    first = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    second = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", dtype=torch.float32)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", dtype=torch.float32)
    theta, found = theta.clone().requires_grad_(True), []
    for encoder, half, ids in zip(
        (first, second), theta.split([width, theta.shape[1] - width], 1), batch[3].chunk(2, 1)
    ):
        name = next(n for n, _ in encoder.named_parameters() if n.endswith("token_embedding.weight"))
        table = torch.cat([encoder.get_input_embeddings().weight[:first_id].detach(), half])
        found.append(torch.func.functional_call(encoder, {name: table}, (ids,), {"output_hidden_states": True}))
    states = torch.cat([output.hidden_states[-2] for output in found], dim=2)
    added = {"text_embeds": found[1].text_embeds, "time_ids": batch.size_ids}
    prediction = unet(batch.noisy_latents, batch.timesteps, states, added_cond_kwargs=added).sample
    loss = torch.nn.functional.mse_loss(prediction, batch.target)
    return loss.item(), torch.autograd.grad(loss, theta)[0]


@pytest.mark.parametrize("num_vectors", [1, 2])
def test_mean_estimate_points_along_autograds_gradient_for_both_halves(flags, place, num_vectors):
    args, base, placeholder, model, theta, concept = assembled(flags, quantization="none", num_vectors=num_vectors)
    sampling = zoodip.Sampling(700, 900, batch_size=2)
    batch = zoodip.draw_batch(concept, sampling, model.scheduler, torch.Generator().manual_seed(0))
    assert batch.size_ids.shape == (2, 6)
    loss, gradient = autograds_gradient(place / "xl", theta, batch, placeholder.first_id, base.word_widths[0])
    for number, encoder in enumerate(model.text_encoder.encoders):
        encoder.set_input_embeddings(room(placeholder, base, number, batch))
    model.max_candidates, generator, total = 101, torch.Generator().manual_seed(1), torch.zeros_like(theta)
    with torch.inference_mode():
        assert model.losses(theta[None], batch).item() == pytest.approx(loss, rel=1e-5)
        for _ in range(20):
            total += zoodip.estimate_gradient(lambda c: model.losses(c, batch), theta, 200, 1e-2, generator)[0]
    for half, wanted in zip(total.split(base.word_widths, 1), gradient.split(base.word_widths, 1)):
        assert wanted.norm() > 1e-6
        assert torch.cosine_similarity(half.flatten(), wanted.flatten(), dim=0) > 0.95


def test_the_official_loop_extended_to_sdxl_estimates_the_same(flags, place):
    """What step times are compared with computes what the script computes, of the same batch and directions."""
    _, base, placeholder, model, theta, _ = assembled(flags, quantization="none")
    loop = baselines.OfficialLoop(baselines.load_models(place / "xl"), 16, initializer_id=placeholder.initializer_id)
    batch = loop.draw_batch(700, 900)
    assert loop.placeholder_id == placeholder.first_id and torch.equal(loop.theta, theta)
    for number, encoder in enumerate(model.text_encoder.encoders):
        encoder.set_input_embeddings(room(placeholder, base, number, batch))
    directions = torch.randn(2, *theta.shape, generator=torch.Generator().manual_seed(3))
    found, loss = loop.estimate(batch, directions)
    with torch.inference_mode():
        steps = torch.cat([theta[None], theta + loop.mu * directions])
        losses = model.losses(steps, batch)
        wanted = torch.tensordot((losses[1:] - losses[0]) / loop.mu, directions, dims=1) / 2
    assert loss.item() == pytest.approx(losses[0].item(), rel=1e-5)
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=1e-3)


def room(placeholder, base, number, batch):
    """The token rows of an encoder with room for 101 candidates."""
    table = zoodip.base_model.load_token_tables(base)[number]
    ids = batch.prompt_ids.chunk(2, dim=1)[number]
    return zoodip.PromptRows(table, ids, placeholder.first_id, 101 * placeholder.num_vectors, "cpu", torch.float32)


def test_a_word_starts_from_the_word_in_each_encoder_and_both_halves_move(train, place):
    out = train(num_vectors=2, learning_rate=1e-2, sg_window=2)
    content = load_file(out / "learned_embeds.safetensors")
    word = open_base(ModelSource(str(place / "sd"))).tokenizer.convert_tokens_to_ids("star</w>")
    for key, component in (("clip_l", "text_encoder"), ("clip_g", "text_encoder_2")):
        table = load_file(place / "xl" / component / "model.safetensors")
        (table,) = [value for name, value in table.items() if name.endswith("token_embedding.weight")]
        moved = (content[key] - table[word]).abs().amax(dim=1)
        assert content[key].shape == (2, table.shape[1]) and (0 < moved).all() and (moved < 0.1).all()


@pytest.mark.parametrize(
    "more",
    [
        {"optimizer": "gauss_newton", "gn_subspace_dimension": 4, "num_vectors": 2},
        {"quantization": "nf4"},
        {"quantization": "quanto-int8"},
        {"low_vram": True, "pool_at_eos": True},
        {"mixed_precision": "bf16", "train_batch_size": 2, "save_as_full_pipeline": True},
    ],
    ids=lambda flags: next(iter(flags.values())),
)
def test_every_way_to_train_trains_it(train, more):
    out = train(**more)
    content = load_file(out / "learned_embeds.safetensors")
    assert all(half.isfinite().all() for half in content.values())
    config = json.loads((out / "zoodip_config.json").read_text())
    assert config["components"]["text_encoder"]["quantized_share"] > 0.2 and config["family"] == "sdxl"
    if "save_as_full_pipeline" in more:
        full = StableDiffusionXLPipeline.from_pretrained(out / "pipeline")
        assert {TOKEN} <= set(full.tokenizer.get_vocab()) & set(full.tokenizer_2.get_vocab())


@pytest.mark.parametrize("quantization", ["int8", "nf4", "quanto-int8"])
def test_both_text_encoders_are_quantized(flags, quantization):
    *_, model, _, _ = assembled(flags, quantization=quantization)
    for encoder in (*model.text_encoder.encoders, model.denoiser):
        assert not any(type(module) is torch.nn.Linear for module in encoder.modules())


def test_openvino_predicts_what_pytorch_predicts(flags, train):
    pytest.importorskip("openvino")
    losses = []
    for backend in ("torch", "openvino"):
        _, _, _, model, theta, concept = assembled(flags, unet_backend=backend)
        batch = zoodip.draw_batch(
            concept, zoodip.Sampling(700, 900, 2), model.scheduler, torch.Generator().manual_seed(0)
        )
        with torch.inference_mode():
            losses.append(model.losses(torch.stack([theta, 2 * theta]), batch))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    drawn = train(unet_backend="openvino", validation_prompt="a {}", num_validation_images=1, num_inference_steps=1)
    assert (drawn / "samples" / "image_0.png").is_file()


def test_the_vae_encodes_in_float32_whatever_computes(flags, monkeypatch):
    seen, load = [], examples.load_vae_encoder
    monkeypatch.setattr(examples, "load_vae_encoder", lambda base, dtype: seen.append(dtype) or load(base, dtype))
    assembled(flags, mixed_precision="bf16")
    assert seen == [torch.float32]


def test_the_settings_of_the_paper_follow_the_family(flags, place):
    args = zoodip.parse_args(as_arguments(flags()))
    zoodip.resolve_settings(args, CPU)
    found = args.puts_min_timestep, args.puts_max_timestep, args.perturbation_scale, args.learning_rate
    assert found == (700, 900, 1e-2, 5e-3) and args.center_crop
    for family, wanted in ((families.SD1, (500, 900, None, 5e-3)), (families.SD2, (500, 900, 1e-2, 1e-2))):
        args = zoodip.parse_args(as_arguments(flags()))
        zoodip.complete_for_family(args, family)
        assert (args.puts_min_timestep, args.puts_max_timestep, args.perturbation_scale, args.learning_rate) == wanted
    given = zoodip.parse_args(as_arguments(flags(puts_min_timestep=0, perturbation_scale=3e-3)))
    zoodip.complete_for_family(given, families.SDXL)
    assert (given.puts_min_timestep, given.perturbation_scale) == (0, 3e-3)
    for width, family in ((1024, families.SD2), (768, families.SD1)):
        configs = {"text_encoder": {"hidden_size": width}}
        assert families.recognise({"unet": []}, configs, families.FAMILIES.values(), "it") is family
    assert families.SDXL.defaults("zo_adam")["max_train_steps"] == 20_000


def test_the_model_is_told_sizes_and_the_crops_true_offset(tmp_path, flags):
    pixels = np.zeros((30, 72, 3), dtype=np.uint8)
    pixels[:, 40:] = 255  # white from x = 40 on
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side: upright it is 72 high and 30 wide
    (tmp_path / "pictures").mkdir()
    Image.fromarray(pixels).save(tmp_path / "pictures" / "a.png")
    Image.fromarray(pixels).save(tmp_path / "pictures" / "b.png", exif=exif)
    wide, upright = images.read_folder(tmp_path / "pictures", 16, center_crop=True)
    # 30 px become 16, so 72 become 38, of which the middle 16 begin at 11
    assert examples.describe_sizes(wide.framing) == [30, 72, 0, 11, 16, 16]
    assert examples.describe_sizes(upright.framing) == [72, 30, 11, 0, 16, 16]
    edge = int((wide.pixels[0, 8] > 127).int().argmax())
    assert edge == pytest.approx(40 * 16 / 30 - 11, abs=1)  # where the white begins says where the crop lies
    framing = images.Framing((20, 41), (16, 33), (0, 8), (16, 16))
    assert examples.describe_sizes(framing, flipped=True) == [20, 41, 0, 9, 16, 16]
    squeezed, _ = images.read_folder(tmp_path / "pictures", 16, center_crop=False)
    assert examples.describe_sizes(squeezed.framing) == [30, 72, 0, 0, 16, 16]
    *_, concept = assembled(flags, train_data_dir=tmp_path / "pictures")
    assert concept.size_ids.tolist()[0] == [[30, 72, 0, 11, 16, 16], [72, 30, 11, 0, 16, 16]]


def test_sizes_reach_the_unet_as_they_are_described():
    """Height, width, top, left, height, width, in the order of diffusers' `_get_add_time_ids`."""
    told = {}

    def unet(noisy, timesteps, states, added_cond_kwargs, return_dict):
        told.update(added_cond_kwargs)
        return (noisy,)

    text, sizes = families.Text(torch.zeros(1, 4, 8), torch.ones(1, 6)), torch.tensor([[30, 72, 0, 11, 16, 24]])
    families.SDXL.predict(unet, torch.zeros(1, 4, 2, 3), torch.tensor([500]), text, sizes)
    assert told["time_ids"].tolist() == sizes.tolist() and told["text_embeds"] is text.pooled


RESUME = {"--resume_from_checkpoint": "latest"}


def test_launch_resume_and_the_same_picture_everywhere(launch, flags, place, repo, tmp_path):
    more = {"max_train_steps": 6, "checkpointing_steps": 2, "num_vectors": 2, "sg_window": 3, "save_steps": 3}
    more |= {"validation_prompt": "a {} on the beach!", "num_inference_steps": 2, "num_validation_images": 1}
    more["resolution"] = 32
    chosen, parts = flags(**more), tmp_path / "parts"
    assert launch(*as_arguments(chosen)).stderr.count("Traceback") == 0
    out = chosen["--output_dir"]
    shutil.copytree(out / "checkpoint-4", parts / "checkpoint-4")  # as if killed after it
    assert "Resumed from" in launch(*as_arguments(flags(**more, output_dir=parts) | RESUME)).stderr
    names = [f"learned_embeds{end}.safetensors" for end in ("", "_1", "_2")]
    for name in names:
        assert (out / name).read_bytes() == (parts / name).read_bytes(), name

    plain = plain_pipeline(place / "xl", out)
    code = {"custom_pipeline": f"{repo}/zoodip_xl_pipeline.py", "trust_remote_code": True}
    own = DiffusionPipeline.from_pretrained(place / "xl", **code, learned_embeds=out)
    assert type(own).__name__ == "ZOODiPXLPipeline" and list(own.concepts) == [TOKEN]
    assert np.array_equal(draw(plain), draw(own))
    before = draw(own, "a star")
    assert not np.array_equal(draw(own), before)
    own.save_pretrained(tmp_path / "saved")
    assert np.array_equal(draw(StableDiffusionXLPipeline.from_pretrained(tmp_path / "saved")), draw(plain))
    own.unload_learned_embeds(TOKEN)
    assert not own.concepts and not any(TOKEN in t.get_vocab() for t in (own.tokenizer, own.tokenizer_2))
    assert np.array_equal(draw(own, "a star"), before)
    card = (out / "README.md").read_text()
    calls = [line for line in card.splitlines() if line.startswith("pipeline.load_textual_inversion")]
    assert len(calls) == 2 and "learned_embeds_1.safetensors" in calls[0] and "**second" in calls[1]
    assert (
        "- stable-diffusion-xl\n" in card
        and "StableDiffusionXLPipeline" in card
        and "zoodip_xl_pipeline.py" in card
        and "clip_g" in card
    )


def plain_pipeline(base, out):
    """Plain diffusers, as the model card says."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    first = {"text_encoder": pipeline.text_encoder, "tokenizer": pipeline.tokenizer}
    second = {"text_encoder": pipeline.text_encoder_2, "tokenizer": pipeline.tokenizer_2}
    pipeline.load_textual_inversion(str(out), weight_name="learned_embeds_1.safetensors", **first)
    pipeline.load_textual_inversion(str(out), weight_name="learned_embeds_2.safetensors", **second)
    return pipeline


def draw(pipeline, prompt=f"a {TOKEN} on the beach"):
    pipeline.set_progress_bar_config(disable=True)
    options = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "np"}
    return pipeline(prompt, generator=torch.Generator().manual_seed(0), **options).images


# ------------------------------------------------------------------------------------------------------- conditioning


@pytest.mark.parametrize("pool_at_eos", [False, True])
@pytest.mark.parametrize("prompt", ["a {} on the beach", "wow! a red {}!!"])
def test_training_our_pipeline_and_plain_diffusers_compute_the_same_conditioning(
    train, flags, place, repo, pool_at_eos, prompt
):
    kind = {"quantization": "none", "num_vectors": 2, "pool_at_eos": pool_at_eos or None}
    kind["validation_prompt"] = prompt  # so that its words are among the rows
    out = train(**kind, num_validation_images=1, num_inference_steps=1)
    _, base, placeholder, model, _, _ = assembled(flags, **kind)
    halves = load_file(out / "learned_embeds.safetensors")
    model.text_encoder.get_input_embeddings().write(torch.cat([halves["clip_l"], halves["clip_g"]], dim=1)[None])
    ids = base.tokenize([placeholder.expand(prompt)])
    with torch.no_grad():
        states, pooled, _ = model.text_encoder(ids)
    code = {"custom_pipeline": f"{repo}/zoodip_xl_pipeline.py", "trust_remote_code": True}
    plain = plain_pipeline(place / "xl", out)
    if pool_at_eos:  # as the model card says
        plain.text_encoder_2.text_model.eos_token_id = plain.tokenizer_2.eos_token_id
    for pipeline in (plain, DiffusionPipeline.from_pretrained(place / "xl", **code, learned_embeds=str(out))):
        found = pipeline.encode_prompt(prompt.replace("{}", TOKEN), device=CPU, do_classifier_free_guidance=False)
        assert torch.equal(found[0], states) and torch.equal(found[2], pooled)

    # And where it is pooled: the place is read off the ids.
    second = ids.chunk(2, dim=1)[1][0].tolist()
    at = second.index(base.tokenizer.eos_token_id) if pool_at_eos else second.index(placeholder.first_id + 1)
    with torch.no_grad():
        last = plain.text_encoder_2.text_model(ids.chunk(2, dim=1)[1]).last_hidden_state[:, at]
        torch.testing.assert_close(plain.text_encoder_2.text_projection(last), pooled)


# -------------------------------------------------------------------------------------------- what others read, refuse


def comfyui_reads(path, key, width):
    """ComfyUI's rule: `string_to_param`, else the encoder's key, else the first tensor; another width is skipped."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if "string_to_param" in tensors:
        found = next(iter(tensors["string_to_param"].values()))
    else:
        found = tensors[key] if key in tensors else next(iter(tensors.values()))
    return found if found.shape[-1] == width else None


def test_programs_around_sdxl_read_both_halves(train):
    out = train(num_vectors=2)
    for name in ("learned_embeds.safetensors", "learned_embeds-best.safetensors"):
        assert comfyui_reads(out / name, "clip_l", 16).shape == (2, 16)
        assert comfyui_reads(out / name, "clip_g", 24).shape == (2, 24)
    halves = load_file(out / "learned_embeds.safetensors")
    for number, key in (1, "clip_l"), (2, "clip_g"):
        assert torch.equal(load_file(out / f"learned_embeds_{number}.safetensors")[TOKEN], halves[key])
    with safe_open(out / "learned_embeds.safetensors", framework="pt") as file:
        assert file.metadata()["placeholder_token"] == TOKEN
    config = json.loads((out / "zoodip_config.json").read_text())
    pushed = hub._names_to_push(out, config, zoodip.PUBLICATION)
    assert {"learned_embeds.safetensors", "learned_embeds_1.safetensors", "learned_embeds_2.safetensors"} <= set(
        pushed
    )
    assert "class ZOODiPXLPipeline" in (out / "pipeline.py").read_text()


def test_concepts_of_another_family_are_refused(train, place, repo, tmp_path):
    xl, sd = train(), train(pretrained_model_name_or_path=place / "sd", output_dir=tmp_path / "sd")
    for base, name, concept, sentence in (
        ("xl", "zoodip_xl_pipeline", sd, "not clip_l and clip_g.* goes with zoodip_pipeline.py"),
        ("sd", "zoodip_pipeline", xl, "such as those of SDXL, do not fit"),
    ):
        code = {"custom_pipeline": f"{repo}/{name}.py", "trust_remote_code": True}
        with pytest.raises(ValueError, match=sentence):
            DiffusionPipeline.from_pretrained(place / base, **code, learned_embeds=concept)
    code = {"custom_pipeline": f"{repo}/zoodip_xl_pipeline.py", "trust_remote_code": True}
    pipeline = DiffusionPipeline.from_pretrained(place / "xl", **code, learned_embeds=xl)
    wide = {"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)}
    broken = {"clip_l": torch.full((1, 16), torch.nan), "clip_g": torch.ones(1, 24)}
    uneven = {"clip_l": torch.ones(2, 16), "clip_g": torch.ones(1, 24)}
    for content, sentence in ((wide, "768, 1280.* take .16, 24"), (broken, "NaN"), (uneven, "2 vectors in clip_l")):
        save_file(content, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match=sentence):
            pipeline.load_learned_embeds(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="already knows the name '<my-toy>'"):
        pipeline.load_learned_embeds(xl)
    with pytest.raises(OSError, match="nowhere.* is neither"):
        pipeline.load_learned_embeds(tmp_path / "nowhere")
    assert list(pipeline.concepts) == [TOKEN]
    base = open_base(ModelSource(str(place / "xl")), accepted=families.FAMILIES.values())
    assert evaluate.read_column(f"mine={xl}", base).word == TOKEN
    with pytest.raises(InputError, match="was learned on .*sd. and not on .*xl"):
        evaluate.read_column(f"mine={sd}", base)


@pytest.mark.parametrize(
    "more, sentence",
    [
        ({"save_a1111": True}, "--save_a1111 is for Stable Diffusion 1.x and 2.x"),
        (
            {"puts_min_timestep": 950},
            "--puts_min_timestep 950 must be below --puts_max_timestep 900; the paper uses 700",
        ),
        ({"num_vectors": 31}, "--num_vectors 31 does not fit into a prompt"),
        ({"initializer_token": "red star"}, "is 2 tokens and must be one"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(train, more, sentence):
    with pytest.raises(InputError, match=sentence):
        train(**more)


def test_bases_that_do_not_fit_are_refused(train, place, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="--pool_at_eos is about SDXL's second text encoder"):
        train(pretrained_model_name_or_path=place / "sd", pool_at_eos=True)
    arguments = ["--pretrained_model_name_or_path", place / "xl", "--instance_data_dir", place / "pictures"]
    with pytest.raises(InputError, match=r"has two text encoders \(SDXL\)"):
        tuneqdm.main(tuneqdm.parse_args([*map(str, arguments), "--output_dir", str(tmp_path / "scales")]))
    other = tmp_path / "other"
    build_tiny_xl_base(other)
    path = other / "tokenizer_2" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["star</w>"], vocabulary["ring</w>"] = vocabulary["ring</w>"], vocabulary["star</w>"]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="tokenizer_2/ has another vocabulary than the first"):
        train(pretrained_model_name_or_path=other)


def test_drawing_for_an_evaluation(train, place):
    out = train(pool_at_eos=True)
    base = open_base(ModelSource(str(place / "xl")), accepted=families.FAMILIES.values())
    pipeline = base.family.pipeline.from_pretrained(place / "xl", **base.family.pipeline_options)
    before = draw(pipeline, "a star")
    pools = pipeline.text_encoder_2.text_model
    with evaluate.showing(evaluate.read_column(f"mine={out}", base), pipeline) as learned:
        assert TOKEN in learned.tokenizer_2.get_vocab() and pools.eos_token_id == 877
        draw(learned)
    assert pools.eos_token_id == 2 and TOKEN not in pipeline.tokenizer_2.get_vocab()
    assert np.array_equal(draw(pipeline, "a star"), before)


def test_memory_is_predicted(flags, capsys):
    zoodip.main(zoodip.parse_args(as_arguments(flags(estimate_memory=True))))
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("  peak") and line.endswith("MB") for line in lines)
