"""The server as visitors and others meet it: requests wait and none is lost, large and foreign ones are refused."""

import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.helpers.app.page import Visitor, request, served, wait_until
from utils.app.arguments import AppArguments
from utils.app.server import known_hosts, serve

NAME = "image_diffusion/small/checkpoint-4"
QUICK = (NAME, "a", 0, 1, 2, 1.0, "euler")


def port_of(page):
    return urlsplit(page.local_url).port


def function_of(page, api_name):
    (number,) = [number for number, function in page.blocks.fns.items() if function.api_name == api_name]
    return number


def join(page, values, session="x"):
    """Start a job of Draw as a browser does; the answer."""
    body = json.dumps({"data": values, "session_hash": session, "fn_index": function_of(page, "draw")})
    return request(page, "POST", "/gradio_api/queue/join", body, content_type="application/json")


def messages(page, session, seconds=300):
    """What the page tells a session, until it has no job."""
    connection = http.client.HTTPConnection(urlsplit(page.local_url).netloc, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", f"/gradio_api/queue/data?session_hash={session}")
        until = time.monotonic() + seconds
        for line in connection.getresponse():
            assert time.monotonic() < until, "the page does not come to an end"
            if line.startswith(b"data:"):
                yield json.loads(line[5:])


def test_fifty_requests_wait_one_computes_at_a_time_and_none_is_lost(page):
    jobs = [json.loads(join(page, [*QUICK[:2], seed, *QUICK[3:]])[2])["event_id"] for seed in range(50)]
    started, lines, ended = [], {}, []
    for message in messages(page, "x"):
        kind, job = message["msg"], message.get("event_id")
        if kind == "process_starts":
            assert started == ended  # The one before has ended.
            started.append(job)
        elif kind == "process_generating":
            lines.setdefault(job, message["output"]["data"][2])  # Later ones are differences.
        elif kind == "process_completed":
            assert message["success"]
            ended.append(job)
    assert started == ended == jobs
    assert [re.search(r"--seeds (\d+)", lines[job])[1] for job in jobs] == [str(seed) for seed in range(50)]


def test_two_visitors_at_once_are_answered_one_after_the_other(page, client):
    with contextlib.closing(Visitor(page)) as other:
        jobs = [visitor.submit(NAME, "a", 7, 2, 20, 3.0, "euler", api_name="/draw") for visitor in (client, other)]
        galleries = [job.result(timeout=120)[0] for job in jobs]
    assert [len(gallery) for gallery in galleries] == [2, 2]
    queues = page.blocks._queue.event_queue_per_concurrency_id
    assert queues["models"].concurrency_limit == 1


def test_the_request_beyond_those_that_may_wait_is_refused(runs):
    with served(runs, queue_size=3) as page, contextlib.closing(Visitor(page)) as client:
        running = client.submit(NAME, "a", 0, 1, 250, 3.0, "heun", api_name="/draw")
        wait_until(running.outputs)
        waiting = [client.submit(*QUICK, api_name="/draw") for _ in range(3)]
        queues = page.blocks._queue.event_queue_per_concurrency_id
        wait_until(lambda: sum(len(queue.queue) for queue in queues.values()) == 3)
        with pytest.raises(Exception, match="429"):
            client.predict(*QUICK, api_name="/draw")
        status, headers, text = join(page, QUICK)
        words = "as many jobs wait as --queue_size allows (3); try again in a minute"
        assert (status, headers["content-type"], json.loads(text)) == (429, "application/json", {"detail": words})
        # What needs no model goes past the queue in browsers, which call it so.
        body = json.dumps({"data": ["image_diffusion/small", NAME], "session_hash": "x"})
        status, _, text = request(page, "POST", "/gradio_api/run/metrics", body, content_type="application/json")
        assert status == 200 and "has no metrics yet" in text
        assert not running.done()
        running.cancel()
        assert all("1 of 32x32" in job.result(timeout=120)[1] for job in waiting)


def test_a_gigabyte_is_refused_before_it_is_sent(page):
    status, _, text = request(page, "POST", "/gradio_api/upload", b"", content_length=str(10**9))
    assert status == 413 and "--max_upload_mb" in text
    assert request(page, "POST", "/gradio_api/queue/join", b"", content_length=str(10**9))[0] == 413
    assert request(page, "POST", "/gradio_api/upload", b"", content_length="x")[0] in (400, 413)


def test_a_large_body_without_a_length_is_cut_off(page):
    def endless():
        part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        yield part
        for _ in range(200):
            yield bytes(100_000)

    try:
        kind = "multipart/form-data; boundary=x"
        status, _, _ = request(page, "POST", "/gradio_api/upload", endless(), content_type=kind)
    except (ConnectionError, http.client.HTTPException):
        status = 0  # The server has hung up.
    assert status != 200


def test_files_outside_of_the_page_are_not_served(page, runs):
    for path in ("/etc/passwd", str(runs / NAME / "config.json"), "../../etc/passwd", "inference/app.py"):
        assert request(page, "GET", f"/gradio_api/file={path}")[0] in (403, 404)
    assert request(page, "GET", "/monitoring")[0] == 403


def test_nothing_of_other_hosts(page):
    status, headers, text = request(page, "GET", "/")
    policy = headers["content-security-policy"]
    assert status == 200 and "default-src 'self'" in policy and "http" not in policy
    sources = re.findall(r"""<(?:script|link|img|iframe)[^>]+(?:src|href)=["']([^"']+)""", text)
    assert sources and not [source for source in sources if re.match(r"(?:https?:)?//", source)]
    for font in re.findall(r"url\(([^)]+)\)", request(page, "GET", "/theme.css")[2]):
        assert not re.match(r"[\"']?(?:https?:)?//", font)
    assert page.blocks.share_url is None and not page.blocks.analytics_enabled


def test_other_names_of_this_host_are_refused(page):
    assert request(page, "GET", "/", Host="rebound.example")[0] == 400
    assert request(page, "GET", "/", Host=f"localhost:{port_of(page)}")[0] == 200
    assert known_hosts("0.0.0.0") == known_hosts("my-machine") == frozenset()
    assert "[::1]" in known_hosts("::1") and "127.0.0.1" in known_hosts("localhost")


def test_the_script_says_at_once_what_it_does():
    """Before the imports that take long, of which the first is made to fail."""
    code = "import runpy, sys; sys.modules['utils.app.server'] = None; "
    code += "runpy.run_path(sys.argv.pop(), run_name='__main__')"
    root = Path(__file__).parents[3]
    run = subprocess.run([sys.executable, "-c", code, "inference/app.py"], cwd=root, capture_output=True, text=True)
    assert run.stdout.startswith("starting the page: loading its packages") and "ModuleNotFoundError" in run.stderr


def test_a_folder_that_is_not_there_and_a_port_that_is_taken(page, runs, tmp_path):
    with pytest.raises(ValueError, match=r"--runs .*nothing is no folder"):
        serve(AppArguments(runs=str(tmp_path / "nothing")))
    with pytest.raises(OSError, match=rf"--port {port_of(page)} of --host 127.0.0.1 cannot be listened on"):
        serve(AppArguments(runs=str(runs), port=port_of(page)))


def test_a_page_that_is_closed_while_it_computes_leaves_no_thread(runs):
    """`served` looks for threads; here they are those of a job, a waiting one, and two visitors who stay."""
    with served(runs) as page:
        visitors = [Visitor(page) for _ in range(2)]
        jobs = [visitor.submit(NAME, "a", 0, 1, 250, 3.0, "heun", api_name="/draw") for visitor in visitors]
        wait_until(jobs[0].outputs)
        start = time.process_time()
        page.close()
        assert page.jobs.running() == [] and not page.blocks.server.thread.is_alive()
        assert time.process_time() - start < 5
        for visitor in visitors:
            visitor.close()


def test_a_proxy_is_not_asked_for_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # Nobody listens there.
    monkeypatch.setenv("no_proxy", "my.host")
    monkeypatch.setenv("NO_PROXY", "")
    with served(tmp_path) as page:
        assert request(page, "GET", "/config")[0] == 200
    assert os.environ["no_proxy"] == "my.host,localhost,127.0.0.1" and os.environ["NO_PROXY"] == "localhost,127.0.0.1"


def test_an_empty_folder_says_what_trains_a_model(tmp_path):
    with served(tmp_path) as page:
        _, _, text = request(page, "GET", "/config")
        assert "python pretrain_image_diffusion.py" in text


def test_without_gradio_the_error_says_how_to_install_it(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=r"the page needs the package 'gradio'.*pip install -r requirements-app\.txt"):
        serve(AppArguments(runs=str(runs), port=0))
