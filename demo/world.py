"""The procedural world of the demo: 64x64 renders of one toy-like shape before one background, with captions.

Everything is a function of a `numpy.random.Generator`, so that any render can be made again from its seed. Needs numpy
and PIL only. A contact sheet to look at::

    python demo/world.py --out world.png
"""

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter


RESOLUTION = 64
# Of the pose. The wide range trains a better autoencoder and text encoder; in the narrow one the mean of all renders
# of a shape is still that shape, so that a diffusion model learns shapes early, not after tens of thousands of steps.
JITTER, WIDE_JITTER = 0.4, 1.0
SUPERSAMPLING = 3  # the shape and pattern masks are drawn at 192x192 and averaged down: crisp, antialiased edges

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "moon")
COLOURS = {
    "red": (222, 28, 36),
    "orange": (255, 132, 0),
    "yellow": (255, 228, 30),
    "green": (36, 160, 48),
    "cyan": (60, 222, 226),
    "blue": (24, 66, 232),
    "purple": (124, 36, 176),
    "pink": (255, 128, 192),
    "brown": (112, 62, 24),
    "black": (24, 24, 26),
    "gray": (136, 136, 142),
    "white": (246, 246, 246),
}
PATTERNS = ("plain", "striped", "dotted", "checkered", "two-tone")
BACKGROUNDS = {
    "beach": "on the beach",
    "snow": "in the snow",
    "grass": "on the grass",
    "night sky": "in the night sky",
    "wooden floor": "on a wooden floor",
    "brick wall": "in front of a brick wall",
    "water": "in the water",
    "pink fabric": "on pink fabric",
}
COLOUR_NAMES, BACKGROUND_NAMES = tuple(COLOURS), tuple(BACKGROUNDS)


@dataclass(frozen=True)
class Scene:
    """What a caption can say of a render. `colour2 == colour` exactly where the pattern is plain."""

    shape: str
    colour: str
    colour2: str
    pattern: str
    background: str

    @property
    def subject(self):
        """(shape, colours as an unordered set, pattern): what must be the same for two renders to show one object."""
        return self.shape, frozenset((self.colour, self.colour2)), self.pattern


# Never rendered in training, in neither order of the colours: what a personalisation method is to learn.
SUBJECTS = {
    "striped_star": Scene("star", "red", "white", "striped", "beach"),
    "dotted_heart": Scene("heart", "blue", "yellow", "dotted", "beach"),
    "checkered_ring": Scene("ring", "green", "orange", "checkered", "beach"),
    "twotone_moon": Scene("moon", "purple", "yellow", "two-tone", "beach"),
    "striped_cross": Scene("cross", "black", "cyan", "striped", "beach"),
    "dotted_circle": Scene("circle", "red", "white", "dotted", "beach"),
    "checkered_square": Scene("square", "blue", "orange", "checkered", "beach"),
    "twotone_triangle": Scene("triangle", "green", "pink", "two-tone", "beach"),
    "plain_ring": Scene("ring", "purple", "purple", "plain", "beach"),
    "striped_heart": Scene("heart", "green", "white", "striped", "beach"),
}
HELD_OUT = frozenset(scene.subject for scene in SUBJECTS.values())

NOUNS = ("object", "object", "toy", "thing")  # what a caption calls a shape that it does not name

# "{}" takes the noun phrase without its article. The ImageNet templates of textual inversion are among them, so that a
# training script that uses those asks for nothing the base has not seen.
TEMPLATES = (
    *("a photo of a {}",) * 12,
    *("a picture of a {}",) * 4,
    *("an image of a {}",) * 2,
    *("a {}",) * 2,
    "a rendering of a {}",
    "a cropped photo of the {}",
    "the photo of a {}",
    "a photo of a clean {}",
    "a photo of a dirty {}",
    "a dark photo of the {}",
    "a photo of my {}",
    "a photo of the cool {}",
    "a close-up photo of a {}",
    "a bright photo of the {}",
    "a cropped photo of a {}",
    "a photo of the {}",
    "a good photo of the {}",
    "a photo of one {}",
    "a close-up photo of the {}",
    "a rendition of the {}",
    "a photo of the clean {}",
    "a rendition of a {}",
    "a photo of a nice {}",
    "a good photo of a {}",
    "a photo of the nice {}",
    "a photo of the small {}",
    "a photo of the weird {}",
    "a photo of the large {}",
    "a photo of a cool {}",
    "a photo of a small {}",
)


