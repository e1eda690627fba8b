"""TuneQDM's quantizer, layers and sets of scales: against autograd, against the base, and against each other."""

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_base import build_tiny_base

import train_tuneqdm_dreambooth as script
import tuneqdm_pipeline as tuneqdm
from personalization.data import examples
from personalization.models.compute import Compute
from personalization.models.families import SD1


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "base"
    build_tiny_base(folder)
    return str(folder)


@pytest.fixture
def unet(tiny):
    return UNet2DConditionModel.from_pretrained(tiny, subfolder="unet").requires_grad_(False)


def inputs(timesteps):
    """What a UNet of the tiny base is given for a batch, the same for the same example."""
    g = torch.Generator().manual_seed(0)
    sample, text = torch.randn(8, 4, 8, 8, generator=g), torch.randn(8, 32, 16, generator=g)
    return {
        "sample": sample[: len(timesteps)],
        "timestep": torch.tensor(timesteps),
        "encoder_hidden_states": text[: len(timesteps)],
    }


def tuned(unet, table, num_sets=1, input_scales=True, spread=0.1, bits=8):
    """A quantized UNet with random changes of its scales, and those."""
    selection = tuneqdm.quantize_unet(unet, bits, "minmax")
    changes = script.new_changes(unet, num_sets, input_scales)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for change in changes.values():
            change += spread * torch.randn(change.shape, generator=g)
    tuneqdm.attach(unet, changes)
    selection.use(table)
    return changes


# ---------------------------------------------------------------------------------------------------- the quantizer


@settings(deadline=None)
@given(st.lists(st.integers(0, 15), min_size=1, max_size=20))
def test_four_bits_survive_packing(numbers):
    integers = torch.tensor(numbers, dtype=torch.uint8)
    packed = tuneqdm.pack(integers)
    assert packed.dtype == torch.uint8 and len(packed) == (len(numbers) + 1) // 2
    assert tuneqdm.unpack(packed, torch.empty(len(numbers))).tolist() == numbers
    for first in range(len(numbers)):
        for count in range(len(numbers) - first + 1):
            assert tuneqdm.unpack(packed, torch.empty(count), first).tolist() == numbers[first : first + count]


@settings(deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 6),
    st.sampled_from([4, 8]),
    st.sampled_from(["minmax", "mse"]),
    st.floats(1e-6, 1e4),
    st.floats(-3, 3),
)
def test_quantization_errors_are_within_a_step(rows, columns, bits, calibration, size, offset):
    weight = size * (torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) + offset)
    integers, scale, zero = tuneqdm.quantize(weight, bits, calibration)
    assert integers.dtype == torch.uint8 and int(integers.max()) < 2**bits and scale.shape == zero.shape == (rows, 1)
    if calibration == "minmax":  # half a step by rounding, and half by the rounded zero point
        assert ((integers - zero) * scale - weight).abs().le(scale * 1.01 + 1e-5 * weight.abs()).all()


def test_a_constant_channel_is_exact_and_outliers_are_cut_off():
    weight = torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.5, 0.5], [-2.0, -2.0, -2.0]])
    integers, scale, zero = tuneqdm.quantize(weight, 4)
    assert torch.equal((integers - zero) * scale, weight)
    spiky = torch.randn(8, 1000, generator=torch.Generator().manual_seed(0))
    spiky[:, 0] = 7

    def error(calibration):
        integers, scale, zero = tuneqdm.quantize(spiky, 4, calibration)
        return ((integers - zero) * scale - spiky).square().sum(dim=1)

    assert (error("mse") < 0.8 * error("minmax")).all()


def test_zero_points_are_integers_of_the_range():
    """Half precision holds those, and not what a channel far from 0 would have."""
    for offset in (-1.0, 1.0):
        weight = offset + 1e-3 * torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
        for calibration in ("minmax", "mse"):
            integers, scale, zero = tuneqdm.quantize(weight, 8, calibration)
            assert (zero >= 0).all() and (zero <= 255).all()
            assert ((integers - zero) * scale - weight).abs().le(scale).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_refused(value):
    weight = torch.ones(2, 3)
    weight[1, 1] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        tuneqdm.encode(weight, 8, "minmax")


# ------------------------------------------------------------------------------------------- layers against autograd

