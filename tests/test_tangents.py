"""Exact derivatives of whole predictions: every rule and whole models against PyTorch's forward mode."""

import json
import math
import statistics
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import as_arguments
from tiny_base import build_pictures, build_tiny_base, build_tiny_xl_base

import train_zoodip_textual_inversion as zoodip
from benchmarks.methods import ForwardCount
from personalization.data import prompts
from personalization.data.examples import Batch
from personalization.errors import InputError
from personalization.methods import gauss_newton, tangents
from personalization.models import frozen, openvino_unet, paired, stacked
from personalization.models.paired import Paired
from personalization.models.stacked import NoRule, Stacked


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------- the rules

B, C, H, D = 2, 8, 4, 5
WEIGHT, PICTURES, WORDS, OTHER = draw(6, D), (B, C, H, H), (B, 7, D), draw(B, 7, D, seed=1)
MASK = draw(B, 1, 7, 7, seed=2) > -1
RULES = {
    "linear": (WORDS, lambda x: F.linear(x, WEIGHT, draw(6))),
    "conv2d": (PICTURES, lambda x: F.conv2d(x, draw(4, C, 3, 3), draw(4), 2, 1)),
    "interpolate": (PICTURES, lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest")),
    "constants": (
        WORDS,
        lambda x: (1 + 2 * x - OTHER) / 3 + OTHER * x + OTHER[:, None] * x[:, None] - x / (2 + OTHER[:, None] ** 2),
    ),
    "products": (WORDS, lambda x: x * x[:, :1] + x.mean(1, keepdim=True) * x),
    "shapes": (
        WORDS,
        lambda x: x.view(B, 7, D, 1).transpose(1, 2).permute(2, 3, 0, 1).reshape(7, -1).unsqueeze(0).squeeze(0),
    ),
    "parts": (WORDS, lambda x: torch.cat([x.chunk(2, 1)[1] * 2, OTHER, x[:, :, None].flatten(1, 2)], 1)[:, 3:]),
    "gather": (WORDS, lambda x: x[torch.arange(B), torch.tensor([3, 1])]),
    "silu": (WORDS, lambda x: F.silu(3 * x)),
    "gelu": (WORDS, lambda x: F.gelu(3 * x)),
    "quick gelu": (WORDS, lambda x: x * torch.sigmoid(1.702 * x)),
    "softmax": (WORDS, lambda x: torch.softmax(x.float(), dim=-1, dtype=torch.float32).type(x.dtype)),
    "einsum": (WORDS, lambda x: torch.einsum("btc,bsc->bts", x, x) + torch.einsum("btc,bsc->bts", OTHER, x)),
    "layer norm": (WORDS, lambda x: F.layer_norm(x, (D,), draw(D), draw(D, seed=1))),
    "group norm": (PICTURES, lambda x: F.group_norm(x, 4, draw(C), draw(C, seed=1))),
    "group norm of words": ((B, C, 7), lambda x: F.group_norm(x, 4)),
    "self-attention": (PICTURES, lambda x: F.scaled_dot_product_attention(x, 2 * x, -x)),
    "cross-attention": (
        (B, 3, 7, D),
        lambda x: F.scaled_dot_product_attention(draw(B, 3, 9, D), x, 3 * x, attn_mask=MASK[:, :, :1]),
    ),
    "query alone": ((B, 3, 7, D), lambda x: F.scaled_dot_product_attention(x, *draw(2, B, 3, 7, D), attn_mask=MASK)),
    "causal": ((B, 3, 7, D), lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True, scale=0.3)),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("layout", ["plain", "channels last"])
def test_a_rule_is_the_derivative(name, layout, monkeypatch):
    monkeypatch.setattr(stacked, "QUERIES", 2)  # several chunks of them, and of derivatives
    monkeypatch.setitem(stacked.SCORES, "cpu", 30)
    shape, function = RULES[name]
    if layout == "channels last" and shape != PICTURES:
        return
    rows = draw(4, *shape)
    value, directions = rows[0], rows[1:]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = [torch.func.jvp(function, (value,), (direction,)) for direction in directions]
    if layout == "channels last":
        rows = rows.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (4, B))
    found = function(Stacked(rows))
    assert found.shape == expected[0][0].shape
    torch.testing.assert_close(found.rows[0], expected[0][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.rows[1:], torch.stack([d for _, d in expected]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "function",
    [
        torch.sin,
        lambda x: x / x,
        lambda x: 1 / x,
        lambda x: x**2,
        lambda x: x @ x.mT,
        lambda x: x > 0,
        F.dropout,
        lambda x: x[..., 0],
        lambda x: F.pad(x, (1, 1), value=1.0),
    ],
    ids=["sine", "quotient", "reciprocal", "square", "product", "comparison", "dropout", "index", "padding"],
)
def test_what_has_no_rule_is_refused(function):
    with pytest.raises(NoRule):
        function(Stacked(draw(2, 3, 4)))


OF_ONE_EXAMPLE = {
    **{name: RULES[name] for name in ("linear", "conv2d", "interpolate", "silu", "gelu", "quick gelu")},
    **{name: RULES[name] for name in ("layer norm", "group norm", "group norm of words", "self-attention")},
    "constants": (WORDS, lambda x: (1 + 2 * x - OTHER[:1]) / 3 + OTHER[:1] * x[:, :, None].squeeze(2)),
    "products": (WORDS, lambda x: x * x[:, :1] + (2 - x) * x),
    "shapes": (WORDS, lambda x: x.view(1, 7, D, 1).transpose(1, 2).permute(0, 3, 2, 1).reshape(1, -1).unsqueeze(1)),
    "parts": (WORDS, lambda x: torch.cat([x.chunk(2, 1)[1] * 2, OTHER[:1], x[:, :, None].flatten(1, 2)], 1)[:, 3:]),
    "cross-attention": ((B, 3, 7, D), lambda x: F.scaled_dot_product_attention(draw(1, 3, 9, D), x, 3 * x)),
    "query alone": ((B, 3, 7, D), lambda x: F.scaled_dot_product_attention(x, *draw(2, 1, 3, 7, D), scale=0.3)),
}


@pytest.mark.parametrize("name", OF_ONE_EXAMPLE)
def test_a_rule_for_graphs_is_the_derivative(name, monkeypatch):
    monkeypatch.setattr(paired, "SCORES", 100)  # several parts of the queries
    shape, function = OF_ONE_EXAMPLE[name]
    value, directions = draw(1, *shape[1:]), draw(3, *shape[1:], seed=1)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = [torch.func.jvp(function, (value,), (direction[None],)) for direction in directions]
    found = function(Paired(value, directions))
    torch.testing.assert_close(found.value, expected[0][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.derivatives, torch.cat([d for _, d in expected]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "function",
    [
        torch.sin,
        lambda x: x / x,
        lambda x: x @ x.mT,
        lambda x: x.transpose(0, 1),
        lambda x: x.unsqueeze(0),
        lambda x: x.chunk(2),
        lambda x: x + OTHER,
        lambda x: x[..., 0],
        lambda x: F.pad(x, (1, 1), value=1.0),
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    ],
    ids="sine quotient product transpose unsqueeze chunk batch index padding gelu causal".split(),
)
def test_what_has_no_rule_for_graphs_is_refused(function):
    with pytest.raises(NoRule):
        function(Paired(draw(1, 7, D), draw(2, 7, D)))


# -------------------------------------------------------------------------------------------------------------- models


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tangents")
    build_tiny_base(folder / "sd")
    build_tiny_xl_base(folder / "xl")
    build_tiny_base(folder / "velocity")
    scheduler = folder / "velocity" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": "v_prediction"}))
    build_pictures(folder / "pictures")
    return folder


def prepare(base, pictures, **more):
    """The script's `Task` for Gauss-Newton on a base."""
    flags = {
        "pretrained_model_name_or_path": base,
        "train_data_dir": pictures,
        "placeholder_token": "<my-toy>",
        "initializer_token": "star",
        "optimizer": "gauss_newton",
        "gn_subspace_dimension": 4,
        "train_batch_size": 2,
        "quantized_cache_dir": "none",
        **more,
    }
    args = zoodip.parse_args(as_arguments({f"--{name}": value for name, value in flags.items()}))
    base, placeholder, compute = zoodip.resolve_settings(args, torch.device("cpu"))
    pictures = zoodip.read_pictures(args, base)
    return zoodip.prepare(
        args, base, placeholder, compute, pictures, prompts.build_prompts(pictures, placeholder, base)
    )


def point_and_directions(task, count):
    theta = task.initial.expand(task.args.num_vectors, -1).clone()
    directions = torch.linalg.qr(draw(theta.numel(), count))[0].T.reshape(count, *theta.shape)
    return theta, directions.contiguous()


def deviations(found, exact):
    """Relative errors of K and of y."""
    (matrix, gradient, _), (exact_matrix, exact_gradient, _) = (
        gauss_newton.gauss_newton_evidence(error.double(), derivatives.double())
        for error, derivatives in (found, exact)
    )
    pairs = (matrix, exact_matrix), (gradient, exact_gradient)
    return [((one - other).norm() / other.norm()).item() for one, other in pairs]


@pytest.mark.parametrize(
    "base, flags",
    [
        ("sd", {"quantization": "none"}),
        ("velocity", {"num_vectors": 2}),
        ("xl", {"num_vectors": 3}),
        ("xl", {"quantization": "none", "pool_at_eos": True}),
    ],
    ids=str,
)
@torch.no_grad()
def test_derivatives_of_a_prediction_equal_those_of_autograd(place, base, flags, monkeypatch):
    task = prepare(place / base, place / "pictures", **flags)
    theta, directions = point_and_directions(task, 5)
    batch = task.draw_batch(torch.Generator().manual_seed(0))
    exact = tangents.by_autograd(task.model, theta, directions, batch)
    found = tangents.stacked(task.model, theta, directions, batch)
    torch.testing.assert_close(found[0], exact[0], rtol=1e-4, atol=1e-5)
    assert exact[1].norm() > 0 and (found[1] - exact[1]).norm() < 1e-4 * exact[1].norm()
    assert max(deviations(found, exact)) < 1e-4
    task.model.max_candidates = 3  # two directions a pass
    monkeypatch.setattr(frozen, "WIDE", 30)  # feed-forwards of some tokens at a time
    again = tangents.stacked(task.model, theta, directions, batch)
    torch.testing.assert_close(again[1], found[1], rtol=1e-3, atol=1e-5 * found[1].abs().max().item())


@pytest.mark.parametrize("quantization", ["nf4", "quanto-int8"])
@torch.no_grad()
def test_layers_of_other_libraries(place, quantization):
    """They have no forward derivative in PyTorch: finite differences in float32 tell."""
    pytest.importorskip("bitsandbytes" if quantization == "nf4" else "optimum.quanto")
    task = prepare(place / "xl", place / "pictures", quantization=quantization)
    theta, directions = point_and_directions(task, 4)
    batch = task.draw_batch(torch.Generator().manual_seed(0))
    found = tangents.stacked(task.model, theta, directions, batch)
    near = gauss_newton.differences(lambda points: task.model.errors(points, batch), theta, directions, 1e-3)
    assert (found[1] - near[1]).norm() < 2e-2 * near[1].norm() > 0


IN_OPENVINO = {"unet_backend": "openvino", "mixed_precision": "no"}


@pytest.mark.parametrize(
    "base, flags",
    [("sd", {"quantization": "none"}), ("velocity", {"num_vectors": 2}), ("xl", {"pool_at_eos": True})],
    ids=str,
)
@torch.no_grad()
def test_derivatives_in_openvino_equal_those_of_autograd(place, base, flags):
    """K and y, and the plain predictions that the same graph makes."""
    pytest.importorskip("openvino")
    task = prepare(place / base, place / "pictures", **IN_OPENVINO, **flags)
    known = prepare(place / base, place / "pictures", **flags)
    theta, directions = point_and_directions(task, 5)
    batch = task.draw_batch(torch.Generator().manual_seed(0))
    exact = tangents.by_autograd(known.model, theta, directions, batch)
    for limit in (9, 3):  # one graph serves every number of derivatives
        task.model.max_candidates = limit
        found = tangents.stacked(task.model, theta, directions, batch)
        assert max(deviations(found, exact)) < 1e-4
        torch.testing.assert_close(found[0], exact[0], rtol=1e-4, atol=1e-5)
    points = torch.cat([theta[None], theta + directions])
    expected = known.model.losses(points, batch)
    torch.testing.assert_close(task.model.losses(points, batch), expected, rtol=1e-5, atol=1e-6)


DEMO_FLAGS = {"quantization": "none", "train_batch_size": 1, "max_candidates_per_forward": 9}


class Cell(NamedTuple):
    """A batch of the demo base at one timestep, and float32 autograd's errors and derivatives there."""

    batch: Batch
    exact: tuple


@pytest.fixture(scope="module")
def demo(demo_base, subject):
    """θ and directions on the demo base, and five draws of a `Cell` at each of four timesteps."""
    task = prepare(demo_base, subject, **DEMO_FLAGS)
    table = task.model.text_encoder.get_input_embeddings().weight
    directions = gauss_newton.vocabulary_directions(table, 8, 80)[:, None, :]
    theta, cells = task.initial[None].clone(), {}
    with torch.no_grad():
        for t in (550, 700, 850, 899):
            task.sampling = zoodip.Sampling(t, t + 1, 1)
            batches = [task.draw_batch(torch.Generator().manual_seed(1000 * seed + t)) for seed in range(5)]
            cells[t] = [Cell(b, tangents.by_autograd(task.model, theta, directions, b)) for b in batches]
    return theta, directions, cells


@pytest.fixture
def demo_in(demo_base, subject, monkeypatch):
    """The demo base's `FrozenModel`, computing in a precision."""

    def load(dtype):
        computing = lambda device, *_: (zoodip.Compute(device, dtype, torch.contiguous_format), "no")  # noqa: E731
        monkeypatch.setattr(zoodip, "choose_compute", computing)
        return prepare(demo_base, subject, **DEMO_FLAGS).model

    return load


@pytest.mark.parametrize("dtype, bound, outliers", [("float32", 1e-4, 0), ("float16", 0.01, 1), ("bfloat16", 0.05, 1)])
@torch.no_grad()
def test_evidence_in_every_precision(demo, demo_in, dtype, bound, outliers):
    """K and y against float32 autograd, where differences in bfloat16 are off by half.

    The values that derivatives are taken at are rounded, too, and now and then K or y is very sensitive to them. So
    one draw in five may be beyond the bound; `test_an_outlier_is_one_for_float32_autograd` looks at one.
    """
    (theta, directions, cells), model = demo, demo_in(getattr(torch, dtype))
    for t, draws in cells.items():
        found = [deviations(tangents.stacked(model, theta, directions, b), exact) for b, exact in draws]
        assert sum(max(pair) >= bound for pair in found) <= outliers, (t, found)


@torch.no_grad()
def test_evidence_in_bfloat16_in_openvino(demo, demo_base, subject):
    """K and y are off by a few per cent in the median, where differences in bfloat16 are off by half."""
    pytest.importorskip("openvino")
    theta, directions, cells = demo
    model = prepare(demo_base, subject, **DEMO_FLAGS, unet_backend="openvino", mixed_precision="bf16").model
    draws = [draw for of_timestep in cells.values() for draw in of_timestep]
    for errors in zip(*(deviations(tangents.stacked(model, theta, directions, b), exact) for b, exact in draws)):
        assert statistics.median(errors) < 0.1, errors


@torch.no_grad()
def test_an_outlier_is_one_for_float32_autograd(demo, demo_in):
    """The cell of bfloat16's largest error of K: rounding the noisy picture alone is worth more than the bound."""
    theta, directions, cells = demo
    batch, exact = cells[850][0]
    rounded = batch._replace(noisy_latents=batch.noisy_latents.bfloat16().float())
    assert deviations(tangents.by_autograd(demo_in(torch.float32), theta, directions, rounded), exact)[0] > 0.05


@torch.no_grad()
def test_rounding_the_derivatives_alone_matters_little(demo, demo_in, monkeypatch):
    """To bfloat16 after every operation, at values in float32."""
    (theta, directions, cells), model, stack = demo, demo_in(torch.float32), Stacked.__init__

    def rounding(self, rows):
        stack(self, rows.clone())
        self.rows[1:] = rows[1:].bfloat16().float()

    monkeypatch.setattr(Stacked, "__init__", rounding)
    for batch, exact in cells[850]:
        matrix, gradient = deviations(tangents.stacked(model, theta, directions, batch), exact)
        assert matrix < 0.01 and gradient < 0.02, (matrix, gradient)


@torch.no_grad()
def test_stacked_derivatives_are_as_precise_as_autograd_in_bfloat16(demo, demo_in):
    """The median errors of K and of y, from three draws at each timestep."""
    (theta, directions, cells), model = demo, demo_in(torch.bfloat16)
    cells = [cell for draws in cells.values() for cell in draws[:3]]

    def errors(way):
        found = [deviations(way(model, theta, directions, batch), exact) for batch, exact in cells]
        return torch.tensor(found).median(0).values

    ours, autograd = errors(tangents.stacked), errors(tangents.by_autograd)
    assert (ours < 1.5 * autograd).all(), (ours, autograd)


# ---------------------------------------------------------------------------------------------------------------- runs


def test_a_pass_of_derivatives_counts_its_rows(place):
    """As the run counts them, and as the benchmarks see them."""
    task = prepare(place / "sd", place / "pictures", max_candidates_per_forward=3)
    args, count = task.args, ForwardCount(task.model.denoiser)
    learner = zoodip.start_learner(args, task.initial, torch.eye(task.base.word_width))
    zoodip.train_step(learner, task.model, task.concept, task.sampling)
    directions = args.gn_subspace_dimension + 1
    assert count.total == (directions + math.ceil(directions / 2)) * args.train_batch_size
    assert count.total == zoodip.OPTIMIZERS["gauss_newton"].num_forwards(args) * args.train_batch_size


def test_memory_is_predicted_for_derivatives(place):
    def activations(**more):
        task = prepare(place / "xl", place / "pictures", **more)
        compute = zoodip.Compute(torch.device("cpu"), torch.float32, torch.contiguous_format)
        return zoodip.estimate_memory(task.args, task.base, compute).activations

    exact, differences = activations(), activations(perturbation_scale=1e-3)
    assert 0.5 * differences < exact < 3 * differences
    assert activations(max_candidates_per_forward=2) < exact


@pytest.fixture
def learn(place, tmp_path):
    """Trains on a tiny base; returns the figures of the run and what it learned."""

    def run(base="sd", **more):
        flags = {
            "pretrained_model_name_or_path": place / base,
            "train_data_dir": place / "pictures",
            "placeholder_token": "<my-toy>",
            "initializer_token": "star",
            "optimizer": "gauss_newton",
            "gn_subspace_dimension": 4,
            "gn_subspace_steps": 2,
            "max_train_steps": 3,
            "num_validation_samples": 0,
            "checkpointing_steps": 3,
            "quantized_cache_dir": place / "cache",
            "report_to": "none",
            "output_dir": tmp_path / "out",
            **more,
        }
        zoodip.main(zoodip.parse_args(as_arguments({f"--{name}": value for name, value in flags.items()})))
        config = json.loads((tmp_path / "out" / "zoodip_config.json").read_text())
        return config, torch.load(tmp_path / "out" / "checkpoint-3" / "state.pt", weights_only=True)["theta"]

    return run


def test_streamed_weights_and_small_passes_change_nothing(learn):
    _, whole = learn()
    _, streamed = learn(low_vram=True)
    _, small = learn(max_candidates_per_forward=1)
    torch.testing.assert_close(streamed, whole, rtol=0, atol=0)
    torch.testing.assert_close(small, whole, rtol=1e-4, atol=1e-5)


def test_the_share_is_exact_in_bfloat16_and_differences_remain(learn):
    config, theta = learn(mixed_precision="bf16")
    assert 0 < config["figures"]["share"] < 1 and config["settings"]["perturbation_scale"] is None
    config, other = learn(mixed_precision="bf16", perturbation_scale=0.1)
    assert "share" not in config["figures"] and not torch.equal(theta, other)


def test_a_model_with_an_unknown_operation_learns_by_autograd(learn, monkeypatch, caplog):
    _, known = learn()
    monkeypatch.delitem(stacked.RULES, "group_norm")
    with caplog.at_level("INFO"):
        _, unknown = learn()
    assert "Derivatives by PyTorch's forward mode" in caplog.text and "group_norm" in caplog.text
    torch.testing.assert_close(unknown, known, rtol=1e-3, atol=1e-5)


def test_openvino_learns_by_derivatives_and_resumes_to_the_last_bit(learn, place, tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    config, whole = learn(**IN_OPENVINO)
    assert config["settings"]["perturbation_scale"] is None and 0 < config["figures"]["share"] < 1
    _, known = learn()
    torch.testing.assert_close(whole, known, rtol=1e-3, atol=1e-5)
    learn(**IN_OPENVINO, perturbation_scale=1e-3)  # whose graph is another one
    assert len(list((place / "cache").glob("unet-openvino-*/unet.bin"))) == 2
    monkeypatch.setattr(openvino_unet, "export_openvino", lambda *_: pytest.fail("exported again"))
    parts = {**IN_OPENVINO, "output_dir": tmp_path / "parts", "checkpointing_steps": 1}
    learn(**parts, max_train_steps=2)
    learn(**parts, resume_from_checkpoint="latest")
    resumed = torch.load(tmp_path / "parts" / "checkpoint-3" / "state.pt", weights_only=True)["theta"]
    assert torch.equal(resumed, whole)


def test_a_model_whose_derivatives_openvino_does_not_know(learn, monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.delitem(paired.RULES, "group_norm")
    with pytest.raises(InputError, match="no exact derivatives of this model .group_norm .* --perturbation_scale"):
        learn(**IN_OPENVINO, quantized_cache_dir="none")
