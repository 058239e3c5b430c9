"""From a source to a prepared folder: parquet files, a report, a picture of samples, a dataset card.

    out/data/<split>-00000-of-0000N.parquet   what `schema.load` and `datasets.load_dataset(out)` read
    out/report.json  README.md  samples.png   what is in it, for programs, for the Hub, and to look at
    out/skipped.jsonl                         every row that was read and not written: origin and reason

Every image is decoded once on the way: a training run that starts can read all of its data.
"""

import dataclasses
import errno
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from modeling_fer.data.pixels import UnreadableImageError, open_image
from modeling_fer.data.report import Report, Samples
from modeling_fer.data.schema import SPLITS, Example, Item, Rejected, Remark
from modeling_fer.data.shards import Shards
from modeling_fer.data.sources import SOURCES
from modeling_fer.data.tally import Tally, digest
from modeling_fer.labels import CLASSES, IGNORE, NUM_CLASSES

LISTED = 50  # unreadable files named in the report; skipped.jsonl names them all


def prepare(
    source: str,
    options: Any,
    out: str | Path,
    drop_duplicates: bool = False,
    overwrite: bool = False,
    show_progress: bool = True,
) -> Report:
    """Read a source and write a prepared folder; it appears whole or not at all.

    Args:
        source: a name in `SOURCES`.
        options: an instance of that source's options.
        out: the folder to write; it must not exist yet, unless `overwrite` and it is a prepared folder.
        drop_duplicates: read the source twice. Take out of train and unlabeled every image whose pixels also
            occur in validation or test, and all but the first copy of an image in each; take out of train
            every copy of an image whose training labels disagree. Validation and test stay as they are.
        overwrite: replace an existing prepared folder, once the new one is complete.
        show_progress: show a progress bar.

    Raises:
        ValueError: an unknown source, bad input, no rows, or no labelled training rows.
        FileExistsError: `out` is there.
    """
    if source not in SOURCES:
        raise ValueError(f"unknown source {source!r}, known: {', '.join(SOURCES)}")
    out = Path(os.path.abspath(out))
    _tidy(out)
    _check_free(out, overwrite)
    surplus = _surplus(source, options, show_progress) if drop_duplicates else None
    partial, old = (out.with_name(f".{out.name}.{state}-{os.getpid()}") for state in ("partial", "old"))
    try:
        partial.mkdir(parents=True)
        report = _write(source, options, partial, surplus, show_progress)
        _check_free(out, overwrite)  # another process may have been quicker
        if out.exists():
            out.rename(old)
        partial.rename(out)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        plainly = f"disk full while writing {out}: free space or choose another folder"
        raise OSError(errno.ENOSPC, plainly) from error
    finally:
        _tidy(out)
    return report


def _check_free(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "report.json").is_file():
        raise FileExistsError(
            f"{out} exists and is no prepared folder: choose another name (it is never overwritten)"
        )
    if not overwrite:
        raise FileExistsError(f"{out} exists: choose another name, or replace it with --overwrite")


def _tidy(out: Path) -> None:
    """Remove what this process, or one that was killed, left beside `out`; put back what was moved away."""
    for path in out.parent.glob(".*"):
        left = re.fullmatch(rf"\.{re.escape(out.name)}\.(partial|old)-(\d{{1,9}})", path.name)
        if not left or _may_run(int(left[2])):
            continue
        if left[1] == "old" and not out.exists():  # killed after this was moved, before the new one was
            path.rename(out)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _may_run(pid: int) -> bool:
    """Return whether another process may have this id; in containers, a killed one often had our own."""
    if pid == os.getpid():
        return False
    if os.name != "posix":  # signal 0 is not just a question there
        return True
    try:
        os.kill(pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)  # it may be another user's
    return True


def _surplus(source: str, options: Any, show_progress: bool) -> Iterator[tuple[int, str | None]]:
    """Read the source once; return every example's digest and the reason to drop it, if any."""
    survey = Tally()
    for item in _decoded(SOURCES[source].examples(options), f"{source}, first pass", show_progress):
        if isinstance(item, tuple):
            survey.add(*item)
    return zip(survey.digests, survey.surplus(), strict=True)


