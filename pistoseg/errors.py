"""The one error that users see: what is wrong, where, and what to do about it."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator

from pistoseg.redaction import redact

INTERRUPTED = "interrupted; run the same command again to go on"
_GOES_ON = "the same command goes on where this one stopped"
_LESS_MEMORY = "take smaller batches or patches or fewer workers, or give the node more memory"


class PistoSegError(ValueError):
    """A problem with the user's input, settings or environment.

    The command line prints it without a traceback and exits with 2; everything else that is raised is a defect of
    PistoSeg and keeps its traceback.

    Args:
        reason: what is wrong, as a sentence without its full stop.
        file: the file, URI or command-line argument concerned.
        field: the column, key or property in it.
        remedy: what the user can do, as a sentence without its full stop.
    """

    def __init__(
        self, reason: str, *, file: str | None = None, field: str | None = None, remedy: str | None = None
    ) -> None:
        self.reason = redact(reason)  # URIs with passwords, and what servers say, end in logs and tables
        self.file = redact(file) if file else file
        self.field = field
        self.remedy = redact(remedy) if remedy else remedy
        where = "".join(f"{part}: " for part in (self.file, field) if part)
        message = _sentence(f"{where}{self.reason}")
        super().__init__(f"{message} Remedy: {_sentence(self.remedy)}" if self.remedy else message)

    def fields(self) -> dict[str, str | None]:
        """Its arguments by name, for JSON."""
        return {"reason": self.reason, "file": self.file, "field": self.field, "remedy": self.remedy}

    def __reduce__(self) -> tuple[object, ...]:
        # Ray pickles errors by their positional args; the fields would be lost.
        return (_rebuild, (type(self), self.reason, self.file, self.field, self.remedy))


class UnavailableError(PistoSegError):
    """A full disk, a storage that is away or lets nobody in, too small a cluster: no fault of an input or a trial.

    Whoever lists bad inputs and goes on must not list this: the run has to end, and can go on later. But a slide
    that it hits in a batch is a failed row, as the others may be elsewhere; complete results of it stay, but for those
    that were just being replaced in object storage.
    """


class RefusedError(PistoSegError):
    """A disk or object storage that keeps a file or folder from this user; others there may be given.

    Whoever lists bad inputs and goes on must not list this: rights can be given without any change to the file.
    """


def out_of_memory(file: str) -> UnavailableError:
    """The error about a file for which there was no memory, of which nobody knows whether it is a good one."""
    remedy = "give the workers more memory, or take fewer of them; the same command goes on where this one stopped"
    return UnavailableError("cannot be read: memory is full", file=file, remedy=remedy)


def suggestion(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: "; did you mean x?", empty where no known one resembles it."""
    import difflib

    by_fold = {name.casefold(): name for name in known}
    close = difflib.get_close_matches(word.casefold(), list(by_fold), n=1)
    return f"; did you mean {by_fold[close[0]]}?" if close else ""


def explained(error: BaseException | None, file: str | None = None) -> PistoSegError | None:
    """What users are to read of an error: the `PistoSegError` below all that Ray and others wrapped around it.

    Args:
        error: that was raised, or None.
        file: what was written, for an error of the disk or of a GPU that does not name it.

    Returns:
        That error, or the one that says that a disk or memory is full or that processes died; None where there is none
        of these, and the traceback matters.
    """
    for found in below(error):
        if isinstance(found, PistoSegError):
            return found
        out_of_disk = type(found).__name__ == "OutOfDiskError"  # Ray's, whose object store can't spill
        if out_of_disk or (isinstance(found, OSError) and found.errno in (errno.ENOSPC, errno.EDQUOT)):
            return UnavailableError(
                "no space is left on the disk",
                file=file or getattr(found, "filename", None),
                remedy="make room, or set TMPDIR to a larger disk (`pistoseg doctor` shows those of all nodes); "
                f"{_GOES_ON}",
            )
        if _is(found, "torch", "OutOfMemoryError"):
            return PistoSegError(
                "a GPU is out of memory",
                file=file,
                remedy="set a smaller batch_size or patch_size of this stage, or its precision=bf16; for slides, a "
                "smaller --batch-size; nvidia-smi shows what else is on the GPU",
            )
        if _is(found, "ray.exceptions", "OutOfMemoryError"):
            return PistoSegError("a node is out of memory", file=file, remedy=f"{_LESS_MEMORY}; {_GOES_ON}")
        died = _is(found, "ray.exceptions", "WorkerCrashedError", "RayActorError", "NodeDiedError", "ObjectLostError")
        if died and not getattr(found, "actor_init_failed", False):  # which is an error of Python's in a constructor
            return PistoSegError(
                "a worker process died, or its node",
                file=file,
                remedy=f"if it was killed for memory, which that node's `dmesg` says, {_LESS_MEMORY}; {_GOES_ON}",
            )
    return None


def _is(error: BaseException, module: str, *names: str) -> bool:
    """Whether it is of a class of a module that this one does not import: PyTorch and Ray share a name."""
    return any(kind.__module__ == module and kind.__name__ in names for kind in type(error).__mro__)


def below(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and all that it came from, as Ray's tasks, Ray Train and Python keep them."""
    if error is None:
        return
    cause = getattr(error, "cause", None)
    # First, as Ray's error of a task is one of the same class, whose text is the traceback.
    yield from below(cause if isinstance(cause, BaseException) else None)
    yield error
    yield from below(getattr(error, "health_check_failure", None))
    for other in (*getattr(error, "worker_failures", {}).values(), getattr(error, "controller_failure", None)):
        yield from below(other)
    yield from below(error.__cause__)


def _sentence(text: str) -> str:
    """With its full stop, which a quoted error at its end may have brought along."""
    return text if text.endswith((".", "?", "!")) else f"{text}."


def _rebuild(
    kind: type[PistoSegError], reason: str, file: str | None, field: str | None, remedy: str | None
) -> PistoSegError:
    return kind(reason, file=file, field=field, remedy=remedy)
