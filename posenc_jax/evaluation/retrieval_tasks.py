"""Retrieval tasks: texts of an exact length that end with a question about an earlier part, and its answer.

- Passkey: a number is hidden in sentences that repeat (Mohtashami and Jaggi 2023, section 4.2; Peng et al. 2024, YaRN,
  section 4.3).
- Needles: statements are hidden in text of the corpus, with words of the corpus as keys (Hsieh et al. 2024, RULER,
  section 3.1): one statement, one of several, several of one key, or several keys that are asked one after another.
- Variable tracking, and the common and frequent words of a list (RULER, sections 3.2 and 3.3).

The form is RULER's, but the wording is not. A text ends inside a sentence that a model without instruction tuning can
continue. There is neither a chat template nor a solved example, so accuracies are not comparable with RULER's.

To add a task, write a function that makes one text, and add it to TASKS. `results.RETRIEVAL` needs its title.
"""

import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from posenc_jax.data.tokenizers import Tokenizer
from posenc_jax.schema import ConfigError

FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLES = 4  # statements, values or keys in tasks with several of them (RULER's default)
HOPS = 4  # assignments of a variable to the next one (RULER's default)
COMMON, TIMES, SELDOM = 10, 10, 3  # common words, how much more often they appear than others, and how often others do
FREQUENT, ALPHA = 3, 2.0  # frequent words, and the exponent of the distribution of all words (RULER's default)
WINDOWS = 16  # of the corpus that words come from


@dataclass(frozen=True)
class Trial:
    """One text with its question and answer.

    Attributes:
      tokens: L + 1 tokens. The model reads the first L, and predicts the token after each.
      items: start and stop in `tokens` of each part of the answer, such as one value. The tokens between are given.
      any_order: whether the model may give the parts in another order.
    """

    tokens: Int[np.ndarray, "N"]
    items: tuple[tuple[int, int], ...]
    any_order: bool = False


class Source:
    """What trials are made of: windows of the corpus, the words in them, and a tokenizer for statements."""

    def __init__(self, tokenizer: Tokenizer, windows: Int[np.ndarray, "W N"]):
        self._tokenizer, self._windows = tokenizer, windows
        text = b"\n".join(tokenizer.decode(window) for window in windows[:WINDOWS]).decode(errors="replace")
        self.words = sorted(set(re.findall(r"\b[a-z]{4,10}\b", text)))

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text.encode()).tolist()

    def haystack(self, rng: np.random.Generator, count: int) -> list[int]:
        """Successive tokens of a random window. A window that is too short is repeated."""
        window = self._windows[rng.integers(len(self._windows))]
        start = rng.integers(max(len(window) - count, 0) + 1)
        return np.resize(window[start:], count).tolist()

    def draw(self, rng: np.random.Generator, count: int) -> list[str]:
        """Different words of the corpus. Raises TooFewWords."""
        if len(self.words) < count:
            raise TooFewWords(f"needs {count} different words of 4 to 10 letters; the test text has {len(self.words)}")
        return rng.choice(self.words, count, replace=False).tolist()


class TooFewWords(Exception):
    """The corpus has fewer words than a task needs."""


class TooShort(Exception):
    """A length does not hold the statements and the question of a task."""


