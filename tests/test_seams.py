"""What a newcomer adds is one thing in one place: a toy estimator, backend and optimizer, each from outside.

The toy family is in `test_families.py`, the toy flag in `test_flags.py`.
"""

import json
from dataclasses import dataclass

import torch
from safetensors.torch import load_file

import train_zoodip_textual_inversion as zoodip
from personalization.flags import RUN, Range
from personalization.methods.rule import Optimizer


QUICK = {"num_validation_samples": 0, "logging_steps": 1}


def learned(out):
    return load_file(out / "learned_embeds.safetensors")["<my-toy>"]


def signs(shape, **where):
    """Directions of ±1, drawn where and as `torch.randn` would."""
    return torch.randn(shape, **where).sign()


def test_an_estimator_with_directions_of_its_own_is_one_entry(train, monkeypatch, tmp_path):
    plain = learned(train(output_dir=tmp_path / "rge", **QUICK))
    toy = zoodip.ESTIMATORS["rge"]._replace(directions=signs)
    monkeypatch.setitem(zoodip.ESTIMATORS, "signs", toy)
    found = learned(train(output_dir=tmp_path / "signs", gradient_estimator="signs", **QUICK))
    assert found.isfinite().all() and not torch.equal(found, plain)


class Coarse(zoodip.Int8):
    """INT8 in which only every eighth value is used."""

    name = "coarse"

    def tensors(self, model, stored, dtype):
        for name, value in super().tensors(model, stored, dtype):
            yield name, (value // 8) * 8 if value.dtype == torch.int8 else value


def test_a_backend_is_one_class_and_one_entry_and_is_cached_beside_the_others(train, monkeypatch, tmp_path):
    monkeypatch.setitem(zoodip.BACKENDS, "coarse", Coarse())
    cache, found = tmp_path / "cache", {}
    for name in ("int8", "coarse", "int8", "coarse"):
        out = train(output_dir=tmp_path / "out", quantization=name, quantized_cache_dir=cache, **QUICK)
        assert found.setdefault(name, learned(out)).equal(learned(out))
    assert not torch.equal(found["int8"], found["coarse"])
    kinds = sorted(path.name.rsplit("-", 1)[0] for path in cache.iterdir() if path.is_dir())
    assert kinds == [f"{part}-{name}-float32" for part in ("text_encoder", "unet") for name in ("coarse", "int8")]


@dataclass
class RandomWalk:
    """Steps of random directions that it keeps where they lowered the loss."""

    length: float
    tried: int = 0

    def evidence(self, model, theta, batch, generator):
        step = self.length * torch.randn(theta.shape, generator=generator)
        here, there = model.losses(torch.stack([theta, theta + step]), batch)
        return (step * (there < here),), here

    def update(self, theta, step):
        theta += step
        self.tried += 1

    def figures(self):
        return {"tried": self.tried}

    def state_dict(self):
        return {"tried": self.tried}

    def load_state_dict(self, state, device):
        self.tried = state["tried"]


class RandomWalkOptimizer(Optimizer):
    method, tag, step_flag = "a random walk", "random-walk", "walk_length"
    recipe_name, recipe = "walk", {}

    def add_flags(self, add):
        add("--walk_length", type=float, default=0.1, limits=Range(0.0, 1.0), decides=RUN, help="Length of a step.")

    def num_candidates(self, args):
        return 2

    def num_steps(self, args, family):
        return 3

    def start(self, args, theta, found, num_processes):
        return RandomWalk(args.walk_length)


def test_an_optimizer_is_one_file_and_one_entry(train, monkeypatch, tmp_path):
    monkeypatch.setitem(zoodip.OPTIMIZERS, "random_walk", RandomWalkOptimizer())
    flags = {"optimizer": "random_walk", "max_train_steps": 4, "checkpointing_steps": 2, **QUICK}
    whole = train(output_dir=tmp_path / "whole", **flags)
    config = json.loads((whole / "zoodip_config.json").read_text())
    assert config["method"] == "a random walk" and config["figures"]["tried"] == 4
    assert config["figures"]["forward_passes"] == 8 and config["settings"]["walk_length"] == 0.1
    train(output_dir=tmp_path / "part", **flags | {"max_train_steps": 2})
    resumed = train(output_dir=tmp_path / "part", **flags, resume_from_checkpoint="latest")
    assert torch.equal(learned(whole), learned(resumed))
