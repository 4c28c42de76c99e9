"""A batch is a pure function of (seed, step); epochs, mixtures, hosts, prefetching."""

import threading
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_jax.data import batches, packing


def sequences(n: int, part: int = 0, length: int = 6) -> list[np.ndarray]:
  """n sequences, told apart by their first token: part * 10,000 + index."""
  rng = np.random.default_rng(part)
  out = []
  for i in range(n):
    used = rng.integers(2, length + 2)
    segments = np.zeros(length + 1, np.uint32)
    segments[:used] = np.sort(rng.integers(1, 4, used))
    out.append(np.stack([10_000 * part + i + np.arange(length + 1, dtype=np.uint32), segments]))
  return out


def first_tokens(dataset, start: int, stop: int) -> list[int]:
  return [int(dataset[i][0, 0]) for i in range(start, stop)]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(-(2**70), 2**70), st.integers(0, 5))
def test_every_epoch_shows_every_sequence_once(sizes, seed, epoch):
  parts = [sequences(n, part) for part, n in enumerate(sizes)]
  n = sum(sizes)
  shown = first_tokens(batches.order(parts, (), seed), epoch * n, (epoch + 1) * n)
  assert sorted(shown) == sorted(int(s[0, 0]) for part in parts for s in part)


def test_orders_differ_by_epoch_and_seed():
  parts = [sequences(200)]
  orders = [
    tuple(first_tokens(batches.order(parts, (), seed), 200 * epoch, 200 * (epoch + 1)))
    for seed in (0, 1, 2)
    for epoch in (0, 1, 2)
  ]
  assert len(set(orders)) == 9


def test_an_order_is_a_fair_shuffle():
  n, seeds = 48, 60
  counts = np.zeros((n, n))
  for seed in range(seeds):
    for place, token in enumerate(first_tokens(batches.order([sequences(n)], (), seed), 0, n)):
      counts[place, token] += 1
  chi2 = ((counts - seeds / n) ** 2 / (seeds / n)).sum()
  freedom = (n - 1) ** 2
  assert chi2 < freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize('weights', [(0.7, 0.3), (1.0, 9.0), (2.0, 1.0, 1.0)])
