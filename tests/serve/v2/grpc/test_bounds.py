from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb

from serve.request.problems import TOO_LARGE, Problem
from serve.v2 import grpc_messages as messages
from serve.v2.grpc_messages import MAX_FIELDS, MAX_NUMBER_BYTES, walk

REQUEST = pb.ModelInferRequest.DESCRIPTOR


def numbers(count, kind="uint_contents", value=1):
    tensor = {"name": "images", "contents": {kind: [value] * count}}
    return pb.ModelInferRequest(inputs=[tensor]).SerializeToString()


@pytest.mark.parametrize(
    "message",
    [
        pb.ModelInferRequest(raw_input_contents=[b"x"] * (MAX_FIELDS - 1)),
        pb.ModelInferRequest(inputs=[{"contents": {"bytes_contents": [b""] * (MAX_FIELDS - 3)}}]),
        pb.ModelInferRequest(inputs=[{"shape": range(-500, 500)}]),
        pb.ModelInferRequest(raw_input_contents=[bytes(20 * 2**20)]),
        pb.ModelInferRequest(parameters={"x": {"double_param": 0.5}, "y": {"bool_param": True}}),
    ],
)
def test_what_a_request_may_hold_passes(message):
    walk(message.SerializeToString(), REQUEST)


@pytest.mark.parametrize("kind", ["uint_contents", "int64_contents", "bool_contents"])
def test_numbers_are_counted_by_their_bytes(kind):
    walk(numbers(MAX_NUMBER_BYTES, kind), REQUEST)
    with pytest.raises(Problem, match="send pixels in raw_input_contents") as caught:
        walk(numbers(MAX_NUMBER_BYTES + 1, kind), REQUEST)
    assert caught.value.kind is TOO_LARGE


@pytest.mark.parametrize(
    "message",
    [
        pb.ModelInferRequest(raw_input_contents=[b""] * (MAX_FIELDS + 1)),
        pb.ModelInferRequest(inputs=[{}] * (MAX_FIELDS + 1)),
        pb.ModelInferRequest(outputs=[{}] * (MAX_FIELDS + 1)),
        pb.ModelInferRequest(inputs=[{"contents": {"bytes_contents": [b""] * MAX_FIELDS}}]),
        pb.ModelInferRequest(parameters={str(index): {} for index in range(MAX_FIELDS)}),
        pb.ModelInferRequest(inputs=[{"parameters": {str(index): {} for index in range(MAX_FIELDS)}}]),
    ],
)
def test_more_fields_than_any_request_has_are_refused(message):
    with pytest.raises(Problem, match="more than 4,096 fields") as caught:
        walk(message.SerializeToString(), REQUEST)
    assert caught.value.kind is TOO_LARGE


@pytest.mark.parametrize(
    ("message", "detail"),
    [
        (b"\x0a", "no number at byte 1"),
        (b"\x0a\x05abcd", "ends at byte 7 of 6"),
        (b"\x2a\x02\x0a\x01\x0a\0", "ends at byte 3 of 2"),  # longer than what holds it
        (b"\x80" * 20, "no number at byte 0"),
        (b"\x0b", "a field of kind 3"),
        (b"\x09\0\0\0", "ends at byte 9 of 4"),
        (b"\0\0", "a field has the number 0"),
    ],
)
def test_what_is_no_message_raises_its_reason(message, detail):
    with pytest.raises(ValueError, match=detail):
        walk(message, REQUEST)


@given(st.binary(max_size=64))
def test_any_bytes_end_in_words(message):
    with suppress(ValueError, Problem):
        walk(message, REQUEST)


@given(
    st.builds(
        pb.ModelInferRequest,
        model_name=st.text(max_size=5),
        raw_input_contents=st.lists(st.binary(max_size=300), max_size=3),
        inputs=st.lists(
            st.fixed_dictionaries(
                {
                    "shape": st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4),
                    "contents": st.fixed_dictionaries(
                        {"uint_contents": st.lists(st.integers(0, 2**32 - 1), max_size=9)}
                    ),
                }
            ),
            max_size=3,
        ),
    )
)
def test_what_the_library_writes_is_walked_to_its_end(message):
    walk(message.SerializeToString(), REQUEST)


def test_short_messages_are_not_walked():
    message = b"\x0b" * messages.SHORT_BYTES
    with pytest.raises(Problem, match="Error parsing message"):
        messages.parse(message, pb.ModelInferRequest)
    with pytest.raises(Problem, match="a field of kind 3"):
        messages.parse(message + b"\x0b", pb.ModelInferRequest)
