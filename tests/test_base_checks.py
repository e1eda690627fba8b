"""A base is judged as a whole before anything slow, and what the cache holds is verified before it is trained on."""

import errno
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import as_arguments
from hub_server import HubServer, Repo
from safetensors.torch import load_file, save_file

import train_zoodip_textual_inversion as zoodip
from personalization import flags
from personalization.errors import InputError
from personalization.models import base_model, memory, openvino_unet, weight_cache
from personalization.models.base_model import ModelSource
from personalization.models.compute import Compute
from personalization.models.families import SD1, clip


COMPONENTS = SD1.components
CPU = Compute(torch.device("cpu"), torch.float32, torch.contiguous_format)


@pytest.fixture
def base(demo_base, tmp_path):
    """A copy of the demo base, to damage."""
    return shutil.copytree(demo_base, tmp_path / "a base")


def refusal(folder, revision=None, variant=None, tokenizer_name=None):
    """The sentence that a base is refused with; it names the model, or the tokenizer that was given."""
    with pytest.raises(InputError) as caught:
        opened = base_model.open_base(ModelSource(str(folder), revision, variant), tokenizer_name)
        base_model.check_weights(opened)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 900 and message.endswith(".")
    assert str(folder) in message or f"--tokenizer_name {tokenizer_name!r}" in message
    return message


def edit(path, **changes):
    """Changes entries of a JSON file; `...` removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def weights_of(folder, component):
    return next((folder / component).glob("*.safetensors"))


def rewrite(path, change):
    """Changes the tensors of a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def shard(path, count=3):
    """Replaces a safetensors file by shards, without an index; returns their paths."""
    names, tensors = [], list(load_file(path).items())
    for i in range(count):
        names.append(path.with_name(f"{path.stem}-{i + 1:05d}-of-{count:05d}.safetensors"))
        save_file(dict(tensors[i::count]), names[-1])
    path.unlink()
    return names


# ------------------------------------------------------------------------------------------------- weight files


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


DAMAGES = {
    "cut": (cut, "is cut or damaged"),
    "cut in its header": (lambda path: path.write_bytes(path.read_bytes()[:100]), "is cut or damaged"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "zeroed": (lambda path: path.write_bytes(bytes(path.stat().st_size)), "is cut or damaged"),
    "a pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"),
        "git lfs pull",
    ),
    "a web page": (lambda path: path.write_text("<html>" * 100), "is cut or damaged"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
    "another shape": (
        lambda path: rewrite(path, lambda tensors: tensors.update({max(tensors): torch.zeros(3, 5)})),
        "of shape [3, 5], the config wants",
    ),
    "a tensor too few": (lambda path: rewrite(path, lambda tensors: tensors.pop(max(tensors))), " lack '"),
    "a tensor too many": (
        lambda path: rewrite(path, lambda tensors: tensors.update({"more.weight": torch.zeros(2)})),
        "holds 'more.weight', which the config has no place for",
    ),
    "whole numbers": (
        lambda path: rewrite(path, lambda tensors: tensors.update({n: t.char() for n, t in tensors.items()})),
        "as I8, which are no floating-point weights",
    ),
    "absent": (lambda path: path.unlink(), "get the model again"),
    "pickled": (lambda path: path.rename(path.with_suffix(".bin")), ".bin, to safetensors"),
}


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_named(base, component, damage):
    change, expected = DAMAGES[damage]
    change(weights_of(base, component))
    message = refusal(base)
    assert expected in message and component in message


def test_swapped_weights_are_named(base):
    first, second = (weights_of(base, name) for name in ("unet", "vae"))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    assert "does not fit unet/config.json" in refusal(base)


