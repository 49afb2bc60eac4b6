"""align.py: what tokens spell, which of them align, how vocabularies correspond, and cross-model attention."""

import itertools
import math
import random
import tracemalloc
import unicodedata

import numpy as np
import pytest
import torch
from helpers import SENTENCES, Largest, byte_level, sentencepiece, wordpiece
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from align import (
    BYTE_LEVEL,
    Deviations,
    ResponseTokens,
    align_by_programme,
    align_by_sweep,
    cross_model_attention,
    deviations,
    exact_token_alignment,
    prediction_map,
    teacher_moments,
    token_bytes,
    vocabulary_overlap,
)
from projector import Projectors

UNSEEN = [
    "A fox at the café; ça va? Übung macht Größe.",
    "上京は中国語で何ですか。",
    " two leading spaces… and 🦊🦊 unseen ones",
    "\n\tindented = [1, 2, 3]\n",
    "قطة वर्षा naïve résumé",
    "",
    " ",
]


# ---------------------------------------------------------------------------------------------------------------------
# Helpers: plain definitions to compare with


def pairs_of(result):
    teacher_index, student_index = result
    assert teacher_index.dtype == student_index.dtype == np.int64
    return list(zip(teacher_index.tolist(), student_index.tolist(), strict=True))


def aligned(teacher, student):
    return pairs_of(exact_token_alignment(teacher, student))


def symbols(tokens):
    return [s for token in tokens for s in ([256] if token is None else token)]


def pairs_by_spans(teacher, student):
    """Every pair of equal tokens with the same span, one leading space of the side that has more of them left out."""
    spaces = [len(list(itertools.takewhile(lambda s: s == 32, symbols(side)))) for side in (teacher, student)]
    spans = []
    for side, own, other in zip((teacher, student), spaces, spaces[::-1], strict=True):
        ends = np.cumsum([0] + [len(symbols([token])) for token in side])
        ends = np.maximum(ends - (own > other), 0).tolist()
        spans.append(list(zip(ends, ends[1:], strict=False)))
    same = [(i, j) for i, (a, b) in enumerate(spans[0]) for j, c in enumerate(spans[1]) if (a, b) == c and a < b]
    return [(i, j) for i, j in same if teacher[i] == student[j]]


def cut_randomly(data, rng, probability):
    """`data` (bytes) in pieces, cut anywhere, also inside a character."""
    inner = [i for i in range(1, len(data)) if rng.random() < probability]
    return [data[a:b] for a, b in zip([0, *inner], [*inner, len(data)], strict=True) if a < b]


def spelt(tokenizer, text):
    """The tokens of a text as bytes, with end-of-text."""
    table = token_bytes(tokenizer)
    return [table[i] for i in tokenizer.encode(text, add_special_tokens=False).ids] + [None]


# ---------------------------------------------------------------------------------------------------------------------
# Canonical bytes


def test_byte_table_is_the_inverse_of_the_librarys():
    assert sorted(BYTE_LEVEL.values()) == list(range(256))
    assert set(BYTE_LEVEL) == set(pre_tokenizers.ByteLevel.alphabet())
    table = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for code in [*range(0x800), *range(0x800, 0xD800, 61), *range(0xE000, 0x110000, 4099)]:
        written = table.pre_tokenize_str(chr(code))[0][0]
        assert bytes(BYTE_LEVEL[c] for c in written) == chr(code).encode()


def test_token_bytes_byte_level():
    vocabulary = {c: i for i, c in enumerate(sorted(BYTE_LEVEL))}
    vocabulary |= {"Ġthe": 300, "Ã©": 301, "Ċĉ": 302, "北": 303, "<0x41>": 304}
    tokenizer = byte_level(vocabulary)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.add_tokens(["<tool é>", AddedToken("\n\n\n", normalized=False)])
    spelt = token_bytes(tokenizer)
    assert [spelt[vocabulary[c]] for c in BYTE_LEVEL] == [bytes([b]) for b in BYTE_LEVEL.values()]
    assert spelt[300:305] == [b" the", "é".encode(), b"\n\t", "北".encode(), b"<0x41>"]
    holes = set(range(305)) - set(tokenizer.get_vocab().values())
    assert len(holes) > 40 and all(spelt[i] is None for i in holes)
    assert spelt[tokenizer.token_to_id("<|endoftext|>")] is None
    assert spelt[tokenizer.token_to_id("<tool é>")] == "<tool é>".encode()
    assert spelt[tokenizer.token_to_id("\n\n\n")] == b"\n\n\n"
    assert len(spelt) == max(tokenizer.get_vocab().values()) + 1


