import pytest

from qwenft.data.masking import IGNORED, TurnMarks, labels_of, trained_spans

# Letters stand for tokens: "S" starts a turn, "A" names the assistant, "U" the user, "E" ends a turn.
MARKS = TurnMarks(header=("S", "A"), end="E", prompt=tuple("SAnt"))


@pytest.mark.parametrize(
    ("text", "trained"),
    [
        ("SUnxE" + "SAntyyE", ["yyE"]),
        ("SUnxESAntyyEnSUnxESAntzE", ["yyE", "zE"]),
        ("SAnyyE", ["yyE"]),
        ("SAyyE", ["yyE"]),
        ("SUnxE", []),
        ("SUnAxE", []),
        ("SAntE", ["E"]),
        ("SAntyy", ["yy"]),
        ("SAnt", [""]),
        ("SA", [""]),
        ("S", []),
        ("", []),
        ("SAntySAntzE", ["ySAntzE", "zE"]),
    ],
)
def test_spans_run_from_behind_the_prompt_to_the_end_of_the_turn(text, trained):
    """Each assistant turn is trained from where it parts from the prompt, its end included."""
    spans = trained_spans(text, MARKS)
    assert [text[first:last] for first, last in spans] == trained


def test_labels_stand_where_they_are_predicted():
    """Position t is labelled with token t + 1 where that is trained; nothing predicts the first token."""
    ids = [10, 11, 12, 13, 14]
    assert labels_of(ids, [(2, 4)]) == [IGNORED, 12, 13, IGNORED, IGNORED]
    assert labels_of(ids, [(0, 5)]) == [11, 12, 13, 14, IGNORED]
    assert labels_of(ids, [(1, 2), (4, 5)]) == [11, IGNORED, IGNORED, 14, IGNORED]
    assert labels_of(ids, []) == [IGNORED] * 5
    assert labels_of([], []) == []
