"""A reader of digits that never saw the denoiser's training data."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from undiffuse.data import Data
from undiffuse.types import InputError


class Reader:
    """A support vector machine on pixels, fitted on real samples that were held out from the denoiser.

    `accuracy(data)` on real data it has not seen is the yardstick for its verdict on generated samples.
    """

    def __init__(self, held_out: Data) -> None:
        from sklearn.svm import SVC

        if held_out.labels is None:
            raise InputError("a reader learns from labels, and this data has none")
        self._svm = SVC(C=10.0).fit(self._pixels(held_out.x), held_out.labels.numpy())

    @staticmethod
    def _pixels(x: Tensor) -> np.ndarray:
        return x.detach().cpu().float().clamp(-1, 1).flatten(1).numpy()

    def read(self, x: Tensor) -> np.ndarray:
        """The class of each sample (n,)."""
        return np.asarray(self._svm.predict(self._pixels(x)))

    def accuracy(self, x: Tensor, labels: Tensor) -> float:
        """The share of samples read as their label."""
        return float((self.read(x) == labels.numpy()).mean())
