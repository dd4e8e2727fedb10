"""The HTML report: everything is on it, nothing of the data is taken for markup."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from markupsafe import Markup
from PIL import Image as Pil

from dinov3_framework import OutputError
from dinov3_framework.runtime.report import Image, Section, write_report
from dinov3_framework.runtime.results import Record

ODD = "<script>alert('x')</script> & \"quotes\" {{ 7 * 7 }}"


class Page(HTMLParser):
    """What a browser finds: tags with their attributes, and the text of each kind of tag."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag  # every tag is closed, in order

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts[self._open[-1]][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def written(folder: Path, *sections: Section, **options: str) -> Page:
    write_report(folder / "report.html", "A run", sections, **options)
    return Page(folder / "report.html")


def pixels_of(image: dict[str, str | None]) -> np.ndarray:
    _, _, content = str(image["src"]).partition("base64,")
    with Pil.open(io.BytesIO(base64.b64decode(content))) as found:
        return np.asarray(found.convert("RGB"))


# --------------------------------------------------------------------------- what is on it
def test_texts_facts_and_tables(tmp_path: Path) -> None:
    rows = [{"name": "a", "loss": 1 / 3}, {"name": "b", "more": None}]
    record = Record("knn", "teacher", "accuracy", 76.8, {"crop": "center"}, "images", "12ab", 0)
    page = written(
        tmp_path,
        Section("Training", ["It went well.", {"iterations": 700, "seed": 0}, rows], "of 3 h"),
        Section("Evaluation", [[record]]),
    )
    assert page.texts["title"] == page.texts["h1"] == ["A run"]
    assert [text.strip() for text in page.texts["h2"]] == ["Training", "Evaluation"]
    assert "of 3 h" in page.texts["small"]
    assert page.texts["p"] == ["It went well."]
    assert page.texts["dt"] + page.texts["dd"] == ["iterations", "seed", "700", "0"]
    assert page.texts["th"][:3] == ["name", "loss", "more"]
    assert page.texts["td"][:6] == ["a", "0.333333", "", "b", "", "None"]
    assert "protocol.crop" in page.texts["th"]
    assert "76.8" in page.texts["td"]


def test_nothing_of_the_data_is_markup(tmp_path: Path) -> None:
    image = Image(np.zeros((2, 2, 3), np.uint8), title=ODD, note=ODD, alt=ODD)
    file = Image('a "b".png', title=ODD)
    blocks = [ODD, {ODD: ODD}, [{ODD: ODD}], [image, file]]
    write_report(tmp_path / "x.html", ODD, [Section(ODD, blocks, ODD, data={"x": ODD})])
    page = Page(tmp_path / "x.html")
    assert not page.all("script")
    for tag in ("title", "h1", "small", "p", "dt", "dd", "th", "td", "figcaption", "span"):
        assert page.texts[tag][0].strip() == ODD
    assert page.all("section")[0]["data-x"] == ODD
    first, second = page.all("img")
    assert first["alt"] == second["alt"] == ODD
    assert second["src"] == "a%20%22b%22.png"


def test_markup_is_taken_as_it_is(tmp_path: Path) -> None:
    image = Image("x.png", over=Markup('<i class="mark"></i>'))
    page = written(tmp_path, Section("", [Markup("<b>bold</b>"), [image]]))
    assert page.texts["b"] == ["bold"]
    assert page.all("i") == [{"class": "mark"}]


def test_pictures_are_embedded_or_beside(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tiny = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
    ramp = np.linspace(0, 255, 300).round().astype(np.uint8)
    noise = rng.integers(-9, 9, (300, 300, 3))
    photo = (ramp[:, None, None] + noise).clip(0, 255).astype(np.uint8)
    page = written(
        tmp_path,
        Section("", [[Image(tiny, crisp=True), Image(photo, width=90), Image("figures/a b.png")]]),
    )
    first, second, third = page.all("img")
    assert np.array_equal(pixels_of(first), tiny)
    assert first["class"] == "crisp"
    assert str(second["src"]).startswith("data:image/jpeg")
    assert np.abs(pixels_of(second).astype(int) - photo).mean() < 9
    assert third["src"] == "figures/a%20b.png"
    frames = [str(each["style"]) for each in page.all("div") if each.get("class") == "frame"]
    assert frames[1] == "width: 90px; aspect-ratio: 300 / 300"


def test_many_sections_are_listed(tmp_path: Path) -> None:
    sections = [Section(f"part {n}" if n else "", ["text"]) for n in range(14)]
    page = written(tmp_path, *sections)
    targets = [str(link["href"]).removeprefix("#") for link in page.all("a")]
    assert targets == [section["id"] for section in page.all("section")[1:]]
    assert len(targets) == 13
    assert not written(tmp_path, *sections[:3]).all("nav")


# --------------------------------------------------------------------------- what it loads
@pytest.mark.parametrize("script", ["", "console.log(1 < 2);"])
def test_nothing_is_loaded_from_elsewhere_and_no_foreign_script_runs(
    tmp_path: Path, script: str
) -> None:
    page = written(tmp_path, Section("x"), script=script, style="b { color: red; }")
    (policy,) = (str(m["content"]) for m in page.all("meta") if "http-equiv" in m)
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    assert ("script-src" in policy) == bool(script)
    assert [text.strip() for text in page.texts.get("script", [])] == [script] * bool(script)
    assert "b { color: red; }" in page.texts["style"][0]
    assert not page.all("link")


def test_equal_reports_are_equal_bytes(tmp_path: Path) -> None:
    section = Section("x", [[Image(np.eye(8, dtype=np.uint8)[..., None].repeat(3, -1))]])
    first, second = (written(tmp_path / name, section) for name in "ab")
    assert first.tags == second.tags
    one, two = (tmp_path / name / "report.html" for name in "ab")
    assert one.read_bytes() == two.read_bytes()


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file in its place")
    with pytest.raises(OutputError, match=r"report\.html cannot be written"):
        write_report(tmp_path / "run" / "report.html", "A run", [])


def test_names_that_are_no_text(tmp_path: Path) -> None:
    name = b"\xff.jpg".decode("utf-8", "surrogateescape")
    assert written(tmp_path, Section(name, [name])).texts["p"] == ["\\xff.jpg"]
