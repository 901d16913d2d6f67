"""Flags of the report."""

import dataclasses
from pathlib import Path

from utils.options import option


@dataclasses.dataclass
class ReportArguments:
    """Flags of `inference/report.py`."""

    runs: str = option("runs", "folder of all runs")
    run_names: list[str] = option(["demo", "demo_text"], "names of the runs, of any stage; the first names the page")
    output: str = option("", "HTML file to write; default: report.html in a folder of the first name in --runs")

    def validate_names(self):
        if not self.run_names:
            raise ValueError("--run_names is empty; give one name or more")
        wrong = [name for name in self.run_names if name != Path(name).name]
        if wrong:
            raise ValueError(f"--run_names {wrong[0]!r} is no name of a run, such as demo; folders go into --runs")
        if self.output and Path(self.output).suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"--output {self.output} does not end in .html")
