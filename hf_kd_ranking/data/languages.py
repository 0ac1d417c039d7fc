"""The languages of texts, recognised by py3langid from a sample."""

from collections import Counter

import numpy as np

from .texts import TextStore

SAMPLE = 200  # texts, of 0.1 ms each
_SNOWBALL = """
    ar arabic, ca catalan, cs czech, da danish, de german, el greek, en english, eo esperanto, es spanish, et estonian,
    eu basque, fa persian, fi finnish, fr french, ga irish, hi hindi, hu hungarian, hy armenian, id indonesian,
    it italian, lt lithuanian, nb norwegian, ne nepali, nl dutch, nn norwegian, no norwegian, pl polish, pt portuguese,
    ro romanian, ru russian, sr serbian, sv swedish, ta tamil, tr turkish
"""
# Codes of ISO 639-1 -> languages that Snowball has a stemmer for.
SNOWBALL = dict(pair.split() for pair in _SNOWBALL.split(","))
LEAST_SHARE = 0.1  # of the sample; a short text is now and then taken for another language


def detect_languages(texts: TextStore) -> list[str]:
    """Return the languages (ISO 639-1) of at least a tenth of the texts, the most frequent first.

    About 200 texts are read, evenly spaced; those without a letter have no language.
    """
    import py3langid  # loads its model, in a second, when it is first used

    counts = Counter()
    for text in texts.take(np.arange(0, len(texts), max(1, len(texts) // SAMPLE))):
        if any(character.isalpha() for character in text):
            counts[py3langid.classify(text)[0]] += 1
    languages = []
    for language, count in counts.most_common():
        if count >= LEAST_SHARE * counts.total():
            languages.append(language)
    return languages
