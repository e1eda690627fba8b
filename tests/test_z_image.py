"""Z-Image: conditioning, noise, target and sign are those of diffusers' own pipeline, on a tiny random base."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import as_arguments, short_run
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ZImagePipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_base import build_pictures, build_tiny_base
from tiny_z_image import LAYERS, SHIFT, WIDTH, build_tiny_z_image_base
from transformers import Qwen3ForCausalLM, Qwen3Model

import convert_embedding
import evaluate_personalization as evaluate
import train_zoodip_textual_inversion as zoodip
from personalization.data import examples, prompts
from personalization.errors import InputError
from personalization.models import families, memory
from personalization.models.base_model import ModelSource, open_base
from personalization.models.families import Text
from personalization.models.families.language import lengths_of
from personalization.runs import hub
from personalization.web import checks, workspace


TOKEN, CPU, FAMILY = "<my-toy>", torch.device("cpu"), families.FAMILIES["z_image"]
PROMPTS = ["a photo of a red ring", "", "a star on the beach"]
SIZE = {"height": 16, "width": 16}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("z_image")
    build_tiny_z_image_base(folder / "base")
    build_pictures(folder / "pictures")
    return folder


@pytest.fixture
def flags(place, tmp_path):
    """The shortest command line of a run on the base, as a dict; of another with flags(name=value)."""

    def make(**more):
        basics = short_run(place / "base", place / "pictures", place / "cache", tmp_path / "out", "ring")
        return basics | {f"--{name}": value for name, value in more.items()}

    return make


@pytest.fixture
def train(flags):
    def run(**more):
        chosen = flags(**more)
        zoodip.main(zoodip.parse_args(as_arguments(chosen)))
        return chosen["--output_dir"]

    return run


def opened(folder):
    return open_base(ModelSource(str(folder)), accepted=families.FAMILIES.values())


def plain_pipeline(folder):
    pipeline = ZImagePipeline.from_pretrained(folder)
    pipeline.text_encoder.config.pad_token_id = pipeline.tokenizer.pad_token_id  # as `open_base` sets it
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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


# --------------------------------------------------------------------------------------------------- diffusers' own


@torch.no_grad()
def test_conditioning_is_the_pipelines(place):
    """Bit for bit, where the pipeline pads to the same length; as it pads by itself, to rounding."""
    base, pipeline = opened(place / "base"), plain_pipeline(place / "base")
    ids = base.tokenize(PROMPTS)
    text = FAMILY.encode([pipeline.text_encoder], ids)
    for length, tolerance in (ids.shape[1], 0.0), (512, 1e-5):
        wanted, _ = pipeline.encode_prompt(list(PROMPTS), CPU, False, max_sequence_length=length)
        assert [len(states) for states in wanted] == list(text.lengths) and len(set(text.lengths)) == 3
        for states, length, theirs in zip(text.states, text.lengths, wanted):
            torch.testing.assert_close(states[:length], theirs, rtol=0, atol=tolerance)


@torch.no_grad()
def test_layers_that_are_not_read_are_not_loaded_and_nobody_sees_a_difference(place):
    base, pipeline = opened(place / "base"), plain_pipeline(place / "base")
    whole = pipeline.encode_prompt(list(PROMPTS), CPU, False)[0]
    ids = base.tokenize(PROMPTS)
    states = FAMILY.encode([pipeline.text_encoder], ids).states
    before = memory.tensor_bytes(pipeline.text_encoder)
    FAMILY.skip_unread("text_encoder", pipeline.text_encoder)
    assert not list(pipeline.text_encoder.layers[LAYERS - 1].parameters())
    assert memory.tensor_bytes(pipeline.text_encoder) < before
    assert torch.equal(FAMILY.encode([pipeline.text_encoder], ids).states, states)
    for mine, theirs in zip(pipeline.encode_prompt(list(PROMPTS), CPU, False)[0], whole):
        assert torch.equal(mine, theirs)


def test_length_of_a_prompt_is_what_does_not_pad():
    ids = torch.tensor([[1, 9, 2, 9, 9], [1, 2, 3, 4, 5], [9, 9, 1, 9, 9]])
    assert lengths_of(ids, 9) == (3, 5, 3)
    assert lengths_of(ids.to("meta"), 9) == (5, 5, 5)


@pytest.mark.parametrize("shift", [1.0, SHIFT])
def test_noise_and_target_are_those_of_diffusers_trainers(shift):
    draw = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(4, 4, 8, 8, generator=draw) for _ in range(2))
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler = FAMILY.open_scheduler({"shift": shift, "num_train_timesteps": 1000})
    drawn = torch.tensor([0, 1, 500, 999])
    indices = 999 - drawn  # the trainers' grid falls from 1000
    told = FAMILY.tell_timesteps(drawn, latents, scheduler)
    assert torch.equal(told, theirs.timesteps[indices])
    sigmas = theirs.sigmas[indices].view(-1, 1, 1, 1)
    noisy, target = FAMILY.noise(latents, noise, told, scheduler)
    assert torch.equal(target, noise - latents)
    wanted = (1.0 - sigmas) * latents + sigmas * noise
    if shift == 1:  # else σ comes back from the timestep, which the model is told, up to its last bit
        assert torch.equal(noisy, wanted)
        assert torch.equal(noisy, theirs.scale_noise(latents, told, noise))
    torch.testing.assert_close(noisy, wanted, rtol=1e-6, atol=1e-6)


def test_levels_shift_with_the_size_of_the_picture_where_the_scheduler_says_so():
    scheduler = FAMILY.open_scheduler({"use_dynamic_shifting": True, "base_image_seq_len": 256})
    drawn = torch.tensor([200, 500, 800])
    small, large = (FAMILY.tell_timesteps(drawn, torch.zeros(1, 4, s, s), scheduler) for s in (16, 128))
    assert (large > small).all()
    for side, found in (16, small), (128, large):
        # as the pipeline: μ is linear in the number of tokens, and the odds of σ grow by exp μ
        mu = 0.5 + (1.15 - 0.5) * ((side // 2) ** 2 - 256) / (4096 - 256)
        sigma = (drawn.numpy() + 1) / 1000
        wanted = np.exp(mu) / (np.exp(mu) + 1 / sigma - 1)
        np.testing.assert_allclose(found.numpy(), 1000 * wanted, rtol=1e-4)


def test_one_step_from_the_target_brings_the_picture_back(place):
    base, draw = opened(place / "base"), torch.Generator().manual_seed(0)
    sample, noise = (torch.randn(1, 4, 8, 8, generator=draw) for _ in range(2))
    latents = FAMILY.to_latents(sample, base.vae_config)
    np.testing.assert_allclose(latents.numpy(), (sample.numpy() - 0.06) * 1.5, rtol=1e-5, atol=1e-7)
    for t in (1, 250, 999):
        told = FAMILY.tell_timesteps(torch.tensor([t]), latents, base.scheduler)
        noisy, target = FAMILY.noise(latents, noise, told, base.scheduler)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        scheduler.set_timesteps(sigmas=[told.item() / 1000])
        back = scheduler.step(target, scheduler.timesteps[0], noisy).prev_sample
        torch.testing.assert_close(back, latents, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [0.0, 4.0])
def test_prediction_has_the_pipelines_sign_and_timestep(place, guidance):
    """What the pipeline hands its scheduler, bit for bit; under guidance its batch has both halves."""
    base, pipeline = opened(place / "base"), plain_pipeline(place / "base")
    seen, step = [], pipeline.scheduler.step

    def spy(prediction, timestep, latents, **more):
        seen.append((prediction, timestep, latents))
        return step(prediction, timestep, latents, **more)

    pipeline.scheduler.step = spy
    length = base.tokenize(["a red ring"]).shape[1]
    draw = torch.Generator().manual_seed(0)
    pipeline(
        "a red ring",
        num_inference_steps=2,
        guidance_scale=guidance,
        generator=draw,
        max_sequence_length=length,
        output_type="latent",
        **SIZE,
    )
    for prediction, timestep, latents in seen:
        texts = ["a red ring"] if guidance == 0 else ["a red ring", ""]
        text = FAMILY.encode([pipeline.text_encoder], base.tokenize(texts))
        noisy, told = latents.repeat(len(texts), 1, 1, 1), timestep.expand(len(texts))
        found = FAMILY.predict(pipeline.transformer, noisy, told, text, None)
        if guidance:
            found = found[:1] + guidance * (found[:1] - found[1:])
        compare = torch.equal if guidance == 0 else lambda a, b: torch.allclose(a, b, atol=1e-4)
        assert compare(found, prediction)


def test_the_loss_is_of_what_the_transformer_says(place, flags):
    """The script's loss against the whole path in diffusers' and transformers' own models, in numpy at its end."""
    args, base, placeholder, model, start, _ = assembled(flags, quantization="none")
    ids = base.tokenize([placeholder.expand("a {}")])
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 8, 8, generator=draw)
    batch = examples.noise_batch(FAMILY, latents, ids, torch.tensor([300]), draw, base.scheduler)
    with torch.inference_mode():
        found = model.losses(start[None], batch).item()
    pipeline = plain_pipeline(place / "base")
    sigma = SHIFT * 0.301 / (1 + (SHIFT - 1) * 0.301)
    with torch.no_grad():  # the word starts as its initializer
        states, _ = pipeline.encode_prompt("a ring", CPU, False)
        given = [batch.noisy_latents[0].unsqueeze(1)], torch.tensor([1 - sigma]), states
        prediction = -pipeline.transformer(*given).sample[0].squeeze(1).numpy()
    picture = latents[0].numpy()
    noise = (batch.noisy_latents[0].numpy() - (1 - sigma) * picture) / sigma
    assert found == pytest.approx(np.mean((prediction - (noise - picture)) ** 2), rel=1e-3)


