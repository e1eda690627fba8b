"""A value and its derivatives in two tensors: a model and its derivatives as one graph, for engines without autograd.

What `stacked` does in PyTorch, this does in an exported graph, in which nothing is written in place and a product of
two batches costs no more than one. The value goes through the model's own operations, which an engine knows and fuses;
its derivatives go beside it as a batch of their own. So the value is a batch of one example, and its n derivatives
are a batch of n: what the model does to an example is done to each of them. Where a model moves something else into
the dimension of the batch (the heads of attention), that is there n times.
"""

import math

import torch
import torch.nn.functional as F

from . import stacked
from .stacked import Dual, NoRule, rule_of, sizes, value_of


RULES = {}
# Of the scores of attention that are there at once, so many numbers where there are eight derivatives. The queries of
# a layer go in so many parts at most, as each part is a dozen operations of the graph.
SCORES, PARTS = 2**22, 32


class Paired(Dual):
    """A value, and its derivatives along the dimension of the batch.

    Args:
        value: `[b, *shape]`; b is one where a model is given it.
        derivatives: `[n·b, *shape]`.
    """

    rules = RULES
    shape = property(lambda self: self.value.shape)
    rows = property(lambda self: self.value)
    count = property(lambda self: self.derivatives.shape[0] // self.value.shape[0])

    def __init__(self, value, derivatives):
        if value.shape[1:] != derivatives.shape[1:]:
            raise NoRule("an operation across the examples of a batch")
        self.value, self.derivatives = value, derivatives

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        if index[0] != slice(None):
            raise NoRule("indexing the examples of a batch")
        return Paired(self.value[index], self.derivatives[index])

    def numel(self):
        return self.value.numel()

    @property
    def beside(self):
        """The value as it meets the derivatives in a product."""
        if len(self.value) == 1:
            return self.value
        return self.value[None].expand(self.count, *self.shape).flatten(0, 1)


# =====================================================================================================
# Operations that treat all examples alike, and linearly
# =====================================================================================================


def of_each(function):
    """The rule of one: value and derivatives go through it."""

    def apply(x, *args, **kwargs):
        args = [value_of(arg) for arg in args]
        value, derivatives = function(x.value, *args, **kwargs), function(x.derivatives, *args, **kwargs)
        parts = [(value, derivatives)] if isinstance(value, torch.Tensor) else list(zip(value, derivatives))
        if any(others.shape[0] != x.count * len(each) or len(each) != len(x) for each, others in parts):
            raise NoRule("an operation across the examples of a batch")
        pairs = tuple(Paired(*part) for part in parts)
        return pairs[0] if isinstance(value, torch.Tensor) else pairs

    return apply


METHODS = "permute transpose flatten unflatten unsqueeze squeeze chunk split to type float type_as contiguous clone"
RULES |= {name: of_each(getattr(torch.Tensor, name)) for name in METHODS.split()}
RULES |= {name: of_each(getattr(F, name)) for name in ("interpolate", "avg_pool2d")}
RULES["dropout"] = stacked.RULES["dropout"]


def to_shape(function):
    """The rule of an operation that is told the shape of its result."""

    def apply(x, *shape):
        shape = tuple(sizes(shape))
        value = function(x.value, shape)
        return Paired(value, function(x.derivatives, (x.count * len(value), *shape[1:])))

    return apply


RULES |= dict.fromkeys(("view", "reshape"), to_shape(torch.Tensor.reshape)) | {"expand": to_shape(torch.Tensor.expand)}


@rule_of("mean", rules=RULES)
def mean(x, dim, keepdim=False):
    if not all(each % x.ndim for each in (dim if isinstance(dim, tuple | list) else (dim,))):
        raise NoRule("a mean of the examples of a batch")
    return of_each(torch.Tensor.mean)(x, dim, keepdim=keepdim)


@rule_of("pad", rules=RULES)
def pad(x, sides, mode="constant", value=None):
    if value:
        raise NoRule("padding with numbers other than 0")
    return of_each(F.pad)(x, sides, mode)


@rule_of("cat", "concat", "concatenate", rules=RULES)
def concatenate(parts, dim=0):
    count = next(part.count for part in parts if isinstance(part, Paired))
    values = torch.cat([value_of(part) for part in parts], dim)
    return Paired(values, torch.cat([derivatives_of(part, count) for part in parts], dim))


def derivatives_of(x, count):
    """The derivatives of a `Paired`, or so many of a constant, which are zero."""
    return x.derivatives if isinstance(x, Paired) else torch.zeros_like(x).expand(count, *x.shape[1:])


@rule_of("linear", rules=RULES)
def linear(x, weight, bias=None):
    return Paired(F.linear(x.value, weight, bias), F.linear(x.derivatives, weight))


@rule_of("conv2d", rules=RULES)
def conv2d(x, weight, bias=None, *options, **named):
    return Paired(
        F.conv2d(x.value, weight, bias, *options, **named), F.conv2d(x.derivatives, weight, None, *options, **named)
    )


# =====================================================================================================
# Sums, products and functions of single numbers
# =====================================================================================================


@rule_of("add", "add_", "__add__", "__radd__", rules=RULES)
def add(x, y):
    if isinstance(x, Paired) and isinstance(y, Paired):
        return Paired(x.value + y.value, x.derivatives + y.derivatives)
    x, constant = (x, y) if isinstance(x, Paired) else (y, x)
    value = x.value + constant
    if len(value) != len(x):
        raise NoRule("a sum that makes a batch")
    return Paired(value, x.derivatives.expand(-1, *value.shape[1:]))


@rule_of("sub", "__sub__", "__rsub__", rules=RULES)
def subtract(x, y):
    return add(x, -y)


@rule_of("mul", "mul_", "__mul__", "__rmul__", rules=RULES)
def multiply(x, y):
    if isinstance(x, Paired) and isinstance(y, Paired):
        return Paired(x.value * y.value, x.derivatives * y.beside + y.derivatives * x.beside)
    x, constant = (x, y) if isinstance(x, Paired) else (y, x)
    if isinstance(constant, torch.Tensor) and constant.ndim == x.ndim and len(constant) > 1:
        raise NoRule("a product that makes a batch")
    return Paired(x.value * constant, x.derivatives * constant)


@rule_of("div", "__truediv__", rules=RULES)
def divide(x, y):
    if isinstance(y, Paired):
        raise NoRule("division by what depends on the inputs")
    return multiply(x, 1 / y)


@rule_of("einsum", rules=RULES)
def einsum(equation, x, y):
    if not (isinstance(x, Paired) and isinstance(y, Paired)) or len({part[0] for part in split(equation)}) > 1:
        raise NoRule("einsum of constants, or across the examples of a batch")
    derivatives = torch.einsum(equation, x.derivatives, y.beside) + torch.einsum(equation, x.beside, y.derivatives)
    return Paired(torch.einsum(equation, x.value, y.value), derivatives)


def split(equation):
    """The parts of the equation of a product."""
    return equation.replace("->", ",").split(",")


@rule_of("softmax", rules=RULES)
def softmax(x, dim, dtype=None, **_):
    if not dim % x.ndim:
        raise NoRule("softmax across the examples of a batch")
    value = torch.softmax(x.value, dim, dtype=dtype)
    beside = Paired(value, x.derivatives.to(value.dtype)).beside
    change = x.derivatives * beside
    return Paired(value, change - beside * change.sum(dim, keepdim=True))


def pointwise(value_and_slope):
    """The rule of a function of single numbers."""

    def apply(x, *args, **kwargs):
        if kwargs.get("approximate", "none") != "none":
            raise NoRule("approximate gelu")
        value, slope = value_and_slope(x.value)
        return Paired(value, x.derivatives * Paired(slope, x.derivatives).beside)

    return apply


RULES |= {
    "sigmoid": pointwise(stacked.sigmoid_and_slope),
    "silu": pointwise(stacked.silu_and_slope),
    "gelu": pointwise(stacked.gelu_and_slope),
}


# =====================================================================================================
# Norms: y = (x - m) / s has dy = (dx - mean(dx) - y mean(y dx)) / s
# =====================================================================================================


@rule_of("layer_norm", rules=RULES)
def layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5):
    if len(normalized_shape) != 1 or len(x) != 1:
        raise NoRule("layer_norm over several dimensions")
    centred = x.value - x.value.mean(-1, keepdim=True)
    deviation = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    normal = centred * deviation
    mean = x.derivatives.mean(-1, keepdim=True)
    along = (x.derivatives * normal).mean(-1, keepdim=True)
    scale = deviation if weight is None else deviation * weight
    value = F.layer_norm(x.value, normalized_shape, weight, bias, eps)
    return Paired(value, (x.derivatives - mean - normal * along) * scale)


