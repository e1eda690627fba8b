"""`evaluate_personalization.py`: metrics against hand-computed cases, resuming, the report, bad input."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import as_arguments
from PIL import Image
from safetensors.torch import load_file, save_file

import evaluate_personalization as evaluation
from personalization.errors import InputError
from personalization.files import write_json
from personalization.runs.embeddings import save_embeds


X, Y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
DIAGONAL = torch.tensor([0.6, 0.8])


def test_prompt_fidelity_is_the_mean_cosine_with_the_images_own_prompt():
    images = torch.stack([torch.stack([X, DIAGONAL]), torch.stack([Y, Y])])  # two prompts, two images each
    values = evaluation.prompt_fidelity(images, torch.stack([X, DIAGONAL]))
    assert values.tolist() == pytest.approx([(1 + 0.6) / 2, 0.8])


def test_subject_fidelity_is_the_mean_cosine_over_all_pairs_with_references():
    images = torch.stack([torch.stack([X, Y]), torch.stack([DIAGONAL, X])])
    values = evaluation.subject_fidelity(images, torch.stack([X, DIAGONAL, Y]))
    first = (1 + 0.6 + 0 + 0 + 0.8 + 1) / 6
    second = (0.6 + 1 + 0.8 + 1 + 0.6 + 0) / 6
    assert values.tolist() == pytest.approx([first, second])


def test_diversity_is_the_mean_cosine_of_different_images_of_a_prompt():
    images = torch.stack([torch.stack([X, Y, DIAGONAL]), torch.stack([X, X, X])])
    values = evaluation.similarity_within_prompts(images)
    assert values.tolist() == pytest.approx([(0 + 0.6 + 0.8) / 3, 1.0])


def test_the_interval_is_that_of_the_mean():
    values = np.random.default_rng(1).normal(0.5, 0.1, 400)
    low, high = evaluation.bootstrap_interval(values)
    expected = 1.96 * values.std() / np.sqrt(len(values))  # of the normal distribution
    assert low == pytest.approx(values.mean() - expected, abs=0.0015)
    assert high == pytest.approx(values.mean() + expected, abs=0.0015)
    assert evaluation.bootstrap_interval([0.25] * 5) == (0.25, 0.25)


def test_dreambooths_prompts():
    for name in ("object", "living"):
        prompts = evaluation.PROMPTS[name]
        assert len(prompts) == len(set(prompts)) == 25 and all(prompt.count("{}") == 1 for prompt in prompts)
    path = Path(__file__).resolve().parents[2] / "shared" / "data" / "dreambooth" / "prompts_and_classes.txt"
    if not path.is_file():
        pytest.skip("../shared is not beside this checkout: nothing to compare with")
    lines = [line.split("'")[1] for line in path.read_text().splitlines() if line.startswith("'a ")]
    published = [line.replace("{0} {1}", "{}") for line in lines]
    assert evaluation.PROMPTS["object"] == published[:25] and evaluation.PROMPTS["living"] == published[25:50]


@pytest.fixture
def results(demo_base, tmp_path):
    """Two results on the demo base, for a token each."""
    for name, seed in (("one", 1), ("two", 2)):
        folder = tmp_path / name
        folder.mkdir()
        theta = torch.randn(1, 128, generator=torch.Generator().manual_seed(seed)) * 0.1
        save_embeds(folder / "learned_embeds.safetensors", f"<{name}>", theta)
        write_json(folder / "zoodip_config.json", {"base_model": "base", "base_model_is_local": True})
    return tmp_path


@pytest.fixture
def flags(demo_base, subject, repo, results):
    scorer = repo / "demo" / "scorer"
    prompts = results / "prompts.txt"
    prompts.write_text("\ufeffa photo of a {}\n\na photo of a {} in the snow\n", encoding="utf-8")
    return {
        "--pretrained_model_name_or_path": demo_base,
        "--reference_images": str(subject),
        "--class_word": "star",
        "--prompts": str(prompts),
        "--num_images_per_prompt": "2",
        "--num_inference_steps": "1",
        "--clip_model": str(scorer),
        "--dino_model": str(scorer / "identity"),
        "--trust_remote_code": True,
        "--output_dir": str(results / "scores"),
    }


def run(flags, *results_given):
    words = as_arguments(flags) + (["--results", *results_given] if results_given else [])
    evaluation.main(evaluation.parse_args(words))
    return Path(flags["--output_dir"])


def test_report(flags, results, capsys):
    out = run(flags, f"first={results / 'one'}", f"second={results / 'two'}")
    content = json.loads((out / "evaluation.json").read_text())
    assert list(content["scores"]) == ["first", "plain-word", "second"]  # sorted by the file's writer
    for row in content["scores"].values():
        assert set(row) == {"CLIP-T", "CLIP-I", "DINO", "DINO between images"}
        for score in row.values():
            assert score["low"] <= score["mean"] <= score["high"] and len(score["by_prompt"]) == 2
    assert len(list((out / "images").rglob("*.png"))) == 3 * 2 * 2
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.size == (230 + 4 * 128, 24 + 2 * 128)
    table = (out / "evaluation.md").read_text()
    assert table in capsys.readouterr().out and "| plain-word |" in table

    drawn = {path: path.stat().st_mtime_ns for path in (out / "images").rglob("*.png")}
    lost = next(iter(drawn))
    lost.unlink()
    run(flags, f"first={results / 'one'}", f"second={results / 'two'}")
    again = {path: path.stat().st_mtime_ns for path in (out / "images").rglob("*.png")}
    assert {path for path in drawn if drawn[path] != again[path]} == {lost}
    assert json.loads((out / "evaluation.json").read_text())["scores"] == content["scores"]

    shutil.copyfile(results / "two" / "learned_embeds.safetensors", results / "one" / "learned_embeds.safetensors")
    run(flags, f"first={results / 'one'}", f"second={results / 'two'}")  # trained on: its pictures are drawn anew
    scores = json.loads((out / "evaluation.json").read_text())["scores"]
    assert scores["first"] == scores["second"] != content["scores"]["first"]


def test_a_result_is_drawn_as_plain_diffusers_draws_it(flags, results, demo_base):
    from diffusers import StableDiffusionPipeline

    out = run(flags | {"--num_images_per_prompt": "1"}, f"first={results / 'one'}")
    pipeline = StableDiffusionPipeline.from_pretrained(demo_base)
    pipeline.load_textual_inversion(str(results / "one"))
    image = pipeline(
        "a photo of a <one> in the snow", num_inference_steps=1, generator=torch.Generator().manual_seed(1000)
    ).images[0]
    drawn = np.asarray(Image.open(out / "images" / "first" / "001-00.png"), dtype=int)
    assert np.abs(drawn - np.asarray(image, dtype=int)).max() <= 1  # another batch size rounds otherwise


@pytest.mark.parametrize(
    "change, given, expected",
    [
        ({"--reference_images": "/nowhere"}, [], "'/nowhere' is not a folder"),
        ({"--prompts": "/nowhere"}, [], "--prompts '/nowhere' cannot be read"),
        ({"--prompts": "EMPTY"}, [], "holds no prompt"),
        ({"--prompts": "WITHOUT"}, [], "does not say where the subject stands"),
        ({"--clip_model": "IDENTITY"}, [], "--clip_model"),
        ({"--dino_model": "/nowhere"}, [], "--dino_model '/nowhere' is not such a model"),
        ({}, ["mine=/nowhere"], "--results 'mine=/nowhere' holds no learned_embeds.safetensors"),
        ({}, ["/nowhere"], "is no label=folder"),
        ({}, ["plain-word=ONE"], "is no label=folder"),
        ({}, ["a=ONE", "a=TWO"], "has the label 'a' twice"),
        ({}, ["a=WIDE"], "was learned on another base: its vectors have 768 entries"),
        ({}, ["a=ELSEWHERE"], "was learned on 'other/model' and not on"),
        ({"--num_images_per_prompt": "0"}, [], "--num_images_per_prompt 0 must be at least 1"),
        ({"--resolution": "60"}, [], "--resolution 60 must be divisible by"),
    ],
)
def test_bad_input(flags, results, repo, capsys, monkeypatch, change, given, expected):
    monkeypatch.setattr(evaluation, "draw_missing", lambda *_: pytest.fail("drawing began"))
    (results / "empty.txt").write_text("\n \n")
    (results / "without.txt").write_text("a photo of a dog\n")
    for name, width, base in (("wide", 768, None), ("elsewhere", 128, "other/model")):
        (results / name).mkdir()
        save_embeds(results / name / "learned_embeds.safetensors", "<x>", torch.zeros(1, width))
        write_json(results / name / "zoodip_config.json", {"base_model": base} if base else {})
    places = {"EMPTY": results / "empty.txt", "WITHOUT": results / "without.txt", "ONE": results / "one"}
    places |= {"TWO": results / "two", "WIDE": results / "wide", "ELSEWHERE": results / "elsewhere"}
    places["IDENTITY"] = repo / "demo" / "scorer" / "identity"

    def fill(text):
        for name, path in places.items():
            text = text.replace(name, str(path)) if text.split("=")[-1] == name else text
        return text

    try:
        run(flags | {name: fill(value) for name, value in change.items()}, *map(fill, given))
    except SystemExit as exit:
        assert exit.code == 2
        message = capsys.readouterr().err
    except InputError as error:
        message = str(error)
        assert "\n" not in message
    assert expected in message


def test_scales_are_a_column_too(flags, results, demo_base, repo):
    """Drawn by `tuneqdm_pipeline.py`, beside the plain word and an embedding, which they leave as they are."""
    from diffusers import DiffusionPipeline

    import train_tuneqdm_dreambooth as tuneqdm

    base, scales = Path(demo_base), results / "scales"
    words = (
        f"--instance_data_dir {flags['--reference_images']} --subject_name star --learning_rate 0.1 --report_to none"
    )
    words += f" --pretrained_model_name_or_path {base} --max_train_steps 2 --output_dir {scales} --scale_sets 2"
    tuneqdm.main(tuneqdm.parse_args(words.split()))
    flags |= {"--num_images_per_prompt": "1", "--num_inference_steps": "4"}
    out = run(flags, f"tuned={scales}", f"first={results / 'one'}")
    content = json.loads((out / "evaluation.json").read_text())
    assert set(content["scores"]) == {"plain-word", "tuned", "first"}
    code = {"custom_pipeline": f"{repo}/tuneqdm_pipeline.py", "trust_remote_code": True, "tuneqdm_scales": scales}
    pipeline = DiffusionPipeline.from_pretrained(demo_base, **code)
    generator = torch.Generator().manual_seed(1000)
    image = pipeline("a photo of a star in the snow", num_inference_steps=4, generator=generator).images[0]
    drawn = np.asarray(Image.open(out / "images" / "tuned" / "001-00.png"), dtype=int)
    assert np.abs(drawn - np.asarray(image, dtype=int)).max() <= 1  # another batch size rounds otherwise
    plain = np.asarray(Image.open(out / "images" / "plain-word" / "001-00.png"), dtype=int)
    assert np.abs(drawn - plain).max() > 5

    config = json.loads((scales / "tuneqdm_config.json").read_text())
    for change, expected in (
        ({"settings": config["settings"] | {"subject_name": None}}, "does not say what its subject is called"),
        ({"base_model": "other/model"}, "was learned on 'other/model' and not on"),
    ):
        write_json(scales / "tuneqdm_config.json", config | change)
        with pytest.raises(InputError, match=expected):
            run(flags, f"tuned={scales}")
    write_json(scales / "tuneqdm_config.json", config)
    of_another = config["scales"] | {
        "base_sha256": 64 * "0",
        "base_sketch": [0.0] * len(config["scales"]["base_sketch"]),
    }
    path = scales / "tuneqdm_scales.safetensors"
    for metadata, expected in (
        ({"tuneqdm": json.dumps(of_another)}, "was trained on another base"),
        (None, "holds no scales that can be read"),
    ):
        save_file(load_file(path), path, metadata)
        with pytest.raises(InputError, match=expected):
            run(flags, f"tuned={scales}")


def test_a_lora_is_drawn_as_plain_diffusers_draws_it_and_nothing_is_judged(flags, results, demo_base):
    """With `--draw_only`: no references, no encoders, no report."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline, folder = StableDiffusionPipeline.from_pretrained(demo_base), results / "lora"
    pipeline.unet.add_adapter(LoraConfig(r=2, init_lora_weights="gaussian", target_modules=["to_q", "to_v"]))
    layers = get_peft_model_state_dict(pipeline.unet)
    generator = torch.Generator().manual_seed(0)
    layers = {name: torch.randn(value.shape, generator=generator) * 0.3 for name, value in layers.items()}
    pipeline.save_lora_weights(folder, unet_lora_layers=layers)
    write_json(folder / "selective_config.json", {"base_model": "base", "settings": {"subject_name": "star"}})
    needless = ("--reference_images", "--clip_model", "--dino_model", "--trust_remote_code")
    flags = {name: value for name, value in flags.items() if name not in needless} | {"--draw_only": True}
    out = run(flags | {"--num_images_per_prompt": "1"}, f"lora={folder}")
    assert not list(out.glob("[!.]*.*"))
    plain, drawn = (
        np.asarray(Image.open(out / "images" / name / "001-00.png"), dtype=int) for name in ("plain-word", "lora")
    )
    pipeline = StableDiffusionPipeline.from_pretrained(demo_base)
    pipeline.load_lora_weights(folder)
    generator = torch.Generator().manual_seed(1000)
    image = pipeline("a photo of a star in the snow", num_inference_steps=1, generator=generator).images[0]
    assert np.abs(drawn - np.asarray(image, dtype=int)).max() <= 1 and np.abs(drawn - plain).max() > 5
    write_json(folder / "selective_config.json", {})
    with pytest.raises(InputError, match="does not say what its subject is called"):
        run(flags, f"lora={folder}")


