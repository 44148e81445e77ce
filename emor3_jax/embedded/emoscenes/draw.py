"""Draws a scene: a person on one side, an object below the weather on the other.

Everything that has to be read is large and has a colour of its own, because the tiny policy sees
eight by eight patches and learns within minutes. In an image of 112 pixels the head is 42 pixels
wide, the object and the weather about 48.
"""

import functools
import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

from emor3_jax.embedded.emoscenes.scene import Layout, Scene

MIN_SIZE, MAX_SIZE = 112, 224

Color = tuple[int, int, int]
Points = Sequence[tuple[float, float]]

# Sky and ground by (style, brightness, colorfulness).
_BACKGROUND: dict[tuple[str, str, str], tuple[Color, Color]] = {
    ("drawn", "bright", "vivid"): ((110, 205, 255), (120, 225, 80)),
    ("drawn", "bright", "gray"): ((205, 205, 205), (170, 170, 170)),
    ("drawn", "dark", "vivid"): ((60, 20, 130), (20, 90, 50)),
    ("drawn", "dark", "gray"): ((62, 62, 62), (36, 36, 36)),
    ("shifted", "bright", "vivid"): ((255, 240, 190), (255, 190, 150)),
    ("shifted", "bright", "gray"): ((235, 235, 235), (205, 205, 205)),
    ("shifted", "dark", "vivid"): ((90, 20, 50), (20, 50, 90)),
    ("shifted", "dark", "gray"): ((48, 48, 48), (26, 26, 26)),
}
_FACE: dict[str, dict[str, Color]] = {
    "drawn": {
        "smiling": (255, 215, 30),
        "startled": (255, 250, 240),
        "calm": (255, 185, 140),
        "crying": (70, 140, 255),
        "angry": (235, 40, 30),
        "sick": (110, 190, 40),
    },
    "shifted": {
        "smiling": (255, 150, 0),
        "startled": (190, 190, 255),
        "calm": (240, 120, 190),
        "crying": (0, 170, 200),
        "angry": (200, 0, 70),
        "sick": (0, 150, 90),
    },
}
_SHIRT: dict[str, tuple[Color, ...]] = {
    "drawn": ((30, 60, 160), (150, 40, 120), (20, 110, 110), (120, 80, 30)),
    "shifted": ((0, 120, 140), (170, 90, 0), (120, 60, 160), (60, 120, 40)),
}
_INK: Color = (15, 15, 20)
_WHITE: Color = (255, 255, 255)


def draw(scene: Scene, size: int) -> Image.Image:
    """Draws a scene.

    Args:
      scene: what to draw; the image is a function of `scene.key` alone.
      size: width and height in pixels, in [112, 224].

    Returns:
      An RGB image of size x size pixels.

    Raises:
      ValueError: the size is out of range.
    """
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(f"size is {size}; EmoScenes draws {MIN_SIZE} to {MAX_SIZE} pixels a side")
    layout = Layout.from_number(scene.layout)
    sky, ground = _BACKGROUND[scene.style, scene.brightness, scene.colorfulness]
    image = Image.new("RGB", (size, size), sky)
    outlined = scene.style == "shifted"
    pen = _Pen(ImageDraw.Draw(image), size / 112, outlined, bool(layout.mirrored))
    pen.flat([(0, 84), (112, 84), (112, 112), (0, 112)], ground)
    pen.move(82 + layout.weather_x, 26)
    _WEATHER[scene.weather](pen)
    pen.move(82 + layout.object_x, 82 + layout.object_y)
    _OBJECT[scene.object](pen)
    pen.move(28 + layout.person_x, 26 + layout.person_y)
    shirt = _SHIRT[scene.style][layout.shirt]
    face = _FACE[scene.style][scene.expression]
    _BODY[scene.action](pen, shirt, face)
    _head(pen, scene.expression, face)
    return image