def fix_articles(text):
    """str -> str: "a orange ring" to "an orange ring", "an photo" never occurs."""
    return text.replace("a orange", "an orange")


def sample_scene(rng, held_out=False):
    """A scene drawn with `rng`, the patterns uniformly: never a held-out combination, or always one."""
    if held_out:
        scene = list(SUBJECTS.values())[rng.integers(len(SUBJECTS))]
        return replace(scene, background=BACKGROUND_NAMES[rng.integers(len(BACKGROUND_NAMES))])
    while True:
        pattern = PATTERNS[rng.integers(len(PATTERNS))]
        first, second = rng.choice(len(COLOUR_NAMES), 2, replace=False)
        scene = Scene(
            SHAPES[rng.integers(len(SHAPES))],
            COLOUR_NAMES[first],
            COLOUR_NAMES[first if pattern == "plain" else second],
            pattern,
            BACKGROUND_NAMES[rng.integers(len(BACKGROUND_NAMES))],
        )
        if scene.subject not in HELD_OUT:
            return scene


def describe(scene, colour=True, pattern=True, shape=True, background=True, plain_word=False, noun="object"):
    """The noun phrase of a scene without its article, e.g. "red and white striped star on the beach".

    An attribute that is False is left out; `noun` stands for a shape that is not told, and `plain_word` says whether
    a plain pattern is named at all.
    """
    words = []
    if colour:
        words.append(scene.colour if scene.pattern == "plain" else f"{scene.colour} and {scene.colour2}")
    if pattern and (scene.pattern != "plain" or plain_word):
        words.insert(0, "plain") if scene.pattern == "plain" else words.append(scene.pattern)
    words.append(scene.shape if shape else noun)
    if background:
        words.append(BACKGROUNDS[scene.background])
    return " ".join(words)


# (probability, colour, pattern, shape, background): which attributes a caption tells.
COMPLETENESS = (
    (0.56, True, True, True, True),
    (0.12, True, True, True, False),
    (0.06, True, False, True, True),
    (0.06, False, False, True, True),
    (0.05, False, True, True, True),
    (0.05, True, True, False, True),
    (0.03, False, False, True, False),
    (0.03, False, False, False, True),
    (0.04, True, True, False, False),
)


def caption(scene, rng, full=False, single=0.0, return_told=False):
    """A caption of varying completeness; with `return_told` also (colour, pattern, shape, background) as booleans.

    `full`: tell everything; `single`: with this probability tell one thing alone (shape, background or appearance).
    """
    if full:
        row = COMPLETENESS[0]
    elif single and rng.random() < single:
        row = COMPLETENESS[-3:][rng.integers(3)]
    else:
        row = COMPLETENESS[rng.choice(len(COMPLETENESS), p=[r[0] for r in COMPLETENESS])]
    plain_word = bool(rng.random() < 0.5)
    told = list(row[1:])
    if scene.pattern == "plain" and not plain_word:
        told[1] = False
    noun = NOUNS[rng.integers(len(NOUNS))]
    template = TEMPLATES[rng.integers(len(TEMPLATES))]
    text = fix_articles(template.format(describe(scene, *row[1:], plain_word=plain_word, noun=noun)))
    return (text, tuple(told)) if return_told else text


# ------------------------------------------------------------------------------------------------------------------
# Rendering
# ------------------------------------------------------------------------------------------------------------------


@lru_cache
def pixel_grid(size):
    """(x, y) of the pixel centres in units of the 64x64 image, each float32 (size, size)."""
    axis = ((np.arange(size, dtype=np.float32) + 0.5) * (RESOLUTION / size)).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    return x, y


