"""Bootstrap replicates of a confusion matrix: of examples, or of whole groups of them."""

import numpy as np
from numpy.typing import NDArray

DRAWS_AT_ONCE = 4_000_000  # cells of one block of group draws (32 MB); bounds memory for very many groups

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def resample_examples(matrix: Ints, samples: int, rng: np.random.Generator) -> Ints:
    """Draw replicates of the whole set.

    Drawing N examples with replacement and counting their cells *is* a multinomial draw of the cells, so this
    is the plain bootstrap at a cost that does not depend on N.

    Args:
        matrix: (C, C) counts, not all zero.
        samples: S, the number of replicates.
        rng: where the draws come from.

    Returns:
        (S, C, C) confusion matrices.
    """
    cells = matrix.ravel()
    draws = rng.multinomial(cells.sum(), cells / cells.sum(), size=samples)
    return draws.reshape(samples, *matrix.shape)


def resample_groups(
    cells: Ints, groups: Ints, num_classes: int, samples: int, rng: np.random.Generator
) -> Floats:
    """Draw replicates made of whole groups: how often each is drawn, times its own confusion matrix.

    Args:
        cells: (M,) cell of each example in the flat confusion matrix.
        groups: (M,) its group, numbered from 0.
        num_classes: C.
        samples: S, the number of replicates.
        rng: where the draws come from.

    Returns:
        (S, C, C) confusion matrices.
    """
    num_groups, num_cells = int(groups.max()) + 1, num_classes**2
    counts = np.bincount(groups * num_cells + cells, minlength=num_groups * num_cells)
    # Float: exact up to 2^53, and numpy has a fast matrix product for floats only.
    per_group = counts.reshape(num_groups, num_cells).astype(np.float64)
    uniform = np.full(num_groups, 1 / num_groups)
    at_once = max(1, DRAWS_AT_ONCE // num_groups)
    blocks = [
        rng.multinomial(num_groups, uniform, size=min(at_once, samples - start)) @ per_group
        for start in range(0, samples, at_once)
    ]
    return np.concatenate(blocks).reshape(samples, num_classes, num_classes)
