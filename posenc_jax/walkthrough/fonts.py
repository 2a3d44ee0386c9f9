"""The text inside pictures, in any language, and installed fonts that can draw it."""

import functools
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from matplotlib import font_manager

from posenc_jax.walkthrough.story import LANGUAGES, Words
from posenc_jax.walkthrough.trace import Trace

DEFAULT = "DejaVu Sans"  # included in matplotlib
# Tried before all others, for a consistent look: fonts that other programs use on Linux, macOS and Windows.
PREFERRED = (
    "Noto Sans CJK KR",
    "Noto Sans CJK",
    "NanumGothic",
    "Apple SD Gothic Neo",
    "Malgun Gothic",
    "Noto Sans",
    "Arial Unicode MS",
)
MISSING = "\N{REPLACEMENT CHARACTER}"  # drawn in the default font in place of characters that no font has
IN_PICTURES = ("label.", "box.", "position", "token")  # prefixes of the keys whose text is drawn
LONGEST_NAME = 14  # characters of a token on an axis
INSTALL = "install one, e.g. Debian's fonts-noto-cjk for Chinese, Japanese and Korean, or fonts-noto for most others"


@dataclass(frozen=True)
class Lettering:
    """Font families in the order in which they are tried for each character, and the characters that none has."""

    families: tuple[str, ...]
    missing: frozenset[str] = frozenset()

    def shown(self, text: str) -> str:
        """The text with MISSING in place of each missing character."""
        return "".join(MISSING if character in self.missing else character for character in text)

    def warning(self) -> str:
        """A warning about the missing characters, for the user."""
        some = " ".join(f"{character} (U+{ord(character):04X})" for character in sorted(self.missing)[:5])
        more = f" and {len(self.missing) - 5} more" if len(self.missing) > 5 else ""
        return f"no usable installed font has {some}{more}; the pictures show {MISSING} instead. To fix this, {INSTALL}"


@dataclass(frozen=True)
class Labels(Words):
    """The `Words` of pictures. They have a placeholder for each character that no font has."""

    lettering: Lettering = Lettering(())

    def __call__(self, key: str, **more: Any) -> str:
        return self.lettering.shown(super().__call__(key, **more))

    def token(self, index: int) -> str:
        """The token at this position, shortened if it is too long for an axis."""
        piece = self.lettering.shown(self.trace.tokens.pieces[index])
        return piece if len(piece) <= LONGEST_NAME else piece[: LONGEST_NAME - 1] + "…"


def labels_of(trace: Trace, language: str) -> Labels:
    """Labels in this language, or in English if no installed font can draw the language."""
    alphabet = [text for key, text in LANGUAGES[language].items() if key.startswith(IN_PICTURES)]
    chosen = lettering([*alphabet, *trace.tokens.pieces])
    return Labels(trace, "en" if lettering(alphabet).missing else language, chosen)


def lettering(texts: Iterable[str]) -> Lettering:
    """A small set of font families that can draw these texts, chosen greedily, with the default family first."""
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
    """The characters that the regular font of a family can draw; empty if matplotlib cannot use the font."""
    try:
        path = font_manager.findfont(font_manager.FontProperties(family=[family]), fallback_to_default=False)
        font = font_manager.get_font(path)
        font.load_char(next(iter(font.get_charmap())))  # fails for bitmap fonts, which have no outlines
    except (OSError, RuntimeError, StopIteration, ValueError):
        return frozenset()
    # Control characters have no shape of their own, so an entry for one in the font does not mean that it can be drawn.
    return frozenset(c for c in map(chr, font.get_charmap()) if unicodedata.category(c) != "Cc")


def _families() -> list[str]:
    """Names of installed families that have an upright regular font, the preferred ones first.

    "Last Resort", matplotlib's placeholder font with a box for every character, is left out.
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
    """Add the fonts that were installed after matplotlib wrote its font cache."""
    known = {entry.fname for entry in font_manager.fontManager.ttflist}
    for path in sorted(set(font_manager.findSystemFonts()) - known):
        try:
            font_manager.fontManager.addfont(path)
        except (OSError, RuntimeError, ValueError):
            continue
    characters.cache_clear()
