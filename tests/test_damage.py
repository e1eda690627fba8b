"""250 random damages to a base, pictures, cache, checkpoints and results: no traceback, no wrong result in silence,
nothing lost that was there before.

A case is reproduced by its name: `pytest -n 0 "tests/test_damage.py::test_random_damage[cache-cut-3]"`. More of them:
`DAMAGES=100 pytest -n 0 tests/test_damage.py` tries 100 instead of 10 of each sort.
"""

import os
import random
import shutil

import huggingface_hub.constants
import huggingface_hub.hf_api
import huggingface_hub.utils._http
import pytest
import torch
from damage import GROUPS, KINDS, QUICK, Damage, check_nothing_lost, check_sentence, parses, snapshot
from hub_server import TOKEN, HubServer
from hypothesis import Phase, given, settings
from hypothesis import strategies as st


SEEDS = int(os.environ.get("DAMAGES", 10))
CASES = [Damage(group, kind, seed) for group in GROUPS for kind in KINDS for seed in range(SEEDS)]


@pytest.fixture(scope="module")
def server():
    """The stand-in Hub."""
    with HubServer() as started:
        yield started


@pytest.fixture
def hub(server, monkeypatch):
    """The stand-in Hub, which this process takes for the real one; empty."""
    server.repos.clear()
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
    for name, value in {"ENDPOINT": server.url, "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False}.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return server


def test_the_world_resumes_to_the_bits_of_a_run_in_one_piece(world):
    assert world.train(**{"--resume_from_checkpoint": "latest"}).code == 0
    assert torch.equal(world.embedding(), world.expected["int8"])
    assert not torch.equal(world.expected["none"], world.expected["int8"])
    for group in GROUPS:
        assert len(world.files(group)) >= 2, group


@pytest.mark.parametrize("damage", CASES, ids=str)
def test_random_damage(world, damage, hub):
    judge(world, [damage], hub)


MORE = st.lists(
    st.builds(Damage, st.sampled_from(GROUPS), st.sampled_from(KINDS), st.integers(0, 10**6)), min_size=2, max_size=4
)


@settings(QUICK, max_examples=20, phases=[Phase.generate])
@given(MORE)
def test_several_damages_at_once(world, hub, damages):
    world.restore()
    hub.repos.clear()
    judge(world, damages, hub)


def judge(world, damages, hub):
    """Damages the world, runs in it, and holds the outcome against what is allowed."""
    paths = [path for damage in damages for path in damage.apply(world)]
    groups = {path.relative_to(world.live).parts[0] for path in paths}
    # A base is another model, and a caption another caption, where a damage leaves it in good form: nobody can tell.
    fuzzy = all(damage.kind in ("zeroed", "flipped") for damage in damages if damage.group == "base")
    lenient = "data" in groups or ("base" in groups and fuzzy and all(map(parses, paths)))
    rng = random.Random(" ".join(map(str, damages)))
    if {damage.group for damage in damages} == {"result"} and rng.random() < 0.4:
        return check_push(world, paths, hub)
    quantization = rng.choice(["int8"] * 4 + ["none"]) if "cache" not in groups else "int8"
    if quantization == "none":  # the checkpoints were made with int8
        flags = {"--quantization": "none"}
    elif any(damage.group == "checkpoint" for damage in damages) or rng.random() < 0.5:
        flags = {"--resume_from_checkpoint": rng.choice(["latest", "latest", "checkpoint-2"])}
    else:
        flags = {}
    before = snapshot(world.live)
    outcome = world.train(**flags)
    check_nothing_lost(world, before, outcome)
    if outcome.code:
        check_sentence(world, outcome, paths, strict=not lenient)
    else:
        learned = world.embedding()
        assert learned.isfinite().all()
        same = torch.equal(learned, world.expected[quantization])
        assert lenient or same, f"wrong in silence: {outcome.warnings}"
        if len(damages) == 1 and damages[0].kind == "cut" and paths[0].suffix == ".png" and groups == {"data"}:
            assert same or paths[0].name in outcome.warnings, "a cut picture was left out in silence"
    if "base" in groups:
        check_cache_is_sound(world, before)


def check_cache_is_sound(world, before):
    """A run of the right base, with the cache that the damaged one left behind."""
    if all(name in before for name in snapshot(world.live) if name.startswith("cache/")):
        return
    for folder in ("base", "data"):
        shutil.rmtree(world.live / folder)
        shutil.copytree(world.kept / folder, world.live / folder)
    outcome = world.train(out="afterwards")
    assert outcome.code == 0, f"the cache is poisoned: {outcome.said[-500:]}"
    assert torch.equal(world.embedding("afterwards"), world.expected["int8"]), "the cache is poisoned"


def check_push(world, paths, hub):
    """`--push_only` of a damaged run: refused, or what is pushed is what was learned, or it is said to be another."""
    before = snapshot(world.live)
    outcome = world.push()
    check_nothing_lost(world, before, outcome)
    if outcome.code:
        check_sentence(world, outcome, paths, strict=True)
    else:
        name = "learned_embeds.safetensors"
        pushed = hub.repos["alice/toy"].files[name]
        same = pushed == (world.kept / "out" / name).read_bytes()
        assert same or name in outcome.warnings, "a damaged embedding was pushed in silence"


def test_a_push_of_the_undamaged_world(world, hub):
    assert world.push().code == 0
    assert "learned_embeds.safetensors" in hub.repos["alice/toy"].files
