"""`zoodip_pipeline.py`: the same images as plain diffusers, and plain words where a concept does not fit."""

import ast
import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig, QuantoConfig, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from personalization.embeddings import save_a1111, save_embeds
from personalization.runs import write_json


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On a busy machine threads mostly wait for each other; the images here are too small to need them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def dimension(demo_base):
    weights = load_file(f"{demo_base}/text_encoder/model.safetensors")
    return next(value.shape[1] for name, value in weights.items() if name.endswith("token_embedding.weight"))


@pytest.fixture
def concept(tmp_path, dimension):
    """Makes the folder of a concept with random vectors, as large as the words of the demo base."""

    def make(token, vectors=1, width=dimension, base_model="base", local=True):
        folder = tmp_path / f"concept-{len(list(tmp_path.iterdir()))}"
        generator = torch.Generator().manual_seed(len(token))
        save_embeds(folder / "learned_embeds.safetensors", token, torch.randn(vectors, width, generator=generator))
        config = {"placeholder_token": token, "base_model": base_model, "base_model_is_local": local}
        write_json(folder / "zoodip_config.json", config)
        return folder

    return make


@pytest.fixture
def load(demo_base, repo):
    def from_pretrained(learned_embeds=None, **more):
        code = {"custom_pipeline": f"{repo}/zoodip_pipeline.py", "trust_remote_code": True}
        more = {"torch_dtype": torch.float32, **more}
        return DiffusionPipeline.from_pretrained(demo_base, **code, **more, learned_embeds=learned_embeds)

    return from_pretrained


@pytest.fixture
def plain(demo_base):
    def load_plain(*concepts):
        pipeline = StableDiffusionPipeline.from_pretrained(demo_base, torch_dtype=torch.float32)
        for folder in concepts:
            pipeline.load_textual_inversion(str(folder))
        return pipeline

    return load_plain


def draw(pipeline, prompt, negative_prompt=None):
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "np"}
    generator = torch.Generator().manual_seed(0)
    return pipeline(prompt, negative_prompt=negative_prompt, generator=generator, **size).images


def test_several_concepts_give_the_images_of_plain_diffusers(load, plain, concept):
    toy, bad = concept("<toy>", vectors=3), concept("<bad>")
    pipeline = load([str(toy), bad / "learned_embeds.safetensors"])  # a folder and a file
    assert type(pipeline).__name__ == "ZOODiPPipeline" and list(pipeline.concepts) == ["<toy>", "<bad>"]
    asked = ("a photo of <toy>", "<bad>")
    image = draw(pipeline, *asked)
    assert np.array_equal(image, draw(plain(toy, bad), *asked))
    assert not np.array_equal(image, draw(pipeline, "a photo of <toy>"))  # the negative embedding does something


def test_unloading(load, plain, concept):
    pipeline = load([concept("<toy>", vectors=3), concept("<other>")])
    other = draw(pipeline, "a photo of <other>")
    pipeline.unload_textual_inversion("<toy>")  # with all three vectors
    assert list(pipeline.concepts) == ["<other>"]
    assert not any("<toy>" in name for name in pipeline.tokenizer.get_vocab())
    assert np.array_equal(draw(pipeline, "a photo of <other>"), other)
    with pytest.raises(ValueError, match=r"nothing to unload.*<other>"):
        pipeline.unload_textual_inversion("<toy>")
    assert list(pipeline.concepts) == ["<other>"]
    pipeline.unload_textual_inversion()
    untouched = plain()
    assert not pipeline.concepts and len(pipeline.tokenizer) == len(untouched.tokenizer)
    assert np.array_equal(draw(pipeline, "a photo of a star"), draw(untouched, "a photo of a star"))