@pytest.mark.parametrize(
    "change, said", [({"--draw_only": True}, "give either"), ({"--reference_images": None}, "give either")]
)
def test_pictures_are_judged_or_only_drawn(flags, change, said, capsys):
    with pytest.raises(SystemExit):
        run(flags | change)
    assert said in capsys.readouterr().err


def lora_of(demo_base, folder, change=lambda layers: layers):
    """A folder of LoRA weights for two layers of the demo base, which `change` may change."""
    layers = {}
    for name in ("to_q", "to_v"):
        layer = f"unet.mid_block.attentions.0.transformer_blocks.0.attn1.{name}"
        width = load_file(Path(demo_base) / "unet" / "diffusion_pytorch_model.safetensors")[
            f"{layer[5:]}.weight"
        ].shape
        layers |= {
            f"{layer}.lora_A.weight": torch.ones(2, width[1]),
            f"{layer}.lora_B.weight": torch.ones(width[0], 2),
        }
    folder.mkdir(exist_ok=True)
    save_file(change(layers), folder / "pytorch_lora_weights.safetensors")
    write_json(folder / "selective_config.json", {"base_model": "base", "settings": {"subject_name": "star"}})


NAN, INFINITY = float("nan"), float("inf")
LORAS = {
    "NaN": (lambda layers: {k: v * NAN for k, v in layers.items()}, "NaN or infinity"),
    "one infinity": (lambda layers: layers | {min(layers): layers[min(layers)] / 0}, "NaN or infinity"),
    "integers": (lambda layers: {k: v.long() for k, v in layers.items()}, "must have floats"),
    "empty": (lambda layers: {}, "has no tensor for the UNet"),
    "of a text encoder": (
        lambda layers: {k.replace("unet.mid_block.attentions", "text_encoder.x"): v for k, v in layers.items()},
        "has no tensor for the UNet",
    ),
    "of other layers": (lambda layers: {k.replace("mid_", "down_"): v for k, v in layers.items()}, "has no layer for"),
    "of other widths": (lambda layers: {k: torch.ones(7, 7) for k in layers}, "has no layer for"),
    "of other ranks": (lambda layers: {k: v[None] for k, v in layers.items()}, "has no layer for"),
}


