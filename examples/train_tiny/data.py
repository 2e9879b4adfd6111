"""Captioned pictures of emoji, made on the fly: every picture is a pure function of (scene, size, seed)."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

FONT_PATHS = [
    Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"),  # Debian: fonts-noto-color-emoji
    Path("/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf"),  # Fedora
    Path("/usr/share/fonts/noto/NotoColorEmoji.ttf"),  # Arch
]
FONT_SIZE = 109  # the one bitmap size that the font holds

OBJECTS = {
    "red apple": "🍎", "green apple": "🍏", "banana": "🍌", "strawberry": "🍓", "lemon": "🍋", "watermelon": "🍉",
    "carrot": "🥕", "mushroom": "🍄", "pizza": "🍕", "burger": "🍔", "donut": "🍩", "cheese": "🧀",
    "red heart": "❤", "yellow heart": "💛", "green heart": "💚", "blue heart": "💙", "purple heart": "💜",
    "star": "⭐", "sun": "🌞", "moon": "🌙", "fire": "🔥", "water drop": "💧", "tree": "🌲", "cactus": "🌵",
    "rose": "🌹", "sunflower": "🌻", "maple leaf": "🍁", "clover": "🍀", "butterfly": "🦋", "ladybug": "🐞",
    "fish": "🐠", "whale": "🐳", "crab": "🦀", "frog": "🐸", "chick": "🐤", "penguin": "🐧", "pig": "🐷",
    "dog": "🐶", "cat": "🐱", "panda": "🐼", "fox": "🦊", "soccer ball": "⚽", "basketball": "🏀", "balloon": "🎈",
    "umbrella": "☂", "car": "🚗", "gift": "🎁", "pumpkin": "🎃", "diamond": "💎", "ghost": "👻",
}  # fmt: skip
COLORS = {
    "red": (215, 45, 45), "orange": (245, 140, 30), "yellow": (250, 220, 60), "green": (50, 160, 70),
    "blue": (45, 95, 215), "purple": (135, 60, 175), "pink": (250, 160, 195), "brown": (125, 80, 45),
    "white": (248, 248, 248), "gray": (125, 125, 130),
}  # fmt: skip
PATTERNS = ("plain", "gradient", "striped")
POSITIONS = {  # words in the caption → centre of the object, as a share of (width, height)
    "on the left of": (0.28, 0.5),
    "on the right of": (0.72, 0.5),
    "at the top of": (0.5, 0.28),
    "at the bottom of": (0.5, 0.72),
    "in the middle of": (0.5, 0.5),
}
LARGE, SMALL = 0.74, 0.42  # side of an object, as a share of the picture's


@dataclass(frozen=True)
class Scene:
    """What a picture shows. Two objects are always small, the first on the left."""

    objects: tuple[str, ...]
    color: str
    pattern: str
    position: str | None = None  # None: one large object in the middle, or a pair

    @property
    def caption(self) -> str:
        """For example ``a small dog on the left of a blue striped background``."""
        pattern = "" if self.pattern == "plain" else f"{self.pattern} "
        background = f"{'an' if self.color == 'orange' else 'a'} {self.color} {pattern}background"
        if len(self.objects) == 2:
            return f"a small {self.objects[0]} and a small {self.objects[1]} on {background}"
        size = "large" if self.position is None else "small"
        return f"a {size} {self.objects[0]} {self.position or 'on'} {background}"

    @property
    def held_out(self) -> bool:
        """True for the fifth of all captions that no training ever sees."""
        return hashlib.sha256(self.caption.encode()).digest()[0] % 5 == 0


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene: half large objects, a third small ones, the rest pairs."""
    kind = rng.choice(["large", "small", "pair"], p=[0.5, 0.35, 0.15])
    objects = rng.choice(list(OBJECTS), size=2 if kind == "pair" else 1, replace=False)
    position = str(rng.choice(list(POSITIONS))) if kind == "small" else None
    return Scene(tuple(map(str, objects)), str(rng.choice(list(COLORS))), str(rng.choice(PATTERNS)), position)


def scenes(seed: int | tuple[int, ...], held_out: bool = False) -> Iterator[Scene]:
    """Yield scenes of the training captions, or of the held-out ones, without end."""
    rng = np.random.default_rng(seed)
    while True:
        scene = sample_scene(rng)
        if scene.held_out == held_out:
            yield scene


def held_out_scenes(count: int, seed: int = 0) -> list[Scene]:
    """The first ``count`` different held-out scenes."""
    unique = dict.fromkeys(islice(scenes(seed, held_out=True), 4 * count))
    if len(unique) < count:
        raise ValueError(f"only {len(unique)} different held-out captions were drawn; {count} were asked for")
    return list(unique)[:count]


def render(scene: Scene, size: int, rng: np.random.Generator) -> Image.Image:
    """Draw a scene as a picture of ``size`` × ``size`` pixels; ``rng`` jitters colours, places and sizes a little."""
    side = 2 * size  # drawn at twice the size, then reduced, so that places are not bound to whole pixels
    picture = _background(scene, side, rng)
    if len(scene.objects) == 2:
        places = [POSITIONS["on the left of"], POSITIONS["on the right of"]]
    else:
        places = [POSITIONS[scene.position or "in the middle of"]]
    share = LARGE if len(scene.objects) == 1 and scene.position is None else SMALL
    for name, (x, y) in zip(scene.objects, places, strict=True):
        sprite = _sprite(name)
        scale = share * rng.uniform(0.93, 1.07) * side / max(sprite.size)
        sprite = sprite.resize([max(1, round(s * scale)) for s in sprite.size], Image.Resampling.BILINEAR)
        dx, dy = rng.uniform(-0.03, 0.03, size=2)
        corner = round((x + dx) * side - sprite.width / 2), round((y + dy) * side - sprite.height / 2)
        picture.paste(sprite, corner, sprite)
    return picture.reduce(2)


def picture_batch(batch: list[Scene], size: int, seed: int | tuple[int, ...]) -> torch.Tensor:
    """Render scenes as a tensor (batch, 3, size, size) in [-1, 1]."""
    rng = np.random.default_rng(seed)
    pixels = np.stack([np.asarray(render(scene, size, rng)) for scene in batch])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def _background(scene: Scene, side: int, rng: np.random.Generator) -> Image.Image:
    color = np.clip(np.array(COLORS[scene.color]) + rng.uniform(-8, 8, size=3), 0, 255)
    other = color * 0.6 if scene.color in ("white", "yellow", "pink") else color + (255 - color) * 0.45
    if scene.pattern == "plain":
        weight = np.zeros(side)
    elif scene.pattern == "gradient":
        weight = np.linspace(0, 1, side)
    else:
        weight = (np.arange(side) * 8 // side % 2).astype(float)
    rows = color + weight[:, None] * (other - color)  # (side, 3): both patterns run from top to bottom
    return Image.fromarray(np.broadcast_to(rows[:, None], (side, side, 3)).astype(np.uint8))


@cache
def _sprite(name: str) -> Image.Image:
    canvas = Image.new("RGBA", (180, 180))
    ImageDraw.Draw(canvas).text((20, 20), OBJECTS[name], font=_font(), embedded_color=True)
    return canvas.crop(canvas.getbbox())


@cache
def _font() -> ImageFont.FreeTypeFont:
    for path in FONT_PATHS:
        if path.exists():
            return ImageFont.truetype(str(path), FONT_SIZE)
    raise FileNotFoundError("Noto Color Emoji not found. On Debian or Ubuntu: apt-get install fonts-noto-color-emoji")