class _Pen:
    """Draws in 112-pixel units around a movable origin, mirrored or not, filled or outlined."""

    def __init__(
        self, canvas: ImageDraw.ImageDraw, scale: float, outlined: bool, mirrored: bool
    ) -> None:
        self._canvas = canvas
        self._scale = scale
        self.outlined = outlined
        self._sign = -1 if mirrored else 1
        self._left = 112 if mirrored else 0
        self._x = self._y = 0.0
        self._width = max(1, round(4.4 * scale))

    def move(self, x: float, y: float) -> None:
        self._x, self._y = x, y

    def _points(self, points: Points) -> list[tuple[float, float]]:
        s, x0, y0 = self._scale, self._x, self._y
        return [((self._left + self._sign * (x0 + x)) * s, (y0 + y) * s) for x, y in points]

    def flat(self, points: Points, color: Color) -> None:
        """A filled polygon in either style."""
        self._canvas.polygon(self._points(points), fill=color)

    def shape(self, points: Points, color: Color) -> None:
        """A polygon, filled or as an outline."""
        if self.outlined:
            at = self._points(points)
            self._canvas.line([*at, at[0], at[1]], fill=color, width=self._width, joint="curve")
        else:
            self._canvas.polygon(self._points(points), fill=color)

    def dot(self, x: float, y: float, rx: float, color: Color, ry: float | None = None) -> None:
        """A filled ellipse in either style."""
        self._canvas.ellipse(self._box(x, y, rx, ry), fill=color)

    def round(self, x: float, y: float, rx: float, color: Color, ry: float | None = None) -> None:
        """An ellipse, filled or as an outline."""
        if self.outlined:
            self._canvas.ellipse(self._box(x, y, rx, ry), outline=color, width=self._width)
        else:
            self._canvas.ellipse(self._box(x, y, rx, ry), fill=color)

    def line(self, points: Points, color: Color, width: float = 4) -> None:
        self._canvas.line(
            self._points(points),
            fill=color,
            width=max(1, round(width * self._scale)),
            joint="curve",
        )

    def arc(
        self,
        x: float,
        y: float,
        rx: float,
        color: Color,
        start: float,
        end: float,
        width: float = 4,
        ry: float | None = None,
    ) -> None:
        """An arc in degrees, clockwise from three o'clock, symmetric ones only when mirrored."""
        self._canvas.arc(
            self._box(x, y, rx, ry),
            start,
            end,
            fill=color,
            width=max(1, round(width * self._scale)),
        )

    def _box(
        self, x: float, y: float, rx: float, ry: float | None = None
    ) -> tuple[float, float, float, float]:
        ry = rx if ry is None else ry
        ((cx, cy),) = self._points(((x, y),))
        s = self._scale
        return cx - rx * s, cy - ry * s, cx + rx * s, cy + ry * s

    def ink(self, filled: Color, outlined: Color) -> Color:
        """A detail's colour: drawn on a fill, or on the bare background."""
        return outlined if self.outlined else filled


@functools.cache
def _star(points: int, outer: float, inner: float) -> tuple[tuple[float, float], ...]:
    ring = []
    for i in range(2 * points):
        radius = inner if i % 2 else outer
        angle = math.pi * i / points - math.pi / 2
        ring.append((radius * math.cos(angle), radius * math.sin(angle)))
    return tuple(ring)


def _at(points: Points, x: float, y: float) -> list[tuple[float, float]]:
    return [(px + x, py + y) for px, py in points]


def _head(pen: _Pen, expression: str, face: Color) -> None:
    if not pen.outlined:
        pen.dot(0, 0, 21, _INK)
    pen.round(0, 0, 20, face)
    ink = pen.ink(_INK, face)
    if expression == "smiling":
        pen.dot(-8, -7, 3.2, ink)
        pen.dot(8, -7, 3.2, ink)
        pen.shape([(-13, 2), (13, 2), (9, 11), (0, 14), (-9, 11)], pen.ink((150, 20, 30), face))
    elif expression == "startled":
        for x in (-8.5, 8.5):
            pen.round(x, -6, 7, pen.ink(_INK, face))
            pen.dot(x, -6, 2.6, pen.ink(_WHITE, face))
        pen.round(0, 10.5, 6, ink, ry=7.5)
    elif expression == "calm":
        for x in (-9, 9):
            pen.arc(x, -7, 6, ink, 0, 180, 3)
        pen.line([(-7, 9), (7, 9)], ink, 3.5)
    elif expression == "crying":
        pen.line([(-14, -6), (-4, -11)], ink, 3)
        pen.line([(14, -6), (4, -11)], ink, 3)
        pen.arc(0, 15, 9, ink, 180, 360, 4)
        for x in (-10, 10):
            pen.flat([(x, -6), (x + 4.5, 5), (x, 10), (x - 4.5, 5)], pen.ink(_WHITE, face))
    elif expression == "angry":
        pen.line([(-16, -13), (-3, -5)], ink, 5)
        pen.line([(16, -13), (3, -5)], ink, 5)
        pen.dot(-8, -3, 3, ink)
        pen.dot(8, -3, 3, ink)
        pen.flat([(-10, 6), (10, 6), (10, 14), (-10, 14)], pen.ink(_WHITE, face))
        pen.line([(-10, 10), (10, 10)], pen.ink(_INK, _WHITE), 2)
    else:  # sick
        for x in (-8, 8):
            pen.line([(x - 5, -11), (x + 5, -3)], ink, 3)
            pen.line([(x - 5, -3), (x + 5, -11)], ink, 3)
        pen.line([(-13, 6), (-7, 10), (0, 5), (7, 10), (13, 6)], ink, 3.5)
        pen.flat([(1, 8), (9, 9), (8, 19), (2, 19)], pen.ink((255, 90, 140), face))