def _write(
    source: str,
    options: Any,
    folder: Path,
    surplus: Iterator[tuple[int, str | None]] | None,
    show_progress: bool,
) -> Report:
    """Write everything into `folder`; `surplus` gives each example's digest and the reason to drop it."""
    tally, samples = Tally(), Samples()
    dropped: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    unreadable: list[str] = []
    remarks: list[str] = []

    def skip(origin: str, reason: str) -> None:
        skipped.write(json.dumps({"origin": origin, "reason": reason}, ensure_ascii=False) + "\n")

    with Shards(folder / "data") as shards, (folder / "skipped.jsonl").open("w", encoding="utf-8") as skipped:
        for item in _decoded(SOURCES[source].examples(options), source, show_progress):
            if isinstance(item, Remark):
                remarks.append(item.text)
            elif isinstance(item, Rejected):
                skip(item.origin, item.reason)
                if item.reason == "unreadable":
                    unreadable.append(item.origin)
                else:
                    rejected[item.reason] += 1
            else:
                example, rgb = item
                reason = None
                if surplus is not None:
                    before, reason = next(surplus, (None, None))
                    if before != digest(rgb):
                        raise ValueError(
                            f"{example.origin} changed between two readings of {source}: try again"
                        )
                if reason:
                    dropped[f"{example.split}: {reason}"] += 1
                    skip(example.origin, reason)
                else:
                    tally.add(example, rgb)
                    samples.add(example)
                    shards.add(example)
    if surplus is not None and next(surplus, None):
        raise ValueError(f"{source} gave fewer rows when read again: try again")

    counts = tally.counts()
    _check_rows(source, options, counts, f"{rejected.total():,} rejected, {len(unreadable):,} unreadable")
    report = Report(
        source=source,
        options=_publishable(options),
        counts=counts,
        repeats=tally.repeats(),
        conflicts=tally.conflicts(),
        blank={split: tally.blank[split] for split in counts},
        sizes=tally.sizes,
        crossing_subjects=tally.crossing_subjects(),
        dropped=dict(dropped.most_common()),
        rejected=dict(rejected.most_common()),
        unreadable=len(unreadable),
        unreadable_origins=unreadable[:LISTED],
        remarks=remarks,
    )
    report.save(folder / "report.json")
    samples.draw(counts).save(folder / "samples.png")
    (folder / "README.md").write_text(report.card(), encoding="utf-8")
    return report


def _decoded(
    items: Iterable[Item], title: str, show_progress: bool
) -> Iterator[tuple[Example, np.ndarray] | Rejected | Remark]:
    """Pass a source's items on: examples with their pixels (H, W, 3), unreadable ones as rejected."""
    for item in tqdm(items, desc=title, unit="row", disable=None if show_progress else True):
        if not isinstance(item, Example):
            yield item
            continue
        if item.split not in SPLITS:
            raise ValueError(f"{item.origin}: unknown split {item.split!r}, known: {', '.join(SPLITS)}")
        if item.expression not in range(IGNORE, NUM_CLASSES):
            known = f"a class id from {IGNORE} to {NUM_CLASSES - 1}"
            raise ValueError(f"{item.origin}: expression {item.expression} is not {known}")
        try:
            rgb = np.asarray(open_image(item.image))
        except UnreadableImageError:
            yield Rejected(item.origin, "unreadable")
        else:
            yield item, rgb


def _check_rows(source: str, options: Any, counts: dict[str, dict[str, int]], left_out: str) -> None:
    """Raise if there is nothing to train on where there should be."""
    if not counts:
        raise ValueError(f"{source} gave no rows ({left_out}): check its paths and options: {options}")
    for_training = not counts.keys().isdisjoint({"train", "unlabeled"})
    labelled = any(counts.get("train", {}).get(name) for name in CLASSES)
    if for_training and not labelled and getattr(options, "unlabeled", None) is not True:
        raise ValueError(
            f"{source} gave no labelled training rows ({left_out}): check its labels and the rule "
            f"for them, or take faces without labels with --unlabeled where the source has it: {options}"
        )


def _publishable(options: Any) -> dict[str, Any]:
    """Return the options with every path cut to its last part, also where commas separate several."""
    return {
        name: ",".join(Path(part).name for part in value.split(","))
        if isinstance(value, str) and os.sep in value
        else value
        for name, value in dataclasses.asdict(options).items()
    }
