"""Rouge-L with Porter stemming, and exact match: the two scores that compare a response with its references.

The papers report Rouge-L of the `rouge-score` package (`rougeL`, F-measure, `use_stemmer=True`), the maximum over the
references. This file gives the same numbers to the last bit, with the standard library alone.

Sources:
    C.-Y. Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004, section 3 (with beta = 1)
    M. F. Porter, "An algorithm for suffix stripping", Program 14(3), 1980
    H. Hyyrö, "Bit-parallel LCS-length computation revisited", 2004 (the fast LCS)

rouge-score stems with NLTK's `PorterStemmer`, whose default is not quite Porter's paper. Where it differs:
    step 0   sixteen irregular words are looked up (dying -> die): NLTK's;
             words of one or two letters are left alone: Porter's own later rule
    step 1a  ies -> ie in words of four letters (dies -> die; the paper: di): NLTK's
    step 1b  ied -> ie in words of four letters (died -> die; the paper: di): NLTK's
    step 1c  y -> i directly after a consonant that is not the first letter (cry -> cri, enjoy -> enjoy): NLTK's;
             the paper: after any stem with a vowel (cry -> cry, enjoy -> enjoi)
    step 2   bli -> ble (the paper: abli -> able) and logi -> log: Porter's own later rules;
             the l of logi counts towards m, fulli -> ful, and there is a second pass after alli -> al: NLTK's
    *o       a stem of one vowel and one consonant is short too (using -> us -> use; the paper: us): NLTK's
Steps 3 and 4 are the paper's, and so is step 5 except for its use of *o.

>>> [stem(word) for word in ("relational", "hopping", "flies", "dying")]
['relat', 'hop', 'fli', 'die']
>>> tokenize("The cats' naïve plan, 3.5 times")
['the', 'cat', 'na', 've', 'plan', '3', '5', 'time']
>>> rouge_l("The cats are sleeping", ["the cat is sleeping", "a dog"])
0.75
>>> exact_match("paris.", ["Paris"])
True
"""

import re
import string
from functools import lru_cache

IRREGULAR = {
    "skies": "sky", "sky": "sky", "dying": "die", "lying": "lie", "tying": "tie", "news": "news",
    "innings": "inning", "inning": "inning", "outings": "outing", "outing": "outing",
    "cannings": "canning", "canning": "canning", "howe": "howe",
    "proceed": "proceed", "exceed": "exceed", "succeed": "succeed",
}  # fmt: skip

# In each table the first suffix that fits decides, even if its condition then fails. So longer ones come before the
# shorter ones that they end in (ement, ment, ent). A letter in (?<=...) is kept, and counts towards the measure.
STEP1A = {"sses": "ss", "(?<=^.)ies": "ie", "ies": "i", "ss": "ss", "s": ""}
STEP2 = {
    "ational": "ate", "tional": "tion", "enci": "ence", "anci": "ance", "izer": "ize", "bli": "ble", "entli": "ent",
    "eli": "e", "ousli": "ous", "ization": "ize", "ation": "ate", "ator": "ate", "alism": "al", "iveness": "ive",
    "fulness": "ful", "ousness": "ous", "aliti": "al", "iviti": "ive", "biliti": "ble", "fulli": "ful",
    "(?<=l)ogi": "og",
}  # fmt: skip
STEP3 = {"icate": "ic", "ative": "", "alize": "al", "iciti": "ic", "ical": "ic", "ful": "", "ness": ""}
STEP4 = dict.fromkeys(
    "al ance ence er ic able ible ant ement ment ent (?<=[st])ion ou ism ate iti ous ive ize".split(), ""
)


def letter_kinds(word: str) -> str:
    """The word with every vowel written `v` and everything else, digits too, `c`: `toy` -> `cvc`, `syzygy` -> `cvcvcv`.
    y is a vowel after a consonant."""
    kinds = ""
    for letter in word:
        vowel = letter in "aeiou" or (letter == "y" and kinds.endswith("c"))
        kinds += "v" if vowel else "c"
    return kinds


def measure(stem: str) -> int:
    """Porter's m: a word is [C](VC)^m[V], so m counts the places where a vowel is followed by a consonant."""
    return letter_kinds(stem).count("vc")


def ends_short(stem: str) -> bool:
    """Porter's *o: the stem ends consonant, vowel, consonant, the last not w, x or y (`hop`); NLTK's `us` too."""
    kinds = letter_kinds(stem)
    return kinds == "vc" or (kinds.endswith("cvc") and stem[-1] not in "wxy")


def replace_suffix(word: str, rules: dict[str, str], above: int) -> str:
    """Apply the first rule whose suffix the word has, if the part before the suffix has measure > `above`."""
    for suffix, replacement in rules.items():
        if found := re.search(f"{suffix}$", word):
            rest = word[: found.start()]
            return rest + replacement if measure(rest) > above else word
    return word


