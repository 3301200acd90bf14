"""FID, Inception score, precision and recall, and KID of the features of two sets of images, as torch-fidelity defines
them.

Features may lie in .npy files, which are memory-mapped and read in chunks: 50,000 images need no more memory than 500.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch_fidelity.defaults import DEFAULTS
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_part

from addp_core.base.errors import UserError

NEIGHBORS = DEFAULTS["prc_neighborhood"]  # k of the balls whose union is the manifold (arXiv 1904.06991)
DISTANCES_IN_MEMORY = 2**25
ROWS_IN_MEMORY = 2048  # of features
ARRAYS = ("features", "logits")  # what an extractor returns, each a file


@dataclass(frozen=True)
class FeatureSet:
    """The features of n images, or statistics of them alone.

    Attributes:
        mean: Float64[D], of the features.
        covariance: Float64[D,D], of the features.
        features: Float32[n,D], memory-mapped; None if only the statistics are available.
        logits: Float32[n,C], memory-mapped; None if only the statistics are available.
    """

    mean: np.ndarray
    covariance: np.ndarray
    features: np.ndarray | None = None
    logits: np.ndarray | None = None

    @classmethod
    def read(cls, folder: Path) -> "FeatureSet":
        """Open what `extract_features` wrote. Raises OSError or ValueError if a file is missing or incomplete."""
        # copy-on-write, because torch wants writable memory
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="c") for name in ARRAYS}
        return cls(np.load(folder / "mean.npy"), np.load(folder / "covariance.npy"), **arrays)


def check_image_count(n: int, is_splits: int = 1, name: str = "images") -> None:
    """Raise UserError if `n` images are too few for the metrics. `name` is what the message calls the images."""
    if n <= NEIGHBORS:
        raise UserError(f"{name}: found {n} images, expected more than {NEIGHBORS}, as precision and recall need")
    if n < is_splits:
        raise UserError(
            f"is_splits: found {is_splits} parts of {n} images, expected is_splits={n} or less, or more images"
        )


def frechet_distance(a: FeatureSet, b: FeatureSet) -> float:
    """Return |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (arXiv 1706.08500).

    With C1 = L L^T, the eigenvalues of C1 C2 are those of the symmetric L^T C2 L, and zeros. L leaves out the
    directions in which C1 is nothing but rounding noise; there are many if there are fewer images than features.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    significant = values > values.max() * len(values) * np.finfo(np.float64).eps
    factor = vectors[:, significant] * np.sqrt(values[significant])
    root = np.sqrt(np.linalg.eigvalsh(factor.T @ b.covariance @ factor).clip(min=0)).sum()
    difference = a.mean - b.mean
    return float(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * root)


def inception_score(logits: np.ndarray, splits: int) -> tuple[float, float]:
    """Return the mean and standard deviation, over `splits` parts of the images, of exp(mean KL(p(y|x) || p(y)))
    (arXiv 1606.03498).

    logits: Float[n,C], n >= splits. Images are assigned to the parts as torch-fidelity shuffles them.
    """
    n = len(logits)
    part = np.empty(n, dtype=np.int64)
    shuffled = np.random.RandomState(DEFAULTS["rng_seed"]).permutation(n)
    edges = [i * n // splits for i in range(splits + 1)]
    for i in range(splits):
        part[shuffled[edges[i] : edges[i + 1]]] = i
    p_sum, p_log_p = np.zeros((splits, logits.shape[1])), np.zeros(splits)
    start = 0
    for chunk in float64_chunks(logits):
        log_p = torch.from_numpy(chunk).log_softmax(1).numpy()
        p, chunk_part = np.exp(log_p), part[start : start + len(chunk)]
        np.add.at(p_sum, chunk_part, p)
        np.add.at(p_log_p, chunk_part, (p * log_p).sum(1))
        start += len(chunk)
    size = np.diff(edges)
    q = p_sum / size[:, None]
    entropy = (q * np.log(np.maximum(q, np.finfo(np.float64).tiny))).sum(1)
    scores = np.exp(p_log_p / size - entropy)
    return float(scores.mean()), float(scores.std())


def precision_recall(generated: np.ndarray, reference: np.ndarray, device: torch.device) -> tuple[float, float]:
    """Return the share of generated images within the reference's manifold, and the share of the reference within the
    generated images' manifold.

    Both are features Float[n,D], n > NEIGHBORS. On a GPU, both are copied to it (50,000 of Inception's: 0.4 GB).
    """
    rows = max(DISTANCES_IN_MEMORY // max(len(generated), len(reference)), 1)
    tensors = (torch.from_numpy(features).to(device) for features in (generated, reference))
    return calculate_precision_recall_part(*tensors, NEIGHBORS, rows)


def kernel_distance(generated: np.ndarray, reference: np.ndarray, subset: int) -> tuple[float, float]:
    """Return the mean and standard deviation, over random subsets of `subset` images, of the squared MMD with a cubic
    kernel (KID, arXiv 1801.01401).
    """
    tensors = (torch.from_numpy(features) for features in (generated, reference))
    kid = kid_features_to_metric(*tensors, kid_subset_size=subset, verbose=False)
    return kid[KEY_METRIC_KID_MEAN], kid[KEY_METRIC_KID_STD]


def mean_and_covariance(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Float[n,D], n > 1 -> mean Float64[D] and covariance Float64[D,D], computed in chunks."""
    mean = sum(chunk.sum(0) for chunk in float64_chunks(features)) / len(features)
    scatter = np.zeros((features.shape[1],) * 2)
    for chunk in float64_chunks(features):
        chunk -= mean
        scatter += chunk.T @ chunk
    return mean, scatter / (len(features) - 1)


def float64_chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the rows of `array`, `ROWS_IN_MEMORY` at a time, as float64 copies in memory."""
    for start in range(0, len(array), ROWS_IN_MEMORY):
        yield np.array(array[start : start + ROWS_IN_MEMORY], dtype=np.float64)
