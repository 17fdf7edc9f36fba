"""What a doctor finds: about what, how bad, in words, and what to do about it."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any


class Severity(IntEnum):
    """How bad a finding is."""

    OK = 0
    WARNING = 1  # it works, and somebody should look
    PROBLEM = 2  # it does not work, or will not for long

    @property
    def label(self) -> str:
        """Return the word for people and programs."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. check: what kind of check, a word for programs. subject: a file, address or peer.

    A finding that is not OK has a remedy.
    """

    check: str
    severity: Severity
    subject: str
    text: str
    remedy: str = ""

    def as_data(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "check": self.check,
            "severity": self.severity.label,
            "subject": self.subject,
            "text": self.text,
            "remedy": self.remedy or None,
        }


def fine(check: str, subject: object, text: str) -> Finding:
    """Return a finding that is none."""
    return Finding(check, Severity.OK, str(subject), text)


def warning(check: str, subject: object, text: str, remedy: str) -> Finding:
    """Return a finding that somebody should look at."""
    return Finding(check, Severity.WARNING, str(subject), text, remedy)


def problem(check: str, subject: object, text: str, remedy: str) -> Finding:
    """Return a finding that must be dealt with."""
    return Finding(check, Severity.PROBLEM, str(subject), text, remedy)


def count(findings: Iterable[Finding], severity: Severity) -> int:
    """Return how many are of this severity."""
    return sum(1 for finding in findings if finding.severity is severity)
