# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The outputs of every layer at every position in two dimensions."""

from dataclasses import dataclass

import numpy as np

from ..common.checks import check_integers
from .representations import Representations, tokens_of


EMBEDDINGS = ("pca", "umap")


@dataclass(frozen=True)
class Embedding:
    """CLS tokens after all layers at all positions in two dimensions.

    Args:
        method: One of `EMBEDDINGS`.
        points: Points of shape `(num_points, 2)`.
        layer, position: Layer and position of each point, as integer arrays of shape `(num_points,)`.
        explained_variance: For PCA, the fraction in [0, 1] of the variance along each of the two axes; None otherwise.
    """

    method: str
    points: np.ndarray
    layer: np.ndarray
    position: np.ndarray
    explained_variance: np.ndarray | None = None


def embed_representations(
    representations: Representations,
    *,
    token: str = "cls",
    method: str = "pca",
    max_points: int = 3000,
    seed: int = 0,
) -> Embedding:
    """Shows the outputs of all (layer, position) pairs in two dimensions.

    Args:
        representations: The outputs to show.
        token: "cls" or "mean".
        method: "pca", fitted to all outputs, or "umap" (McInnes et al. 2018), fitted to the points shown.
        max_points: Number of points that are shown and stored at most. They are drawn at random.
        seed: Seed of that draw and of UMAP, at least 0.

    Raises:
        `ValueError`: if the method is unknown, or needs a package that is not installed.
    """
    check_embedding(method)
    check_integers(max_points=(max_points, 1), seed=(seed, 0))
    outputs = tokens_of(representations, token)
    vectors = outputs.reshape(-1, outputs.shape[-1])
    num_points = min(max_points, len(vectors))
    chosen = np.sort(np.random.default_rng(seed).choice(len(vectors), num_points, replace=False))
    *_, layer, position = np.unravel_index(chosen, outputs.shape[:-1])
    explained_variance = None
    if method == "pca":
        from sklearn.decomposition import PCA

        pca = PCA(2, svd_solver="covariance_eigh").fit(vectors)
        points = pca.transform(vectors[chosen])
        explained_variance = pca.explained_variance_ratio_
    else:
        from umap import UMAP

        points = UMAP(random_state=seed, n_jobs=1).fit_transform(vectors[chosen])
    return Embedding(method, points.astype(np.float64), layer, position, explained_variance)


def check_embedding(method: str) -> None:
    """Raises `ValueError` if the method is unknown, or needs a package that is not installed."""
    if method not in EMBEDDINGS:
        raise ValueError(f"The embedding is '{method}'; it must be one of {', '.join(EMBEDDINGS)}.")
    if method == "umap":
        try:
            import umap  # noqa: F401
        except ImportError as error:
            raise ValueError(
                "The embedding 'umap' needs umap-learn, which is not installed: pip install umap-learn. The "
                "embedding 'pca' needs nothing more."
            ) from error
