"""Embedding files of every program, by their own rules: read, trained on, converted, and read by the other side."""

import pytest
import torch
from conftest import as_arguments
from safetensors.torch import load_file, save_file

import convert_embedding as convert
import train_zoodip_textual_inversion as zoodip
from personalization.errors import InputError
from personalization.models import base_model, embedding_files, families
from personalization.models.embedding_files import ONE, read_start, read_words


G = torch.Generator().manual_seed(0)
SMALL, LARGE, WIDE = (torch.randn(2, width, generator=G) for width in (768, 1280, 1024))


def a1111(vectors, **more):
    """As Automatic1111's trainer writes it."""
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "my-dog", "step": 9}
    return {**content, "sd_checkpoint": None, "sd_checkpoint_name": None, **more}


def write(path, content):
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


# What the other side reads: programs' own rules, in a few lines.


def as_comfyui(path, encoder="clip_l"):
    content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    if "string_to_param" in content:
        return next(iter(content["string_to_param"].values()))
    return content[encoder] if encoder in content else next(iter(content.values()))


def as_automatic1111(path):
    content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    if "string_to_param" in content:
        assert len(content["string_to_param"]) == 1
        return next(iter(content["string_to_param"].values()))
    if "clip_g" in content and "clip_l" in content:
        return content
    assert len(content) == 1
    return next(iter(content.values()))


def as_kohya(path):
    content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    return content["emb_params"] if "emb_params" in content else next(iter(content.values()))


# ------------------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize(
    "name, content, form, parts, family",
    [
        ("x.safetensors", {"<my-dog>": SMALL}, "diffusers", {ONE: SMALL}, "Stable Diffusion 1.x"),
        ("x.bin", {"<my-dog>": WIDE[0]}, "diffusers", {ONE: WIDE[:1]}, "Stable Diffusion 2.x"),
        ("x.pt", a1111(SMALL), "a1111", {ONE: SMALL}, "Stable Diffusion 1.x"),
        ("x.pt", a1111(torch.nn.Parameter(SMALL)), "a1111", {ONE: SMALL}, "Stable Diffusion 1.x"),
        ("x.safetensors", {"emb_params": SMALL}, "kohya", {ONE: SMALL}, "Stable Diffusion 1.x"),
        ("x.safetensors", {"emp_params": SMALL.half()}, "onetrainer", {ONE: SMALL.half()}, "Stable Diffusion 1.x"),
        ("x.safetensors", {"clip_l": SMALL}, "kohya", {"clip_l": SMALL}, "Stable Diffusion 1.x"),
        (
            "x.safetensors",
            {"clip_g": LARGE, "clip_l": SMALL},
            "kohya",
            {"clip_l": SMALL, "clip_g": LARGE},
            "Stable Diffusion XL",
        ),
        (
            "x.safetensors",
            {"clip_l": SMALL, "clip_g": LARGE, "t5": WIDE},
            "onetrainer",
            {"clip_l": SMALL, "clip_g": LARGE, "t5xxl": WIDE},
            "Stable Diffusion 3",
        ),
        ("x.safetensors", {"clip_l": SMALL, "t5xxl": WIDE}, "kohya", {"clip_l": SMALL, "t5xxl": WIDE}, "FLUX.1"),
    ],
)
def test_what_a_file_holds(tmp_path, name, content, form, parts, family):
    (word,) = read_words(write(tmp_path / name, content), "x")
    assert (word.form, word.family) == (form, family)
    assert word.parts.keys() == parts.keys()
    assert all(torch.equal(word.parts[key], vectors.float().detach()) for key, vectors in parts.items())
    says_it = form in ("diffusers", "a1111")
    assert word.name == {True: "<my-dog>" if form == "diffusers" else "my-dog", False: "x"}[says_it]


