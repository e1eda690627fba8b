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
    of_another = config["scales"] | {"base_sha256": "", "base_sketch": [0.0] * len(config["scales"]["base_sketch"])}
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
    assert not list(out.glob("*.*"))
    plain, drawn = (
        np.asarray(Image.open(out / "images" / name / "001-00.png"), dtype=int) for name in ("plain-word", "lora")
    )
    pipeline = StableDiffusionPipeline.from_pretrained(demo_base)
    pipeline.load_lora_weights(folder)
    generator = torch.Generator().manual_seed(1000)
    image = pipeline("a photo of a star in the snow", num_inference_steps=1, generator=generator).images[0]
    assert np.abs(drawn - np.asarray(image, dtype=int)).max() <= 1 and np.abs(drawn - plain).max() > 5
    write_json(folder / "selective_config.json", {})
    with pytest.raises(InputError, match="holds no LoRA weights that can be read"):
        run(flags, f"lora={folder}")


@pytest.mark.parametrize(
    "change, said", [({"--draw_only": True}, "give either"), ({"--reference_images": None}, "give either")]
)
def test_pictures_are_judged_or_only_drawn(flags, change, said, capsys):
    with pytest.raises(SystemExit):
        run(flags | change)
    assert said in capsys.readouterr().err


def test_pictures_of_another_drawing_are_not_mixed(flags, results):
    run(flags, f"first={results / 'one'}")
    with pytest.raises(InputError, match=r"has pictures drawn otherwise \(seed\)"):
        run(flags | {"--seed": "1"}, f"first={results / 'one'}")


def test_the_demo_ships_its_identity_encoder_as_it_is_built(repo):
    shipped = repo / "demo" / "scorer" / "identity" / "modeling_identity.py"
    assert shipped.read_bytes() == (repo / "demo" / "modeling_identity.py").read_bytes()
