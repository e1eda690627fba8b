"""The evaluation under attack: folders of results, their JSON and tensors, and what is in the output folder."""

import contextlib
import json
import shutil
import types

import torch
from attack import NUMBERS, WORDS, changed_file, is_sentence, room
from conftest import REPO
from hypothesis import strategies as st
from pytest import MonkeyPatch
from safetensors.torch import save_file

import evaluate_personalization as evaluation
import tuneqdm_pipeline as tuneqdm
from personalization.errors import InputError
from personalization.models.families import SD1


BASE = REPO / "demo" / "base"
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8]
DTYPES += [torch.complex64, torch.float8_e4m3fn]
FILLS = [float("nan"), float("inf"), -float("inf"), 1e38, 0.0, 1.0]
ABOUT = {"bits": 8, "calibration": "minmax", "scale_sets": 1, "scale_intervals": None, "train_input_scales": False}
ABOUT |= {"num_train_timesteps": 1000, "base_model": "base"}  # of scales, but for what depends on the base
LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@contextlib.contextmanager
def results(folder):
    """A result of each kind, and a pipeline that everything is drawn with; nothing is drawn."""
    source = evaluation.base_model.ModelSource(str(BASE))
    base = evaluation.base_model.open_base(source)
    pipeline = evaluation.open_pipeline(base, torch.device("cpu"))
    width = pipeline.unet.get_submodule(LAYER[5:]).in_features
    tensors = {
        "embedding": {"<toy>": torch.ones(1, base.word_width)},
        "lora": {f"{LAYER}.lora_A.weight": torch.ones(2, width), f"{LAYER}.lora_B.weight": torch.ones(width, 2)},
    }
    layers, _ = tuneqdm.quantize_beside(pipeline.unet, 8, "minmax")
    about = ABOUT | {
        "base_sha256": tuneqdm.fingerprint(pipeline.unet, layers),
        "base_sketch": tuneqdm.sketch(pipeline.unet, layers),
    }
    tensors["scales"] = {k: torch.zeros(v) for k, v in tuneqdm.change_shapes(pipeline.unet, 1, False).items()}
    config = {
        "base_model": "base",
        "placeholder_token": "<toy>",
        "settings": {"subject_name": "sks", "pool_at_eos": None},
    }
    (folder / "prompts.txt").write_text("a {}\n")
    with MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "open_pipeline", lambda *_: pipeline)
        patch.setattr(type(pipeline), "__call__", lambda *_, **__: (_ for _ in ()).throw(Drawn()))
        more = {"config": config, "about": about, "tokens": len(pipeline.tokenizer)}
        yield types.SimpleNamespace(folder=folder, base=base, pipeline=pipeline, tensors=tensors, **more)


class Drawn(Exception):
    """Everything was judged, and drawing began."""


def changed_tensors(draw, tensors):
    """Tensors of which one is of another kind, shape, content or name; or none is there, or one more."""
    copy, key = dict(tensors), draw(st.sampled_from(sorted(tensors)))
    what = draw(st.sampled_from(["dtype", "fill", "shape", "name", "gone", "more", "nothing"]))
    if what == "dtype":
        copy[key] = copy[key].to(draw(st.sampled_from(DTYPES)))
    elif what == "fill":
        copy[key] = torch.full_like(copy[key], draw(st.sampled_from(FILLS)))
    elif what == "shape":
        copy[key] = torch.ones(draw(st.lists(st.integers(0, 5), max_size=5)))
    elif what in ("name", "more"):
        name = draw(WORDS.filter(lambda text: len(text) < 1000 and text.isascii()) | st.sampled_from(names_like(key)))
        copy[name] = copy.pop(key) if what == "name" else torch.ones(2, 3)
    elif what == "gone":
        del copy[key]
    return copy


def names_like(key):
    parts = [
        "text_encoder",
        "lora_unet_x",
        "clip_l",
        "emb_params",
        "unet",
        ".alpha",
        ".dora_scale",
        "star",
        ",",
        "<toy>_1",
    ]
    return [key.replace("unet", part) for part in parts] + parts + [key + part for part in parts]


@room("result folders", results, examples=20)
def attack_results(world, data):
    """A result is refused in one sentence before anything is drawn, or can be drawn with."""
    draw, folder = data.draw, world.folder / "result"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(world.folder / "out", ignore_errors=True)
    folder.mkdir()
    kind = draw(st.sampled_from(sorted(world.tensors)))
    names, tensors, config = evaluation.KINDS[kind], world.tensors[kind], json.dumps(world.config).encode()
    hit = draw(st.sampled_from(["tensors", "file", "config", "drawing", "metadata"]))
    metadata = {tuneqdm.ABOUT: json.dumps(world.about)}
    if hit == "metadata" and kind == "scales":
        metadata = {tuneqdm.ABOUT: changed_file(draw, world.about).decode(errors="replace")}
    elif hit == "metadata":
        metadata = {"placeholder_token": draw(WORDS.filter(lambda text: len(text) < 1000)), "a": "b"}
    try:
        save_file(
            changed_tensors(draw, tensors) if hit == "tensors" else tensors, folder / names.result_name, metadata
        )
    except Exception:  # what safetensors itself does not write
        return
    if hit == "file":
        path = folder / names.result_name
        whole = path.read_bytes()
        path.write_bytes(whole[: draw(st.integers(0, len(whole)))] + draw(st.binary(max_size=30)))
    (folder / names.config_name).write_bytes(changed_file(draw, world.config) if hit == "config" else config)
    users = world.folder / "out" / "images" / "mine.png"
    users.parent.mkdir(parents=True)
    users.write_bytes(b"of a user")
    label = draw(st.sampled_from(["mine", "..", ".", "a/b", "A", "plain-word", "drawing.json"]) | WORDS)
    label = label if draw(st.integers(0, 3)) == 0 and len(label) < 1000 else "mine"
    if hit == "drawing":
        drawing = {"drawing": {"base": "x", "prompts": ["a {}"], "seed": 0}, "fingerprints": {"mine": "x"}}
        (users.parent / "drawing.json").write_bytes(changed_file(draw, drawing))
    words = ["--pretrained_model_name_or_path", str(BASE), "--class_word", "star", "--draw_only"]
    words += ["--prompts", str(world.folder / "prompts.txt"), "--output_dir", str(world.folder / "out")]
    if draw(st.integers(0, 3)) == 0:
        name = draw(st.sampled_from(["seed", "guidance_scale", "resolution", "class_word"]))
        words.append(f"--{name}={draw(NUMBERS | WORDS)}")
    try:
        evaluation.main(evaluation.parse_args([*words, f"--results={label}={folder}"]))
    except InputError as error:
        assert is_sentence(error), error
    except SystemExit as end:
        assert end.code == 2
    except Drawn:
        pass
    world.pipeline.unload_lora_weights()
    SD1.unload_words(world.pipeline)
    assert len(world.pipeline.tokenizer) == world.tokens, "the pipeline is as it was"
    assert users.read_bytes() == b"of a user"
    assert {path.name for path in world.folder.iterdir()} == {"prompts.txt", "result", "out"}
    assert {path.name for path in folder.iterdir()} == {names.result_name, names.config_name}