def test_the_files_own_metadata_say_its_name(tmp_path):
    save_file(
        {"clip_l": SMALL, "clip_g": LARGE}, tmp_path / "learned_embeds.safetensors", {"placeholder_token": "<a>"}
    )
    assert [word.name for word in read_words(tmp_path, "x")] == ["<a>"]


def test_vectors_for_an_output_are_no_words(tmp_path):
    path = write(tmp_path / "x.safetensors", {"clip_l": SMALL, "clip_l_out": SMALL + 1})
    (word,) = read_words(path, "x")
    assert word.form == "onetrainer" and word.outputs.keys() == {"clip_l"} and torch.equal(word.parts["clip_l"], SMALL)
    with pytest.raises(InputError, match="for the output of text encoders alone"):
        read_words(write(path, {"clip_l_out": SMALL}), "x")


class Evil:
    def __reduce__(self):
        return print, ("unpickled",)


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("x.pt", {"a": Evil()}, "is no pickle of plain tensors"),
        (
            "x.pt",
            a1111(torch.nn.ParameterDict({"*": SMALL})["*"], string_to_param=torch.nn.ParameterDict()),
            "no pickle",
        ),
        ("x.pt", a1111(SMALL, string_to_param={}), "holds a NoneType where vectors"),
        ("x.pt", [1], "holds a list and no embedding"),
        ("x.safetensors", {}, "holds nothing and no embedding"),
        ("x.safetensors", {"a": torch.zeros(1, 2, 3)}, r"holds \[1, 2, 3\] where vectors"),
        ("x.safetensors", {"a": torch.zeros(2, dtype=torch.int64)}, "NaN, infinity or whole numbers"),
        ("x.safetensors", {"a": torch.full((2,), torch.nan)}, "NaN, infinity or whole numbers"),
    ],
)
def test_what_is_no_embedding(tmp_path, capsys, name, content, expected):
    with pytest.raises(InputError, match=expected):
        read_words(write(tmp_path / name, content), "--initializer_embedding 'x'")
    assert "unpickled" not in capsys.readouterr().out


def test_a_file_that_is_missing_or_cut(tmp_path):
    with pytest.raises(InputError, match="there is no file"):
        read_words(tmp_path / "x.pt", "x")
    (tmp_path / "x.safetensors").write_bytes(b"1234567890")
    with pytest.raises(InputError, match="is no whole safetensors file"):
        read_words(tmp_path / "x.safetensors", "x")


def test_what_fits_a_base(tmp_path):
    pair = {"clip_l": 768, "clip_g": 1280}
    both = write(tmp_path / "xl.safetensors", {"clip_g": LARGE, "clip_l": SMALL})
    one = write(tmp_path / "one.safetensors", {"clip_l": SMALL})
    two = write(tmp_path / "two.safetensors", {"<a>": SMALL, "<b>": SMALL + 1})
    assert torch.equal(read_start(both, pair, "<x>", "--f"), torch.cat([SMALL, LARGE], dim=1))
    assert torch.equal(read_start(one, {ONE: 768}, "<x>", "--f"), SMALL)
    assert torch.equal(read_start(two, {ONE: 768}, "<b>", "--f"), SMALL + 1)
    with pytest.raises(InputError, match=r"holds 2 words \(<a>, <b>\): split it with convert_embedding"):
        read_start(two, {ONE: 768}, "<x>", "--f")
    with pytest.raises(InputError, match="is of Stable Diffusion XL .* takes vectors of 768 entries"):
        read_start(both, {ONE: 768}, "<x>", "--f")
    with pytest.raises(InputError, match="is of Stable Diffusion 1.x .* takes clip_l of 768 and clip_g of 1280 ent"):
        read_start(one, pair, "<x>", "--f")
    with pytest.raises(InputError, match="vectors of 768 entries. and this base model takes vectors of 1024"):
        read_start(one, {ONE: 1024}, "<x>", "--f")


