"""What an evaluation was made of, windows and documents, and what can be said from so many."""

from collections.abc import Mapping
from dataclasses import dataclass

FEW_DOCUMENTS = 10


@dataclass(frozen=True)
class Evidence:
    """Windows of the test split that were asked for and found, and the documents that they come from."""

    asked: int
    found: int
    documents: int

    @classmethod
    def of(cls, record: Mapping[str, int]) -> "Evidence":
        """From `windows` in the record of a run."""
        return cls(record["asked"], record["found"], record["documents"])

    def __str__(self) -> str:
        plural = "document" if self.documents == 1 else "documents"
        return f"{self.asked} windows asked for, {self.found} found, from {self.documents} {plural}"

    @property
    def warning(self) -> str:
        """What the reader must know if documents are few, in plain words; "" if they are not.

        Intervals are over documents. Of simulated documents whose losses are normal, 95 % intervals of 20 hold the true
        mean 94 times in 100, those of 6 93 times, of 3 75 times and of 2 50 times. Real losses are not normal, which so
        few documents cannot correct.
        """
        if self.documents == 1:
            return f"{self}: there are no intervals, and nothing can be said about other texts."
        if self.documents < FEW_DOCUMENTS:
            return f"{self}: so few documents say little about other texts, and the intervals are rough."
        return ""
