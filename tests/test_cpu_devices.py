"""How many XLA devices a run makes of a CPU where nothing is set."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny

from moextend_jax import continual, machine
from moextend_jax.configurations import load
from moextend_jax.runs.run import cpu_devices, idle_cores
from moextend_jax.settings import RunSettings, from_config_dict


def of_demo(**more: Any) -> RunSettings:
    return dataclasses.replace(from_config_dict(load("demo")), **more)


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "only_cpu", lambda: True)
    monkeypatch.setattr(machine, "cores", lambda: 4)


def test_a_small_base_gets_a_device_for_every_core_as_long_as_batches_can_be_split():
    evaluate = dataclasses.replace(of_demo().evaluate, text_batch_size=32)
    assert cpu_devices(of_demo(evaluate=evaluate)) == 4
    assert cpu_devices(of_demo()) == 2  # of 16 rows of text eight are left for each
    assert cpu_devices(of_demo(finetune=dataclasses.replace(of_demo().finetune, accumulate=8))) == 1


def test_cores_that_batches_leave_idle_are_said_with_sizes_that_would_use_them():
    plain, evaluate = of_demo(), of_demo().evaluate
    needs = "; cores left idle: 2; 4 devices need evaluate.text_batch_size = 32"
    assert idle_cores(plain, cpu_devices(plain)) == needs
    odd = of_demo(evaluate=dataclasses.replace(evaluate, text_batch_size=17, batch_size=200))
    assert cpu_devices(odd) == 1
    assert idle_cores(odd, 1) == "; cores left idle: 3; 2 devices need evaluate.text_batch_size = 18"
    more = of_demo(evaluate=dataclasses.replace(evaluate, text_batch_size=32))
    assert idle_cores(more, cpu_devices(more)) == "" == idle_cores(of_demo(cpu_devices=1), 1)


def test_devices_share_the_rows_of_each_part():
    """Of 38 rows in two parts of 19 no two devices have as many, and the run would be refused."""
    finetune = dataclasses.replace(of_demo().finetune, batch_size=38, accumulate=2)
    assert cpu_devices(of_demo(finetune=finetune)) == 1


def test_a_base_whose_products_cores_share_gets_one(tmp_path, monkeypatch: pytest.MonkeyPatch):
    tiny.write_base(tmp_path / "base")
    assert cpu_devices(of_demo(base=str(tmp_path / "base"))) == 2
    monkeypatch.setattr(
        "moextend_jax.runs.run.SMALL", tiny.BASE_CONFIG.decoder.width * tiny.BASE_CONFIG.decoder.hidden - 1
    )
    assert cpu_devices(of_demo(base=str(tmp_path / "base"))) == 1


def test_what_is_said_counts_and_an_accelerator_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    assert cpu_devices(of_demo(cpu_devices=3)) == 3
    assert cpu_devices(of_demo(mesh={"data": 1, "fsdp": -1, "expert": 1, "tensor": 1})) == 1
    assert cpu_devices(of_demo(base="a/name")) == 1
    monkeypatch.setattr(machine, "only_cpu", lambda: False)
    assert cpu_devices(of_demo()) == 1


def test_chains_beside_each_other_have_one_each(tmp_path, monkeypatch: pytest.MonkeyPatch):
    settings, seen = from_config_dict(load("continual")), []

    class Beside:
        def __init__(self, settings: RunSettings, *_: Path):
            seen.append(cpu_devices(settings))

        def end(self) -> None:
            pass

    monkeypatch.setattr(continual, "Beside", Beside)

    def run(settings: RunSettings, _):
        seen.append(cpu_devices(settings))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        continual.run_chains(settings, tmp_path, run=run)
    assert seen == [1, 1] and cpu_devices(settings) == 2
