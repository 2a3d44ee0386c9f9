"""Random settings and texts are either accepted unchanged or refused with ConfigError; nothing else happens.

FUZZ_EXAMPLES=1000000 pytest -n 0 tests/test_fuzz.py tries this many examples, with new ones each time.
"""

import copy
import importlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import base, rope_extrap
from posenc_jax import encodings
from posenc_jax.config import RunConfig
from posenc_jax.data import tokenizers
from posenc_jax.encodings import frequencies
from posenc_jax.encodings.position_maps import METHODS
from posenc_jax.model_config import RECURRENT
from posenc_jax.runs.grid import Study
from posenc_jax.schema import ConfigError, Duration, flat, literal, plain
from posenc_jax.training import memory
from posenc_jax.training.step import abstract_model
from tests.abstract import trace
from tests.data.settings import settings as data_settings

EXAMPLES = os.environ.get("FUZZ_EXAMPLES")
fuzz = settings(max_examples=int(EXAMPLES or 400), deadline=None, derandomize=not EXAMPLES, database=None)
fewer = settings(fuzz, max_examples=int(EXAMPLES or 80))
traced = settings(fuzz, max_examples=int(EXAMPLES or 25))

FILES = sorted(path.stem for path in Path(base.__file__).parent.glob("[!_]*.py"))
ARGUMENTS = {  # in addition to the default of each file
    "rope_extrap": [f"size=smoke,encoding={name}" for name in encodings.names()],
    "recurrent": ["cell=elmo,size=smoke"],
    "hybrid": ["form=irope", "form=drope"],
    "bert": ["positions=rope,tokens=bytes"],
}


def recipe(file, argument=""):
    get_config = importlib.import_module(f"configs.{file}").get_config
    return (get_config(argument) if argument else get_config()).to_dict()


def complete(mapping):
    """Whether all settings are given. Open ones come from the model that a run starts from."""
    return None not in flat(mapping).values()


EVERY_RECIPE = [recipe(file, argument) for file in FILES for argument in ("", *ARGUMENTS.get(file, ()))]
RECIPES = [mapping for mapping in EVERY_RECIPE if complete(mapping)]
WORDS = sorted({value for mapping in RECIPES for value in flat(mapping).values() if isinstance(value, str)})

text = st.text(max_size=12) | st.text("=,:.|'\"() 0123456789eE+-_steps", max_size=20) | st.sampled_from(WORDS)
numbers = (
    st.integers(-4, 4100)
    | st.integers()
    | st.floats()
    | st.floats(0, 10)
    | st.booleans()
    | st.sampled_from([10**400, 2**31, 2**53 + 1, -0.0, 5e-324, 1e308])
)
scalars = st.none() | numbers | text | st.binary(max_size=3) | st.sampled_from(["nan", "\udcff", "a\0b", "~none/x"])
anything = st.recursive(
    scalars,
    lambda own: (
        st.lists(own, max_size=3)
        | st.lists(own, max_size=3).map(tuple)
        | st.dictionaries(
            st.text(max_size=4) | st.sampled_from(["name", "architecture"]) | st.integers(), own, max_size=3
        )
        | st.sets(st.integers(), max_size=2)
    ),
    max_leaves=6,
)


def like(value):
    """Values of a field's type. Integers are often ones that are compatible with other fields."""
    kinds = {bool: st.booleans(), float: st.floats(0, 1) | st.floats(), str: text | st.just(value)}
    kinds[int] = st.sampled_from([1, 2, 4, 8, 16, 64, 128, 256, 1024]) | st.integers(0, 5000)
    if isinstance(value, tuple):
        item = like(value[0]) if value else text
        return st.lists(item, max_size=4).map(tuple) | st.lists(item, max_size=3, unique=True).map(sorted).map(tuple)
    return kinds[type(value)]


def put(mapping, path, value):
    *sections, last = path.split(".")
    for section in sections:
        mapping = mapping[section]
    mapping[last] = value


@st.composite
def overrides(draw):
    """A recipe, and values that replace some of its fields or sections, or are added to them."""
    mapping = copy.deepcopy(draw(st.sampled_from(RECIPES)))
    fields = flat(mapping)
    sections = [name for name, value in mapping.items() if isinstance(value, Mapping)]
    if draw(st.integers(0, 9)) == 0:
        path = draw(st.sampled_from([*sections, "lr", *(f"{section}.typo" for section in sections)]))
        return mapping, {path: draw(anything)}
    paths = draw(st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=3, unique=True))
    return mapping, {path: draw(like(fields[path]) | anything) for path in paths}


