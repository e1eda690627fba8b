"""Frozen layers that hand a gradient through, with nothing of their weight kept for the backward pass."""

import contextlib
import functools

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers import transformer_z_image
from torch.utils.checkpoint import checkpoint

from . import convolutions


class FrozenProduct(torch.autograd.Function):
    """y = W x + b of a frozen linear map: ∂L/∂x = Wᵀ ∂L/∂y, for which an INT8 weight is dequantized once more.

    Left to autograd, every dequantized weight would stay until the backward pass: a whole UNet in full precision; and
    every streamed one would be gone.
    """

    @staticmethod
    def forward(ctx, input, layer, product):
        ctx.layer, ctx.shape = layer, input.shape
        return product(input)  # autograd is off in here: the weight lives in the model's buffer

    @staticmethod
    def backward(ctx, gradient):
        total = None
        with at_hand(ctx.layer):
            for channels, weight in slices_of(ctx.layer, gradient.dtype):
                if weight.dim() == 2:
                    part = gradient[..., channels] @ weight
                else:
                    options = options_of(ctx.layer)
                    part = convolutions.input_gradient(ctx.shape, weight, gradient[:, channels], *options)
                total = part if total is None else total.add_(part)
        return total, None, None


class StreamedLayer(torch.autograd.Function):
    """Any other layer whose weights are streamed, a norm: it is computed once more where its gradient is wanted."""

    @staticmethod
    def forward(ctx, input, layer, function):
        ctx.layer, ctx.function = layer, function
        ctx.save_for_backward(input)
        return function(input)

    @staticmethod
    def backward(ctx, gradient):
        (input,) = ctx.saved_tensors
        with torch.enable_grad():
            point = input.detach().requires_grad_(True)
            with at_hand(ctx.layer):
                output = type(ctx.layer).forward(ctx.layer, point)
                (found,) = torch.autograd.grad(output, point, gradient)
        return found, None, None


def slices_of(layer, dtype):
    """`(channels, weight)` of a linear map, those of an INT8 layer some output channels at a time."""
    return layer.slices(dtype) if hasattr(layer, "slices") else [(slice(None), layer.weight)]


def options_of(convolution):
    """The arguments of `F.conv2d`, in its order."""
    return convolution.stride, convolution.padding, convolution.dilation, convolution.groups


@contextlib.contextmanager
def at_hand(layer):
    """In here the weights of a layer are where it computes, also of one that diffusers streams for each pass."""
    hook = streaming_hook(layer)
    if hook is not None:
        hook.group.onload_()
    try:
        yield
    finally:
        if hook is not None:
            hook.group.offload_()


def streaming_hook(layer):
    """diffusers' hook that brings the weights of a layer for each pass, or None."""
    registry = getattr(layer, "_diffusers_hook", None)
    return registry and registry.get_hook("group_offloading")


def hand_gradients_through(model):
    """Lets gradients through all frozen layers of a model; returns the model.

    Layers that are neither INT8 nor streamed (bitsandbytes' Linear4bit, unquantized ones) do so by themselves.
    """
    for layer in model.modules():
        if hasattr(layer, "slices"):
            layer.forward = functools.partial(_apply, FrozenProduct, layer, layer.forward)
        elif streaming_hook(layer) is not None:
            is_linear = isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))
            function = FrozenProduct if is_linear else StreamedLayer
            layer.forward = functools.partial(_apply, function, layer, layer.forward)
    return model


# What is computed once more in the backward pass, instead of kept: nothing; what happens inside blocks; of that, a
# second time, what happens inside attentions and, some tokens at a time, inside feed-forwards.
CHECKPOINTING = ("none", "block", "layer")
TOKENS_AT_A_TIME = 512
FEED_FORWARDS = FeedForward, transformer_z_image.FeedForward
WIDE = 4096  # tokens of all examples whose feed-forwards are as large as the largest convolutions
MOST_PARTS = 64  # of a feed-forward, so that a prediction for an absurd number of examples ends, too


def split_feed_forwards(model):
    """Has the feed-forwards of a denoiser, whose inside is several times as wide, see some tokens at a time.

    diffusers' own `enable_forward_chunking` takes only sizes of which every layer's number of tokens is a multiple.
    """
    for layer in model.modules():
        if isinstance(layer, FEED_FORWARDS):
            layer.forward = functools.partial(_narrow, layer.forward)


def make_differentiable(model, checkpointing="none"):
    """`hand_gradients_through`, and gradient checkpointing, of `CHECKPOINTING`."""
    hand_gradients_through(model)
    if checkpointing == "none":
        return model
    if hasattr(model, "enable_gradient_checkpointing"):
        model.enable_gradient_checkpointing()
    else:
        # Its new name, or the one that is deprecated for it
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        model.train()  # transformers checkpoints in training mode only; text encoders have no dropout
    if checkpointing == "layer":
        for layer in model.modules():
            if isinstance(layer, Attention):
                layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
            elif isinstance(layer, FEED_FORWARDS):
                layer.forward = functools.partial(_in_parts, layer.forward)
    return model


def _narrow(forward, states):
    """A feed-forward of tokens `[b, n, d]`, which does not mix them; of derivatives, too, all of which count."""
    tokens, of_each = states.shape[1], states.numel() // states.shape[1]
    at_a_time = max(1, WIDE * states.shape[2] // of_each, tokens // MOST_PARTS)
    if tokens <= at_a_time:
        return forward(states)
    return torch.cat([forward(part) for part in states.split(at_a_time, dim=1)], dim=1)


def _in_parts(forward, states):
    """The same, of which only the tokens are kept for a backward pass."""
    parts = states.split(TOKENS_AT_A_TIME, dim=1)
    return torch.cat([checkpoint(forward, part, use_reentrant=False) for part in parts], dim=1)


def _apply(function, layer, forward, input):
    return function.apply(input, layer, forward)
