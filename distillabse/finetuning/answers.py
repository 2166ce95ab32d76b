"""How a predicted answer is judged: exact match and F1 of SQuAD, normalised for the language.

SQuAD: Rajpurkar et al. 2016, arXiv:1606.05250. MLQA: Lewis et al. 2020, arXiv:1910.07475, whose evaluation script
removes each language's own articles and all Unicode punctuation, and takes every Chinese character as a token.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

# As in MLQA's script, which takes some Vietnamese classifiers and every Arabic definite article for articles.
_ARTICLES = {
    "en": re.compile(r"\b(a|an|the)\b"),
    "es": re.compile(r"\b(un|una|unos|unas|el|la|los|las)\b"),
    "de": re.compile(r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b"),
    "vi": re.compile(r"\b(của|là|cái|chiếc|những)\b"),
    "ar": re.compile("ال"),
}
_CHINESE_CHARACTER = re.compile(r"([\u4e00-\u9fa5])")
_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)


def mlqa_tokens(text: str, language: str) -> list[str]:
    """Lower-cased tokens without punctuation and articles, as MLQA's script makes them.

    Languages that MLQA does not have keep all words, and are split at white space.
    """
    text = "".join(character for character in text.lower() if not _is_punctuation(character))
    if language in _ARTICLES:
        text = _ARTICLES[language].sub(" ", text)
    if language == "zh":
        text = _CHINESE_CHARACTER.sub(r" \1 ", text)
    return text.split()


def squad_tokens(text: str, language: str) -> list[str]:
    """The same as SQuAD's own script makes them, as for English in every language: XTREME's figures on XQuAD."""
    return _ARTICLES["en"].sub(" ", text.lower().translate(_ASCII_PUNCTUATION)).split()


def answer_scores(prediction: str, answers: Sequence[str], language: str) -> dict[str, float]:
    """F1 and exact match by MLQA's and by SQuAD's normalisation, each 0 to 100, against the best of the answers."""
    scores = {}
    for prefix, tokens in (("", mlqa_tokens), ("squad_", squad_tokens)):
        pairs = [_f1_and_exact(prediction, answer, language, tokens) for answer in answers]
        scores[f"{prefix}f1"] = max(f1 for f1, _ in pairs)
        scores[f"{prefix}exact_match"] = max(exact for _, exact in pairs)
    return scores


def _f1_and_exact(
    prediction: str, answer: str, language: str, tokens: Callable[[str, str], list[str]]
) -> tuple[float, float]:
    predicted, expected = tokens(prediction, language), tokens(answer, language)
    common = sum((Counter(predicted) & Counter(expected)).values())
    # The harmonic mean of common / predicted and common / expected.
    f1 = 200.0 * common / (len(predicted) + len(expected)) if common else 0.0
    return f1, 100.0 * (predicted == expected)


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")
