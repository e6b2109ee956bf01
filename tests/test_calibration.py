"""What int4 is calibrated on: every task and every text, drawn by a seed, begun as prompts are."""

import pytest

from calibration import calibration_sequences
from cli import UserError


class Bytes:
    """A tokenizer with one token a byte, and BOS where there is one."""

    def __init__(self, start=(1,)):
        self.start = [*start]

    def encode(self, text, bos=True):
        return self.start * bos + [*text.encode()]


BOS, PLAIN = Bytes(), Bytes(())


def drawn(texts, tokenizer, *shape, **options):
    sources = texts if isinstance(texts[0], list) else [texts]
    return [x.tolist() for x in calibration_sequences(sources, tokenizer, *shape, **options)]


def test_every_piece_begins_as_a_prompt_does_and_is_of_one_text():
    texts = ["abcdef", "", "xy", "pqrst"]
    a, x, p = (list(text.encode()) for text in ("abcdef", "xy", "pqrst"))
    whole = [[1, *a[:3]], [1, *a[3:]], [1, *p[:3]]]
    assert sorted(drawn(texts, BOS, 4, 100)) == sorted(whole)
    assert sorted(drawn(texts, PLAIN, 4, 100)) == sorted([a[:4], p[:4]])
    short = [[1, *x], [1, *p[3:]]]
    assert sorted(drawn(texts, BOS, 4, 100, keep_short=True)) == sorted(whole + short)


def test_tasks_take_turns_and_so_do_their_texts():
    one = ["aaaaaaaaaa", "bb", "cccccccc", "dd"]
    other = ["ee"]
    pieces = ["".join(map(chr, ids)) for ids in drawn([one, other], PLAIN, 2, 7)]
    assert pieces.count("ee") == 1 and "ee" in pieces[:2]
    assert {"aa", "bb", "cc", "dd"} <= set(pieces)
    assert drawn([one, other], PLAIN, 2, 2, seed=1)[1] == [ord("e")] * 2


def test_the_seed_decides_and_nothing_else_does():
    text = ["".join(chr(33 + n % 90) for n in range(400))]
    draws = [drawn(text, BOS, 9, 10, seed=seed) for seed in (0, 0, 1, 2)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2] != draws[3]
    places = sorted(text[0].index("".join(map(chr, ids[1:]))) for ids in draws[0])
    assert places[-1] > 80  # not the beginning alone


def test_no_more_texts_are_read_than_needed():
    class Counting(Bytes):
        read = 0

        def encode(self, text, bos=True):
            self.read += len(text) > 0
            return super().encode(text, bos)

    counting = Counting()
    assert len(drawn(["ab"] * 1000, counting, 2, 5)) == 5
    assert counting.read < 10


def test_texts_that_are_all_too_short_are_named():
    with pytest.raises(UserError, match="no calibration text has 8 tokens"):
        drawn(["a", "b"], BOS, 8, 10)
    with pytest.raises(UserError):
        drawn([[]], BOS, 8, 10, keep_short=True)
