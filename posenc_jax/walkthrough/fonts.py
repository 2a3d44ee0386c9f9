"""Installed fonts that can draw a text, whatever its language."""

import functools
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from matplotlib import font_manager

DEFAULT = "DejaVu Sans"  # comes with matplotlib
# Looked at before all others, for an even look: the same fonts on Linux, macOS and Windows as other programs take.
PREFERRED = (
    "Noto Sans CJK KR",
    "Noto Sans CJK",
    "NanumGothic",
    "Apple SD Gothic Neo",
    "Malgun Gothic",
    "Noto Sans",
    "Arial Unicode MS",
)
MISSING = "\N{REPLACEMENT CHARACTER}"  # drawn, by the default font, in place of what no font has
INSTALL = "install one, e.g. Debian's fonts-noto-cjk for Chinese, Japanese and Korean, or fonts-noto for most others"


@dataclass(frozen=True)
class Lettering:
    """Font families, to be tried in turn for every character, and the characters that none of them has."""

    families: tuple[str, ...]
    missing: frozenset[str] = frozenset()

    def shown(self, text: str) -> str:
        """The text as it can be drawn: a sign in place of each missing character."""
        return "".join(MISSING if character in self.missing else character for character in text)

    def warning(self) -> str:
        """What to tell a user about missing characters."""
        some = " ".join(f"{character} (U+{ord(character):04X})" for character in sorted(self.missing)[:5])
        more = f" and {len(self.missing) - 5} more" if len(self.missing) > 5 else ""
        return f"no installed font that pictures can use has {some}{more}; they show {MISSING} instead: {INSTALL}"


def lettering(texts: Iterable[str]) -> Lettering:
    """As few families as draw these texts, the default one first."""
    wanted = {c for text in texts for c in text if c not in " \n"}
    families, wanted = [DEFAULT], wanted - characters(DEFAULT)
    for search in (lambda: None, _find_new_fonts):
        if wanted:
            search()
        while wanted:
            name = max(_families(), key=lambda name: len(wanted & characters(name)), default=DEFAULT)
            if not wanted & characters(name):
                break
            families.append(name)
            wanted = wanted - characters(name)
    return Lettering(tuple(families), frozenset(wanted))


@functools.cache
def characters(family: str) -> frozenset[str]:
    """What the regular font of a family can draw; nothing, if matplotlib cannot use the font."""
    try:
        path = font_manager.findfont(font_manager.FontProperties(family=[family]), fallback_to_default=False)
        font = font_manager.get_font(path)
        font.load_char(next(iter(font.get_charmap())))  # a font of bitmaps has no outlines to load
    except (OSError, RuntimeError, StopIteration, ValueError):
        return frozenset()
    # Characters without a shape of their own are safe to draw only if the font says nothing else of them.
    return frozenset(c for c in map(chr, font.get_charmap()) if unicodedata.category(c) != "Cc")


def _families() -> list[str]:
    """Names of installed families with an upright regular font, the preferred ones first.

    Without matplotlib's own family of boxes that stand for any character.
    """
    names = {
        entry.name
        for entry in font_manager.fontManager.ttflist
        if entry.weight in (400, "normal", "regular") and entry.style == "normal" and "Last Resort" not in entry.name
    }

    def rank(name: str) -> tuple[int, str]:
        places = (i for i, start in enumerate(PREFERRED) if name.startswith(start))
        return next(places, len(PREFERRED)), name

    return sorted(names, key=rank)


def _find_new_fonts() -> None:
    """Add the fonts that were installed after matplotlib made its list, which it keeps in a file."""
    known = {entry.fname for entry in font_manager.fontManager.ttflist}
    for path in sorted(set(font_manager.findSystemFonts()) - known):
        try:
            font_manager.fontManager.addfont(path)
        except (OSError, RuntimeError, ValueError):
            continue
    characters.cache_clear()