@pytest.mark.parametrize("change, said", LORAS.values(), ids=LORAS)
def test_a_lora_that_draws_nothing_is_refused(flags, results, demo_base, monkeypatch, change, said):
    monkeypatch.setattr(evaluation, "draw_missing", lambda *_: pytest.fail("drawing began"))
    lora_of(demo_base, results / "lora", change)
    with pytest.raises(InputError, match=said):
        run(flags, f"a={results / 'lora'}")


EMBEDDINGS = {
    "NaN": ({"<x>": torch.full((1, 128), NAN)}, None, "NaN or infinity"),
    "integers": ({"<x>": torch.ones(1, 128, dtype=torch.long)}, None, "must have floats"),
    "flat": ({"<x>": torch.ones(())}, None, "with vectors of a word"),
    "no vector": ({"<x>": torch.ones(0, 128)}, None, "with vectors of a word"),
    "nothing": ({}, None, "with vectors of a word"),
    "a sentence": ({"my dog": torch.ones(1, 128)}, None, "is not one word"),
    "two words": ({"<x>": torch.ones(1, 128), "<y>": torch.ones(1, 128)}, None, "holds 2 words"),
    "a list": ({"<x>": torch.ones(1, 128)}, [], "holds no JSON object"),
    "other types": ({"<x>": torch.ones(1, 128)}, {"settings": 3}, "of another type"),
    "a base that is a number": ({"<x>": torch.ones(1, 128)}, {"base_model": 3}, "of another type"),
    "a word that is a list": (
        {"<x>": torch.ones(1, 128), "b": torch.ones(1, 128)},
        {"placeholder_token": []},
        "holds 2",
    ),
}


