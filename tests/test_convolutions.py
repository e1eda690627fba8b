"""Convolutions as products of matrices: the same numbers as PyTorch's, only where they are faster, in every layer."""

import pytest
import torch
import torch.nn.functional as F

from personalization.models import convolutions, frozen
from personalization.models.stacked import Stacked
from train_zoodip_textual_inversion import BACKENDS


CASES = [  # kernel, stride, padding, dilation
    ((3, 3), (1, 1), (1, 1), (1, 1)),
    ((3, 3), (1, 1), (0, 0), (1, 1)),  # of windows, whose edge is real
    ((3, 3), (2, 2), (1, 1), (1, 1)),
    ((1, 1), (1, 1), (0, 0), (1, 1)),
    ((3, 2), (1, 2), (0, 1), (2, 1)),
]


@pytest.fixture
def products(monkeypatch):
    """All weights are large; a list of the inputs that became columns."""
    monkeypatch.setattr(convolutions, "LARGE", 1)
    unfolded, unfold = [], F.unfold
    monkeypatch.setattr(F, "unfold", lambda input, *options: unfolded.append(input) or unfold(input, *options))
    return unfolded


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kernel, stride, padding, dilation", CASES)
def test_output_and_gradient_are_pytorchs(kernel, stride, padding, dilation, with_bias, batch, products):
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(batch, 5, 7, 6, generator=generator, requires_grad=True)
    weight, bias = torch.randn(4, 5, *kernel, generator=generator), torch.randn(4) if with_bias else None
    options = stride, padding, dilation, 1
    wanted = F.conv2d(input, weight, bias, *options)
    found = convolutions.conv2d(input, weight, bias, *options)
    assert len(products) == batch and found.is_contiguous()
    torch.testing.assert_close(found, wanted)
    gradient = torch.randn(wanted.shape, generator=generator)
    (expected,) = torch.autograd.grad(wanted, input, gradient)
    torch.testing.assert_close(convolutions.input_gradient(input.shape, weight, gradient, *options), expected)
    (by_autograd,) = torch.autograd.grad(found, input, gradient)
    torch.testing.assert_close(by_autograd, expected)


def test_bfloat16_rounds_no_more_than_pytorchs(products):
    input, weight = torch.randn(2, 64, 4, 4), torch.randn(32, 64, 3, 3)
    exact = F.conv2d(input, weight, padding=1)
    halves = input.bfloat16(), weight.bfloat16(), None, (1, 1), (1, 1), (1, 1), 1
    error, usual = ((made(*halves).float() - exact).norm() for made in (convolutions.conv2d, F.conv2d))
    assert len(products) == 2 and error < 1.1 * usual


def test_only_large_weights_and_few_positions(products, monkeypatch):
    options = (1, 1), (1, 1), (1, 1)
    few, many, weight = torch.randn(1, 4, 16, 16), torch.randn(1, 4, 16, 17), torch.randn(4, 4, 3, 3)
    convolutions.conv2d(many, weight, None, *options, 1)
    convolutions.conv2d(few, weight.to(memory_format=torch.channels_last), None, *options, 1)
    convolutions.conv2d(few, weight[:, :1].contiguous(), None, *options, 4)
    convolutions.conv2d(few.double(), weight.double(), None, *options, 1)
    convolutions.conv2d(few.to("meta"), weight.to("meta"), None, *options, 1)
    monkeypatch.setattr(convolutions, "LARGE", 145)
    convolutions.conv2d(few, weight, None, *options, 1)
    monkeypatch.setattr(convolutions, "LARGE", 144)
    monkeypatch.setattr(convolutions, "MOST_BYTES", 4 * 36 * 256 - 1)
    convolutions.conv2d(few, weight, None, *options, 1)
    assert products == []
    monkeypatch.setattr(convolutions, "MOST_BYTES", 4 * 36 * 256)
    convolutions.conv2d(few, weight, None, *options, 1)
    assert len(products) == 1


def test_layers_their_backward_pass_and_their_derivatives(products):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, 2, 1)).requires_grad_(False)
    BACKENDS["int8"].replace_layers(model, torch.float32)
    frozen.hand_gradients_through(model)
    input, layer = torch.randn(2, 4, 6, 6, requires_grad=True), model[0]
    plain = F.conv2d(input, layer.weight * layer.scale, layer.bias, 2, 1)
    found = model(input)
    torch.testing.assert_close(found, plain)
    wanted, given = (torch.autograd.grad(output.square().sum(), input)[0] for output in (plain, found))
    torch.testing.assert_close(given, wanted)
    before = len(products)
    directions = torch.randn(3, *input.shape)
    with torch.no_grad():
        rows = model(Stacked(torch.cat([input[None], directions]))).rows
        linear = torch.stack([F.conv2d(each, layer.weight * layer.scale, None, 2, 1) for each in directions])
    torch.testing.assert_close(rows[1:], linear)
    assert before == 2 and len(products) == 2 + 4 * 2  # a value and three derivatives of two examples
