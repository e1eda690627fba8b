"""FLUX.2 klein, the second flow-matching family: what differs from Z-Image, held to diffusers' own pipeline."""

import json
import shutil

import pytest
import torch
from conftest import as_arguments, short_run
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
from safetensors.torch import load_file
from tiny_base import SIZE, build_pictures
from tiny_flux2 import build_tiny_flux2_base
from tiny_z_image import WIDTH

import evaluate_personalization as evaluate
import train_zoodip_textual_inversion as zoodip
from personalization.errors import InputError
from personalization.models import base_model, families, memory
from personalization.models.base_model import ModelSource, open_base


TOKEN, CPU, FAMILY = "<my-toy>", torch.device("cpu"), families.FAMILIES["flux2_klein"]
DRAW = {"num_inference_steps": 1, "height": SIZE, "width": SIZE}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("klein")
    build_tiny_flux2_base(folder / "base")
    build_pictures(folder / "pictures")
    return folder


@pytest.fixture
def train(place, tmp_path):
    def run(**more):
        basics = short_run(place / "base", place / "pictures", place / "cache", tmp_path / "out", "ring")
        basics["--max_train_steps"] = 2
        zoodip.main(zoodip.parse_args(as_arguments(basics | {f"--{name}": value for name, value in more.items()})))
        return tmp_path / "out"

    return run


def opened(place):
    return open_base(ModelSource(str(place / "base")), accepted=families.FAMILIES.values())


def plain_pipeline(place):
    pipeline = Flux2KleinPipeline.from_pretrained(place / "base")
    pipeline.text_encoder.config.pad_token_id = pipeline.tokenizer.pad_token_id  # as `open_base` sets it
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def test_conditioning_is_the_pipelines_with_and_without_the_layers_that_are_not_read(place):
    base, pipeline, texts = opened(place), plain_pipeline(place), ["a photo of a red ring", ""]
    wanted, _ = pipeline.encode_prompt(texts, CPU)
    ids = base.tokenize(texts)
    assert torch.equal(FAMILY.encode([pipeline.text_encoder], ids).states, wanted)
    before = memory.tensor_bytes(pipeline.text_encoder)
    FAMILY.skip_unread("text_encoder", pipeline.text_encoder)
    assert memory.tensor_bytes(pipeline.text_encoder) < before
    assert torch.equal(FAMILY.encode([pipeline.text_encoder], ids).states, wanted)
    assert torch.equal(pipeline.encode_prompt(texts, CPU)[0], wanted)


