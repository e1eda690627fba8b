"""`zoodip_pipeline.py`: the same images as plain diffusers, and plain words where a concept does not fit."""

import ast
import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig, QuantoConfig, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from personalization.files import write_json
from personalization.runs.embeddings import save_a1111, save_embeds
from zoodip_pipeline import ZOODiPPipeline


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
        more = {"dtype": torch.float32, **more}
        return DiffusionPipeline.from_pretrained(demo_base, **code, **more, learned_embeds=learned_embeds)

    return from_pretrained


@pytest.fixture
def plain(demo_base):
    def load_plain(*concepts):
        pipeline = StableDiffusionPipeline.from_pretrained(demo_base, dtype=torch.float32)
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
    assert {name.split(".")[0] for name in imported} <= {
        *("json", "re", "pathlib", "torch"),
        *("diffusers", "huggingface_hub", "transformers"),
    }
    assert [node.name for node in tree.body if isinstance(node, ast.ClassDef)] == ["ZOODiPPipeline"]


def test_a_config_of_something_else_is_ignored(load, concept):
    folder = concept("<toy>")
    (folder / "zoodip_config.json").write_text(json.dumps(["not", "ours"]))
    assert load(folder).concepts == {"<toy>": {}}


def test_from_pipe_shares_components_and_concepts(plain, concept, repo, caplog):
    toy, other = concept("<toy>", vectors=2), concept("<other>")
    base = plain()
    pipeline = ZOODiPPipeline.from_pipe(base, learned_embeds=toy)
    assert list(pipeline.concepts) == ["<toy>"] and pipeline.unet is base.unet and pipeline.name_or_path
    code = {"custom_pipeline": f"{repo}/zoodip_pipeline.py", "trust_remote_code": True}
    again = ZOODiPPipeline.from_pipe(pipeline, learned_embeds=[other])
    assert list(again.concepts) == ["<toy>", "<other>"] and list(pipeline.concepts) == ["<toy>"]
    back = StableDiffusionPipeline.from_pipe(again)
    assert type(back) is StableDiffusionPipeline
    image = draw(pipeline, "a photo of <toy>")
    assert np.array_equal(draw(back, "a photo of <toy>"), image)
    by_file = DiffusionPipeline.from_pipe(back, **code, learned_embeds=concept("<third>"))
    assert list(by_file.concepts) == ["<third>"] and by_file.image_encoder is None
    assert np.array_equal(draw(by_file, "a photo of <toy>"), image)
    assert list(ZOODiPPipeline.from_pipe(by_file, **code).concepts) == ["<third>"]
    assert "Expected types" not in caplog.text and "not switched over" not in caplog.text


@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda d: torch.tensor(1.0), r"holds \[\] where the vectors"),
        (lambda d: torch.zeros(2, 2, d), r"holds \[2, 2, \d+\] where the vectors"),
        (lambda d: torch.zeros(0, d), r"holds \[0, \d+\] where the vectors"),
        (lambda d: torch.zeros(2, 0), r"holds \[2, 0\] where the vectors"),
        (lambda d: torch.zeros(0), r"holds \[0\] where the vectors"),
        (lambda d: torch.full((2, d), torch.nan), "NaN or infinite"),
        (lambda d: torch.full((d,), -torch.inf), "NaN or infinite"),
        (lambda d: torch.ones(2, d, dtype=torch.int64), "holds int64 and not floating-point"),
        (lambda d: torch.ones(2, d, dtype=torch.bool), "holds bool and not floating-point"),
        (lambda d: torch.ones(2, d, dtype=torch.complex64), "holds complex64 and not floating-point"),
    ],
)
def test_vectors_that_cannot_be_used(knows_nothing, make, expected, tmp_path, dimension):
    torch.save({"<toy>": make(dimension)}, tmp_path / "toy.bin")
    refused(knows_nothing, tmp_path / "toy.bin", expected)
    save_file({"<toy>": make(dimension)}, tmp_path / "toy.safetensors")
    refused(knows_nothing, tmp_path / "toy.safetensors", expected)


def test_vectors_too_large_for_the_precision_of_the_text_encoder(load, tmp_path, dimension):
    save_file({"<toy>": torch.full((1, dimension), 1e6)}, tmp_path / "toy.safetensors")
    refused(load(dtype=torch.float16), tmp_path / "toy.safetensors", "too large for float16.*torch.float32")


@pytest.mark.parametrize(
    "token", ["", " ", "my toy", " <toy>", "<toy>\n", "<t\u200boy>", "<t\x07oy>", "long " * 10**5]
)
def test_names_that_are_not_one_word(knows_nothing, token, tmp_path, dimension):
    save_file({token: torch.zeros(1, dimension)}, tmp_path / "toy.safetensors")
    refused(knows_nothing, tmp_path / "toy.safetensors", r"names its token .* which is not one word.*token=")
    torch.save({"string_to_param": {"*": torch.zeros(1, dimension)}, "name": token or "a b"}, tmp_path / "toy.pt")
    refused(knows_nothing, tmp_path / "toy.pt", r"names its token .* which is not one word")


