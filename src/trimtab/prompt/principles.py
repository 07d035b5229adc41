"""Principles: the directions in which an instruction may be rewritten, by domain (P-Aligner's library, in our own words).

The action set of an instruction is its own domain's principles and those of "helpfulness", which suit every instruction;
without a domain it is "helpfulness" alone. A library is a JSON file {domain: [{"name", "directive", "edit"}]}: the
directive is told to a model that rewrites, the edit is a template with {instruction} that stands in where none is at hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trimtab.errors import UsageError, unknown
from trimtab.policy import Cost

UNIVERSAL = "helpfulness"
SLOT = "{instruction}"


@dataclass(frozen=True)
class Principle:
    """directive: one rewrite step, as told to a model. edit: the same as a template, "" where there is none."""

    name: str
    directive: str
    edit: str = ""

    def __post_init__(self) -> None:
        if not self.name.strip() or not self.directive.strip():
            raise UsageError(f"a principle needs a name and a directive, not {self.name!r} and {self.directive!r}")
        if self.edit and SLOT not in self.edit:
            raise UsageError(f"the edit of {self.name!r} must hold {SLOT}, so that it keeps the instruction")


class PrincipleLibrary:
    """Principles by domain. Names are unique, so that a name is enough to know a principle."""

    def __init__(self, domains: dict[str, Sequence[Principle]]):
        self.domains = {domain: tuple(principles) for domain, principles in domains.items()}
        self.by_name = {p.name: p for principles in self.domains.values() for p in principles}
        if not self.by_name:
            raise UsageError("the library has no principles: give at least one domain with one")
        if len(self.by_name) < sum(map(len, self.domains.values())):
            raise UsageError("two principles of the library have the same name: rename one")

    def actions(self, domain: str | None = None) -> tuple[Principle, ...]:
        """The principles of a domain and the universal ones. UsageError for an unknown domain, or an empty result."""
        if domain is not None and domain not in self.domains:
            raise unknown("domain", domain, self.domains)
        own = self.domains.get(domain or UNIVERSAL, ())
        found = own if domain in (None, UNIVERSAL) else own + self.domains.get(UNIVERSAL, ())
        if not found:
            raise UsageError(
                f"the library has no principles for {'unlabelled instructions' if domain is None else repr(domain)}: "
                f"add some under {domain or UNIVERSAL!r}"
            )
        return found

    def extended(self, domain: str, principles: Sequence[Principle]) -> PrincipleLibrary:
        """A library with one more domain."""
        return PrincipleLibrary({**self.domains, domain: principles})


def read_library(path: str | Path | None = None) -> PrincipleLibrary:
    """The library in a JSON file; without a path the one that comes with trimtab."""
    path = Path(path) if path else Path(__file__).with_name("principles.json")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return PrincipleLibrary({domain: [Principle(**one) for one in rows] for domain, rows in found.items()})
    except OSError as error:
        raise UsageError(f"cannot read the principles {path}: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path} is no library of principles ({error}); it needs "
            '{"domain": [{"name": ..., "directive": ..., "edit": ...}]}'
        ) from error


def phrasebook(texts: Sequence[str], principles: Sequence[Principle], seed: int, meter: Cost) -> list[str | None]:
    """A rewriter without a model: the edit of each principle, once (None where there is none, or it is there already)."""
    out: list[str | None] = []
    for text, principle in zip(texts, principles, strict=True):
        added = [part.strip() for part in principle.edit.split(SLOT) if part.strip()]
        new = bool(added) and not any(part in text for part in added)
        out.append(principle.edit.replace(SLOT, text) if new else None)
    return out


def scripted(edit: Callable[[str, Principle], str | None]) -> Callable[..., list[str | None]]:
    """A search rewriter (see `trimtab.prompt.synthesis.Rewrite`) from a function of one text and one principle."""

    def rewrite(texts: Sequence[str], principles: Sequence[Principle], seed: int, meter: Cost) -> list[str | None]:
        return [edit(text, principle) for text, principle in zip(texts, principles, strict=True)]

    return rewrite
