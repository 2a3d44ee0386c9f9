"""The command that continues prompts: its text, its streaming, and bad input."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from posenc_jax import command, generate, generation
from posenc_jax.config import RunConfig
from posenc_jax.data.tokenizers import ByteTokenizer
from posenc_jax.encodings.gated import FoX
from posenc_jax.evaluation import generator as generators
from posenc_jax.evaluation.extrapolation import scaled_constants
from posenc_jax.evaluation.generator import GREEDY, Generator
from posenc_jax.generation import decoded
from posenc_jax.models.decoding import Decoder
from posenc_jax.models.sampling import Sampling
from posenc_jax.models.transformer import Transformer
from posenc_jax.schema import ConfigError
from tests.encodings.test_contract import perturbed
from tests.interop import foreign, test_gguf
from tests.runs.conftest import undrawn  # noqa: F401  (a fixture)
from tests.runs.run_helpers import config_of, launch
from tests.runs.tiny_runs import tiny
from tests.small import forward, split

SHORT = {"training__duration": "2 steps", "training__warmup": "1 step", "evaluation__lengths": (16,)}


@pytest.fixture(scope="module")
def workdir(folder, tmp_path_factory, undrawn):  # noqa: F811
    """A run whose model has a table of 16 positions."""
    path = tmp_path_factory.mktemp("runs") / "learned"
    launch(config_of(folder, "learned", **SHORT), path)
    return path


def generator(encoding="rope", *, cls=None, **changes) -> Generator:
    """A generator with random weights, and sharp distributions."""
    config = tiny(encoding, **changes)
    model = Transformer(config.model, config.encoding, vocab_size=256, max_length=16, rngs=nnx.Rngs(0))
    model = perturbed(model)
    if cls is not None:
        model.encoding().__class__ = cls
    return Generator(config, *split(model), ByteTokenizer())


def text_of(own: Generator, prompts: list[str], new: int, sampling=GREEDY, seed=0) -> list[bytes]:
    texts = [b""] * len(prompts)
    for step in own.generate([own.encode(prompt, "--prompt") for prompt in prompts], new, sampling, seed):
        for i, token in step:
            texts[i] += own.bytes_of(token)
    return texts


def greedy(own: Generator, prompt: str, new: int) -> bytes:
    """The most likely continuation, by the full forward pass of the text so far."""
    ids = list(prompt.encode())
    for _ in range(new):
        padded = np.zeros((1, len(prompt) + new), np.int32)
        padded[0, : len(ids)] = ids
        ids.append(int(forward(own.model, jax.numpy.asarray(padded))[0, len(ids) - 1].argmax()))
    return bytes(ids[len(prompt) :])


def refusal(arguments, capsys) -> str:
    """The one line of a command that fails with exit code 2."""
    with pytest.raises(SystemExit) as exit:
        command.run(generate.main, [str(argument) for argument in arguments])
    assert exit.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "cls", [None, type("Uncached", (FoX,), {"prepare": lambda self, x, p: FoX.extend(self, x, p, None)[0]})]
)
def test_greedy_text_is_that_of_the_full_forward_pass(cls):
    own = generator("fox", cls=cls)
    assert own.model.cacheable == (cls is None)
    assert text_of(own, ["some text"], 12) == [greedy(own, "some text", 12)]


def test_a_rule_that_follows_the_length_is_that_of_each_text(monkeypatch):
    decoders = []

    def decoder(graphdef, params, constants, total, *others):
        decoders.append((total, constants["encoding_0"]["inverse_frequencies"]))
        return Decoder(graphdef, params, constants, total, *others)

    monkeypatch.setattr(generators, "Decoder", decoder)
    own = dataclasses.replace(generator(), rope_scaling="dynamic_ntk")
    text_of(own, ["x", "0123456789" * 2], 20)
    assert [total for total, _ in decoders] == [21, 40]
    for total, frequencies in decoders:
        expected = scaled_constants(own.config, own.constants, f"dynamic_ntk:read={total}")
        np.testing.assert_array_equal(frequencies, expected["encoding_0"]["inverse_frequencies"])
    assert (decoders[0][1][1:] != decoders[1][1][1:]).all()


def test_text_depends_on_the_seed_alone_and_not_on_other_prompts():
    own, sampling = generator(), Sampling(3.0, 0.9)
    prompts = ["one", "two two two", "three", *"abcdefgh"]
    together = text_of(own, prompts, 8, sampling, seed=3)
    assert together == text_of(own, prompts, 8, sampling, seed=3)
    assert together != text_of(own, prompts, 8, sampling, seed=4)
    assert together[:2] == text_of(own, prompts[:2], 8, sampling, seed=3)
    assert len(set(text_of(own, ["same"] * 3, 8, sampling))) == 3


def test_prompts_of_very_different_lengths_are_not_continued_together():
    own = generator()
    lengths = [4, 200, 21, 20, 260, 22, 270, *[20] * 7]
    batches = [[lengths[i] for i in rows] for rows in own._batches([np.zeros(n, np.int32) for n in lengths], 8)]
    assert batches == [[4, 20, 20, 20, 20, 20, 20, 20], [20, 21, 22], [200, 260], [270]]


def test_text_ends_before_an_end_token():
    whole = text_of(own := generator(), ["one", "three"], 8)
    ends = dataclasses.replace(own, end_tokens=frozenset({whole[0][3]}))
    found = text_of(ends, ["one", "three"], 8)
    assert found == [text[: (text + whole[0][3:4]).index(whole[0][3:4])] for text in whole]


def test_incomplete_characters_are_held_back():
    text = "a나é😀\n"
    pieces = [bytes([byte]) for byte in text.encode()]
    assert [piece for piece in decoded(pieces) if piece] == list(text)
    assert "".join(decoded([b"\xff", b"a", b"\xea\xb0"])) == "\ufffda\ufffd"


def test_the_command_prints_text_while_it_is_generated(workdir, capsys, monkeypatch):
    printed = []
    steps = [[(0, byte)] for byte in "é\x1b!".encode()]

    def generated(self, prompts, new, sampling, seed):
        for step in steps:
            printed.append(capsys.readouterr().out)
            yield step

    monkeypatch.setattr(Generator, "generate", generated)
    generate.main([str(workdir), "--prompt", "na", "--tokens", "4"])
    assert printed == ["na", "", "é", "\\x1b"]
    out, err = capsys.readouterr()
    assert out == "!\n"
    assert err.startswith("4 new tokens, ")


def test_a_file_of_prompts_is_written_as_lines_of_json(workdir, tmp_path, capsys):
    (tmp_path / "prompts").write_text("ab\ncd ef\r\n나\n")
    generate.main([str(workdir), "--prompts", str(tmp_path / "prompts"), "--tokens", "5"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    own = generation.load(str(workdir))
    assert [line["prompt"] for line in lines] == ["ab", "cd ef", "나"]
    assert [line["text"] for line in lines] == [
        text_of(own, [line["prompt"]], 5)[0].decode(errors="replace") for line in lines
    ]


def test_a_model_without_a_cache_says_so(workdir, capsys, monkeypatch):
    monkeypatch.setattr(Transformer, "cacheable", False)
    generate.main([str(workdir), "--prompt", "ab", "--tokens", "1"])
    assert "encoding 'learned' cannot be cached: each token computes the whole text again" in capsys.readouterr().err


BAD_ARGUMENTS = {
    "no prompt": ([], "one of the arguments --prompt --prompts is required"),
    "two prompts": (["--prompt", "a", "--prompts", "b"], "not allowed with argument"),
    "empty prompt": (["--prompt", ""], "--prompt = '': must be text of at least one token"),
    "not UTF-8": (["--prompt", "a\udcff"], "must be text that can be encoded as UTF-8"),
    "long prompt": (
        ["--prompt", "a" * 16],
        "--prompt = '16 tokens': must have fewer than 16 tokens, because the model",
    ),
    "many tokens": (["--prompt", "abc", "--tokens", "14"], "--tokens = 14: must be at most 13 after a prompt of 3"),
    "no tokens": (["--prompt", "a", "--tokens", "0"], "must be at least 1"),
    "below absolute zero": (["--prompt", "a", "--temperature", "-1"], "'-1': must be at least 0, and a number"),
    "infinite": (["--prompt", "a", "--temperature", "inf"], "'inf': must be at least 0, and a number"),
    "no nucleus": (["--prompt", "a", "--top_p", "0"], "'0': must be above 0 and at most 1, and a number"),
    "too much nucleus": (["--prompt", "a", "--top_p", "1.01"], "'1.01': must be above 0 and at most 1"),
    "no number": (["--prompt", "a", "--top_p", "nan"], "'nan': must be above 0 and at most 1, and a number"),
    "seed": (["--prompt", "a", "--seed", "-1"], "must be at least 0"),
    "rule": (["--prompt", "a", "--rope_scaling", "ntkk"], "Did you mean 'ntk'?"),
    "nothing to scale": (["--prompt", "a", "--rope_scaling", "ntk"], "must be 'none' for encoding 'learned'"),
    "no file": (["--prompts", "/nowhere"], "--prompts = '/nowhere': cannot be read: No such file or directory"),
    "a folder": (["--prompts", "/"], "--prompts = '/': must be a text file in UTF-8"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_end_with_one_line(case, workdir, capsys):
    arguments, line = BAD_ARGUMENTS[case]
    assert line in refusal([workdir, *arguments], capsys)


def test_bad_files_and_folders_end_with_one_line(workdir, tmp_path, capsys):
    binary, empty = tmp_path / "binary", tmp_path / "empty"
    binary.write_bytes(b"\x89PNG\r\n")
    empty.write_text("a\n\nb\n")
    assert "must be a text file in UTF-8" in refusal([workdir, "--prompts", binary], capsys)
    assert f"{empty}:2 = '': must be text of at least one token" in refusal([workdir, "--prompts", empty], capsys)


def test_a_model_that_cannot_be_used_is_refused_under_the_name_of_the_argument(tmp_path, capsys):
    folder = foreign.llama_folder(tmp_path / "model")

    def refused(path):
        line = refusal([path, "--prompt", "a"], capsys)
        assert line.startswith(f"error: MODEL = '{path}': ")
        return line

    assert "must be a workdir, a Hugging Face folder, a .gguf file or 'smollm2', and does not exist" in refused("none")
    assert "must be a folder with a config.json" in refused(tmp_path)
    (folder / "config.json").write_text(json.dumps(foreign.SETTINGS | {"model_type": "lama"}))
    assert "config.json: model_type = 'lama': must be one of" in refused(folder)
    (folder / "config.json").write_text(json.dumps(foreign.SETTINGS | {"vocab_size": 350}))
    assert "tensor 'model.embed_tokens.weight' has shape (340, 16), not (350, 16)" in refused(folder)
    (folder / "tokenizer.json").unlink()
    assert "must have a tokenizer.json" in refused(folder)


def test_an_encoder_is_refused(workdir, monkeypatch, capsys):
    monkeypatch.setattr(RunConfig, "masks_tokens", True)
    line = refusal([workdir, "--prompt", "a"], capsys)
    assert line.startswith(f"error: MODEL = '{workdir}': must be a causal model: an encoder predicts masked tokens")


def test_a_prompt_with_bytes_that_the_tokenizer_lacks_is_refused(tmp_path, capsys):
    path = tmp_path / "model.gguf"
    test_gguf.write(path, "llama", test_gguf.random_weights(256))
    line = refusal([path, "--prompt", "AB C"], capsys)
    assert line == "error: --prompt = 'AB C': the tokenizer has no token for the byte 0x20 in b'AB C'."


def ids_after(own: Generator, prompt: list[int], new: int) -> list[int]:
    return [token for step in own.generate([np.array(prompt)], new) for _, token in step]


@pytest.mark.torch
@pytest.mark.parametrize("ends", ["config.json", "generation_config.json"])
def test_ids_from_a_hugging_face_folder_are_those_of_transformers_up_to_the_end_token(ends, tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    folder = foreign.llama_folder(tmp_path / "model")
    fields = {name: value for name, value in foreign.SETTINGS.items() if name not in ("model_type", "architectures")}
    theirs = foreign.random_model("llama", **fields, eos_token_id=None, bos_token_id=None)
    theirs.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    own = generation.load(str(folder))
    prompt = own.encode("It was the best of times", "--prompt").tolist()
    greedily = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        expected = theirs.generate(torch.tensor([prompt]), **greedily)[0, len(prompt) :].tolist()
    assert ids_after(own, prompt, 12) == expected
    found = expected[5]
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(settings | {"eos_token_id": [found] if ends == "config.json" else 1})
    )
    if ends == "generation_config.json":
        (folder / ends).write_text(json.dumps({"eos_token_id": found}))
    assert ids_after(generation.load(str(folder)), prompt, 12) == expected[: expected.index(found)]


def test_ids_from_a_gguf_file_are_those_of_the_full_forward_pass_up_to_its_end_token(tmp_path):
    path, weights = tmp_path / "model.gguf", test_gguf.random_weights(256)
    test_gguf.write(path, "llama", weights)
    prompt = generation.load(str(path)).encode("ABBA", "--prompt").tolist()
    assert prompt == [60, 1, 0]
    _, model = foreign.loaded(path)
    text = np.array([prompt + [0] * 10], np.int32)
    for at in range(len(prompt), text.shape[1]):
        text[0, at] = int(foreign.logits_and_loss(model, text, text)[0][0, at - 1].argmax())
    expected = text[0, len(prompt) :].tolist()
    assert ids_after(generation.load(str(path)), prompt, 10) == expected
    test_gguf.write(path, "llama", weights, end=expected[4])
    assert ids_after(generation.load(str(path)), prompt, 10) == expected[: expected.index(expected[4])]


def test_lengths_fit_random_positions():
    drawn = {"positions__training": "randomized", "positions__evaluation": "drawn", "positions__range": 20}
    own = generator(**drawn)
    own.check_length(8, 12, "--prompt", "--tokens")
    with pytest.raises(ConfigError, match=r"--tokens = 13: must be at most 12 after a prompt of 8 tokens"):
        own.check_length(8, 13, "--prompt", "--tokens")
    assert len(text_of(own, ["x" * 8], 12)[0]) == 12