# ----------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("form", ["diffusers", "a1111", "kohya", "onetrainer"])
def test_training_starts_from_a_file(train, basics, tmp_path, form):
    width = zoodip.resolve_settings(zoodip.parse_args(as_arguments(basics)), torch.device("cpu"))[0].word_width
    word = embedding_files.Word("x", {ONE: torch.randn(2, width, generator=G)}, form)
    ((name, content),) = embedding_files.files_of([word], form, "x").items()
    embedding_files.write(tmp_path / name, content, "x")
    start = {"initializer_token": None, "initializer_embedding": tmp_path / name}
    short = {"max_train_steps": 1, "num_validation_samples": 0, "learning_rate": 1e-11, "adam_weight_decay": 0}
    out = train(**start, **short)
    learned = load_file(out / "learned_embeds.safetensors")["<my-toy>"]
    torch.testing.assert_close(learned, word.parts[ONE], atol=1e-6, rtol=0)


def test_what_training_does_not_start_from(train, tmp_path):
    path = write(tmp_path / "x.safetensors", {"<a>": SMALL})
    with pytest.raises(InputError, match="is of Stable Diffusion 1.x .vectors of 768 entries"):
        train(initializer_token=None, initializer_embedding=path)


def test_a_pair_to_start_from(repo, basics, tmp_path):
    basics |= {"--pretrained_model_name_or_path": repo / "demo" / "base_xl", "--initializer_token": None}
    source = base_model.ModelSource(str(repo / "demo" / "base_xl"))
    widths = base_model.open_base(source, None, families.FAMILIES.values()).word_parts
    halves = {key: torch.randn(3, width, generator=G) for key, width in widths.items()}
    basics["--initializer_embedding"] = write(tmp_path / "x.safetensors", halves)
    args = zoodip.parse_args(as_arguments(basics))
    _, placeholder, _ = zoodip.resolve_settings(args, torch.device("cpu"))
    assert args.num_vectors == placeholder.num_vectors == 3
    assert torch.equal(placeholder.start, torch.cat([halves["clip_l"], halves["clip_g"]], dim=1))
    args = zoodip.parse_args(as_arguments(basics | {"--num_vectors": 2}))
    with pytest.raises(InputError, match="--num_vectors 2 is not what --initializer_embedding .* has, 3: drop"):
        zoodip.resolve_settings(args, torch.device("cpu"))


def test_one_start_and_not_two(basics, capsys):
    for words in ({"--initializer_token": None}, {"--initializer_embedding": "x"}):
        with pytest.raises(SystemExit):
            zoodip.parse_args(as_arguments(basics | words))
        assert "give either --initializer_token, a word to start from, or --initializer_emb" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- conversion


def run(*arguments, out):
    convert.main(convert.parse_args([*map(str, arguments), "--output_dir", str(out)]))
    return sorted(path.name for path in out.iterdir())


@pytest.mark.parametrize("form", embedding_files.FORMS)
@pytest.mark.parametrize("source", ["<my-dog>", "emb_params", "emp_params", "clip_l"])
def test_one_encoder_from_and_to_everything(tmp_path, capsys, source, form):
    path = write(tmp_path / "my-dog.safetensors", {source: SMALL})
    (name,) = run("--files", path, "--to", form, out=tmp_path / "out")
    assert name == ("my-dog.pt" if form == "a1111" else "my-dog.safetensors")
    file = tmp_path / "out" / name
    assert torch.equal(as_comfyui(file), SMALL) and torch.equal(as_automatic1111(file), SMALL)
    if form != "a1111":
        assert torch.equal(as_kohya(file), SMALL)
    (word,) = read_words(file, "x")
    assert word.name == ("<my-dog>" if source == "<my-dog>" else "my-dog") and word.num_vectors == 2
    assert "2 vectors, fits Stable Diffusion 1.x" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["a1111", "comfyui", "kohya", "onetrainer"])
