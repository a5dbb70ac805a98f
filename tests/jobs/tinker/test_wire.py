"""The wire format is the SDK's; invalid messages are refused."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from tests.jobs.tinker.small import ROWS, forward_body, part, read_output, varint
from veneer.jobs.tinker.wire import forward_bytes, read_forward, read_head, sample_bytes
from veneer.serve.request import Refused


def test_forward_request_is_read() -> None:
    body = forward_body(
        "s1:train:0", 7, ROWS, "ppo", True, {"clip_low_threshold": 0.7}, logprobs=lambda t: [0.5] * len(t)
    )
    asked = read_forward(body)
    assert (asked.model, asked.seq, asked.loss, asked.forward_only) == ("s1:train:0", 7, "ppo", True)
    assert asked.options == {"clip_low_threshold": 0.7}
    for row, found in zip(ROWS, asked.rows, strict=True):
        assert found.tokens.tolist() == row[:-1]
        assert found.inputs["target_tokens"].tolist() == row[1:]
        assert found.inputs["logprobs"].dtype == np.float32


def test_sparse_rows_are_read() -> None:
    """The format is compressed sparse rows: values, row starts, and columns."""
    values, starts, columns = np.array([7, 9], "<i8"), np.array([0, 1, 1, 2], "<i8"), np.array([2, 0], "<i8")
    sparse = part(2, part(1, values.tobytes()) + part(2, starts.tobytes()) + part(3, columns.tobytes()))
    one = sparse + b"\x18\x02" + part(4, varint(3) + varint(4))
    row = part(2, part(1, b"target_tokens") + part(2, one))
    found = read_forward(part(3, row)).rows[0].inputs["target_tokens"]
    assert found.tolist() == [[0, 0, 7, 0], [0, 0, 0, 0], [9, 0, 0, 0]]


@pytest.mark.parametrize("cut", [1, 9, 40, 41, 60])
def test_truncated_message_is_refused(cut: int) -> None:
    with pytest.raises(Refused, match="not a forward_backward request"):
        read_forward(forward_body("s1:train:0", 7, ROWS)[:cut] + b"\xff")


def test_small_message_cannot_claim_much_memory() -> None:
    """Covers sparse zeros, many rows, and a number in place of text."""

    def zeros(width: int) -> bytes:
        starts = np.zeros(2049, "<i8")
        sparse = part(2, part(2, starts.tobytes())) + b"\x18\x02" + part(4, varint(2048) + varint(width))
        return part(3, part(2, part(1, b"target_tokens") + part(2, sparse)))

    row = zeros(8192)
    assert read_forward(row).rows[0].inputs["target_tokens"].shape == (2048, 8192)
    head = read_head(part(1, b"run") + b"\x10\x05" + row)
    assert (head.model, head.seq, head.tokens, head.memory) == ("run", 5, 0, 3 * 8 * 2048 * 8192 + 512)
    for body in (20 * row, zeros(1 << 40)):
        tracemalloc.start()
        with pytest.raises(Refused, match="more than 268,435,456 bytes of tensors") as error:
            read_forward(body)
        assert (error.value.status, error.value.code) == (413, "too_large")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()
    assert read_forward(b"\x08" + varint(1 << 40)).model == ""  # protobuf ignores a field of another type


def test_message_of_many_empty_rows_is_refused() -> None:
    with pytest.raises(Refused, match="more than 262,144 fields"):
        read_forward(b"\x1a\x00" * 300_000)


def test_outputs_of_different_shapes_are_separate_records() -> None:
    rows = [np.arange(3.0), np.arange(4.0).reshape(2, 2), np.arange(2.0)]
    logps, metrics = read_output(forward_bytes(rows, 1.5))
    assert logps == [[0, 1, 2], [0, 1, 2, 3], [0, 1]]
    assert metrics == {"loss:sum": 1.5}


@pytest.mark.peers
def test_messages_match_the_sdk() -> None:
    pytest.importorskip("tinker")
    from tinker import types
    from tinker.proto import request_conv, response_conv

    rows = [
        types.Datum(
            model_input=types.ModelInput.from_ints([1, 2, 3]),
            loss_fn_inputs={"target_tokens": np.eye(3, 9, dtype=np.int64), "weights": np.eye(3, 9, dtype=np.float32)},
        )
    ]
    given = types.ForwardBackwardInput(data=rows, loss_fn="dro", loss_fn_config={"beta": 0.2})
    request = types.ForwardBackwardRequest(forward_backward_input=given, model_id="m", seq_id=300)
    asked = read_forward(request_conv.forward_backward_request_to_proto(request).SerializeToString())
    assert (asked.model, asked.seq, asked.loss, asked.options) == ("m", 300, "dro", {"beta": 0.2})
    assert np.array_equal(asked.rows[0].inputs["target_tokens"], np.eye(3, 9))
    rows = [np.arange(3.0), np.arange(4.0).reshape(2, 2)]
    made = response_conv.deserialize_forward_backward_output(forward_bytes(rows, 2.5))
    assert [each["logprobs"].to_numpy().tolist() for each in made.loss_fn_outputs] == [[0, 1, 2], [[0, 1], [2, 3]]]
    assert made.metrics == {"loss:sum": 2.5}
    sample = [(5, -0.5), (6, -1.0)], True
    told = response_conv.deserialize_sample_response(sample_bytes([sample], prompt=[None, -3.0], cached=16))
    assert told.sequences[0].tokens == [5, 6]
    assert told.sequences[0].stop_reason == "stop"
    assert told.prompt_logprobs == [None, -3.0]
    assert told.prompt_cache_hit_tokens == 16
