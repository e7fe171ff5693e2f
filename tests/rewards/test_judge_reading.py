"""From a judge's answers to numbers: what can't be read is missing, never 0."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowtilt.errors import UserError
from flowtilt.prompts import Prompt
from flowtilt.rewards.judge import reading
from flowtilt.rewards.judge.questions import Question, questions_of
from flowtilt.rewards.judge.reading import Answer, tokens


def first(**tokens: float) -> Answer:
    return Answer("", tuple((token, math.log(share)) for token, share in tokens.items()))


def test_yes_is_the_share_of_yes_among_yes_and_no_in_all_their_forms():
    assert reading.yes(first(Yes=0.5, yes=0.1, NO=0.2, The=0.2)) == pytest.approx(0.75)
    assert reading.yes(Answer("", ((" Yes", math.log(0.3)), ("▁no", math.log(0.1))))) == pytest.approx(0.75)
    assert reading.yes(first(Yes=0.9)) == 1
    assert math.isnan(reading.yes(first(The=0.99, Yes=0.004, No=0.004)))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Yes", 1),
        ("**No.**", 0),
        ("yes, it does", 1),
        ("<think>no, no</think>\nYes", 1),
        ("Ja", None),
        ("はい", None),
        ("There is no dog", None),
        ("I can't answer that", None),
        ("", None),
    ],
)
def test_without_log_probabilities_the_first_word_counts(text, value):
    assert reading.yes(Answer(text)) == pytest.approx(math.nan if value is None else value, nan_ok=True)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("7.5", 7.5),
        ("7,5", 7.5),
        ("**8**", 8),
        ("8/10", 8),
        ("8 out of 10.", 8),
        ("Score: 6", 6),
        ("I see 2 dogs. Final score: 4", 4),
        ("The rating is **3**", 3),
        ("<think>9?</think>5", 5),
        ("７", 7),
        ("I give it a 9", 9),
        ("-1", None),
        ("11", None),
        ("two of 3 or 4", None),
        ("nine", None),
        ("", None),
        ("1e999", None),
        ("10000000000000000000000000", None),
    ],
)
def test_a_number_is_read_where_there_is_one_within_the_range(text, value):
    assert reading.number(Answer(text), 0, 10) == pytest.approx(math.nan if value is None else value, nan_ok=True)


@given(st.text())
def test_no_text_breaks_a_reader(text):
    assert math.isnan(found := reading.number(Answer(text), 0, 10)) or 0 <= found <= 10
    for value in (reading.yes(Answer(text)), reading.first_is_better(Answer(text)), reading.one_of(Answer(text), ("Yes",))):
        assert math.isnan(value) or 0 <= value <= 1


def test_a_preference_is_read_from_the_digits():
    assert reading.first_is_better(Answer("", (("1", math.log(0.5)), ("2", math.log(0.25)), ("0", math.log(0.25))))) == pytest.approx(0.625)
    assert [reading.first_is_better(Answer(text)) for text in ("1", "Picture 2", "0")] == [1, 0, 0.5]
    assert math.isnan(reading.first_is_better(Answer("1 or 2"))) and math.isnan(reading.first_is_better(Answer("both")))


def test_a_right_answer_counts_each_token_once_and_is_never_0():
    forms = ("two", "Two", "2", " two")
    assert reading.one_of(first(two=0.5, Two=0.2, three=0.1), forms) == pytest.approx(0.7)
    assert reading.one_of(first(three=0.9, four=0.01), forms) == pytest.approx(0.01)
    assert [reading.one_of(Answer(text), forms) for text in ("two", "Two.", "three")] == [1, 1, 0]
    assert math.isnan(reading.one_of(Answer("There are two dogs"), forms))


def test_win_rates_swap_the_order_away_and_leave_out_what_is_missing():
    always_first = {(i, j): 1.0 for i in range(3) for j in range(3) if i != j}
    assert reading.win_rates(always_first, 3) == [0.5, 0.5, 0.5]
    best_is_0 = {(i, j): float(i < j) for i in range(3) for j in range(3) if i != j}
    assert reading.win_rates(best_is_0, 3) == [1.0, 0.5, 0.0]
    torn = best_is_0 | {(0, 1): math.nan}
    assert reading.win_rates(torn, 3) == [1.0, 1.0, 0.0]
    assert all(map(math.isnan, reading.win_rates({(0, 1): 1.0, (1, 0): math.nan}, 2)))


@given(st.dictionaries(st.tuples(st.integers(0, 4), st.integers(0, 4)), st.floats(0, 1)))
def test_complete_win_rates_are_half_on_average(some):
    preferences = {(i, j): some.get((i, j), 0.3) for i in range(5) for j in range(5) if i != j}
    assert sum(reading.win_rates(preferences, 5)) == pytest.approx(2.5)


def test_means_of_atoms_are_missing_where_one_is():
    assert reading.arithmetic([0.5, 1.0]) == 0.75 and reading.geometric([0.25, 1.0]) == pytest.approx(0.5)
    assert reading.geometric([0.0, 1.0]) == 0
    for mean in (reading.arithmetic, reading.geometric):
        assert math.isnan(mean([0.0, math.nan])) and math.isnan(mean([]))


def test_questions_come_from_a_prompts_line():
    assert questions_of(Prompt("x", metadata={"questions": ["Is it red?", ["How many dogs?", "two"]]})) == [
        Question("Is it red?"),
        Question("How many dogs?", "two"),
    ]
    assert questions_of(Prompt("x", metadata={"vqa_list": [["Is it red?", "Yes"]], "skills": ["attribute"]}))[0].skill == "attribute"
    assert questions_of(Prompt("x")) == []


@pytest.mark.parametrize("entry", ["Is it red?", [[1, 2]], [["a", "b", "c"]], [[]], [""], {"a": 1}], ids=str)
def test_questions_of_another_form_are_refused_with_their_line(entry):
    with pytest.raises(UserError, match=r"prompts mine.jsonl:3: questions.* want a list of questions"):
        questions_of(Prompt("x", metadata={"questions": entry}, where="mine.jsonl:3"))


def test_what_is_no_log_probability_is_left_out():
    whole = [("yes", -0.5), ("no", float("nan")), ("a", 3.0), (7, -1.0), ("b", float("-inf")), ("certain", 1e-6)]
    assert tokens(whole) == (("yes", -0.5), ("b", -math.inf), ("certain", 0.0))
    for nothing in ([("yes", 10**400)], [("yes", "x")], [("yes",)], 5, None, [], "yes"):
        assert tokens(nothing) is None