def _torso(pen: _Pen, shirt: Color, top: float, bottom: float) -> None:
    pen.shape([(-8, top), (8, top), (11, bottom), (-11, bottom)], shirt)


def _jumping(pen: _Pen, shirt: Color, skin: Color) -> None:
    pen.line([(-8, 26), (-22, 18), (-25, -4)], skin, 6)
    pen.line([(8, 26), (22, 18), (25, -4)], skin, 6)
    pen.line([(-6, 44), (-23, 56)], shirt, 8)
    pen.line([(6, 44), (23, 56)], shirt, 8)
    _torso(pen, shirt, 21, 46)
    pen.dot(0, 79, 27, (230, 0, 200), ry=6)
    pen.dot(0, 79, 20, _INK, ry=3)


def _waving(pen: _Pen, shirt: Color, skin: Color) -> None:
    pen.line([(8, 26), (24, 22), (26, 6)], skin, 6)
    pen.dot(26, -2, 9, _INK)
    pen.dot(26, -2, 7.5, _WHITE)
    pen.line([(-8, 26), (-16, 52)], skin, 6)
    pen.line([(-5, 54), (-6, 82)], shirt, 8)
    pen.line([(5, 54), (6, 82)], shirt, 8)
    _torso(pen, shirt, 21, 56)


def _sitting(pen: _Pen, shirt: Color, skin: Color) -> None:
    pen.flat([(-27, 56), (27, 56), (27, 84), (-27, 84)], (150, 85, 20))
    pen.flat([(-20, 66), (20, 66), (20, 84), (-20, 84)], _INK)
    pen.line([(-8, 26), (-13, 56)], skin, 6)
    pen.line([(8, 26), (13, 56)], skin, 6)
    _torso(pen, shirt, 21, 58)


def _running(pen: _Pen, shirt: Color, skin: Color) -> None:
    for y in (26, 35, 44):
        pen.line([(-27, y), (-10, y)], (255, 120, 0), 4)
    pen.line([(-6, 28), (-22, 38), (-14, 50)], skin, 6)
    pen.line([(6, 28), (16, 42), (28, 34)], skin, 6)
    pen.line([(-6, 54), (-20, 64), (-27, 80)], shirt, 8)
    pen.line([(-2, 54), (16, 62), (14, 82), (24, 82)], shirt, 8)
    pen.shape([(-4, 21), (10, 21), (6, 56), (-12, 56)], shirt)


def _punching(pen: _Pen, shirt: Color, skin: Color) -> None:
    pen.line([(-5, 54), (-16, 82)], shirt, 8)
    pen.line([(5, 54), (16, 82)], shirt, 8)
    _torso(pen, shirt, 21, 56)
    pen.line([(-8, 26), (-18, 42)], skin, 6)
    pen.line([(4, 36), (24, 36)], skin, 8)
    pen.dot(29, 36, 12.5, _INK)
    pen.dot(29, 36, 11, (240, 30, 60))


_BODY = {
    "jumping": _jumping,
    "waving": _waving,
    "sitting": _sitting,
    "running": _running,
    "punching": _punching,
}


def _sun(pen: _Pen) -> None:
    yellow = pen.ink((255, 225, 0), (240, 150, 0))
    for i in range(8):
        c, s = math.cos(i * math.pi / 4), math.sin(i * math.pi / 4)
        pen.line([(17 * c, 17 * s), (25 * c, 25 * s)], yellow, 5)
    pen.round(0, 0, 15, yellow)


def _rainbow(pen: _Pen) -> None:
    bands = ((255, 30, 30), (255, 160, 0), (255, 240, 0), (30, 200, 60), (150, 40, 230))
    step = 5
    for i, color in enumerate(bands):
        if not pen.outlined or i % 2 == 0:
            pen.arc(0, 18, 28 - step * i, color, 180, 360, pen.ink(5.6, 4), ry=34 - step * i)


