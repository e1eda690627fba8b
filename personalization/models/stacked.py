"""A tensor and its derivatives along n directions in one batch: forward-mode differentiation at the price of a batch.

A model that is given `Stacked` inputs runs its own code on them, and what it returns has the derivatives of the whole
result. Linear layers take all rows as one batch, without their bias for the derivatives; everything else computes its
derivative from the values of row 0. There is no step, so nothing cancels: relative errors are those of the precision.
What does not depend on the inputs stays a tensor of one row. An operation without a rule here raises `NoRule`.

`torch.func.jvp` under `vmap` computes the same at twice the time, see `methods.tangents`.
"""

import functools
import itertools
import math

import torch
import torch.nn.functional as F

from . import convolutions


# Scores of attention that are there at once, in numbers: on a CPU they should stay in its cache, on CUDA fill it. They
# are of so many queries at least, as a product with fewer rows reads more than it computes.
SCORES = {"cpu": 2**20, "cuda": 2**25}
QUERIES = 128


class NoRule(NotImplementedError):
    """An operation whose derivative is not known here."""


class Dual:
    """A value and its derivatives, for the code of a model a tensor with the value's shape.

    Attributes:
        rules: name of an operation, as torch calls it -> what computes it.
        value: what it is a derivative of.
        rows: a tensor of the same dtype, on the same device.
    """

    __iter__ = None  # it has `__getitem__`, and Python would take it for a sequence
    rules: dict
    value: torch.Tensor
    rows: torch.Tensor
    shape: torch.Size

    ndim = property(lambda self: len(self.shape))
    dtype = property(lambda self: self.rows.dtype)
    device = property(lambda self: self.rows.device)
    requires_grad = False

    @classmethod
    def rule(cls, name):
        """What computes an operation, by the name that torch calls it."""
        if name not in cls.rules:
            raise NoRule(f"{name} has no rule for derivatives here")
        return cls.rules[name]

    def size(self, dim=None):
        return self.shape if dim is None else self.shape[dim]

    def dim(self):
        return self.ndim

    def __len__(self):
        return self.shape[0]

    def is_floating_point(self):
        return self.rows.is_floating_point()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return cls.rule(function.__name__)(*args, **(kwargs or {}))

    def __getattr__(self, name):  # methods of tensors
        if name.startswith("_") or not hasattr(torch.Tensor, name):
            raise AttributeError(f"a stacked tensor has no {name}")
        return functools.partial(self.rule(name), self)

    def __add__(self, other):
        return self.rule("add")(self, other)

    def __mul__(self, other):
        return self.rule("mul")(self, other)

    def __sub__(self, other):
        return self + -other

    def __rsub__(self, other):
        return -self + other

    def __neg__(self):
        return self * -1

    def __truediv__(self, other):
        return self.rule("div")(self, other)

    __radd__, __rmul__ = __add__, __mul__

    def _refuse(self, *_):
        raise NoRule("an operator without a rule for derivatives here")

    __pow__ = __rpow__ = __matmul__ = __rmatmul__ = __rtruediv__ = __abs__ = __bool__ = __setitem__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = _refuse


RULES = {}


class Stacked(Dual):
    """Both in one tensor, whose linear layers are one product.

    Args:
        rows: `[1 + n, *shape]`, the value first.
    """

    rules = RULES
    shape = property(lambda self: self.rows.shape[1:])
    value = property(lambda self: self.rows[0])

    def __init__(self, rows):
        self.rows = rows

    def numel(self):
        return self.rows.numel()

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        if any(part is Ellipsis for part in index):
            raise NoRule("indexing with an ellipsis")
        return Stacked(self.rows[(slice(None), *index)])


def rule_of(*names, rules=RULES):
    """Enters a function into `RULES`, or into those of another class."""

    def enter(function):
        rules.update(dict.fromkeys(names, function))
        return function

    return enter


def value_of(x):
    """The value of a `Dual`, or a constant itself."""
    return x.value if isinstance(x, Dual) else x


def derived(value, tangents):
    """A `Stacked` of new tensors: a value `[*shape]`, and its derivatives in the place where they lie, `[1 + n, ...]`.

    Args:
        value: of the result.
        tangents: `[1 + n, *shape]`, new memory; its first row is overwritten.
    """
    tangents[0] = value
    return Stacked(tangents)


# =====================================================================================================
# Operations that treat all rows alike: shapes and places
# =====================================================================================================


def shifted(dim):
    """A dimension of the value as one of the rows."""
    return dim + 1 if dim >= 0 else dim


def sizes(shape):
    return shape[0] if len(shape) == 1 and not isinstance(shape[0], int | torch.SymInt) else shape


@rule_of("view", "reshape")
def reshape(x, *shape):
    return Stacked(x.rows.reshape(len(x.rows), *sizes(shape)))


