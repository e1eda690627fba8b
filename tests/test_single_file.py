"""Checkpoints in a single file: opened, trained on and refused; the same to the last bit as the folder they are of."""

import gc
import gzip
import json
import shutil
import weakref

import numpy as np
import pytest
import torch
from conftest import as_arguments
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from single_files import as_single_file, write_single_file
from tiny_base import TOKENIZER, build_pictures, build_tiny_base, build_tiny_xl_base, text_config
from transformers import CLIPTextModel, CLIPTokenizer

import evaluate_personalization as evaluation
import train_selective_dreambooth_lora as selective
import train_tuneqdm_dreambooth as tuneqdm
import train_zoodip_textual_inversion as zoodip
from personalization.errors import InputError
from personalization.models import base_model, families, memory, single_file, weight_cache


FAMILIES = {"sd1": families.SD1, "sd2": families.SD2, "sdxl": families.SDXL}


def tiny(kind, folder, **more):
    """A UNet or VAE with everything that a real one has, in small; written over that of a tiny base."""
    config = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in config.items() if not name.startswith("_")} | more
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = kind.from_config(config)
    shutil.rmtree(folder)
    model.save_pretrained(folder)
    return dict(model.config)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """For each family a base in diffusers format, `name`, and files of it, `name.safetensors` and `name.ckpt`."""
    place = tmp_path_factory.mktemp("single")
    build_pictures(place / "pictures")
    for name in FAMILIES:
        (build_tiny_xl_base if name == "sdxl" else build_tiny_base)(place / name)
        blocks = {
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "mid_block_type": "UNetMidBlock2DCrossAttn",
        }
        blocks |= {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "block_out_channels": [8, 16]}
        if name == "sd2":
            shutil.rmtree(place / name / "text_encoder")
            tokenizer = CLIPTokenizer.from_pretrained(place / name / "tokenizer")
            tokenizer.pad_token = "!"
            tokenizer.save_pretrained(place / name / "tokenizer")
            CLIPTextModel(text_config(1024, layers=1)).save_pretrained(place / name / "text_encoder")
            blocks |= {"cross_attention_dim": 1024, "use_linear_projection": True}
        unet = tiny(UNet2DConditionModel, place / name / "unet", **blocks)
        vae = tiny(AutoencoderKL, place / name / "vae", mid_block_add_attention=True, layers_per_block=2)
        for suffix in ("safetensors", "ckpt"):
            write_single_file(place / f"{name}.{suffix}", place / name, name, (unet, vae))
    return place


@pytest.fixture(autouse=True)
def small_configs(world, monkeypatch, request):
    """The families' configs are the tiny ones', and no tokenizer is at hand."""
    if "real" not in request.node.name:
        monkeypatch.setattr(single_file, "CONFIGS", world)
    monkeypatch.setattr(single_file, "HF_HUB_CACHE", str(world / "nothing"))
    monkeypatch.setattr(single_file, "PACKAGE", "a_package_that_is_nowhere")

    def no_network(*_, **__):
        raise OSError("there is no network in this test")

    monkeypatch.setattr(single_file, "snapshot_download", no_network)


def flags(world, base, out, **more):
    chosen = {"pretrained_model_name_or_path": base, "train_data_dir": world / "pictures", "output_dir": out}
    chosen |= {"placeholder_token": "<my-toy>", "initializer_token": "star", "report_to": "none", "resolution": 16}
    chosen |= {"max_train_steps": 2, "num_validation_samples": 2, "puts_min_timestep": 0, **more}
    return as_arguments({f"--{name}": value for name, value in chosen.items()})


def learned(world, base, out, **more):
    zoodip.main(zoodip.parse_args(flags(world, base, out, **more)))
    return load_file(out / "learned_embeds.safetensors")


@pytest.mark.parametrize(
    "family, suffix", [("sd1", "safetensors"), ("sd1", "ckpt"), ("sd2", "safetensors"), ("sdxl", "ckpt")]
)
def test_a_single_file_trains_as_the_folder_it_is_of(world, tmp_path, family, suffix):
    file = world / f"{family}.{suffix}"
    expected = learned(world, world / family, tmp_path / "folder")
    found = learned(world, file, tmp_path / "file", tokenizer_name=world / family / "tokenizer")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    config = json.loads((tmp_path / "file" / "zoodip_config.json").read_text())
    assert config["base_model"] == file.name and config["base_model_is_local"] and config["family"] == family
    card = (tmp_path / "file" / "README.md").read_text()
    assert f'.from_single_file("path/to/{file.name}")' in card and "DiffusionPipeline.from_pretrained" not in card
    assert f"the local model `{file.name}`" in card


