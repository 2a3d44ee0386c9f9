"""Follows one sentence through positional encodings, shape by shape. Writes text, pictures and an HTML page.

python -m posenc_jax.walkthrough "나는 사과를 좋아해"
python -m posenc_jax.walkthrough "나는 사과를 좋아해" --tokens "나 ##는 사과 ##를 ##좋아해" --language ko
python -m posenc_jax.walkthrough "I like apples" --tokenizer bytes --width 64 --heads 4
python -m posenc_jax.walkthrough "I like apples" --model smollm2
"""

import argparse
import dataclasses
import shlex
import shutil
import sys
from pathlib import Path

from posenc_jax.files import atomic_write_text
from posenc_jax.schema import ConfigError
from posenc_jax.walkthrough import pictures, story, terminal, tokens, trace
from posenc_jax.walkthrough.page import page


def main(arguments: list[str]) -> None:
    """Raises ConfigError for an invalid sentence or setting."""
    args = _parser().parse_args(arguments)
    followed = _trace(args)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("--output", str(args.output), f"cannot be created as a folder: {error.strerror}") from error
    lettering = pictures.draw(followed, args.output, args.language)
    if lettering.missing:
        print(f"warning: {lettering.warning()}", file=sys.stderr)
    title, sections = story.title(followed, args.language), story.sections(followed, args.language)
    made_by = "python -m posenc_jax.walkthrough " + shlex.join(arguments)
    text = page(title, sections, args.output, args.language, made_by)
    atomic_write_text(args.output / "index.html", text)
    print(terminal.plain(title, sections, args.language, min(shutil.get_terminal_size().columns, 100)))
    print(args.output / "index.html")


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m posenc_jax.walkthrough", description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("sentence", nargs="?", help=f"in any language, at most {tokens.MAX_CHARACTERS:,} characters")
    add("--tokenizer", choices=("wordpiece", "bytes"), help="default: wordpiece, learned from the sentence")
    add("--corpus", type=Path, metavar="FILE", help="a UTF-8 text from which word pieces are also learned")
    note = "quote them, because # starts a comment in a shell"
    add("--tokens", nargs="+", metavar="TOKEN", help=f"the tokens themselves, instead of a tokenizer; {note}")
    note = "a trained model to show too: a workdir, a Hugging Face folder, a .gguf file, or smollm2"
    add("--model", metavar="MODEL", help=f"{note}; its tokenizer is used")
    note = f"default: {tokens.VOCAB_SIZE:,}, or 256 with --tokenizer bytes"
    add("--vocab-size", type=int, help=f"rows of the embedding matrix; {note}")
    add("--width", type=int, default=512, help="embedding dimension; default: 512")
    add("--heads", type=int, default=8, help="number of attention heads; default: 8")
    note = "the positional embedding that is added to the token embeddings; default: sinusoidal"
    add("--positions", choices=("sinusoidal", "learned"), default="sinusoidal", help=note)
    note = f"number of positions in the learned table; default: {trace.TABLE_LENGTH}"
    add("--table-length", type=int, help=note)
    add("--seed", type=int, default=0, help="seed of the random weights; default: 0")
    add("--language", choices=tuple(story.LANGUAGES), default="en", help="language of the output; default: en")
    add("--output", type=Path, default=Path("walkthrough"), metavar="DIR", help="output folder; default: walkthrough")
    return parser


def _trace(args: argparse.Namespace) -> trace.Trace:
    if args.model is None:
        return trace.follow(_tokens(args), _settings(args))
    for option in ("tokens", "tokenizer", "corpus", "vocab_size"):
        if (value := getattr(args, option)) is not None:
            given = " ".join(value) if option == "tokens" else str(value)
            raise ConfigError(f"--{option.replace('_', '-')}", given, "has no effect together with --model")
    if args.sentence is None:
        raise ConfigError("sentence", "", "must be given together with --model")
    from posenc_jax import generation  # takes seconds
    from posenc_jax.walkthrough import trained

    generator = generation.load(args.model, field="--model")
    own = tokens.of_model(args.sentence, generator.tokenizer)
    followed = trace.follow(own, _settings(args))
    return dataclasses.replace(followed, trained=trained.read(args.model, generator, own))


def _tokens(args: argparse.Namespace) -> tokens.Tokens:
    size = {} if args.vocab_size is None else {"vocab_size": args.vocab_size}
    if args.vocab_size is not None and args.vocab_size < 1:
        raise ConfigError("--vocab-size", args.vocab_size, "must be at least 1")
    if args.tokens is not None:
        for option in ("tokenizer", "corpus"):
            if getattr(args, option) is not None:
                raise ConfigError(f"--{option}", str(getattr(args, option)), "has no effect together with --tokens")
        return tokens.given(" ".join(args.tokens).split(), args.sentence, **size)
    if args.sentence is None:
        raise ConfigError("sentence", "", "must be given, unless --tokens is given")
    if args.tokenizer == "bytes":
        if args.corpus is not None:
            raise ConfigError("--corpus", str(args.corpus), "has no effect with --tokenizer bytes")
        return tokens.utf8_bytes(args.sentence, **size)
    return tokens.wordpieces(args.sentence, args.corpus, **size)


def _settings(args: argparse.Namespace) -> trace.Settings:
    if args.table_length is not None and args.positions != "learned":
        raise ConfigError("--table-length", args.table_length, "has no effect without --positions learned")
    length = trace.TABLE_LENGTH if args.table_length is None else args.table_length
    return trace.Settings(args.width, args.heads, args.positions, length, args.seed)