LAYERS = {
    "linear": (torch.nn.Linear(6, 10), (3, 5, 6)),
    "linear without bias": (torch.nn.Linear(7, 3, bias=False), (3, 7)),
    "conv": (torch.nn.Conv2d(4, 6, 3, padding=1), (3, 4, 7, 7)),
    "conv with stride": (torch.nn.Conv2d(4, 6, 3, stride=2, padding=1), (3, 4, 8, 8)),
    "conv in groups": (torch.nn.Conv2d(4, 6, 3, groups=2, dilation=2), (3, 4, 9, 9)),
    "1x1 conv": (torch.nn.Conv2d(5, 3, 1), (3, 5, 4, 4)),
}


def dequantized(layer, out_change, in_change):
    """The weight (W_int − z) s_out s_in of one example, as autograd sees it."""
    weight = layer.dequantize(torch.float32).clone()
    rest = [1] * (weight.dim() - 2)
    weight = weight * (1 + out_change).view(-1, 1, *rest)
    groups = layer.options[3] if hasattr(layer, "options") else 1
    factor = (1 + in_change).view(groups, 1, -1, *rest)
    return (weight.view(groups, -1, *weight.shape[1:]) * factor).view_as(weight)


@pytest.mark.parametrize("slice_bytes", [2**24, 1, 150])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_equals_autograd_on_the_dequantized_layer(name, bits, slice_bytes, monkeypatch):
    """Whole, one output channel at a time, and some."""
    monkeypatch.setattr(tuneqdm, "SLICE_BYTES", slice_bytes)
    monkeypatch.setattr(tuneqdm, "PART", 10 * slice_bytes)
    plain, shape = LAYERS[name]
    holder = torch.nn.Module()
    holder.layer = copy.deepcopy(plain).requires_grad_(False)
    selection = tuneqdm.quantize_unet(holder, bits, "minmax")
    layer, g = holder.layer, torch.Generator().manual_seed(0)
    assert ((layer.dequantize(torch.float32) - plain.weight).abs() <= 0.51 * layer.scale).all()
    shapes = tuneqdm.change_shapes(holder, 2, True)
    changes = [(0.3 * torch.randn(s, generator=g)).requires_grad_() for s in shapes.values()]
    layer.out_change, layer.in_change = changes
    selection.rows = torch.tensor([1, 0, 1])
    x = torch.randn(shape, generator=g, requires_grad=True)
    output = layer(x)
    weights = [dequantized(layer, changes[0][row], changes[1][row]) for row in (1, 0, 1)]
    function = (lambda a, w: F.conv2d(a, w, layer.bias, *layer.options)) if "conv" in name else None
    function = function or (lambda a, w: F.linear(a, w, layer.bias))
    expected = torch.cat([function(x[i : i + 1], weight) for i, weight in enumerate(weights)])
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)

    direction = torch.randn(output.shape, generator=g)
    found = torch.autograd.grad((output * direction).sum(), [x, *changes])
    wanted = torch.autograd.grad((expected * direction).sum(), [x, *changes])
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_autograd_keeps_activations_and_no_weight(unet):
    tuned(unet, tuneqdm.set_of_timestep(1000))
    layers = tuneqdm.quantized_layers(unet).values()
    kept, seen = [], set()

    def keep(tensor):
        if tensor.is_floating_point() and tensor.untyped_storage()._cdata not in seen:
            seen.add(tensor.untyped_storage()._cdata)
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        unet(**inputs([500]))
    buffers = {memory.untyped_storage()._cdata for layer in layers for memory in layer.selection.memory.values()}
    assert not seen & buffers
    sizes = {layer.shape for layer in layers}
    assert kept and not [tensor for tensor in kept if tensor.shape in sizes]