@torch.no_grad()
def test_latents_are_those_that_the_pipeline_makes_of_a_picture(place):
    base, pipeline = opened(place), plain_pipeline(place)
    pixels = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    facts = FAMILY.vae_facts(base_model.load_vae(base), base.vae_config)
    mine = FAMILY.to_latents(pipeline.vae.encode(pixels).latent_dist.mode(), facts)
    theirs = pipeline._encode_vae_image(pixels, None)
    torch.testing.assert_close(pipeline._patchify_latents(mine), theirs, rtol=1e-6, atol=1e-6)
    noise = torch.randn(mine.shape, generator=torch.Generator().manual_seed(1))
    told = FAMILY.tell_timesteps(torch.tensor([400]), mine, base.scheduler)
    noisy, target = FAMILY.noise(mine, noise, told, base.scheduler)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[told.item() / 1000])
    back = scheduler.step(target, scheduler.timesteps[0], noisy).prev_sample
    torch.testing.assert_close(back, mine, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_prediction_is_what_the_pipeline_hands_its_scheduler(place):
    base, pipeline, seen = opened(place), plain_pipeline(place), []
    step = pipeline.scheduler.step

    def spy(prediction, timestep, latents, **more):
        seen.append((prediction, timestep, latents))
        return step(prediction, timestep, latents, **more)

    pipeline.scheduler.step = spy
    pipeline(prompt="a red ring", guidance_scale=1.0, generator=torch.Generator().manual_seed(0), **DRAW)
    ((prediction, timestep, latents),) = seen
    side = SIZE // 4  # of patches
    patches = latents.permute(0, 2, 1).reshape(1, -1, side, side)
    noisy = pipeline._unpatchify_latents(patches)
    text = FAMILY.encode([pipeline.text_encoder], base.tokenize(["a red ring"]))
    found = FAMILY.predict(pipeline.transformer, noisy, timestep[None], text, None)
    assert torch.equal(pipeline._pack_latents(pipeline._patchify_latents(found)), prediction)


@pytest.mark.parametrize(
    "more",
    [
        {"validation_prompt": "a {}", "num_validation_images": 1, "num_inference_steps": 1},
        {"optimizer": "gauss_newton", "gn_subspace_dimension": 2, "max_train_steps": 1},
        {"optimizer": "gradient", "num_vectors": 2},
    ],
    ids=str,
)
def test_every_optimizer_trains_it(train, place, more):
    out = train(**more)
    learned = load_file(out / "learned_embeds.safetensors")
    assert list(learned) == ["qwen3_4b"] and learned["qwen3_4b"].shape == (more.get("num_vectors", 1), WIDTH)
    (row,) = opened(place).tokenizer.encode(" ring")
    table = load_file(place / "base" / "text_encoder" / "model.safetensors")["embed_tokens.weight"]
    assert ((learned["qwen3_4b"] - table[row]).abs().amax(dim=1) > 1e-6).all()
    assert json.loads((out / "zoodip_config.json").read_text())["family"] == "flux2_klein"
    assert (out / "samples" / "image_0.png").is_file() == ("validation_prompt" in more)


@torch.no_grad()
def test_our_loader_and_an_evaluation_draw_it(train, place, repo, capsys):
    out, base = train(num_vectors=2), opened(place)
    assert 'pipeline(prompt="a photo of <my-toy>")' in capsys.readouterr().out  # its first argument is a picture
    assert 'pipeline(prompt="a photo of <my-toy>")' in (out / "README.md").read_text(encoding="utf-8")
    vectors = load_file(out / "learned_embeds.safetensors")["qwen3_4b"]
    code = {"custom_pipeline": f"{repo}/zoodip_flux2_pipeline.py", "trust_remote_code": True}
    pipeline = DiffusionPipeline.from_pretrained(place / "base", **code, learned_embeds=str(out))
    pipeline.set_progress_bar_config(disable=True)
    states, _ = pipeline.encode_prompt(f"a {TOKEN}", CPU)
    column = evaluate.read_column(f"mine={out}", base)
    plain = plain_pipeline(place)
    with evaluate.showing(column, plain) as learned:
        assert torch.equal(learned.encode_prompt(f"a {column.subject}", CPU)[0], states)
    ids = pipeline.tokenizer.convert_tokens_to_ids([TOKEN, f"{TOKEN}_1"])
    assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight[ids], vectors)
    assert pipeline(prompt=f"a {TOKEN}", guidance_scale=1.0, **DRAW).images[0].size == (SIZE, SIZE)
    pipeline.unload_learned_embeds()
    assert TOKEN not in pipeline.tokenizer.get_vocab()
    text = (repo / "zoodip_flux2_pipeline.py").read_text(encoding="utf-8")
    assert "personalization" not in text


@pytest.mark.parametrize(
    "name, entries, sentence",
    [
        ("transformer/config.json", {"in_channels": 8}, "of 8 channels and a VAE of 4, of which patches have 16"),
        ("transformer/config.json", {"joint_attention_dim": 32}, "for text of width 32 and a text encoder .* make 48"),
        ("text_encoder/config.json", {"num_hidden_layers": 20, "layer_types": None}, "of 20 layers, too few"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bases_that_do_not_fit_are_refused(place, tmp_path, name, entries, sentence):
    shutil.copytree(place / "base", tmp_path / "base")
    path = tmp_path / "base" / name
    content = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    with pytest.raises(InputError, match=sentence):
        opened(tmp_path)
