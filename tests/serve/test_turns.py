import threading

from serve.turns import Budget, Turns


def test_the_earliest_due_comes_first_and_equal_ones_as_they_came():
    turns = Turns()
    for due, owner in ((3, "c"), (1, "a"), (2, "b"), (1, "a, too")):
        turns.put(due, owner, 0)
    turns.end()
    assert [turns.get() for _ in range(5)] == [("a", 0), ("a, too", 0), ("b", 0), ("c", 0), None]


def test_what_is_dropped_has_no_turn():
    turns, gone, here = Turns(), object(), object()
    for part in range(3):
        turns.put(0, gone, part)
        turns.put(1, here, part)
    turns.drop(gone)
    turns.end()
    assert [turns.get() for _ in range(4)] == [(here, 0), (here, 1), (here, 2), None]


def test_a_budget_lets_in_what_fits():
    budget, entered, order = Budget(10), threading.Event(), []

    def take_the_rest():
        entered.set()
        with budget.taken(6):
            order.append("second")

    with budget.taken(5):
        thread = threading.Thread(target=take_the_rest)
        thread.start()
        assert entered.wait(60)
        with budget.taken(5):
            order.append("first")
    thread.join(60)
    assert order == ["first", "second"]
