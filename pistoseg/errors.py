"""The one error that users see: what is wrong, where, and what to do about it."""

from __future__ import annotations

from pistoseg.redaction import redact


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
        super().__init__(f"{where}{self.reason}." + (f" Remedy: {self.remedy}." if remedy else ""))

    def __reduce__(self) -> tuple[object, ...]:
        # Ray pickles errors by their positional args; the fields would be lost.
        return (_rebuild, (self.reason, self.file, self.field, self.remedy))


def _rebuild(reason: str, file: str | None, field: str | None, remedy: str | None) -> PistoSegError:
    return PistoSegError(reason, file=file, field=field, remedy=remedy)
