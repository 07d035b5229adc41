"""A library of guidelines written once by a safety-trained model (Guide-Align, arXiv 2403.11838, stage 1).

    inputs -> detector: may this be unsafe, and why? -> writer: "Title: one or two sentences" lines -> library

A guideline is general: one that quotes its input is dropped. Exact duplicates are merged, then near-duplicates (string
ratio of 0.9 or more with an earlier one under the same title), and the inputs of a merged entry go to the one that is
kept. The paper asks for de-duplication without saying how; this rule is ours.
An entry knows the ids of the inputs it was written for, never their text, and who wrote it: guidelines go into a
model's prompt as instructions, so a library is to be reviewed like code.

Departures from the published code: the risk flag is the last yes or no of the last line (theirs is `"Yes" in text`, so
"1. ...: Yes" above a final "No." counts as risky), an answer without either is undecided and treated as risky, inputs
are carried by id and not found again with a regular expression, and "####" delimiters are stripped.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import UsageError
from trimtab.files import write_atomic
from trimtab.policy import Policy, Prompt, prompt_text
from trimtab.sampling import Sampling, derive_seed

QUOTED_WORDS = 8  # an entry may share this many words with its input, not more
KEPT_LINES = 6  # instructions taken from one bootstrapped answer
_PRIVATE = re.compile(r"[\w.+-]+@[\w-]+\.\w+|\b\d[\d -]{3,}\d\b")  # mail addresses; numbers of five digits and more


@dataclass(frozen=True)
class Guideline:
    """One entry. sources: ids of the inputs it was written for. risky: written for a risky input (None: unknown)."""

    title: str
    text: str
    writer: str = "unknown"
    risky: bool | None = None
    sources: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """As a model and a retriever read it: "Title: text", on one line."""
        return f"{self.title}: {self.text}"

    @property
    def id(self) -> str:
        return _digest(self.line)[:8]


@dataclass(frozen=True)
class Detection:
    """What a detector says of an input. risky None: its answer could not be read."""

    risky: bool | None
    rationale: str = ""


Detector = Callable[[Sequence[Prompt]], list[Detection]]
Writer = Callable[[Sequence[Prompt], Sequence[Detection]], list[str]]  # one text of "Title: ..." lines an input


class GuidelineLibrary:
    """Entries in the order they were added, no two with the same text. `len`, iteration and indexing are over entries."""

    def __init__(self, entries: Sequence[Guideline] = ()):
        self._entries: dict[str, Guideline] = {}  # by the text's words, without case and punctuation
        for entry in entries:
            self.add(entry)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Guideline]:
        return iter(self._entries.values())

    def __getitem__(self, row: int) -> Guideline:
        return list(self._entries.values())[row]

    @property
    def lines(self) -> list[str]:
        return [entry.line for entry in self]

    @property
    def version(self) -> str:
        """Changes with any word of any entry and with their order."""
        return _digest("\n".join(self.lines))[:8]

    def add(self, entry: Guideline) -> bool:
        """Add an entry, its whitespace normalised; False where its text is there already (that entry gains its sources)."""
        title, text = (" ".join(part.split()) for part in (entry.title, entry.text))
        if not title or not text:
            raise UsageError(f"a guideline needs a title and a text; got {entry.title!r} and {entry.text!r}")
        key = " ".join(_words(text)) or text
        old = self._entries.get(key)
        self._entries[key] = dataclasses.replace(entry, title=title, text=text) if old is None else _merged(old, entry)
        return old is None

    def dedup(self, ratio: float = 0.9) -> GuidelineLibrary:
        """A library without near-duplicates: under one title an entry stays if its ratio to every kept one is less."""
        kept: list[Guideline] = []
        under: dict[str, list[int]] = {}
        for entry in self:
            same = under.setdefault(entry.title.lower(), [])
            twin = next((i for i in same if at_least(entry.text, kept[i].text, ratio)), None)
            if twin is None:
                same.append(len(kept))
                kept.append(entry)
            else:
                kept[twin] = _merged(kept[twin], entry)
        return GuidelineLibrary(kept)

    def pairs(self, inputs: Sequence[Prompt]) -> list[tuple[int, int]]:
        """(row of an input, row of an entry written for it): what a retriever is trained on."""
        row = {input_id(prompt): number for number, prompt in enumerate(inputs)}
        return [(row[source], number) for number, entry in enumerate(self) for source in entry.sources if source in row]

    def save(self, path: str | Path) -> None:
        """JSONL, one entry a line, replaced as a whole or not at all."""
        rows = [{"id": entry.id, **dataclasses.asdict(entry)} for entry in self]
        write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    @classmethod
    def load(cls, path: str | Path) -> GuidelineLibrary:
        """Reads what `save` wrote, or lines with a `title` and a `text` alone. Ids are computed from the words again."""
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read the guideline library {path} ({error})") from error
        library = cls()
        for number, line in enumerate(lines, start=1):
            try:
                library.add(_entry(json.loads(line)))
            except (ValueError, UsageError) as error:
                raise UsageError(f"{path}:{number}: {error}") from error
        if not len(library):
            raise UsageError(f"the guideline library {path} is empty: write one JSON object with title and text a line")
        return library


def build_library(
    inputs: Sequence[Prompt],
    detector: Detector,
    writer: Writer,
    dedup: float = 0.9,
    progress: Callable[[str], None] | None = None,
) -> GuidelineLibrary:
    """The library of `inputs`. A detector or writer may carry a `name`, which becomes the entries' provenance."""
    found = detector(inputs)
    texts = writer(inputs, found)
    if len(found) != len(inputs) or len(texts) != len(inputs):
        raise UsageError(
            f"{len(inputs)} inputs, but {len(found)} detections and {len(texts)} texts: one each is needed"
        )
    name = getattr(writer, "name", getattr(writer, "__name__", "unknown"))
    library, quoted, written = GuidelineLibrary(), 0, 0
    for prompt, detection, text in zip(inputs, found, texts, strict=True):
        source = prompt_text(prompt)
        for title, body in parse_guidelines(text):
            written += 1
            if quotes(f"{title} {body}", source):
                quoted += 1
                continue
            library.add(Guideline(title, body, name, detection.risky is not False, (input_id(prompt),)))
    if not len(library):
        raise UsageError(
            f"{name} wrote {written} guidelines for {len(inputs)} inputs and {quoted} quoted their input: none is left; "
            "a guideline is a line 'Title: one or two sentences'"
        )
    out = library.dedup(dedup)
    if progress is not None:
        risky, undecided = (sum(one.risky is kind for one in found) for kind in (True, None))
        progress(
            f"guideline library {out.version}: {len(out)} entries from {written} guidelines for {len(inputs)} inputs "
            f"({risky} risky, {undecided} undecided and treated as risky; {quoted} quoted their input and were dropped)"
        )
    return out


