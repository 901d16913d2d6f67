"""Jobs run one at a time, show the latest outputs, and end at a cancel."""

import logging
import threading
import time

import pytest

from utils.app.jobs import UNCHANGED, Job


def test_outputs_are_merged_until_they_are_seen():
    go = threading.Event()

    def work(report, start):
        report(start, "a")
        go.wait(10)
        report(2, UNCHANGED)
        report(UNCHANGED, "c")
        return UNCHANGED, "d"

    outputs = Job(work, [1], threading.Lock()).outputs()
    assert next(outputs) == [1, "a"]
    go.set()
    last = [1, "a"]
    for row in outputs:
        last = [old if new is UNCHANGED else new for old, new in zip(last, row)]
    assert last == [2, "d"]


def test_one_job_computes_at_a_time():
    lock, running, most = threading.Lock(), [], []

    def work(report, number):
        running.append(number)
        most.append(len(running))
        for step in range(5):
            time.sleep(0.005)
            report(step)
        running.remove(number)
        return (number,)

    jobs, results = [Job(work, [number], lock) for number in range(4)], []
    threads = [threading.Thread(target=lambda job=job: results.append(list(job.outputs())[-1])) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert max(most) == 1 and sorted(results) == [[0], [1], [2], [3]]


def test_a_closed_job_ends_at_its_next_report_and_a_waiting_one_never_begins():
    lock, steps, begun = threading.Lock(), [], []

    def work(report):
        for step in range(10_000):
            steps.append(step)
            report(step)
            time.sleep(0.002)

    def waiting(report):
        begun.append(True)
        return ()

    first, second = Job(work, [], lock), Job(waiting, [], lock)
    outputs = first.outputs()
    next(outputs)
    second.thread.start()
    second.is_cancelled = True
    second.thread.join(10)
    outputs.close()
    first.thread.join(10)
    assert not first.thread.is_alive() and len(steps) < 5_000 and not begun
    assert lock.acquire(timeout=1), "a cancelled job keeps the lock"


def test_errors_reach_the_reader_and_warnings_are_those_of_the_job():
    def work(report):
        logging.getLogger("x").warning("%d pixels were not trained on", 7)
        raise ValueError("no")

    job = Job(work, [], threading.Lock())
    with pytest.raises(ValueError, match="no"):
        list(job.outputs())
    logging.getLogger("x").warning("of another thread")
    assert job.warnings == ["7 pixels were not trained on"] and not job.lock.locked()
