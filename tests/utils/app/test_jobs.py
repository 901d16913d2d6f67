"""Jobs run one at a time, show the latest outputs, and end at a cancel."""

import logging
import threading
import time
import types

import pytest

from utils.app.jobs import CANCELLED, CANCELLING, UNCHANGED, Job, Jobs


def test_outputs_are_merged_until_they_are_seen():
    go = threading.Event()

    def work(report, start):
        report(start, "a")
        go.wait(10)
        report(2, UNCHANGED)
        report(UNCHANGED, "c")
        return UNCHANGED, "d"

    outputs = Job(work, [1], threading.Lock(), waiting=()).outputs()
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

    jobs, results = [Job(work, [number], lock, waiting=()) for number in range(4)], []
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

    first, second = Job(work, [], lock, waiting=()), Job(waiting, [], lock, waiting=())
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

    job = Job(work, [], threading.Lock(), waiting=())
    with pytest.raises(ValueError, match="no"):
        list(job.outputs())
    logging.getLogger("x").warning("of another thread")
    assert job.warnings == ["7 pixels were not trained on"] and not job.lock.locked()


def test_a_silent_job_yields_unchanged_rows_and_a_cancel_ends_its_outputs_at_once(monkeypatch):
    monkeypatch.setattr("utils.app.jobs.SILENCE_SECONDS", 0.01)
    go, jobs = threading.Event(), Jobs(None)

    def load(report):
        go.wait(10)
        report(1)

    outputs = jobs.run(load, waiting=["waits"], owner="me")
    monkeypatch.setattr(jobs, "gr", types.SimpleNamespace(skip=lambda: "skip"))
    assert next(outputs) == next(outputs) == ["skip"]
    assert jobs.cancel_of("another") == "skip" and jobs.cancel_of("me") == CANCELLING
    assert list(outputs) == [] and jobs.running() and jobs.lock.locked()
    # The next job says what it waits for.
    following = jobs.run(lambda report: (2,), waiting=["waits"], owner="next")
    first = next(following)
    while first == ["skip"]:
        first = next(following)
    assert first == ["waits"]
    go.set()
    assert jobs.end_of("me") == CANCELLED and jobs.end_of("me") == "skip"
    assert list(following)[-1] == [2] and jobs.close(10) and not jobs.running()


def test_a_thread_that_ends_without_a_word_is_an_error():
    def leave(report):
        raise SystemExit(1)

    with pytest.raises(RuntimeError, match="the job was ended by SystemExit"):
        list(Job(leave, [], threading.Lock(), waiting=()).outputs())


def test_the_end_of_the_page_cancels_all_jobs():
    jobs = Jobs(types.SimpleNamespace(skip=lambda: None))

    def work(report):
        while True:
            report(0)
            time.sleep(0.001)

    next(jobs.run(work, waiting=[UNCHANGED], owner=1))
    others = jobs.run(work, waiting=[UNCHANGED], owner=2)
    next(others)
    assert jobs.close(10) and list(others) == []
    assert list(jobs.run(work, waiting=[UNCHANGED], owner=3)) == [] and not jobs.running()
