"""Prompts that the text encoders encode once and then leave, for a word that stands in what they put out.

In the prompt itself stands the word that training starts from, once for each vector: so the other words of a prompt
hear what kind of thing is spoken of, and every vector has a row of its own in the output.
"""

import torch
import torch.nn.functional as F


class EncodedRows(torch.nn.Module):
    """What the text encoders said of every prompt in use, with rows for the candidates in the placeholder's place.

    It is to an output what the script's `PromptRows` are to a token table: ids in, states `[b, L, D]` out.

    Args:
        ids: of the prompts `[P, L]`.
        states: of each `[P, L, D]`; rows after those of the text may be anything.
        first_id, num_vectors: of the placeholder, whose k ids are consecutive.
        num_rows: k times the candidates of one pass; they own the ids from `first_id` on.
        padding: id that ends shorter prompts.
    """

    def __init__(self, ids, states, first_id, num_vectors, num_rows, padding):
        super().__init__()
        self.first_id, self.num_vectors, self.padding = first_id, num_vectors, padding
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("states", states, persistent=False)
        self.register_buffer("weight", states.new_zeros(num_rows, states.shape[-1]), persistent=False)

    def matches(self, ids):
        """Which prompts have these ids `[b, l]`, of whatever candidate: bool `[b, P]`."""
        plain = torch.where(ids < self.first_id, ids, self.first_id + (ids - self.first_id) % self.num_vectors)
        length = max(ids.shape[1], self.ids.shape[1])
        return (padded(plain, length, self.padding)[:, None] == padded(self.ids, length, self.padding)).all(dim=-1)

    def said(self, ids):
        """What the text encoders themselves said of prompts `[b, l]`: `[b, l, D]`. On a CPU it raises as `check`."""
        matches = self.matches(ids)
        if matches.device.type == "cpu":  # a GPU would be waited for, in every step
            ensure_found(matches)
        return self.states[matches.int().argmax(dim=1)][:, : ids.shape[1]]

    def write(self, candidates):
        """Puts candidates `[m, k, D]` into the placeholder's rows, the first where the prompts' own ids point."""
        rows = candidates.flatten(0, 1)
        if rows.requires_grad:
            self.weight = self.weight.detach().clone()  # not the one that the last step's graph hangs on
        self.weight[: len(rows)] = rows.to(self.weight)

    def check(self, ids):
        """Raises an `IndexError` for ids (on the host, `[b, l]`) of a prompt that is not encoded."""
        ensure_found(self.matches(ids.to(self.ids.device)))

    def forward(self, ids):
        rows = self.weight[(ids - self.first_id).clamp(min=0)]
        return torch.where((ids >= self.first_id)[..., None], rows, self.said(ids))


def ensure_found(matches):
    """Raises an `IndexError` unless every row of `EncodedRows.matches` has its prompt."""
    if not matches.any(dim=1).all():
        raise IndexError("a prompt was not announced before the text encoders left")


def padded(ids, length, padding):
    """Ids `[b, l]` as `[b, length]`."""
    return F.pad(ids, (0, length - ids.shape[1]), value=padding)


class EncodedPrompts(torch.nn.Module):
    """In the place of `families.TextEncoders` that have left: prompt ids `[b, L]` in, `Text` out.

    Args:
        family: `Family` with `text_of`.
        rows: `EncodedRows`.
        standing: what stands in prompts for the word, vectors `[k, d]` of the token table.
    """

    encoders = ()  # all have left

    def __init__(self, family, rows, standing):
        super().__init__()
        self.family, self.rows, self.padding, self.standing = family, rows, rows.padding, standing

    def forward(self, ids):
        return self.family.text_of(self.rows(ids), ids, self.padding)

    def get_tables(self):
        return [self.rows]

    def set_tables(self, tables):
        (self.rows,) = tables

    def get_input_embeddings(self):
        return self.rows


@torch.no_grad()
def encode_prompts(text_encoder, word, prompts, placeholder, num_rows, padding):
    """Encodes prompts one after the other, which takes the least memory and depends on no other prompt.

    Args:
        text_encoder: `TextEncoders` whose token table is a `PromptRows`.
        word: what stands in prompts, float32 `[d]` or `[k, d]`; or `[k, d + D]`, with where the vectors start.
        prompts: tensors of ids `[P, L]`, on the host; those that are trained on first.
        placeholder: `prompts.Placeholder`.
        num_rows, padding: see `EncodedRows`.

    Returns:
        `EncodedPrompts`; and where the vectors start, float32 `[k, D]`, if not at those given: each at the mean of its
        own rows over the prompts that are trained on. Of all constants it is the nearest to what it replaces there.
    """
    table, first_id = text_encoder.get_input_embeddings(), placeholder.first_id
    standing, start = word.expand(placeholder.num_vectors, -1).tensor_split([table.weight.shape[1]], dim=-1)
    table.write(standing[None])
    width = max(ids.shape[1] for ids in prompts)
    ids = torch.cat([padded(ids, width, padding) for ids in prompts]).unique(dim=0).to(standing.device)
    states = None
    for number, row in enumerate(ids):
        (said,) = text_encoder(row[None]).states
        states = said.new_zeros(len(ids), width, said.shape[1]) if states is None else states
        states[number, : len(said)] = said
    rows = EncodedRows(ids, states, first_id, len(standing), num_rows, padding)
    if not start.numel():
        trained_on = prompts[0].to(ids.device)
        found = rows.said(trained_on).float()
        start = torch.stack([found[trained_on == first_id + i].mean(dim=0) for i in range(len(standing))])
    return EncodedPrompts(text_encoder.family, rows, standing), start