@pytest.mark.parametrize("tensors, config, said", EMBEDDINGS.values(), ids=EMBEDDINGS)
def test_an_embedding_that_cannot_be_judged_is_refused(flags, results, monkeypatch, tensors, config, said):
    monkeypatch.setattr(evaluation.Image.Image, "save", lambda *_: pytest.fail("something was drawn"))
    (results / "odd").mkdir()
    save_file(tensors, results / "odd" / "learned_embeds.safetensors")
    if config is not None:
        write_json(results / "odd" / "zoodip_config.json", config)
    with pytest.raises(InputError, match=said):
        run(flags, f"first={results / 'one'}", f"odd={results / 'odd'}")


def test_what_draws_no_numbers_is_refused(flags, results):
    """Large numbers are finite, and what comes of them is not; pipelines make a black picture of it."""
    (results / "large").mkdir()
    save_file({"<x>": torch.full((1, 128), 1e25)}, results / "large" / "learned_embeds.safetensors")
    with pytest.raises(InputError, match="--results large=.* draws NaN or infinity"):
        run(flags, f"large={results / 'large'}")
    assert not list((results / "scores").glob("images/large/*.png"))


def test_two_words_in_a_file_are_both_known(flags, results):
    (results / "both").mkdir()
    words = {
        f"<{name}>": load_file(results / name / "learned_embeds.safetensors")[f"<{name}>"] for name in ("one", "two")
    }
    save_file(words, results / "both" / "learned_embeds.safetensors")
    write_json(results / "both" / "zoodip_config.json", {"placeholder_token": "<two>"})
    (results / "prompts.txt").write_text("a photo of {} beside <one>\n")
    out = run(flags | {"--num_images_per_prompt": "1"}, f"both={results / 'both'}", f"two={results / 'two'}")
    both, two = (Image.open(out / "images" / name / "000-00.png").tobytes() for name in ("both", "two"))
    assert both != two, "the other word is known, too"


