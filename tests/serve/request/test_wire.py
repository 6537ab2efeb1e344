"""How much of a body is read, and by whom."""

import asyncio
import gc
import threading

import pytest
from starlette.testclient import TestClient

from serve.request.app import make_app
from serve.request.body import LONG_JSON_BYTES, MAX_JSON_LISTS, MAX_JSON_VALUES, load_json, parse_body
from serve.request.limits import Limits
from serve.request.problems import TOO_LARGE, Problem

LONG = bytes(LONG_JSON_BYTES + 1)


@pytest.mark.slow
def test_json_of_as_many_values_as_allowed_is_read():
    assert len(load_json(b"[%b0]" % (b"0," * (MAX_JSON_VALUES - 2)))) == MAX_JSON_VALUES - 1
    assert len(load_json(b"[%b[]]" % (b"[]," * (MAX_JSON_LISTS - 2)))) == MAX_JSON_LISTS - 1


@pytest.mark.parametrize(
    "document",
    [
        b"[%b0]" % (b"0," * MAX_JSON_VALUES),
        b"[%b[]]" % (b"[]," * MAX_JSON_LISTS),
        b"[%b{}]" % (b"{}," * MAX_JSON_LISTS),
    ],
)
def test_json_of_more_values_is_refused_unread(document, monkeypatch):
    monkeypatch.setattr("serve.request.body.orjson.loads", None)
    with pytest.raises(Problem, match=r"the JSON has .* values, .* send less at once") as refused:
        load_json(document)
    assert refused.value.kind == TOO_LARGE


def test_many_values_are_refused_wherever_json_is_taken(runtime):
    headers = {"Content-Type": "application/json"}
    with TestClient(make_app(runtime, Limits())) as client:
        name = client.get("/model").json()["name"]
        for path, member in (("/predict", b"images"), (f"/v2/models/{name}/infer", b"inputs")):
            few, many = (
                client.post(path, content=b'{"%b":[%b[]]}' % (member, b"[]," * num_lists), headers=headers)
                for num_lists in (3000, MAX_JSON_LISTS)
            )
            assert "the JSON has" not in few.json()["detail"]
            assert "the JSON has 262,14" in many.json()["detail"]
            assert (many.status_code, many.json()["type"]) == (413, TOO_LARGE.type)


def test_long_bodies_are_read_one_at_a_time_even_if_the_first_is_given_up():
    first_is_in, go_on, order = threading.Event(), threading.Event(), []

    def first(body):
        first_is_in.set()
        assert go_on.wait(60)
        order.append("first")

    async def scenario():
        given_up = asyncio.create_task(parse_body(first, LONG))
        await asyncio.to_thread(first_is_in.wait, 60)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        second = asyncio.create_task(parse_body(lambda body: order.append("second"), LONG))
        await asyncio.sleep(0)
        assert await parse_body(len, b"short") == 5  # waits for nobody
        assert not second.done()
        go_on.set()
        await second

    asyncio.run(scenario())
    assert order == ["first", "second"]


@pytest.fixture
def body_type():
    """A type of bodies that says when one is freed; without the garbage collector."""

    class Body(bytes):
        freed = False

        def __del__(self):
            Body.freed = True

    gc.disable()
    yield Body
    gc.enable()


def test_a_body_that_cannot_be_read_is_not_kept(body_type):
    def refuse(body):
        raise ValueError("no")

    async def scenario():
        with pytest.raises(ValueError, match="no"):
            await parse_body(refuse, body_type(LONG))

    asyncio.run(scenario())
    assert body_type.freed


def test_a_body_that_is_given_up_while_another_is_read_is_not_kept(body_type):
    first_is_in, go_on = threading.Event(), threading.Event()

    def first(body):
        first_is_in.set()
        assert go_on.wait(60)

    async def scenario():
        under_way = asyncio.create_task(parse_body(first, LONG))
        await asyncio.to_thread(first_is_in.wait, 60)
        given_up = asyncio.create_task(parse_body(len, body_type(LONG)))
        await asyncio.sleep(0)
        assert not body_type.freed
        given_up.cancel()
        await asyncio.wait([given_up])
        del given_up
        await asyncio.sleep(0)
        assert body_type.freed
        go_on.set()
        await under_way

    asyncio.run(scenario())