def test_the_quantized_cache_is_written_once(world, tmp_path, monkeypatch):
    given = {"tokenizer_name": world / "sd1" / "tokenizer", "quantized_cache_dir": tmp_path / "cache"}
    first = learned(world, world / "sd1.safetensors", tmp_path / "a", **given)
    read, original = [], single_file.component_tensors

    def watched(single, family, component, *rest):
        found = original(single, family, component, *rest)
        for name, later in found.items():
            found[name].read = lambda read_it=later.read, name=name: read.append((component, name)) or read_it()
        return found

    monkeypatch.setattr(single_file, "component_tensors", watched)
    again = learned(world, world / "sd1.safetensors", tmp_path / "b", **given)
    assert torch.equal(first["<my-toy>"], again["<my-toy>"])
    assert {component for component, _ in read} == {"vae", "text_encoder"}
    tables = {name.removeprefix("text_model.") for component, name in read if component == "text_encoder"}
    assert "embeddings.token_embedding.weight" in tables and not any("layers" in name for name in tables)


def test_a_tensor_at_a_time(world, tmp_path, monkeypatch):
    """While the cache is filled, what was read of the file leaves as what follows comes."""
    read, alive, most, original = [], weakref.WeakSet(), 0, single_file.Later.__init__

    def watched(self, stored, read_it):
        def reading():
            nonlocal most
            gc.collect(0)
            most = max(most, len(alive))
            value = read_it()
            alive.add(value)
            read.append(value.shape)
            return value

        original(self, stored, reading)

    monkeypatch.setattr(single_file.Later, "__init__", watched)
    args = zoodip.parse_args(flags(world, world / "sdxl.safetensors", tmp_path, tokenizer_name=TOKENIZER))
    base, _, compute = zoodip.resolve_settings(args, torch.device("cpu"))
    base_model.check_weights(base)
    assert not read
    monkeypatch.setattr(weight_cache, "SHARD_BYTES", 1)  # which a float32 weight stays in until it is written
    zoodip.load_frozen(base, "unet", zoodip.BACKENDS["int8"], compute, tmp_path / "cache")
    assert len(read) > 100 and most <= 4


def test_memory_is_predicted_as_for_the_folder(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "process_memory", lambda: memory.ProcessMemory(2**29, 2**28))  # of both the same
    tables = []
    for base, more in (("sd1", {}), ("sd1.safetensors", {"tokenizer_name": TOKENIZER})):
        zoodip.main(zoodip.parse_args(flags(world, world / base, tmp_path, estimate_memory=True, **more)))
        tables.append(capsys.readouterr().out)
    assert "peak" in tables[0] and tables[0] == tables[1]


def test_what_was_learned_is_drawn_on_the_file(world, tmp_path):
    """The evaluation, which the page draws with, and the three lines that a run ends with."""
    file, own = world / "sd1.safetensors", {"tokenizer_name": world / "sd1" / "tokenizer"}
    learned(world, file, tmp_path / "run", **own)
    (tmp_path / "prompts.txt").write_text("a photo of a {}\n")
    chosen = {"pretrained_model_name_or_path": file, "class_word": "star", "draw_only": True, **own}
    chosen |= {"results": f"ours={tmp_path / 'run'}", "prompts": tmp_path / "prompts.txt", "num_inference_steps": 2}
    chosen |= {"output_dir": tmp_path / "drawn", "num_images_per_prompt": 1, "resolution": 16}
    words = as_arguments({f"--{name}": value for name, value in chosen.items()})
    evaluation.main(evaluation.parse_args(words))
    assert len(list((tmp_path / "drawn" / "images").rglob("*.png"))) == 2


