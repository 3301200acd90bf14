"""FID, Inception score, precision and recall, and KID of features on the disk, as torch-fidelity defines them."""

import numpy as np
import torch
from torch_fidelity.defaults import DEFAULTS
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_part

from gen.features import Features, chunks

NEIGHBOURS = DEFAULTS["prc_neighborhood"]  # k of the balls whose union is the manifold (arXiv 1904.06991)
DISTANCES = 2**25  # held in memory at a time


def frechet_distance(a: Features, b: Features) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (arXiv 1706.08500).

    With C1 = L L^T, the eigenvalues of C1 C2 are those of the symmetric L^T C2 L, and zeros. Directions in which C1 is
    nothing but rounding noise (fewer images than features leave many) are left out of L.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    kept = values > values.max() * len(values) * np.finfo(np.float64).eps
    factor = vectors[:, kept] * np.sqrt(values[kept])
    root = np.sqrt(np.linalg.eigvalsh(factor.T @ b.covariance @ factor).clip(min=0)).sum()
    difference = a.mean - b.mean
    return float(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * root)


def inception_score(logits: np.ndarray, splits: int) -> tuple[float, float]:
    """exp of the mean KL of p(y|x) from p(y): its mean and standard deviation over `splits` parts (arXiv 1606.03498).

    logits: Float[n,C], n >= splits. Images are dealt to the parts as torch-fidelity shuffles them.
    """
    n = len(logits)
    part = np.empty(n, dtype=np.int64)
    shuffled = np.random.RandomState(DEFAULTS["rng_seed"]).permutation(n)
    edges = [i * n // splits for i in range(splits + 1)]
    for i in range(splits):
        part[shuffled[edges[i] : edges[i + 1]]] = i
    p_sum, p_log_p = np.zeros((splits, logits.shape[1])), np.zeros(splits)
    start = 0
    for chunk in chunks(logits):
        log_p = torch.from_numpy(chunk).log_softmax(1).numpy()
        p, of = np.exp(log_p), part[start : start + len(chunk)]
        np.add.at(p_sum, of, p)
        np.add.at(p_log_p, of, (p * log_p).sum(1))
        start += len(chunk)
    size = np.diff(edges)
    q = p_sum / size[:, None]
    entropy = (q * np.log(np.maximum(q, np.finfo(np.float64).tiny))).sum(1)
    scores = np.exp(p_log_p / size - entropy)
    return float(scores.mean()), float(scores.std())


def precision_recall(generated: np.ndarray, reference: np.ndarray, device: torch.device) -> tuple[float, float]:
    """Share of generated images within the reference's manifold, and the reverse; features Float[n,D], n > NEIGHBOURS.

    A GPU holds both sets of features whole (50,000 of Inception's: 0.4 GB).
    """
    rows = max(DISTANCES // max(len(generated), len(reference)), 1)
    sets = (torch.from_numpy(features).to(device) for features in (generated, reference))
    return calculate_precision_recall_part(*sets, NEIGHBOURS, rows)


def kernel_distance(generated: np.ndarray, reference: np.ndarray, subset: int) -> tuple[float, float]:
    """Squared MMD with a cubic kernel (KID, arXiv 1801.01401): mean and deviation over random subsets of this size."""
    sets = (torch.from_numpy(features) for features in (generated, reference))
    found = kid_features_to_metric(*sets, kid_subset_size=subset, verbose=False)
    return found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD]
