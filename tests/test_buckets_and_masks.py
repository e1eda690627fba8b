"""Pictures that keep their shape, and losses that count the subject alone: in every trainer, by every optimizer."""

import functools
import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import as_arguments
from PIL import Image
from safetensors.torch import load_file
from tiny_base import build_tiny_base, build_tiny_xl_base

import train_selective_dreambooth_lora as selective
import train_tuneqdm_dreambooth as tuneqdm
import train_zoodip_textual_inversion as zoodip
from personalization.data import examples, images, prompts
from personalization.data.images import bucket
from personalization.errors import InputError
from personalization.methods import dreambooth


@pytest.fixture(autouse=True)
def log(caplog):
    Accelerator()
    caplog.set_level("WARNING")
    return lambda: "\n".join(record.message.removeprefix("[RANK 0] ") for record in caplog.records)


def save(path, size, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Tiny bases, and pictures of three shapes (width x height), two of which have a mask: their left half."""
    place = tmp_path_factory.mktemp("shapes")
    build_tiny_base(place / "base")
    build_tiny_xl_base(place / "xl")
    (place / "pictures").mkdir()
    for seed, (name, size) in enumerate({"a": (60, 60), "b": (80, 40), "c": (40, 80), "d": (80, 42)}.items()):
        save(place / "pictures" / f"{name}.png", size, seed)
        if name in "ab":
            mask = np.zeros(size[::-1], dtype=np.uint8)
            mask[:, : size[0] // 2] = 255
            Image.fromarray(mask).save(place / "pictures" / f"{name}-masklabel.png")
    return place


def basics(place, out, base="base", **more):
    chosen = {"pretrained_model_name_or_path": place / base, "train_data_dir": place / "pictures", "output_dir": out}
    chosen |= {"placeholder_token": "<my-toy>", "initializer_token": "star", "report_to": "none", "resolution": 32}
    chosen |= {"max_train_steps": 3, "num_validation_samples": 3, "puts_min_timestep": 0, **more}
    return as_arguments({f"--{name}": value for name, value in chosen.items()})


def train(place, out, **more):
    zoodip.main(zoodip.parse_args(basics(place, out, **more)))
    return load_file(out / "learned_embeds.safetensors")


# ------------------------------------------------------------------------------------------------------------ buckets


@pytest.mark.parametrize(
    "shape, resolution, multiple, expected",
    [
        ((600, 600), 512, 64, (512, 512)),
        ((4000, 3000), 512, 64, (576, 448)),
        ((3000, 4000), 512, 64, (448, 576)),
        ((1080, 1920), 512, 64, (384, 640)),
        ((100, 5000), 512, 64, (384, 640)),
        ((2000, 3000), 1024, 32, (832, 1248)),
    ],
)
def test_the_bucket_of_a_shape(shape, resolution, multiple, expected):
    found = bucket(*shape, resolution, multiple)
    assert found == expected
    assert found[0] * found[1] <= resolution**2 and all(side % multiple == 0 for side in found)


def test_pictures_keep_their_shape(place):
    pictures = images.read_folder(place / "pictures", 32, False, multiple=8)
    assert [tuple(p.pixels.shape[1:]) for p in pictures] == [(32, 32), (24, 40), (40, 24), (24, 40)]
    wide = pictures[3].framing  # 80 x 42 became 46 x 24, of which 6 columns are cut off
    assert wide.original == (42, 80) and wide.scaled == (24, 46) and wide.crop == (0, 3) and wide.kept == (24, 40)
    assert examples.describe_sizes(wide) == [42, 80, 0, 3, 24, 40]


def test_a_batch_has_one_shape_and_all_pictures_have_their_share(place, tmp_path):
    args = zoodip.parse_args(basics(place, tmp_path, base="xl", use_aspect_ratio_buckets=True, train_batch_size=3))
    base, placeholder, compute = zoodip.resolve_settings(args, torch.device("cpu"))
    pictures = zoodip.read_pictures(args, base)
    captions = prompts.build_prompts(pictures, placeholder, base)
    concept, _ = examples.load_concept(pictures, captions, base, 0.5, compute)
    generator, seen = torch.Generator().manual_seed(0), []
    for _ in range(200):
        batch = zoodip.draw_batch(concept, zoodip.choose_sampling(args), base.scheduler, generator)
        height, width = batch.noisy_latents.shape[-2:]
        seen += [(height, width)] * 3
        assert (batch.size_ids[:, 4:] == 2 * torch.tensor([height, width])).all()
    shares = {shape: seen.count(shape) / len(seen) for shape in set(seen)}
    assert shares == {
        (16, 16): pytest.approx(1 / 4, abs=0.1),
        (12, 20): pytest.approx(1 / 2, abs=0.1),
        (20, 12): pytest.approx(1 / 4, abs=0.1),
    }


@pytest.mark.parametrize("optimizer", ["zo_adam", "gradient", "gauss_newton"])
def test_runs_in_buckets_resume_bit_for_bit(place, tmp_path, optimizer):
    how = {"use_aspect_ratio_buckets": True, "optimizer": optimizer, "gradient_accumulation_steps": 2}
    how |= {"train_batch_size": 2, "checkpointing_steps": 2, "max_train_steps": 4, "lr_scheduler": "constant"}
    if optimizer == "gauss_newton":
        how.pop("lr_scheduler")
        how |= {"gn_subspace": "none", "gn_subspace_dimension": 4}
    whole = train(place, tmp_path / "whole", **how)
    train(place, tmp_path / "parts", **how | {"max_train_steps": 2})
    parts = train(place, tmp_path / "parts", **how, resume_from_checkpoint="latest")
    assert torch.equal(whole["<my-toy>"], parts["<my-toy>"])


@pytest.mark.parametrize("script", [selective, tuneqdm], ids=lambda script: script.__name__)
@pytest.mark.parametrize("masked", [None, True], ids=["buckets", "buckets and masks"])
def test_buckets_and_masks_in_the_dreambooth_trainers(place, tmp_path, script, masked):
    chosen = {"--pretrained_model_name_or_path": place / "base", "--instance_data_dir": place / "pictures"}
    chosen |= {"--subject_name": "star", "--output_dir": tmp_path, "--max_train_steps": 2, "--report_to": "none"}
    chosen |= {"--resolution": 32, "--use_aspect_ratio_buckets": True, "--masked_loss": masked}
    chosen |= {"--bp_view": "window"} if script is selective else {}
    script.main(script.parse_args(as_arguments(chosen)))
    assert all(value.isfinite().all() for value in load_file(tmp_path / script.PUBLICATION.result_name).values())


@pytest.mark.parametrize(
    "more, expected",
    [
        ({"unet_backend": "openvino"}, "--use_aspect_ratio_buckets has many sizes, and --unet_backend openvino"),
        ({"torch_compile": True}, "--use_aspect_ratio_buckets has many sizes, and --torch_compile"),
        ({"mask_dir": "x"}, "--mask_dir is for --masked_loss: add that or drop it."),
    ],
)
def test_what_does_not_go_together(place, tmp_path, capsys, more, expected):
    with pytest.raises(SystemExit):
        zoodip.parse_args(basics(place, tmp_path, use_aspect_ratio_buckets=True, **more))
    assert expected in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- masks


def test_masks_beside_pictures_are_no_pictures(place, log):
    pictures = images.read_folder(place / "pictures", 32, False)
    assert [picture.name for picture in pictures] == ["a.png", "b.png", "c.png", "d.png"]
    assert {picture.mask for picture in pictures} == {None}
    assert "Left out 2 masks" in log() and "--masked_loss counts the loss inside them." in log()


def test_masks_are_framed_as_their_pictures(place, log):
    pictures = images.read_folder(place / "pictures", 32, True, masked=True)
    assert "The loss counts everywhere in pictures without a mask: c.png, d.png." in log()
    a, b, c, _ = (picture.mask for picture in pictures)
    assert c is None and a.shape == b.shape == (1, 32, 32)
    assert (a[..., :15] == 255).all() and (a[..., 17:] == 0).all()
    assert (b[..., :15] == 255).all() and (b[..., 17:] == 0).all()  # the middle of 80 x 40 is that of the square, too
    weights = examples.weigh(pictures, 2, (8, 8))
    assert weights.shape == (2, 4, 1, 8, 8)
    torch.testing.assert_close(weights.square().mean(dim=(2, 3, 4)), torch.ones(2, 4))
    assert (weights[0, 0, ..., 5:] == 0).all() and (weights[1, 0, ..., :3] == 0).all() and (weights[:, 2] == 1).all()
    assert images.digest(pictures) != images.digest([picture._replace(mask=None) for picture in pictures])


def test_an_alpha_channel_is_a_mask(tmp_path):
    pixels = np.full((20, 20, 4), 255, dtype=np.uint8)
    pixels[:, 10:, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels[..., :3]).save(tmp_path / "b.png")
    a, b = images.read_folder(tmp_path, 20, False, masked=True)
    assert (a.mask[..., :10] == 255).all() and (a.mask[..., 10:] == 0).all() and b.mask is None


def test_masks_in_a_folder_of_their_own(place, tmp_path):
    mask = np.zeros((80, 40), dtype=np.uint8)
    mask[:40] = 255
    Image.fromarray(mask).save(tmp_path / "c.png")
    pictures = images.read_folder(place / "pictures", 32, False, masked=True, mask_dir=str(tmp_path))
    assert [picture.mask is None for picture in pictures] == [False, False, False, True]
    assert (pictures[2].mask[:, :15] == 255).all() and (pictures[2].mask[:, 17:] == 0).all()


def test_masks_of_folders_of_kohya(tmp_path):
    """Each in a folder of its own or beside the pictures; a folder without masks is one whose pictures count whole."""
    for name in ("10_my dog", "4_my dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        save(tmp_path / "data" / name / "a.png", (40, 40))
    (tmp_path / "masks" / "10_my dog").mkdir(parents=True)
    mask = np.zeros((40, 40), dtype=np.uint8)
    mask[:20] = 255
    Image.fromarray(mask).save(tmp_path / "masks" / "10_my dog" / "a.png")
    one, two = images.read_folder(tmp_path / "data", 32, True, masked=True, mask_dir=str(tmp_path / "masks"))
    assert one.name == "10_my dog/a.png" and one.repeats == 10 and (one.mask[:, :14] == 255).all()
    assert two.mask is None and two.repeats == 4


def test_pictures_are_never_their_own_masks(place):
    pictures = images.read_folder(place / "pictures", 32, True, masked=True, mask_dir=str(place / "pictures"))
    assert [picture.mask is None for picture in pictures] == [False, False, True, True]


def test_a_mask_that_is_painted_on_nothing(tmp_path):
    """White on a transparent layer, as painting programs save it; and one mask for pictures of one name."""
    pixels = np.zeros((20, 20, 4), dtype=np.uint8)
    pixels[:, :10] = 255
    Image.fromarray(pixels).save(tmp_path / "a-masklabel.png")
    save(tmp_path / "a.png", (20, 20))
    save(tmp_path / "a.jpg", (20, 20))
    for picture in images.read_folder(tmp_path, 20, False, masked=True):
        assert (picture.mask[..., :9] == 255).all() and (picture.mask[..., 11:] == 0).all()


@pytest.mark.parametrize("flipped", [False, True])
def test_pictures_masks_sizes_and_captions_stay_together(place, tmp_path, flipped):
    """Buckets, masks, flips, repeats and captions at once, where the model is told of crops."""
    data = {"3_a": ((90, 40), "a {} one"), "1_b": ((40, 90), "a {} two"), "2_c": ((92, 40), "a {} three")}
    for name, (size, text) in data.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        pixels = np.zeros((*size[::-1], 3), dtype=np.uint8)
        mask = np.zeros(size[::-1], dtype=np.uint8)
        pixels[:, : size[0] // 4], mask[:, : size[0] // 4] = 255, 255  # white is where the mask is
        Image.fromarray(pixels).save(tmp_path / "data" / name / "p.png")
        Image.fromarray(mask).save(tmp_path / "data" / name / "p-masklabel.png")
        (tmp_path / "data" / name / "p.txt").write_text(text)
    more = {"use_aspect_ratio_buckets": True, "masked_loss": True, "flip_probability": float(flipped)}
    more |= {"train_data_dir": tmp_path / "data", "train_batch_size": 2, "base": "xl", "center_crop": True}
    args = zoodip.parse_args(basics(place, tmp_path / "out", **more))
    base, placeholder, compute = zoodip.resolve_settings(args, torch.device("cpu"))
    pictures = zoodip.read_pictures(args, base)
    captions = prompts.build_prompts(pictures, placeholder, base)
    concept, _ = examples.load_concept(pictures, captions, base, args.flip_probability, compute)
    asked = [placeholder.expand(text) for text in ("a {} three", "a {} one", "a {} two")]
    expected = dict(zip(map(tuple, base.tokenize(asked).tolist()), ((40, 92), (40, 90), (90, 40))))
    generator, seen = torch.Generator().manual_seed(0), []
    for _ in range(150):
        latents, ids, sizes, weights = examples.draw_examples(concept, 2, generator)
        for each, row, size, weight in zip(latents, ids, sizes, weights):
            shape = expected[tuple(row.tolist())]
            seen.append(shape)
            left = {40: 0, 90: 7, 92: 7 + flipped}[shape[1]]  # of 54 or 55 columns, of which 40 are kept
            assert tuple(size[:2].int().tolist()) == shape and size[3] == left
            inside = weight[0] > 0
            assert each.shape[-2:] == inside.shape == (size[4] / 2, size[5] / 2)
            side = inside.shape[1] // 2
            assert inside[:, side:].any() == flipped and inside[:, :side].any() != flipped
    shares = {shape: seen.count(shape) / len(seen) for shape in expected.values()}
    assert shares == {(40, 90): pytest.approx(3 / 6, abs=0.1), (90, 40): pytest.approx(1 / 6, abs=0.1)} | {
        (40, 92): pytest.approx(2 / 6, abs=0.1)
    }


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("c.png", np.zeros((80, 40), np.uint8), "the mask of c.png is black where it is trained"),
        ("c.png", np.full((40, 40), 255, np.uint8), "the mask c.png has 40 x 40 pixels and c.png 40 x 80"),
        ("c.png", None, "the mask c.png of c.png cannot be read (it is empty, or of no format"),
        ("z.png", np.full((40, 40), 255, np.uint8), "has no mask for any picture, such as c.png for c.png"),
    ],
)
def test_masks_that_cannot_be_used(place, tmp_path, name, content, expected):
    (tmp_path / "pictures").mkdir()
    save(tmp_path / "pictures" / "c.png", (40, 80))
    if content is None:
        (tmp_path / name).write_bytes(b"x")
    else:
        Image.fromarray(content).save(tmp_path / name)
    with pytest.raises(InputError) as caught:
        images.read_folder(tmp_path / "pictures", 32, False, masked=True, mask_dir=str(tmp_path))
    assert expected in str(caught.value)


def model_and_batches(place, tmp_path, **more):
    """A `Task`, θ, and a batch with masks, as it is and with other targets where the masks are black."""
    args = zoodip.parse_args(
        basics(place, tmp_path, masked_loss=True, train_batch_size=3, quantization="none", **more)
    )
    base, placeholder, compute = zoodip.resolve_settings(args, torch.device("cpu"))
    pictures = zoodip.read_pictures(args, base)
    captions = prompts.build_prompts(pictures, placeholder, base)
    task = zoodip.prepare(args, base, placeholder, compute, pictures, captions)
    batch = task.draw_batch(torch.Generator().manual_seed(0))
    while not (batch.weights == 0).flatten(1).any(dim=1).all():  # all of them with a mask
        batch = task.draw_batch(torch.Generator().manual_seed(int(batch.timesteps[0])))
    outside = batch.target + 100 * (batch.weights == 0)
    return task, task.initial[None], batch, batch._replace(target=outside)


def test_what_is_outside_of_a_mask_does_not_count(place, tmp_path):
    task, theta, batch, other = model_and_batches(place, tmp_path)
    assert not torch.equal(batch.target, other.target)
    with torch.no_grad():
        candidates = torch.cat([theta, theta + 0.1])[:, None]
        assert torch.equal(task.model.losses(candidates, batch), task.model.losses(candidates, other))
        assert torch.equal(task.model.errors(candidates, batch), task.model.errors(candidates, other))
        plain = task.model.errors(candidates, batch._replace(weights=torch.empty(3, 0))).view(2, 3, 4, -1)
        errors = task.model.errors(candidates, batch).view(2, 3, 4, -1)
    inside = batch.weights.flatten(2)
    torch.testing.assert_close(errors, plain * inside)
    share = (plain.square() * inside.square()).sum(dim=(2, 3)) / (4 * inside.square().sum(dim=(1, 2)))
    torch.testing.assert_close(errors.square().mean(dim=(2, 3)), share)  # the mean inside the mask


@pytest.mark.parametrize("optimizer", ["zo_adam", "gradient", "gauss_newton"])
def test_masks_in_every_way_to_move_a_word(place, tmp_path, optimizer):
    """The evidence of a batch is the same, whatever is outside; and without masks it is another."""
    more = {"gn_subspace": "none", "gn_subspace_dimension": 4} if optimizer == "gauss_newton" else {}
    task, theta, batch, other = model_and_batches(place, tmp_path, optimizer=optimizer, **more)
    found = zoodip.OPTIMIZERS[optimizer].look_ahead(task.args, task.base, task.placeholder, task.concept.prompt_ids)
    task.args.max_train_steps = 3
    learner = zoodip.start_learner(task.args, task.initial, found)

    def evidence(batch):
        with torch.no_grad():
            parts, _ = learner.rule.evidence(task.model, learner.theta, batch, torch.Generator().manual_seed(1))
        return torch.cat([part.flatten().float() for part in parts])

    one, two, plain = map(evidence, (batch, other, batch._replace(weights=torch.empty(3, 0))))
    assert torch.equal(one, two) and not torch.allclose(one, plain)


def test_masks_in_the_loss_of_the_dreambooth_trainers(place, tmp_path):
    task, _, batch, other = model_and_batches(place, tmp_path)
    conditioning = torch.randn(3, task.base.prompt_length, 16, generator=torch.Generator().manual_seed(0))
    loss = functools.partial(dreambooth.denoising_errors, task.base.family, task.model.denoiser)
    with torch.no_grad():
        assert torch.equal(loss(batch, conditioning), loss(other, conditioning))


def test_a_masked_run_is_another_run_and_resumes(place, tmp_path):
    how = {"masked_loss": True, "checkpointing_steps": 2, "quantization": "none"}
    masked, plain = train(place, tmp_path / "a", **how), train(place, tmp_path / "b")
    assert not torch.equal(masked["<my-toy>"], plain["<my-toy>"])
    again = train(place, tmp_path / "a", **how, resume_from_checkpoint="latest")
    assert torch.equal(masked["<my-toy>"], again["<my-toy>"])
    with pytest.raises(InputError, match="belongs to other settings: "):
        train(place, tmp_path / "a", **how | {"masked_loss": None}, resume_from_checkpoint="latest")
    assert json.loads((tmp_path / "a" / "zoodip_config.json").read_text())["settings"]["masked_loss"] is True


# --------------------------------------------------------------------------------------------------------------- HEIC


def test_heic_is_read_where_its_package_is_installed(tmp_path, monkeypatch):
    assert "pip install pillow-heif, or save such images as JPEG or PNG" in images.unreadable(["a.HEIC"])
    assert "pip" not in images.unreadable(["a.HEIC", "b.svg"])
    heif = pytest.importorskip("pillow_heif")
    images.readable_suffixes.cache_clear()
    images.readable_suffixes()
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels[:, :30] = (250, 10, 10)
    exif = Image.Exif()
    exif[274] = 6  # on its side
    heif.from_pillow(Image.fromarray(pixels)).save(tmp_path / "a.heic", exif=exif.tobytes())
    (picture,) = images.read_folder(tmp_path, 16, False)
    assert picture.framing.original == (60, 40)
    assert picture.pixels[0, :6].float().mean() > 200 and picture.pixels[0, 10:].float().mean() < 50
