"""The replay buffer, against a deque and by its statistics."""

import time
from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy import stats

import gempo_neg as gempo

CAPACITY = 7


def transitions(first, count):
    """Transitions number first, first + 1, ...: each field tells the number."""
    number = np.arange(first, first + count, dtype=np.float32)
    obs = number[:, None] + np.float32([0, 0.5])
    return gempo.Transition(obs, -number[:, None], number, obs + 1, (number % 2).astype(np.float32))


def fill(batches, capacity=CAPACITY):
    buffer, written, kept = gempo.create_buffer(capacity, 2, 1), 0, deque(maxlen=capacity)
    for size in batches:
        buffer = gempo.add_transitions(buffer, transitions(written + 1, size))
        kept.extend(range(written + 1, written + size + 1))
        written += size
    return buffer, kept


@given(st.lists(st.integers(1, CAPACITY), min_size=1, max_size=6))
def test_buffer_keeps_what_a_deque_keeps_in_whole_rows(batches):
    buffer, kept = fill(batches)
    assert buffer.count == sum(batches)
    stored = jax.tree.map(np.asarray, buffer.storage)
    filled = stored.rewards > 0  # numbers start at one, empty rows are zero
    assert sorted(stored.rewards[filled]) == sorted(kept)
    for row in np.flatnonzero(filled):
        expected = transitions(stored.rewards[row], 1)
        assert all(
            (ours[row] == theirs[0]).all() for ours, theirs in zip(stored, expected, strict=True)
        )


def test_a_batch_over_the_end_goes_on_at_the_start():
    buffer, _ = fill([5, 4])  # 6, 7 at the end, 8, 9 over the oldest
    np.testing.assert_array_equal(buffer.storage.rewards, [8, 9, 3, 4, 5, 6, 7])


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(0, 100))
def test_samples_are_whole_transitions_that_were_written(batches, seed):
    buffer, kept = fill(batches)
    batch = gempo.sample_batch(buffer, jax.random.key(seed), 32)
    assert set(np.asarray(batch.rewards)) <= set(kept)
    np.testing.assert_array_equal(batch.obs[:, 0], batch.rewards)
    np.testing.assert_array_equal(batch.actions[:, 0], -batch.rewards)
    np.testing.assert_array_equal(batch.next_obs[:, 0], batch.rewards + 1)
    np.testing.assert_array_equal(batch.terminations, batch.rewards % 2)


def test_samples_are_uniform_over_the_filled_rows_before_and_after_wrapping():
    for batches in ([5], [5, 4, 2]):
        buffer, kept = fill(batches)
        rewards = np.asarray(gempo.sample_batch(buffer, jax.random.key(0), 10_000).rewards)
        counts = [(rewards == number).sum() for number in kept]
        assert sum(counts) == 10_000
        assert stats.chisquare(counts).pvalue > 0.01  # the key is fixed, so this does not flicker


def test_buffer_is_float32_and_as_large_as_it_says():
    buffer = gempo.create_buffer(100, 17, 6)
    assert {leaf.dtype for leaf in buffer.storage} == {np.dtype(np.float32)}
    assert sum(leaf.nbytes for leaf in buffer.storage) == 4 * 100 * (2 * 17 + 6 + 2)
    row = gempo.Transition(*(np.ones((1, *leaf.shape[1:])) for leaf in buffer.storage))
    assert row.obs.dtype == np.float64
    stored = gempo.add_transitions(buffer, row)
    assert {leaf.dtype for leaf in stored.storage} == {np.dtype(np.float32)}


def test_add_transitions_writes_in_place_and_fast():
    """The storage stays where it is; its 60 MB would take longer to copy than 10 ms."""
    buffer = gempo.create_buffer(500_000, 14, 1)
    places = [leaf.unsafe_buffer_pointer() for leaf in buffer.storage]
    times = []
    for i in range(10):
        passed_in = buffer
        start = time.monotonic()
        rows = gempo.Transition(*(np.full((100, *x.shape[1:]), i) for x in buffer.storage))
        buffer = jax.block_until_ready(gempo.add_transitions(passed_in, rows))
        times.append(time.monotonic() - start)
        assert all(leaf.is_deleted() for leaf in passed_in.storage)
    assert [leaf.unsafe_buffer_pointer() for leaf in buffer.storage] == places
    assert min(times) < 0.01
    np.testing.assert_array_equal(buffer.storage.rewards[:1000:100], np.arange(10))


def test_more_transitions_than_the_buffer_holds_are_refused():
    buffer = gempo.create_buffer(CAPACITY, 2, 1)
    with pytest.raises(ValueError, match="8 transitions do not fit into a buffer of 7"):
        gempo.add_transitions(buffer, transitions(1, CAPACITY + 1))
    full = gempo.add_transitions(buffer, transitions(1, CAPACITY))  # was not donated
    assert full.count == CAPACITY


@pytest.mark.parametrize("field", ["obs", "actions", "rewards", "next_obs", "terminations"])
def test_a_row_of_another_shape_is_refused_and_not_broadcast(field):
    buffer = gempo.create_buffer(CAPACITY, 2, 1)
    rows = transitions(1, 3)
    wrong = getattr(rows, field).reshape(3, -1, 1)[:, :1]  # (3, 1, 1)
    with pytest.raises(ValueError, match=rf"{field} has the shape \(3, 1, 1\), not \(3,"):
        gempo.add_transitions(buffer, rows._replace(**{field: wrong}))


def test_rows_of_a_batch_are_as_many_as_asked_for_and_drawn_anew_by_each_key():
    buffer, _ = fill([CAPACITY])
    rows = [gempo.sample_batch(buffer, jax.random.key(i), 50).rewards for i in (0, 0, 1)]
    assert rows[0].shape == (50,)
    assert jnp.array_equal(rows[0], rows[1]) and not jnp.array_equal(rows[0], rows[2])
