"""Show what some runs have learnt, on one page that needs nothing but a browser, and as a table of text.

    python inference/report.py
    python inference/report.py --run_names base --output base.html

runs/NAME/report.html has images, audio, metrics, curves and times of all runs of a name, whatever their stages.
Everything is inside the file, which works without a network. What is missing is named with the command that makes it.
"""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.command_line import check_flags
from utils.reporting.arguments import ReportArguments

if __name__ == "__main__":
    # --help and wrong flags end here, before imports that take seconds.
    check_flags(ReportArguments, __doc__)

from rich.console import Console

from dataset_loading.files import replace_file
from utils.command_line import explained_errors, parse_arguments
from utils.reporting.page import Report


def report(args: ReportArguments) -> Path:
    """Write the page and print the table. Raises: FileNotFoundError: there is no folder of runs."""
    if not (runs := Path(args.runs)).is_dir():
        raise FileNotFoundError(f"--runs {runs} is no folder; train something first, such as make demo-image")
    page = Report(runs, args.run_names)
    output = Path(args.output) if args.output else page.home / "report.html"
    output.parent.mkdir(parents=True, exist_ok=True)
    replace_file(output, page.html().encode(errors="replace"))
    Console(highlight=False, width=None if Console().is_terminal else 120).print(page.summary())
    print(f"{output}  {output.stat().st_size / 1e6:.1f} MB")
    return output


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    with explained_errors(logging.getLogger("report")):
        report(parse_arguments(ReportArguments, None, __doc__ or ""))
