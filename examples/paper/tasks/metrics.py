"""The official scores of the paper's tasks.

    metrics.glue("mrpc", classes, labels)              # {"accuracy": …, "f1": …}
    metrics.generation(texts, references)              # BLEU, NIST, TER, ROUGE-L, CIDEr, …

From scikit-learn, SciPy, sacrebleu and rouge-score; NIST and CIDEr are in `ngrams.py`. METEOR is
not here: the official one is a Java program with tables of paraphrases, and what Python libraries
compute under its name is the formula of 2005 with WordNet's files, other numbers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rouge_score import rouge_scorer
from sacrebleu.metrics import BLEU, TER
from scipy import stats
from sklearn import metrics as sklearn

from . import ngrams

References = Sequence[Sequence[str]]  # those of each text


# ---- GLUE ---------------------------------------------------------------------------------------


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """The share of right predictions."""
    return float(sklearn.accuracy_score(labels, predictions))


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """F1 of class 1; 0 where nothing is or should be predicted as that class."""
    return float(sklearn.f1_score(labels, predictions, zero_division=0.0))


def matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Matthews' correlation; 0 where either is constant."""
    return float(sklearn.matthews_corrcoef(labels, predictions))


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Pearson's correlation; NaN, with SciPy's warning, where either is constant."""
    return float(stats.pearsonr(predictions, labels).statistic)


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Spearman's rank correlation; NaN, with SciPy's warning, where either is constant."""
    return float(stats.spearmanr(predictions, labels).statistic)


# The first is the paper's.
GLUE: Mapping[str, tuple[Callable[[np.ndarray, np.ndarray], float], ...]] = {
    "cola": (matthews, accuracy),
    "sst2": (accuracy,),
    "mrpc": (accuracy, f1),
    "stsb": (pearson, spearman),
    "qqp": (accuracy, f1),
    "mnli": (accuracy,),
    "qnli": (accuracy,),
    "rte": (accuracy,),
    "wnli": (accuracy,),
}


def glue(task: str, predictions: Any, labels: Any) -> dict[str, float]:
    """The scores of a task by name, from 0 or -1 to 1; the paper's comes first.

    Args:
        task: a key of `GLUE`.
        predictions: the classes, or for stsb scores, ``(n,)``.
        labels: what they should be, ``(n,)``.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    return {metric.__name__: metric(predictions, labels) for metric in GLUE[task]}


# ---- generation ---------------------------------------------------------------------------------


def bleu(texts: Sequence[str], references: References, *, lowercase: bool = False) -> float:
    """BLEU of the corpus from 0 to 100, tokenized as mteval-v13a does.

    The numbers of references may differ. The scripts of E2E, WebNLG and DART score lower case.
    """
    metric = BLEU(lowercase=lowercase)
    return metric.corpus_score(texts, _columns(references)).score


def ter(texts: Sequence[str], references: References) -> float:
    """Translation edit rate of the corpus in percent; less is better."""
    return TER(normalized=True).corpus_score(texts, _columns(references)).score


def rouge_l(texts: Sequence[str], references: References) -> float:
    """ROUGE-L from 0 to 100 as E2E's script, coco-caption, computes it.

    The best precision P and the best recall R among the references, ``(1 + b²)PR / (R + b²P)`` with
    b = 1.2, averaged.
    """
    scorer = rouge_scorer.RougeScorer(["rougeL"], tokenizer=ngrams.Words())
    total = 0.0
    for text, several in zip(texts, references, strict=True):
        scores = [scorer.score(reference, text)["rougeL"] for reference in several]
        precision, recall = (max(s[i] for s in scores) for i in (0, 1))
        if precision and recall:
            total += 2.44 * precision * recall / (recall + 1.44 * precision)
    return 100 * total / len(texts)


def nist(texts: Sequence[str], references: References) -> float:
    """NIST-5 of the corpus, tokenized as mteval-v13a does, in lower case."""
    tokens = ngrams.mteval
    return ngrams.nist([tokens(t) for t in texts], [[*map(tokens, r)] for r in references])


def cider(texts: Sequence[str], references: References) -> float:
    """CIDEr-D of the corpus as coco-caption computes it, from 0 to 10."""
    tokens = ngrams.Words().tokenize
    return ngrams.cider([tokens(t) for t in texts], [[*map(tokens, r)] for r in references])


def generation(texts: Sequence[str], references: References) -> dict[str, float]:
    """All scores of E2E, WebNLG and DART by name; the paper's first."""
    return {
        "bleu_lower": bleu(texts, references, lowercase=True),
        "bleu": bleu(texts, references),
        "nist": nist(texts, references),
        "rouge_l": rouge_l(texts, references),
        "cider": cider(texts, references),
        "ter": ter(texts, references),
    }


def _columns(references: References) -> list[list[str | None]]:
    """The first references of all texts, the second ones, …: sacrebleu's layout."""
    most = max(map(len, references))
    return [[r[i] if i < len(r) else None for r in references] for i in range(most)]