def test_token_bytes_sentencepiece():
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "▁a▁b": 4, "<0xE9>": 5, "<0x0a>": 6, "é": 7, "Ġ": 8,
                  "<0x1>": 9, "x<0x41>": 10, "<0x41>x": 11}  # fmt: skip
    tokenizer = sentencepiece(vocabulary, unk_token="<unk>", byte_fallback=True)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("▁▁plain", "▁▁▁")])  # 2: as Gemma's spaces
    expected = [None, None, None, b" ", b" a b", b"\xe9", b"\n", "é".encode(), "Ġ".encode(), b"<0x1>", b"x<0x41>"]
    assert token_bytes(tokenizer) == [*expected, b"<0x41>x", "▁▁plain".encode(), b"   "]


def test_an_added_token_spells_the_space_that_a_normaliser_puts_into_it():
    """So what `add_tokens("<tool>")` makes of Llama 2's: "a<tool>" does not have that token, "a <tool>" does."""
    tokenizer = sentencepiece({piece: i for i, piece in enumerate(["▁", "a", "<", "t", "o", "l", ">"])})
    tokenizer.add_tokens(["<tool>"])
    for text in ("a <tool>a", "<tool> <tool>", "a<tool>", "a  <tool>"):
        assert b"".join(spelt(tokenizer, text)[:-1]).decode() == " " + text


@pytest.mark.parametrize(
    "model",
    [
        models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>"),
        models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0),
    ],
    ids=["BPE", "Unigram"],
)
def test_unknown_token_spells_nothing_even_if_not_special(model):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    assert token_bytes(tokenizer) == [None, b"a"]


def test_every_token_of_a_text_spells_its_part_of_it(trained):
    for name in ("byte-level", "sentencepiece"):
        for text in [*SENTENCES, *UNSEEN]:
            joined = b"".join(spelt(trained[name], text)[:-1])
            assert joined == (" " * (name == "sentencepiece" and text != "") + text).encode()


def test_other_tokenizers_are_refused():
    with pytest.raises(ValueError, match="model WordPiece, decoder WordPiece.*byte-level BPE and SentencePiece"):
        token_bytes(wordpiece())
    with pytest.raises(ValueError, match="model BPE"):
        token_bytes(byte_level({"a</w>": 0, "a": 1}, end_of_word_suffix="</w>"))
    with pytest.raises(ValueError, match="model WordLevel, decoder None"):
        token_bytes(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))


# ---------------------------------------------------------------------------------------------------------------------
# Exact token alignment: by hand

