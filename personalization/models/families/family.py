"""The contract of a family: all that the house asks of a kind of model, in verbs that nobody else spells out.

A family is one file that subclasses `Family` (or `clip.ClipFamily`, where the text encoders are CLIP's) and one line
in the registry. It is the only caller of the denoiser, and the only one who says how latents are noised and what the
denoiser is to predict. It holds no weights and draws no random numbers: the order of draws is the trainers' (latents,
caption, timestep, noise), whatever the model.

Where a model has several text encoders, a word is a row of each: they lie side by side, `[k, d1 + d2]`, and so do the
ids of a prompt, `[b, n·L]`, each encoder's in a part of the same length. All of a model's tokenizers have the same
vocabulary. So the algorithm sees one vector and one prompt, whatever the family.
"""

import inspect
from typing import NamedTuple

import torch

from ..stacked import Dual


class Text(NamedTuple):
    """Encoded prompts, as a denoiser takes them."""

    states: torch.Tensor  # [b, L, d]
    pooled: torch.Tensor | None = None  # [b, p]; None where the denoiser is not given it
    lengths: tuple | None = None  # b: of each prompt, the states that are text; None: all of them


class Inputs(NamedTuple):
    """The arguments of `Family.predict` that follow the denoiser."""

    noisy: torch.Tensor  # [b, C, h, w]
    timesteps: torch.Tensor  # [b], see `Family.tell_timesteps`
    text: Text
    sizes: torch.Tensor  # [b, 6], see `examples.describe_sizes`; [b, 0] where the denoiser is not told


class Call(NamedTuple):
    """A call of a denoiser, by whomever: `Family.predict`, or a pipeline of diffusers.

    So an engine can stand in for the denoiser of any family.
    """

    kind: type  # of the denoiser
    given: tuple
    named: dict

    def arguments(self):
        """Name -> argument, as and in the order in which the denoiser's class declares them."""
        bound = inspect.signature(self.kind.forward).bind(None, *self.given, **self.named).arguments
        return dict(list(bound.items())[1:])  # without self

    def tensors(self):
        """Name -> tensor, in the same order; one in a dict is called "argument.key"."""
        found = {}
        for name, value in self.arguments().items():
            parts = value if isinstance(value, dict) else {None: value}
            parts = {name if key is None else f"{name}.{key}": part for key, part in parts.items()}
            found |= {each: part for each, part in parts.items() if isinstance(part, (torch.Tensor, Dual))}
        return found


class Replay(torch.nn.Module):
    """A denoiser as a function of tensors alone, those of a `Call`: takes `Call.tensors`, returns the prediction."""

    def __init__(self, denoiser, call):
        super().__init__()
        self.denoiser, self.arguments = denoiser, call.arguments()

    def forward(self, *tensors):
        tensors = iter(tensors)

        def filled(value):
            if isinstance(value, dict):
                return {key: filled(part) for key, part in value.items()}
            return next(tensors) if isinstance(value, torch.Tensor) else value

        return self.denoiser(**filled(self.arguments))[0]