# ----------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    "more",
    [
        {"optimizer": "zo_adam", "validation_prompt": "a {}", "num_validation_images": 1, "num_inference_steps": 2},
        {"optimizer": "gauss_newton", "gn_subspace_dimension": 4, "num_vectors": 2},
        {"optimizer": "gradient", "num_vectors": 2, "validation_data_dir": True},
        {"optimizer": "gradient", "gradient_checkpointing": "layer", "quantization": "nf4"},
        {"quantization": "nf4"},
        {"low_vram": True},
        {"mixed_precision": "bf16", "max_candidates_per_forward": 1},
    ],
    ids=str,
)
def test_every_way_to_train_trains_it(train, place, tmp_path, more):
    if more.get("validation_data_dir"):  # whose prompts are shorter than those that are trained on
        build_pictures(tmp_path / "held_out")
        (tmp_path / "held_out" / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "{}"}\n')
        for name in "ac":
            (tmp_path / "held_out" / f"{name}.png").unlink()
        shutil.move(tmp_path / "held_out" / "b.png", tmp_path / "held_out" / "d.png")
        (tmp_path / "held_out" / "metadata.jsonl").write_text('{"file_name": "d.png", "text": "{}"}\n')
        flipped = np.asarray(evaluate.Image.open(tmp_path / "held_out" / "d.png"))[::-1]
        evaluate.Image.fromarray(np.ascontiguousarray(flipped)).save(tmp_path / "held_out" / "d.png")
        more = more | {"validation_data_dir": tmp_path / "held_out"}
    out = train(**more)
    learned, base = load_file(out / "learned_embeds.safetensors"), opened(place / "base")
    assert list(learned) == ["qwen3_4b"] and learned["qwen3_4b"].shape == (more.get("num_vectors", 1), WIDTH)
    (row,) = base.tokenizer.encode(" ring")
    table = load_file(place / "base" / "text_encoder" / "model.safetensors")["embed_tokens.weight"]
    moved = (learned["qwen3_4b"] - table[row]).abs().amax(dim=1)
    assert learned["qwen3_4b"].isfinite().all() and (moved > 1e-6).all() and (moved < 1).all()
    with safe_open(out / "learned_embeds.safetensors", framework="pt") as file:
        assert file.metadata()["placeholder_token"] == TOKEN
    config = json.loads((out / "zoodip_config.json").read_text())
    assert config["family"] == "z_image" and set(config["components"]) == {"vae", "text_encoder", "transformer"}
    assert config["components"]["transformer"]["quantized_share"] > 0.9
    window = FAMILY.timestep_window
    assert (config["settings"]["puts_min_timestep"], config["settings"]["puts_max_timestep"]) == window
    assert (out / "samples" / "image_0.png").is_file() == ("validation_prompt" in more)


