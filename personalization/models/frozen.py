"""Frozen INT8 layers that hand a gradient through, with nothing of their weight kept for the backward pass."""

import functools

import torch


class FrozenProduct(torch.autograd.Function):
    """y = W x + b of a frozen INT8 layer: ∂L/∂x = Wᵀ ∂L/∂y, for which the weight is dequantized once more.

    Left to autograd, every dequantized weight would stay until the backward pass: a whole UNet in full precision.
    """

    @staticmethod
    def forward(ctx, input, layer, product):
        ctx.layer, ctx.shape = layer, input.shape
        return product(input)  # autograd is off in here: the weight lives in the model's buffer

    @staticmethod
    def backward(ctx, gradient):
        layer = ctx.layer
        weight = layer.dequantized(gradient.dtype)
        if weight.dim() == 2:
            return gradient @ weight, None, None
        return torch.nn.grad.conv2d_input(ctx.shape, weight, gradient, *layer.options()), None, None


def hand_gradients_through(model):
    """Lets gradients through all frozen INT8 layers of a model, those that have `dequantized`; returns the model.

    Layers of other kinds (bitsandbytes' Linear4bit, unquantized ones) do so by themselves.
    """
    for layer in model.modules():
        if hasattr(layer, "dequantized"):
            layer.forward = functools.partial(_forward, layer, layer.forward)
    return model


# What is computed once more in the backward pass, instead of kept: nothing, or what happens inside blocks.
CHECKPOINTING = ("none", "block")


def make_differentiable(model, checkpointing="none"):
    """`hand_gradients_through`, and the gradient checkpointing of diffusers or transformers (of `CHECKPOINTING`)."""
    hand_gradients_through(model)
    if checkpointing == "block" and hasattr(model, "enable_gradient_checkpointing"):
        model.enable_gradient_checkpointing()
    elif checkpointing == "block":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # transformers checkpoints in training mode only; text encoders have no dropout
    return model


def _forward(layer, product, input):
    return FrozenProduct.apply(input, layer, product)