E_ACUTE, PIZZA = "é".encode(), "🍕".encode()
HAND = {
    "one token is two of the other": ([b"ab", b"c", None], [b"a", b"b", b"c", None], [(1, 2), (2, 3)]),
    "accent": ([b"caf", E_ACUTE, b" noir", None], [b"ca", b"f", E_ACUTE, b" noir", None], [(1, 2), (2, 3), (3, 4)]),
    "accent split in bytes": ([b"a", b"\xc3", b"\xa9", b"b"], [b"a", E_ACUTE, b"b"], [(0, 0), (3, 2)]),
    "emoji split differently": (
        [b"I", b" ", *(bytes([b]) for b in PIZZA), b" x", None],
        [b"I", b" " + PIZZA[:2], PIZZA[2:3], PIZZA[3:], b" x", None],
        [(0, 0), (4, 2), (5, 3), (6, 4), (7, 5)],
    ),
    "dummy prefix, teacher's": ([b" The", b" cat", None], [b"The", b" cat", None], [(1, 1), (2, 2)]),
    "dummy prefix a token of its own": ([b" ", "北".encode(), None], ["北".encode(), None], [(1, 0), (2, 1)]),
    "dummy prefix before a real space": ([b"  The", None], [b" The", None], [(1, 1)]),
    "dummy prefix before end-of-text": ([b" ", None], [None], [(1, 0)]),
    "spaces of different width": ([b"   ", b"x"], [b" ", b"x"], [(1, 1)]),
    "end-of-text in the middle": (
        [b"a", None, b"bc", None],
        [b"a", None, b"b", b"c", None],
        [(0, 0), (1, 1), (3, 4)],
    ),
    "end-of-text is no character": ([b"a", None, b"b"], [b"ab", None], [(1, 1)]),
    "end-of-text on one side": ([b"a", b"bc", None], [b"a", b"bc"], [(0, 0), (1, 1)]),
    "nothing in common": ([b"a", b"b"], [b"x", b"y"], []),
    "empty": ([], [], []),
    "empty teacher": ([], [b"a", None], []),
}


CHANGED = {  # one side's tokenizer changed the text
    "NFC and NFD": (
        [b"Le", b" caf", E_ACUTE, b" noir", None],
        [b"Le", b" caf", b"e", b"\xcc\x81", b" noir", None],
        [(0, 0), (1, 1), (3, 4), (4, 5)],
    ),
    "lower-casing": (
        [b"The", b" Cat", b" sat", b" Down", None],
        [b"the", b" c", b"at", b" sat", b" down", None],
        [(2, 3), (4, 5)],
    ),
    "NFKC, cut differently": (["ﬁ".encode(), b"ne", b" wine", None], [b"fine", b" wine", None], [(2, 1), (3, 2)]),
    "white space cleaned up": (
        [b"a", b"  ", b"b", b"\n\n", b"c", None],
        [b"a", b" ", b"b", b" ", b"c", None],
        [(0, 0), (2, 2), (4, 4), (5, 5)],
    ),
    "unknown character": ([b"a", None, b"b", None], [b"a", b"\xe5", b"\x8c", b"b", None], [(0, 0), (2, 3), (3, 4)]),
    "fewer edits before more matches": ([b"abc", b"d"], [b"d", b"ab", b"c"], []),  # abc in place, not the moved d
    "more matches at equal edits": ([b"ab", b"x"], [b"a", b"b", b"y", b"ab"], [(0, 3)]),
}


@pytest.mark.parametrize("name", [*HAND, *CHANGED])
def test_alignment_by_hand(name):
    teacher, student, expected = {**HAND, **CHANGED}[name]
    copies = list(teacher), list(student)
    assert aligned(teacher, student) == expected
    assert aligned(student, teacher) == [(j, i) for i, j in expected]
    assert (teacher, student) == copies  # the arguments are left alone


# ---------------------------------------------------------------------------------------------------------------------
# Exact token alignment: properties


def random_sides(rng):
    """One random text, perhaps with end-of-text inside, cut twice."""
    characters = "aab  \n\té北🙂क"
    probability = rng.choice([0.1, 0.3, 0.6]), rng.choice([0.1, 0.3, 0.6])
    sides = [], []
    for part in range(rng.choice([1, 1, 1, 2, 3])):
        data = "".join(rng.choice(characters) for _ in range(rng.randrange(12))).encode()
        for side, p in zip(sides, probability, strict=True):
            side += [None] * (part > 0) + cut_randomly(data, rng, p)
            if rng.random() < 0.05:
                side.append(b"")
    for side in sides if rng.random() < 0.7 else ():
        side.append(None)
    return sides


def test_sweep_and_programme_are_the_span_coincidences():
    rng, total = random.Random(0), 0
    for _ in range(1500):
        teacher, student = random_sides(rng)
        expected = pairs_by_spans(teacher, student)
        assert pairs_of(align_by_sweep(teacher, student)) == expected
        assert pairs_of(align_by_programme(teacher, student)) == expected
        if rng.random() < 0.3:  # a dummy prefix on one side
            side = rng.choice([teacher, student])
            side.insert(0, b" ") if rng.random() < 0.5 or not side or side[0] is None else side.__setitem__(
                0, b" " + side[0]
            )
        pairs = aligned(teacher, student)
        assert pairs == pairs_by_spans(teacher, student)
        assert all(a < c and b < d for (a, b), (c, d) in itertools.pairwise(pairs))
        total += len(pairs)
    assert total > 2500