@rule_of("expand")
def expand(x, *shape):
    return Stacked(padded(x.rows, len(sizes(shape))).expand(len(x.rows), *sizes(shape)))


@rule_of("permute")
def permute(x, *dims):
    return Stacked(x.rows.permute(0, *map(shifted, sizes(dims))))


@rule_of("transpose")
def transpose(x, first, second):
    return Stacked(x.rows.transpose(shifted(first), shifted(second)))


@rule_of("flatten")
def flatten(x, start_dim=0, end_dim=-1):
    return Stacked(x.rows.flatten(shifted(start_dim), shifted(end_dim)))


@rule_of("unflatten")
def unflatten(x, dim, shape):
    return Stacked(x.rows.unflatten(shifted(dim), shape))


@rule_of("unsqueeze")
def unsqueeze(x, dim):
    return Stacked(x.rows.unsqueeze(shifted(dim)))


@rule_of("squeeze")
def squeeze(x, dim):
    return Stacked(x.rows.squeeze(shifted(dim)))


@rule_of("chunk")
def chunk(x, chunks, dim=0):
    return tuple(map(Stacked, x.rows.chunk(chunks, shifted(dim))))


@rule_of("split")
def split(x, size, dim=0):
    return tuple(map(Stacked, x.rows.split(size, shifted(dim))))


@rule_of("cat", "concat", "concatenate")
def concatenate(parts, dim=0):
    count = next(len(part.rows) for part in parts if isinstance(part, Stacked))
    return Stacked(torch.cat([lifted(part, count).rows for part in parts], dim=shifted(dim)))


def lifted(x, count):
    """A constant as a `Stacked` of so many rows: its derivatives are zero."""
    if isinstance(x, Stacked):
        return x
    return Stacked(torch.cat([x[None], x.new_zeros(()).expand(count - 1, *x.shape)]))


@rule_of("contiguous", "clone")
def contiguous(x, memory_format=torch.contiguous_format):
    return Stacked(x.rows.contiguous()) if memory_format == torch.contiguous_format else x


@rule_of("to", "type", "float", "detach", "type_as")
def convert(x, *args, **kwargs):
    if not args and not kwargs:
        return Stacked(x.rows.float())
    kwargs.pop("memory_format", None)
    args = [arg.rows if isinstance(arg, Stacked) else arg for arg in args]
    return Stacked(x.rows.to(*args, **kwargs))


@rule_of("mean")
def mean(x, dim, keepdim=False):
    return Stacked(x.rows.mean(shifted(dim), keepdim=keepdim))


@rule_of("dropout")
def dropout(x, p=0.5, training=True, inplace=False):
    if training and p > 0:
        raise NoRule("dropout while training has no derivative")
    return x


# =====================================================================================================
# Linear layers, and what acts on pictures
# =====================================================================================================


def with_bias(rows, bias):
    """A `Stacked` of rows that nobody else has, the bias added to the value."""
    if bias is not None:
        rows[0] += bias
    return Stacked(rows)


@rule_of("linear")
def linear(x, weight, bias=None):
    return with_bias(F.linear(x.rows, weight), bias)


@rule_of("gemm_4bit.default")
def linear_4bit(x, *weight, bias=None, **options):
    """bitsandbytes' Linear4bit."""
    return with_bias(torch.ops.bitsandbytes.gemm_4bit.default(x.rows, *weight, **options), bias)


@rule_of("conv2d")
def conv2d(x, weight, bias=None, *options, **named):
    product = convolutions.conv2d if len(options) == 4 and not named else F.conv2d  # all options, as layers give them
    rows = product(x.rows.flatten(0, 1), weight, None, *options, **named).unflatten(0, x.rows.shape[:2])
    return with_bias(rows, bias if bias is None else bias[:, None, None])


def of_pictures(function):
    """A function that acts on each picture of a batch, and linearly."""

    def apply(x, *args, **kwargs):
        return Stacked(function(x.rows.flatten(0, 1), *args, **kwargs).unflatten(0, x.rows.shape[:2]))

    return apply


RULES |= {name: of_pictures(getattr(F, name)) for name in ("interpolate", "avg_pool2d")}


@rule_of("pad")
def pad(x, sides, mode="constant", value=None):
    if value:
        raise NoRule("padding with numbers other than 0")
    return of_pictures(F.pad)(x, sides, mode)


# =====================================================================================================
# Sums and products
# =====================================================================================================


def padded(rows, ndim):
    """Rows whose values have so many dimensions, the new ones first, as broadcasting would add them."""
    return rows[(slice(None), *[None] * (ndim - rows.ndim + 1))]


