"""Files at addresses that fsspec knows, read from their beginning, also over a connection that breaks."""

from typing import Any

from dataset_loading.remote import N_TRIES, describe_refusal, is_final, open_url, wait_for_retry


class RetriedFile:
    """A file at an address, or on disk, for reading forwards. A connection that breaks is opened again at the same
    byte, a few times.

    Args: url: of the file.
    Attributes: position: bytes that were read.
    """

    def __init__(self, url: str):
        self.url, self.position = url, 0
        self.system, self.path = open_url(url)
        self.file: Any = None
        self.size: int | None = None

    def read(self, n_bytes: int) -> bytes:
        """The next bytes; fewer at the end alone. Raises: OSError: they cannot be read."""
        for n_left in reversed(range(N_TRIES)):
            try:
                if self.file is None:
                    self.open()
                content = self.file.read(n_bytes)
                if len(content) < n_bytes and self.size is not None and self.position + len(content) < self.size:
                    raise ConnectionError(f"{self.position + len(content)} of {self.size} bytes came")
                self.position += len(content)
                return content
            except Exception as error:  # Each protocol has its own.
                self.close()
                refusal = describe_refusal(self.url, error)
                if is_final(refusal):
                    raise refusal from error
                if not n_left:
                    raise OSError(
                        f"{self.url} cannot be read after {N_TRIES} tries, at byte {self.position} "
                        f"({type(error).__name__}: {error}); the same command continues from there"
                    ) from error
                wait_for_retry(n_left)
        raise AssertionError("the last try returns or raises")

    def open(self) -> None:
        """Open the file where reading goes on."""
        self.file = self.system.open(self.path, "rb")
        self.size = getattr(self.file, "size", None)
        if self.position and self.file.seekable():
            self.file.seek(self.position)
            return
        remaining = self.position  # A server without ranges begins anew.
        while remaining and (content := self.file.read(min(remaining, 1 << 20))):
            remaining -= len(content)

    def close(self) -> None:
        """Close what is open."""
        if self.file is not None:
            self.file.close()
            self.file = None