def test_halves_become_a_pair_and_a_pair_halves(tmp_path, form):
    for number, half in (("1", SMALL), ("2", LARGE)):
        write(tmp_path / f"learned_embeds_{number}.safetensors", {"<my-dog>": half})
    halves = [tmp_path / f"learned_embeds_{number}.safetensors" for number in "12"]
    assert run("--files", *halves, "--to", form, out=tmp_path / "pair") == ["my-dog.safetensors"]
    pair = tmp_path / "pair" / "my-dog.safetensors"
    assert torch.equal(as_comfyui(pair), SMALL) and torch.equal(as_comfyui(pair, "clip_g"), LARGE)
    assert as_automatic1111(pair).keys() == {"clip_l", "clip_g"}
    names = run("--files", pair, "--to", "diffusers", out=tmp_path / "back")
    assert names == ["my-dog_1.safetensors", "my-dog_2.safetensors"]
    back = [load_file(tmp_path / "back" / name) for name in names]
    assert torch.equal(back[0]["<my-dog>"], SMALL) and torch.equal(back[1]["<my-dog>"], LARGE)


def test_several_concepts(tmp_path):
    files = [
        write(tmp_path / f"{name}.safetensors", {"clip_l": SMALL + i, "clip_g": LARGE + i})
        for i, name in enumerate("ab")
    ]
    names = run("--files", *files, "--to", "diffusers", "--name", "both", out=tmp_path / "one")
    assert names == ["both_1.safetensors", "both_2.safetensors"]
    assert load_file(tmp_path / "one" / "both_2.safetensors").keys() == {"a", "b"}
    together = [tmp_path / "one" / name for name in names]
    split = run("--files", *together, "--to", "kohya", out=tmp_path / "split")
    assert split == ["a.safetensors", "b.safetensors"]
    assert torch.equal(load_file(tmp_path / "split" / "b.safetensors")["clip_g"], LARGE + 1)
    (name,) = run("--files", *files, "--to", "comfyui", "--join", "--name", "ab", out=tmp_path / "joined")
    joined = load_file(tmp_path / "joined" / name)
    assert torch.equal(joined["clip_l"], torch.cat([SMALL, SMALL + 1])) and len(joined["clip_g"]) == 4


def test_what_cannot_be_converted(tmp_path):
    small = write(tmp_path / "a.safetensors", {"clip_l": SMALL})
    pair = write(tmp_path / "b.safetensors", {"clip_l": SMALL, "clip_g": LARGE})
    with pytest.raises(InputError, match="are of different kinds of models and cannot be joined"):
        run("--files", small, pair, "--join", "--name", "x", "--to", "kohya", out=tmp_path / "out")
    with pytest.raises(InputError, match="are of different kinds of models: convert them one by one"):
        run("--files", small, pair, "--to", "diffusers", out=tmp_path / "out")
    with pytest.raises(InputError, match="is there already"):
        run("--files", small, "--to", "kohya", out=tmp_path)
    (tmp_path / "2").mkdir()
    again = write(tmp_path / "2" / "a.safetensors", {"clip_l": SMALL})
    with pytest.raises(InputError, match="two concepts are called 'a'"):
        run("--files", small, again, "--to", "kohya", out=tmp_path / "out")


def test_beside_a_base(demo_base, tmp_path, capsys):
    tables = convert.tables_of(convert.parse_args(["--files", "x", "--pretrained_model_name_or_path", demo_base]))
    ((tokenizer, table),) = tables.values()
    star = table[tokenizer.encode("star", add_special_tokens=False)[0]].float()
    write(tmp_path / "x.safetensors", {"emb_params": 2 * star})
    run("--files", tmp_path / "x.safetensors", "--pretrained_model_name_or_path", demo_base, out=tmp_path)
    said = capsys.readouterr().out
    assert f"norms {2 * star.norm():.3f}" in said and "vector 1 is nearest to 'star' 1.00," in said
    assert "words of the vocabulary: median norm" in said