def parse_flag(text: str) -> bool | None:
    """The verdict of a detector's answer: the last yes or no of its last line, None where it has neither."""
    lines = [line for line in text.splitlines() if line.strip(" #*`\t")]
    last = re.sub(r"\byes\s*(?:/|or)\s*no\b", " ", lines[-1].lower()) if lines else ""
    found = re.findall(r"\b(?:yes|no)\b", last)
    return found[-1] == "yes" if found else None


def parse_guidelines(text: str) -> list[tuple[str, str]]:
    """(title, text) of every line "Title: text"; bullets, numbers and "####" are stripped, other lines are passed over."""
    found = []
    for line in text.replace("####", "").splitlines():
        line = re.sub(r"^\s*(?:[-*•]\s+|\d+[.)]\s*)?", "", line).replace("**", "")
        title, colon, body = line.partition(":")
        if colon and title.strip() and body.strip() and len(title.split()) <= QUOTED_WORDS:
            found.append((title.strip(), body.strip()))
    return found


def parse_instructions(text: str, keep: int = KEPT_LINES) -> list[str]:
    """The numbered lines of a bootstrapped answer, at most `keep`."""
    found = (match[1].strip() for line in text.splitlines() if (match := re.match(r"\s*\d+[.)]\s*(\S.*)", line)))
    return list(found)[:keep]


