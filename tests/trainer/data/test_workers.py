"""Threads that work ahead."""

from __future__ import annotations

import threading

import pytest

from trainer.data.workers import Workers


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_future_has_the_result_or_the_exception(count: int) -> None:
    workers = Workers(count)
    assert workers.submit(lambda: 7).result(10) == 7
    with pytest.raises(ZeroDivisionError):
        workers.submit(lambda: 1 // 0).result(10)
    workers.close()


def test_without_threads_the_caller_does_the_work() -> None:
    assert Workers(0).submit(threading.get_ident).result() == threading.get_ident()


def test_calls_run_side_by_side() -> None:
    workers, meeting = Workers(2), threading.Barrier(2, timeout=10)
    futures = [workers.submit(meeting.wait) for _ in range(2)]
    assert sorted(future.result(10) for future in futures) == [0, 1]
    workers.close()


def test_close_ends_the_threads_once_their_work_is_done() -> None:
    workers = Workers(2)
    futures = [workers.submit(lambda number=number: number) for number in range(20)]
    workers.close()
    assert [future.result(10) for future in futures] == list(range(20))
    for thread in workers._threads:
        thread.join(10)
        assert not thread.is_alive()
    workers.close()  # a second time does no harm
