"""`--learn output`: a word of what a language model puts out, of both families, on tiny random bases.

Conditioning is held to diffusers' own pipelines: they encode the plain word, and rows are replaced by hand.
"""

import gc
import json
import types
import weakref

import numpy as np
import pytest
import torch
from conftest import as_arguments, short_run
from diffusers import DiffusionPipeline, Flux2KleinPipeline, ZImagePipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_base import SIZE, build_pictures
from tiny_flux2 import build_tiny_flux2_base
from tiny_z_image import WIDTH, build_tiny_z_image_base

import convert_embedding
import evaluate_personalization as evaluate
import train_zoodip_textual_inversion as zoodip
from personalization.data import prompts
from personalization.errors import InputError
from personalization.models import base_model, memory
from personalization.runs import hub


TOKEN, CPU = "<my-toy>", torch.device("cpu")
KINDS = {
    "z_image": (build_tiny_z_image_base, ZImagePipeline, "zoodip_flow_pipeline.py", WIDTH),
    "flux2_klein": (build_tiny_flux2_base, Flux2KleinPipeline, "zoodip_flux2_pipeline.py", 3 * WIDTH),
}
WAYS = {
    "zo_adam": {"perturbation_scale": 0.5, "learning_rate": 0.5},  # klein's 512 states hardly hear of two rows
    "gradient": {"gradient_checkpointing": "none", "lr_scheduler": "constant"},
    "gauss_newton": {"gn_subspace_dimension": 2},
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Family -> its folder with base and pictures, the class of its pipeline, our file, the width of a state."""
    found = {}
    for name, (build, plain, file, width) in KINDS.items():
        folder = tmp_path_factory.mktemp(name)
        build(folder / "base")
        build_pictures(folder / "pictures")
        found[name] = types.SimpleNamespace(name=name, folder=folder, plain=plain, file=file, width=width)
    return found


@pytest.fixture(params=list(KINDS))
def kind(request, kinds):
    return kinds[request.param]


@pytest.fixture
def z_image(kinds):
    return kinds["z_image"]


def arguments(kind, out, **more):
    basics = short_run(kind.folder / "base", kind.folder / "pictures", kind.folder / "cache", out, "ring")
    basics |= {"--learn": "output", "--max_train_steps": 2, "--num_validation_samples": 2}
    return as_arguments(basics | {f"--{name}": value for name, value in more.items()})


@pytest.fixture
def train(tmp_path):
    def run(kind, **more):
        zoodip.main(zoodip.parse_args(arguments(kind, tmp_path / "out", **more)))
        return more.get("output_dir", tmp_path / "out")

    return run


def prepared(kind, out, **more):
    """(args, placeholder, ids of the prompts, `Task`) of a run."""
    args = zoodip.parse_args(arguments(kind, out, **more))
    base, placeholder, compute = zoodip.resolve_settings(args, CPU)
    pictures = zoodip.read_pictures(args)
    captions = prompts.build_prompts(pictures, placeholder, base)
    return args, placeholder, captions[0], zoodip.prepare(args, base, placeholder, compute, pictures, captions)


def opened(kind):
    source = base_model.ModelSource(str(kind.folder / "base"))
    return base_model.open_base(source, accepted=zoodip.families.FAMILIES.values())


def plain_pipeline(kind):
    pipeline = kind.plain.from_pretrained(kind.folder / "base")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def our_pipeline(kind, repo, learned_embeds):
    code = {"custom_pipeline": f"{repo}/{kind.file}", "trust_remote_code": True}
    pipeline = DiffusionPipeline.from_pretrained(kind.folder / "base", **code, learned_embeds=learned_embeds)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def said_by(pipeline, text):
    """What a pipeline of diffusers makes of a prompt, `[L, D]`."""
    return pipeline.encode_prompt(prompt=text, device=CPU)[0][0]


def places_of(pipeline, kind, text, word):
    """Where the tokens of a word are in a prompt, as the pipeline writes it."""
    chat = [{"role": "user", "content": text}]
    how = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": kind.name == "z_image"}
    ids = pipeline.tokenizer(pipeline.tokenizer.apply_chat_template(chat, **how)).input_ids
    (wanted,) = pipeline.tokenizer.encode(f" {word}")
    return [place for place, found in enumerate(ids) if found == wanted]


# ------------------------------------------------------------------------------------------------------- conditioning


@torch.no_grad()
def test_conditioning_is_the_encoders_output_with_rows_replaced(kind, tmp_path):
    """Two candidates of two vectors in one pass, against the plain word's output by diffusers."""
    args, placeholder, _, task = prepared(
        kind, tmp_path / "out", quantization="none", num_vectors=2, validation_prompt="a {} on the beach"
    )
    candidates = torch.randn(2, 2, kind.width, generator=torch.Generator().manual_seed(0))
    encoder = task.model.text_encoder
    encoder.get_input_embeddings().write(candidates)
    ids = task.base.tokenize([placeholder.expand(args.validation_prompt)])
    ids = torch.cat([ids, torch.where(ids >= placeholder.first_id, ids + 2, ids)])
    text = encoder(ids)
    pipeline, plain = plain_pipeline(kind), "a ring ring on the beach"
    whole, places = said_by(pipeline, plain), places_of(pipeline, kind, plain, "ring")
    assert len(places) == 2 and text.states.shape[-1] == kind.width
    for found, length, vectors in zip(text.states, text.lengths, candidates):
        wanted = whole.clone()
        wanted[places] = vectors
        found = found[:length] if kind.name == "z_image" else found
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
        assert torch.equal(found[places], vectors)
    # The words after it hear of the plain word: without it the output is another.
    assert not torch.allclose(whole[places[-1] + 1], said_by(pipeline, "a on the beach")[places[-1] - 1], atol=1e-2)


@torch.no_grad()
def test_vectors_start_at_the_mean_of_their_own_rows_over_the_prompts(kind, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    captions = ["a red {} here", "one {}", "the {} on a beach, a {}"]
    for number, caption in enumerate(captions):
        Image.fromarray(np.full((SIZE, SIZE, 3), 60 * number, np.uint8)).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(caption)
    more = {"train_data_dir": pictures, "quantization": "none", "num_vectors": 2}
    _, _, _, task = prepared(kind, tmp_path / "out", **more)
    pipeline, rows = plain_pipeline(kind), [[], []]
    for caption in captions:
        text = caption.replace("{}", "ring ring")
        said, places = said_by(pipeline, text), places_of(pipeline, kind, text, "ring")
        for number in (0, 1):
            rows[number] += list(said[places[number::2]])
    wanted = torch.stack([torch.stack(each).mean(dim=0) for each in rows])
    torch.testing.assert_close(task.initial, wanted, rtol=1e-5, atol=1e-4)
    assert len(rows[0]) == 4  # a caption that names it twice counts twice


def test_a_prompt_that_was_not_encoded_is_an_error(kind, tmp_path):
    _, placeholder, ids, task = prepared(kind, tmp_path / "out")
    rows, encoder = task.model.text_encoder.get_input_embeddings(), task.model.text_encoder
    rows.check(ids)
    for text in ("a word that nobody announced", "a " * 60):
        with pytest.raises(IndexError, match="was not announced before the text encoders left"):
            encoder(task.base.tokenize([text]))
    with pytest.raises(IndexError, match="was not announced"):
        rows.check(task.base.tokenize([placeholder.expand("another {}")]))


def test_text_encoders_leave(z_image, tmp_path, monkeypatch):
    """Nothing holds the module any more when the denoiser arrives, and its memory is the system's again."""
    seen, alive = [], []
    load, load_denoiser = zoodip.load_text_encoder, zoodip.load_denoiser
    ballast = 300 * 2**20

    def load_heavy(*given):
        encoder, stored = load(*given)
        encoder.register_buffer("ballast", torch.ones(ballast, dtype=torch.int8))
        seen.append(weakref.ref(encoder))
        alive.append(memory.process_memory().anonymous)
        return encoder, stored

    def watch(*given):
        gc.collect()
        assert seen[0]() is None
        alive.append(memory.process_memory().anonymous)
        return load_denoiser(*given)

    monkeypatch.setattr(zoodip, "load_text_encoder", load_heavy)
    monkeypatch.setattr(zoodip, "load_denoiser", watch)
    task = prepared(z_image, tmp_path / "out")[-1]
    assert task.model.text_encoder.encoders == () and set(task.components) == {"vae", "text_encoder", "transformer"}
    with_it, without = alive
    if with_it is not None:
        assert without < with_it - 0.9 * ballast


# ----------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("way", list(WAYS))
def test_every_way_to_train_trains_it(train, kind, way):
    out = train(kind, optimizer=way, num_vectors=2, **WAYS[way])
    learned = load_file(out / "learned_embeds.safetensors")
    assert {key: tuple(x.shape) for key, x in learned.items()} == {
        "qwen3_4b": (2, WIDTH),
        "qwen3_4b_out": (2, kind.width),
    }
    with safe_open(out / "learned_embeds.safetensors", framework="pt") as file:
        assert file.metadata() == {"placeholder_token_of_output": TOKEN}
    (row,) = opened(kind).tokenizer.encode(" ring")
    table = load_file(kind.folder / "base" / "text_encoder" / "model.safetensors")["embed_tokens.weight"]
    assert torch.equal(learned["qwen3_4b"], table[[row, row]])
    config = json.loads((out / "zoodip_config.json").read_text())
    assert config["settings"]["learn"] == "output" and config["figures"]["steps"] == 2
    assert (learned["qwen3_4b_out"] - start_of(kind, out.parent)).abs().amax(dim=1).min() > 1e-7
    names = {path.name for path in out.glob("*.safetensors")}
    assert names == {"learned_embeds.safetensors", "learned_embeds-best.safetensors"}  # none is called as ComfyUI does


def start_of(kind, folder):
    return prepared(kind, folder / "start", num_vectors=2)[-1].initial


def test_the_exact_gradient_is_that_of_the_loss(kind, tmp_path):
    *_, task = prepared(kind, tmp_path / "out", optimizer="gradient", num_vectors=2)
    batch, start = task.draw_batch(torch.Generator().manual_seed(3)), task.initial
    gradient, _ = zoodip.gradient.loss_gradient(task.model, start, batch)
    step = {"z_image": 1e-2, "flux2_klein": 2.0}[kind.name]  # klein's slope is small among its 512 states
    direction = gradient / gradient.norm()
    with torch.no_grad():
        plus, minus = (task.model.losses((start + h * direction)[None], batch).double() for h in (step, -step))
    assert gradient.norm().item() == pytest.approx(((plus - minus) / (2 * step)).item(), rel=0.05)
    assert (gradient.abs().amax(dim=1) > 0).all()


def test_candidates_in_one_pass_or_in_many_have_the_same_losses(kind, tmp_path):
    *_, task = prepared(kind, tmp_path / "out", num_vectors=2, quantization="none", train_batch_size=2)
    batch = task.draw_batch(torch.Generator().manual_seed(0))
    steps = torch.randn(3, 2, kind.width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        together = task.model.losses(task.initial + steps, batch)
        task.model.max_candidates = 1
        torch.testing.assert_close(task.model.losses(task.initial + steps, batch), together)
    assert len(set(together.tolist())) == 3


def test_gauss_newtons_subspace_is_of_what_the_prompts_words_became(z_image, tmp_path):
    """Its directions hold the differences between those rows, of which there are fewer than directions in all."""
    args, placeholder, ids, task = prepared(z_image, tmp_path / "out", optimizer="gauss_newton", quantization="none")
    optimizer = zoodip.OPTIMIZERS["gauss_newton"]
    words = args, task.base, placeholder, ids
    assert args.gn_subspace == "prompt_words" and optimizer.look_ahead(*words) is None
    directions = optimizer.look_at(task.model, None, *words)
    torch.testing.assert_close(directions @ directions.T, torch.eye(WIDTH), rtol=0, atol=1e-5)
    special = set(task.base.tokenizer.all_special_ids)
    said = task.model.text_encoder.rows.said(ids)
    kept = [
        said[p, i].numpy()
        for p, row in enumerate(ids.tolist())
        for i, token in enumerate(row)
        if token < placeholder.first_id and token not in special
    ]
    rows = np.unique(np.array(kept), axis=0)
    spread = [np.var((rows - rows.mean(axis=0)) @ direction.numpy()) for direction in directions]
    np.testing.assert_allclose(spread, sorted(spread, reverse=True), atol=1e-6 * spread[0])
    assert spread[0] > 2 * np.mean(spread)


@pytest.mark.parametrize("way", list(WAYS))
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(train, z_image, tmp_path, way):
    kind = {"optimizer": way, "num_vectors": 2, "max_train_steps": 4, "checkpointing_steps": 2, **WAYS[way]}
    whole = train(z_image, **kind, output_dir=tmp_path / "whole")
    train(z_image, **kind | {"max_train_steps": 2}, output_dir=tmp_path / "part")
    part = train(z_image, **kind, output_dir=tmp_path / "part", resume_from_checkpoint="latest")
    assert (whole / "learned_embeds.safetensors").read_bytes() == (part / "learned_embeds.safetensors").read_bytes()


def test_a_checkpoint_knows_which_kind_it_is_of(train, z_image, tmp_path):
    train(z_image, checkpointing_steps=1)
    again = {"resume_from_checkpoint": "latest", "checkpointing_steps": 1}
    for learn in ("input", None):
        with pytest.raises(InputError, match=r"belongs to other settings: .*learn \('output', now None\)"):
            train(z_image, learn=learn, **again)
    train(z_image, learn="input", output_dir=tmp_path / "other", checkpointing_steps=1)
    train(z_image, learn=None, output_dir=tmp_path / "other", **again)  # the default by its name


def test_memory_of_a_step_is_predicted_without_the_text_encoder(z_image, tmp_path, capsys):
    found = {}
    for learn in ("input", "output"):
        args = zoodip.parse_args(arguments(z_image, tmp_path / "out", learn=learn, quantized_cache_dir="none"))
        base, _, compute = zoodip.resolve_settings(args, CPU)
        found[learn] = zoodip.estimate_memory(args, base, compute)
    before, now = found["input"], found["output"]
    prompts_kept = 27 * 64 * WIDTH * 4
    saved = before.phases["training"] - now.phases["training"]
    assert saved == before.text_encoder - prompts_kept and now.text_encoder == before.text_encoder
    assert now.phases["encoding the prompts"] > now.text_encoder + prompts_kept
    assert "while encoding the prompts" in now.table() and "while encoding the prompts" not in before.table()


# ------------------------------------------------------------------------------------------------------ what is drawn


@torch.no_grad()
def test_our_pipeline_draws_what_validation_draws(train, kind, repo):
    """One picture of the same prompt and noise: training has the prompt encoded, the pipeline has the file."""
    drawing = {"num_inference_steps": 2, "guidance_scale": 2.0}
    learning = {"num_vectors": 2, "quantization": "none", "learning_rate": 0.5}
    shown = {"validation_prompt": "a {} on the beach", "num_validation_images": 1}
    out = train(kind, **drawing, **learning, **shown)
    pipeline = our_pipeline(kind, repo, str(out))
    given = {"prompt": f"a {TOKEN} on the beach", "generator": torch.Generator().manual_seed(0), **drawing}
    size = {"height": SIZE, "width": SIZE}
    drawn = np.asarray(pipeline(**given, **size).images[0]).astype(int)
    validated = np.asarray(Image.open(out / "samples" / "image_0.png")).astype(int)
    assert np.abs(drawn - validated).max() <= 1  # a rounding: the pipeline pads the prompt
    given["generator"] = torch.Generator().manual_seed(0)
    plain = np.asarray(plain_pipeline(kind)(**given | {"prompt": "a ring ring on the beach"}, **size).images[0])
    assert np.abs(drawn - plain).max() > 0
    vectors = load_file(out / "learned_embeds.safetensors")["qwen3_4b_out"]
    places = places_of(pipeline, kind, "a ring ring on the beach", "ring")
    assert torch.equal(said_by(pipeline, f"a {TOKEN} on the beach")[places], vectors)


@torch.no_grad()
def test_words_of_both_kinds_come_and_go(train, kind, repo, tmp_path):
    out = train(kind, num_vectors=2, quantization="none")
    other = train(kind, learn="input", output_dir=tmp_path / "other", placeholder_token="<other>")
    pipeline, prompt = our_pipeline(kind, repo, [str(out), str(other)]), f"a {TOKEN} and <other>"
    said = said_by(pipeline, prompt)
    with pytest.raises(ValueError, match=r"cannot hold \['<my-toy>'\], learned with --learn output"):
        pipeline.save_pretrained(tmp_path / "saved")
    pipeline.unload_learned_embeds(TOKEN)
    pipeline.save_pretrained(tmp_path / "saved")
    pipeline.load_learned_embeds(out)
    torch.testing.assert_close(said_by(pipeline, prompt), said)
    pipeline.unload_learned_embeds()
    assert torch.equal(said_by(pipeline, "a star"), said_by(plain_pipeline(kind), "a star"))


@pytest.mark.parametrize("shape", [(1, WIDTH), (2, WIDTH + 1)], ids=str)
def test_an_output_that_does_not_fit_is_refused(z_image, repo, tmp_path, shape):
    save_file(
        {"qwen3_4b": torch.zeros(2, WIDTH), "qwen3_4b_out": torch.zeros(shape)}, tmp_path / "my-word.safetensors"
    )
    with pytest.raises(ValueError, match="under 'qwen3_4b_out' where finite"):
        our_pipeline(z_image, repo, str(tmp_path / "my-word.safetensors"))


@torch.no_grad()
def test_an_evaluation_draws_it_as_our_pipeline_does_and_leaves_no_trace(train, kind, repo):
    out = train(kind, num_vectors=2)
    column, pipeline = evaluate.read_column(f"mine={out}", opened(kind)), plain_pipeline(kind)
    before = said_by(pipeline, "a star")
    with evaluate.showing(column, pipeline) as learned:
        wanted = said_by(our_pipeline(kind, repo, str(out)), f"a {TOKEN} here")
        assert torch.equal(said_by(learned, f"a {column.subject} here"), wanted)
    assert torch.equal(said_by(pipeline, "a star"), before) and not pipeline.text_encoder._forward_hooks


def test_the_card_says_who_draws_it(train, z_image):
    out = train(z_image)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "zoodip_flow_pipeline.py" in card and "--learn output" in card and "embedding:" not in card
    assert "of what its text encoder puts out" in card and "load_textual_inversion" not in card
    pushed = hub._names_to_push(out, json.loads((out / "zoodip_config.json").read_text()), zoodip.PUBLICATION)
    assert {"learned_embeds.safetensors", "pipeline.py"} <= set(pushed) and "my-toy.safetensors" not in pushed


# -------------------------------------------------------------------------------------------------- files, wrong input


def test_training_goes_on_from_such_a_file_and_from_no_other(train, z_image, tmp_path):
    out = train(z_image, num_vectors=2)
    on = {"initializer_embedding": out, "initializer_token": None, "output_dir": tmp_path / "on"}
    train(z_image, **on, max_train_steps=1, optimizer="gradient", learning_rate=1e-6)
    first, second = (load_file(folder / "learned_embeds.safetensors") for folder in (out, tmp_path / "on"))
    assert torch.equal(first["qwen3_4b"], second["qwen3_4b"])
    torch.testing.assert_close(first["qwen3_4b_out"], second["qwen3_4b_out"], rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="has vectors for a text encoder's output: add --learn output"):
        train(z_image, **on, learn="input")
    train(z_image, learn="input", output_dir=tmp_path / "plain")
    with pytest.raises(InputError, match="has no vectors for a text encoder's output: give one"):
        train(z_image, **on | {"initializer_embedding": tmp_path / "plain", "output_dir": tmp_path / "third"})


def test_it_is_described_and_not_converted(train, z_image, tmp_path, capsys):
    out = train(z_image)
    convert_embedding.main(convert_embedding.parse_args(["--files", str(out)]))
    assert "qwen3_4b_out [1, 16] replaces an encoder's output" in capsys.readouterr().out
    words = ["--files", str(out), "--to", "comfyui", "--output_dir", str(tmp_path / "converted")]
    with pytest.raises(InputError, match="comfyui has no place for vectors that replace an encoder's output"):
        convert_embedding.main(convert_embedding.parse_args(words))


@pytest.mark.parametrize(
    "more, sentence",
    [
        ({"save_a1111": True}, "--save_a1111 is for words that stand in prompts"),
        ({"save_as_full_pipeline": True}, "--save_as_full_pipeline is for words that stand in prompts"),
        ({"optimizer": "gauss_newton", "gn_subspace": "vocabulary"}, "--gn_subspace vocabulary is of the words"),
        ({"optimizer": "gauss_newton", "gn_subspace_words": 9}, "--gn_subspace_words does nothing with"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(z_image, tmp_path, capsys, more, sentence):
    with pytest.raises(SystemExit) as ended:
        zoodip.parse_args(arguments(z_image, tmp_path / "out", **more))
    assert ended.value.code == 2 and sentence in capsys.readouterr().err


def test_models_without_a_language_model_are_refused(tiny, tmp_path, z_image):
    more = {"pretrained_model_name_or_path": tiny / "base", "initializer_token": "star"}
    args = zoodip.parse_args(arguments(z_image, tmp_path / "out", **more))
    with pytest.raises(
        InputError, match=r"--learn output is for models .*\(Z-Image and FLUX.2 klein\), and .*: drop it"
    ):
        zoodip.resolve_settings(args, CPU)
