"""The text inside pictures, restricted to characters that installed fonts can draw."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from posenc_jax.walkthrough.fonts import Lettering
from posenc_jax.walkthrough.story import LANGUAGES, facts
from posenc_jax.walkthrough.trace import Trace

IN_PICTURES = ("label.", "box.", "position", "token")  # prefixes of the keys whose text is drawn
LONGEST_NAME = 14  # characters of a token on an axis


@dataclass(frozen=True)
class Labels:
    """Text in one language, filled in from one trace: `labels(key, ...)`."""

    trace: Trace
    language: str
    lettering: Lettering = field(default_factory=lambda: Lettering(()))

    def __call__(self, key: str, **more: Any) -> str:
        return self.lettering.shown(LANGUAGES[self.language][key].format(**{**facts(self.trace), **more}))

    def token(self, index: int) -> str:
        """The token at this position, shortened if it is too long for an axis."""
        piece = self.lettering.shown(self.trace.tokens.pieces[index])
        return piece if len(piece) <= LONGEST_NAME else piece[: LONGEST_NAME - 1] + "…"

    def texts(self) -> Iterator[str]:
        """All text that may be drawn."""
        yield from self.alphabet(self.language)
        yield from self.trace.tokens.pieces

    @staticmethod
    def alphabet(language: str) -> Iterator[str]:
        """Text that contains every character of this language that pictures use."""
        for key, text in LANGUAGES[language].items():
            if key.startswith(IN_PICTURES):
                yield text