def test_numbers_that_are_none(world, tmp_path):
    content, file = load_file(world / "sd1.safetensors"), tmp_path / "x.safetensors"
    name = next(name for name in content if name.endswith("mlp.fc1.weight"))
    content[name][0, 0] = torch.inf
    save_file(content, file)
    with pytest.raises(InputError, match="the weights hold NaN or infinity in '.*mlp.fc1.weight'"):
        learned(world, file, tmp_path / "out", tokenizer_name=TOKENIZER, quantized_cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("script", [selective, tuneqdm], ids=lambda script: script.__name__)
def test_the_dreambooth_trainers_take_one(world, tmp_path, script):
    outs = []
    for base, more in (
        (world / "sd1", {}),
        (world / "sd1.safetensors", {"--tokenizer_name": world / "sd1" / "tokenizer"}),
    ):
        outs.append(tmp_path / base.name)
        chosen = {"--pretrained_model_name_or_path": base, "--instance_data_dir": world / "pictures", **more}
        chosen |= {"--subject_name": "star", "--output_dir": outs[-1], "--max_train_steps": 1, "--report_to": "none"}
        script.main(script.parse_args(as_arguments(chosen)))
    results = [load_file(out / script.PUBLICATION.result_name) for out in outs]
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_evaluation_draws_with_one(world, tmp_path, family):
    file, prompts = world / f"{family}.safetensors", tmp_path / "prompts.txt"
    prompts.write_text("a {}\n")
    chosen = {"--pretrained_model_name_or_path": file, "--class_word": "star", "--draw_only": True, "--resolution": 16}
    chosen |= {"--prompts": prompts, "--output_dir": tmp_path / "out", "--num_images_per_prompt": 1}
    chosen |= {"--num_inference_steps": 4, "--tokenizer_name": world / family / "tokenizer"}
    evaluation.main(evaluation.parse_args(as_arguments(chosen)))
    drawn = np.asarray(Image.open(tmp_path / "out" / "images" / "plain-word" / "000-00.png"), dtype=int)
    pipeline = FAMILIES[family].pipeline.from_pretrained(world / family)
    pipeline.scheduler = FAMILIES[family].sampler(pipeline.scheduler)
    options = {"num_inference_steps": 4, "height": 16, "width": 16, "guidance_scale": 7.5}
    image = pipeline("a star", generator=torch.Generator().manual_seed(0), **options).images[0]
    assert np.abs(drawn - np.asarray(image, dtype=int)).max() <= 1


# -------------------------------------------------------------------------------------------------- the real families


@pytest.mark.parametrize("name", FAMILIES)
def test_the_real_configs_are_the_real_models(name):
    """Numbers of parameters as published, and every tensor of the original layout is found under its name."""
    counts = {
        "sd1": {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863},
        "sd2": {"unet": 865_910_724, "text_encoder": 340_387_840, "vae": 83_653_863},
        "sdxl": {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840, "vae": 83_653_863},
    }[name]
    family, root = FAMILIES[name], single_file.CONFIGS / name
    configs = base_model.Configs(root, "x")
    assert families.recognise(json.loads((root / "model_index.json").read_text()), configs, [family], "x") is family
    text = {part: base_model.read_text_config(root, part, configs[part], family, "x") for part in family.text_encoders}
    whole = {part: text.get(part, configs[part]) for part in family.components}
    models = {part: base_model.build_empty(family.classes[part], whole[part], part, "x") for part in whole}
    assert {part: sum(p.numel() for p in model.parameters()) for part, model in models.items()} == counts
    states = {part: model.state_dict() for part, model in models.items()}
    encoders = [states[part] for part in family.text_encoders]
    parts = states["unet"], states["vae"], encoders
    old = as_single_file(name, *parts, dict(models["unet"].config), dict(models["vae"].config))
    text_prefixes = next(prefixes for family_name, *prefixes in single_file.TEXT.values() if family_name == name)
    single, label = single_file.SingleFile(None, root, tuple(text_prefixes), {}), "x"
    later = {
        key: single_file.Later(single_file.StoredTensor("F32", tuple(value.shape)), lambda value=value: value)
        for key, value in old.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(single_file, "tensors", lambda *_: later)
        for part, model in models.items():
            config = text.get(part) or dict(model.config)
            found = single_file.component_tensors(single, family, part, config, label)
            kind = family.classes[part]
            shapes = {base_model.current_name(key, kind): tuple(each.read().shape) for key, each in found.items()}
            shapes = {key: shape for key, shape in shapes.items() if not key.endswith("position_ids")}
            assert shapes == {key: tuple(value.shape) for key, value in states[part].items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_real_schedulers(name):
    scheduler = base_model.read_scheduler(single_file.CONFIGS / name, FAMILIES[name], "x", {})
    assert scheduler.config.prediction_type == ("v_prediction" if name == "sd2" else "epsilon")
    assert scheduler.alphas_cumprod[-1].item() == pytest.approx(0.0047, abs=1e-4)


# ----------------------------------------------------------------------------------------------- what it predicts


def opened(file, name="x", **more):
    return base_model.open_base(base_model.ModelSource(str(file)), str(more.pop("tokenizer")), FAMILIES.values())


@pytest.mark.parametrize(
    "family, yaml, metadata, spread, expected",
    [
        ("sd1", None, None, 0.0, "epsilon"),
        ("sd1", 'parameterization: "v"', None, 0.0, "v_prediction"),
        ("sd1", None, {"modelspec.prediction_type": "v"}, 0.0, "v_prediction"),
        ("sd2", None, None, 0.01, "epsilon"),
        ("sd2", None, None, 0.2, "v_prediction"),
        ("sd2", None, {"modelspec.prediction_type": "epsilon"}, 0.2, "epsilon"),
        ("sd2", "scale_factor: 0.18215", None, 0.2, "epsilon"),
        ("sd2", "    parameterization: 'v'\n", None, 0.01, "v_prediction"),
    ],
)
def test_what_a_file_predicts(world, tmp_path, caplog, family, yaml, metadata, spread, expected):
    """The order of docs/data.md; a file of 2.x that says nothing is judged by a weight, as ComfyUI judges it."""
    content, file = load_file(world / f"{family}.safetensors"), tmp_path / "x.safetensors"
    norm = max(name for name in content if single_file.LAST_NORM.fullmatch(name))
    content[norm] = spread * torch.tensor([1.0, -1.0]).repeat(len(content[norm]) // 2)
    save_file(content, file, metadata)
    if yaml:
        (tmp_path / "x.yaml").write_text(yaml)
    caplog.set_level("INFO")
    base = opened(file, tokenizer=world / "sd1" / "tokenizer")
    assert base.scheduler.config.prediction_type == expected
    if family == "sd2" and expected == "epsilon":
        assert base.denoiser_config["sample_size"] == 64
    assert ("x.safetensors predicts" in caplog.text) == (expected != "epsilon" or family == "sd2")


def test_what_a_file_of_xl_predicts(world, tmp_path):
    content = load_file(world / "sdxl.safetensors") | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file(content, tmp_path / "x.safetensors")
    scheduler = opened(tmp_path / "x.safetensors", tokenizer=world / "sd1" / "tokenizer").scheduler
    assert scheduler.config.prediction_type == "v_prediction" and scheduler.alphas_cumprod[-1] < 1e-6


# ------------------------------------------------------------------------------------------------------- tokenizers


def test_tokenizers_of_the_hubs_cache(world, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--someone--sdxl" / "snapshots" / "0123" / "tokenizer"
    (tmp_path / "models--someone--flux" / "snapshots" / "0123" / "tokenizer").mkdir(parents=True)
    shutil.copytree(TOKENIZER, snapshot)
    monkeypatch.setattr(single_file, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "files").mkdir()
    source = base_model.ModelSource(str(shutil.copy(world / "sdxl.safetensors", tmp_path / "files")))
    base = base_model.open_base(source, None, FAMILIES.values())
    folder = base_model.open_base(base_model.ModelSource(str(world / "sdxl")), None, FAMILIES.values())
    texts = ["a star on the beach", ""]
    assert torch.equal(base.tokenize(texts), folder.tokenize(texts))
    assert [tokenizer.pad_token for tokenizer in base.tokenizers] == ["<|endoftext|>", "!"]


@pytest.fixture
def alone(world, tmp_path):
    """A file with nothing beside it."""
    return shutil.copy(world / "sd1.safetensors", tmp_path / "alone.safetensors")


def test_a_tokenizer_that_is_nowhere(alone):
    source = base_model.ModelSource(str(alone))
    with pytest.raises(InputError, match="is a single file, which has no tokenizer; .* pip install open_clip_torch"):
        base_model.open_base(source, None, FAMILIES.values())


def test_a_tokenizer_beside_the_file(world, alone, tmp_path):
    (tmp_path / "tokenizer").symlink_to(world / "sd1" / "tokenizer")
    base = base_model.open_base(base_model.ModelSource(str(alone)), None, FAMILIES.values())
    assert base.tokenizer.get_vocab() == CLIPTokenizer.from_pretrained(TOKENIZER).get_vocab()


def test_the_vocabulary_of_a_package(tmp_path, monkeypatch):
    """CLIP's file in its published form: a line of a version, then merges, of which so many count.

    Words are 256 bytes, those that print first, the same at the end of a word, what merges make, and two marks.
    """
    package, merges = tmp_path / "site" / "open_clip", ["l l", "h e", "he ll", "hell o</w>"]
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    with gzip.open(package / single_file.VOCABULARY, "wt", encoding="utf-8") as file:
        file.write("\n".join(['"bpe_simple_vocab_16e6.txt#version: 0.2', *merges, "n o</w>"]) + "\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(single_file, "PACKAGE", "open_clip")
    monkeypatch.setattr(single_file, "MERGES", len(merges))
    size = 2 * 256 + len(merges) + 2
    alone = single_file.SingleFile(tmp_path / "x.safetensors", tmp_path, (), {})
    first, second = single_file.find_tokenizers(alone, families.SDXL, [size, size], "x")
    hello, no = first("Hello!").input_ids, first("no").input_ids
    assert hello == [size - 2, 515, 256, size - 1] and no == [size - 2, 77, 256 + 78, size - 1]
    assert first.pad_token_id == size - 1 and second.pad_token_id == 0 and first.model_max_length == 77


# ---------------------------------------------------------------------------------------------------- what is refused


class Evil:
    def __reduce__(self):
        return print, ("unpickled",)


def test_what_is_no_such_file(world, tmp_path, capsys):
    whole = load_file(world / "sd1.safetensors")

    def refused(content, expected, suffix="safetensors", **more):
        path = tmp_path / f"x.{suffix}"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            save_file(content, path) if suffix == "safetensors" else torch.save(content, path)
        with pytest.raises(InputError, match=expected) as caught:
            base_model.check_weights(
                base_model.open_base(
                    base_model.ModelSource(str(path), **more), str(world / "sd1" / "tokenizer"), FAMILIES.values()
                )
            )
        assert str(caught.value).endswith(".")

    def without(prefix):
        return {name: tensor for name, tensor in whole.items() if not name.startswith(prefix)}

    refused(without("first_stage_model."), "holds no VAE, as checkpoints")
    refused(without("cond_stage_model."), "holds no text encoder, as")
    refused({"lora_unet_x.lora_up.weight": torch.zeros(1)}, "holds no UNet and no VAE")
    refused({"conditioner.embedders.0.model.ln_final.bias": torch.zeros(1)}, "is SDXL's refiner")
    refused(without("model.diffusion_model.time_embed.0"), "the unet weights .x.safetensors. lack 'time_embedding")
    nine = torch.zeros(8, 9, 3, 3)
    refused(whole | {single_file.FIRST_LAYER: nine}, "is for inpainting")
    refused(whole | {"edm_mean": torch.zeros(1)}, "has noise levels of its own .EDM, as Playground 2.5.")
    wide = {"model.diffusion_model.time_embed.0.weight": torch.zeros(5, 5)}
    refused(whole | wide, "x.safetensors does not fit unet/config.json, it holds 'time_embedding.linear_1.weight'")
    refused(b"", "is empty: get it again")
    refused(b"1234567890", "is cut or damaged")
    refused(b"x", "is a file, and no .safetensors or .ckpt", suffix="gguf")
    refused({"state_dict": whole, "callbacks": Evil()}, "is no pickle of plain tensors .* as .safetensors", "ckpt")
    refused(b"x" * 99, "is no pickle of plain tensors", "ckpt")
    refused(whole, "--variant 'fp16' is for models in folders", variant="fp16")
    refused(whole, "--revision 'main' is for models in folders", revision="main")
    assert "unpickled" not in capsys.readouterr().out
