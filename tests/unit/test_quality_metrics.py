"""Scores and intervals of the quality benchmark, worked by hand."""

import pytest
from quality.intervals import bootstrap, mean_interval, paired_difference, wilson
from quality.metrics import METRICS, parse_number, token_agreement

TREC = ("City", "State", "City", "Capital City", "Date")

# (metric, prediction, answers, score)
WORKED = [
    ("contains_all", "The codes are 12345 and 67890.", ("12345", "67890"), 1),
    ("contains_all", "The codes are 12345 and 67891.", ("12345", "67890"), 1 / 2),
    ("contains_all", "PARIS, I think", ("paris",), 1),
    ("contains_all", "", ("12345",), 0),
    ("contains_any", "It was Oslo.", ("Lima", "oslo"), 1),
    ("contains_any", "It was Bergen.", ("Lima", "Oslo"), 0),
    ("number", "25 + 14 = 39", ("39",), 1),
    ("number", "The answer is 39.", ("39",), 1),
    ("number", "39 is the answer to 25 + 14", ("39",), 0),
    ("number", "12*3=<<12*3=36>>36. #### 36 apples, not 40", ("36",), 1),
    ("number", "so $1,250.50 in all", ("1250.5",), 1),
    ("number", "it takes 5, then 7,", ("7",), 1),
    ("number", "-4", ("4",), 0),
    ("number", "3-4", ("4",), 1),
    ("number", "39\nQuestion: 12 + 30 = ? Answer: 42", ("39",), 1),
    ("number", "no idea", ("39",), 0),
    ("number", "", ("39",), 0),
    ("instructions_followed", "Zebra, I saw Oslo by train", ("begin:zebra", "end:train"), 1),
    ("instructions_followed", "A zebra by train in Oslo.", ("begin:zebra", "mention:Oslo"), 1 / 2),
    ("instructions_followed", "Oslo!", ("begin:oslo", "end:Oslo", "mention:Lima"), 2 / 3),
    ("instructions_followed", "Oslonian", ("mention:Oslo",), 0),
    ("instructions_followed", "", ("begin:zebra", "end:train"), 0),
    # Two words in common of three and two once the article is gone.
    ("f1", "The red big house!", ("a red house",), 2 * 2 / (3 + 2)),
    ("f1", "red red", ("red",), 2 * 1 / (2 + 1)),
    ("f1", "blue", ("red", "Blue."), 1),
    ("f1", "", ("red",), 0),
    # "the cat sat" is the longest common subsequence: 3 of 4 words and of 6.
    ("rouge_l", "the cat quietly sat", ("the black cat sat down now",), 2 * 3 / (4 + 6)),
    ("rouge_l", "sat cat the", ("the cat sat",), 2 * 1 / (3 + 3)),
    ("rouge_l", "nothing", ("the cat",), 0),
    ("rouge_l", "", ("the cat",), 0),
    ("classification", "State", TREC[1:2] + TREC[1:], 1),
    ("classification", "State or Date", TREC[1:2] + TREC[1:], 1 / 2),
    ("classification", "Date", TREC[1:2] + TREC[1:], 0),
    ("classification", "Capital City", ("Capital City", *TREC[1:]), 1),
    ("classification", "Capital City", TREC, 1 / 2),
    ("first_line_classification", "\nState\nType: Date", TREC[1:2] + TREC[1:], 1),
    ("first_line_number", " 4 + 5 = 9\nQuestion: 1 + 2", ("9",), 1),
    ("first_line_f1", "\n\nred\nQuestion: blue", ("red",), 1),
    ("first_line_rouge_l", "the cat\nthe dog", ("the cat",), 1),
    ("count", "There are 7 of them, 7 I say, or 8", ("7",), 2 / 3),
    ("count", "many", ("7",), 0),
    ("retrieval", "Paragraph 12", ("Paragraph 12",), 1),
    ("retrieval", "Paragraph 1 or 12", ("Paragraph 12",), 1 / 2),
    ("retrieval", "the first", ("Paragraph 12",), 0),
    ("code_similarity", "```python\n# add\nx = 1\ny = 2", ("x = 1",), 1),
    # "ab" in both: 2 * 2 of 3 + 3 characters.
    ("code_similarity", "abx", ("aby",), 2 * 2 / 6),
    ("code_similarity", "# only a comment", ("x = 1",), 0),
]


@pytest.mark.parametrize(("metric", "prediction", "answers", "score"), WORKED)
def test_worked_by_hand(metric, prediction, answers, score):
    assert METRICS[metric](prediction, answers) == pytest.approx(score)


def test_every_metric_is_worked():
    assert {metric for metric, *_ in WORKED} == set(METRICS)


@pytest.mark.parametrize(("text", "value"), [("1,250", 1250), ("-3.5", -3.5), (" 7 ", 7)])
def test_parse_number(text, value):
    assert parse_number(text) == value


@pytest.mark.parametrize(
    ("ids", "full_ids", "agreement"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 1),
        ([1, 2, 9, 4], [1, 2, 3, 4], 1 / 2),
        ([9, 2, 3, 4], [1, 2, 3, 4], 0),
        ([1, 2], [1, 2, 3, 4], 1 / 2),
        ([1, 2, 3, 4, 5], [1, 2, 3, 4], 1),
        ([], [1], 0),
        ([], [], 1),
    ],
)
def test_token_agreement(ids, full_ids, agreement):
    assert token_agreement(ids, full_ids) == agreement


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Newcombe 1998, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 1 - 0.1611, 1.0),
    ],
)
def test_wilson_against_published_values(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=6e-5)


def test_wilson_holds_the_share():
    for n in range(1, 60):
        for successes in range(n + 1):
            low, high = wilson(successes, n)
            assert 0 <= low <= successes / n <= high <= 1


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses(successes, n):
    with pytest.raises(ValueError, match=f"{successes} of {n}"):
        wilson(successes, n)


def test_bootstrap():
    # The mean of 400 draws from 0 and 1/2 in equal parts has a standard error of 1/4 / 20.
    values = [0.0, 0.5] * 200
    low, high = bootstrap(values)
    assert low == pytest.approx(0.25 - 1.96 / 80, abs=0.003)
    assert high == pytest.approx(0.25 + 1.96 / 80, abs=0.003)
    assert bootstrap(values) == (low, high)
    assert bootstrap(values, seed=1) != (low, high)
    assert bootstrap([0.3] * 5) == pytest.approx((0.3, 0.3))
    with pytest.raises(ValueError, match="no values"):
        bootstrap([])


def test_mean_interval_takes_wilson_for_zeros_and_ones():
    assert mean_interval([1.0, 0.0, 1.0]) == wilson(2, 3)
    assert mean_interval([1.0, 0.5, 1.0]) == bootstrap([1.0, 0.5, 1.0])


def test_paired_difference_is_over_the_same_samples():
    # Samples differ a lot, the methods by the same little on each: only a paired interval sees it.
    first = [i / 20 + 0.02 for i in range(20)]
    second = [i / 20 for i in range(20)]
    assert paired_difference(first, second) == pytest.approx((0.02, 0.02))
    assert paired_difference(second, first) == pytest.approx((-0.02, -0.02))
    low, high = paired_difference([1.0, 0.0] * 10, [0.0, 1.0] * 10)
    assert low < 0 < high
    with pytest.raises(ValueError):
        paired_difference([1.0], [1.0, 0.0])
