"""Derivatives of a whole prediction along directions of θ, by forward passes: exact, and nothing is kept.

They take the place of finite differences, whose step must be long enough for the precision and short enough for the
curvature. Forward-mode derivatives have neither problem, and no backward pass: engines that only compute forward can.

There are two ways to compute them: `stacked`, a batch of one value and n derivatives through the model's own code, and
`by_autograd`, PyTorch's forward mode, slower and for every model. Forward gradients from several tangents are prior
art (arXiv 2410.17764), second-order steps from them too (FoMoH, arXiv 2408.10419).
"""

import contextlib

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..models.stacked import NoRule, Stacked, lifted


class Word(torch.nn.Module):
    """Rows of a text encoder, of its tokens or its output, with the placeholder's in their place.

    Args:
        table: `PromptRows` or `EncodedRows`.
        first_id: id of the placeholder's first vector.
        vectors: its vectors `[k, d]`, a tensor that autograd may follow, or `Stacked`.
    """

    def __init__(self, table, first_id, vectors):
        super().__init__()
        self.table, self.first_id, self.vectors = table, first_id, vectors

    def forward(self, ids):
        numbers = ids - self.first_id
        is_word, numbers, others = (numbers >= 0)[..., None], numbers.clamp(min=0), self.table(ids)
        if not isinstance(self.vectors, Stacked):
            return torch.where(is_word, self.vectors[numbers].to(others), others)
        rows = self.vectors.rows[:, numbers].to(others) * is_word
        rows[0] = torch.where(is_word, rows[0], others)
        return Stacked(rows)


@contextlib.contextmanager
def word_in_place(text_encoder, first_id, vectors):
    """`TextEncoders` whose placeholder has these vectors `[k, d]`; of several encoders the parts lie side by side."""
    tables = text_encoder.get_tables()
    parts = vectors.split([table.weight.shape[1] for table in tables], dim=-1)
    try:
        text_encoder.set_tables([Word(table, first_id, part) for table, part in zip(tables, parts)])
        yield
    finally:
        text_encoder.set_tables(tables)


def predict(model, vectors, batch):
    """The prediction `[b, C, h, w]` of a `FrozenModel` for a `Batch`, with the placeholder at `vectors`."""
    with word_in_place(model.text_encoder, model.first_placeholder_id, vectors):
        text = model.text_encoder(batch.prompt_ids)
    noisy = batch.noisy_latents.to(device=text.states.device, dtype=text.states.dtype)
    noisy = noisy.contiguous(memory_format=model.compute.memory_format)
    return model.family.predict(model.denoiser, noisy, batch.timesteps, text, batch.size_ids)


def stacked(model, theta, directions, batch):
    """The errors r(θ) of a prediction and their derivatives along directions, from batches of value and derivatives.

    Args:
        model: `FrozenModel`; a pass has at most its `max_candidates` rows, one of them the value.
        theta: θ `[k, d]`, float32.
        directions: `[n, k, d]`.
        batch: `Batch` of b examples.

    Returns:
        Errors `[M]` and derivatives `[n, M]` with M = b·C·h·w, float32; under masks only what is inside counts.

    Raises:
        NoRule: the model has an operation that `models.stacked` does not know.
    """
    if not model.family.stacks:
        raise NoRule(f"{model.family.label} has operations without a rule for derivatives")
    # Derivatives along directions as long as θ are about as large as what they are derivatives of, which the range
    # of float16 is made for. A power of two changes no digit.
    length = torch.exp2(theta.norm().clamp(min=1e-6).log2().round())
    error, derivatives = None, []
    for part in directions.split(rows_per_pass(model.max_candidates, len(directions)) - 1):
        vectors = Stacked(torch.cat([theta[None], part * length]))
        rows = lifted(predict(model, vectors, batch), len(part) + 1).rows.float()
        error = batch.weighed(rows[0] - batch.target).flatten()
        derivatives.append(batch.weighed(rows[1:]).flatten(1) / length)
    return error, torch.cat(derivatives)


def rows_per_pass(limit, count):
    """Rows of a pass for so many directions: the value and a derivative at least, at most `limit` (None: all)."""
    return min(count + 1, max(2, limit or count + 1))


def by_autograd(model, theta, directions, batch):
    """The same by `torch.func`, for models of every kind; attention by the only kernel that has a forward derivative.

    Arguments and result as `stacked`.
    """

    def errors(point):
        return batch.weighed(predict(model, point, batch).float() - batch.target).flatten()

    def along(direction):
        return torch.func.jvp(errors, (theta,), (direction,))

    found = []
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # or INT8 layers would use one memory for all weights
        for part in directions.split(rows_per_pass(model.max_candidates, len(directions)) - 1):
            found.append(torch.func.vmap(along, out_dims=(None, 0))(part))
    return found[0][0], torch.cat([derivatives for _, derivatives in found])