def lookup(mapping, path):
    for name in path.split("."):
        mapping = mapping[name]
    return mapping


def same(found, given):
    """Whether a setting in JSON form equals the given one: integers may become floats, and tuples lists."""
    if isinstance(given, Mapping):
        return isinstance(found, Mapping) and all(same(found[key], value) for key, value in given.items())
    if isinstance(given, list | tuple):
        return isinstance(found, list) and len(found) == len(given) and all(map(same, found, given))
    if type(found) is float and type(given) is int:
        return found == float(given)
    if type(found) is type(given) is str and found != given:
        return Duration.parse(found, "") == Duration.parse(given, "")
    return type(found) is type(given) and found == given


def accepted(make, is_named, *arguments):
    """The result of `make`, or None if the arguments are refused by an error that names its subject."""
    try:
        return make(*arguments)
    except ConfigError as error:
        refused = error
    assert is_named(refused.field), refused
    return None


def paths(mapping, prefix="config"):
    """The paths of a setting or section and of everything inside it."""
    yield prefix
    for key, value in mapping.items() if isinstance(mapping, Mapping) else ():
        yield from paths(value, f"{prefix}.{key}")


@fuzz
@given(overrides())
def test_an_override_takes_effect_or_is_refused_by_name(drawn):
    mapping, given_values = drawn
    original = copy.deepcopy(mapping)
    for path, value in given_values.items():
        put(mapping, path, value)
    known = {*paths(original), *paths(mapping)}
    config = accepted(RunConfig.from_mapping, lambda field: field.partition("[")[0] in known, mapping)
    if config is None:
        return
    found = plain(config)
    for path, value in given_values.items():
        assert same(lookup(found, path), value), (path, value)
    assert RunConfig.from_mapping(json.loads(json.dumps(found))) == config
    assert len(config.fingerprint) == 12
    json.dumps(found).encode()
    for field in flat(original).keys() - given_values.keys():
        assert same(lookup(found, field), lookup(original, field)), field


SMALL = [
    *(recipe("rope_extrap", f"size=smoke,encoding={name}") for name in encodings.names()),
    *(recipe("recurrent", f"size=smoke,cell={cell}") for cell in RECURRENT),
    *(recipe("hybrid", f"size=smoke,form={form}") for form in ("irope", "drope")),
    recipe("bert", "size=smoke,positions=rope"),
    recipe("qwen3", "size=smoke"),
]
small_numbers = st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 31, 32, 33, 63, 64, 65, 127, 128])


@st.composite
def small_runs(draw):
    """A small recipe with one or two layers. Some fields are changed, mostly to compatible values."""
    mapping = copy.deepcopy(draw(st.sampled_from(SMALL)))
    fields = flat(mapping)
    own = [field for field in fields if field.startswith("encoding.") and field != "encoding.name"]
    shapes = [field for field in fields if field.startswith(("model.", "positions.", "temperature."))]
    others = [field for field in fields if field.startswith(("training.", "evaluation.", "optimizer."))]
    chosen = [draw(st.lists(st.sampled_from(part), max_size=2)) for part in (own, shapes, others) if part]
    for field in {field for part in chosen for field in part}:
        put(mapping, field, draw(small_numbers if type(fields[field]) is int else like(fields[field])))
    put(mapping, "model.num_layers", draw(st.integers(1, 2)))
    return mapping


@traced
@given(small_runs())
def test_what_is_accepted_can_be_trained_and_evaluated(mapping):
    """The run is traced, not executed: only shapes and types can be wrong before the first number is computed."""
    known = {*paths(mapping)}
    config = accepted(RunConfig.from_mapping, lambda field: field.partition("[")[0] in known, mapping)
    if config is not None:
        accepted(trace, lambda field: field in known or f"config.{field}" in known, config)


HUGE = {int: (2**31 - 1, 2**30), float: (3e38, -3e38)}