@rule_of("add", "add_", "__add__", "__radd__")
def add(x, y):
    if isinstance(x, Stacked) and isinstance(y, Stacked):
        ndim = max(x.ndim, y.ndim)
        return Stacked(padded(x.rows, ndim) + padded(y.rows, ndim))
    x, constant = (x, y) if isinstance(x, Stacked) else (y, x)
    if not isinstance(constant, torch.Tensor):
        return derived(x.rows[0] + constant, x.rows.clone())
    rows, value = padded(x.rows, constant.ndim), x.rows[0] + constant
    return derived(value, rows.expand(len(rows), *value.shape).clone())


@rule_of("sub", "__sub__", "__rsub__")
def subtract(x, y):
    return add(x, -y)


@rule_of("mul", "mul_", "__mul__", "__rmul__")
def multiply(x, y):
    if not isinstance(x, Stacked) or not isinstance(y, Stacked):
        x, constant = (x, y) if isinstance(x, Stacked) else (y, x)
        return Stacked(padded(x.rows, getattr(constant, "ndim", 0)) * constant)
    ndim = max(x.ndim, y.ndim)
    x, y = padded(x.rows, ndim), padded(y.rows, ndim)
    return derived(x[0] * y[0], (x * y[0]).addcmul_(y, x[0]))


@rule_of("div", "__truediv__")
def divide(x, y):
    if isinstance(y, Stacked):
        raise NoRule("division by what depends on the inputs")
    return Stacked(padded(x.rows, getattr(y, "ndim", 0)) / y)


@rule_of("einsum")
def einsum(equation, x, y):
    first, second = equation.split("->")[0].split(",")
    result = equation.split("->")[1]
    value = torch.einsum(equation, value_of(x), value_of(y))
    rows = 0
    if isinstance(x, Stacked):
        rows = torch.einsum(f"Z{first},{second}->Z{result}", x.rows, value_of(y))
    if isinstance(y, Stacked):
        rows = rows + torch.einsum(f"{first},Z{second}->Z{result}", value_of(x), y.rows)
    return derived(value, rows)


# =====================================================================================================
# Functions of single numbers: the derivative is found once, and multiplies all rows
# =====================================================================================================


def sigmoid_and_slope(x):
    y = torch.sigmoid(x)
    return y, y * (1 - y)


def silu_and_slope(x):
    y = torch.sigmoid(x)
    return F.silu(x), y * (1 + x * (1 - y))


def gelu_and_slope(x):
    slope = 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return F.gelu(x), slope


def pointwise(value_and_slope):
    """The rule of a function of single numbers; its slope is computed in float32."""

    def apply(x, *args, **kwargs):
        if kwargs.get("approximate", "none") != "none":
            raise NoRule("approximate gelu")
        value, slope = value_and_slope(x.rows[0].float())
        return derived(value, x.rows * slope.to(x.dtype))

    return apply


RULES |= {
    "sigmoid": pointwise(sigmoid_and_slope),
    "silu": pointwise(silu_and_slope),
    "gelu": pointwise(gelu_and_slope),
}


# =====================================================================================================
# Norms: y = (x - m) / s has dy = (dx - mean(dx) - y mean(y dx)) / s
# =====================================================================================================


@rule_of("layer_norm")
def layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5):
    if len(normalized_shape) != 1:
        raise NoRule("layer_norm over several dimensions")
    value = x.rows[0].float()
    variance, centre = torch.var_mean(value, dim=-1, correction=0, keepdim=True)
    deviation = torch.rsqrt(variance + eps)
    normal = ((value - centre) * deviation).to(x.dtype)
    rows = projected(x.rows, normal, -1)
    scale = deviation if weight is None else deviation * weight.float()
    rows = rows.mul_(scale.to(x.dtype))
    return derived(F.layer_norm(x.rows[0], normalized_shape, weight, bias, eps), rows)


@rule_of("group_norm")
def group_norm(x, num_groups, weight=None, bias=None, eps=1e-5):
    rows = x.rows.unflatten(2, (num_groups, -1))  # [1 + n, b, G, C/G, ...]
    dims = tuple(range(3, rows.ndim))
    value = rows[0].float()
    variance, centre = torch.var_mean(value, dim=[dim - 1 for dim in dims], correction=0, keepdim=True)
    deviation = torch.rsqrt(variance + eps)
    normal = ((value - centre) * deviation).to(x.dtype)
    scale = deviation
    if weight is not None:
        scale = deviation * weight.float().view(num_groups, -1, *[1] * (len(dims) - 1))
    rows = projected(rows, normal, dims).mul_(scale.to(x.dtype))
    return derived(F.group_norm(x.rows[0], num_groups, weight, bias, eps), rows.flatten(2, 3))


def projected(rows, normal, dims):
    """Rows less their mean and their part along `normal`, over `dims`."""
    along = (rows * normal).mean(dims, keepdim=True)
    return torch.addcmul(rows, normal, along, value=-1).sub_(rows.mean(dims, keepdim=True))


