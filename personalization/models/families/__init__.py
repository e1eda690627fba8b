"""The registry of families: the kinds of models that can be trained, each in a file of its own, see `family`."""

from ...errors import InputError
from .family import Call, Family, Inputs, Replay, SideBySide, Text, TextEncoders
from .flux2_klein import Flux2Klein
from .sdxl import StableDiffusionXL
from .stable_diffusion import StableDiffusion, StableDiffusion2
from .z_image import ZImage


__all__ = ["Call", "Family", "Inputs", "Replay", "SideBySide", "Text", "TextEncoders"]

SD1, SD2, SDXL = StableDiffusion(), StableDiffusion2(), StableDiffusionXL()
FAMILIES = {family.name: family for family in (SD1, SD2, SDXL, ZImage(), Flux2Klein())}


def recognise(index, configs, accepted, label):
    """The family of a base.

    Args:
        index: content of its model_index.json.
        configs: component -> content of its config.json, read when it is asked for.
        accepted: families that the caller can serve.
        label: the beginning of an error message.

    Raises:
        InputError: it is of none of them, or by the index alone it is no whole model.
    """
    family = next((family for family in FAMILIES.values() if family.recognises(index, configs)), None)
    if family not in accepted:
        mark = unknown_mark(index, accepted) if family is None else family.mark
        raise InputError(f"{label} {mark}; this script trains {names_of(accepted)}: choose one of those.")
    fault = family.fault(index)
    if fault is not None:
        raise InputError(f"{label} {fault}.")
    return family


def unknown_mark(index, accepted):
    """What can be said of a base of no known family, the end of a sentence."""
    other = next((name for name in ("transformer", "prior") if name in index), None)
    if other is not None and all(family.denoiser == "unet" for family in accepted):
        return f"has a {other} and no UNet"
    return f"is of a kind that is not known here, {str(index.get('_class_name'))[:80]!r}"


def names_of(families):
    """Families in a sentence: "Stable Diffusion 1.x, 2.x and XL"."""
    names, brand = [], None
    for family in families:
        of_family, _, version = family.label.rpartition(" ")
        names.append(version if of_family and of_family == brand else family.label)
        brand = of_family
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
