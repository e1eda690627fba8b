"""Weight-only INT8 layers, NF4 and quanto, and the loading that never holds a full-precision UNet."""

import os
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

import train_zoodip_textual_inversion as zoodip
from personalization.errors import InputError
from personalization.models import base_model, memory, weight_cache
from personalization.models.compute import Compute
from train_zoodip_textual_inversion import BACKENDS, DequantizationBuffer, Int8Conv2d, Int8Linear, quantize_per_channel


LAYERS = {
    "linear": (torch.nn.Linear(24, 40), (3, 7, 24)),
    "linear without bias": (torch.nn.Linear(24, 40, bias=False), (3, 24)),
    "conv": (torch.nn.Conv2d(8, 12, 3, padding=1), (2, 8, 9, 9)),
    "strided conv": (torch.nn.Conv2d(8, 12, 3, stride=2, padding=1), (2, 8, 9, 9)),
    "grouped conv": (torch.nn.Conv2d(8, 12, 3, groups=4, dilation=2), (2, 8, 9, 9)),
}


def int8(layer, buffer=None):
    return BACKENDS["int8"].new_layer(layer, torch.float32, buffer or DequantizationBuffer())


def dequantized(layer):
    return zoodip.dequantize(layer.weight, layer.scale, torch.float32, layer.buffer)


def test_quantization_is_symmetric_absmax_per_output_channel():
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    weight[2] = 0  # an all-zero channel must not divide by zero
    quantized, scale = quantize_per_channel(weight)
    assert quantized.dtype == torch.int8 and scale.shape == (6, 1, 1, 1)
    channels = weight.numpy().reshape(6, -1)
    step = np.abs(channels).max(axis=1) / 127
    expected = np.round(channels / np.where(step > 0, step, 1)[:, None])
    np.testing.assert_array_equal(quantized.numpy().reshape(6, -1), expected)
    values = zoodip.dequantize(quantized, scale, torch.float32, DequantizationBuffer())
    assert (values - weight).abs().max() <= scale.max() / 2 * 1.001


@pytest.mark.parametrize("name", LAYERS)
def test_int8_layer_equals_the_layer_with_its_dequantized_weight(name):
    layer, shape = LAYERS[name]
    quantized = int8(layer)
    assert isinstance(quantized, Int8Linear if "linear" in name else Int8Conv2d)
    reference = type(layer).__new__(type(layer))
    reference.__dict__.update(layer.__dict__)
    reference._parameters = {**layer._parameters, "weight": quantized.weight.float() * quantized.scale}
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(quantized(x), reference(x))
        assert (quantized(x) - layer(x)).norm() < 0.02 * layer(x).norm()


@pytest.mark.parametrize("name", LAYERS)
def test_a_weight_in_slices_gives_the_same(name, monkeypatch):
    layer, shape = LAYERS[name]
    quantized, x = int8(layer), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        whole = quantized(x)
        monkeypatch.setattr(zoodip, "SLICE_BYTES", 4 * quantized.weight[:5].numel())
        sizes = [len(weight) for _, weight in quantized.slices(torch.float32)]
        assert sum(sizes) == len(layer.weight) and max(sizes) == (12 if "grouped" in name else 5)
        torch.testing.assert_close(quantized(x), whole)


