"""What families whose text encoder is a language model have in common: chats as prompts, and flow matching.

A prompt is a chat of one message. Its length is its own: ids are padded on the right, and `Text.lengths` says how much
of the states is text. Of the language model only the layers that are read are loaded.
"""

import copy

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tokenizers import AddedToken
from transformers import AutoTokenizer

from ...errors import InputError
from .family import Family, Inputs, Text


LONGEST_PROMPT = 512  # tokens, as the pipelines cut
USUAL_PROMPT = 64  # in predictions of memory
PLAIN, HOOKS = "plain_tokenizer", "output_hooks"  # attributes of a pipeline that was taught words


class LanguageFamily(Family):
    """A family of a flow-matching transformer with a Qwen3 as its only text encoder."""

    denoiser = "transformer"
    compiles = False
    scheduler = FlowMatchEulerDiscreteScheduler
    tokenizer_kind = "Qwen"
    expands_words = False
    learns_output = True
    packs = True  # whether prompts have lengths of their own; if not, they are padded to the longest that can be
    thinks = True  # `enable_thinking` of the chat's template
    layers_read: tuple  # numbers among the hidden states, the embeddings' being 0; from the end where negative

    # -------------------------------------------------------------------------------------------------------- the text

    def read_tokenizer(self, folder):
        """Qwen's tokenizer, which pads on the right, up to `LONGEST_PROMPT` tokens."""
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if tokenizer.pad_token_id is None:
            raise ValueError("tokenizer_config.json names no pad_token")
        if not tokenizer.chat_template:
            raise ValueError("it has no chat_template")
        tokenizer.padding_side, tokenizer.model_max_length = "right", LONGEST_PROMPT
        self.tokenize([tokenizer], ["a photo"])
        return tokenizer

    def tokenize(self, tokenizers, texts):
        """Chats as ids, padded to the longest of these texts; the last ones of a row are its padding."""
        (tokenizer,) = tokenizers
        how = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": self.thinks}
        chats = [tokenizer.apply_chat_template([{"role": "user", "content": text}], **how) for text in texts]
        limit = {"padding": True if self.packs else "max_length", "truncation": True, "max_length": LONGEST_PROMPT}
        return tokenizer(chats, return_tensors="pt", **limit).input_ids

    def encode(self, encoders, ids):
        (encoder,) = encoders
        lengths = lengths_of(ids, encoder.config.pad_token_id)
        longest = max(lengths) if self.packs else ids.shape[1]
        mask = {"full_attention": None}  # which is causal, and looks at no values
        if min(lengths) < longest:
            mask = torch.arange(longest, device=ids.device) < torch.tensor(lengths, device=ids.device)[:, None]
        given = {"input_ids": ids[:, :longest], "attention_mask": mask, "use_cache": False}
        states = encoder(**given, output_hidden_states=True).hidden_states
        return Text(self.joined([states[number] for number in self.layers_read]), lengths=lengths)

    def output_width(self, base):
        return base.text_config.hidden_size * len(self.layers_read)

    def text_of(self, states, ids, padding):
        lengths = lengths_of(ids, padding)
        return Text(states[:, : max(lengths)] if self.packs else states, lengths=lengths)

    def encoded_prompts(self, text):
        rows = zip(text.states, text.lengths)
        prompt, negative = ([states[:length]] if self.packs else states[None] for states, length in rows)
        return {"prompt_embeds": prompt, "negative_prompt_embeds": negative}

    def joined(self, states):
        """The states of the layers that are read, each `[b, L, d]`, as the denoiser takes them."""
        (only,) = states
        return only

    def skip_unread(self, component, model):
        """The layers after the last one that is read go, and states pass through where they were.

        A pipeline that asks for the states of a layer by its number finds them as before.
        """
        if component in self.text_encoders:
            last = max(number % (len(model.layers) + 1) for number in self.layers_read)
            for layer in model.layers[last:]:
                for name, _ in list(layer.named_children()):
                    delattr(layer, name)
                layer.forward = lambda states, *given, **named: states
        return model

    def check(self, base):
        faults = list(self.faults(base))
        if faults:
            raise InputError(f"{base.source.label} {faults[0]}.")
        # Qwen's own config does not say what prompts are padded with, its tokenizer does.
        base.text_config.pad_token_id = base.tokenizer.pad_token_id

    def faults(self, base):
        """What is wrong with the configs of a `Base`, ends of sentences."""
        raise NotImplementedError

    # --------------------------------------------------------------------------------------------- words in pipelines

    def load_word(self, pipeline, token, parts):
        """Rows of the token table take the vectors; their names take the space before them along."""
        vectors, *outputs = parts.values()
        if not hasattr(pipeline, PLAIN):
            setattr(pipeline, PLAIN, pipeline.tokenizer)
        tokenizer = copy.deepcopy(pipeline.tokenizer)
        names = [token, *(f"{token}_{i}" for i in range(1, len(vectors)))]
        tokenizer.add_tokens([AddedToken(name, lstrip=True) for name in names])
        ids = tokenizer.convert_tokens_to_ids(names)
        encoder = pipeline.text_encoder
        if max(ids) >= encoder.get_input_embeddings().num_embeddings:
            encoder.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        table = encoder.get_input_embeddings().weight
        with torch.no_grad():
            table[ids] = vectors.to(table)
        pipeline.tokenizer = tokenizer
        for said in outputs:
            pipeline.__dict__.setdefault(HOOKS, []).append(replace_output(encoder, ids[0], said, self.layers_read))

    def unload_words(self, pipeline):
        """The plain tokenizer comes back, which finds no row of a word."""
        pipeline.tokenizer = pipeline.__dict__.pop(PLAIN, pipeline.tokenizer)
        for hook in pipeline.__dict__.pop(HOOKS, []):
            hook.remove()

    # ---------------------------------------------------------------------------------------- pictures and predictions

    def open_scheduler(self, config):
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
        levels, count = scheduler.sigmas, scheduler.config.num_train_timesteps
        if type(count) is not int or len(levels) != count or not bool(((levels > 0) & (levels <= 1)).all()):
            raise ValueError("its noise levels lie outside (0, 1]")
        if scheduler.config.invert_sigmas or not bool((levels.diff() < 0).all()):
            raise ValueError("its noise levels do not fall")
        return scheduler

    def sampler(self, scheduler):
        return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)

    def image_shift(self, latents, config):
        """μ, by which the noise levels shift with the size of latents `[b, C, h, w]` where the scheduler says so."""
        raise NotImplementedError

    def tell_timesteps(self, timesteps, latents, scheduler):
        """1000 σ, shifted as the scheduler says; PUTS draws the numbers of these levels in diffusers' trainers' grid.

        Whole numbers 0 to 999 are even steps before the shift.
        """
        levels, count = scheduler.sigmas, scheduler.config.num_train_timesteps
        if scheduler.config.use_dynamic_shifting:
            levels = scheduler.time_shift(self.image_shift(latents, scheduler.config), 1.0, levels)
        return (levels * count)[count - 1 - timesteps]

    def noise(self, latents, noise, timesteps, scheduler):
        """x_σ = (1 - σ) x + σ ε, where noise flows from is ε - x; timesteps are 1000 σ, see `tell_timesteps`."""
        sigmas = (timesteps / scheduler.config.num_train_timesteps).view(-1, 1, 1, 1)
        return (1.0 - sigmas) * latents + sigmas * noise, noise - latents

    def example(self, base, count, resolution, device="cpu", dtype=torch.float32):
        made, side = {"device": device, "dtype": dtype}, resolution // base.vae_factor
        noisy = torch.zeros(count, self.latent_channels(base), side, side, **made)
        length = USUAL_PROMPT if self.packs else LONGEST_PROMPT
        states = torch.zeros(count, length, self.output_width(base), **made)
        text = Text(states, lengths=(length,) * count)
        return Inputs(noisy, torch.zeros(count, device=device), text, torch.zeros(count, 0, device=device))

    def latent_channels(self, base):
        return base.denoiser_config["in_channels"]


def replace_output(encoder, first_id, said, layers):
    """Has a language model say the same of a word from here on, whatever the prompt; returns the hook.

    Args:
        encoder: whose `hidden_states` are read.
        first_id: of the word's k consecutive ids.
        said: `[k, d]`, of several layers side by side.
        layers: their numbers.
    """

    def hook(module, given, named, output):
        ids, states = named["input_ids"], list(output.hidden_states)
        numbers, is_word = (ids - first_id).clamp(0, len(said) - 1), (ids >= first_id) & (ids < first_id + len(said))
        for layer, part in zip(layers, said.chunk(len(layers), dim=-1)):
            states[layer] = torch.where(is_word[..., None], part.to(states[layer])[numbers], states[layer])
        output.hidden_states = tuple(states)

    return encoder.register_forward_hook(hook, with_kwargs=True)


def lengths_of(ids, padding):
    """Tokens of each prompt in ids `[b, L]`, those at the end that pad left out; all of them on the meta device."""
    if ids.is_meta:
        return (ids.shape[1],) * len(ids)
    text = ids != padding
    places = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    return tuple((text * places).amax(dim=1).tolist())