def quotes(text: str, source: str) -> bool:
    """Whether a guideline gives its input away.

    It does if it shares more than 8 distinct words with it (function words apart), or more than 8 words in a row, or
    holds the whole of an input of at least 3 words, or one of its mail addresses or long numbers.
    """
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    ours, theirs = _words(text), _words(source)
    shared = (set(ours) & set(theirs)) - ENGLISH_STOP_WORDS
    run = difflib.SequenceMatcher(None, ours, theirs, autojunk=False).find_longest_match().size
    whole = run == len(theirs) >= 3
    private = any(found in text for found in _PRIVATE.findall(source))
    return len(shared) > QUOTED_WORDS or run > QUOTED_WORDS or whole or private


def rouge_l(a: str, b: str) -> float:
    """ROUGE-L F1 in [0, 1]: 2 LCS / (len a + len b) over words; 0 where either is empty."""
    first, second = _words(a), _words(b)
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for at, other in enumerate(second, start=1):
            diagonal, row[at] = row[at], diagonal + 1 if word == other else max(row[at], row[at - 1])
    return 2 * row[-1] / (len(first) + len(second)) if row[-1] else 0.0


def admit(candidates: Sequence[str], pool: Sequence[str], limit: float = 0.7) -> list[str]:
    """The candidates, in order, whose ROUGE-L with everything in `pool` and admitted before is `limit` or less."""
    taken = list(pool)
    for candidate in candidates:
        if all(rouge_l(candidate, other) <= limit for other in taken):
            taken.append(candidate)
    return taken[len(pool) :]


def bootstrap_inputs(
    policy: Policy, seeds: Sequence[str], count: int, request: str, sampling: Sampling = Sampling(400), tries: int = 0
) -> list[str]:
    """`count` new instructions in the manner of `seeds` (stage 1a); fewer where `tries` calls do not bring as many.

    request: what the list is of, the first line of the prompt. Each call shows 4 numbered examples: seeds, or 2 seeds
    and 2 new ones once there are 2. tries 0: as many calls as instructions wanted.
    """
    if len(seeds) < 4:
        raise UsageError(f"bootstrapping shows 4 examples at a time; {len(seeds)} seeds were given")
    generator = random.Random(derive_seed(sampling.seed, "bootstrap"))
    new: list[str] = []
    for call in range(tries or count):
        if len(new) >= count:
            break
        own = generator.sample(new, 2) if len(new) >= 2 else []
        shown = generator.sample(list(seeds), 4 - len(own)) + own
        listed = "\n".join(f"{number}. {text}" for number, text in enumerate(shown, start=1))
        asked = f"{request}\n{listed}\n5."
        drawn = policy.generate([asked], sampling.but(samples=1, seed=derive_seed(sampling.seed, "bootstrap", call)))
        text = drawn.texts[0]
        numbered = text if re.match(r"\s*\d+[.)]", text) else f"5.{text}"  # the answer may go on or begin anew
        new += admit(parse_instructions(numbered), [*seeds, *new])
    return new[:count]


def at_least(a: str, b: str, ratio: float) -> bool:
    """Whether difflib's ratio 2 matches / (len a + len b) is `ratio` or more; cheap bounds are tried first."""
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    return matcher.real_quick_ratio() >= ratio and matcher.quick_ratio() >= ratio and matcher.ratio() >= ratio


def input_id(prompt: Prompt) -> str:
    """The id (a hash) an input is known by in a library."""
    return _digest(prompt_text(prompt))[:12]


def _merged(kept: Guideline, other: Guideline) -> Guideline:
    sources = tuple(dict.fromkeys(kept.sources + other.sources))
    return dataclasses.replace(kept, risky=kept.risky or other.risky, sources=sources)


def _entry(row: Any) -> Guideline:
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("title", "text")):
        raise ValueError("an object with a 'title' and a 'text' is needed")
    sources, risky = row.get("sources", []), row.get("risky")
    if not isinstance(sources, list) or not all(isinstance(source, str) for source in sources):
        raise ValueError("'sources' is not a list of ids")
    if risky is not None and not isinstance(risky, bool):
        raise ValueError("'risky' is neither true, false nor null")
    return Guideline(row["title"], row["text"], str(row.get("writer", "unknown")), risky, tuple(sources))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