def test_a_mixture_has_the_shares_asked_for_and_goes_through_each_part(weights):
  parts = [sequences(60 + 10 * part, part) for part in range(len(weights))]
  shown = first_tokens(batches.order(parts, weights, 0), 0, 2000)
  shares = Counter(token // 10_000 for token in shown)
  for part, weight in enumerate(weights):
    assert shares[part] / 2000 == pytest.approx(weight / sum(weights), abs=0.01)
    of_part = [token for token in shown if token // 10_000 == part]
    n = len(parts[part])
    assert sorted(of_part[:n]) == sorted(of_part[n : 2 * n]) == sorted(int(s[0, 0]) for s in parts[part])


def test_an_order_has_no_end():
  for weights in ((), (1.0, 3.0)):
    order = batches.order([sequences(7), sequences(5, 1)], weights, 0)
    start = time.process_time()
    far = [order[10**12 + i] for i in range(10)]
    assert time.process_time() - start < 1
    assert all(np.array_equal(a, order[10**12 + i]) for i, a in enumerate(far))


def test_a_batch_says_what_is_predicted_from_what():
  tokens = np.arange(10, 17)
  segments = np.array([1, 1, 1, 2, 2, 0, 0])
  batch = batches.train_batch([np.stack([tokens, segments])], 0, 1)
  assert batch['inputs'].tolist() == [[10, 11, 12, 13, 14, 15]]
  assert batch['targets'].tolist() == [[11, 12, 13, 14, 15, 16]]
  assert batch['segments'].tolist() == [[1, 1, 1, 2, 2, 0]]
  assert batch['mask'].tolist() == [[1, 1, 0, 1, 0, 0]]
  assert {k: v.dtype for k, v in batch.items()} == {k: np.int32 for k in batch} | {'mask': np.float32}


def joined(parts: list[dict]) -> dict:
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def same(a: dict, b: dict) -> bool:
  return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize('hosts', [1, 2, 4])
def test_hosts_share_one_global_batch(hosts):
  order = batches.order([sequences(50), sequences(30, 1)], (2.0, 1.0), 3)
  for step in (0, 7, 1000):
    parts = [batches.train_batch(order, step, 8, host, hosts) for host in range(hosts)]
    assert same(joined(parts), batches.train_batch(order, step, 8))
  order = sequences(21)
  whole = list(batches.valid_batches(order, 8))
  parts = zip(*(batches.valid_batches(order, 8, host, hosts) for host in range(hosts)), strict=True)
  assert all(same(joined(part), batch) for part, batch in zip(parts, whole, strict=True))


def test_steps_go_through_the_order_without_gap_or_overlap():
  order = batches.order([sequences(50)], (), 0)
  shown = [int(t) for step in range(10) for t in batches.train_batch(order, step, 4)['inputs'][:, 0]]
  assert shown == first_tokens(order, 0, 40)


@given(st.integers(1, 30), st.integers(1, 8))
def test_valid_batches_are_in_order_and_of_one_shape(n, size):
  items = sequences(n)
  found = list(batches.valid_batches(items, size))
  assert {batch['inputs'].shape for batch in found} == {(size, 6)}
  both = joined(found)
  assert both['inputs'][:n, 0].tolist() == list(range(n))
  assert both['mask'][n:].sum() == both['segments'][n:].sum() == 0
  assert both['mask'].sum() == sum(((s[1, 1:] == s[1, :-1]) & (s[1, 1:] > 0)).sum() for s in items)


@given(st.integers(1, 500), st.integers(0, 600))
def test_spread_is_even(n, k):
  found = packing.spread(n, k)
  assert len(set(found)) == len(found) == (min(k, n) or n)
  assert found[0] == 0
  assert max(found) < n
  gaps = np.diff([*found, n])
  assert gaps.max() - gaps.min() <= 1


# ---------------------------------------------------------------------------------------------------------- prefetching


def prefetching() -> list[threading.Thread]:
  return [thread for thread in threading.enumerate() if thread.name == 'prefetch']


def test_prefetching_changes_nothing_and_starts_anywhere():
  order = batches.order([sequences(50)], (), 0)
  for start in (0, 13):
    with batches.Prefetch(lambda step: batches.train_batch(order, step, 4), start, 3, put=dict.items) as ahead:
      for step in range(start, start + 5):
        assert same(dict(next(ahead)), batches.train_batch(order, step, 4))
  assert not prefetching()


def test_prefetching_works_ahead_but_not_far():
  made = []
  with batches.Prefetch(lambda step: made.append(step) or step, 0, 2) as ahead:
    assert next(ahead) == 0
    deadline = time.time() + 5
    while len(made) < 4 and time.time() < deadline:
      time.sleep(0.01)
    time.sleep(0.1)
    assert made == [0, 1, 2, 3]  # one taken, two ready, one in hand
  assert not prefetching()


@pytest.mark.parametrize('where', ['make', 'put'])
def test_an_error_comes_where_its_batch_would_have_come(where):
  def fail_at_2(step):
    if step == 2:
      raise ValueError('bad record')
    return step

  make, put = (fail_at_2, lambda x: x) if where == 'make' else (lambda step: step, fail_at_2)
  with batches.Prefetch(make, 0, 2, put) as ahead:
    assert [next(ahead), next(ahead)] == [0, 1]
    with pytest.raises(ValueError, match='bad record'):
      next(ahead)
    with pytest.raises(StopIteration):
      next(ahead)
  assert not prefetching()


def test_leaving_early_ends_the_thread():
  def interrupted():
    with batches.Prefetch(lambda step: step, 0, 1) as ahead:
      next(ahead)
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    interrupted()
  assert not prefetching()