def test_what_does_not_fit_is_said(load, concept, dimension, tmp_path):
    pipeline = load()
    wide = concept("<wide>", width=2 * dimension, base_model="org/large", local=False)
    with pytest.raises(ValueError, match=f"{2 * dimension} entries and .* takes {dimension}.*'org/large'"):
        pipeline.load_learned_embeds(wide)
    with pytest.raises(ValueError, match="already knows the name 'star'"):
        pipeline.load_learned_embeds(concept("star"))
    with pytest.raises(ValueError, match="already knows the name '<toy>'"):
        pipeline.load_learned_embeds([concept("<toy>"), concept("<toy>", vectors=2)])
    with pytest.raises(OSError, match="nowhere.* is neither an embedding file, nor a folder"):
        pipeline.load_learned_embeds(tmp_path / "nowhere")
    save_file({"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)}, tmp_path / "sdxl.safetensors")
    with pytest.raises(ValueError, match="clip_g.*SDXL"):
        pipeline.load_learned_embeds(tmp_path / "sdxl.safetensors")
    assert list(pipeline.concepts) == ["<toy>"]
    with pytest.raises(ValueError, match="does not fit this base model"):
        load(wide)  # at from_pretrained too


def test_another_base_is_warned_about(load, concept, caplog):
    load([concept("<toy>", base_model="base")])  # the folder's name is all that is published of a local base
    assert "was learned on" not in caplog.text
    pipeline = load(concept("<far>", base_model="org/other", local=False))
    assert "<far> was learned on 'org/other'" in caplog.text
    caplog.clear()
    pipeline.load_learned_embeds(concept("<later>", base_model="other"))
    assert "<later> was learned on 'other'" in caplog.text and "<far>" not in caplog.text


def test_a_saved_pipeline_is_an_ordinary_one(load, concept, tmp_path):
    pipeline = load(concept("<toy>", vectors=2))
    pipeline.save_pretrained(tmp_path / "saved")
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert type(again) is StableDiffusionPipeline
    assert np.array_equal(draw(again, "a photo of <toy>"), draw(pipeline, "a photo of <toy>"))


def test_each_format_is_read_by_its_consumer(load, plain, tmp_path, dimension):
    theta = torch.randn(2, dimension, generator=torch.Generator().manual_seed(0))
    save_embeds(tmp_path / "learned_embeds.safetensors", "<toy>", theta)
    save_a1111(tmp_path / "learned_embeds.pt", "<toy>", theta, step=3)
    pipelines = [plain(), plain(), load(tmp_path), load(tmp_path / "learned_embeds.pt")]
    pipelines[0].load_textual_inversion(str(tmp_path))
    pipelines[1].load_textual_inversion(str(tmp_path), weight_name="learned_embeds.pt")
    for pipeline in pipelines:
        ids = pipeline.tokenizer.convert_tokens_to_ids(["<toy>", "<toy>_1"])
        assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight[ids], theta)

    def as_comfyui(content):
        """The rule of ComfyUI's loader: the values of string_to_param, else the first tensor."""
        return next(iter(content["string_to_param"].values() if "string_to_param" in content else content.values()))

    assert torch.equal(as_comfyui(torch.load(tmp_path / "learned_embeds.pt", weights_only=True)), theta)
    assert torch.equal(as_comfyui(load_file(tmp_path / "learned_embeds.safetensors")), theta)


@pytest.mark.filterwarnings("ignore")
def test_quantized_inference_by_diffusers_own_means(load, concept):
    toy = concept("<toy>", vectors=2)
    quantization = PipelineQuantizationConfig(quant_mapping={"unet": QuantoConfig(weights_dtype="int8")})
    quantized = load(toy, quantization_config=quantization)
    assert any(type(module).__name__ == "QLinear" for module in quantized.unet.modules())
    difference = np.abs(draw(quantized, "a photo of <toy>") - draw(load(toy), "a photo of <toy>")).mean()
    assert 0 < difference < 0.05


def test_the_file_stands_alone(repo):
    """On the Hub it is fetched by itself, and diffusers wants exactly one pipeline class in it."""
    tree = ast.parse((repo / "zoodip_pipeline.py").read_text())
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= {"json", "re", "pathlib", "diffusers", "huggingface_hub"}
    assert [node.name for node in tree.body if isinstance(node, ast.ClassDef)] == ["ZOODiPPipeline"]


def test_a_config_of_something_else_is_ignored(load, concept):
    folder = concept("<toy>")
    (folder / "zoodip_config.json").write_text(json.dumps(["not", "ours"]))
    assert load(folder).concepts == {"<toy>": {}}
