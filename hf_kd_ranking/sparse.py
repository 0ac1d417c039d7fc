"""Sparse vectors as arrays of scipy, which is imported where there are some: scoring and training run without it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from scipy.sparse import csr_array


def is_sparse(vectors: Any) -> bool:
    """Return whether vectors are a sparse array of scipy, which alone have this method."""
    return hasattr(vectors, "tocsr")


def as_sparse(vectors: np.ndarray) -> "csr_array":
    """Return dense vectors, (N, V), as a sparse array."""
    from scipy.sparse import csr_array

    return csr_array(vectors)


def stack_sparse(vectors: "Sequence[csr_array]") -> "csr_array":
    """Return sparse arrays, (n, V) each or (V,), one below the other."""
    from scipy.sparse import vstack

    return vstack(vectors, format="csr")
