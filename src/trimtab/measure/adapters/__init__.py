"""Benchmark files by their format: `read_items(path)` gives the common items of whatever is in the file.

Nothing is bundled and nothing is downloaded: the user has the file. Its adapter is found from its columns (`sniff`), or
named; a file that fits two is refused, and a file with other columns is refused with those that were expected. Every
malformed row is counted and located (file:line; for a file without lines file:number of the row); none is skipped.

    adapter               item
    mc                    question, options, answer (index), answers (indices of all right options), continues, subject
    pair                  prompt, chosen, rejected, subset
    open-judge            prompt (first turn), turns, category, reference
    refusal               prompt, should_refuse (None: the file does not say), category
    toxicity-prompt       prompt, toxicity (None: not given)
    contrast-likelihood   sent_more (the stereotype), sent_less, category
    verify                kind, question, answer, and for code tests, entry_point
    parallel              texts: {language: sentence}
    statement-pair        harmful, safe
    labelled-text         text, label, safe (None where the label does not say), axiom
    triplet               i, j, k, odd (one of the three)
    em-bank               id, type, system, paraphrases, samples_per_paraphrase, judge, judge_prompts, and the rest
    belief-mc             question, stem, options, matching, not_matching (indices), letters

Files: .jsonl, .json, .csv, .tsv, .txt, .yaml, each also as .gz; .parquet; for `parallel` also a folder with one text file
a language, line i of each saying the same. Text is UTF-8. `image-*` files are recognised and refused: text only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trimtab.errors import UsageError, unknown
from trimtab.measure.adapters.answers import FORMS as ANSWERS
from trimtab.measure.adapters.choices import FORMS as CHOICES
from trimtab.measure.adapters.files import LINE, fail, read_folder, read_rows
from trimtab.measure.adapters.form import Form, Item, Row
from trimtab.measure.adapters.texts import FORMS as TEXTS
from trimtab.measure.adapters.texts import halves, languages

FORMS: tuple[Form, ...] = (*CHOICES, *TEXTS, *ANSWERS)
ADAPTERS = tuple(dict.fromkeys(form.adapter for form in FORMS))
IMAGES = ("image", "image_path", "image_id", "image_file", "images", "img", "image_url", "image_name")
SNIFFED = 50  # rows that are looked at to find the adapter

__all__ = ["ADAPTERS", "Item", "read_items", "sniff"]


def read_items(path: str | Path, adapter: str | None = None) -> list[Item]:
    """The items of a benchmark file, in order; adapter None: found from its columns. UsageError for a bad file."""
    path = Path(path)
    if adapter is not None:
        _check_name(adapter)
    rows = _rows(path)
    adapter = adapter or _sniff(path, rows)
    if path.is_dir():
        if adapter != "parallel":
            raise UsageError(f"{path} is a folder: only parallel texts come in one")
        return [{"texts": dict(row)} for _, row in rows]
    forms = _forms(adapter)
    if not any(form.fits(row) for form in forms for _, row in rows):
        raise UsageError(f"{path} is no {adapter} file: {_expected(forms)}; found the columns {_columns(rows)}")
    items: list[Item] = []
    broken: list[tuple[int, str]] = []
    for number, row in rows:
        form = next((form for form in forms if form.fits(row)), None)
        try:
            if form is None:
                raise ValueError(f"{_expected(forms)}; found {', '.join(row) or 'nothing'}")
            items.append(form.make(row))
        except ValueError as error:
            broken.append((number, str(error)))
        except (KeyError, TypeError, AttributeError, IndexError) as error:  # objects and lists where others belong
            broken.append((number, f"not the shape of a {adapter} row ({type(error).__name__}: {error})"))
    fail(path, broken)
    return halves(path, items) if items and "harmful_half" in items[0] else items


def sniff(path: str | Path, wanted: Sequence[str] = ADAPTERS) -> str:
    """The adapter that a file's columns speak for. UsageError where several fit, or none, naming those `wanted`."""
    return _sniff(Path(path), _rows(Path(path)), wanted)


def _sniff(path: Path, rows: Sequence[tuple[int, Row]], wanted: Sequence[str] = ADAPTERS) -> str:
    if path.is_dir():
        return "parallel"
    first = [row for _, row in rows[:SNIFFED]]
    if any(name.lower() in IMAGES for row in first for name in row):
        raise UsageError(f"{path} holds images: only text is implemented")
    best: dict[str, frozenset[str]] = {}
    for adapter in ADAPTERS:
        forms = _forms(adapter)
        if all(any(form.fits(row) for form in forms) for row in first):
            best[adapter] = next(form for form in forms if form.fits(first[0])).columns
    # a form that asks for all that another asks for, and more, speaks louder
    fitting = [name for name, columns in best.items() if not any(columns < other for other in best.values())]
    if len(fitting) == 1:
        return fitting[0]
    said = f"fits {' and '.join(fitting)}" if fitting else "fits no adapter"
    known = ", ".join([name for name in fitting if name in wanted] or wanted)
    raise UsageError(f"{path} (columns {_columns(rows)}) {said}: say which with --adapter NAME ({known})")


def _rows(path: Path) -> list[tuple[int, Row]]:
    if path.is_dir():
        return read_folder(path)
    return read_rows(path, {name for form in FORMS for name in form.columns})


def _forms(adapter: str) -> list[Form]:
    """The forms of one adapter, those that ask for most columns first."""
    return sorted((form for form in FORMS if form.adapter == adapter), key=lambda form: -len(form.columns))


def _check_name(adapter: str) -> None:
    if adapter.startswith("image"):
        raise UsageError(f"the adapter {adapter!r} is for images: only text is implemented")
    if adapter not in ADAPTERS:
        raise unknown("adapter", adapter, ADAPTERS)


def _expected(forms: Sequence[Form]) -> str:
    shown = dict.fromkeys(", ".join(sorted(form.columns)) for form in forms if LINE not in form.columns)
    if "" in shown:
        return "expected one column a language (eng_Latn, deu_Latn, ...), or a folder with one file a language"
    return f"expected the columns {' | '.join(shown)}"


def _columns(rows: Sequence[tuple[int, Row]]) -> str:
    names = dict.fromkeys(name for _, row in rows[:SNIFFED] for name in row)
    if languages(dict(names)):
        return f"{', '.join(list(names)[:4])}{', ...' if len(names) > 4 else ''}"
    return ", ".join(names)
