"""What a user can get wrong: one sentence that names the input and the fix, exit code 2, before any model loads."""

import json
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import as_arguments
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

import train_zoodip_textual_inversion as zoodip
from personalization.data import images, prompts
from personalization.data.dataset import read_dataset
from personalization.errors import InputError
from personalization.models import base_model


@pytest.fixture
def no_models(monkeypatch):
    """Fails the test if a weight is loaded."""

    def refuse(*_, **__):
        raise AssertionError("a model was loaded before the input was judged")

    for owner in (CLIPTextModel, AutoencoderKL, UNet2DConditionModel):
        monkeypatch.setattr(owner, "from_pretrained", refuse)
    monkeypatch.setattr(base_model, "stored_tensors", refuse)


@pytest.fixture
def fault(basics, no_models, capsys):
    """The sentence a changed command line is refused with."""

    def run(**flags):
        arguments = as_arguments({**basics, **{f"--{name}": value for name, value in flags.items()}})
        try:
            zoodip.main(zoodip.parse_args(arguments))
        except SystemExit as exit:
            assert exit.code == 2
            message = capsys.readouterr().err
            assert "usage:" not in message
            return message
        except InputError as error:
            assert "\n" not in str(error)
            return str(error)
        raise AssertionError("accepted")

    return run


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({"num_perturbations": 0}, "--num_perturbations 0 must be at least 1"),
        ({"perturbation_scale": 0}, "--perturbation_scale 0.0 must be a finite number above 0 and at most 1"),
        ({"learning_rate": "nan"}, "--learning_rate nan must be a finite number above 1e-12"),
        ({"learning_rate": "inf"}, "--learning_rate inf must be a finite number above 1e-12"),
        ({"sg_threshold": 0}, "--sg_threshold 0.0 must be a finite number above 0 and below 1"),
        ({"sg_threshold": 1}, "--sg_threshold 1.0 must be a finite number above 0 and below 1"),
        ({"sg_window": 100_000}, "--sg_window 100000 (τ) is larger than the token's dimension"),
        ({"sg_window": 1}, "--sg_window 1 holds no trajectory"),
        ({"sg_window": -1}, "--sg_window -1 must be at least 0"),
        ({"quantized_cache_dir": "/proc/nowhere"}, "--quantized_cache_dir '/proc/nowhere' cannot be written"),
        ({"unet_backend": "openvino", "quantization": "nf4"}, "--unet_backend openvino takes --quantization int8 or"),
        ({"low_vram": True, "quantization": "quanto-int8"}, "--low_vram streams --quantization int8 or none"),
        ({"low_vram": True, "torch_compile": True}, "--low_vram and --torch_compile exclude each other"),
        ({"low_vram": True, "unet_backend": "openvino"}, "--low_vram and --unet_backend openvino exclude each other"),
        ({"torch_compile": True, "unet_backend": "openvino"}, "--torch_compile has nothing to compile"),
        ({"unet_backend": "openvino", "openvino_device": "TOASTER"}, "--openvino_device 'TOASTER' is not there: "),
        ({"unet_backend": "openvino", "train_batch_size": 22}, "at most 63 examples a pass and gets 66"),
        ({"mixed_precision": "bf16", "perturbation_scale": 1e-4}, "--perturbation_scale 0.0001 is too small for bf16"),
        ({"puts_min_timestep": 900, "puts_max_timestep": 500}, "--puts_min_timestep 900 must be below --puts_max"),
        ({"puts_min_timestep": -1}, "--puts_min_timestep -1 must be at least 0"),
        ({"puts_max_timestep": 1001}, "--puts_max_timestep 1001 is outside [0, 1000)"),
        ({"resolution": 60}, "--resolution 60 must be divisible by 8: try 64"),
        ({"train_data_dir": "/nowhere"}, "--train_data_dir '/nowhere' is not a folder"),
        ({"train_data_dir": None}, "give either --train_data_dir"),
        ({"dataset_name": "user/pictures"}, "give either --train_data_dir"),
        ({"placeholder_token": "star"}, "'star' is already in the vocabulary"),
        ({"placeholder_token": "my dog"}, "--placeholder_token 'my dog' must be one word"),
        ({"placeholder_token": ""}, "--placeholder_token '' must be one word"),
        ({"initializer_token": "red star"}, "--initializer_token 'red star' is 2 tokens and must be one"),
        ({"report_to": "nonsense"}, "--report_to 'nonsense' is not a tracker"),
        ({"report_to": "clearml"}, "--report_to clearml is not installed"),
        ({"resume_from_checkpoint": "checkpoint-7"}, "--resume_from_checkpoint 'checkpoint-7' is not a checkpoint"),
        ({"pretrained_model_name_or_path": "./no-model"}, "--pretrained_model_name_or_path './no-model' is not a"),
        ({"mixed_precision": "fp16"}, "--mixed_precision fp16 is unusably slow on a CPU"),
        ({"gradient_checkpointing": True}, "--gradient_checkpointing belongs to --optimizer gradient"),
        ({"dataloader_num_workers": 4}, "--dataloader_num_workers means nothing here"),
        ({"adam_beta1": 1.0}, "--adam_beta1 1.0 must be a finite number of at least 0 and below 1"),
        ({"flip_probability": 1.5}, "--flip_probability 1.5 must be a finite number of at least 0 and at most 1"),
        ({"early_stopping_patience": 2, "num_validation_samples": 0}, "--early_stopping_patience judges the valid"),
        ({"quantization": "int3"}, "invalid choice: 'int3'"),
        ({"num_perturbation": 2}, "there is no flag --num_perturbation: did you mean --num_perturbations?"),
    ],
)
def test_bad_flag(fault, flags, expected):
    assert expected in fault(**flags)


