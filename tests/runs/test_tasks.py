"""Runs on tasks, from the settings to the report."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from configs import tasks as recipe
from posenc_jax import compare, positions, tasks
from posenc_jax.config import RunConfig
from posenc_jax.evaluation import answers
from posenc_jax.evaluation.pooling import Pool
from posenc_jax.evaluation.run_results import accuracy_rows
from posenc_jax.evaluation.scoring import ScoredModel, Scorer
from posenc_jax.evaluation.window_sums import Key, Recall
from posenc_jax.reporting import report
from posenc_jax.reporting.findings import answer_findings
from posenc_jax.results import ANSWERS, Result, read_results
from posenc_jax.runs import run, trained
from posenc_jax.runs.grid import Study
from posenc_jax.runs.program import Program
from posenc_jax.runs.task_data import TaskData
from posenc_jax.schema import ConfigError
from posenc_jax.tasks.flip_flop import IGNORE
from posenc_jax.training import optimizer as optimizers
from posenc_jax.training.step import abstract_model, initial_state, make_train_step
from tests.runs.tiny_runs import ONE
from tests.small import run_config

BRIEF = {"model.num_layers": 1, "model.d_model": 32, "model.d_ff": 32, "model.head_dim": 16, "training.batch_size": 8}
BRIEF |= {"training.duration": "12 steps", "training.warmup": "2 steps", "training.log_every": "3 steps"}
BRIEF |= {"training.validate_every": "12 steps", "training.checkpoint_every": "6 steps", "evaluation.windows": 16}
BRIEF |= {"task.max_size": 4, "task.test_sizes": (2, 4, 6), "evaluation.validation_windows": 8}


def config_of(argument="task=copy", **changes):
    """A run on a task of one layer and twelve steps. `changes` are fields, with "__" for each dot."""
    config = recipe.get_config(f"size=smoke,{argument}")
    with config.unlocked():
        config.update_from_flattened_dict(BRIEF | {field.replace("__", "."): own for field, own in changes.items()})
    return RunConfig.from_mapping(config.to_dict())


def state_of(config):
    return initial_state(config, optimizers.build(config.optimizer, total_steps=12, warmup_steps=0))


def model_of(config, state):
    scorer = Scorer(abstract_model(config)[0], Program(config, devices=ONE).mesh, 4096)
    return ScoredModel(config, scorer, state["params"], state["constants"])


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """The folder and settings of a complete run."""
    workdir, config = tmp_path_factory.mktemp("run") / "copy", config_of()
    run.run(config, workdir, launched=0.0)
    return workdir, config


def test_a_run_leaves_the_accuracy_at_each_size(complete):
    workdir, _ = complete
    rows = read_results(workdir / "results.csv")
    found = {(row.metric, row.eval_length): row for row in rows}
    assert set(found) == {(name, size) for name in ("accuracy", "exact_accuracy") for size in (2, 4, 6)}
    assert {(row.train_length, row.tokens) for row in rows} == {(4, 16)}
    assert all(0 <= row.ci_low <= row.value <= row.ci_high <= 1 for row in rows)
    assert all(found["exact_accuracy", size].value <= found["accuracy", size].value for size in (2, 4, 6))


def test_the_report_is_about_the_task_and_not_about_text(complete, capsys):
    workdir, _ = complete
    text = (workdir / "report.md").read_text(encoding="utf-8")
    assert "was trained on task **copy**, with samples of sizes 1 to 4" in text
    assert "16 samples of each size" in text
    assert (workdir / "figures" / "exact_accuracy.png").exists()
    report.print_summary(workdir)
    shown = capsys.readouterr().out
    assert "Accuracy of whole answers" in shown
    for words in (text, shown):
        assert not any(word in words for word in ("bits per byte", "document", "test split"))


def test_the_same_settings_give_the_same_results(complete, tmp_path):
    workdir, config = complete
    again = dataclasses.replace(config, name="again")
    run.run(again, tmp_path / "again", launched=0.0)
    own, other = (
        [(row.metric, row.value) for row in read_results(x / "results.csv")] for x in (workdir, tmp_path / "again")
    )
    assert own == other


def test_what_needs_text_refuses_a_run_on_a_task_by_name(complete):
    workdir, _ = complete
    with pytest.raises(ConfigError, match="must be of a run on text, not on task 'copy'"):
        trained.read_tokenizer(workdir)


def test_runs_on_one_task_are_compared_and_others_are_refused(complete, tmp_path, capsys):
    workdir, _ = complete
    learned = config_of("task=copy,encoding=learned", task__test_sizes=(2, 4, 6))
    run.run(learned, tmp_path / "learned", launched=0.0)
    compare.main([str(workdir), str(tmp_path / "learned"), "--metric=exact_accuracy", "--markdown"])
    shown = capsys.readouterr().out
    assert "| rope | " in shown
    assert "| learned | " in shown
    run.run(config_of("task=sort"), tmp_path / "sort", launched=0.0)
    with pytest.raises(ConfigError, match="task sort"):
        compare.main([str(workdir), str(tmp_path / "sort")])


def test_a_batch_depends_only_on_the_seed_and_the_step():
    data = TaskData(config_of())
    stream = data.batches(seed=0, start_step=0)
    first = [next(stream) for _ in range(20)]
    later = data.batches(seed=0, start_step=17)
    np.testing.assert_array_equal(next(later), first[17])
    some = data.batches(seed=0, start_step=17, rows=np.array([3, 1]))
    np.testing.assert_array_equal(next(some), first[17][[3, 1]])
    assert (next(data.batches(seed=1, start_step=0)) != first[0]).any()
    assert len({batch.tobytes() for batch in first}) == len(first)


def test_training_samples_have_all_sizes_between_the_least_and_the_largest():
    config = config_of(task__min_size=2, training__batch_size=64)
    batch = next(TaskData(config).batches(0, 0))
    sizes = batch[:, 1].sum(1) - 1  # the copy and its end are scored
    assert batch.shape == config.batch_shape
    assert set(sizes.tolist()) == {2, 3, 4}


def test_only_scored_tokens_are_in_the_loss_and_parts_of_a_batch_have_their_weight():
    config = config_of()
    batch = jnp.asarray(next(TaskData(config).batches(0, 0)))
    state, steps = state_of(config), {}
    for parts in (1, 4):
        own = dataclasses.replace(config, training=dataclasses.replace(config.training, grad_accum_steps=parts))
        optimizer = optimizers.build(own.optimizer, total_steps=12, warmup_steps=0)
        step = jax.jit(make_train_step(own, abstract_model(own)[0], optimizer, None))
        steps[parts] = step(state, batch)[1]
    model = nnx.merge(abstract_model(config)[0], state["params"], state["constants"])
    logits = model(batch[:, 0, :-1])
    nats = -jax.nn.log_softmax(logits)[jnp.arange(8)[:, None], jnp.arange(logits.shape[1]), batch[:, 0, 1:]]
    expected = (nats * batch[:, 1, 1:]).sum() / batch[:, 1].sum()
    for parts in (1, 4):
        assert steps[parts]["loss"] == pytest.approx(float(expected), rel=1e-5)
        assert steps[parts]["gradient_norm"] == pytest.approx(float(steps[1]["gradient_norm"]), rel=1e-4)
        assert "bits_per_byte" not in steps[parts]


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("encoding=rope", {"evaluation__rope_scalings": ("none", "dynamic_ntk", "yarn:beta_fast=1,beta_slow=0.1")}),
        ("encoding=rope,positions=randomized", {"positions__range": 64, "positions__evaluation": "even"}),
        ("encoding=learned", {}),
    ],
)
def test_padding_changes_no_answer_and_unreadable_sizes_have_none(argument, changes):
    config = config_of(f"task=copy,{argument}", **changes)
    data, model = TaskData(config), model_of(config, state_of(config))
    measured = data.measure(model)
    for size in (2, 4, 6):
        alone = data._tested("answers", config.task.task, size, 0)
        assert alone.shape[2] == config.task.task.length(size) + 1
        for rule, found in answers.under_rules(model, alone, config.task.task.length(size)).items():
            other = measured[rule, "answers", size]
            if config.encoding.name == "learned" and size > 4:  # past its table
                assert found is other is None
                continue
            np.testing.assert_allclose(other.nats, found.nats, rtol=1e-4)
            np.testing.assert_array_equal(other.right, found.right)


def test_right_tokens_are_those_that_the_model_finds_most_likely():
    config = config_of("task=copy,encoding=none")
    model = model_of(config, state_of(config))
    samples = TaskData(config)._tested("answers", config.task.task, 4, 0)
    tokens = samples[:, 0]
    graph = nnx.merge(model.scorer.graphdef, model.params, model.constants)
    likely = np.asarray(graph(jnp.asarray(tokens[:, :-1]))).argmax(-1)
    right = [
        sum(x == y for x, y, s in zip(*own, strict=True) if s)
        for own in zip(likely, tokens[:, 1:], samples[:, 1, 1:], strict=True)
    ]
    found = answers.answer(model, samples, 10)
    assert found.right.tolist() == right
    assert set(found.items) == {5.0}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"task__name": "copi"}, "config.task.name = 'copi': must be one of: copy, .* Did you mean 'copy'"),
        ({"task__max_size": 0}, "config.task.max_size = 0: must be at least 1"),
        ({"task__min_size": 5}, "config.task.min_size = 5: must be at most max_size = 4"),
        ({"task__test_sizes": ()}, "config.task.test_sizes = .*: must be one or more increasing sizes"),
        ({"task__test_sizes": (6, 4)}, "config.task.test_sizes = .*: must be one or more increasing sizes"),
        (
            {"task__symbols": 5},
            r"config.task.test_sizes\[2\] = 6: must be at least 1 and at most 5 for task 'unique_copy'",
        ),
        ({"training__length": 11}, "config.training.length = 11: must be None or 10, the tokens of task 'unique_copy'"),
        ({"evaluation__lengths": (6, 10)}, "config.evaluation.lengths = .*: must be None or .6, 10, 14."),
        ({"data__packing": "documents"}, "config.data.packing = 'documents': must be 'none' for task"),
        ({"logging__sample_prompt": "a"}, "config.logging.sample_prompt = 'a': must be '' for task"),
        ({"evaluation__retrieval_tasks": ("passkey",)}, "config.evaluation.retrieval_tasks = .*: must be .. for task"),
        ({"training__duration": "2 epochs"}, "config.training.duration = .*: must be in steps or tokens"),
    ],
)
def test_settings_that_do_not_fit_a_task_are_refused_by_name(changes, told):
    with pytest.raises(ConfigError, match=told):
        config_of("task=unique_copy", **changes)


def test_recurrent_models_read_tasks_but_elmo_sees_the_answers():
    config = recipe.get_config("size=smoke,encoding=none")
    for cell in ("lstm", "elmo"):
        config.model = recipe.base.recurrent(cell, recipe.get_config().model)
        if cell == "elmo":
            with pytest.raises(
                ConfigError,
                match=r"config.model.architecture = 'elmo': must be one of: transformer, rnn",
            ):
                RunConfig.from_mapping(config.to_dict())
        else:
            Program(RunConfig.from_mapping(config.to_dict()), devices=ONE).trace()


def test_an_added_task_needs_only_a_class_and_a_row(monkeypatch):
    assert set(tasks.names()) == set(tasks.TABLE)
    monkeypatch.setitem(tasks.TABLE, "again", "copying.Copy")
    assert config_of("task=again").label == "rope"


def test_an_encoder_predicts_answers_from_both_sides_and_sees_neither_them_nor_padding():
    config = config_of("task=copy,form=encoder", training__grad_accum_steps=1)
    state, data = state_of(config), TaskData(config)
    model = model_of(config, state)
    whole = data._tested("answers", config.task.task, 2, 0)
    padded = np.pad(whole, [(0, 0), (0, 0), (0, 4)])
    own, other = (answers.answer(model, samples, 6) for samples in (whole, padded))
    np.testing.assert_allclose(own.nats, other.nats, rtol=1e-4)
    changed, scored = whole.copy(), whole[:, 1, 1:] > 0
    first = np.flatnonzero(whole[0, 1])[0]
    changed[:, 0, first] = 5  # a token of the answer, which the model does not see
    nats = [model.scorer.predictions(*model[2:], x[:, 0], None, scored, last=6)[0] for x in (whole, changed)]
    np.testing.assert_allclose(nats[0][:, first:], nats[1][:, first:], rtol=1e-5)
    assert (nats[0][:, first - 1] != nats[1][:, first - 1]).any()
    changed[:, 0, 1] = 5  # a token of the question
    assert (answers.answer(model, changed, 6).nats != own.nats).any()
    batch = jnp.asarray(np.pad(whole, [(0, 0), (0, 0), (0, 4)])[:8])
    optimizer = optimizers.build(config.optimizer, total_steps=12, warmup_steps=0)
    step = jax.jit(make_train_step(config, abstract_model(config)[0], optimizer, None))
    assert step(state, batch)[1]["loss"] == pytest.approx(own.nats[:8].sum() / own.items[:8].sum(), rel=1e-4)


def test_an_encoding_that_would_read_padding_is_refused_by_name():
    config = config_of("task=copy,encoding=p_rope,form=encoder", encoding__key_offset=True)
    with pytest.raises(ConfigError, match=r"config.model.causal = False: must be True for PRoPE"):
        abstract_model(config)


COUPLED = {"task__test_sizes": (2, 4, 6), "task__max_size": 4}


@pytest.mark.parametrize(("encoding", "form"), [("learned", "decoder"), ("t5", "decoder"), ("rope", "encoder")])
def test_places_of_samples_are_the_positions_in_training_and_evaluation(encoding, form):
    config = config_of(f"task=copy,positions=coupled,encoding={encoding},form={form}", **COUPLED)
    config = dataclasses.replace(config, positions=dataclasses.replace(config.positions, range=12))
    state, data = state_of(config), TaskData(config)
    model = model_of(config, state)
    planes = data._tested("answers", config.task.task, 4, 0)
    found = answers.answer(model, planes, 10)
    read = planes[:, 2, 1:] if form == "encoder" else planes[:, 2, :-1]
    one_by_one = [
        model.scorer.predictions(*model[2:], planes[i : i + 1, 0], read[i : i + 1], *hidden, last=10)[0]
        for i in range(3)
        for hidden in [[planes[i : i + 1, 1, 1:] > 0] if form == "encoder" else []]
    ]
    nats = (np.concatenate(one_by_one) * planes[:3, 1, 1:]).sum(1)
    np.testing.assert_allclose(found.nats[:3], nats, rtol=1e-4)
    contiguous = model.scorer.predictions(*model[2:], planes[:1, 0], None, last=10)[0]
    assert not np.allclose(one_by_one[0], contiguous, rtol=1e-3)
    drawn = positions.of_samples(config.positions, jnp.asarray(planes[:, 2]), jax.random.key(0))
    shift = np.asarray(drawn - planes[:, 2])
    assert np.all(shift[planes[:, 2] == 0] == 0)
    assert np.all(drawn < 12)
    assert len(set(shift[planes[:, 2] > 0].tolist())) > 3
    assert np.all(np.ptp(np.where(planes[:, 2] > 0, shift, shift.max(1, keepdims=True)), axis=1) == 0)


def test_a_run_with_places_trains_and_is_evaluated_past_its_training(tmp_path):
    config = config_of("task=addition,positions=coupled,encoding=learned", **COUPLED)
    run.run(config, tmp_path / "run", launched=0.0)
    found = {row.eval_length: row.value for row in read_results(tmp_path / "run" / "results.csv")}
    assert found.keys() == {2, 4, 6}
    assert None not in found.values()


@pytest.mark.parametrize(
    ("argument", "changes", "told"),
    [
        (
            "task=parity",
            {"positions__training": "coupled"},
            "'coupled': must be .*, random_float, for task 'parity'",
        ),
        (
            "task=copy",
            {"positions__training": "abacus"},
            "'abacus': must be .*, coupled, for task 'copy'",
        ),
        ("task=copy", {"positions__training": "coupled"}, r"positions.evaluation = 'contiguous': must be 'drawn' for"),
        ("task=copy,positions=coupled", {"positions__per_layer": True}, r"positions.per_layer = True: must be False"),
    ],
)
def test_schedules_that_a_task_does_not_have_are_refused_by_name(argument, changes, told):
    with pytest.raises(ConfigError, match=told):
        config_of(argument, **changes)


def test_text_has_no_places():
    with pytest.raises(
        ConfigError,
        match=r"config.positions.training = 'coupled': must be .*, random_float, for text",
    ):
        run_config(positions__training="coupled", positions__evaluation="drawn")


def answers_of(right, items=4):
    """Answers to 20 samples, of which the first have `right` right tokens of `items`, and the others none."""
    found = np.zeros(20)
    found[: len(right)] = right
    return Recall(np.zeros(20), found, np.full(20, float(items)))


def test_the_accuracy_is_over_tokens_and_over_whole_answers():
    row = functools.partial(Result, "run", "rope", "none", 0, 4, 8)
    by_token, exact = accuracy_rows(row, "sparse_answers", answers_of([4, 4, 4, 2, 2]))
    assert (by_token.metric, by_token.value, by_token.tokens) == ("sparse_accuracy", 16 / 80, 20)
    assert (exact.metric, exact.value) == ("sparse_exact_accuracy", 3 / 20)
    assert (exact.ci_low, exact.ci_high) == pytest.approx((0.0524, 0.3604), abs=1e-4)  # Wilson's, by hand


def test_a_study_pools_the_samples_of_all_seeds():
    seeds = {seed: {Key("none", "answers", 8): answers_of([4] * count)} for seed, count in ((0, 20), (1, 10))}
    rows = Pool("study", {"rope": seeds}, (), 4, 100).results("")
    assert [(row.metric, row.value, row.tokens) for row in rows] == [
        ("accuracy", 0.75, 40),
        ("exact_accuracy", 0.75, 40),
    ]


def test_findings_say_up_to_which_size_answers_are_right():
    ends = {"rope": (0.95, 0.95, 0.5, 0.95), "none": (0.5, 0.95, 0.95, 0.95)}
    rows = [
        Result("study", name, "none", None, 4, 2 * (i + 1), "exact_accuracy", low, low, 1.0, 20)
        for name, lows in ends.items()
        for i, low in enumerate(lows)
    ]
    assert list(answer_findings(rows)) == [
        "**rope**: at least 90 % of the answers are right up to size 4 (1x).",
        "**none**: fewer than 90 % of the answers may be right at the smallest size, 2.",
    ]


def test_each_case_of_a_task_has_its_metrics():
    config = config_of("task=flip_flop,encoding=none", task__min_size=4)
    measured = TaskData(config).measure(model_of(config, state_of(config)))
    assert {key.metric for key in measured} == set(ANSWERS)
    ignored = {}
    for case, task in config.task.task.cases().items():
        tokens = TaskData(config)._tested(case, task, 6, 0)[:, 0]
        ignored[case] = float(np.mean(tokens[:, 3:-2:2] == IGNORE))
    assert ignored["dense_answers"] < ignored["answers"] < ignored["sparse_answers"]


def test_a_study_compares_runs_on_one_task_with_the_same_sizes():
    config = ConfigDict({"name": "study", "baseline": ""})
    config.base = recipe.get_config("size=smoke")
    for field, changed, told in (
        ("task.name", "unique_copy", "task.name"),
        ("task.max_size", 4, "training.pretrained_length"),
        ("task.test_sizes", "(8,)", "evaluation.lengths"),
    ):
        config.sweep = ConfigDict({"own": (f"{field}={changed}", "encoding.base=1e4")})
        with pytest.raises(ConfigError, match=f"'{told}': must be the same in all runs"):
            Study.from_mapping(config.to_dict())
