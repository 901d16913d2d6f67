"""Flags of the page that serves checkpoints."""

import dataclasses
from typing import ClassVar

from utils.options import Section, option


@dataclasses.dataclass
class AppArguments:
    """Flags of `inference/app.py`."""

    SECTION_SERVER: ClassVar = Section("Server")
    runs: str = option("runs", "folder whose complete checkpoints are offered")
    host: str = option("127.0.0.1", "address that is listened on; 0.0.0.0 lets other machines in, without a password")
    port: int = option(7860, "port that is listened on; 0: the first free one from 7860", ge=0, le=65535)
    queue_size: int = option(64, "requests that may wait while one is answered; further ones are refused", gt=0)
    SECTION_LIMITS: ClassVar = Section("Limits of what visitors send")
    max_upload_mb: int = option(32, "size of an uploaded file in MB (10^6 bytes)", gt=0)
    max_kept_mb: int = option(
        1024, "size of all uploads and results that are kept for an hour, in MB; the oldest are deleted first", gt=0
    )
    max_pixels: int = option(4_000_000, "pixels of an uploaded image, as its header says", gt=0)
    max_seconds: float = option(60.0, "seconds of an uploaded recording", gt=0)

    def validate_sizes(self):
        if self.max_kept_mb < self.max_upload_mb:
            raise ValueError(
                f"--max_kept_mb={self.max_kept_mb} must be at least --max_upload_mb={self.max_upload_mb}, or no "
                "upload of that size would be kept"
            )