def test_weights_that_cannot_be_opened_are_one_sentence(base, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("personalization.models.weight_files.safe_open", refuse)
    assert "Permission denied" in refusal(base)


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("indexed", [True, False])
def test_shards_load_and_a_missing_one_is_named(base, component, indexed):
    path = weights_of(base, component)
    whole = load_file(path)
    shards = shard(path)
    if indexed:
        places = {name: file.name for file in shards for name in load_file(file)}
        path.with_name(f"{path.name}.index.json").write_text(json.dumps({"weight_map": places}))
    opened = base_model.open_base(ModelSource(str(base)))
    files = base_model.find_weight_files(opened, component)
    assert files == shards and {name for name, _ in base_model.stored_tensors(files)} == {
        base_model.current_name(name) for name in whole
    }
    shards[1].unlink()
    message = refusal(base)
    assert f"lacks {component}/{shards[1].name}, 1 of the 3 shards" in message
    if indexed:
        for file in (shards[0], shards[2]):
            file.unlink()
        assert "3 of the 3 shards" in refusal(base)
        path.with_name(f"{path.name}.index.json").write_text('{"weight_map": [')
        assert f"{path.name}.index.json cannot be read" in refusal(base)


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_variant_that_is_not_there_or_was_forgotten_is_named(base, component):
    for name in COMPONENTS:
        path = weights_of(base, name)
        shutil.copy(path, path.with_name(f"{path.stem}.fp16.safetensors"))
    base_model.check_weights(base_model.open_base(ModelSource(str(base), None, "fp16")))
    fp16, plain = sorted((base / component).glob("*.safetensors"))
    fp16.rename(base / "aside")
    message = refusal(base, variant="fp16")
    assert f".fp16.safetensors in {component}/" in message and "leave out --variant" in message
    (base / "aside").rename(fp16)
    plain.unlink()
    message = refusal(base)
    assert f"safetensors in {component}/" in message and "give --variant fp16" in message
    shard(fp16)
    assert "give --variant fp16" in refusal(base)


def test_names_of_older_files_are_known(base):
    """Those of Stable Diffusion 1.5: a VAE with attention as in 2022, a text encoder as before transformers 5."""
    edit(base / "vae" / "config.json", mid_block_add_attention=True)
    opened = base_model.open_base(ModelSource(str(base)))
    wanted = base_model.empty_model(opened, "vae").state_dict()
    attention = {name: torch.randn(tensor.shape) for name, tensor in wanted.items() if ".attentions." in name}
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def rename(tensors):
        for name, tensor in attention.items():
            part = next((part for part in old if part in name), ".group_norm.")
            tensors[name.replace(part, old.get(part, part))] = tensor

    def prefix(tensors):
        for name in list(tensors):
            tensors[f"text_model.{name.removeprefix('text_model.')}"] = tensors.pop(name)
        tensors["text_model.embeddings.position_ids"] = torch.arange(32)[None]

    rewrite(weights_of(base, "vae"), rename)
    rewrite(weights_of(base, "text_encoder"), prefix)
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in load_file(weights_of(base, "vae"))
    base_model.check_weights(opened)
    found = base_model.load_vae(opened).state_dict()
    assert len(attention) == 20 and all(torch.equal(found[name], tensor) for name, tensor in attention.items())


def test_a_vae_that_encodes_comes_without_its_decoder(base, monkeypatch):
    """Of a mapped file in float16 every tensor that is loaded is a copy in float32."""
    opened, loaded, put = base_model.open_base(ModelSource(str(base))), [], base_model.set_module_tensor_to_device
    monkeypatch.setattr(
        base_model,
        "set_module_tensor_to_device",
        lambda model, name, *a, **k: (loaded.append(name), put(model, name, *a, **k)),
    )
    vae, pixels = base_model.load_vae_encoder(opened), torch.rand(1, 3, 32, 32)
    assert loaded and not any(name.startswith("decoder") for name in loaded) and vae.decoder is None
    with torch.inference_mode():
        found, whole = (model.encode(pixels).latent_dist.parameters for model in (vae, base_model.load_vae(opened)))
    assert torch.equal(found, whole) and any(name.startswith("decoder") for name in loaded)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_not_hidden_by_int8(base, tmp_path, value):
    rewrite(weights_of(base, "unet"), lambda tensors: tensors["conv_in.weight"][0].fill_(value))
    opened = base_model.open_base(ModelSource(str(base)))
    with pytest.raises(InputError, match="NaN or infinity in 'conv_in.weight'"):
        zoodip.load_frozen(opened, "unet", zoodip.BACKENDS["int8"], CPU, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


# ------------------------------------------------------------------------------------- configs that do not fit


CONFIGS = [
    ("unet", {"in_channels": 9}, "is for inpainting"),
    ("unet", {"in_channels": 7}, "takes 7 channels and returns 4, and a VAE with 4"),
    ("unet", {"out_channels": 8}, "takes 4 channels and returns 8"),
    ("vae", {"latent_channels": 16}, "a VAE with 16"),
    ("unet", {"cross_attention_dim": 768}, "of width 768 and a text encoder of width 128"),
    ("text_encoder", {"hidden_size": 64}, "of width 128 and a text encoder of width 64"),
    (
        "unet",
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 80,
        },
        "addition_embed_type 'text_time'",
    ),
    ("unet", {"num_class_embeds": 1000}, "class labels"),
    ("unet", {"class_embed_type": "timestep"}, "class labels"),
    ("unet", {"encoder_hid_dim": 128, "encoder_hid_dim_type": "text_image_proj"}, "cannot work together"),
    ("unet", {"block_out_channels": [128, 256]}, "does not fit unet/config.json"),
    ("unet", {"block_out_channels": [64]}, "unet/config.json describes no model"),
    ("unet", {"block_out_channels": "many"}, "unet/config.json describes no model"),
    ("unet", {"block_out_channels": [65, 131]}, "unet/config.json describes no model"),
    ("unet", {"layers_per_block": 2}, "unet/config.json"),
    ("unet", {"down_block_types": ["NoBlock", "NoBlock"]}, "unet/config.json describes no model"),
    ("unet", {"_class_name": "UNet1DModel"}, "is of a 'UNet1DModel'"),
    ("unet", {"_class_name": ["a"]}, "must be of a UNet2DConditionModel"),
    ("vae", {"_class_name": "AutoencoderTiny"}, "is of a 'AutoencoderTiny'"),
    ("vae", {"block_out_channels": ...}, "vae/config.json"),
    ("vae", {"layers_per_block": 3}, "vae/config.json"),
    ("vae", {"scaling_factor": "much"}, "scaling_factor 'much'"),
    ("vae", {"scaling_factor": None}, "scaling_factor None"),
    ("text_encoder", {"vocab_size": 500}, "tokenizer/ has 878 tokens"),
    ("text_encoder", {"vocab_size": 1000}, "text_encoder/config.json"),
    ("text_encoder", {"num_hidden_layers": 2}, "does not fit text_encoder/config.json"),
    ("text_encoder", {"num_hidden_layers": "all"}, "text_encoder/config.json"),
    ("text_encoder", {"num_attention_heads": 3}, "text_encoder/config.json"),
    ("text_encoder", {"max_position_embeddings": 16}, "prompts of 32 tokens"),
    ("text_encoder", {"model_type": "bert"}, "is of a"),
    ("scheduler", {"prediction_type": "sample"}, "predicts 'sample'"),
    ("scheduler", {"beta_schedule": ...}, "no noise schedule"),
    ("scheduler", {"beta_start": ...}, "it has no beta_start"),
    ("scheduler", {"num_train_timesteps": 10**11}, "is more than 1000000"),
    ("unet", {"layers_per_block": 10**12}, "is more than 1000"),
    ("unet", {"transformer_layers_per_block": [1, 10**12]}, "is more than 1000"),
    ("text_encoder", {"max_position_embeddings": 10**11}, "is more than 1000000"),
    ("scheduler", {"beta_schedule": "steep"}, "no noise schedule"),
    ("scheduler", {"beta_end": 7.0}, "no noise schedule"),
    ("scheduler", {"num_train_timesteps": "all"}, "no noise schedule"),
]


@pytest.mark.parametrize("component, changes, expected", CONFIGS)
def test_parts_that_do_not_fit_are_named(base, component, changes, expected):
    name = "scheduler_config.json" if component == "scheduler" else "config.json"
    edit(base / component / name, **changes)
    assert expected in refusal(base)


SMALL_FILES = ["model_index.json", "scheduler/scheduler_config.json", *(f"{name}/config.json" for name in COMPONENTS)]


@pytest.mark.parametrize("name", SMALL_FILES)
def test_a_missing_or_damaged_small_file_is_named(base, name):
    path = base / name
    whole = path.read_bytes()
    for content in (whole[:-20], b"", b"[]", b"{}", b"\xff\xfe\x00", b"[" * 100_000):
        path.write_bytes(content)
        assert f"{name} cannot be read" in refusal(base)
    path.unlink()
    assert f"{name} is missing" in refusal(base)


@pytest.mark.parametrize("size", [..., None, "large", 0, -8, True, [16, 24], []])
def test_a_base_that_does_not_say_its_size_needs_the_flag(base, basics, size):
    edit(base / "unet" / "config.json", sample_size=size)
    flags = basics | {"--pretrained_model_name_or_path": base}
    with pytest.raises(InputError, match="sample_size .* give --resolution, a multiple of"):
        zoodip.resolve_settings(zoodip.parse_args(as_arguments(flags)), CPU.device)
    args = zoodip.parse_args(as_arguments(flags | {"--resolution": 32}))
    zoodip.resolve_settings(args, CPU.device)
    assert args.resolution == 32


def test_a_size_of_two_equal_sides_is_one(base):
    own = base_model.open_base(ModelSource(str(base))).resolution
    edit(base / "unet" / "config.json", sample_size=[16, 16])
    assert base_model.open_base(ModelSource(str(base))).resolution == own


def test_the_wrong_kind_of_model_is_named(base, tmp_path):
    index = base / "model_index.json"
    before = index.read_text()
    edit(index, text_encoder_2=["transformers", "CLIPTextModelWithProjection"])
    assert "two text encoders (SDXL)" in refusal(base)
    index.write_text(before)
    edit(index, unet=..., transformer=["diffusers", "SD3Transformer2DModel"])
    assert "has a transformer and no UNet" in refusal(base)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "is empty: get it again" in refusal(tmp_path / "model.safetensors")
    assert "--pretrained_model_name_or_path ''" in refusal("")


@pytest.mark.parametrize("name", ["a" * 5000, "two\nlines", "a//b", "..", "**", "-"])
def test_odd_names_are_one_sentence(base, name, monkeypatch):
    monkeypatch.setattr(base_model, "snapshot_download", lambda *_, **__: base_model.Path("/nowhere/to/be/found"))
    with pytest.raises(InputError) as caught:
        base_model.open_base(ModelSource(name))
    assert "\n" not in str(caught.value)
    assert "leave out --variant" in refusal(base, variant=name)
    with pytest.raises(InputError) as caught:
        base_model.open_base(ModelSource(str(base)), name)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("--tokenizer_name")


def test_a_revision_of_a_local_folder_is_refused(base):
    assert "--revision 'fp16' names a version on the Hub" in refusal(base, revision="fp16")


# ---------------------------------------------------------------------------------------------------- tokenizers


def as_two_files(folder):
    """Rewrites tokenizer.json as vocab.json and merges.txt, as Stable Diffusion 1.x has them."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n")
    (folder / "tokenizer.json").unlink()


def without(name):
    return lambda folder: (folder / name).unlink()


TOKENIZERS = {
    "absent": (shutil.rmtree, "neither tokenizer.json nor vocab.json and merges.txt"),
    "without its words": (without("tokenizer.json"), "neither tokenizer.json nor"),
    "without its length": (without("tokenizer_config.json"), "tokenizer_config.json is missing"),
    "cut": (lambda f: cut(f / "tokenizer.json"), "is no tokenizer of CLIP"),
    "empty": (lambda f: (f / "tokenizer.json").write_text(""), "is no tokenizer of CLIP"),
    "cut config": (lambda f: (f / "tokenizer_config.json").write_text('{"a'), "is no tokenizer of CLIP"),
    "long prompts": (lambda f: edit(f / "tokenizer_config.json", model_max_length=64), "prompts of 64 tokens"),
    "text for a length": (lambda f: edit(f / "tokenizer_config.json", model_max_length="77"), "model_max_length"),
    "without merges": (lambda f: (as_two_files(f), (f / "merges.txt").unlink()), "neither tokenizer.json nor"),
    "cut vocabulary": (lambda f: (as_two_files(f), cut(f / "vocab.json")), "is no tokenizer of CLIP"),
}


@pytest.mark.parametrize("damage", TOKENIZERS)
def test_a_damaged_tokenizer_is_named(base, damage):
    change, expected = TOKENIZERS[damage]
    shutil.copytree(base / "tokenizer", base / "another")
    change(base / "another")
    message = refusal(base, tokenizer_name=str(base / "another"))
    there = expected if damage != "absent" else "neither a local folder nor a model on the Hub"
    assert there in message and message.startswith("--tokenizer_name")
    change(base / "tokenizer")
    message = refusal(base)
    assert expected in message and f"{str(base)!r}: tokenizer/" in message


def test_merges_that_were_cut_do_not_spell_words_in_silence(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({f"t{i}": i for i in range(1512)}))
    for count in (998, 990):
        (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "a b\n" * count)
        clip.check_merges(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "a b\n" * 900)
    with pytest.raises(ValueError, match="merges.txt has 900 merges for 1512 tokens"):
        clip.check_merges(tmp_path)


def test_a_tokenizer_that_is_nowhere_is_not_blamed_on_the_base(base, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "neither a local folder nor a model on the Hub" in refusal(base, tokenizer_name="./nowhere")


# -------------------------------------------------------------------------------------------------- from the Hub


def test_a_base_on_the_hub_is_downloaded_and_checked_alike(base, tmp_path):
    """In a process of its own: huggingface_hub reads its settings once."""
    files = {str(path.relative_to(base)): path.read_bytes() for path in base.rglob("*") if path.is_file()}
    fp16 = {n.replace(".safetensors", ".fp16.safetensors") if "vae" in n else n: data for n, data in files.items()}
    no_unet = {name: data for name, data in files.items() if not name.startswith("unet/diff")}
    code = (
        "import sys; from personalization.models.base_model import *\n"
        "for name in sys.argv[1:]:\n"
        "    try: base = open_base(ModelSource(name)); check_weights(base); print('fine', load_vae(base).dtype)\n"
        "    except Exception as error: print(type(error).__name__, error)"
    )
    with HubServer() as hub:
        names = {"alice/whole": files, "alice/fp16": fp16, "alice/none": no_unet, "alice/other": {"README.md": b"x"}}
        for name, content in names.items():
            hub.repos[name] = Repo(files=dict(content))
        environment = {**os.environ, **hub.environment(tmp_path / "home")}
        command = [sys.executable, "-c", code, *names, "alice/nowhere"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    lines = done.stdout.splitlines()
    assert len(lines) == 5 and lines[0] == "fine torch.float32", done.stderr
    assert all(line.startswith("InputError --pretrained_model_name_or_path 'alice/") for line in lines[1:])
    assert "safetensors in vae/: give --variant fp16" in lines[1]
    assert "safetensors in unet/: get the model again" in lines[2]
    assert "model_index.json is missing" in lines[3]
    assert "nor on the Hub" in lines[4]


# ------------------------------------------------------------------------------------------------------ the cache


def load(folder, cache, component="unet"):
    opened = base_model.open_base(ModelSource(str(folder)))
    return zoodip.load_frozen(opened, component, zoodip.BACKENDS["int8"], CPU, cache)[0]


@pytest.fixture
def cache(demo_base, tmp_path, monkeypatch):
    """A filled cache of several shards, and the state that it must give."""
    monkeypatch.setattr(weight_cache, "SHARD_BYTES", 10**6)
    state = {name: tensor.clone() for name, tensor in load(demo_base, tmp_path / "cache").state_dict().items()}
    (entry,) = (tmp_path / "cache").iterdir()
    return SimpleNamespace(folder=tmp_path / "cache", entry=entry, state=state)


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[-100] ^= 4
    path.write_bytes(content)


def swap(first, second):
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def consistent_but_wrong(entry):
    """What an earlier version wrote for a wrong config: whole files, and a manifest that agrees."""
    rewrite(entry / "00000.safetensors", lambda tensors: tensors.pop(max(tensors)))
    (entry / weight_cache.MANIFEST).unlink()
    weight_cache.write_manifest(entry)


def replaced_by_a_file(entry):
    shutil.rmtree(entry)
    entry.write_text("in the way")


CACHE_DAMAGES = {
    "cut": lambda entry: cut(entry / "00001.safetensors"),
    "one bit": lambda entry: flip_bit(entry / "00001.safetensors"),
    "zeroed": lambda entry: (entry / "00001.safetensors").write_bytes(bytes(1000)),
    "a shard lost": lambda entry: (entry / "00001.safetensors").unlink(),
    "a shard more": lambda entry: shutil.copy(entry / "00001.safetensors", entry / "00099.safetensors"),
    "swapped": lambda entry: swap(entry / "00000.safetensors", entry / "00001.safetensors"),
    "no manifest": lambda entry: (entry / weight_cache.MANIFEST).unlink(),
    "cut manifest": lambda entry: cut(entry / weight_cache.MANIFEST),
    "odd manifest": lambda entry: (entry / weight_cache.MANIFEST).write_text('{"files": [1]}'),
    "wrong tensors": consistent_but_wrong,
    "a file": replaced_by_a_file,
}


@pytest.mark.parametrize("damage", CACHE_DAMAGES)
def test_a_damaged_cache_is_rebuilt_with_one_warning_and_never_trained_on(demo_base, cache, caplog, damage):
    CACHE_DAMAGES[damage](cache.entry)
    with caplog.at_level("WARNING"):
        for _ in range(2):  # the second time it is fine again
            found = load(demo_base, cache.folder).state_dict()
            assert all(torch.equal(found[name], tensor) for name, tensor in cache.state.items())
    assert [str(cache.entry) in record.message and "made anew" in record.message for record in caplog.records] == [
        True
    ]
    assert list(cache.folder.iterdir()) == [cache.entry]


def test_a_wrong_config_leaves_the_cache_as_it_is(base, tmp_path):
    load(base, tmp_path / "cache")
    config = (base / "unet" / "config.json").read_text()
    edit(base / "unet" / "config.json", block_out_channels=[128, 256])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    with pytest.raises(InputError, match="does not fit unet/config.json"):
        load(base, tmp_path / "cache")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == before
    (base / "unet" / "config.json").write_text(config)
    load(base, tmp_path / "cache")


@pytest.mark.parametrize("error", ["No space left on device", "Read-only file system"])
def test_a_cache_that_cannot_be_written_is_done_without(demo_base, tmp_path, monkeypatch, caplog, error):
    expected = load(demo_base, None).state_dict()
    monkeypatch.setattr(weight_cache, "SHARD_BYTES", 10**6)
    original, count = weight_cache.save_file, []

    def full(tensors, path, **options):
        original(tensors, path, **options)
        count.append(path)
        if len(count) > 2:
            raise OSError(errno.ENOSPC, error)

    monkeypatch.setattr(weight_cache, "save_file", full)
    with caplog.at_level("WARNING"):
        found = load(demo_base, tmp_path / "cache").state_dict()
        load(demo_base, tmp_path / "cache", "text_encoder")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert [error in r.message and str(tmp_path / "cache") in r.message for r in caplog.records] == [True]
    assert not list((tmp_path / "cache").iterdir())


def test_an_unwritable_cache_falls_back_only_where_nobody_chose_it(tmp_path, caplog):
    with pytest.raises(InputError, match="--quantized_cache_dir '/proc/nowhere' cannot be written"):
        weight_cache.open_cache("/proc/nowhere", flags.DEFAULT_CACHE, tmp_path)
    with caplog.at_level("WARNING"):
        folders = {weight_cache.open_cache("/proc/nowhere", "/proc/nowhere", tmp_path) for _ in range(2)}
    assert folders == {str(tmp_path / "quantized-cache")} and (tmp_path / "quantized-cache").is_dir()
    assert len(caplog.records) == 1 and "'/proc/nowhere' cannot be written" in caplog.records[0].message


def test_a_filled_cache_that_can_only_be_read_is_read(demo_base, cache, tmp_path, monkeypatch, caplog):
    def refuse(flag, folder):
        if folder == str(cache.folder):
            raise InputError("read-only")
        os.makedirs(folder, exist_ok=True)

    monkeypatch.setattr(weight_cache, "check_writable", refuse)
    for _ in range(2):
        spare = weight_cache.open_cache(str(cache.folder), str(cache.folder), tmp_path)
    (link,) = (tmp_path / "quantized-cache").iterdir()
    assert link.is_symlink() and spare == str(link.parent)
    before = cache.entry.stat().st_mtime_ns
    load(demo_base, spare)
    assert link.is_symlink()
    flip_bit(cache.entry / "00001.safetensors")
    load(demo_base, spare)  # made anew where it can be written
    assert not link.is_symlink() and link.is_dir() and cache.entry.stat().st_mtime_ns == before


def test_the_faster_of_two_processes_keeps_its_files(tmp_path):
    def write(folder, content="mine", others=True):
        if others:
            assert weight_cache.provide(tmp_path / "entry", lambda new: write(new, "theirs", False))
        (folder / "file").write_text(content)

    assert weight_cache.provide(tmp_path / "entry", write)
    assert (tmp_path / "entry" / "file").read_text() == "theirs" and len(list(tmp_path.iterdir())) == 1


def test_a_run_whose_default_cache_is_read_only_trains(train, monkeypatch):
    monkeypatch.setattr(flags, "DEFAULT_CACHE", "/proc/nowhere")
    out = train(max_train_steps=1)
    assert (out / "learned_embeds.safetensors").is_file()
    assert len(list((out / "quantized-cache").glob("unet-int8-*/*.safetensors"))) >= 1


def test_what_killed_runs_left_in_the_cache_goes_at_the_next_start(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host, day = weight_cache.host_name(), 24 * 3600
    removed = [f".tmp-{gone.pid}@{host}@-unet-abc", f".tmp-{gone.pid}-unet-int8", ".tmp-1@elsewhere@-old", ".tmp-xyz"]
    kept = [f".tmp-{os.getpid()}@{host}@-unet", f".tmp-{gone.pid}@elsewhere@-new", "unet-int8-float32-0", ".tmp-abc"]
    for name in (*removed, *kept):
        (tmp_path / name).mkdir()
        (tmp_path / name / "00000.safetensors").write_bytes(b"x")
        if name in (".tmp-1@elsewhere@-old", ".tmp-xyz"):
            for path in (tmp_path / name / "00000.safetensors", tmp_path / name):
                os.utime(path, (time.time() - day - 60,) * 2)
    (tmp_path / f".tmp-{gone.pid}-unet.xml").write_bytes(b"a file")
    weight_cache.open_cache(str(tmp_path), "elsewhere", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
    assert "@" not in host and platform.node()


def test_a_killed_write_is_cleaned_up_after(demo_base, tmp_path):
    """The writer is killed in the middle, as by `kill -9`."""
    code = (
        "import os, sys, pathlib; from personalization.models import weight_cache\n"
        "def write(folder): (folder / 'a').write_text('b'); print(folder.name, flush=True); os.kill(os.getpid(), 9)\n"
        "weight_cache.provide(pathlib.Path(sys.argv[1]) / 'unet-int8', write)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert done.returncode == -9 and [path.name for path in tmp_path.iterdir()] == [done.stdout.strip()]
    weight_cache.remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_checksum_reads_in_pieces(tmp_path):
    import zlib

    content = os.urandom(3 * 2**20 + 17)
    (tmp_path / "file").write_bytes(content)
    assert weight_cache.checksum(tmp_path / "file") == zlib.crc32(content)


def test_entries_can_be_read_by_those_who_share_the_folder(cache):
    mask = weight_cache.current_umask()
    assert cache.entry.stat().st_mode & 0o777 == 0o777 & ~mask
    assert {path.stat().st_mode & 0o777 for path in cache.entry.iterdir()} == {0o666 & ~mask}


@pytest.mark.parametrize("damaged", ["unet.bin", "unet.xml", weight_cache.MANIFEST])
def test_a_damaged_openvino_export_is_made_again(tmp_path, monkeypatch, caplog, damaged):
    saved = []

    def save_model(graph, path, **_):
        saved.append(path)
        path.write_text("graph")
        path.with_suffix(".bin").write_bytes(bytes(5000))

    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(save_model=save_model))
    monkeypatch.setattr(openvino_unet, "export_openvino", lambda *_: None)
    monkeypatch.setattr(openvino_unet, "OpenVINOUNet", lambda model, *_: model)

    def compile():
        what = {"config": None, "call": None, "engine": "CPU", "dtype": None, "device": None}
        return openvino_unet.compile_openvino_unet(tmp_path / "unet-openvino-1", lambda: None, **what)

    assert compile() == compile() == (tmp_path / "unet-openvino-1" / "unet.xml", 5000)
    assert len(saved) == 1
    path = tmp_path / "unet-openvino-1" / damaged
    path.write_bytes(path.read_bytes()[:-3])
    with caplog.at_level("WARNING"):
        assert compile() == compile() == (tmp_path / "unet-openvino-1" / "unet.xml", 5000)
    assert len(saved) == 2 and len(caplog.records) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["unet-openvino-1"]


# -------------------------------------------------------------------------------------------- absurd sizes, whole runs


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({"resolution": 1024, "train_batch_size": 1024}, "this run needs about"),
        ({"resolution": 512, "num_perturbations": 4096}, "this run needs about"),
    ],
)
def test_absurd_sizes_are_refused(train, monkeypatch, flags, expected):
    monkeypatch.setattr(base_model, "stored_tensors", lambda *_: pytest.fail("a weight was loaded"))
    with pytest.raises(InputError) as caught:
        train(**flags)
    assert expected in str(caught.value)


def test_a_mere_shortage_stays_a_warning(basics, monkeypatch, caplog):
    host = SimpleNamespace(available=0, total=10**9)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: host)
    monkeypatch.setattr(memory.psutil, "swap_memory", lambda: SimpleNamespace(total=10**9))
    settings = zoodip.parse_args(as_arguments(basics))
    for needed, refused in ((7.9e9, False), (8.1e9, True)):
        needs = SimpleNamespace(peak=needed + 5, mapped=5)
        caplog.clear()
        with caplog.at_level("WARNING"):
            try:
                memory.warn_if_too_large(settings, zoodip.SMALLER, lambda _, needs=needs: needs, CPU.device)
            except InputError as error:
                assert refused and str(error).startswith("this run needs about 7725 MB")
        assert refused != any("This run needs" in record.message for record in caplog.records)


def test_a_run_is_refused_before_anything_is_loaded(train, base, monkeypatch):
    monkeypatch.setattr(base_model, "stored_tensors", lambda *_: pytest.fail("a weight was loaded"))
    cut(weights_of(base, "text_encoder"))
    with pytest.raises(InputError, match="text_encoder/model.safetensors is cut"):
        train(pretrained_model_name_or_path=base)