class Family:
    """A kind of model.

    A base in diffusers format has a folder for each component. The name of the folder is also the component's name in
    model_index.json, its keyword of the pipeline, and its name in a run's config; so it is its name here.
    """

    # What it is called: in configs and caches, in sentences, and as a tag of a model card.
    name: str
    label: str
    tag: str

    # The components.
    denoiser = "unet"
    text_encoders = ("text_encoder",)
    tokenizers = ("tokenizer",)
    classes: dict  # component -> class
    scheduler: type  # of training's noise levels
    compiles = True  # whether other engines and compilers take its denoiser: a function of tensors of fixed shapes

    # How images are drawn with it, by diffusers; and the file beside the scripts that travels with a concept, if any.
    pipeline: type
    pipeline_options: dict = {}
    pipeline_file: str | None = None
    expands_words = True  # whether the pipeline itself writes all vectors of a word where a prompt names it

    # How a word is saved: under the placeholder, or in as many parts as there are text encoders, under these keys.
    word_keys: tuple = ()
    a1111 = False  # whether Automatic1111 reads a word as the `.pt` of its own
    learns_output = False  # whether a word can stand in what the text encoder puts out; then it has `output_width`

    # Peculiarities of the data.
    vae_in_float32 = False  # while it encodes
    crops = False  # pictures are cropped, never squeezed, and the denoiser is told where
    stacks = False  # its code computes exact derivatives beside a value, see `models.stacked`
    pools = False  # the denoiser is given pooled text, which can be pooled at the end of the prompt

    # Settings where the user gives none, see `defaults`.
    timestep_window: tuple  # (T_L, T_U) of PUTS
    settings_of_optimizer: dict = {}  # optimizer -> further settings
    settings_of_lora: dict = {}

    @property
    def components(self):
        """Names of all components with weights, the denoiser first and the VAE last."""
        return (self.denoiser, *self.text_encoders, "vae")

    @property
    def denoiser_label(self):
        """The denoiser in sentences and tables."""
        return "UNet" if self.denoiser == "unet" else self.denoiser

    @property
    def mark(self):
        """What tells a base of it from others, as the end of a sentence about one that a script cannot serve."""
        return f"is a model of the kind {self.label}"

    def defaults(self, optimizer):
        """The settings that follow from the family, where the user gives none: name -> value."""
        low, high = self.timestep_window
        shared = {"puts_min_timestep": low, "puts_max_timestep": high}
        return shared | self.settings_of_optimizer.get(optimizer, {})

    # ---------------------------------------------------------------------------------------------- recognising a base

    def recognises(self, index, configs):
        """Whether a base is of this family.

        Args:
            index: content of its model_index.json.
            configs: component -> content of its config.json, read when it is asked for.

        Raises:
            InputError: a config that it asks for is missing or damaged.
        """
        raise NotImplementedError

    def fault(self, index):
        """What is wrong with a base of this family by its model_index.json alone, the end of a sentence, or None."""
        return None

    def check(self, base):
        """Makes sure that the configs of a `Base` describe a model that can be trained.

        What has a sentence of its own; that the parts compute together is shown with empty ones, by `open_base`.

        Raises:
            InputError: they do not.
        """

    def open_scheduler(self, config):
        """The scheduler with the noise levels of training.

        Raises:
            ValueError: the config describes none.
        """
        return self.scheduler.from_config(config)

    def sampler(self, scheduler):
        """The scheduler that images are drawn with."""
        return scheduler

    def latent_multiple(self, config):
        """What divides the side of all latents that a denoiser with this config takes."""
        raise NotImplementedError

    # -------------------------------------------------------------------------------------------------------- the text

    tokenizer_kind: str  # of which model its tokenizers are, in sentences

    def read_tokenizer(self, folder):
        """The tokenizer in a folder.

        Raises:
            Exception: there is none, or it is damaged; the message is a reason in some words.
        """
        raise NotImplementedError

    def tokenize(self, tokenizers, texts):
        """Prompt ids `[len(texts), n·L]`, padded and cut as the text encoders want them."""
        raise NotImplementedError

    def encode(self, encoders, ids):
        """`Text` of prompt ids `[b, n·L]`, by the text encoders."""
        raise NotImplementedError

    def output_width(self, base):
        """Entries of a state of `encode`, for a `Base` of this family."""
        raise NotImplementedError(f"a word of {self.label} stands in prompts alone")

    def text_of(self, states, ids, padding):
        """`Text` of prompts with ids `[b, L]` that are encoded already: states `[b, L, d]`, and the id of padding."""
        raise NotImplementedError(f"{self.label} encodes its prompts")

    def encoded_prompts(self, text):
        """The keywords by which the pipeline takes a prompt and a negative one, both rows of a `Text`."""
        raise NotImplementedError(f"{self.label} encodes its prompts")

    def skip_unread(self, component, model):
        """Takes out of an empty component, in place, what `encode` does not read; returns it."""
        return model

    def load_word(self, pipeline, token, parts):
        """Teaches the family's pipeline of plain diffusers a word.

        Args:
            token: its name.
            parts: key -> vectors `[k, d]`, one for each text encoder in their order; then those of outputs, if any.
        """
        (vectors,) = parts.values()
        pipeline.load_textual_inversion({token: vectors})

    def unload_words(self, pipeline):
        """Takes all learned words away from a pipeline again."""
        pipeline.unload_textual_inversion()

    def pool_at_end(self, encoders, tokenizers):
        """Pools text at the end of the prompt from here on, as programs other than diffusers do."""
        raise NotImplementedError(f"{self.label} has no pooled text")

    # ---------------------------------------------------------------------------------------- pictures and predictions

    def vae_facts(self, vae, config):
        """What `to_latents` must know of a VAE: its config, and whatever else is among its weights."""
        return config

    def to_latents(self, sample, vae_config):
        """A sample of the VAE as the denoiser knows it: shifted, where the VAE says so, and scaled."""
        shift = vae_config.get("shift_factor")
        return (sample if shift is None else sample - shift) * vae_config["scaling_factor"]

    def tell_timesteps(self, timesteps, latents, scheduler):
        """Timesteps as the denoiser is told them `[b]`: those drawn, whole numbers `[b]`, unless a family says else.

        Args:
            timesteps: below the scheduler's num_train_timesteps; 0 is nearly clean.
            latents: `[b, C, h, w]`, which are to be noised.
            scheduler: what `open_scheduler` returned.
        """
        return timesteps

    def noise(self, latents, noise, timesteps, scheduler):
        """Latents noised to timesteps, and what the denoiser is to predict of them.

        Args:
            latents, noise: `[b, C, h, w]`.
            timesteps: `[b]`, what `tell_timesteps` returned.
            scheduler: what `open_scheduler` returned.

        Returns:
            Noisy latents and target, both `[b, C, h, w]`.
        """
        raise NotImplementedError

    def predict(self, denoiser, noisy, timesteps, text, sizes):
        """The denoiser's prediction `[b, C, h, w]`, which is compared with `noise`'s target; arguments as `Inputs`."""
        raise NotImplementedError

    def example(self, base, count, resolution, device="cpu", dtype=torch.float32):
        """`Inputs` of zeros, as for `count` pictures of `resolution` px.

        The fit of the parts, the memory of a run and exports are found with them, on the meta device at no cost.
        """
        raise NotImplementedError

    def call(self, inputs):
        """The `Call` by which `predict` has a prediction of `Inputs`."""
        calls = []

        def denoiser(*given, **named):
            calls.append(Call(self.classes[self.denoiser], given, named))
            return (torch.zeros_like(inputs.noisy),)

        self.predict(denoiser, *inputs)
        return calls[0]