# =====================================================================================================
# Attention
# =====================================================================================================


@rule_of("softmax")
def softmax(x, dim, dtype=None, **_):
    x = x.rows.to(dtype or x.dtype)
    value = torch.softmax(x[0], dim)
    rows = x * value
    return derived(value, torch.addcmul(rows, value, rows.sum(shifted(dim), keepdim=True), value=-1))


@rule_of("scaled_dot_product_attention")
def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """softmax(q kᵀ) v, an example at a time and few of its heads: of the scores only `SCORES` are there at once."""
    if dropout_p > 0 or enable_gqa:
        raise NoRule("attention with dropout or grouped queries")
    parts = query, key, value
    n = next(len(part.rows) for part in parts if isinstance(part, Stacked)) - 1
    (b, h, length, width), keys = query.shape, key.shape[2]
    scale = width**-0.5 if scale is None else scale
    out = query.rows if isinstance(query, Stacked) else query
    out = out.new_empty(1 + n, b, length, h, value.shape[-1]).transpose(2, 3)
    room = max(1, SCORES.get(out.device.type, SCORES["cpu"]) // (min(length, QUERIES) * keys))
    heads, derivatives = max(1, min(h, room // n)), min(n, room)
    rows = [part.rows if isinstance(part, Stacked) else part[None] for part in parts]
    mask = attn_mask if attn_mask is None else attn_mask.expand(b, h, -1, keys)
    chunk = QUERIES * max(1, room // (heads * derivatives))
    for example, first in itertools.product(range(b), range(0, h, heads)):
        some = example, slice(first, first + heads)
        of_these = None if mask is None else mask[some]
        attend(*(part[:, *some] for part in rows), of_these, is_causal, scale, chunk, derivatives, out[:, *some])
    return Stacked(out)


def attend(query, key, value, mask, is_causal, scale, chunk, together, out):
    """Attention of some heads, so many queries and derivatives at a time.

    With W = A ∘ dS the derivative of A v is W v - (W 1) ∘ (A v) + A dv, where dS = dq kᵀ + q dkᵀ.

    Args:
        query, key, value: `[1 + n, heads, length, width]`, row 0 the value; without derivatives it alone.
        mask: `[heads, length or 1, keys]`, or None.
        out: `[1 + n, heads, length, width]`, written here.
    """
    n = len(out) - 1
    precision = query.dtype if query.dtype == torch.bfloat16 else torch.float32  # of derivatives, not of values
    query, key, value = (part.movedim(0, 1) for part in (query.float() * scale, key, value))  # [heads, 1 + n, ...]
    q, k, v = (part[:, 0].float() for part in (query, key, value))
    left, right = [], []  # dS as one product, [dq q] [k dk]ᵀ
    if query.shape[1] > 1:
        left.append(query[:, 1:]), right.append(key[:, :1].expand(-1, n, -1, -1))
    if key.shape[1] > 1:
        left.append(query[:, :1].expand(-1, n, -1, -1)), right.append(key[:, 1:])
    left, right = (torch.cat(t, dim=-1).to(precision) if t else None for t in (left, right))
    ones = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1).to(precision)
    dv = value[:, 1:].movedim(1, 2).flatten(2).to(precision)  # [heads, keys, n * width]
    for first in range(0, q.shape[1], chunk):
        chosen = slice(first, first + chunk)
        scores = masked(q[:, chosen] @ k.mT, mask, is_causal, chosen)
        weights = torch.softmax(scores, dim=-1)  # A [heads, c, keys]
        result = weights @ v
        weights, out[0, :, chosen] = weights.to(precision), result
        moved = (weights @ dv).unflatten(2, (n, -1)).movedim(2, 1) if dv.numel() else None
        for start in range(0, n, together):
            these = slice(start, start + together)
            change = 0 if moved is None else moved[:, these]
            if left is not None:
                found = left[:, these, chosen] @ right[:, these].mT  # dS [heads, m, c, keys]
                found = found.mul_(weights[:, None]).flatten(1, 2) @ ones
                found = found.unflatten(1, (-1, result.shape[1])).float()
                change = torch.addcmul(change + found[..., :-1], found[..., -1:], result[:, None], value=-1)
            out[1:][these, :, chosen] = change.movedim(1, 0)


def masked(scores, mask, is_causal, chosen):
    """Scores `[heads, c, keys]` of the queries `chosen`, under a mask of all queries."""
    if is_causal:
        rows = torch.arange(chosen.start, chosen.start + scores.shape[1], device=scores.device)
        hidden = torch.arange(scores.shape[2], device=scores.device) > rows[:, None]
        return scores.masked_fill_(hidden, -math.inf)
    if mask is None:
        return scores
    mask = mask[..., chosen, :] if mask.shape[-2] > 1 else mask
    return scores.masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