def box_down(mask):
    """(3*64, 3*64) float32 -> (64, 64), the mean over each 3x3 block."""
    return mask.reshape(RESOLUTION, SUPERSAMPLING, RESOLUTION, SUPERSAMPLING).mean((1, 3))


def shape_mask(shape, u, v):
    """Where the shape is; u, v: object coordinates, the shape about within [-1, 1]^2, v pointing down."""
    if shape == "circle":
        return u * u + v * v < 0.95**2
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) < 0.84
    if shape == "triangle":
        return (v < 0.78) & (v + 1.0 > 1.78 / 0.98 * np.abs(u))
    if shape == "star":
        angle = np.arctan2(u, -v)
        sector = 2 * np.pi / 5
        folded = np.abs((angle + sector / 2) % sector - sector / 2)
        radius = np.sqrt(u * u + v * v)
        px, py = radius * np.cos(folded), radius * np.sin(folded)
        tip, inner = 1.12, 0.5
        ix, iy = inner * np.cos(sector / 2), inner * np.sin(sector / 2)
        return (ix - tip) * py - iy * (px - tip) > 0
    if shape == "heart":
        x, y = 1.15 * u, -1.15 * v + 0.12
        return (x * x + y * y - 1) ** 3 - x * x * y**3 < 0
    if shape == "ring":
        radius2 = u * u + v * v
        return (radius2 < 1) & (radius2 > 0.46**2)
    if shape == "cross":
        a, b = np.abs(u), np.abs(v)
        return (np.maximum(a, b) < 0.98) & (np.minimum(a, b) < 0.36)
    if shape == "moon":
        return ((u - 0.12) ** 2 + v * v < 1) & ((u - 0.62) ** 2 + (v + 0.12) ** 2 > 0.78**2)
    raise ValueError(f"unknown shape {shape!r}")


def pattern_mask(pattern, u, v):
    """Where the second colour is, in the same object coordinates as `shape_mask`."""
    if pattern == "plain":
        return np.zeros_like(u, dtype=bool)
    if pattern == "striped":
        return np.floor(v / 0.4 + 0.5) % 2 == 1
    if pattern == "dotted":
        pitch = 0.58
        du, dv = u / pitch, v / pitch
        return (du - np.round(du)) ** 2 + (dv - np.round(dv)) ** 2 < 0.33**2
    if pattern == "checkered":
        return (np.floor(u / 0.46) + np.floor(v / 0.46)) % 2 == 1
    if pattern == "two-tone":
        return u > 0
    raise ValueError(f"unknown pattern {pattern!r}")


