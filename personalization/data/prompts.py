"""The new word and its prompts: captions or templates as token ids."""

import re
from typing import NamedTuple

import torch
from tokenizers import AddedToken

from ..errors import InputError, plain, quoted
from ..logs import get_logger
from .captions import MARKS, check_unicode, whole_word


logger = get_logger(__name__)

OBJECT_TEMPLATES = [
    f"{words} {{}}"
    for words in (
        "a photo of a|a rendering of a|a cropped photo of the|the photo of a|a photo of a clean|a photo of a dirty|"
        "a dark photo of the|a photo of my|a photo of the cool|a close-up photo of a|a bright photo of the|"
        "a cropped photo of a|a photo of the|a good photo of the|a photo of one|a close-up photo of the|"
        "a rendition of the|a photo of the clean|a rendition of a|a photo of a nice|a good photo of a|"
        "a photo of the nice|a photo of the small|a photo of the weird|a photo of the large|a photo of a cool|"
        "a photo of a small"
    ).split("|")
]
STYLE_TEMPLATES = [
    f"{words} in the style of {{}}"
    for words in (
        "a painting|a rendering|a cropped painting|the painting|a clean painting|a dirty painting|a dark painting|"
        "a picture|a cool painting|a close-up painting|a bright painting|a good painting|a rendition|a nice painting|"
        "a small painting|a weird painting|a large painting"
    ).split("|")
]


class Placeholder(NamedTuple):
    """The new word."""

    token: str  # such as "<my-dog>"
    num_vectors: int  # k
    first_id: int  # of its k consecutive token ids
    initializer_id: int | None  # of the word that it starts from
    class_word: str | None = None  # that word
    start: torch.Tensor | None = None  # its first vectors, float32 [k, d], where it starts from a file instead

    @property
    def names(self):
        return placeholder_names(self.token, self.num_vectors)

    def fill(self, text):
        """`text` with the placeholder where it says {}."""
        return text.replace("{}", self.token)

    def is_in(self, text):
        """Whether `text` names it, as the tokenizer reads it."""
        return re.search(re.escape(self.token), text, re.IGNORECASE) is not None

    def expand(self, text):
        """`text` with all vectors of the placeholder where it says {} or names it."""
        names = " ".join(self.names)
        return re.sub(re.escape(self.token), lambda _: names, self.fill(text), flags=re.IGNORECASE)


def placeholder_names(token, num_vectors):
    """The names diffusers gives the vectors of a multi-vector token: tok, tok_1, tok_2, ..."""
    return [token] + [f"{token}_{i}" for i in range(1, num_vectors)]


