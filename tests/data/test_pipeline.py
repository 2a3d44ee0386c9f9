"""Batches are a function of seed and step. Windows stay within documents and cover them."""

import itertools

import numpy as np
import pytest

from posenc_jax.data import pipeline
from posenc_jax.data.tokens import Split
from posenc_jax.schema import ConfigError

SIZES = (100, 3, 9, 1, 57, 8, 200)


def numbered(*sizes):
    """A split whose token i is the number i, so that a window shows where it comes from."""
    offsets = np.cumsum([0, *sizes])
    names = tuple(f"document {i}" for i in range(len(sizes)))
    return Split("train", np.arange(offsets[-1], dtype=np.uint32), offsets, names, int(offsets[-1]))


def batches(split, count, **options):
    options = {"length": 8, "batch_size": 6, "seed": 0} | options
    return list(itertools.islice(pipeline.training_batches(split, **options), count))


def documents(split, windows):
    """The documents of the first and the last token of each window."""
    return [np.searchsorted(split.offsets, windows[:, i], side="right") - 1 for i in (0, -1)]


def test_batches_are_windows_of_one_token_more_than_the_length():
    batch = batches(numbered(*SIZES), 1)[0]
    assert batch.shape == (6, 9)
    assert batch.dtype == np.int32
    assert np.all(np.diff(batch) == 1)


def test_windows_never_reach_into_another_document():
    split = numbered(*SIZES)
    windows = np.concatenate(batches(split, 100))
    first, last = documents(split, windows)
    assert np.array_equal(first, last)
    assert set(first) == {0, 2, 4, 6}  # the other documents are too short