@pytest.mark.parametrize("changes", [{}, {"positions.training": "randomized"}, {"temperature.form": "llama4"}], ids=str)
def test_a_huge_number_is_refused_by_name_or_can_be_traced(changes):
    """Accepted numbers are traced together, if the combination is accepted."""
    mapping = copy.deepcopy(SMOKE)
    for field, value in changes.items():
        put(mapping, field, value)
    original = flat(mapping)
    for field, value in original.items():
        lengths = [(*value, huge) for huge in HUGE[int]] if field == "evaluation.lengths" else ()
        for huge in (*HUGE.get(type(value), ()), *lengths):
            put(mapping, field, huge)
            named = lambda name: name.removeprefix("config.").partition("[")[0] in original  # noqa: E731
            if accepted(RunConfig.from_mapping, named, mapping) is None:
                put(mapping, field, value)
    assert flat(mapping)["training.steps_per_dispatch"] == HUGE[int][1]
    for field in ("training.batch_size", "training.grad_accum_steps"):
        put(mapping, field, original[field])  # so large a batch is refused because of its size in bytes
    trace(RunConfig.from_mapping(mapping))
    put(mapping, "training.batch_size", 2**30)
    with pytest.raises(ConfigError, match=r"config.training.batch_size = 1073741824: must be smaller: 10 batches"):
        trace(RunConfig.from_mapping(mapping))


@pytest.mark.parametrize("name", encodings.names())
def test_a_huge_number_of_an_encoding_is_refused_by_name_or_makes_a_model(name):
    mapping = rope_extrap.get_config(f"size=smoke,encoding={name}").to_dict()
    for field, value in flat(mapping["encoding"]).items():
        for huge in HUGE[int] + (10**6,) if type(value) is int else ():
            put(mapping, f"encoding.{field}", huge)
            config = accepted(RunConfig.from_mapping, f"config.encoding.{field}".startswith, mapping)
            model = config and accepted(abstract_model, f"encoding.{field}".__eq__, config)
            if model is not None:
                accepted(memory.check_fits, "config.encoding.name".__eq__, config, None, model[1])
            put(mapping, f"encoding.{field}", value)


argument_text = text | st.lists(
    text | st.sampled_from(["size=smoke", "size=base", "cell=gru", "form=irope", "encoding=t5", "tokens=bytes"]),
    max_size=3,
).map(",".join)


@fuzz
@given(st.sampled_from([name for name in FILES if name != "base"]), argument_text)
def test_the_argument_of_a_file_is_all_used_or_refused(file, argument):
    chosen = accepted(recipe, lambda field: field.startswith("--config"), file, argument)
    if chosen is None:
        return
    parts = [part for part in argument.split(",") if part]
    assert len(dict(part.split("=") for part in parts)) == len(parts)
    assert chosen == recipe(file, ",".join(reversed(parts)))
    assert (chosen == recipe(file)) == (not parts or parts == ["encoding=rope"] or parts == ["form=smollm3"])
    if complete(chosen):
        RunConfig.from_mapping(chosen)


@fuzz
@given(scalars | st.from_regex(r"[0-9.]{1,8}([eE][+-]?[0-9]{1,3})? ?(step|token|epoch)s?", fullmatch=True))
def test_a_duration_comes_back_or_is_refused(value):
    duration = accepted(Duration.parse, "its name".__eq__, value, "its name")
    if duration is None:
        return
    assert Duration.parse(duration.plain(), "") == duration
    amount, unit = re.fullmatch(r"(\S*?) *([a-z]+)", value).groups()
    assert (duration.amount, duration.unit) == (float(amount), unit.rstrip("s") + "s")
    assert duration.steps(tokens_per_step=2**31, tokens_per_epoch=1) >= float(amount) * (duration.unit == "steps")


RULES = (*frequencies.RULES, *METHODS)
rule_number = st.floats(allow_nan=True).map(repr) | st.integers(-1, 40).map(str) | text
rule_parameter = st.sampled_from(
    sorted({name for rule in RULES for name in frequencies._parameters(rule)} | {"original_length", "base"})
)
assignment = st.tuples(rule_parameter, st.lists(rule_number, min_size=1, max_size=4).map("|".join)).map("=".join)
rule_text = text | st.tuples(st.sampled_from(sorted(RULES)), st.lists(assignment, max_size=3).map(",".join)).map(
    ":".join
)


