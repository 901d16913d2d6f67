"""One writer per folder: a lock that names its owner. Readers need none.

The lock is the operating system's (flock, on Windows msvcrt.locking) on a file `.lock` in the folder. It ends with its
process, however that ends, so that a kill or a loss of power leaves at most the file. On NFS Linux asks the server, so
that the lock holds between machines; where the mount or the file system has no locks, a warning says that nobody
watches.
"""

import contextlib
import errno
import json
import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

logger = logging.getLogger(__name__)

LOCK = ".lock"
# What file systems without locks say, and what a lock of another process gives: flock the one, Windows the other.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
IS_LOCKED = (errno.EWOULDBLOCK, errno.EACCES)
MAX_OWNER = 1 << 16  # bytes that name the owner

# Descriptors of the locks that this process holds.
held: set[int] = set()


@contextlib.contextmanager
def only_writer(folder: Path, remedy: str) -> Iterator[None]:
    """Hold the lock of a folder. It is made where it is not there, and removed at the end if it is still empty.

    Args: remedy: what the user could do instead, for the message.
    Raises: OSError: another process holds it (the message names host, process, command and time), or the folder
        cannot be written.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / LOCK
    descriptor = lock_file(file, remedy)
    try:
        yield
    finally:
        # A forked process has closed it, and does not own the file.
        if descriptor in held:
            # Removed while it is locked: whoever has it open already sees that it is gone.
            if fcntl is not None:
                file.unlink(missing_ok=True)
            held.discard(descriptor)
            os.close(descriptor)
            if fcntl is None:  # Windows removes no open file, such as one that another process has locked meanwhile.
                with contextlib.suppress(OSError):
                    file.unlink()
        with contextlib.suppress(OSError):  # It is not empty.
            for path in created:
                path.rmdir()


def lock_file(file: Path, remedy: str) -> int:
    """Lock a file and write the owner into it. Returns its descriptor; closing it ends the lock.

    Raises: OSError: another process holds it.
    """
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        held.add(descriptor)
        try:
            take(descriptor)
        except OSError as error:
            if error.errno in NO_LOCKS:
                logger.warning("%s cannot be locked (%s): make sure that no other process writes there", file, error)
                return descriptor
            os.lseek(descriptor, 0, os.SEEK_SET)
            owner = describe_owner(os.read(descriptor, MAX_OWNER))
            held.discard(descriptor)
            os.close(descriptor)
            if error.errno not in IS_LOCKED:
                raise
            raise OSError(f"{file.parent} is being written by {owner}; {remedy}") from error
        # The last owner may have removed the file after it was opened here.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                break
        held.discard(descriptor)
        os.close(descriptor)
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, json.dumps(this_process()).encode())
    return descriptor


def take(descriptor: int) -> None:
    """Lock an open file. Raises: OSError: another process has it (`IS_LOCKED`), or there are no locks (`NO_LOCKS`)."""
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    # Windows locks bytes, which nobody else can read then: one beyond those that name the owner.
    os.lseek(descriptor, MAX_OWNER, os.SEEK_SET)
    msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)


def this_process() -> dict[str, str | int]:
    """The owner of a lock, as its file names it."""
    command = shlex.join([os.path.basename(sys.executable), *sys.argv])
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"host": socket.gethostname(), "pid": os.getpid(), "command": command, "since": since}


def describe_owner(content: bytes) -> str:
    """The owner of a lock in words."""
    try:
        owner = json.loads(content)
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}: {owner['command']}"
    except (ValueError, KeyError, TypeError):  # It has not written its name yet.
        return "another process"


def owner_of(folder: Path) -> dict[str, str | int] | None:
    """Who writes in a folder (`this_process`), as far as its lock file tells; the lock itself is not touched.

    Returns: None where nobody does, or a process of this host that is gone has left the file.
    """
    try:
        with (folder / LOCK).open("rb") as file:
            owner = json.loads(file.read(MAX_OWNER))
        host, pid = owner["host"], owner["pid"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if fcntl is not None and host == socket.gethostname():
        try:
            os.kill(pid, 0)  # Sends nothing.
        except ProcessLookupError:
            return None
        except (OSError, TypeError, OverflowError):  # Of another user, or no number.
            pass
    return owner


def close_in_child() -> None:
    """A forked process, such as a worker, does not keep the locks of its parent alive."""
    for descriptor in held:
        os.close(descriptor)
    held.clear()


if hasattr(os, "register_at_fork"):  # Windows has no fork.
    os.register_at_fork(after_in_child=close_in_child)