def passkey(source: Source, rng: np.random.Generator, length: int, depth: float) -> Trial:
    """A number hidden at a depth in sentences that repeat. Source: Mohtashami and Jaggi 2023, section 4.2."""
    number = _number(rng, 5)
    heading = "An important number is hidden in a long and irrelevant text. Find it and memorize it.\n"
    statement = f" The pass key is {number}. Remember it. {number} is the pass key."

    def text(count: int) -> list[int]:
        first, hidden, filler = map(source.encode, (heading, statement, FILLER))
        rest = count - len(first) - len(hidden)
        before = round(depth * (rest // len(filler))) * len(filler)
        return [*first, *_repeated(filler, before), *hidden, *_repeated(filler, rest - before)]

    return _trial(source, length, text, ["\nWhat is the pass key? The pass key is", f" {number}"])


def needle(source: Source, rng: np.random.Generator, length: int, depth: float) -> Trial:
    """The value of a key, from one statement at a depth of text of the corpus. Source: RULER, section 3.1."""
    return _asked_one_by_one(source, rng, length, [depth], asked=1)


def multi_key(source: Source, rng: np.random.Generator, length: int, depth: float) -> Trial:
    """The value of the key at a depth, among statements about NEEDLES - 1 other keys."""
    return _asked_one_by_one(source, rng, length, [depth, *rng.random(NEEDLES - 1).tolist()], asked=1)


def multi_query(source: Source, rng: np.random.Generator, length: int, depth: float) -> Trial:
    """The values of NEEDLES keys, asked one after another."""
    return _asked_one_by_one(source, rng, length, rng.random(NEEDLES).tolist(), asked=NEEDLES)


def multi_value(source: Source, rng: np.random.Generator, length: int, depth: float) -> Trial:
    """All NEEDLES values of one key."""
    (key,), values = source.draw(rng, 1), [_number(rng, 7) for _ in range(NEEDLES)]
    statements = [f"\nOne of the special numbers of {key} is {value}.\n" for value in values]
    text = _hidden(source, rng, statements, rng.random(NEEDLES).tolist())
    question = f"\nThe special numbers of {key} are"
    return _trial(source, length, text, _listed(question, values), any_order=True)


def variable_tracking(source: Source, rng: np.random.Generator, length: int, depth: float) -> Trial:
    """All variables of a chain: the first has a value, and each of HOPS others the value of the one before."""
    names, value = source.draw(rng, HOPS + 1), _number(rng, 5)
    assigned = [value, *(f"the value of {name}" for name in names[:-1])]
    statements = [f"\nThe variable {name} is set to {own}.\n" for name, own in zip(names, assigned, strict=True)]
    text = _hidden(source, rng, statements, sorted(rng.random(len(statements)).tolist()))
    question = f"\nThe variables whose value is {value} are"
    return _trial(source, length, text, _listed(question, names), any_order=True)


def common_words(source: Source, rng: np.random.Generator, length: int, depth: float) -> Trial:
    """The COMMON words of a list that appear TIMES as often as each of the others. Source: RULER, section 3.3."""
    words = source.draw(rng, max(len(source.words), 2 * COMMON))
    sizes = [len(source.encode(f" {word}")) for word in words]
    common, others = TIMES * sum(sizes[:COMMON]), np.cumsum(sizes[COMMON:])  # tokens, if other words appear once

    def text(count: int) -> list[int]:
        # Other words appear SELDOM times each: less often in a short text, and more often if the corpus has few words.
        often = max(SELDOM, math.ceil(count / (common + others[-1])))
        often = min(often, int(count / (2 * common)))
        number = int(np.searchsorted(often * others, count - often * common, side="right"))
        if often < 1 or number < COMMON:
            raise TooShort
        counts = dict.fromkeys(words[:COMMON], often * TIMES) | dict.fromkeys(words[COMMON : COMMON + number], often)
        return _shuffled(source, rng, counts, count)

    question = f"\nThe {COMMON} words that appear most often in this list are"
    return _trial(source, length, text, _listed(question, words[:COMMON]), any_order=True)


def frequent_words(source: Source, rng: np.random.Generator, length: int, depth: float) -> Trial:
    """The FREQUENT most frequent words of a list in which the word of rank k appears k^-ALPHA as often as the first."""
    words = source.draw(rng, max(min(len(source.words), 1000), FREQUENT + 1))
    weights = np.arange(1, len(words) + 1) ** -ALPHA
    sizes = np.array([len(source.encode(f" {word}")) for word in words])

    def text(count: int) -> list[int]:
        total = count / (sizes @ weights)  # the word of rank 1 appears so often
        counts = {word: int(total * weight) for word, weight in zip(words, weights, strict=True)}
        if counts[words[FREQUENT - 1]] <= counts[words[FREQUENT]]:
            raise TooShort
        return _shuffled(source, rng, counts, count)

    question = f"\nThe {FREQUENT} words that appear most often in this list are"
    return _trial(source, length, text, _listed(question, words[:FREQUENT]), any_order=True)


@dataclass(frozen=True)
class RetrievalTask:
    """A function that makes a trial of a length, and whether the depth of the statement that is asked can be chosen."""

    build: Callable[[Source, np.random.Generator, int, float], Trial]
    has_depth: bool = False


TASKS = {
    "passkey": RetrievalTask(passkey, has_depth=True),
    "needle": RetrievalTask(needle, has_depth=True),
    "multi_key": RetrievalTask(multi_key, has_depth=True),
    "multi_value": RetrievalTask(multi_value),
    "multi_query": RetrievalTask(multi_query),
    "variable_tracking": RetrievalTask(variable_tracking),
    "common_words": RetrievalTask(common_words),
    "frequent_words": RetrievalTask(frequent_words),
}


def depths(task: str, count: int) -> list[float | None]:
    """The depths at which statements of a task are hidden, from 0 (start) to 1 (end); [None] if it has no depth."""
    return np.linspace(0, 1, count).tolist() if TASKS[task].has_depth else [None]


def trials(
    task: str, source: Source, length: int, count: int, num_depths: int, field: str = "config.evaluation.lengths"
) -> list[Trial]:
    """`count` trials of a task, the same in every run with the same text. Trial i has depth i modulo the depths.

    Raises ConfigError if the corpus has too few words, or if the length, which is the setting `field`, is too short.
    """
    own = depths(task, num_depths)
    made = []
    for i in range(count):
        rng = np.random.default_rng((zlib.crc32(task.encode()), length, i))
        try:
            made.append(TASKS[task].build(source, rng, length, own[i % len(own)] or 0.0))
        except TooFewWords as error:
            raise ConfigError("config.evaluation.retrieval_tasks", task, str(error)) from None
        except TooShort:
            allowed = f"must be longer for retrieval task {task!r}, to hold its statements and its question"
            raise ConfigError(field, length, allowed) from None
    return made


def right_items(trial: Trial, predicted: Int[np.ndarray, "N"]) -> int:
    """The number of parts of the answer that are right, given the most likely token at each place of `tokens`.

    The parts before are given (teacher forcing). A part is right if all its tokens are the most likely ones. If the
    order is free, each token may also be that of another part that was not yet given and begins with the same tokens.
    For an answer of one part, this is so if and only if greedy generation gives the answer.
    """
    parts = [trial.tokens[start:stop].tolist() for start, stop in trial.items]
    right = 0
    for i, (start, stop) in enumerate(trial.items):
        allowed = parts[i:] if trial.any_order else [parts[i]]
        right += all(
            predicted[start + j] in {part[j] for part in allowed if part[:j] == parts[i][:j] and len(part) > j}
            for j in range(stop - start)
        )
    return right


def _number(rng: np.random.Generator, digits: int) -> str:
    return str(rng.integers(10 ** (digits - 1), 10**digits))


def _listed(question: str, items: Sequence[str]) -> list[str]:
    """The question and the items with what is between them, such as "are", " one", ",", " two"."""
    return [text for i, item in enumerate(items) for text in ("," if i else question, f" {item}")]


def _asked_one_by_one(
    source: Source, rng: np.random.Generator, length: int, depths: Sequence[float], *, asked: int
) -> Trial:
    """A statement for a key at each depth, and questions about the first `asked` of them."""
    keys, values = source.draw(rng, len(depths)), [_number(rng, 7) for _ in depths]
    facts = [f"\nThe special number of {key} is" for key in keys]
    statements = [f"{fact} {value}.\n" for fact, value in zip(facts, values, strict=True)]
    ending = [text for fact, value in zip(facts[:asked], values, strict=False) for text in (fact, f" {value}")]
    ending[2::2] = [f".{fact}" for fact in ending[2::2]]
    return _trial(source, length, _hidden(source, rng, statements, depths), ending)


def _trial(
    source: Source, length: int, text: Callable[[int], list[int]], ending: Sequence[str], *, any_order: bool = False
) -> Trial:
    """A text of as many tokens as fit, made by `text`, and an ending in which every second part is to be predicted."""
    parts = [source.encode(part) for part in ending]
    rest = length + 1 - sum(map(len, parts))
    tokens = text(rest) if rest > 0 else []
    if len(tokens) != rest:
        raise TooShort
    items = []
    for i, part in enumerate(parts):
        if i % 2:
            items.append((len(tokens), len(tokens) + len(part)))
        tokens += part
    return Trial(np.array(tokens, np.int32), tuple(items), any_order)


def _hidden(
    source: Source, rng: np.random.Generator, statements: Sequence[str], depths: Sequence[float]
) -> Callable[[int], list[int]]:
    """A function that makes a text of the corpus with the statements at these depths."""

    def text(count: int) -> list[int]:
        parts = [source.encode(statement) for statement in statements]
        around = count - sum(map(len, parts))
        if around < len(parts):
            raise TooShort
        tokens = source.haystack(rng, around)
        for depth, part in sorted(zip(depths, parts, strict=True), key=lambda own: own[0], reverse=True):
            place = round(depth * around)
            tokens[place:place] = part
        return tokens

    return text


def _shuffled(source: Source, rng: np.random.Generator, counts: Mapping[str, int], count: int) -> list[int]:
    """Words in a random order, each as often as in `counts`, after tokens of the corpus that fill the text."""
    listed = rng.permutation([word for word, times in counts.items() for _ in range(times)])
    tokens = [token for word in listed for token in source.encode(f" {word}")]
    return [*source.haystack(rng, count - len(tokens)), *tokens]


def _repeated(tokens: Sequence[int], count: int) -> list[int]:
    return np.resize(tokens, count).tolist()
