"""Images to try a network on: drawn here, scikit-learn's digits, or from a folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from .cli.errors import BadInput, one_line
from .cli.images import UNREADABLE

SIDE = 256  # pixels of a drawing
MOST_PIXELS = 50_000_000  # of an image: decoded it takes 150 MB
MOST_SAMPLES = 24
SHOWN = 512  # samples of a folder are made at most this large
KINDS = "JPEG, PNG, WebP, GIF, BMP or TIFF"
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
DIGITS = [str(digit) for digit in range(10)]
FINE = 2  # drawings are made this many times larger, then reduced: smooth edges

Colour = tuple[int, int, int]


class Sample(NamedTuple):
    """An image and what it shows."""

    title: str
    image: Image.Image


# Reading -------------------------------------------------------------------------------------------------------------


def read_image(path: str | Path) -> Image.Image:
    """An image file of any kind as RGB: turned upright, transparency on white, the first frame of several.

    Raises:
        BadInput: if it is no image, damaged, or has more than `MOST_PIXELS`.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise BadInput(
                    f"the image is too large: {width} x {height} is {width * height / 1e6:.0f} megapixels; "
                    f"wanted at most {MOST_PIXELS / 1e6:.0f}"
                )
            return _as_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as error:
        raise BadInput(f"the image is too large: wanted at most {MOST_PIXELS / 1e6:.0f} megapixels") from error
    except UNREADABLE as error:
        if "cannot identify" in str(error):
            raise BadInput(f"the file cannot be read as an image: wanted a {KINDS}") from error
        raise BadInput(f"the image file is damaged ({one_line(error)})") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("F", "I") or image.mode.startswith("I;"):  # 16 bits and more: from darkest to brightest
        values = np.asarray(image, dtype=np.float64)
        low, high = values.min(), values.max()
        image = Image.fromarray(((values - low) * (255 / max(high - low, 1e-9))).astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


def from_folder(folder: Path) -> tuple[list[Sample], list[str]]:
    """Images from all over a folder, titled by their files' names, and what was left out and why.

    Of more than `MOST_SAMPLES` files every n-th is taken, so that each class of a data set has a chance.

    Raises:
        BadInput: if there is no such folder, or no image in it that can be read.
    """
    if not folder.is_dir():
        raise BadInput(f"no folder {folder}: --samples must hold images")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    found: list[Sample] = []
    left_out: list[str] = []
    for path in files[:: -(-len(files) // MOST_SAMPLES) or 1]:
        try:
            image = read_image(path)
        except BadInput as error:
            left_out.append(f"{path}: {error}")
            continue
        image.thumbnail((SHOWN, SHOWN))
        found.append(Sample(path.stem, image))
    if not found:
        damaged = f" that can be read ({left_out[0]})" if left_out else f" ({', '.join(sorted(SUFFIXES))})"
        raise BadInput(f"{folder} holds no images{damaged}")
    return found, left_out


def samples_for(labels: Sequence[str] | None) -> list[Sample]:
    """Images for a network with these classes: handwritten digits if it reads digits, else drawings."""
    if labels is not None and list(labels) == DIGITS:
        found = _digits()
        if found:
            return found
    return drawings()


def _digits() -> list[Sample]:
    """Handwritten digits, one of each that every second class has; none without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        return []
    bunch = load_digits()
    last = {int(label): image for image, label in zip(bunch.images, bunch.target, strict=True)}
    pictures = [(label, Image.fromarray((last[label] * (255 / 16)).round().astype(np.uint8))) for label in sorted(last)]
    return [
        Sample(str(label), picture.resize((128, 128), Image.Resampling.BILINEAR).convert("RGB"))
        for label, picture in pictures
    ]


# Drawing -------------------------------------------------------------------------------------------------------------


def drawings() -> list[Sample]:
    """Things drawn by rule, the same each time; two of them also dark and blurred, which is harder to see."""
    clear = [
        Sample(title, draw())
        for title, draw in (("airplane", _airplane), ("ship", _ship), ("car", _automobile), ("truck", _truck))
    ]
    return [*clear, *(Sample(f"dim {title}", _hard(image)) for title, image in clear[:2])]


def _hard(image: Image.Image) -> Image.Image:
    blurred = image.filter(ImageFilter.GaussianBlur(SIDE / 45))
    return blurred.point(lambda value: int(value * 0.35 + 8))


class Canvas:
    """A picture in the making: places are in 0..100, from the upper left."""

    def __init__(self, top: Colour, bottom: Colour, seed: int) -> None:
        """Fill it with colours that fade from the top to the bottom, and some grain."""
        side = SIDE * FINE
        fade = np.linspace(0, 1, side)[:, None, None]
        rows = (1 - fade) * np.array(top) + fade * np.array(bottom)
        self.random = np.random.default_rng(seed)
        self._show(np.broadcast_to(rows, (side, side, 3)), 6)

    def _show(self, values: np.ndarray, grain: float) -> None:
        noise = self.random.normal(0, grain, (*values.shape[:2], 1))
        self.image = Image.fromarray((values + noise).clip(0, 255).astype(np.uint8))
        self.draw = ImageDraw.Draw(self.image)

    def _places(self, points: Sequence[float]) -> list[float]:
        return [value * SIDE * FINE / 100 for value in points]

    def area(self, colour: Colour, *points: float) -> None:
        """A filled polygon: x, y, x, y, ..."""
        self.draw.polygon(self._places(points), fill=colour)

    def round(self, colour: Colour, left: float, top: float, right: float, bottom: float) -> None:
        """A filled ellipse."""
        self.draw.ellipse(self._places((left, top, right, bottom)), fill=colour)

    def cloud(self, x: float, y: float, size: float) -> None:
        """A few white puffs."""
        for dx, dy, r in ((-1.2, 0.2, 0.8), (0, 0, 1.1), (1.2, 0.3, 0.7)):
            self.round((236, 240, 245), x + (dx - r) * size, y + (dy - r / 2) * size, x + (dx + r) * size, y + r * size)

    def done(self) -> Image.Image:
        """The picture, grainy and a little soft, as a photograph is."""
        soft = self.image.filter(ImageFilter.GaussianBlur(FINE))
        self._show(np.asarray(soft, dtype=np.float64), 5)
        return self.image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _wheels(canvas: Canvas, radius: float, y: float, *places: float) -> None:
    for x in places:
        for part, colour in ((1.0, (28, 28, 30)), (0.5, (165, 168, 172))):
            r = radius * part
            canvas.round(colour, x - r, y - r, x + r, y + r)


def _road(seed: int) -> Canvas:
    canvas = Canvas((150, 186, 222), (196, 214, 228), seed)
    canvas.area((92, 122, 78), 0, 42, 22, 36, 45, 41, 70, 35, 100, 41, 100, 64, 0, 64)
    canvas.area((112, 112, 114), 0, 62, 100, 62, 100, 100, 0, 100)
    canvas.area((210, 206, 190), 0, 92, 100, 92, 100, 94, 0, 94)
    return canvas


def _airplane() -> Image.Image:
    canvas = Canvas((74, 132, 205), (168, 204, 238), 1)
    canvas.cloud(24, 80, 9)
    canvas.cloud(80, 22, 6)
    canvas.area((150, 156, 166), 50, 47, 66, 20, 72, 20, 64, 47)  # the far wing
    canvas.area((120, 126, 138), 8, 30, 16, 29, 26, 46, 14, 48)  # the fin
    canvas.area((226, 229, 234), 8, 47, 18, 44, 78, 43, 90, 46, 94, 50, 90, 53, 78, 56, 20, 54)
    canvas.area((182, 188, 198), 8, 50, 20, 54, 78, 56, 92, 52, 90, 54, 78, 58, 20, 56)
    canvas.area((134, 140, 152), 44, 53, 28, 80, 36, 80, 62, 54)  # the near wing
    canvas.area((140, 146, 158), 16, 50, 4, 60, 10, 60, 26, 52)
    canvas.area((60, 74, 96), 84, 46, 89, 47, 90, 49, 84, 49)
    for x in range(30, 80, 5):
        canvas.round((70, 86, 110), x, 47, x + 2, 49.5)
    return canvas.done()


def _ship() -> Image.Image:
    canvas = Canvas((146, 186, 224), (206, 222, 234), 2)
    canvas.area((38, 84, 124), 0, 58, 100, 58, 100, 100, 0, 100)
    for _ in range(70):  # waves
        x, y = canvas.random.uniform(0, 100), canvas.random.uniform(60, 99)
        long = (y - 52) / 6
        canvas.area((84, 132, 168), x, y, x + long, y + 0.3, x + 2 * long, y, x + long, y + 0.9)
    canvas.area((150, 40, 36), 10, 66, 90, 66, 85, 73, 17, 73)
    canvas.area((30, 36, 48), 5, 54, 95, 52, 90, 67, 10, 67)
    canvas.area((232, 233, 232), 16, 44, 66, 44, 66, 54, 14, 54)
    canvas.area((214, 216, 218), 20, 34, 46, 34, 46, 44, 18, 44)
    canvas.area((182, 64, 44), 30, 22, 38, 22, 37, 34, 30, 34)
    canvas.area((70, 62, 58), 78, 30, 79.5, 30, 79.5, 53, 78, 53)
    for x in range(22, 64, 6):
        canvas.round((52, 70, 90), x, 47, x + 2.5, 50)
    return canvas.done()


def _automobile() -> Image.Image:
    canvas = _road(3)
    canvas.area((40, 40, 44), 10, 82, 92, 82, 88, 86, 14, 86)  # its shadow
    canvas.area((178, 28, 34), 8, 64, 12, 57, 28, 54, 38, 42, 64, 42, 76, 54, 90, 58, 93, 68, 92, 78, 9, 78)
    canvas.area((120, 16, 24), 8, 70, 93, 70, 92, 79, 9, 79)
    canvas.area((178, 206, 222), 33, 54, 41, 45, 50, 45, 50, 54)
    canvas.area((156, 186, 206), 53, 45, 62, 45, 70, 54, 53, 54)
    canvas.round((250, 238, 176), 88, 60, 92, 65)
    _wheels(canvas, 8, 78, 26, 75)
    return canvas.done()


def _truck() -> Image.Image:
    canvas = _road(4)
    canvas.area((40, 40, 44), 6, 83, 96, 83, 92, 87, 10, 87)
    canvas.area((222, 224, 226), 4, 28, 66, 28, 66, 74, 4, 74)
    canvas.area((190, 193, 197), 4, 64, 66, 64, 66, 74, 4, 74)
    canvas.area((36, 74, 148), 68, 42, 84, 42, 92, 56, 95, 60, 95, 76, 68, 76)
    canvas.area((184, 210, 226), 74, 46, 83, 46, 89, 57, 74, 57)
    canvas.area((54, 56, 60), 4, 74, 95, 74, 95, 79, 4, 79)
    _wheels(canvas, 7, 79, 16, 32, 80)
    return canvas.done()
