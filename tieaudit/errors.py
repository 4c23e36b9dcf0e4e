"""The exception tree. A class exists only where somebody would catch it.

    TieAuditError            exit code 2, one line for the user
    ├─ UsageError            bad arguments, unknown name (did you mean …?)
    ├─ UnreadableModel       expected / found / where / what to do
    │   ├─ UnknownFormat     nothing here that tieaudit knows how to read
    │   ├─ CorruptFile       the format's own rules are broken at a known place
    │   ├─ WeightsNotHere    a pointer to the weights (git-LFS, DVC, a broken link): nothing is wrong, nothing was seen
    │   └─ MissingPackage    an extra is needed: which, and how to get it
    ├─ PluginError           names the plug-in's file
    ├─ RewriteRefused        nothing was written; the reason is a sentence
    │   └─ NotFinite         inf or NaN among numbers from which others were to be computed
    └─ ParityFailed          exit code 1: a proof level failed, nothing was delivered

*Cannot tell* is not an error: it is a rule's third answer (see `audit.py`).
"""

from __future__ import annotations


class TieAuditError(Exception):
    """Anything that tieaudit says to its user in one line, without a traceback."""

    exit_code = 2

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(TieAuditError):
    """The command line or a setting is wrong."""


class UnreadableModel(TieAuditError):
    """A path that was given as a model cannot be read as one."""


class UnknownFormat(UnreadableModel):
    """No format recognises the path."""


class CorruptFile(UnreadableModel):
    """The file breaks the rules of its own format."""


class WeightsNotHere(UnreadableModel):
    """The file stands for weights that are elsewhere (git-LFS, DVC, a link to a missing blob): cannot tell."""


class MissingPackage(UnreadableModel):
    """A package of an extra is needed and not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        hint = f"pip install 'tieaudit[{extra}]'"
        if extra in ("torch", "transformers", "all"):
            hint += "; for the CPU build of torch add --extra-index-url https://download.pytorch.org/whl/cpu"
        super().__init__(f"{purpose} needs the package {package}, which is not installed", hint=hint)
        self.package = package


class PluginError(TieAuditError):
    """A member of an open set (rule, scheme, …) is malformed."""


class RewriteRefused(TieAuditError):
    """The planned change cannot be made safely; nothing was written."""


class NotFinite(RewriteRefused):
    """Numbers from which nothing can be computed: one inf or NaN would spread into everything made of them."""


class ParityFailed(TieAuditError):
    """A proof level failed; nothing was delivered."""

    exit_code = 1


def in_one_line(error: Exception, where: str) -> TieAuditError:
    """Any error as one for the user: the system's own say what and where, any other is a fault of tieaudit.

    `where` is the path that was being worked on. Set TIEAUDIT_TRACEBACK to see where a fault was raised.
    """
    if isinstance(error, TieAuditError):
        return error
    if isinstance(error, OSError):
        return UnreadableModel(f"{error.filename or where}: the system refused: {error.strerror or error}")
    if isinstance(error, RecursionError):
        return UnreadableModel(f"{where}: nested or chained too deeply to be worked on safely")
    if isinstance(error, MemoryError):
        return UnreadableModel(f"{where}: needs more memory than there is")
    said = " ".join(str(error).split())[:300]
    return TieAuditError(
        f"{where}: a fault in tieaudit, nothing was delivered: {type(error).__name__}: {said}",
        hint="please report it with the output of TIEAUDIT_TRACEBACK=1 tieaudit …",
    )