class TextEncoders(torch.nn.Module):
    """The text encoders of a base as one module: prompt ids `[b, n·L]` in, `Text` out.

    Args:
        family: `Family`.
        encoders: one for each of its `text_encoders`, in that order.
    """

    standing = None  # see `encoded.EncodedPrompts`

    def __init__(self, family, encoders):
        super().__init__()
        self.family, self.encoders = family, torch.nn.ModuleList(encoders)

    def forward(self, ids):
        return self.family.encode(self.encoders, ids)

    def get_tables(self):
        """The token rows of each encoder."""
        return [encoder.get_input_embeddings() for encoder in self.encoders]

    def set_tables(self, tables):
        """Gives each encoder a module in the place of its token rows."""
        for encoder, table in zip(self.encoders, tables):
            encoder.set_input_embeddings(table)

    def get_input_embeddings(self):
        """The token rows of the only encoder, or `SideBySide` those of all."""
        tables = self.get_tables()
        return tables[0] if len(tables) == 1 else SideBySide(tables)

    def set_input_embeddings(self, rows):
        """Gives all encoders the same module in the place of their token rows."""
        for encoder in self.encoders:
            encoder.set_input_embeddings(rows)


class SideBySide:
    """The token rows of several text encoders, seen as one table.

    Args:
        tables: the script's `PromptRows` of each.
    """

    def __init__(self, tables):
        self.tables = tables

    def write(self, candidates):
        """Puts candidates `[m, k, d1 + d2]` into the placeholder's rows of all."""
        widths = [table.weight.shape[1] for table in self.tables]
        for table, part in zip(self.tables, candidates.split(widths, dim=-1)):
            table.write(part)

    def check(self, ids):
        """Raises an `IndexError` for ids `[b, n·L]` without a row."""
        for table, part in zip(self.tables, ids.chunk(len(self.tables), dim=-1)):
            table.check(part)
