import pytest

from euphonium.wire.later import Later


def test_a_value_is_waited_for_when_it_is_needed_and_once() -> None:
    waits: list[str] = []

    def wait() -> int:
        waits.append("waited")
        return 20

    answer = Later(wait)
    more = answer.map(lambda value: value + 1)
    assert waits == []
    assert (more.result(), more.result(), answer.result()) == (21, 21, 20)
    assert waits == ["waited"]


def test_what_waiting_raises_is_raised_again() -> None:
    waits: list[str] = []

    def wait() -> int:
        waits.append("waited")
        return 1 // 0

    answer = Later(wait).map(str)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            answer.result()
    assert waits == ["waited"]