@fuzz
@given(
    rule_text, st.sampled_from([4, 8, 64]), st.floats(1, exclude_min=True, allow_infinity=False), st.integers(2, 2**31)
)
def test_a_scaling_rule_comes_back_and_gives_frequencies_or_is_refused(written, width, rope_base, length):

    def checked(field):
        scaling = frequencies.parse(written, field)
        scaling.check(width, rope_base, length, (2, 1024, 2**31 - 1), field)
        return scaling

    scaling = accepted(checked, "its name".__eq__, "its name")
    if scaling is None:
        return
    assert frequencies.parse(str(scaling)) == scaling
    if ":" in written:
        given = dict(part.split("=") for part in written.partition(":")[2].split(","))
        kept, defaults = dict(scaling.parameters), frequencies._parameters(scaling.rule)
        assert kept.keys() <= given.keys()
        assert all(float(given[name]) == defaults[name] for name in given.keys() - kept.keys())


change = text | st.lists(
    st.tuples(
        st.sampled_from(
            ["seed", "encoding", "encoding.base", "model.head_dim", "data.path", "evaluation.lengths", "lr"]
        ),
        text | numbers.map(repr) | st.sampled_from(["rope", "alibi", "'a b'", "(32,64)", "{[]}", "(" * 300]),
    ).map("=".join),
    max_size=3,
).map(" ".join)


@fewer
@given(
    st.dictionaries(st.sampled_from("ab"), st.lists(change, min_size=1, max_size=2).map(tuple), min_size=1)
    | st.dictionaries(text, st.lists(change, max_size=2).map(tuple) | change | scalars, min_size=1, max_size=2)
)
def test_a_sweep_changes_what_it_says_or_is_refused(axes):
    own = {"name": "fuzz", "question": "?", "baseline": "", "base": SMOKE, "sweep": axes}
    study = accepted(Study.from_mapping, lambda field: field.startswith("config."), own)
    if study is None:
        return
    for spec in study.runs:
        assert len(spec.name) < 200
        assert RunConfig.from_mapping(json.loads(json.dumps(plain(spec.config)))) == spec.config
    for text_of_change in (one for values in axes.values() if isinstance(values, tuple) for one in values):
        for part in re.findall(
            r"""(?<=\s)(seed|encoding\.base|model\.head_dim)=([^\s'"]+)(?=\s)""", f" {text_of_change} "
        ):
            found = [lookup(plain(spec.config), part[0]) for spec in study.runs]
            assert any(same(item, literal(part[1])) for item in found), part


SMOKE = rope_extrap.get_config("size=smoke").to_dict()
DEFINITIONS = {
    kind: tokenizers.train(
        data_settings(Path("unused"), tokenizer=kind, vocab_size=600), [b"some words " * 50]
    ).definition
    for kind in ("bpe", "wordpiece")
}


@st.composite
def definitions(draw):
    """A tokenizer definition with one changed part, with missing characters, or a text that is not JSON."""
    kind = draw(st.sampled_from(sorted(DEFINITIONS)))
    whole = DEFINITIONS[kind]
    if draw(st.booleans()):
        start, size = draw(st.integers(0, len(whole))), draw(st.integers(0, 40))
        return kind, draw(text) if draw(st.integers(0, 5)) == 0 else whole[:start] + draw(text) + whole[start + size :]
    changed = json.loads(whole)
    parts = [changed]
    while draw(st.booleans()) and isinstance(parts[-1], dict) and any(isinstance(x, dict) for x in parts[-1].values()):
        parts.append(draw(st.sampled_from([item for item in parts[-1].values() if isinstance(item, dict)])))
    if parts[-1]:
        key = draw(st.sampled_from(sorted(parts[-1])))
        parts[-1][key] = draw(st.none() | st.integers(-1, 700) | st.booleans() | text | st.just({}) | st.just([]))
    return kind, json.dumps(changed)


@fewer
@given(definitions(), st.binary(max_size=40))
def test_a_tokenizer_is_made_that_gives_back_every_byte_or_its_definition_is_refused(definition, content):
    kind, written = definition
    config = data_settings(Path("unused"), tokenizer=kind, vocab_size=600)
    tokenizer = accepted(tokenizers.load, "config.data.tokenizer".__eq__, config, written)
    if tokenizer is None:
        return
    ids = tokenizer.encode(content)
    assert tokenizer.decode(ids) == content
    assert tokenizer.token_bytes[ids].sum() == len(content)


@pytest.mark.parametrize("file", FILES)
def test_no_field_is_of_a_type_that_the_command_line_cannot_change(file):
    for field, value in flat(recipe(file)).items():
        assert value is None or type(value) in (bool, int, float, str, tuple), field  # None: open, with a known type
