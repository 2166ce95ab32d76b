"""Classification by a logistic probe on frozen vectors, trained in one language and judged in every other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from distillabse.config import ProbeTask
from distillabse.errors import InputError
from distillabse.tasks.base import LookUp, Vectors, drawn, read_rows, require_two
from distillabse.tasks.languages import select
from distillabse.tasks.scores import Bootstrap, Measures, Values

logger = logging.getLogger(__name__)

_ITERATIONS = 1000

Labelled = tuple[str, str]
"""A text and its class."""
Predict = Callable[[Vectors], NDArray[np.int64]]


@dataclass(frozen=True)
class Probe:
    """Labelled texts to train on, and to judge on by language.

    Attributes:
        name: what the task is called.
        train: at least two texts of at least two classes.
        test: by language, at least two each.
        regularisation: C of scikit-learn's LogisticRegression.
    """

    name: str
    train: Sequence[Labelled]
    test: Mapping[str, Sequence[Labelled]]
    regularisation: float = 0.01
    kind: ClassVar[str] = "probe"
    headline: ClassVar[str] = "accuracy"

    def texts(self) -> Iterator[str]:
        """Texts of training and test."""
        return (text for rows in (self.train, *self.test.values()) for text, _ in rows)

    def scores(self, vectors: LookUp, teacher: LookUp | None, bootstrap: Bootstrap) -> Measures:
        """Accuracy and macro-averaged F1; where the teacher's vectors are given, also of a probe trained on those.

        `mixed_accuracy`: a probe that was trained on the teacher's vectors reads the encoder's, as when a service
        replaces the teacher and keeps its classifiers.
        """
        classes, labels = np.unique([label for _, label in self.train], return_inverse=True)
        numbers = {label: number for number, label in enumerate(classes)}
        texts = [text for text, _ in self.train]
        own = fit_probe(vectors(texts), labels, self.regularisation)
        theirs = own if teacher is vectors else None
        if teacher is not None and theirs is None:
            theirs = fit_probe(teacher(texts), labels, self.regularisation)
        found: Measures = {"accuracy": {}, "macro_f1": {}, "mixed_accuracy": {}}
        for language, rows in self.test.items():
            gold = np.array([numbers.get(label, -1) for _, label in rows])  # a class never trained on is never right
            encoded = vectors([text for text, _ in rows])
            predicted = own(encoded)
            found["accuracy"][language] = bootstrap.mean((predicted == gold).astype(np.float64))
            found["macro_f1"][language] = bootstrap.score(partial(macro_f1, classes=len(classes)), gold, predicted)
            if theirs is not None:
                right = (theirs(encoded) == gold).astype(np.float64)
                found["mixed_accuracy"][language] = bootstrap.mean(right)
        return {measure: scores for measure, scores in found.items() if scores}


def fit_probe(vectors: Vectors, labels: NDArray[np.int64], regularisation: float) -> Predict:
    """Multinomial logistic regression on standardised vectors.

    Args:
        vectors: float32 [n, dimension].
        labels: int [n], numbers of classes.
        regularisation: scikit-learn's C, of an L2 penalty.

    Returns:
        A function from float32 [m, dimension] to class numbers int [m].
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=regularisation, max_iter=_ITERATIONS))
    predict: Predict = probe.fit(vectors, labels).predict
    return predict


def macro_f1(gold: NDArray[np.int64], predicted: NDArray[np.int64], classes: int, axis: int = -1) -> Values:
    """F1 of every class that occurs in `gold` or `predicted`, averaged; classes below 0 in `gold` are never met.

    Args:
        gold, predicted: int [..., n]; the axis has to be the last.
        classes: their number; `predicted` lies between 0 and classes - 1.

    Returns:
        float64 [...].
    """
    shape = gold.shape[:-1]
    gold, predicted = (np.atleast_2d(side) for side in (gold, predicted))
    offsets = classes * np.arange(len(gold))[:, None]

    def counts(side: NDArray[np.int64], where: NDArray[np.bool_]) -> NDArray[np.int64]:
        return np.bincount((side + offsets)[where], minlength=classes * len(gold)).reshape(len(gold), classes)

    right = counts(predicted, predicted == gold)
    total = counts(gold, gold >= 0) + counts(predicted, predicted >= 0)
    f1 = 2 * right / np.maximum(total, 1)
    mean: Values = f1.sum(axis=1) / np.maximum((total > 0).sum(axis=1), 1)
    return mean.reshape(shape)


def load_probe(task: ProbeTask, seed: int) -> Probe:
    """Read the rows of a configured task.

    Raises:
        InputError: a file cannot be used, there is but one class, a language is not known or
            not there, or has too few rows.
    """
    origin = f"tasks: {task.name}"
    train: list[Labelled] = [
        (text, label) for _, (text, label) in read_rows(task.train, [task.train.text, task.train.label], task.name)
    ]
    known = {label for _, label in train}
    if len(known) < 2:
        raise InputError(f"{origin}: the train rows have one class, {train[0][1]!r}. Check `train.label` and `where`.")
    found: dict[str, list[Labelled]] = {}
    for code, (text, label) in read_rows(task.test, [task.test.text, task.test.label], task.name):
        found.setdefault(code, []).append((text, label))
    labels = {label for rows in found.values() for _, label in rows}
    if not labels & known:
        raise InputError(f"{origin}: no class of the test rows is among those of the train rows. Check `label`.")
    if unseen := sorted(labels - known):
        logger.warning("%s: classes without a train row are never right: %s", origin, ", ".join(unseen))
    test = {}
    for code, label in select(found, task.languages, origin).items():
        require_two(found[code], task.name, code)
        test[label] = drawn(found[code], task.max_pairs, seed)
    return Probe(task.name, train, test, task.regularisation)