def lerp(a, b, t):
    """Colours a, b (3,) and weights t (64, 64) -> (64, 64, 3)."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    return a + t[..., None] * (b - a)


def smoothstep(x, edge, width=1.0):
    """0 left of `edge`, 1 right of it, with a ramp of `width`."""
    return np.clip((x - edge) / width + 0.5, 0, 1)


def background_image(name, rng):
    """The background alone, float32 (64, 64, 3) in 0..255; smooth on purpose (white noise cannot be compressed)."""
    x, y = pixel_grid(RESOLUTION)
    phase = rng.uniform(0, 2 * np.pi, 4)
    if name == "beach":
        horizon = rng.uniform(16, 24)
        sea = horizon + rng.uniform(6, 9)
        image = lerp((120, 190, 245), (190, 228, 250), np.clip(y / horizon, 0, 1))
        image = image + smoothstep(y, horizon)[..., None] * (np.float32((36, 120, 196)) - image)
        shore = sea + 1.2 * np.sin(x / 9 + phase[0])
        sand = lerp((238, 214, 158), (218, 184, 124), np.clip((y - sea) / (64 - sea), 0, 1))
        sand = sand + 5 * np.sin(x / 7 + 0.6 * y + phase[1])[..., None]
        image = image + smoothstep(y, shore)[..., None] * (sand - image)
    elif name == "snow":
        image = lerp((198, 212, 232), (226, 234, 244), np.clip(y / 64, 0, 1))
        for k, base in enumerate(rng.uniform((18, 38), (28, 50))):
            ridge = base + 4 * np.sin(x / rng.uniform(9, 14) + phase[k])
            depth = np.clip((y - ridge) / 18, 0, 1)
            drift = lerp((248, 250, 253), (212, 222, 238), depth)
            image = image + smoothstep(y, ridge)[..., None] * (drift - image)
    elif name == "grass":
        horizon = rng.uniform(14, 22)
        image = lerp((140, 204, 250), (206, 234, 252), np.clip(y / horizon, 0, 1))
        field = lerp((104, 178, 62), (52, 124, 36), np.clip((y - horizon) / (64 - horizon), 0, 1))
        blades = np.sin(1.1 * x + 2.5 * np.sin(y / 5 + phase[0]) + phase[1]) * np.sin(y / 2.2 + x / 6 + phase[2])
        field = field * (1 + 0.12 * blades)[..., None]
        ridge = horizon + 1.0 * np.sin(x / 8 + phase[3])
        image = image + smoothstep(y, ridge)[..., None] * (field - image)
    elif name == "night sky":
        image = lerp((26, 26, 84), (66, 48, 126), np.clip(y / 64 + 0.15 * np.sin(x / 14 + phase[0]), 0, 1))
        count = int(rng.integers(12, 20))
        for sx, sy, size in rng.uniform((1, 1, 0.8), (63, 63, 1.5), (count, 3)):
            x0, y0 = int(max(sx - 4, 0)), int(max(sy - 4, 0))
            box = slice(y0, y0 + 9), slice(x0, x0 + 9)
            glow = np.exp(-((x[box] - sx) ** 2 + (y[box] - sy) ** 2) / (2 * (0.75 * size) ** 2))
            image[box] += glow[..., None] * (np.float32((250, 246, 226)) - image[box])
    elif name == "wooden floor":
        board, offset = rng.uniform(11, 14), rng.uniform(0, 14)
        index = np.floor((y + offset) / board)
        tone = 1 + 0.10 * np.sin(12.9 * index + phase[0])
        grain = 1 + 0.05 * np.sin((y + 1.6 * np.sin(x / 11 + phase[1] + 2 * index)) * 1.3)
        within = (y + offset) - index * board
        seam = np.clip(1.4 - np.minimum(within, board - within), 0, 1)
        joint = np.abs((x + 23 * index + 7 * phase[2]) % 46 - 23)
        seam = np.maximum(seam, np.clip(1.2 - joint, 0, 1))
        image = np.float32((184, 124, 70)) * (tone * grain * (1 - 0.5 * seam))[..., None]
    elif name == "brick wall":
        height, width = rng.uniform(9, 11), rng.uniform(19, 23)
        row = np.floor((y + 10 * phase[0]) / height)
        shifted = x + 20 * phase[1] + (row % 2) * width / 2
        column = np.floor(shifted / width)
        dy = (y + 10 * phase[0]) - row * height
        dx = shifted - column * width
        inside = np.clip(np.minimum(np.minimum(dy, height - dy), np.minimum(dx, width - dx)) - 0.5, 0, 1)
        tone = 1 + 0.11 * np.sin(7.3 * row + 3.1 * column + phase[2])
        brick = np.float32((168, 74, 56)) * tone[..., None]
        image = np.float32((206, 196, 184)) + inside[..., None] * (brick - np.float32((206, 196, 184)))
    elif name == "water":
        wave = np.sin((y + 2.2 * np.sin(x / 6.5 + phase[0])) * (2 * np.pi / rng.uniform(8, 11)) + phase[1])
        image = lerp((44, 130, 208), (16, 78, 158), np.clip(y / 64, 0, 1)) + 24 * wave[..., None] * np.float32(
            (0.6, 1, 1)
        )
    elif name == "pink fabric":
        angle = rng.uniform(0.5, 1.0)
        along = (x * np.cos(angle) + y * np.sin(angle)) / rng.uniform(3.0, 4.2)
        fold = np.sin(along + 0.7 * np.sin(x / 12 + phase[0]))
        image = np.float32((240, 164, 190)) + fold[..., None] * np.float32((14, 24, 22))
    else:
        raise ValueError(f"unknown background {name!r}")
    return image * np.float32(rng.uniform(0.95, 1.04))


def render(scene, rng, jitter=JITTER):
    """A render of `scene` in a pose, size, light and background drawn with `rng`: uint8 (64, 64, 3).

    `jitter` scales how far place (8 px), angle (22 degrees) and half-size (18.25 +- 2.75 px) range.
    """
    image = background_image(scene.background, rng)
    x, y = pixel_grid(RESOLUTION * SUPERSAMPLING)
    half = 18.25 + jitter * rng.uniform(-2.75, 2.75)
    cx, cy = 32 + jitter * rng.uniform(-1, 1, 2) * np.minimum(8, 31 - half)
    angle = np.deg2rad(jitter * rng.uniform(-22, 22))
    cos, sin = np.float32(np.cos(angle) / half), np.float32(np.sin(angle) / half)
    dx, dy = x - np.float32(cx), y - np.float32(cy)
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    inside = shape_mask(scene.shape, u, v)
    mask = box_down(inside.astype(np.float32))
    second = box_down((inside & pattern_mask(scene.pattern, u, v)).astype(np.float32))
    first, other = (
        np.clip(np.float32(COLOURS[name]) + rng.uniform(-8, 8, 3).astype(np.float32), 0, 255)
        for name in (scene.colour, scene.colour2)
    )

    shift = int(rng.integers(2, 4))
    shadow = np.zeros_like(mask)
    shadow[shift:, shift:] = mask[:-shift, :-shift]
    blurred = Image.fromarray((shadow * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1.8))
    strength = np.float32(rng.uniform(0.32, 0.45) / 255)
    image = image * (1 - strength * np.asarray(blurred, np.float32))[..., None]

    x64, y64 = pixel_grid(RESOLUTION)
    light = 1 - rng.uniform(0.10, 0.18) * ((x64 - cx) + (y64 - cy)) / (2 * half) * np.float32(1.0)
    light = light[..., None].astype(np.float32)
    image = image * (1 - mask)[..., None] + light * ((mask - second)[..., None] * first + second[..., None] * other)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


HELD_OUT_SEED = 50_000  # far from those of training, of the subjects' folders and of check_demo_base.py


def held_out_pictures(name, count):
    """`count` renders of a subject that nothing is trained on, the backgrounds in turn: (image, `Scene`) pairs.

    An image is uint8 (64, 64, 3).
    """
    rng = np.random.default_rng([HELD_OUT_SEED, list(SUBJECTS).index(name)])
    for i in range(count):
        scene = replace(SUBJECTS[name], background=BACKGROUND_NAMES[i % len(BACKGROUND_NAMES)])
        yield render(scene, rng), scene


def save_pictures(folder, pictures):
    """Writes (image, `Scene`) pairs into a folder, with captions that tell the background, as trainers read them."""
    lines = []
    for number, (image, scene) in enumerate(pictures):
        Image.fromarray(image).save(Path(folder) / f"{number}.png")
        text = f"a photo of a {{}} {BACKGROUNDS[scene.background]}"
        lines.append(json.dumps({"file_name": f"{number}.png", "text": text}))
    (Path(folder) / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def contact_sheet(images, columns=8, scale=2):
    """A list of uint8 (64, 64, 3) arrays -> one PIL image."""
    images = [np.asarray(image) for image in images]
    rows = -(-len(images) // columns)
    sheet = np.full((rows * RESOLUTION, columns * RESOLUTION, 3), 255, np.uint8)
    for i, image in enumerate(images):
        r, c = divmod(i, columns)
        sheet[r * RESOLUTION : (r + 1) * RESOLUTION, c * RESOLUTION : (c + 1) * RESOLUTION] = image
    return Image.fromarray(sheet).resize((sheet.shape[1] * scale, sheet.shape[0] * scale), Image.NEAREST)


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="world.png", help="where the contact sheet goes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    generator = np.random.default_rng(args.seed)
    contact_sheet([render(sample_scene(generator), generator) for _ in range(64)]).save(args.out)