class Official(torch.nn.Module):
    """A layer as the official code computes it: its weight is dequantized under autograd."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.out_change = layer, torch.zeros(len(layer.scale), requires_grad=True)

    def forward(self, x):
        layer = self.layer
        weight = (layer.integers.float() - layer.zero) * (layer.scale * (1 + self.out_change).view_as(layer.scale))
        if layer.channel == -1:
            return F.linear(x, weight, layer.bias)
        return F.conv2d(x, weight, layer.bias, *layer.options)


def test_kept_floats_beside_the_official_way(unet):
    """Of the tiny UNet's weights, the official way keeps two float copies; ours none."""

    def kept_by(model):
        total, seen = 0, set()

        def keep(tensor):
            nonlocal total
            if tensor.is_floating_point() and tensor.untyped_storage()._cdata not in seen:
                seen.add(tensor.untyped_storage()._cdata)
                total += tensor.numel()
                alive.append(tensor)
            return tensor

        alive = []
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(**inputs([500]))
        return total

    official = copy.deepcopy(unet)
    tuneqdm.quantize_unet(official, 8, "minmax")
    for name, layer in tuneqdm.quantized_layers(official).items():
        official.set_submodule(name, Official(layer))
    tuned(unet, tuneqdm.set_of_timestep(1000), input_scales=False)
    weights = sum(layer.shape.numel() for layer in tuneqdm.quantized_layers(unet).values())
    assert kept_by(official) - kept_by(unet) > 1.8 * weights


# ---------------------------------------------------------------------------------------------------- sets of scales


