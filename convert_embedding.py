#!/usr/bin/env python
# Copyright 2026 The ZOODiP textual inversion authors. SPDX-License-Identifier: Apache-2.0
#
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.11", "diffusers>=0.42.1", "transformers>=5.23", "accelerate>=1.15", "peft>=0.21",
#     "huggingface_hub>=2.4", "datasets>=5.2", "safetensors>=0.8", "bitsandbytes>=0.50", "psutil>=7.2", "Jinja2>=3.1",
#     "matplotlib>=3.10", "numpy>=2.0", "pillow>=12.0", "tensorboard>=2.21", "tqdm>=4.66",
# ]
# ///
"""Say what is in embedding files (textual inversion), of whatever program, and write them as another one reads them.

    python convert_embedding.py --files my-dog.pt                                      # what is in it
    python convert_embedding.py --files my-dog.pt --to diffusers --output_dir converted
    python convert_embedding.py --files half_1.safetensors half_2.safetensors --to comfyui --name my-dog
    python convert_embedding.py --files a.safetensors b.safetensors --join --name my-pair --to kohya

Nothing is ever unpickled but plain tensors. docs/share.md has the table of all forms.
"""

import personalization.quick_help  # noqa: F401, before the libraries that take seconds
import personalization.quiet  # noqa: F401, before the libraries whose false alarms it silences


# isort: split
from pathlib import Path

import torch

from personalization import flags
from personalization.errors import InputError, plain, quoted, run_script
from personalization.files import check_writable
from personalization.models import base_model, embedding_files, families


NEAREST = 5  # words of the vocabulary that are shown beside a vector


def make_parser():
    """The parser, with every flag."""
    parser = flags.new_parser(
        __file__,
        "Inspect embedding files of any program, and convert them between diffusers, Automatic1111, ComfyUI, kohya's"
        " scripts and OneTrainer.",
        "%(prog)s --files FILE [FILE ...] [--to FORM] [options]",
    )
    add = flags.group(parser, "files")
    given = "Embedding files, or folders of runs."
    add("--files", nargs="+", required=True, path=True, metavar="FILE", help=given)
    add("--to", choices=embedding_files.FORMS, help="Form to write. Default: nothing is written.")
    add("--output_dir", default=".", path=True, help="Folder that is written to; no file there is overwritten.")
    add("--name", help="Name of the concept and of its file, where there is one. Default: the file's own.")
    add("--join", action="store_true", help="Make one concept of all, their vectors one after the other.")
    add("--split", action="store_true", help="Write every concept into a file of its own.")
    add = flags.group(parser, "beside a base model")
    base = "Base model, a folder, a file or a model id on the Hub, whose nearest words and usual norms are shown."
    add("--pretrained_model_name_or_path", path=flags.OR_NAME, help=base)
    add("--revision", help="Branch, tag or commit of the model on the Hub.")
    add("--variant", help='Variant of the weight files, such as "fp16".')
    add("--tokenizer_name", path=flags.OR_NAME, help="Tokenizer folder or id, if not the model's own.")
    return parser


def parse_args(input_args=None):
    """Parses and checks the command line (of the process, or a list of strings); bad input exits with code 2."""
    parser = make_parser()
    args = flags.parse(parser, input_args)
    if args.join and (args.split or not args.name):
        parser.error("--join makes one concept: give it a --name, and drop --split.")
    return args


def tables_of(args):
    """Encoder (`embedding_files.ONE` for the only one) -> (tokenizer, token table) of the base; {} without one."""
    if args.pretrained_model_name_or_path is None:
        return {}
    source = base_model.ModelSource(args.pretrained_model_name_or_path, args.revision, args.variant)
    base = base_model.open_base(source, args.tokenizer_name, families.FAMILIES.values())
    tables = base_model.load_token_tables(base)
    return dict(zip(base.word_parts or [embedding_files.ONE], zip(base.tokenizers, tables)))


def describe(word, tables):
    """What is in a `Word`, as lines."""
    of_file = f"{plain(word.name)}: form {word.form}, {word.num_vectors} vectors, fits {word.family}"
    lines = [of_file]
    for encoder, vectors in word.parts.items():
        norms = " ".join(f"{norm:.3f}" for norm in vectors.norm(dim=1))
        lines.append(f"  {encoder or 'text encoder'} {list(vectors.shape)}: norms {norms}")
        found = tables.get(encoder) or (next(iter(tables.values())) if len(tables) == 1 == len(word.parts) else None)
        if found is None:
            continue
        tokenizer, table = found
        if table.shape[1] != vectors.shape[1]:
            lines.append(f"    the base model's words have {table.shape[1]} entries: it does not fit")
            continue
        table = table.float()
        usual = table.norm(dim=1)
        low, middle, high = usual.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
        norms = f"median norm {middle:.3f}, nine of ten from {low:.3f} to {high:.3f}"
        lines.append(f"    words of the vocabulary: {norms}")
        alike = torch.nn.functional.normalize(vectors) @ torch.nn.functional.normalize(table).T
        for number, row in enumerate(alike, start=1):
            best = row.topk(min(NEAREST, len(row)))
            words = (f"{tokenizer.decode([int(i)])!r} {score:.2f}" for score, i in zip(best.values, best.indices))
            lines.append(f"    vector {number} is nearest to {', '.join(words)}")
    for encoder, vectors in word.outputs.items():
        kept = "replaces an encoder's output, for which other forms have no place"
        lines.append(f"  {encoder or 'text encoder'}_out {list(vectors.shape)} {kept}")
    return lines


def convert(words, args):
    """Writes the words; returns the paths."""
    if args.join:
        words = [embedding_files.joined(words, args.name)]
    elif args.name and len(words) == 1:
        words = [words[0]._replace(name=args.name)]
    twice = {word.name for word in words if sum(other.name == word.name for other in words) > 1}
    if twice:
        raise InputError(f"two concepts are called {quoted(min(twice))}: convert one with another --name first.")
    one_file = args.to == "diffusers" and not args.split
    groups = [words] if one_file else [[word] for word in words]
    check_writable("--output_dir", args.output_dir)
    files = {}
    for group in groups:
        stem = embedding_files.file_stem(args.name if args.name and len(groups) == 1 else group[0].name)
        for name, content in embedding_files.files_of(group, args.to, stem).items():
            files[Path(args.output_dir) / name] = content, group[0].name
    for path in files:
        if path.exists():
            raise InputError(f"{quoted(path, 300)} is there already: give another --output_dir or --name.")
    for path, (content, name) in files.items():
        embedding_files.write(path, content, name)
    return list(files)


def main(args):
    read = [embedding_files.read_words(path, quoted(path, 300)) for path in args.files]
    words, tables = embedding_files.paired([word for each in read for word in each]), tables_of(args)
    for word in words:
        print("\n".join(describe(word, tables)))
    if args.to:
        for path in convert(words, args):
            print(f"Wrote {path}")


if __name__ == "__main__":
    run_script(lambda: main(parse_args()), __file__)