def _cloud(pen: _Pen, color: Color) -> None:
    for x, y, r in ((-14, -6, 10), (0, -11, 13), (14, -6, 10)):
        pen.round(x, y, r, color)
    pen.flat([(-16, -6), (16, -6), (16, 4), (-16, 4)], color)


def _rain(pen: _Pen) -> None:
    for x in (-15, -3, 9, 20):
        pen.line([(x, 7), (x - 5, 24)], pen.ink((0, 70, 255), (0, 150, 190)), 4)
    _cloud(pen, pen.ink((130, 150, 190), (110, 140, 160)))


def _lightning(pen: _Pen) -> None:
    _cloud(pen, pen.ink((25, 25, 35), (120, 60, 140)))
    bolt = [(-2, -2), (12, -2), (4, 9), (13, 9), (-8, 30), (-1, 14), (-10, 14)]
    pen.shape(bolt, pen.ink((255, 235, 0), (230, 120, 0)))


def _snow(pen: _Pen) -> None:
    for x, y, r in ((-15, -9, 11), (12, -11, 12), (-3, 13, 12), (20, 13, 8)):
        for color, width in ((pen.ink((60, 90, 200), (80, 120, 220)), 6), (_WHITE, 3)):
            for i in range(3):
                c, s = r * math.cos(i * math.pi / 3), r * math.sin(i * math.pi / 3)
                pen.line([(x - c, y - s), (x + c, y + s)], color, width)


def _stars(pen: _Pen) -> None:
    pen.flat([(-28, -24), (28, -24), (28, 24), (-28, 24)], pen.ink((8, 8, 50), (40, 30, 60)))
    gold = pen.ink((255, 245, 150), (200, 230, 255))
    pen.dot(-12, -6, 13, gold)
    pen.dot(-6, -9, 11, pen.ink((8, 8, 50), (40, 30, 60)))
    for x, y, r in ((14, -12, 9), (14, 12, 9), (-10, 16, 6)):
        pen.flat(_at(_star(5, r, r * 0.42), x, y), gold)


_WEATHER = {
    "sun": _sun,
    "rainbow": _rainbow,
    "rain": _rain,
    "lightning": _lightning,
    "snow": _snow,
    "stars": _stars,
}


def _balloon(pen: _Pen) -> None:
    pen.line([(0, 8), (3, 17), (-2, 27)], _WHITE, 3)
    pen.round(0, -9, 17, (255, 20, 90), ry=19)
    pen.shape([(-5, 14), (5, 14), (0, 7)], (255, 20, 90))
    pen.dot(-6, -16, 4, (255, 180, 210))


def _mountain(pen: _Pen) -> None:
    pen.shape([(-27, 26), (-4, -24), (11, 4), (17, -4), (27, 26)], (120, 90, 170))
    pen.flat([(-4, -24), (-12, -7), (-5, -11), (0, -5), (4, -9)], _WHITE)


def _flower(pen: _Pen) -> None:
    pen.line([(0, 0), (0, 27)], (20, 130, 30), 5)
    pen.shape([(0, 20), (16, 10), (12, 22)], (20, 130, 30))
    for i in range(5):
        c, s = math.cos(i * 1.2566 - 1.57), math.sin(i * 1.2566 - 1.57)
        pen.round(12 * c, -8 + 12 * s, 8.5, (255, 130, 220))
    pen.dot(0, -8, 7, (255, 220, 0))


def _rocket(pen: _Pen) -> None:
    pen.flat([(-7, 14), (7, 14), (0, 28)], (255, 140, 0))
    pen.shape([(-10, 2), (-20, 18), (-10, 15)], (220, 20, 40))
    pen.shape([(10, 2), (20, 18), (10, 15)], (220, 20, 40))
    pen.shape([(-10, 15), (-10, -10), (0, -27), (10, -10), (10, 15)], (245, 245, 250))
    pen.flat([(-9, -12), (0, -27), (9, -12)], (220, 20, 40))
    pen.dot(0, -2, 6, (30, 90, 220))


def _fire(pen: _Pen) -> None:
    flame = [(-20, 25), (-22, 4), (-12, -8), (-9, 2), (0, -27), (10, -4), (15, -12), (22, 6),
             (19, 25)]  # fmt: skip
    pen.shape(flame, (255, 70, 0))
    pen.flat([(-10, 25), (-10, 10), (-2, -4), (9, 10), (10, 25)], (255, 220, 0))


