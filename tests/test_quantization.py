"""Weight-only INT8 layers, NF4 and quanto, and the loading that never holds a full-precision UNet."""

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

import train_zoodip_textual_inversion as zoodip
from train_zoodip_textual_inversion import Int8Conv2d, Int8Linear, dequantize, quantize_per_channel


LAYERS = {
    "linear": (torch.nn.Linear(24, 40), (3, 7, 24)),
    "linear without bias": (torch.nn.Linear(24, 40, bias=False), (3, 24)),
    "conv": (torch.nn.Conv2d(8, 12, 3, padding=1), (2, 8, 9, 9)),
    "strided conv": (torch.nn.Conv2d(8, 12, 3, stride=2, padding=1), (2, 8, 9, 9)),
    "grouped conv": (torch.nn.Conv2d(8, 12, 3, groups=4, dilation=2), (2, 8, 9, 9)),
}


def test_quantization_is_symmetric_absmax_per_output_channel():
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    weight[2] = 0  # an all-zero channel must not divide by zero
    quantized, scale = quantize_per_channel(weight)
    assert quantized.dtype == torch.int8 and scale.shape == (6, 1, 1, 1)
    channels = weight.numpy().reshape(6, -1)
    step = np.abs(channels).max(axis=1) / 127
    expected = np.round(channels / np.where(step > 0, step, 1)[:, None])
    np.testing.assert_array_equal(quantized.numpy().reshape(6, -1), expected)
    assert (dequantize(quantized, scale) - weight).abs().max() <= scale.max() / 2 * 1.001


@pytest.mark.parametrize("name", LAYERS)
def test_int8_layer_equals_the_layer_with_its_dequantized_weight(name):
    layer, shape = LAYERS[name]
    quantized = zoodip.quantize_layer(layer, "int8", torch.float32)
    assert isinstance(quantized, Int8Linear if "linear" in name else Int8Conv2d)
    reference = type(layer).__new__(type(layer))
    reference.__dict__.update(layer.__dict__)
    reference._parameters = {**layer._parameters, "weight": quantized.weight.float() * quantized.scale}
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(quantized(x), reference(x))
        assert (quantized(x) - layer(x)).norm() < 0.02 * layer(x).norm()


def test_the_scratch_buffer_is_shared_but_autograd_gets_its_own():
    layers = [zoodip.quantize_layer(LAYERS["linear"][0], "int8", torch.float32) for _ in range(2)]
    with torch.inference_mode():
        pointers = {dequantize(layer.weight, layer.scale).data_ptr() for layer in layers}
    assert len(pointers) == 1
    with torch.no_grad():  # a buffer made in inference mode would refuse this
        layers[0](torch.zeros(1, 24))
    x = torch.zeros(1, 24, requires_grad=True)
    (layers[1](layers[0](x)[:, :24])).sum().backward()
    assert x.grad.abs().sum() > 0


def test_int8_layers_survive_a_state_dict(tmp_path):
    from safetensors.torch import load_model, save_model

    first = zoodip.quantize_layer(torch.nn.Conv2d(8, 12, 3), "int8", torch.float32)
    second = zoodip.quantize_layer(torch.nn.Conv2d(8, 12, 3), "int8", torch.float32)
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


# bitsandbytes computes its 4-bit products in bfloat16 on CPUs, so NF4 is the coarsest.
@pytest.mark.parametrize("quantization, error", [("none", 1e-6), ("int8", 0.05), ("nf4", 0.35), ("quanto-int8", 0.05)])
def test_load_unet(demo_base, quantization, error):
    args = zoodip.parse_args(
        ["--pretrained_model_name_or_path", demo_base, "--train_data_dir", ".", "--placeholder_token", "<t>"]
        + ["--initializer_token", "star", "--quantization", quantization]
    )
    unet, share = zoodip.load_unet(args, torch.device("cpu"), torch.float32)
    reference = UNet2DConditionModel.from_pretrained(demo_base, subfolder="unet").eval()
    with torch.inference_mode():
        out, expected = (model(*unet_inputs(model))[0] for model in (unet, reference))
    assert (out - expected).norm() <= error * expected.norm()
    assert not any(p.requires_grad for p in unet.parameters())

    full, stored = zoodip.module_bytes(reference), zoodip.module_bytes(unet)
    if quantization == "none":
        assert share == 0 and stored == full
        return
    layers = [m for m in reference.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    counted = sum(m.weight.numel() for m in layers) / sum(p.numel() for p in reference.parameters())
    assert share == pytest.approx(counted) and share > 0.9
    assert stored < 0.32 * full  # 8 bits of 32 and some scales; the 4-bit layers go below
    plain = [n for n, m in unet.named_modules() if type(m) in (torch.nn.Linear, torch.nn.Conv2d)]
    assert plain == []


def test_int8_loading_never_holds_the_whole_float_unet(demo_base, monkeypatch):
    """Counts the float weights alive while loading: one layer at a time, not a model."""
    alive, peak = [0], [0]
    original = zoodip.quantize_layer

    def watched(layer, quantization, dtype):
        alive[0] = layer.weight.numel()
        quantized = original(layer, quantization, dtype)
        assert quantized.weight.dtype == torch.int8
        peak[0] = max(peak[0], alive[0])
        return quantized

    monkeypatch.setattr(zoodip, "quantize_layer", watched)
    args = zoodip.parse_args(
        ["--pretrained_model_name_or_path", demo_base, "--train_data_dir", ".", "--placeholder_token", "<t>"]
        + ["--initializer_token", "star"]
    )
    unet, _ = zoodip.load_unet(args, torch.device("cpu"), torch.float32)
    floats = sum(p.numel() for p in unet.parameters())
    total = floats + sum(b.numel() for b in unet.buffers() if b.dtype == torch.int8)
    assert floats < 0.1 * total and peak[0] < 0.2 * total


def test_missing_weights_are_one_sentence(demo_base, tmp_path):
    import shutil

    shutil.copytree(demo_base, tmp_path / "base")
    next((tmp_path / "base" / "unet").glob("*.safetensors")).unlink()
    args = zoodip.parse_args(
        ["--pretrained_model_name_or_path", str(tmp_path / "base"), "--train_data_dir", ".", "--placeholder_token"]
        + ["<t>", "--initializer_token", "star"]
    )
    with pytest.raises(zoodip.InputError, match="safetensors in unet/"):
        zoodip.load_unet(args, torch.device("cpu"), torch.float32)