@pytest.mark.parametrize(
    "content, expected",
    [
        (
            {"string_to_param": {"other": torch.zeros(1, 4)}, "name": "toy"},
            r"no vectors under string_to_param\[\"\*\"\]",
        ),
        ({"string_to_param": None, "name": "toy"}, "no vectors under string_to_param"),
        ({"string_to_param": torch.zeros(3), "name": "toy"}, "no vectors under string_to_param"),
        ({"string_to_param": {"*": [1.0, 2.0]}, "name": "toy"}, "holds list where the vectors"),
        ({"<toy>": "text"}, "holds str where the vectors"),
        ({3: torch.zeros(1, 4)}, "names its token '3'"),
        ({}, r"holds \[\] and not one token"),
        ({1: torch.zeros(2), "<toy>": torch.zeros(2)}, r"holds \['1', '<toy>'\] and not one token"),
        (torch.zeros(1, 4), "holds a Tensor and not one token"),
        ([torch.zeros(1, 4)], "holds a list and not one token"),
    ],
)
def test_files_of_other_kinds(knows_nothing, content, expected, tmp_path):
    torch.save(content, tmp_path / "toy.pt")
    refused(knows_nothing, tmp_path / "toy.pt", expected)


def test_a_pickle_of_an_older_program(knows_nothing, tmp_path, dimension):
    vectors = torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.zeros(1, dimension))})
    torch.save({"string_to_param": vectors, "name": "toy"}, tmp_path / "toy.pt")
    refused(knows_nothing, tmp_path / "toy.pt", "is a pickle of an older program.*save it again as safetensors")


def test_two_words_in_a_file_are_both_loaded(load, tmp_path, dimension):
    words = {"<toy>": torch.randn(2, dimension), "<hat>": torch.randn(1, dimension)}
    save_file(words, tmp_path / "both.safetensors")
    pipeline = load(tmp_path / "both.safetensors")
    assert set(pipeline.concepts) == {"<toy>", "<hat>"}
    ids = pipeline.tokenizer.convert_tokens_to_ids(["<toy>", "<toy>_1", "<hat>"])
    table = pipeline.text_encoder.get_input_embeddings().weight
    assert torch.equal(table[ids], torch.cat([words["<toy>"], words["<hat>"]]))
    save_file(words | {"a b": torch.zeros(1, dimension)}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match="is not one word"):
        load(tmp_path / "odd.safetensors")


@pytest.mark.parametrize("source", ["", "  ", None, 3, {"<toy>": torch.zeros(2)}])
def test_a_source_that_names_nothing(knows_nothing, source):
    with pytest.raises(ValueError, match="which names no concept: give the path"):
        knows_nothing.load_learned_embeds([source])


@pytest.mark.parametrize("name", [None, "", 7, ...])
def test_an_automatic1111_file_without_a_name_has_that_of_its_file(load, name, tmp_path, dimension):
    theta = torch.randn(2, dimension, generator=torch.Generator().manual_seed(0), requires_grad=True)
    content = {"string_to_param": {"*": theta}, "string_to_token": {"*": 265}}
    torch.save(content if name is ... else {**content, "name": name}, tmp_path / "zoodip-toy.pt")
    pipeline = load(tmp_path / "zoodip-toy.pt")
    ids = pipeline.tokenizer.convert_tokens_to_ids(["zoodip-toy", "zoodip-toy_1"])
    assert list(pipeline.concepts) == ["zoodip-toy"]
    assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight[ids], theta)


def test_one_dimension_is_one_vector(load, tmp_path, dimension):
    theta = torch.randn(dimension, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    save_file({"<toy>": theta}, tmp_path / "toy.safetensors")
    pipeline = load(tmp_path / "toy.safetensors")
    row = pipeline.text_encoder.get_input_embeddings().weight[pipeline.tokenizer.convert_tokens_to_ids("<toy>")]
    assert torch.equal(row, theta.float())


@pytest.mark.parametrize("config", ["[" * 10**5, '{"placeholder_token": "<toy>", "base_model": ["x"]}', "\0", "null"])
def test_a_damaged_config_is_ignored(load, concept, config):
    folder = concept("<toy>")
    (folder / "zoodip_config.json").write_text(config)
    assert load(folder).concepts == {"<toy>": {}}


@pytest.fixture(scope="module")
def knows_nothing(demo_base):
    """A pipeline that every concept in these tests is refused by."""
    return ZOODiPPipeline.from_pretrained(demo_base, dtype=torch.float32)


def refused(pipeline, path, expected):
    """The file is refused in one sentence that names it, and nothing has changed."""
    before = len(pipeline.tokenizer), pipeline.text_encoder.get_input_embeddings().num_embeddings
    with pytest.raises(ValueError, match=expected) as caught:
        pipeline.load_learned_embeds(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 500 + 2 * len(str(path))
    assert not pipeline.concepts
    assert before == (len(pipeline.tokenizer), pipeline.text_encoder.get_input_embeddings().num_embeddings)