def normalized(tokenizer, text):
    """Text as the tokenizer reads it: CLIP's knows no capitals."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    return text if normalizer is None else normalizer.normalize_str(text)


def as_tokenized(tokenizer, token):
    """A word as the tokenizer reads it, which is the name that is trained and saved.

    Programs that compare names as they were typed would not find it otherwise, or all vectors but the first.
    """
    name = normalized(tokenizer, token)
    if name != token:
        logger.warning(f"--placeholder_token {token!r} is {name!r} to the tokenizer: it is learned under that name.")
    return name


QUOTES = "'\"`´‘’‚‛“”„‟«»‹›"


def check_quotes(text, flag):
    """Refuses a word that still has its quotes around it, which were meant for the shell.

    Raises:
        InputError: it has; the sentence names the word that was meant.
    """
    if len(text) > 2 and text[0] in QUOTES and text[-1] in QUOTES and (meant := text.strip(QUOTES)):
        raise InputError(f"{flag} {quoted(text)} has quotes around it, which became part of it: give {quoted(meant)}.")


def add_placeholder(tokenizer, token, num_vectors, initializer_token, partners=()):
    """Adds the new word's k names to the tokenizer, and to its partners, which have the same vocabulary.

    Returns:
        `Placeholder`.

    Raises:
        InputError: the token is not one visible word, a name is taken, no prompt could hold all vectors, or the
            initializer is not one known token.
    """
    if not token or " " in token or not token.isprintable() or "{}" in token:
        raise InputError(
            f"--placeholder_token {quoted(token)} must be one word without spaces or invisible characters, such as"
            ' "<my-dog>".'
        )
    for text, flag in ((token, "--placeholder_token"), (initializer_token or "", "--initializer_token")):
        check_quotes(text, flag)
    room = words_in_prompt(tokenizer)
    if num_vectors > room:
        raise InputError(
            f"--num_vectors {num_vectors} does not fit into a prompt, which takes {room} tokens: give fewer."
        )
    vocabulary = tokenizer.get_vocab()
    for word in placeholder_names(token, num_vectors):
        if word in vocabulary or f"{word.lower()}</w>" in vocabulary:
            raise InputError(
                f"--placeholder_token {token!r}: {word!r} is already in the vocabulary of the tokenizer: choose a new"
                f' word, such as "<my-{token.strip("<>").lower()}>".'
            )
    if token != token.lower() or not (token.startswith("<") and token.endswith(">")):
        logger.warning(
            f"--placeholder_token {token!r} is upper-case or without <>: it can match inside other words, and many"
            f' readers lower-case it; "<{token.strip("<>").lower()}>" is safe.'
        )
    initializer_id = None if initializer_token is None else id_of_word(tokenizer, initializer_token)
    for each in (tokenizer, *partners):
        # With the space before them, which tokenizers other than CLIP's would keep as a token of its own.
        each.add_tokens([AddedToken(name, lstrip=True) for name in placeholder_names(token, num_vectors)])
    return Placeholder(token, num_vectors, tokenizer.convert_tokens_to_ids(token), initializer_id, initializer_token)


def id_of_word(tokenizer, initializer_token):
    """The id of `--initializer_token`; raises an `InputError` unless it is one known token."""
    check_unicode(initializer_token, "--initializer_token")
    initializer = tokenizer.encode(f" {initializer_token}", add_special_tokens=False)  # as it stands in a sentence
    if len(initializer) != 1:
        raise InputError(
            f"--initializer_token {initializer_token!r} is {len(initializer)} tokens and must be one: choose a"
            " simpler word for the same kind of thing."
        )
    if initializer[0] == tokenizer.unk_token_id and initializer_token != tokenizer.unk_token:
        raise InputError(
            f"--initializer_token {initializer_token!r} is unknown to the tokenizer: choose another word."
        )
    return initializer[0]


def words_in_prompt(tokenizer):
    """How many tokens a prompt has room for."""
    return tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()


def build_prompts(pictures, placeholder, base, learnable_property="object"):
    """Tokenizes the captions (or the templates, for pictures without one) with the placeholder's vectors in place.

    Args:
        pictures: `Picture`s.
        placeholder: `Placeholder`, known to the base's tokenizers.
        base: `Base`.
        learnable_property: "object" or "style", which templates.

    Returns:
        Prompt ids (see `Base.tokenize`) and, for each picture, the list of its rows.

    Raises:
        InputError: a caption has no placeholder, or is so long, or the vectors so many, that it is cut off.
    """
    templates = STYLE_TEMPLATES if learnable_property == "style" else OBJECT_TEMPLATES
    rows_of_text, prompts_of_image, of_templates = {}, [], {placeholder.expand(text) for text in templates}
    for picture in pictures:
        caption = picture.caption
        if caption is not None and "{}" not in caption and not placeholder.is_in(caption):
            raise InputError(
                f"the caption of {plain(picture.name)}, {quoted(caption)}, does not say where the concept goes: put"
                f" {{}} or {plain(placeholder.token)} there{or_replace(pictures, placeholder.class_word)}."
            )
        texts = [placeholder.expand(text) for text in (templates if caption is None else [caption])]
        prompts_of_image.append([rows_of_text.setdefault(text, len(rows_of_text)) for text in texts])
    prompt_ids, tokenizer = base.tokenize(rows_of_text), base.tokenizer
    vector_ids = torch.tensor(tokenizer.convert_tokens_to_ids(placeholder.names))
    for text, ids in zip(rows_of_text, prompt_ids):
        if not all(torch.isin(vector_ids, part).all() for part in ids.chunk(len(base.tokenizers))):
            raise cut_off(text, of_templates, placeholder, tokenizer)
    return prompt_ids, prompts_of_image


def or_replace(pictures, class_word):
    """The end of a sentence: the words that stand for the concept in captions without {}, to be replaced; or ""."""
    texts = [picture.caption.lower() for picture in pictures if picture.caption and "{}" not in picture.caption]
    known = [*(picture.class_words for picture in pictures), class_word]
    for word in filter(None, dict.fromkeys([*MARKS, *known])):
        found = sum(bool(whole_word(word).search(text)) for text in texts)
        if found:
            return f', or give --caption_token "{word}", which {found} of {len(texts)} such captions name'
    return ""


def cut_off(text, of_templates, placeholder, tokenizer):
    """The `InputError` for a prompt that does not hold all vectors of the placeholder; it names what is too long."""
    limit = f"the {tokenizer.model_max_length} tokens of the text encoder"
    if text in of_templates:
        others = (words.replace(" ".join(placeholder.names), "") for words in of_templates)
        most = max(len(tokenizer.encode(words, add_special_tokens=False)) for words in others)
        return InputError(
            f"--num_vectors {placeholder.num_vectors} does not fit into {limit} beside the other words of a prompt:"
            f" give at most {words_in_prompt(tokenizer) - most}."
        )
    or_fewer = f", or lower --num_vectors {placeholder.num_vectors}" if placeholder.num_vectors > 1 else ""
    return InputError(
        f"the caption {quoted(text)} is longer than {limit}, which cut off {plain(placeholder.token)}: shorten"
        f" it{or_fewer}."
    )