def test_sets_and_intervals_of_timesteps():
    assert tuneqdm.set_of_timestep(1000, 4)[[0, 249, 250, 500, 999]].tolist() == [0, 0, 1, 2, 3]
    assert tuneqdm.set_of_timestep(10, 3).tolist() == [t * 3 // 10 for t in range(10)]
    table = tuneqdm.set_of_timestep(1000, intervals=[(0, 100), (500, 900)])
    assert table[[0, 99, 100, 499, 500, 899, 900]].tolist() == [0, 0, -1, -1, 0, 0, -1]


def test_a_batch_equals_its_examples_one_by_one(unet):
    """`--scale_sets 1` at batch 4: predictions, and the sum of gradients."""
    changes = tuned(unet, tuneqdm.set_of_timestep(1000))
    timesteps = [10, 400, 600, 999]
    together = unet(**inputs(timesteps), return_dict=False)[0]
    alone = []
    for i in range(4):
        one = {name: tensor[i : i + 1] for name, tensor in inputs(timesteps).items()}
        alone.append(unet(**one, return_dict=False)[0])
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    found = torch.autograd.grad(together.square().sum(), changes.values())
    parts = [torch.autograd.grad(one.square().sum(), changes.values()) for one in alone]
    for gradient, *of_examples in zip(found, *parts):
        torch.testing.assert_close(gradient, sum(of_examples), rtol=1e-4, atol=1e-4)


def test_s1_leaves_other_timesteps_as_the_base_has_them(unet):
    base = copy.deepcopy(unet)
    tuneqdm.quantize_unet(base, 8, "minmax")
    tuned(unet, tuneqdm.set_of_timestep(1000, intervals=[(500, 900)]))
    with torch.no_grad():
        for timesteps, same in (([0, 499, 900, 999], [True] * 4), ([100, 500, 899, 950], [True, False, False, True])):
            expected, found = base(**inputs(timesteps)).sample, unet(**inputs(timesteps)).sample
            assert [torch.equal(a, b) for a, b in zip(expected, found)] == same


def test_s2_with_equal_sets_is_peqa(unet):
    other = copy.deepcopy(unet)
    one_set = tuned(unet, tuneqdm.set_of_timestep(1000, 1))
    four_sets = tuned(other, tuneqdm.set_of_timestep(1000, 4), num_sets=4)
    with torch.no_grad():
        for name, change in four_sets.items():
            change.copy_(one_set[name].expand_as(change))
        timesteps = [5, 300, 600, 900]
        assert torch.equal(unet(**inputs(timesteps)).sample, other(**inputs(timesteps)).sample)


def test_a_set_has_the_gradient_of_its_own_examples(unet):
    changes = tuned(unet, tuneqdm.set_of_timestep(1000, 4), num_sets=4)
    timesteps = [100, 300, 310, 900]  # sets 0, 1, 1 and 3
    mixed = torch.autograd.grad(unet(**inputs(timesteps)).sample.square().sum(), changes.values())
    for number, chosen in {0: [0], 1: [1, 2], 2: [], 3: [3]}.items():
        if not chosen:
            assert not any(gradient[number].any() for gradient in mixed)
            continue
        own = {name: tensor[chosen] for name, tensor in inputs(timesteps).items()}
        alone = torch.autograd.grad(unet(**own).sample.square().sum(), changes.values())
        for gradient, expected in zip(mixed, alone):
            torch.testing.assert_close(gradient[number], expected[number], rtol=1e-4, atol=1e-4)
            assert not expected[[i for i in range(4) if i != number]].any()


def test_a_timestep_may_be_a_number_and_scales_can_be_off(unet):
    base = copy.deepcopy(unet)
    tuneqdm.quantize_unet(base, 8, "minmax")
    tuned(unet, tuneqdm.set_of_timestep(1000, 2), num_sets=2)
    selection = next(iter(tuneqdm.quantized_layers(unet).values())).selection
    with torch.no_grad():
        batch = inputs([700, 700])
        expected = unet(**batch).sample
        for timestep in (700, 700.0, torch.tensor(700)):
            assert torch.equal(unet(batch["sample"], timestep, batch["encoder_hidden_states"]).sample, expected)
        selection.enabled = False
        assert torch.equal(unet(**batch).sample, base(**batch).sample)


def test_every_scale_acts_on_the_prediction(unet):
    """Those of inputs and of outputs, of every layer, one by one; and all the same for the gradient."""
    changes = tuned(unet, tuneqdm.set_of_timestep(1000), spread=0.0)
    batch = inputs([700])
    with torch.no_grad():
        before = unet(**batch).sample
        for name, change in changes.items():
            change.fill_(0.1)
            assert (unet(**batch).sample - before).abs().max() > 1e-5, name
            change.zero_()
        assert torch.equal(unet(**batch).sample, before)
    gradients = torch.autograd.grad(unet(**batch).sample.square().sum(), changes.values())
    assert all(gradient.abs().max() > 0 for gradient in gradients)


# ---------------------------------------------------------------------------------------------------- precision, steps


def test_a_small_change_counts_in_half_precision(unet):
    """1 + 1e-3 is 1 in bfloat16; the change must not be lost."""
    layer = torch.nn.Module()
    layer.linear = torch.nn.Linear(64, 64, bias=False).requires_grad_(False)
    selection = tuneqdm.quantize_unet(layer, 8, "minmax")
    changes = {"linear.out": torch.full((1, 64), 3e-3)}
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = layer.linear(x).float()
    tuneqdm.attach(layer, changes)
    selection.rows = torch.tensor([0])
    after = layer.linear(x).float()
    growth = (after * before).sum() / before.square().sum()
    assert growth == pytest.approx(1.003, abs=5e-4)


def test_scales_stay_float32_when_a_model_changes_its_dtype(unet):
    tuned(unet, tuneqdm.set_of_timestep(1000))
    before = tuneqdm.fingerprint(unet)
    unet.half()
    assert tuneqdm.fingerprint(unet) == before and unet.dtype == torch.float16
    layer = next(iter(tuneqdm.quantized_layers(unet).values()))
    assert layer.out_change.dtype == layer.scale.dtype == torch.float32


def test_gradient_checkpointing_changes_no_gradient(unet):
    changes = tuned(unet, tuneqdm.set_of_timestep(1000, 2), num_sets=2)
    found = []
    for _ in range(2):
        prediction = unet(**inputs([100, 900, 300])).sample
        found.append(torch.autograd.grad(prediction.square().sum(), changes.values()))
        unet.enable_gradient_checkpointing()
    for one, other in zip(*found):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call")  # in diffusers
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_model_predicts_the_same(unet, bits, dtype):
    """As far as the graph of operations goes; what a compiler then makes of it differs by rounding."""
    tuned(unet, tuneqdm.set_of_timestep(1000, 2), num_sets=2, bits=bits)
    unet.to(dtype)
    batch = inputs([100, 900])
    given = [batch["sample"].to(dtype), batch["timestep"], batch["encoder_hidden_states"].to(dtype)]
    with torch.no_grad():
        expected = unet(*given).sample
        found = torch.compile(unet, backend="aot_eager")(*given).sample
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def learner_of(unet, table, dtype=torch.float32, **flags):
    """`Learner`, `Model`, `Subject` and `Sampling` of the script on random latents."""
    words = ["--pretrained_model_name_or_path", "x", "--instance_data_dir", "x", "--max_train_steps", "10"]
    for name, value in flags.items():
        words += [f"--{name}", str(value)]
    args = script.parse_args(words)
    selection = tuneqdm.quantize_unet(unet, 8, "minmax")
    unet.to(dtype)
    changes = script.new_changes(unet, 1, False)
    tuneqdm.attach(unet, changes)
    selection.use(table)
    compute = Compute(torch.device("cpu"), dtype, torch.contiguous_format)
    g = torch.Generator().manual_seed(0)
    moments = torch.cat([torch.randn(1, 3, 4, 8, 8, generator=g), torch.full((1, 3, 4, 8, 8), -5.0)], dim=2)
    concept = examples.Concept(moments, 0.0, SD1, {"scaling_factor": 0.18}, torch.arange(2), [[0], [1], [0]])
    text = torch.randn(2, 32, 16, generator=g).to(dtype)
    model = script.Model(SD1, unet, selection, DDPMScheduler(), text, compute)
    learner = script.start_learner(args, changes, compute)
    if dtype == torch.float16:  # as on CUDA; a CPU would not be offered it
        learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    return learner, model, script.Subject(concept, None), script.choose_sampling(args, table)


def test_a_step_lowers_the_loss_of_its_examples(unet):
    flags = {"train_batch_size": 8, "learning_rate": 0.05}
    learner, model, subject, sampling = learner_of(unet, tuneqdm.set_of_timestep(1000), **flags)
    batch = script.draw_batch(subject, sampling, model.scheduler, torch.Generator().manual_seed(5))
    with torch.no_grad():
        before = model.errors(batch).mean()
    for _ in range(30):
        script.train_step(learner, model, subject, sampling)
    with torch.no_grad():
        assert model.errors(batch).mean() < 0.98 * before


def test_half_precision_takes_nearly_the_same_step(tiny):
    moved = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        unet = UNet2DConditionModel.from_pretrained(tiny, subfolder="unet").requires_grad_(False)
        learner, *rest = learner_of(unet, tuneqdm.set_of_timestep(1000), dtype, train_batch_size=2)
        script.train_step(learner, *rest)
        moved.append(torch.cat([change.detach().flatten() for change in learner.changes.values()]))
    for half in moved[1:]:
        assert half.isfinite().all() and F.cosine_similarity(half, moved[0], dim=0) > 0.9


def test_only_timesteps_inside_the_intervals_are_drawn(unet):
    table = tuneqdm.set_of_timestep(1000, intervals=[(10, 12), (500, 502)])
    _, model, subject, sampling = learner_of(unet, table, train_batch_size=64)
    batch = script.draw_batch(subject, sampling, model.scheduler, torch.Generator().manual_seed(0))
    assert set(batch.timesteps.tolist()) == {10, 11, 500, 501}


def test_accumulated_batches_are_averaged_and_long_gradients_shortened(unet, monkeypatch):
    table = tuneqdm.set_of_timestep(1000)
    flags = {"gradient_accumulation_steps": 3, "train_batch_size": 1, "max_grad_norm": 1e-3}
    learner, model, subject, sampling = learner_of(unet, table, **flags)
    g = torch.Generator().manual_seed(int(learner.data.initial_seed()))
    batches = [script.draw_batch(subject, sampling, model.scheduler, g) for _ in range(3)]
    loss = torch.stack([model.errors(batch).mean() for batch in batches]).mean()
    wanted = torch.autograd.grad(loss, learner.changes.values())
    norm = torch.cat([gradient.flatten() for gradient in wanted]).norm()
    seen = []

    def spy(optimizer):
        seen.extend(change.grad.clone() for change in learner.changes.values())

    monkeypatch.setattr(type(learner.optimizer), "step", spy)
    assert script.train_step(learner, model, subject, sampling).item() == pytest.approx(loss.item(), rel=1e-5)
    assert norm > 1e-3
    for found, gradient in zip(seen, wanted):
        torch.testing.assert_close(found, gradient * 1e-3 / norm, rtol=1e-3, atol=1e-7)


def test_the_loss_weighs_the_prior():
    errors = torch.tensor([1.0, 3.0, 10.0, 20.0])
    assert script.dreambooth_loss(errors, 4, 0.5) == 8.5
    assert script.dreambooth_loss(errors, 2, 0.5) == 2 + 0.5 * 15