def _trash(pen: _Pen) -> None:
    pen.shape([(-17, -12), (17, -12), (13, 26), (-13, 26)], (125, 110, 60))
    for x in (-7, 0, 7):
        pen.line([(x, -6), (x * 0.8, 21)], (60, 50, 20), 3)
    pen.flat([(-21, -18), (21, -18), (21, -12), (-21, -12)], (90, 80, 40))
    pen.line([(-12, -20), (-4, -27), (4, -20), (12, -26)], (150, 220, 0), 5)


def _spider(pen: _Pen) -> None:
    for side in (-1, 1):
        for y0, y1, y2 in ((-4, -20, -8), (0, -8, 6), (4, 4, 18), (8, 14, 26)):
            pen.line([(0, y0), (side * 15, y1), (side * 25, y2)], (130, 0, 40), 4)
    pen.dot(0, 7, 14, (130, 0, 40))
    pen.dot(0, -9, 9, (130, 0, 40))
    pen.dot(-4, -11, 3, (255, 220, 0))
    pen.dot(4, -11, 3, (255, 220, 0))
    pen.flat([(-5, 2), (5, 2), (-5, 13), (5, 13)], (255, 220, 0))


def _grave(pen: _Pen) -> None:
    stone = (150, 165, 175)
    pen.flat([(-19, 26), (-19, -8), (-12, -21), (0, -26), (12, -21), (19, -8), (19, 26)], _INK)
    pen.flat([(-16, 24), (-16, -7), (-10, -18), (0, -23), (10, -18), (16, -7), (16, 24)], stone)
    pen.line([(0, -15), (0, 14)], _INK, 6)
    pen.line([(-9, -6), (9, -6)], _INK, 6)


def _kite(pen: _Pen) -> None:
    color = (0, 120, 255)
    pen.shape([(0, -27), (18, -8), (0, 14), (-18, -8)], color)
    pen.line([(0, -27), (0, 14)], color, 3)
    pen.line([(-18, -8), (18, -8)], color, 3)
    pen.line([(0, 14), (8, 19), (-4, 23), (6, 28)], (255, 60, 160), 4)


def _gift(pen: _Pen) -> None:
    pen.shape([(-20, -8), (20, -8), (20, 25), (-20, 25)], (170, 0, 220))
    pen.line([(0, -8), (0, 25)], (255, 190, 0), 6)
    pen.line([(-20, 8), (20, 8)], (255, 190, 0), 6)
    pen.shape([(0, -9), (-16, -24), (-17, -9)], (255, 190, 0))
    pen.shape([(0, -9), (16, -24), (17, -9)], (255, 190, 0))


def _bomb(pen: _Pen) -> None:
    pen.round(-2, 7, 18, (230, 30, 30))
    pen.line([(8, -8), (14, -18)], (230, 30, 30), 5)
    pen.flat(_at(_star(6, 11, 4), 16, -19), (255, 150, 0))


def _ghost(pen: _Pen) -> None:
    color = (150, 120, 255)
    sheet = [(-18, 25), (-18, -6), (-12, -20), (0, -26), (12, -20), (18, -6), (18, 25), (9, 16),
             (0, 25), (-9, 16)]  # fmt: skip
    pen.shape(sheet, color)
    for x in (-7, 7):
        pen.dot(x, -7, 4.5, color, ry=6)


def _worm(pen: _Pen) -> None:
    for x, y in ((-20, 18), (-10, 9), (1, 12), (11, 3)):
        pen.round(x, y, 10, (120, 150, 0))
    pen.round(15, -12, 11, (120, 150, 0))
    pen.dot(18, -14, 3.5, (220, 0, 0))


def _candle(pen: _Pen) -> None:
    pen.shape([(-10, -2), (10, -2), (10, 26), (-10, 26)], (0, 160, 150))
    pen.line([(0, -2), (0, -8)], (0, 160, 150), 3)
    pen.flat([(0, -28), (8, -13), (0, -6), (-8, -13)], (255, 150, 0))


_OBJECT = {
    "balloon": _balloon,
    "mountain": _mountain,
    "flower": _flower,
    "rocket": _rocket,
    "fire": _fire,
    "trash": _trash,
    "spider": _spider,
    "grave": _grave,
    "kite": _kite,
    "gift": _gift,
    "bomb": _bomb,
    "ghost": _ghost,
    "worm": _worm,
    "candle": _candle,
}