def test_a_word_in_capitals_is_drawn_with_all_its_vectors(flags, results, capsys):
    """CLIP's tokenizer knows no capitals, and plain diffusers compares names as they were typed."""
    vectors = torch.randn(3, 128, generator=torch.Generator().manual_seed(5)) * 0.1
    given = []
    for label, name in (("capitals", "<My-Toy>"), ("small", "<my-toy>"), ("first", "<the-toy>")):
        (results / label).mkdir()
        save_file({name: vectors[: 1 if label == "first" else 3]}, results / label / "learned_embeds.safetensors")
        given.append(f"{label}={results / label}")
    out = run(flags | {"--num_images_per_prompt": "1"}, *given)
    drawn = {path.parent.name: Image.open(path).tobytes() for path in out.glob("images/*/000-00.png")}
    assert drawn["capitals"] == drawn["small"] != drawn["first"]
    assert "capitals: the word '<My-Toy>', 3 vector(s), of" in capsys.readouterr().out


@pytest.mark.parametrize(
    "given, said",
    [
        ("..={one}", "is no label=folder"),
        (".={one}", "is no label=folder"),
        (".hidden={one}", "is no label=folder"),
        ("Plain-Word={one}", "is no label=folder"),
        ("drawing.json={one}", "is no label=folder"),
        ("a={one}/learned_embeds.safetensors", "is a file: give the folder that it is in"),
        ("a={lora}", "has no selective_config.json, which says what its subject is called"),
        ("a={empty}", "holds no learned_embeds.safetensors, tuneqdm_scales.safetensors or pytorch_lora_weights"),
    ],
)
def test_what_is_no_result_is_said(flags, results, demo_base, monkeypatch, given, said):
    monkeypatch.setattr(evaluation, "draw_missing", lambda *_: pytest.fail("drawing began"))
    lora_of(demo_base, results / "lora")
    (results / "lora" / "selective_config.json").unlink()
    (results / "empty").mkdir()
    with pytest.raises(InputError, match=said):
        run(flags, given.format(one=results / "one", lora=results / "lora", empty=results / "empty"))


