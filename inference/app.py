"""Serve the checkpoints of a folder of runs as a web page on this machine: a tab per task, one job at a time.

    python inference/app.py --runs runs
    python inference/app.py --runs runs --port 8000 --max_upload_mb 8

What a tab generates is what the scripts generate; it shows the command line. Nothing is loaded from or sent to other
hosts. --host 0.0.0.0 lets other machines in, without a password.
"""

import logging
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.app.arguments import AppArguments
from utils.command_line import check_flags

if __name__ == "__main__":
    # --help and wrong flags end here, before imports that take seconds.
    check_flags(AppArguments, __doc__)
    print("starting the page: loading its packages, which takes up to a minute on a busy machine", flush=True)

from utils.app.server import serve
from utils.command_line import explained_errors, parse_arguments


def run(args: AppArguments) -> None:
    """Serve until the process is interrupted, or ended by SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(f"looking for checkpoints in {args.runs}", flush=True)
    page = serve(args)
    print(f"{page.local_url}  (Ctrl-C ends it)", flush=True)
    try:
        page.wait()
    except KeyboardInterrupt:
        print("closing the page", flush=True)
    finally:
        page.close()


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    with explained_errors(logging.getLogger("app")):
        run(parse_arguments(AppArguments, None, __doc__ or ""))