@pytest.mark.parametrize("spaces", [(0, 0), (1, 0), (0, 1)])
def test_equal_texts_need_no_table(spaces):
    """The programme's would have 9 million cells here; the sweep must do, also behind a dummy prefix."""
    rng, text = random.Random(0), bytes(random.Random(1).choices(b"abc ", k=3000))
    teacher, student = ([*cut_randomly(b" " * n + b"x" + text, rng, 0.3), None] for n in spaces)
    tracemalloc.start()
    pairs = aligned(teacher, student)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert pairs == pairs_by_spans(teacher, student) and peak < 1_000_000


def common_length(a, b):
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        new = [0]
        for j, y in enumerate(b):
            new.append(row[j] + 1 if x == y else max(new[j], row[j + 1]))
        row = new
    return row[-1]


def edits(teacher, student, pairs):
    """Deletions and insertions that are needed if just these pairs of tokens are matched."""
    total = 0
    for (i, j), (k, m) in itertools.pairwise([(-1, -1), *pairs, (len(teacher), len(student))]):
        a, b = symbols(teacher[i + 1 : k]), symbols(student[j + 1 : m])
        total += len(a) + len(b) - 2 * common_length(a, b)
    return total


def every_matching(teacher, student, i=0, j=0):
    """All increasing lists of pairs of equal tokens from (i, j) on."""
    yield []
    for k in range(i, len(teacher)):
        for m in range(j, len(student)):
            if teacher[k] == student[m] and teacher[k] != b"":
                for rest in every_matching(teacher, student, k + 1, m + 1):
                    yield [(k, m), *rest]


def test_programme_is_optimal():
    """Fewest edits first, then most matches, against all matchings there are."""
    rng, differing = random.Random(2), 0
    choices = [b"a", b"a", b"b", b"ab", b"ba", b"aab", b"", None]
    for _ in range(1500):
        teacher, student = ([rng.choice(choices) for _ in range(rng.randrange(6))] for _ in range(2))
        found = pairs_of(align_by_programme(teacher, student))
        assert all(teacher[i] == student[j] for i, j in found)
        best = min((edits(teacher, student, p), -len(p)) for p in every_matching(teacher, student))
        assert (edits(teacher, student, found), -len(found)) == best
        differing += best[0] > 0 and best[1] < 0
    assert differing > 500


@pytest.mark.parametrize("pair", list(itertools.permutations(["sentencepiece", "byte-level", "nfc"], 2)), ids="-".join)
def test_trained_tokenizers_align_where_spans_coincide(trained, pair):
    teacher, student = (trained[name] for name in pair)
    inside = 0
    for text in [*SENTENCES, *UNSEEN]:
        text = unicodedata.normalize("NFC", text)
        ours, theirs = spelt(teacher, text), spelt(student, text)
        pairs = aligned(ours, theirs)
        assert pairs == pairs_by_spans(ours, theirs)
        assert pairs[-1] == (len(ours) - 1, len(theirs) - 1)
        inside += len(pairs) - 1
    assert inside > 100


# ---------------------------------------------------------------------------------------------------------------------
# Vocabularies


@pytest.fixture(scope="module")
def small_vocabularies():
    """A SentencePiece vocabulary where 3 and 5 both spell "A", and a byte-level one; both know "same" as special."""
    teacher = sentencepiece(
        {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x41>": 3, "<0x42>": 4, "A": 5, "▁the": 6, "é": 7, "<0xC3>": 8, "only": 9,
         "same": 10, "mine": 11, "": 12},
        unk_token="<unk>", byte_fallback=True,
    )  # fmt: skip
    teacher.add_special_tokens(["<unk>", "<s>", "</s>", "same"])
    student = ["<|endoftext|>", "é", "Ġthe", "Ã©", "B", "Ã", "", "A", "same", "mine"]
    student = byte_level({token: index for index, token in enumerate(student)})
    student.add_special_tokens(["<|endoftext|>", "same", "mine"])
    return teacher, student


