"""Pages as a browser finds them, and folders of images with everything that goes wrong."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

SCRIPT = "b <script>alert(1)<"  # a folder cannot hold the slash of an end tag
EMPTY = "none of it"


class Page(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text("utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def assert_stands_alone(self) -> None:
        """Nothing is loaded from anywhere, and nothing runs."""
        assert not self.all("script")
        assert not self.all("link")
        assert not self.all("iframe")
        for image in self.all("img"):
            assert str(image["src"]).startswith("data:image/")
            assert image["alt"]
        assert not re.search(
            r"(https?:)?//[a-z]|url\(", re.sub(r"data:image/[^\"]+", "", self.source)
        )


def make_images(root: Path) -> dict[str, np.ndarray]:
    """Three classes; the pixels in 0..1, [H, W, 3], of each file that can be read."""
    rng = np.random.default_rng(0)
    pixels: dict[str, np.ndarray] = {}

    def save(name: str, height: int, width: int) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        values = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(values).save(root / name)
        pixels[name] = values / 255

    for number in range(6):
        save(f"a/{number}.png", 24 + number, 32)
    save("a/wide.png", 5, 200)
    save(f"{SCRIPT}/0.png", 30, 30)
    Image.open(root / f"{SCRIPT}/0.png").save(root / "a/again.bmp")
    pixels["a/again.bmp"] = pixels[f"{SCRIPT}/0.png"]
    # Multiples of 257 are the same shares of white in 8 bits.
    deep = 257 * rng.integers(0, 256, (20, 40, 3)).astype(np.uint16)
    tifffile.imwrite(root / f"{SCRIPT}/deep.tif", deep, photometric="rgb")
    pixels[f"{SCRIPT}/deep.tif"] = deep / 65535
    (root / EMPTY).mkdir()
    (root / "a/half.png").write_bytes((root / "a/5.png").read_bytes()[:400])
    (root / "a/nothing.jpg").write_bytes(b"")
    return pixels
