from qwenft.testing import conversations


def test_conversations_become_alternating_turns_of_two_people():
    """Consecutive texts of one speaker are joined, and who speaks first is the user."""
    turns = [
        [{"text": "Hi", "sender": "a"}, {"text": "there", "sender": "a"}],
        [{"text": "Hello!", "sender": "b"}],
        [{"text": "  ", "sender": "b"}, {"text": "Bye", "sender": "a"}],
    ]
    assert conversations._messages(turns) == [
        {"role": "user", "content": "Hi there"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
    ]


def test_the_real_conversations_alternate():
    """Every conversation of the package becomes turns that begin with the user and alternate."""
    found = conversations.chitchat_messages()
    assert len(found) > 4000
    for messages in found:
        roles = [message["role"] for message in messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2)


def test_long_conversations_are_cut_between_exchanges():
    """No turn is lost or cut but a last one without an answer."""
    messages = [
        {"role": role, "content": f"{number} {'x' * 200}"} for number in range(7) for role in ("user", "assistant")
    ]
    cut = conversations.pieces(messages)
    assert len(cut) > 1
    assert [message for piece in cut for message in piece] == messages
    assert all(piece[0]["role"] == "user" and piece[-1]["role"] == "assistant" for piece in cut)