def test_vocabulary_overlap_by_hand(small_vocabularies):
    teacher, student = small_vocabularies
    teacher_ids, student_ids = vocabulary_overlap(teacher, student)
    # the byte-level "é" is the byte E9 and no counterpart of the text "é"; "mine" is special in the student; the empty
    # tokens say nothing
    assert student_ids.tolist() == [2, 3, 4, 5, 7]
    assert teacher_ids.tolist() == [6, 7, 4, 8, 5]
    assert teacher_ids.dtype == student_ids.dtype == np.int64
    there, here = vocabulary_overlap(student, teacher)
    assert dict(zip(here.tolist(), there.tolist(), strict=True)) == {6: 2, 7: 3, 4: 4, 8: 5, 5: 7}
    assert here.tolist() == [4, 5, 6, 7, 8]


def test_vocabulary_overlap_may_be_empty():
    teacher_ids, student_ids = vocabulary_overlap(byte_level({"a": 0}), byte_level({"b": 0}))
    assert teacher_ids.shape == student_ids.shape == (0,)


def test_vocabulary_overlap_where_ids_are_unused():
    assert pairs_of(vocabulary_overlap(byte_level({"a": 1, "b": 5}), byte_level({"b": 3}))) == [(5, 3)]


def test_prediction_map_by_hand(small_vocabularies):
    teacher, student = small_vocabularies
    expected = [-1, -1, 0, 7, 4, 7, 2, 3, 5, -1, -1, -1, -1]  # 3 and 5 both mean "A"; 2 is end-of-text
    mapped = prediction_map(teacher, student, teacher_eos=2, student_eos=0, size=16)
    assert mapped.tolist() == expected + [-1] * 3 and mapped.dtype == np.int64
    assert prediction_map(teacher, student, 2, 0, size=13).tolist() == expected
    assert prediction_map(teacher, student, 2, 0, size=6).tolist() == expected[:6]  # a head smaller than its tokenizer
    # the student's "A" is the one that is not a byte token, even where that has the smaller id
    without = [-1 if i == 2 else token for i, token in enumerate(expected)]
    assert prediction_map(teacher, student, None, 0, size=13).tolist() == without  # and not all to the student's end
    back = prediction_map(student, teacher, teacher_eos=0, student_eos=2, size=10)
    assert back.tolist() == [2, -1, 6, 7, 4, 8, -1, 5, -1, -1]


@pytest.mark.parametrize("pair", list(itertools.permutations(["sentencepiece", "byte-level"])), ids="-".join)
def test_a_teacher_that_is_right_gives_gold_labels(trained, pair):
    """What the teacher's token of a pair is in the student's vocabulary is the student's token of that pair; also at
    the start of a response, where one of them has a dummy prefix."""
    teacher, student = (trained[name] for name in pair)
    eos = [next(i for i, token in enumerate(token_bytes(t)) if token is None) for t in (teacher, student)]
    mapped = prediction_map(teacher, student, *eos, size=teacher.get_vocab_size())
    found = 0
    for text in [*SENTENCES, *UNSEEN, "the", "fox"]:
        ids = [t.encode(text, add_special_tokens=False).ids for t in (teacher, student)]
        pairs = [(i, j) for i, j in aligned(spelt(teacher, text), spelt(student, text)) if i < len(ids[0])]
        assert all(mapped[ids[0][i]] == ids[1][j] for i, j in pairs)
        found += len(pairs)
    assert found > 100