def test_multi_vector_names_must_be_free_too(fault, demo_base, tmp_path):
    shutil.copytree(demo_base, tmp_path / "base")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "base" / "tokenizer")
    tokenizer.add_tokens(["<my-toy>_1"])
    tokenizer.save_pretrained(tmp_path / "base" / "tokenizer")
    config = tmp_path / "base" / "text_encoder" / "config.json"  # with a row for it
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": len(tokenizer)}))
    message = fault(pretrained_model_name_or_path=str(tmp_path / "base"), num_vectors=2)
    assert "'<my-toy>_1' is already in the vocabulary" in message


def test_half_an_sdxl_is_refused(fault, demo_base, tmp_path):
    shutil.copytree(demo_base, tmp_path / "base")
    index = tmp_path / "base" / "model_index.json"
    content = json.loads(index.read_text()) | {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
    index.write_text(json.dumps(content))
    name = str(tmp_path / "base")
    assert "text_encoder_2/config.json is missing" in fault(pretrained_model_name_or_path=name)
    index.write_text(json.dumps(content | {"text_encoder": [None, None]}))
    assert "as SDXL's refiner has" in fault(pretrained_model_name_or_path=name)


def test_output_dir_that_cannot_be_written(fault, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "cannot be written" in fault(output_dir=str(tmp_path / "file"))
    assert "cannot be written" in fault(output_dir="/proc/nowhere")


# ---------------------------------------------------------------------------------------------------- image data


def picture(path, mode="RGB", size=(40, 30), **options):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).convert(mode).save(
        path, **options
    )


def test_empty_folder(fault, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no readable image (0 files looked at)" in fault(train_data_dir=str(tmp_path / "empty"))


def test_no_readable_image(fault, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"not a picture")
    (folder / "notes.txt").write_text("a dog")
    assert "holds no readable image (2 files looked at)" in fault(train_data_dir=str(folder))


def test_litter_and_truncated_images_are_skipped_with_one_warning_each(tmp_path, caplog):
    folder = tmp_path / "images"
    folder.mkdir()
    picture(folder / "good.png")
    picture(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:400])
    for name in (".DS_Store", "Thumbs.db", "good.dat", "._good.png"):
        (folder / name).write_bytes(b"\0\1")
    Accelerator()  # its logger wants a state
    with caplog.at_level("WARNING"):
        assert [picture.name for picture in images.read_folder(folder, 64, False)] == ["good.png"]
    warnings = [record.message for record in caplog.records]
    assert len(warnings) == 2
    assert "Ignored 4 files" in warnings[0] and "Thumbs.db" in warnings[0]
    assert "Skipped cut.jpg" in warnings[1]


@pytest.mark.parametrize("mode, suffix", [("L", "png"), ("P", "png"), ("CMYK", "jpg"), ("1", "png"), ("RGB", "webp")])
def test_every_mode_becomes_rgb(tmp_path, mode, suffix):
    picture(tmp_path / f"image.{suffix}", mode)
    with Image.open(tmp_path / f"image.{suffix}") as image:
        pixels = images.to_pixels(image, 16, center_crop=False)
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.uint8


def test_transparency_is_laid_over_white():
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (images.to_pixels(image, 8, False) == 255).all()
    palette = Image.new("P", (8, 8), 3)
    palette.putpalette([0] * 768)
    palette.info["transparency"] = 3
    assert (images.to_pixels(palette, 8, False) == 255).all()


def test_16_bit_grey_keeps_its_range():
    grey = Image.fromarray(np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8))
    pixels = images.to_pixels(grey, 8, False)
    assert pixels.min() == 0 and pixels.max() == 255 and 100 < pixels.float().mean() < 155


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (20, 10), "black")
    image.paste("white", (0, 0, 10, 10))  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to view: the left half becomes the top
    from io import BytesIO

    file = BytesIO()
    image.save(file, "jpeg", exif=exif, quality=95)
    pixels = images.to_pixels(Image.open(file), 8, False)
    assert pixels[:, 0].min() > 200 and pixels[:, -1].max() < 55