def test_files_of_a_user_stay(flags, results):
    """Only pictures that this program drew of a result go when the result is another."""
    out = Path(flags["--output_dir"])
    mine = [out / "mine.png", out / "images" / "mine.png", out / "images" / "first" / "mine.png"]
    run(flags, f"first={results / 'one'}")
    for path in mine:
        path.write_bytes(b"of a user")
    shutil.copyfile(results / "two" / "learned_embeds.safetensors", results / "one" / "learned_embeds.safetensors")
    run(flags, f"first={results / 'one'}")
    assert all(path.read_bytes() == b"of a user" for path in mine)


def test_pictures_that_are_cut_are_drawn_again(flags, results):
    flags |= {"--batch_size": "1"}  # another rounds otherwise
    out = run(flags, f"first={results / 'one'}")
    cut, small = out / "images" / "first" / "000-00.png", out / "images" / "first" / "000-01.png"
    whole = cut.read_bytes()
    cut.write_bytes(whole[:200])
    Image.new("RGB", (3, 3)).save(small)
    run(flags, f"first={results / 'one'}")
    assert cut.read_bytes() == whole and Image.open(small).size == (64, 64)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"drawing": [], "fingerprints": {}}', '{"drawing": {}, "fingerprints": 1}', "\ud800"]
)
def test_pictures_of_an_unknown_drawing_stay(flags, results, content):
    out = Path(flags["--output_dir"])
    (out / "images").mkdir(parents=True)
    (out / "images" / "drawing.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(InputError, match="nobody can say how they were drawn"):
        run(flags, f"first={results / 'one'}")


@pytest.mark.parametrize("label", ["plain-word", "second"])
def test_pictures_that_nobody_claims_are_no_results(flags, results, label):
    """They are neither scored nor overwritten, with no word of how they were drawn or with that of other columns."""
    given = [f"first={results / 'one'}", f"second={results / 'two'}"]
    if label == "second":
        run(flags, given[0])
    path = Path(flags["--output_dir"]) / "images" / label / "000-00.png"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"of a user")
    with pytest.raises(InputError, match=f"nobody can say how they were drawn .*{label}/000-00.png"):
        run(flags, *given)
    assert path.read_bytes() == b"of a user"