def test_an_end_of_text_that_is_not_marked_as_special_is_no_text():
    """As in vocabularies where it is a token like any other: it takes no part, but for the map of predictions."""
    teacher = sentencepiece({"<unk>": 0, "</s>": 1, "a": 2, "<end>": 3}, unk_token="<unk>")
    student = byte_level({"</s>": 0, "a": 1, "<end>": 2})
    for teacher_eos, student_eos, overlap, mapped in (
        (1, 0, [(2, 1), (3, 2)], [-1, 0, 1, 2]),
        (1, 2, [(2, 1)], [-1, 2, 1, -1]),  # the student's "</s>" is text, and the teacher's "<end>"
        (3, 2, [(1, 0), (2, 1)], [-1, 0, 1, 2]),
    ):
        assert pairs_of(vocabulary_overlap(teacher, student, teacher_eos, student_eos)) == overlap
        assert prediction_map(teacher, student, teacher_eos, student_eos, size=4).tolist() == mapped
    assert pairs_of(vocabulary_overlap(teacher, student)) == [(1, 0), (2, 1), (3, 2)]


# ---------------------------------------------------------------------------------------------------------------------
# Cross-model attention

WIDTHS, STD = (3, 4), Deviations(key=1.5, label=0.7, hidden=2.5)  # d, D


def attention(lengths, dtype=torch.float64, scale=1.0):
    """Random tokens of examples with these (student, teacher) lengths, and v1's projectors, the query `scale` times."""
    torch.manual_seed(0)
    sides = []
    for rows, width in zip(zip(*lengths, strict=True), WIDTHS, strict=True):
        inputs, labels = torch.randint(11, (2, sum(rows)))
        embed, hidden = (torch.randn(size, width, dtype=torch.float64).to(dtype) for size in (11, sum(rows)))
        sides.append(ResponseTokens(inputs, labels, list(rows), embed.requires_grad_(), hidden.requires_grad_()))
    projectors = Projectors(*(torch.empty(11, width) for width in WIDTHS), recipe="v1", query=True).to(dtype)
    with torch.no_grad():
        projectors.query.weight *= scale
    return *sides, projectors


def gradients_of_attention(student, teacher, projectors, autocast=False):
    """Of a loss that weighs all that comes out, by name; of the student's states and embeddings too."""
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = cross_model_attention(student, teacher, projectors, STD)
    sum((x * torch.randn(x.shape)).sum() for x in found).backward()
    named = {"student": student.hidden, "embed": student.embed, "teacher_embed": teacher.embed}
    return found, {name: p.grad for name, p in [*projectors.named_parameters(), *named.items()]}


def test_attention_by_loops():
    lengths = [(2, 3), (3, 1), (1, 4)]
    student, teacher, projectors = attention(lengths)
    t2s, s2t = cross_model_attention(student, teacher, projectors, STD)
    n0 = m0 = 0
    for n, m in lengths:
        ours, theirs = range(n0, n0 + n), range(m0, m0 + m)
        query = {i: projectors.query(torch.cat([student.embed[ids[i]] for ids in student[:2]])) for i in ours}
        key = {j: torch.cat([teacher.embed[ids[j]] for ids in teacher[:2]]) / STD.key for j in theirs}
        value = {j: projectors.t2s(teacher.hidden[j] / STD.hidden + teacher.embed[teacher.labels[j]] / STD.label)
                 for j in theirs}  # fmt: skip
        powers = {(i, j): (query[i] @ key[j] / math.sqrt(2 * WIDTHS[1])).exp() for i in ours for j in theirs}
        for i in ours:
            expected = sum(powers[i, j] * value[j] for j in theirs) / sum(powers[i, j] for j in theirs)
            torch.testing.assert_close(t2s[i], expected)
        for j in theirs:
            expected = sum(powers[i, j] * projectors.s2t(student.hidden[i]) for i in ours)
            torch.testing.assert_close(s2t[j], expected / sum(powers[i, j] for i in ours))
        n0, m0 = n0 + n, m0 + m
    assert t2s.shape == (n0, 3) and s2t.shape == (m0, 4)


def test_attention_teaches_the_projectors_and_the_student_but_no_embedding():
    _, gradients = gradients_of_attention(*attention([(2, 3), (3, 2)]))
    assert {name for name, gradient in gradients.items() if gradient is None} == {"embed", "teacher_embed"}
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values() if gradient is not None)


