"""250 random damages to a base, pictures, cache, checkpoints and results: no traceback, no wrong result in silence,
nothing lost that was there before.

A case is reproduced by its name: `pytest -n 0 "tests/test_damage.py::test_random_damage[cache-cut-3]"`. More of them:
`DAMAGES=100 pytest -n 0 tests/test_damage.py` tries 100 instead of 10 of each sort.
"""

import gc
import os
import shutil

import huggingface_hub.constants
import huggingface_hub.hf_api
import huggingface_hub.utils._http
import pytest
import torch
from damage import GROUPS, KINDS, Damage, World, check_nothing_lost, check_sentence, parses, run_from_outside, snapshot
from hub_server import TOKEN, HubServer


SEEDS = int(os.environ.get("DAMAGES", 10))
CASES = [Damage(group, kind, seed) for group in GROUPS for kind in KINDS for seed in range(SEEDS)]


@pytest.fixture(scope="module")
def built():
    """An empty `World`; what the imports left is not looked through at every garbage collection of a run."""
    made = World()
    gc.collect()
    gc.freeze()
    yield made
    gc.unfreeze()
    shutil.rmtree(made.root)


@pytest.fixture
def world(built, capsys, caplog):
    """The undamaged world; `world.train(**flags)` is a run of three steps in it."""
    if not built.kept.is_dir():
        built.build(capsys, caplog)
    built.restore()
    built.train = lambda **flags: built.run(capsys, caplog, **flags)
    built.push = lambda *words: run_from_outside(
        ["--push_only", "--output_dir", str(built.live / "out"), "--hub_model_id", "alice/toy", *words], capsys, caplog
    )
    return built


@pytest.fixture
def hub(monkeypatch):
    """The stand-in Hub, which this process takes for the real one."""
    with HubServer() as server:
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        for name, value in {"ENDPOINT": server.url, "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False}.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def test_the_world_resumes_to_the_bits_of_a_run_in_one_piece(world):
    assert world.train(**{"--resume_from_checkpoint": "latest"}).code == 0
    assert torch.equal(world.embedding(), world.expected["int8"])
    assert not torch.equal(world.expected["none"], world.expected["int8"])
    for group in GROUPS:
        assert len(world.files(group)) >= 2, group


@pytest.mark.parametrize("damage", CASES, ids=str)
def test_random_damage(world, damage, hub):
    paths = damage.apply(world)
    # A base is another model, and a caption another caption, where a damage leaves it in good form: nobody can tell.
    lenient = any(path.relative_to(world.live).parts[0] == "data" for path in paths)
    lenient |= damage.group == "base" and damage.kind in ("zeroed", "flipped") and all(map(parses, paths))
    rng = damage.rng
    rng.random()  # not the number that chose the file
    if damage.group == "result" and rng.random() < 0.4:
        return check_push(world, paths, hub)
    quantization = "none" if damage.group != "cache" and rng.random() < 0.2 else "int8"
    checkpoint = rng.choice(["latest", "latest", "checkpoint-2"]) if damage.group != "data" else None
    resumes = damage.group == "checkpoint" or rng.random() < 0.5
    if resumes and quantization == "int8":  # which is what the checkpoints were made with
        flags = {"--resume_from_checkpoint": checkpoint}
    else:
        flags = {"--quantization": quantization}
    before = snapshot(world.live)
    outcome = world.train(**flags)
    check_nothing_lost(world, before, outcome)
    if outcome.code:
        check_sentence(world, outcome, paths, strict=not lenient)
    else:
        learned = world.embedding()
        assert learned.isfinite().all()
        assert lenient or torch.equal(learned, world.expected[quantization]), f"wrong in silence: {outcome.warnings}"
        cut_picture = damage.kind == "cut" and paths[0].suffix == ".png" and damage.group == "data"
        assert (
            not cut_picture or paths[0].name in outcome.warnings or torch.equal(learned, world.expected[quantization])
        )
    if damage.group == "base":
        check_cache_is_sound(world, before)


def check_cache_is_sound(world, before):
    """A run of the right base, with the cache that the damaged one left behind."""
    if all(name in before for name in snapshot(world.live) if name.startswith("cache/")):
        return
    shutil.rmtree(world.live / "base")
    shutil.copytree(world.kept / "base", world.live / "base")
    outcome = world.train(out="afterwards")
    assert outcome.code == 0, f"the cache is poisoned: {outcome.said[-500:]}"
    assert torch.equal(world.embedding("afterwards"), world.expected["int8"]), "the cache is poisoned"


def check_push(world, paths, hub):
    """`--push_only` of a damaged run: refused, or what is pushed is what was learned."""
    before = snapshot(world.live)
    outcome = world.push()
    check_nothing_lost(world, before, outcome)
    if outcome.code:
        check_sentence(world, outcome, paths, strict=True)
    else:
        name = "learned_embeds.safetensors"
        pushed = hub.repos["alice/toy"].files[name]
        assert pushed == (world.kept / "out" / name).read_bytes(), "a damaged embedding was pushed in silence"


def test_a_push_of_the_undamaged_world(world, hub):
    assert world.push().code == 0
    assert "learned_embeds.safetensors" in hub.repos["alice/toy"].files
