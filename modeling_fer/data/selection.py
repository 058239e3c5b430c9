"""Which pseudo-labels to keep: debiased labels, copies and look-alikes, thresholds and quotas.

The debiased label of an image is the class of largest `p_c / m_c^tau`, p the image's probabilities and m
their mean over every image of the job (logit adjustment, Menon et al., "Long-tail learning via logit
adjustment", ICLR 2021, equation 9, with the model's own marginal for the prior as in Wang et al., "Debiased
Learning from Naturally Imbalanced Pseudo-Labels", CVPR 2022). Since m is known before the first label is
given, no label depends on the order of the work.

The label shards are read a few times; no model is needed. In memory are one shard, some tables of counts, and
32 bytes for each held-out face; what must be known of every row is kept in files.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from modeling_fer.data.images import HASH_BYTES
from modeling_fer.data.pseudo import Job, option
from modeling_fer.data.similar import BITS, BYTES, NEAR, near_any
from modeling_fer.labels import NUM_CLASSES

RULES = ("threshold", "quota")
COPY, HELD_OUT = 1, 2  # marks of rows that are left out
PARTITION_ROWS = 2**22  # rows whose hashes are sorted at once: some 200 MB
DIGIT = 16  # bits of a key that one pass over the shards settles


@dataclass
class SelectOptions:
    """Which pseudo-labels to keep."""

    rule: str = option(
        "threshold: rows of that confidence or more; quota: the most confident rows of each class",
        "threshold",
    )
    threshold: float = option("least debiased probability of a label, for that rule", 0.9)
    quota: int = option("rows a class, for that rule", 1000)
    tau: float = option("strength of debiasing; 0: the model's own labels", 1.0)
    agreement: float = option("least agreement of an image's two views, between 0 and 1", 0.0)
    against: list[str] = field(
        default_factory=list,
        metadata={"help": "prepared folders: what looks like their validation or test faces is left out"},
    )
    distance: int = option(f"bits of {BITS} in which the hashes of look-alikes may differ", NEAR)

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"--rule must be one of {', '.join(RULES)}, got {self.rule!r}")
        for name in ("threshold", "agreement"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} must lie between 0 and 1, got {getattr(self, name)}")
        if self.quota < 1:
            raise ValueError(f"--quota must be at least 1, got {self.quota}")
        if not self.tau >= 0:
            raise ValueError(f"--tau must not be negative, got {self.tau}")
        if not 0 <= self.distance < BITS // 2:
            raise ValueError(f"--distance must lie between 0 and {BITS // 2 - 1}, got {self.distance}")


@dataclass
class Candidates:
    """The labelled images of one unit, a place an image.

    `shard` holds their rows of `pseudo.LABELS`; `scores` (n, 8) are their debiased probabilities and `labels`
    (n,) the classes of the largest. `keys` order the rows of a class, by confidence and then by content.
    `marks` tell copies and look-alikes; `agree` is whether the views do, `keep` whether the row is selected.
    """

    unit: int
    shard: pa.Table
    scores: np.ndarray
    labels: np.ndarray
    keys: np.ndarray
    marks: np.ndarray
    agree: np.ndarray
    keep: np.ndarray


def debiased(probabilities: np.ndarray, marginal: np.ndarray, tau: float) -> np.ndarray:
    """Divide probabilities `(N, 8)` by `marginal ** tau` `(8,)` and let rows sum to 1 again, in float64.

    A class that the model never predicts has a marginal of 0 and stays at 0.
    """
    scaled = probabilities / np.where(marginal > 0, marginal, 1.0) ** tau
    return scaled / scaled.sum(axis=1, keepdims=True)


class Selection:
    """The choice among a finished job's labels.

    Args:
        job: all of its units are labelled.
        options: the rule.
        held_out: `(M, 32)` bytes, perceptual hashes of faces whose look-alikes are left out.
        folder: an empty folder for what must be known of every row: 17 bytes each.

    Attributes:
        marginal: `(8,)`, the mean probability of each class over all labelled images.
        cuts: `(8,)`, the least key that is kept, by class.

    Raises:
        ValueError: there are no labels, or a shard is damaged.
    """

    def __init__(self, job: Job, options: SelectOptions, held_out: np.ndarray, folder: Path) -> None:
        self.job, self.options, self.folder = job, options, folder
        counts = [len(job.read_labels(unit, ["row"])) for unit in range(len(job.units))]
        self.starts = [0, *np.cumsum(counts).tolist()]  # number of the first row of each unit
        if not self.starts[-1]:
            raise ValueError(f"{job.out} holds no labels: no image could be read, see skipped.jsonl")
        self.marginal = np.zeros(NUM_CLASSES)
        self.cuts = np.zeros(NUM_CLASSES, np.uint64)
        self._survey(held_out)
        if options.rule == "threshold":
            self.cuts[:] = _as_key(np.float32(options.threshold))
        else:
            self._cut_at_quota(options.quota)

    @property
    def thresholds(self) -> np.ndarray:
        """The least confidence that is kept, by class: `(8,)` in float32."""
        return (self.cuts >> np.uint64(32)).astype(np.uint32).view(np.float32)

    def units(self) -> Iterator[Candidates]:
        """Read the label shards once more, with what is known of their rows by now."""
        with (self.folder / "marks").open("rb") as file:
            for unit, start in enumerate(self.starts[:-1]):
                shard = self.job.read_labels(unit)
                scores = debiased(_probabilities(shard), self.marginal, self.options.tau)
                labels = scores.argmax(axis=1)
                keys = _as_key(scores.max(axis=1, initial=0)) | _numbers(shard) >> np.uint64(32)
                marks = np.frombuffer(file.read(self.starts[unit + 1] - start), np.uint8)
                agree = shard["agreement"].to_numpy() >= self.options.agreement
                keep = (marks == 0) & agree & (keys >= self.cuts[labels])
                yield Candidates(unit, shard, scores, labels, keys, marks, agree, keep)

    def _survey(self, held_out: np.ndarray) -> None:
        """Find the marginal, and mark the rows that look like held-out faces or copy an earlier row."""
        # Sorted part by part, hashes find their equals in memory that does not grow with the rows.
        parts = -(-self.starts[-1] // PARTITION_ROWS)
        kind = np.dtype([("number", "<u8"), ("row", "<u8")])
        with (self.folder / "marks").open("wb") as marks:
            for unit, start in enumerate(self.starts[:-1]):
                shard = self.job.read_labels(unit, ["content_hash", "perceptual_hash", "probabilities"])
                self.marginal += _probabilities(shard).sum(axis=0) / self.starts[-1]
                near = near_any(_bytes(shard["perceptual_hash"], BYTES), held_out, self.options.distance)
                marks.write((near * np.uint8(HELD_OUT)).tobytes())
                hashed = np.empty(len(shard), kind)
                hashed["number"], hashed["row"] = _numbers(shard), np.arange(start, start + len(shard))
                for part in range(parts):
                    with (self.folder / f"hashes-{part}").open("ab") as file:
                        file.write(hashed[hashed["number"] % parts == part].tobytes())
        all_marks = np.memmap(self.folder / "marks", np.uint8, "r+")
        for part in range(parts):
            hashed = np.fromfile(self.folder / f"hashes-{part}", kind)
            hashed.sort(order=["number", "row"])
            copies = hashed["row"][1:][hashed["number"][1:] == hashed["number"][:-1]]
            all_marks[copies] = np.maximum(all_marks[copies], COPY)
        all_marks.flush()

    def _cut_at_quota(self, quota: int) -> None:
        """Find the quota-th largest key of each class, digit by digit from the highest.

        Each pass counts, by their next digit, the rows that agree with the digits found so far.
        """
        wanted = np.full(NUM_CLASSES, quota)
        found = np.zeros(NUM_CLASSES, np.uint64)
        for shift in range(64 - DIGIT, -1, -DIGIT):
            counts = np.zeros((NUM_CLASSES, 2**DIGIT), np.int64)
            for rows in self.units():
                upper = rows.keys >> np.uint64(shift)
                counted = rows.keep & (upper >> np.uint64(DIGIT) == found[rows.labels])
                digits = (upper[counted] & np.uint64(2**DIGIT - 1)).astype(np.int64)
                np.add.at(counts, (rows.labels[counted], digits), 1)
            reached = counts[:, ::-1].cumsum(axis=1)[:, ::-1]  # rows of this digit or a larger one
            digit = np.maximum((reached >= wanted[:, None]).sum(axis=1) - 1, 0)  # 0: the class has too few
            every = np.arange(NUM_CLASSES)
            wanted = wanted - (reached - counts)[every, digit]
            found = found << np.uint64(DIGIT) | digit.astype(np.uint64)
        self.cuts = found


def _as_key(confidence: np.ndarray | np.float32) -> np.ndarray:
    """Put confidences into the upper half of keys: the bits of positive floats are in their order."""
    return np.asarray(confidence, np.float32).view(np.uint32).astype(np.uint64) << np.uint64(32)


def _numbers(shard: pa.Table) -> np.ndarray:
    """Content hashes as 64-bit numbers `(n,)`; ten million images collide with a chance of 3 in a million."""
    return _bytes(shard["content_hash"], HASH_BYTES).view("<u8")[:, 0]


def _bytes(column: pa.ChunkedArray, width: int) -> np.ndarray:
    return np.frombuffer(b"".join(column.to_pylist()), np.uint8).reshape(-1, width)


def _probabilities(shard: pa.Table) -> np.ndarray:
    flat = [chunk.flatten().to_numpy() for chunk in shard["probabilities"].chunks]
    return np.concatenate([*flat, np.empty(0, np.float32)]).astype(np.float64).reshape(-1, NUM_CLASSES)