@rule_of("group_norm", rules=RULES)
def group_norm(x, num_groups, weight=None, bias=None, eps=1e-5):
    """Means of groups are taken in two steps, so that what is large keeps the shape in which convolutions have it."""
    if len(x) != 1:
        raise NoRule("group_norm of several examples")
    dims, channels = tuple(range(2, x.ndim)), x.shape[1]

    def mean(y):
        """The mean of every channel's group, `[:, C, 1, ...]`."""
        groups = y.mean(dims).reshape(y.shape[0], num_groups, -1).mean(2, keepdim=True)
        groups = groups.expand(-1, -1, channels // num_groups).reshape(y.shape[0], channels)
        return groups[(..., *[None] * len(dims))]

    centred = x.value - mean(x.value)
    deviation = torch.rsqrt(mean(centred.square()) + eps)
    normal = centred * deviation
    scale = deviation if weight is None else deviation * weight.view(-1, *[1] * len(dims))
    value = F.group_norm(x.value, num_groups, weight, bias, eps)
    along = mean(x.derivatives * normal)
    return Paired(value, (x.derivatives - mean(x.derivatives) - normal * along) * scale)


# =====================================================================================================
# Attention
# =====================================================================================================


@rule_of("scaled_dot_product_attention", rules=RULES)
def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """softmax(q kᵀ) v in parts of the queries; the formula is that of `stacked.attention`."""
    if attn_mask is not None or is_causal or dropout_p > 0 or enable_gqa or len(query) != 1:
        raise NoRule("attention of several examples, with masks, dropout or grouped queries")
    count = next(part.count for part in (query, key, value) if isinstance(part, Paired))
    q, k, v = map(value_of, (query, key, value))
    dq, dk, dv = (part.derivatives if isinstance(part, Paired) else None for part in (query, key, value))
    _, heads, length, width = q.shape
    scale = width**-0.5 if scale is None else scale
    q, dq = q * scale, None if dq is None else dq * scale
    ones = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    step = max(math.ceil(length / PARTS), SCORES // (8 * heads * k.shape[2]))
    left, right = [], []  # dS as one product, [dq q] [k dk]ᵀ
    if dq is not None:
        left.append(dq), right.append(k.expand(count, -1, -1, -1))
    if dk is not None:
        left.append(q.expand(count, -1, -1, -1)), right.append(dk)
    left, right = (torch.cat(parts, dim=-1) if parts else None for parts in (left, right))
    results, changes = [], []
    for first in range(0, length, step):
        chosen = slice(first, first + step)
        weights = torch.softmax(q[:, :, chosen] @ k.mT, dim=-1)
        result, change = weights @ v, 0
        if left is not None:
            change = (left[:, :, chosen] @ right.mT * weights) @ ones
            change = change[..., :-1] - change[..., -1:] * result
        if dv is not None:
            change = change + weights @ dv
        results.append(result), changes.append(change)
    return Paired(torch.cat(results, dim=2), torch.cat(changes, dim=2))