def test_the_exact_gradient_is_that_of_the_loss(flags):
    """Through INT8 layers and checkpoints, against differences of the script's own losses."""
    args, base, placeholder, model, start, concept = assembled(flags, optimizer="gradient", num_vectors=2)
    zoodip.OPTIMIZERS["gradient"].make_ready(args, model, base)
    batch = zoodip.draw_batch(concept, zoodip.choose_sampling(args), base.scheduler, torch.Generator().manual_seed(3))
    gradient, _ = zoodip.gradient.loss_gradient(model, start, batch)
    direction = torch.randn(start.shape, generator=torch.Generator().manual_seed(4))
    step = 1e-3
    with torch.no_grad():
        plus, minus = (model.losses((start + sign * step * direction)[None], batch).double() for sign in (1, -1))
    measured = ((plus - minus) / (2 * step)).item()
    assert (gradient * direction).sum().item() == pytest.approx(measured, rel=0.03, abs=1e-3)


def test_candidates_in_one_pass_or_in_many_have_the_same_losses(flags):
    _, base, _, model, start, concept = assembled(flags, num_vectors=2, quantization="none")
    sampling = zoodip.Sampling(0, 1000, batch_size=2)
    batch = zoodip.draw_batch(concept, sampling, base.scheduler, torch.Generator().manual_seed(0))
    candidates = start + torch.randn(3, 2, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        together = model.losses(candidates, batch)
        model.max_candidates = 1
        torch.testing.assert_close(model.losses(candidates, batch), together)
    assert len(set(together.tolist())) == 3


def test_weights_in_shards_of_a_model_with_a_head_are_read_the_same(place, tmp_path, train):
    """Z-Image's own files: Qwen3ForCausalLM's names, in shards."""
    shutil.copytree(place / "base", tmp_path / "base")
    encoder = Qwen3Model.from_pretrained(place / "base" / "text_encoder")
    whole = Qwen3ForCausalLM(encoder.config)
    whole.model.load_state_dict(encoder.state_dict())
    shutil.rmtree(tmp_path / "base" / "text_encoder")
    whole.save_pretrained(tmp_path / "base" / "text_encoder", max_shard_size="20KB")
    assert len(list((tmp_path / "base" / "text_encoder").glob("*.safetensors"))) > 1
    first = load_file(train() / "learned_embeds.safetensors")["qwen3_4b"]
    other = train(pretrained_model_name_or_path=tmp_path / "base", output_dir=tmp_path / "other")
    assert torch.equal(load_file(other / "learned_embeds.safetensors")["qwen3_4b"], first)


def test_memory_is_predicted(flags, capsys):
    peaks = {}
    for optimizer in ("zo_adam", "gradient"):
        zoodip.main(zoodip.parse_args(as_arguments(flags(estimate_memory=True, optimizer=optimizer))))
        lines = capsys.readouterr().out.splitlines()
        assert any(line.startswith("  transformer ") for line in lines)
        (peaks[optimizer],) = (line for line in lines if line.startswith("  peak") and line.endswith("MB"))


# ------------------------------------------------------------------------------------------------------ what is drawn


def with_our_loader(base, repo, learned_embeds):
    code = {"custom_pipeline": f"{repo}/zoodip_flow_pipeline.py", "trust_remote_code": True}
    pipeline = DiffusionPipeline.from_pretrained(base, **code, learned_embeds=learned_embeds)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def test_training_and_our_loader_compute_the_same_conditioning(train, flags, place, repo):
    kind = {"quantization": "none", "num_vectors": 2, "validation_prompt": "a {} on the beach"}
    out = train(**kind, num_validation_images=1, num_inference_steps=1)
    vectors = load_file(out / "learned_embeds.safetensors")["qwen3_4b"]
    _, base, placeholder, model, _, _ = assembled(flags, **kind)
    model.text_encoder.get_input_embeddings().write(vectors[None])
    ids = base.tokenize([placeholder.expand(kind["validation_prompt"])])
    text = model.text_encoder(ids)
    pipeline = with_our_loader(place / "base", repo, str(out))
    prompt = f"a {TOKEN} on the beach"
    (found,), (negative,) = pipeline.encode_prompt(
        prompt, CPU, True, negative_prompt=prompt, max_sequence_length=len(ids[0])
    )
    assert torch.equal(found, text.states[0, : text.lengths[0]]) and torch.equal(found, negative)
    tokens = pipeline.tokenizer.convert_ids_to_tokens(ids[0])
    at = tokens.index(TOKEN)
    assert tokens[at - 1 : at + 3] == ["a", TOKEN, f"{TOKEN}_1", "Ġon"]  # no space of its own, as in ComfyUI
    table = pipeline.text_encoder.get_input_embeddings().weight
    assert torch.equal(table[ids[0][at : at + 2]], vectors)
    assert pipeline(prompt, num_inference_steps=1, **SIZE).images[0].size == (16, 16)


@torch.no_grad()
def test_words_come_and_go(train, place, repo, tmp_path):
    out = train(num_vectors=2)
    vectors = load_file(out / "learned_embeds.safetensors")["qwen3_4b"]
    save_file({"qwen3_4b": vectors[0]}, tmp_path / "other.safetensors")  # named by its file, one vector [d]
    pipeline = with_our_loader(place / "base", repo, [str(out), str(tmp_path / "other.safetensors")])
    plain = plain_pipeline(place / "base")
    assert list(pipeline.concepts) == [TOKEN, "other"]
    assert torch.equal(pipeline._vectors["other"], vectors[:1])
    with pytest.raises(ValueError, match="already knows the name '<my-toy>'"):
        pipeline.load_learned_embeds(out)
    pipeline.unload_learned_embeds(TOKEN)
    assert TOKEN not in pipeline.tokenizer.get_vocab() and list(pipeline.concepts) == ["other"]
    pipeline.load_learned_embeds(out)
    (found,), _ = pipeline.encode_prompt(f"a {TOKEN}", CPU, False)
    pipeline.save_pretrained(tmp_path / "saved")
    saved = ZImagePipeline.from_pretrained(tmp_path / "saved")  # an ordinary Z-Image that knows them
    assert torch.equal(saved.encode_prompt(f"a {TOKEN} {TOKEN}_1", CPU, False)[0][0], found)
    pipeline.unload_learned_embeds()
    for text in (f"a {TOKEN}", "a star"):
        mine, theirs = (each.encode_prompt(text, CPU, False)[0][0] for each in (pipeline, plain))
        assert torch.equal(mine, theirs)
    with pytest.raises(ValueError, match="nothing to unload"):
        pipeline.unload_learned_embeds()


@pytest.mark.parametrize(
    "content, error, sentence",
    [
        (
            {"qwen3_4b": torch.zeros(1, WIDTH + 1)},
            ValueError,
            "vectors have 17 entries and this text encoder takes 16",
        ),
        ({"clip_l": torch.zeros(1, 768)}, ValueError, r"holds \['clip_l'\] and not qwen3_4b: it is not of Z-Image"),
        ({"qwen3_4b": torch.zeros(0, WIDTH)}, ValueError, "holds no vectors"),
        ({"qwen3_4b": torch.zeros(1, WIDTH, dtype=torch.int8)}, ValueError, "not floating-point"),
        ({"qwen3_4b": torch.full((1, WIDTH), torch.nan)}, ValueError, "NaN, infinite or too large"),
        (None, OSError, "neither an embedding file, nor a folder or a repository"),
        ("", ValueError, "which names no concept"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_does_not_fit_is_refused(place, repo, tmp_path, content, error, sentence):
    path = tmp_path / "word.safetensors"
    if content:
        save_file(content, path)
    with pytest.raises(error, match=sentence):
        with_our_loader(place / "base", repo, content if content == "" else str(path))


def test_our_loader_stands_alone(repo):
    text = (repo / "zoodip_flow_pipeline.py").read_text(encoding="utf-8")
    assert "personalization" not in text and text.count("(ZImagePipeline)") == 1


def test_comfyui_finds_the_vectors_and_the_card_says_how(train, repo):
    out = train(num_vectors=2)
    (key,) = load_file(out / "learned_embeds.safetensors")
    assert key == "qwen3_4b"  # `embedding_key` of ComfyUI's Z-Image, whose `embedding_size` is the width
    assert load_file(out / "my-toy.safetensors")["qwen3_4b"].shape == (2, WIDTH)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "load_textual_inversion" not in card.split("## Settings")[0] and "zoodip_flow_pipeline.py" in card
    assert "Automatic1111" not in card and "embedding:my-toy" in card and "z-image" in card
    pushed = hub._names_to_push(out, json.loads((out / "zoodip_config.json").read_text()), zoodip.PUBLICATION)
    assert {"learned_embeds.safetensors", "pipeline.py", "README.md"} <= set(pushed)
    assert "class ZOODiPFlowPipeline" in (out / "pipeline.py").read_text(encoding="utf-8")


def test_evaluation_draws_it_and_leaves_the_pipeline_as_it_was(train, place):
    out, base = train(num_vectors=2), opened(place / "base")
    pipeline = plain_pipeline(place / "base")
    column = evaluate.read_column(f"mine={out}", base)
    assert column.subject == f"{TOKEN} {TOKEN}_1"
    before = pipeline.encode_prompt("a star", CPU, False)[0][0]
    with evaluate.showing(column, pipeline) as learned:
        assert TOKEN in learned.tokenizer.get_vocab()
        options = {"num_inference_steps": 1, "guidance_scale": 2.0, **SIZE}
        assert learned([f"a {column.subject}"], **options).images[0].size == (16, 16)
    assert TOKEN not in pipeline.tokenizer.get_vocab()
    assert torch.equal(pipeline.encode_prompt("a star", CPU, False)[0][0], before)


def test_a_word_is_read_described_and_trained_on(train, place, tmp_path, capsys):
    out = train()
    base = str(place / "base")
    convert_embedding.main(
        convert_embedding.parse_args(["--files", str(out), "--pretrained_model_name_or_path", base])
    )
    said = capsys.readouterr().out
    assert (
        "fits Z-Image or FLUX.2 klein" in said and "qwen3_4b [1, 16]" in said and "vector 1 is nearest to ' " in said
    )
    more = {
        "initializer_embedding": out,
        "initializer_token": None,
        "output_dir": tmp_path / "on",
        "max_train_steps": 1,
    }
    train(**more)
    assert (tmp_path / "on" / "learned_embeds.safetensors").is_file()


def test_the_page_knows_its_words_and_the_size_of_its_pictures(place):
    assert {"ring", "beach"} < checks.vocabulary(str(place / "base"), None)
    assert workspace.model_resolution(str(place / "base")) == opened(place / "base").resolution == 16


# ---------------------------------------------------------------------------------------------------- wrong input


def edited(place, tmp_path, name, **entries):
    """A copy of the base with entries of a JSON file replaced; None takes one out."""
    shutil.copytree(place / "base", tmp_path / "edited")
    path = tmp_path / "edited" / name
    content = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return tmp_path / "edited"


@pytest.mark.parametrize(
    "name, entries, sentence",
    [
        ("vae/config.json", {"shift_factor": None}, "has a VAE with shift_factor None"),
        ("vae/config.json", {"scaling_factor": -1.0}, "has a VAE with scaling_factor -1.0"),
        ("transformer/config.json", {"cap_feat_dim": 24}, "for text of width 24 and a text encoder of width 16"),
        ("transformer/config.json", {"in_channels": 8}, "of 8 channels and a VAE of 4"),
        ("transformer/config.json", {"all_patch_size": [4]}, r"patches of \[4\]"),
        ("transformer/config.json", {"siglip_feat_dim": 8}, "takes pictures as input"),
        (
            "tokenizer/tokenizer_config.json",
            {"pad_token": None, "tokenizer_class": "PreTrainedTokenizerFast"},
            "is no tokenizer of Qwen .*pad_token",
        ),
        ("scheduler/scheduler_config.json", {"invert_sigmas": True}, "its noise levels do not fall"),
        (
            "text_encoder/config.json",
            {"model_type": "llama", "architectures": None},
            "is of a 'llama' and must be of a Qwen3Model",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bases_that_do_not_fit_are_refused(place, tmp_path, name, entries, sentence):
    with pytest.raises(InputError, match=sentence):
        opened(edited(place, tmp_path, name, **entries))


def test_a_tokenizer_without_a_template_is_refused(place, tmp_path):
    shutil.copytree(place / "base", tmp_path / "edited")
    (tmp_path / "edited" / "tokenizer" / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="has no chat_template"):
        opened(tmp_path / "edited")


@pytest.mark.parametrize(
    "more, sentence",
    [
        ({"unet_backend": "openvino"}, "--unet_backend openvino does not take the transformer of Z-Image: drop it"),
        ({"torch_compile": True}, "--torch_compile does not take the transformer"),
        ({"save_a1111": True}, "--save_a1111 is for Stable Diffusion"),
        ({"pool_at_eos": True}, "--pool_at_eos is about SDXL"),
        ({"initializer_token": "red ring"}, "is 2 tokens and must be one"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(train, more, sentence):
    with pytest.raises(InputError, match=sentence):
        train(**more)


def test_words_of_other_models_are_refused(train, place, tmp_path):
    build_tiny_base(tmp_path / "sd")
    sd = train(pretrained_model_name_or_path=tmp_path / "sd", output_dir=tmp_path / "word", initializer_token="star")
    with pytest.raises(InputError, match="was learned on .*sd. and not on .*base"):
        evaluate.read_column(f"mine={sd}", opened(place / "base"))
    (sd / "zoodip_config.json").unlink()  # of the same width, and nothing says where it is from
    with pytest.raises(InputError, match="are called .*<my-toy>.* and those of Z-Image qwen3_4b"):
        evaluate.read_column(f"mine={sd}", opened(place / "base"))


def test_text_without_lengths_is_as_before():
    assert Text(torch.zeros(1, 2, 3)).lengths is None