def test_center_crop_keeps_the_middle_and_squeezing_keeps_everything():
    image = Image.new("RGB", (30, 10), "black")
    image.paste("white", (10, 0, 20, 10))
    assert (images.to_pixels(image, 10, True) > 200).all()
    assert (images.to_pixels(image, 30, False)[:, :, 0] < 50).all()


def captions(folder, rows, name="metadata.jsonl"):
    if name.endswith("jsonl"):
        (folder / name).write_text("\n".join(json.dumps(row) for row in rows))
    else:
        (folder / name).write_text("file_name,text\n" + "\n".join(f'{r["file_name"]},"{r["text"]}"' for r in rows))


@pytest.fixture
def two_images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        picture(folder / name)
    return folder


def placeholder_in(folder, num_vectors):
    """The base in a folder, and the placeholder `<my-toy>` of a star in its tokenizer."""
    base = base_model.open_base(base_model.ModelSource(folder))
    return base, prompts.add_placeholder(base.tokenizer, "<my-toy>", num_vectors, "star")


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_captions_mark_the_concept_by_braces_or_by_name(two_images, name, demo_base):
    rows = [{"file_name": "a.png", "text": "a {} on the beach"}, {"file_name": "b.png", "text": "my <my-toy>, red"}]
    captions(two_images, rows, name)
    base, placeholder = placeholder_in(demo_base, 2)
    tokenizer, pictures = base.tokenizer, images.read_folder(two_images, 64, False)
    prompt_ids, prompts_of_image = prompts.build_prompts(pictures, placeholder, base)
    assert prompts_of_image == [[0], [1]] and prompt_ids.shape == (2, tokenizer.model_max_length)
    texts = tokenizer.batch_decode(prompt_ids, skip_special_tokens=True)
    for text, words in zip(texts, (["a", "on", "the", "beach"], ["my", ",", "red"])):
        assert "<my-toy>" in text and "<my-toy>_1" in text
        assert all(word in text for word in words)