def step1b(word: str) -> str:
    """Past and participle: agreed -> agree, hopping -> hop, filing -> file."""
    if word.endswith("ied") and len(word) == 4:
        return word[:-1]  # not in the paper, which gives died -> di
    if word.endswith("eed"):
        return word[:-1] if measure(word[:-3]) > 0 else word
    rest = word[:-2] if word.endswith("ed") else word.removesuffix("ing")
    if rest == word or "v" not in letter_kinds(rest):  # bled and sing keep their ending
        return word
    # Restore the e that the ending replaced, or remove the letter that it doubled.
    if rest.endswith(("at", "bl", "iz")):
        return rest + "e"
    if rest[-1] == rest[-2:-1] and letter_kinds(rest)[-1] == "c":
        return rest if rest[-1] in "lsz" else rest[:-1]
    return rest + "e" if measure(rest) == 1 and ends_short(rest) else rest


def step1c(word: str) -> str:
    """y to i: happy -> happi. The paper wants a vowel anywhere before the y, NLTK a consonant right before it."""
    rest = word.removesuffix("y")
    return rest + "i" if rest != word and len(rest) > 1 and letter_kinds(rest)[-1] == "c" else word


def step2(word: str) -> str:
    """Double suffixes to single ones, where m > 0: relational -> relate, digitizer -> digitize."""
    if word.endswith("alli") and measure(word[:-4]) > 0:
        return step2(word[:-2])  # relationalli -> relational -> relate; the paper stops half-way
    return replace_suffix(word, STEP2, above=0)


def step5(word: str) -> str:
    """A final e and a doubled l: probate -> probat, rate -> rate, controll -> control, roll -> roll."""
    if word.endswith("e"):
        m = measure(word[:-1])
        word = word[:-1] if m > 1 or (m == 1 and not ends_short(word[:-1])) else word
    return word[:-1] if word.endswith("ll") and measure(word[:-1]) > 1 else word


@lru_cache(maxsize=1 << 17)
def stem(word: str) -> str:
    """The word, lower-cased and without its suffixes, as NLTK's `PorterStemmer().stem(word)` gives it."""
    word = word.lower()
    if word in IRREGULAR:
        return IRREGULAR[word]
    if len(word) <= 2:
        return word
    word = replace_suffix(word, STEP1A, above=-1)  # plurals: ponies -> poni, dies -> die, cats -> cat
    word = step2(step1c(step1b(word)))
    word = replace_suffix(word, STEP3, above=0)  # further suffixes: formalize -> formal, hopeful -> hope
    word = replace_suffix(word, STEP4, above=1)  # single ones: revival -> reviv, adoption -> adopt
    return step5(word)


def lcs_length(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence of `a` and `b`.

    row[j] = LCS(a[:i], b[:j]), a whole row at a time: neighbours in a row differ by 0 or 1, so each takes one bit.
    Bit j of `flat` is 0 where row[j + 1] = row[j] + 1. For the next token x of `a`, each block of ones with the zero
    above it holds one rise at that zero; if x occurs in `b` within the block, the rise moves down to the lowest such
    place. The carry of the addition does that for all blocks at once.
    """
    places: dict[str, int] = {}  # token -> the bits j with b[j] == token
    for j, y in enumerate(b):
        places[y] = places.get(y, 0) | 1 << j
    ones = (1 << len(b)) - 1
    flat = ones
    for x in a:
        hits = flat & places.get(x, 0)
        flat = ((flat + hits) | (flat - hits)) & ones  # a carry out of the last block is dropped: one more rise
    return len(b) - flat.bit_count()


def tokenize(text: str) -> list[str]:
    """Runs of a-z and 0-9 in the lower-cased text, stemmed where longer than three characters.

    Letters outside ASCII split words and are dropped, as in rouge-score: a text in Cyrillic or Chinese has no tokens.
    """
    return [stem(token) if len(token) > 3 else token for token in re.findall("[a-z0-9]+", text.lower())]


def rouge_l(prediction: str, reference: str | list[str]) -> float:
    """Rouge-L F-measure in [0, 1] (the papers print 100 times it), the maximum over the references.

    P = LCS / prediction tokens, R = LCS / reference tokens, F = 2PR / (P + R); 0 where a side has no tokens.
    """
    predicted = tokenize(prediction)
    best = 0.0
    for wanted in map(tokenize, [reference] if isinstance(reference, str) else reference):
        if common := lcs_length(predicted, wanted):
            precision, recall = common / len(predicted), common / len(wanted)
            best = max(best, 2 * precision * recall / (precision + recall))  # rouge-score's order: same rounding
    return best


def exact_match(prediction: str, reference: str | list[str]) -> bool:
    """Whether the prediction equals any reference, ignoring case, ASCII punctuation and the amount of white space."""

    def normalise(text: str) -> str:
        return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())

    return normalise(prediction) in map(normalise, [reference] if isinstance(reference, str) else reference)
