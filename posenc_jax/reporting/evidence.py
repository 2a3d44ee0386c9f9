"""The numbers of windows and documents of an evaluation, and a warning if there are few documents."""

from collections.abc import Mapping
from dataclasses import dataclass

FEW_DOCUMENTS = 10


@dataclass(frozen=True)
class Evidence:
    """The numbers of test windows asked for and found, and the number of their documents."""

    asked: int
    found: int
    documents: int

    @classmethod
    def of(cls, record: Mapping[str, int]) -> "Evidence":
        """The evidence in `windows` of a run's record."""
        return cls(record["asked"], record["found"], record["documents"])

    def __str__(self) -> str:
        plural = "document" if self.documents == 1 else "documents"
        return f"{self.asked} windows asked for, {self.found} found, from {self.documents} {plural}"

    @property
    def warning(self) -> str:
        """A warning if there are few documents, else "".

        Intervals are over documents. In simulations with normal losses, 95 % intervals contain the true mean in 94 % of
        cases with 20 documents, 93 % with 6, 75 % with 3 and 50 % with 2. Real losses are not normal. With few
        documents, intervals cannot account for this.
        """
        if self.documents == 1:
            return f"{self}: there are no intervals, and nothing can be said about other texts."
        if self.documents < FEW_DOCUMENTS:
            return f"{self}: so few documents say little about other texts, and the intervals are rough."
        return ""