def test_caption_without_the_concept(fault, two_images):
    captions(two_images, [{"file_name": "a.png", "text": "a dog on the beach"}])
    message = fault(train_data_dir=str(two_images))
    assert "the caption of a.png, 'a dog on the beach', does not say where the concept goes" in message


def test_caption_so_long_that_the_concept_is_cut_off(fault, two_images):
    captions(two_images, [{"file_name": "a.png", "text": "red " * 200 + "{}"}])
    assert "cut off <my-toy>: shorten it" in fault(train_data_dir=str(two_images))


@pytest.mark.parametrize("content", ["{broken", '{"file": "a.png"}', '["a.png"]'])
def test_unreadable_captions(fault, two_images, content):
    (two_images / "metadata.jsonl").write_text(content)
    assert "metadata.jsonl cannot be read" in fault(train_data_dir=str(two_images))


def test_images_without_captions_get_the_templates(two_images, demo_base):
    captions(two_images, [{"file_name": "a.png", "text": "a {}"}])
    for learnable, count in (("object", 27), ("style", 17)):
        base, placeholder = placeholder_in(demo_base, 1)
        pictures = images.read_folder(two_images, 64, False)
        _, rows = prompts.build_prompts(pictures, placeholder, base, learnable)
        assert [len(r) for r in rows] == [1, count]


def test_local_dataset_by_name(two_images):
    captions(two_images, [{"file_name": f"{n}.png", "text": "a {} here"} for n in "ab"])
    pictures = read_dataset(str(two_images), None, "image", "text", 64, False)
    assert [picture.caption for picture in pictures] == ["a {} here"] * 2
    with pytest.raises(InputError, match="--image_column 'picture' is not in"):
        read_dataset(str(two_images), None, "picture", "text", 64, False)


def test_warnings_for_placeholders_that_match_inside_words(demo_base, caplog):
    Accelerator()
    for token, warned in (("<my-toy>", False), ("<My-Toy>", True), ("sksx", True)):
        caplog.clear()
        with caplog.at_level("WARNING"):
            tokenizer = base_model.open_base(base_model.ModelSource(demo_base)).tokenizer
            prompts.add_placeholder(tokenizer, token, 1, "star")
        assert any("upper-case or without <>" in r.message for r in caplog.records) == warned


@pytest.mark.parametrize("precision, default", [(None, 1e-3), ("no", 1e-3), ("bf16", 1e-2)])
def test_the_perturbation_scale_follows_from_the_precision(basics, precision, default):
    args = zoodip.parse_args(as_arguments(basics | {"--mixed_precision": precision}))
    zoodip.resolve_settings(args, torch.device("cpu"))
    assert args.perturbation_scale == default


def test_a_step_that_drowns_in_rounding_is_refused(basics):
    flags = basics | {"--mixed_precision": "bf16", "--perturbation_scale": 1e-3}
    with pytest.raises(InputError, match="too small for bf16 activations"):
        zoodip.resolve_settings(zoodip.parse_args(as_arguments(flags)), torch.device("cpu"))
    allowed = zoodip.parse_args(as_arguments(flags | {"--allow_noisy_estimates": True}))
    _, _, compute = zoodip.resolve_settings(allowed, torch.device("cpu"))
    assert compute.dtype is torch.bfloat16


def test_the_command_line_answers_in_one_sentence_and_exit_code_2(run_script, basics):
    done = run_script(*as_arguments(basics | {"--train_data_dir": "/nowhere"}), expect=2)
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("train_zoodip_textual_inversion.py: error: --train_data_dir '/nowhere' is not a folder")


def test_a_nan_on_the_command_line(run_script, basics, tmp_path):
    flags = basics | {"--learning_rate": "1e30", "--max_train_steps": 20, "--logging_steps": 1}
    done = run_script(*as_arguments(flags | {"--num_validation_samples": 0}), expect=1)
    assert "Traceback" not in done.stderr and "the last good embedding is in" in done.stderr
    assert (tmp_path / "out" / "learned_embeds.safetensors").is_file()
