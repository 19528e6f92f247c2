"""Metrics files survive interruption, hold valid JSON and TensorBoard events, and other tools get the same numbers."""

import json

import numpy as np
import pytest

from moextend_jax.config import MoextendError
from moextend_jax.train.metrics import MetricsWriter, read_metrics


def write(directory, steps, **options):
    with MetricsWriter(directory, **options) as writer:
        for step in steps:
            writer.write(step, {"loss": np.float32(1 / step), "tokens": 512 * step})


def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path):
    write(tmp_path / "whole", range(1, 11))
    write(tmp_path / "cut", range(1, 8))  # killed after step 7; its last checkpoint is step 5
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    write(tmp_path / "cut", range(6, 11), resume_step=5)
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_a_fresh_start_forgets_the_run_before(tmp_path):
    write(tmp_path, range(1, 5))
    write(tmp_path, range(1, 3))
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_lines_are_strict_json_even_when_the_loss_is_not_a_number(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": float("nan"), "grad_norm": float("inf"), "tokens": 3})
    line = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row == {"step": 1, "loss": None, "grad_norm": None, "tokens": 3}


def test_lines_can_be_read_while_the_run_goes_on(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 2.0})
        assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]


def test_tensorboard_has_the_scalars(tmp_path):
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue] (made at run time)
    from tensorboardX.record_writer import masked_crc32c

    write(tmp_path, [1, 2])
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, scalars = path.read_bytes(), {}
    while data:  # records: length, its checksum, the event, its checksum
        length = int.from_bytes(data[:8], "little")
        body = data[12 : 12 + length]
        assert int.from_bytes(data[12 + length : 16 + length], "little") == masked_crc32c(body)
        event = Event.FromString(body)
        scalars |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        data = data[16 + length :]
    assert scalars == {("loss", 1): 1.0, ("loss", 2): 0.5, ("tokens", 1): 512.0, ("tokens", 2): 1024.0}


def test_only_process_0_writes(tmp_path):
    write(tmp_path / "run", [1], process_index=1)
    assert not (tmp_path / "run").exists()


def test_a_broken_file_is_named_with_its_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"loss": 2}\n')
    with pytest.raises(MoextendError, match=r"metrics\.jsonl:2: not a line of metrics"):
        read_metrics(tmp_path / "metrics.jsonl")
