"""NIST and CIDEr-D, the scores of the E2E challenge that no light library has.

NIST: Doddington, Automatic evaluation of machine translation quality using n-gram co-occurrence
statistics, 2002, with several references as in mteval-v13a. CIDEr: Vedantam, Zitnick and Parikh,
CIDEr: consensus-based image description evaluation, 2015, in the variant of coco-caption.

Texts are lists of tokens here. E2E's script tokenizes for CIDEr and ROUGE-L with Stanford's PTB
tokenizer, a Java program; `Words` is close to it: lower case, without punctuation.
"""

import re
from collections import Counter
from collections.abc import Sequence
from math import exp, log, log2, sqrt

from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

Tokens = Sequence[str]
References = Sequence[Sequence[Tokens]]  # those of each text


class Words:
    """Tokenizes into words and numbers, in lower case.

    Example:
        >>> Words().tokenize("The Eagle's price: £20-25, isn't it?")
        ['the', 'eagle', "'s", 'price', '£', '20-25', 'is', "n't", 'it']
    """

    def tokenize(self, text: str) -> list[str]:
        """The tokens."""
        text = re.sub(r"n't\b|'(s|m|d|ll|re|ve)\b", r" \g<0>", text.lower())
        return re.findall(r"n't\b|'\w+|\w+(?:[-.,]\w+)*|[^\s\w.,:;!?\"'`()\-]", text)


def mteval(text: str) -> list[str]:
    """The tokens of mteval-v13a, in lower case."""
    return Tokenizer13a()(text).lower().split()


def counts(tokens: Tokens, n: int) -> Counter[tuple[str, ...]]:
    """How often each n-gram occurs."""
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def nist(texts: Sequence[Tokens], references: References, order: int = 5) -> float:
    """The NIST score of a corpus.

    For each n up to `order` the information of the n-grams that also occur in a reference, divided
    by the number of n-grams; the sum over n; and a penalty for texts shorter than the mean
    reference. An n-gram counts as often as in the reference where it is most frequent. Its
    information is log2(occurrences of its first n - 1 tokens / its occurrences) in all references.
    """
    seen: Counter[tuple[str, ...]] = Counter()
    for reference in (r for several in references for r in several):
        seen[()] += len(reference)
        for n in range(1, order + 1):
            seen += counts(reference, n)
    score = 0.0
    for n in range(1, order + 1):
        information, total = 0.0, 0
        for text, several in zip(texts, references, strict=True):
            own, most = counts(text, n), Counter()
            for reference in several:
                most |= counts(reference, n)
            shared = own & most
            information += sum(c * log2(seen[gram[:-1]] / seen[gram]) for gram, c in shared.items())
            total += own.total()
        score += information / total if total else 0.0
    length = sum(map(len, texts))
    mean = sum(sum(map(len, several)) / len(several) for several in references)
    ratio = min(length / mean, 1.0)
    return score * exp(log(0.5) / log(1.5) ** 2 * log(ratio) ** 2) if ratio else 0.0


def cider(
    texts: Sequence[Tokens], references: References, order: int = 4, sigma: float = 6.0
) -> float:
    """The CIDEr-D score of a corpus, from 0 to 10.

    The cosine of the tf-idf vectors of a text and a reference, with the text's clipped to the
    reference's, times exp(-(difference of their lengths)² / (2 sigma²)); averaged over references,
    n up to `order`, and texts. The idf is that of the references of all texts.
    """
    documents = Counter(
        gram
        for several in references
        for gram in {g for r in several for n in range(1, order + 1) for g in counts(r, n)}
    )
    size = log(len(references))

    def vector(tokens: Tokens, n: int) -> dict[tuple[str, ...], float]:
        idf = {gram: size - log(max(1, documents[gram])) for gram in counts(tokens, n)}
        return {gram: count * idf[gram] for gram, count in counts(tokens, n).items()}

    def similarity(text: Tokens, reference: Tokens, n: int) -> float:
        a, b = vector(text, n), vector(reference, n)
        norms = [sqrt(sum(x * x for x in v.values())) for v in (a, b)]
        if not all(norms):
            return 0.0
        dot = sum(min(a[gram], b[gram]) * b[gram] for gram in a.keys() & b.keys())
        # coco-caption measures lengths in bigrams.
        gap = max(len(text) - 1, 0) - max(len(reference) - 1, 0)
        return dot / norms[0] / norms[1] * exp(-(gap**2) / (2 * sigma**2))

    scores = [
        sum(similarity(text, r, n) for r in several for n in range(1, order + 1)) / len(several)
        for text, several in zip(texts, references, strict=True)
    ]
    return 10 * sum(scores) / order / len(scores)