def test_an_epoch_draws_every_window_once():
    split = numbered(*SIZES)
    per_document = [(size - 1) // 8 for size in SIZES]
    total = sum(per_document)
    assert pipeline.epoch_tokens(split, 8) == total * 8
    epochs = np.concatenate(batches(split, 5 * total, batch_size=1)).reshape(5, total, 9)
    for windows in epochs:
        first, _ = documents(split, windows)
        assert np.bincount(first, minlength=len(SIZES)).tolist() == per_document
        targets = np.unique(windows[:, 1:])
        assert len(targets) > (total - 4) * 8  # the offset costs each of the 4 documents less than one window


def test_an_epoch_trains_on_no_token_more_often_than_the_last_window_overlaps():
    windows = np.concatenate(batches(numbered(100), 12, batch_size=1))
    starts = np.sort(windows[:, 0])
    assert np.all(np.diff(starts)[:-1] == 8)
    assert 0 < starts[-1] - starts[-2] <= 8


def test_every_token_is_trained_on_in_some_epoch():
    split = numbered(50, 9, 20)
    assert set(np.concatenate(batches(split, 100))[:, 1:].flat) == set(range(79)) - {0, 50, 59}


def test_window_boundaries_vary_between_epochs():
    split = numbered(8 * 40 + 1)  # the windows fit exactly
    starts = np.concatenate(batches(split, 400, batch_size=10))[:, 0]
    assert set(starts % 8) == set(range(8))


def test_epochs_come_in_different_orders():
    epochs = np.stack(batches(numbered(8 * 40 + 1), 2, batch_size=40))
    assert not np.array_equal(epochs[0, :, 0] // 8, np.arange(40))
    assert not np.array_equal(epochs[0, :, 0] // 8, epochs[1, :, 0] // 8)


@pytest.mark.parametrize("step", [1, 7, 12, 1000])
def test_a_run_started_at_a_step_goes_on_as_if_it_had_never_stopped(step):
    split = numbered(*SIZES)
    assert np.array_equal(batches(split, step + 4)[step:], batches(split, 4, start_step=step))


def test_the_same_seed_gives_the_same_batches_and_another_seed_others():
    split = numbered(*SIZES)
    assert np.array_equal(batches(split, 20, seed=3), batches(split, 20, seed=3))
    seeds = [np.stack(batches(split, 30, seed=seed)) for seed in range(3)]
    for one, other in itertools.combinations(seeds, 2):
        assert not np.array_equal(one, other)


def test_the_second_epoch_of_a_seed_is_not_the_first_of_the_next():
    split = numbered(8 * 40 + 1)
    second = batches(split, 2, batch_size=40, seed=0)[1]
    assert not np.array_equal(second, batches(split, 1, batch_size=40, seed=1)[0])


@pytest.mark.parametrize("rows", [[0, 1, 2], [5], [1, 4]])
def test_rows_made_alone_are_those_of_the_whole_batch(rows):
    split = numbered(*SIZES)
    alone = batches(split, 20, start_step=5, rows=np.array(rows))
    assert np.array_equal(alone, np.stack(batches(split, 20, start_step=5))[:, rows])


def test_a_batch_may_be_larger_than_an_epoch():
    windows = batches(numbered(17), 3, batch_size=5)
    assert all(batch.shape == (5, 9) for batch in windows)
    assert np.all(np.diff(np.concatenate(windows)) == 1)


def test_short_documents_are_left_out_with_a_warning_if_they_are_most_of_the_text(caplog):
    assert pipeline.epoch_tokens(numbered(8, 9, 8, 9), 8) == 16
    assert not caplog.messages
    assert pipeline.epoch_tokens(numbered(8, 9, 8), 8) == 8
    assert caplog.messages[-1].startswith("config.training.length = 8: 64 % of the train tokens are not used")


@pytest.mark.parametrize("use", [batches, lambda split, _, length: pipeline.epoch_tokens(split, length)])
def test_a_length_that_no_document_has_is_refused(use):
    split = numbered(10, 30, 20)
    problem = r"config.training.length = 30: must be below 30, the tokens of 'document 1', the longest .* train split"
    with pytest.raises(ConfigError, match=problem):
        use(split, 1, length=30)
    use(split, 1, length=29)


def evaluation(split, count, length=8):
    return pipeline.evaluation_windows(split, length=length, count=count)


@pytest.mark.parametrize("count", [1, 2, 4, 5, 11, 30, 1000])
def test_evaluation_windows_do_not_overlap_nor_leave_their_document(count):
    split = numbered(*SIZES)
    windows = evaluation(split, count)
    available = sum((size - 1) // 8 for size in SIZES)
    assert windows.tokens.shape == (min(count, available), 9)
    assert windows.tokens.dtype == np.int32
    assert np.all(np.diff(windows.tokens) == 1)
    first, last = documents(split, windows.tokens)
    assert np.array_equal(first, last)
    assert windows.documents == tuple(split.names[i] for i in first)
    assert np.all(np.diff(windows.tokens[:, 0]) >= 8)


def test_evaluation_windows_are_shared_evenly_among_documents():
    split = numbered(1000, 9, 1000, 40, 1000)
    assert np.bincount(documents(split, evaluation(split, 5).tokens)[0]).tolist() == [1, 1, 1, 1, 1]
    assert np.bincount(documents(split, evaluation(split, 17).tokens)[0]).tolist() == [4, 1, 4, 4, 4]
    assert np.bincount(documents(split, evaluation(split, 35).tokens)[0]).tolist() == [10, 1, 10, 4, 10]


def test_few_evaluation_windows_are_spread_over_all_documents():
    split = numbered(*[100] * 100)
    first, _ = documents(split, evaluation(split, 10).tokens)
    assert first.tolist() == list(range(0, 100, 10))


def test_evaluation_windows_are_spread_evenly_over_a_document():
    starts = evaluation(numbered(1001), 4).tokens[:, 0]
    assert starts.tolist() == [121, 371, 621, 871]  # the middles of the quarters, minus half a window


def test_evaluation_windows_fill_a_document_that_they_fit_exactly():
    assert evaluation(numbered(8 * 10 + 1), 99).tokens[:, 0].tolist() == list(range(0, 80, 8))


def test_an_evaluation_length_that_no_document_has_is_refused():
    problem = "must be below 30, the tokens of 'document 1', the longest document of the train split"
    with pytest.raises(ConfigError, match=f"config.evaluation.lengths = 30: {problem}"):
        evaluation(numbered(10, 30), 4, length=30)
    with pytest.raises(ConfigError, match=f"config.training.length = 30: {problem}"):
        pipeline.evaluation_windows(numbered(10, 30), length=30, count=4, field="config.training.length")
