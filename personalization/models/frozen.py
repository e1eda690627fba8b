"""Frozen INT8 layers that hand a gradient through, with nothing of their weight kept for the backward pass."""

import functools

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers import transformer_z_image
from torch.utils.checkpoint import checkpoint


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
        total = None
        for channels, weight in ctx.layer.slices(gradient.dtype):
            if weight.dim() == 2:
                part = gradient[..., channels] @ weight
            else:
                part = torch.nn.grad.conv2d_input(ctx.shape, weight, gradient[:, channels], *ctx.layer.options())
            total = part if total is None else total.add_(part)
        return total, None, None


def hand_gradients_through(model):
    """Lets gradients through all frozen INT8 layers of a model, those that have `slices`; returns the model.

    Layers of other kinds (bitsandbytes' Linear4bit, unquantized ones) do so by themselves.
    """
    for layer in model.modules():
        if hasattr(layer, "slices"):
            layer.forward = functools.partial(_forward, layer, layer.forward)
    return model


# What is computed once more in the backward pass, instead of kept: nothing; what happens inside blocks; of that, a
# second time, what happens inside attentions and, some tokens at a time, inside feed-forwards.
CHECKPOINTING = ("none", "block", "layer")
TOKENS_AT_A_TIME = 512


def make_differentiable(model, checkpointing="none"):
    """`hand_gradients_through`, and gradient checkpointing, of `CHECKPOINTING`."""
    hand_gradients_through(model)
    if checkpointing == "none":
        return model
    if hasattr(model, "enable_gradient_checkpointing"):
        model.enable_gradient_checkpointing()
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # transformers checkpoints in training mode only; text encoders have no dropout
    if checkpointing == "layer":
        for layer in model.modules():
            if isinstance(layer, Attention):
                layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
            elif isinstance(layer, (FeedForward, transformer_z_image.FeedForward)):
                layer.forward = functools.partial(_in_parts, layer.forward)
    return model


def _in_parts(forward, states):
    """A feed-forward of tokens `[b, n, d]`, which does not mix them: its inside is several times as wide."""
    parts = states.split(TOKENS_AT_A_TIME, dim=1)
    return torch.cat([checkpoint(forward, part, use_reentrant=False) for part in parts], dim=1)


def _forward(layer, product, input):
    return FrozenProduct.apply(input, layer, product)