def test_an_output_folder_in_an_input_is_refused(flags, results, demo_base, subject):
    before = sorted(path for path in subject.rglob("*"))
    folders = (subject, demo_base, results / "one", results / "one" / "scores", flags["--clip_model"], results)
    for folder in folders:
        with pytest.raises(InputError, match="which is read: give a folder apart from it"):
            run(flags | {"--output_dir": str(folder)}, f"first={results / 'one'}")
    assert sorted(path for path in subject.rglob("*")) == before


def copied(folder, target, change):
    """A copy of a model's folder with other weights; None takes one away."""
    shutil.copytree(folder, target)
    (path,) = target.glob("*.safetensors")
    weights = {k: v for k, v in ((k, change(k, v)) for k, v in load_file(path).items()) if v is not None}
    save_file(weights, path, {"format": "pt"})
    return str(target)


def test_a_tokenizer_of_another_encoder_judges_nothing(flags, results, repo):
    scorer = copied(repo / "demo" / "scorer", results / "clip", lambda key, value: value)
    tokenizer = evaluation.AutoTokenizer.from_pretrained(scorer)
    tokenizer.add_tokens([f"<word-{i}>" for i in range(9)])
    tokenizer.save_pretrained(scorer)
    with pytest.raises(InputError, match="--clip_model .*its tokenizer belongs to another model"):
        run(flags | {"--clip_model": scorer}, f"first={results / 'one'}")


ENCODERS = {
    "without weights": (lambda key, value: None if "vision" in key else value, "lack"),
    "foreign": (lambda key, value: None if "encoder.layers.0" in key else value, "lack"),
    "NaN": (lambda key, value: value * NAN if value.dim() == 2 else value, "NaN or infinity"),
}


@pytest.mark.parametrize("change, said", ENCODERS.values(), ids=ENCODERS)
def test_an_encoder_that_is_not_whole_judges_nothing(flags, results, repo, monkeypatch, change, said):
    """transformers makes up weights that are missing, and scores of random weights look like scores."""
    monkeypatch.setattr(evaluation, "draw_missing", lambda *_: pytest.fail("drawing began"))
    flags = flags | {"--clip_model": copied(repo / "demo" / "scorer", results / "clip", change)}
    with pytest.raises(InputError, match=f"--clip_model .* is not such a model.*{said}"):
        run(flags, f"first={results / 'one'}")


def test_a_base_with_nan_draws_nothing(flags, results, demo_base):
    base = results / "base"
    shutil.copytree(demo_base, base)
    path = base / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["decoder.conv_out.bias"] *= NAN
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(InputError, match="the weights hold NaN or infinity in 'decoder.conv_out.bias'"):
        run(flags | {"--pretrained_model_name_or_path": str(base)})


def test_a_file_beside_the_references_is_a_warning(flags, results, subject, caplog):
    """No Accelerator is needed to say so."""
    pictures = results / "pictures"
    shutil.copytree(subject, pictures)
    (pictures / ".DS_Store").write_bytes(b"of a Mac")
    from accelerate.state import PartialState

    PartialState._reset_state()
    run(flags | {"--reference_images": str(pictures)}, f"first={results / 'one'}")
    assert ".DS_Store" in caplog.text


def test_a_variant_of_a_base(flags, results, demo_base):
    base = results / "base"
    shutil.copytree(demo_base, base)
    for path in base.glob("*/*.safetensors"):
        path.rename(path.with_name(f"{path.stem}.fp16{path.suffix}"))
    flags |= {"--pretrained_model_name_or_path": str(base)}
    with pytest.raises(InputError, match="--variant fp16"):
        run(flags)
    assert (run(flags | {"--variant": "fp16"}) / "evaluation.md").is_file()


def test_pictures_of_another_drawing_are_not_mixed(flags, results):
    run(flags, f"first={results / 'one'}")
    with pytest.raises(InputError, match=r"has pictures drawn otherwise \(seed\)"):
        run(flags | {"--seed": "1"}, f"first={results / 'one'}")


def test_the_demo_ships_its_identity_encoder_as_it_is_built(repo):
    shipped = repo / "demo" / "scorer" / "identity" / "modeling_identity.py"
    assert shipped.read_bytes() == (repo / "demo" / "modeling_identity.py").read_bytes()