def test_examples_do_not_see_each_other():
    """Not even in the last bit; and an example that one side, or both, has no response of takes no part."""
    lengths = [(2, 3), (0, 2), (3, 1), (4, 0), (0, 0), (1, 2)]
    student, teacher, projectors = attention(lengths)
    t2s, s2t = cross_model_attention(student, teacher, projectors, STD)
    n0 = m0 = 0
    for n, m in lengths:
        alone = [ResponseTokens(*(x[at : at + size] for x in side[:2]), [size], side.embed, side.hidden[at : at + size])
                 for side, at, size in ((student, n0, n), (teacher, m0, m))]  # fmt: skip
        found = cross_model_attention(*alone, projectors, STD)
        torch.testing.assert_close(found, (t2s[n0 : n0 + n], s2t[m0 : m0 + m]), rtol=1e-12, atol=1e-12)
        n0, m0 = n0 + n, m0 + m
    assert not t2s[5:9].any()  # there is no teacher to hear
    with torch.no_grad():
        student.hidden[:2] += 9
        teacher.hidden[:3] -= 9
    changed = cross_model_attention(student, teacher, projectors, STD)
    assert torch.equal(changed[0][2:], t2s[2:]) and torch.equal(changed[1][3:], s2t[3:])
    assert not torch.isclose(changed[0][:2], t2s[:2]).any() and not torch.isclose(changed[1][:3], s2t[:3]).any()
    nothing = attention([(0, 0)])
    std = deviations(teacher_moments(nothing[1]))
    assert [x.shape for x in cross_model_attention(*nothing, std)] == [(0, 3), (0, 4)]


@pytest.mark.parametrize("scale", [1, 10])
def test_attention_is_in_float32_whatever_autocast_says(scale):
    lengths = [(12, 15), (9, 7)]
    expected, gradients = gradients_of_attention(*attention(lengths, torch.float32, scale))
    found, of_autocast = gradients_of_attention(*attention(lengths, torch.float32, scale), autocast=True)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for name in ("query.weight", "t2s.weight", "s2t.weight", "student"):
        assert of_autocast[name].dtype == torch.float32
        assert (of_autocast[name] - gradients[name]).norm() < 1e-5 * gradients[name].norm(), name


def test_attention_takes_states_and_embeddings_in_bf16():
    """As they come out of bf16 models, with the numbers that they have."""
    student, teacher, projectors = attention([(4, 5), (3, 2)], torch.float32)
    half = [side._replace(embed=side.embed.bfloat16(), hidden=side.hidden.bfloat16()) for side in (student, teacher)]
    exact = [side._replace(embed=side.embed.float(), hidden=side.hidden.float()) for side in half]
    with torch.autocast("cpu", torch.bfloat16):
        found = cross_model_attention(*half, projectors, STD)
    expected = cross_model_attention(*exact, projectors, STD)
    assert all(x.dtype == torch.float32 for x in found)
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(teacher_moments(half[1]), teacher_moments(exact[1]), rtol=1e-9, atol=0)


def test_no_scores_of_a_whole_batch():
    """The largest tensor has a row per token, forward and backward: 20 examples of 9 and 10 have 36,000 scores."""
    with Largest() as largest:
        gradients_of_attention(*attention([(9, 10)] * 20))
    assert largest.elements == 200 * 2 * WIDTHS[1]


def test_standard_deviations_over_all_parts_of_an_update():
    _, teacher, _ = attention([(1, 5), (1, 3)])
    inputs, labels = teacher.embed[teacher.inputs], teacher.embed[teacher.labels]
    parts = [ResponseTokens(teacher.inputs[at], teacher.labels[at], [], teacher.embed, teacher.hidden[at])
             for at in (slice(0, 5), slice(5, None))]  # fmt: skip
    with torch.no_grad():
        moments = [sum(column) for column in zip(*map(teacher_moments, parts), strict=True)]
    expected = [torch.cat([inputs, labels]).std(), labels.std(), teacher.hidden.std()]
    assert deviations(moments) == pytest.approx([x.item() for x in expected], rel=1e-12)