def test_layers_of_a_model_share_a_buffer_but_models_do_not_and_autograd_gets_its_own():
    buffer = DequantizationBuffer()
    layers = [int8(LAYERS["linear"][0], buffer) for _ in range(2)]
    with torch.inference_mode():
        pointers = [dequantized(layer).data_ptr() for layer in (*layers, int8(LAYERS["linear"][0]))]
    assert pointers[0] == pointers[1] != pointers[2]
    with torch.no_grad():  # a buffer made in inference mode would refuse this
        layers[0](torch.zeros(1, 24))
    x = torch.zeros(1, 24, requires_grad=True)
    (layers[1](layers[0](x)[:, :24])).sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_compiled_rounds_once_as_cuda_does(dtype, monkeypatch):
    weight, scale = zoodip.quantize_per_channel(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found = zoodip.dequantize(weight, scale, dtype, zoodip.DequantizationBuffer())
    assert found.dtype == dtype and torch.equal(found, torch.mul(weight, scale).to(dtype))


def test_int8_layers_survive_a_state_dict(tmp_path):
    from safetensors.torch import load_model, save_model

    first, second = int8(torch.nn.Conv2d(8, 12, 3)), int8(torch.nn.Conv2d(8, 12, 3))
    save_model(first, tmp_path / "layer.safetensors")
    load_model(second, tmp_path / "layer.safetensors")
    x = torch.randn(1, 8, 5, 5)
    with torch.inference_mode():
        assert torch.equal(first(x), second(x))


def unet_inputs(unet):
    g = torch.Generator().manual_seed(0)
    size, channels, width = unet.config.sample_size, unet.config.in_channels, unet.config.cross_attention_dim
    sample = torch.randn(2, channels, size, size, generator=g)
    return sample, torch.tensor([500, 800]), torch.randn(2, 8, width, generator=g)


def open_base(folder):
    return base_model.open_base(base_model.ModelSource(str(folder)))


def load(folder, quantization="int8", cache_dir=None, part="unet", dtype=torch.float32):
    compute = Compute(torch.device("cpu"), dtype, torch.contiguous_format)
    return zoodip.load_frozen(open_base(folder), part, BACKENDS[quantization], compute, cache_dir)


@pytest.mark.parametrize("quantization, error", [("none", 1e-6), ("int8", 0.05), ("nf4", 0.35), ("quanto-int8", 0.05)])
def test_load_frozen_unet(demo_base, quantization, error):
    unet, share = load(demo_base, quantization)
    reference = UNet2DConditionModel.from_pretrained(demo_base, subfolder="unet").eval()
    with torch.inference_mode():
        out, expected = (model(*unet_inputs(model))[0] for model in (unet, reference))
    assert (out - expected).norm() <= error * expected.norm()
    assert not any(p.requires_grad for p in unet.parameters())

    full, stored = memory.tensor_bytes(reference), memory.tensor_bytes(unet)
    empty = base_model.empty_model(open_base(demo_base), "unet")
    predicted = memory.stored_bytes(empty, BACKENDS[quantization], torch.float32)
    assert stored == pytest.approx(predicted, rel=0.03)
    if quantization == "none":
        assert share == 0 and stored == full
        return
    layers = [m for m in reference.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    counted = sum(m.weight.numel() for m in layers) / sum(p.numel() for p in reference.parameters())
    assert share == pytest.approx(counted) and share > 0.9
    assert stored < 0.32 * full  # 8 bits of 32 and some scales; the 4-bit layers go below
    plain = [n for n, m in unet.named_modules() if type(m) in (torch.nn.Linear, torch.nn.Conv2d)]
    assert plain == []


def test_nf4_layers_compute_in_the_activations_precision(demo_base):
    """In evaluation mode bitsandbytes' CPU kernel rounds to bfloat16, which drowns the differences of losses."""
    layer = next(m for m in load(demo_base, "nf4")[0].modules() if type(m).__name__ == "Linear4bit")
    from bitsandbytes.functional import dequantize_4bit

    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.linear(x, dequantize_4bit(layer.weight.data, layer.weight.quant_state), layer.bias)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_the_cached_int8_files_hold_what_loading_without_them_gives(demo_base, tmp_path, part, monkeypatch):
    monkeypatch.setattr(weight_cache, "SHARD_BYTES", 10**6)
    plain, _ = load(demo_base, part=part)
    first, _ = load(demo_base, cache_dir=tmp_path, part=part)
    (folder,) = tmp_path.iterdir()
    written = folder.stat().st_mtime_ns
    second, _ = load(demo_base, cache_dir=tmp_path, part=part)
    assert folder.stat().st_mtime_ns == written and list(tmp_path.iterdir()) == [folder]
    expected = plain.state_dict()
    shards = sorted(folder.glob("*.safetensors"))
    assert all(path.stat().st_size < 1.3 * 10**6 for path in shards) and len(shards) > (3 if part == "unet" else 0)
    stored = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    assert stored.keys() == expected.keys()
    for state in (stored, first.state_dict(), second.state_dict()):
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    if Path("/proc/self/maps").is_file():  # the weights are the file's pages, not a copy of them
        assert folder.name in Path("/proc/self/maps").read_text()


def test_the_cache_is_keyed_by_the_weights_and_the_precision(demo_base, tmp_path):
    base, cache = tmp_path / "base", tmp_path / "cache"
    shutil.copytree(demo_base, base)
    for dtype in (torch.float32, torch.bfloat16):
        load(base, cache_dir=cache, dtype=dtype)
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_in.bias"] += 1
    save_file(tensors, weights)
    changed, _ = load(base, cache_dir=cache)
    assert torch.equal(changed.conv_in.bias, tensors["conv_in.bias"])
    assert len(list(cache.glob("unet-int8-*"))) == 3


def test_files_of_the_hubs_cache_are_not_read_to_know_their_hash(tmp_path):
    blob = tmp_path / ("0" * 63 + "1")
    blob.write_text("one")
    (tmp_path / "model.safetensors").symlink_to(blob)
    key = weight_cache.source_key([tmp_path / "model.safetensors"])
    blob.write_text("another, which a blob of the Hub never becomes")
    assert weight_cache.source_key([tmp_path / "model.safetensors"]) == key
    local = tmp_path / "local.safetensors"
    local.write_text("one")
    key = weight_cache.source_key([local])
    local.write_text("two")
    os.utime(local, ns=(1, 1))
    assert weight_cache.source_key([local]) != key
    assert weight_cache.source_key([local], "a config") != weight_cache.source_key([local], "another")


@pytest.mark.parametrize("cached", [True, False])
def test_int8_loading_never_holds_the_whole_float_unet(demo_base, monkeypatch, tmp_path, cached):
    """Counts the bytes of stored tensors alive while loading: one or two at a time, not a model."""
    alive, peak, total, largest, original = [0], [0], [0], [0], base_model.stored_tensors

    def forget(size):
        alive[0] -= size

    def watched(files, *rest):
        for name, tensor in original(files, *rest):
            size = tensor.numel() * tensor.element_size()
            alive[0] += size
            weakref.finalize(tensor, forget, size)
            peak[0], total[0], largest[0] = max(peak[0], alive[0]), total[0] + size, max(largest[0], size)
            yield name, tensor
            del tensor

    monkeypatch.setattr(base_model, "stored_tensors", watched)
    load(demo_base, cache_dir=tmp_path if cached else None)
    # The small float tensors (norms, biases) stay; of the others one is read while the last one is let go.
    assert peak[0] <= 2.2 * largest[0] + 0.1 * total[0] < 0.5 * total[0]


def test_missing_weights_are_one_sentence(demo_base, tmp_path):
    shutil.copytree(demo_base, tmp_path / "base")
    weights = next((tmp_path / "base" / "unet").glob("*.safetensors"))
    tensors = load_file(weights)
    del tensors["conv_in.bias"]
    save_file(tensors, weights)
    for cache in (None, tmp_path / "cache"):
        with pytest.raises(InputError, match="conv_in.bias"):
            load(tmp_path / "base", cache_dir=cache)
    assert not (tmp_path / "cache").exists()
    weights.unlink()
    with pytest.raises(InputError, match="safetensors in unet/"):
        load(tmp_path / "base")


def test_prompt_rows_look_up_what_the_whole_table_holds():
    table = torch.randn(50, 4)
    rows = zoodip.PromptRows(table, torch.tensor([[3, 7, 40], [7, 48, 49]]), 48, 6, "cpu", torch.float32)
    assert rows.weight.shape == (3 + 6, 4)
    candidates = torch.randn(3, 2, 4)
    rows.write(candidates)
    assert torch.equal(rows(torch.tensor([[40, 3, 7]])), table[[40, 3, 7]][None])
    assert torch.equal(rows(torch.arange(48, 54)), candidates.flatten(0, 1))
    with pytest.raises(IndexError):
        rows(torch.tensor([5]))  # not announced
    rows.check(torch.tensor([[3, 48], [53, 40]]))
    for unknown in (5, 54):
        with pytest.raises(IndexError, match="not announced"):
            rows.check(torch.tensor([[3, unknown]]))


def test_channels_last_weights_stay_so_and_change_nothing():
    layer = int8(torch.nn.Conv2d(8, 12, 3, padding=1))
    x = torch.randn(2, 8, 9, 9, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = layer(x)
        torch.nn.Sequential(layer).to(memory_format=torch.channels_last)
        assert dequantized(layer).is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(layer(x), expected)


def test_quanto_that_is_not_installed_is_one_sentence(basics, monkeypatch):
    monkeypatch.setattr(zoodip.provenance, "installed_versions", lambda packages: {})
    words = [word for pair in (basics | {"--quantization": "quanto-int8"}).items() for word in pair]
    with pytest.raises(InputError, match="--quantization quanto-int8 is not installed: pip install"):
        zoodip.resolve_settings(zoodip.parse_args(words), torch.device("cpu"))
