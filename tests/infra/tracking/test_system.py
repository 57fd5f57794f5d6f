"""Figures of the machine agree with what the system says otherwise, under the names that MLflow's page knows."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

import pytest

from infra.tracking.system import Counters, SystemMetrics, gpus, machine, read_gpus


def test_a_busy_process_is_told_as_busy() -> None:
    before, began = Counters.now(), time.process_time()
    while time.process_time() - began < 0.2:
        pass
    told = Counters.now().since(before)
    assert 20 < told["process_cpu_percentage"] <= 100 * os.cpu_count()
    assert 0 <= told["cpu_utilization_percentage"] <= 100


def test_shares_and_megabytes_are_of_the_time_between(tmp_path: Path) -> None:
    def written(user: int, idle: int, received: int, sent: int) -> Counters:
        (tmp_path / "net").mkdir(exist_ok=True)
        (tmp_path / "stat").write_text(f"cpu  {user} 0 0 {idle} 0 0 0 0 99 99\ncpu0 1 2 3\n")
        lines = f"a\nb\n    lo: 7 {'0 ' * 15}\n  eth0: {received} {'0 ' * 7}{sent} {'0 ' * 7}\n"
        (tmp_path / "net" / "dev").write_text(lines)
        return Counters.now(tmp_path)

    told = written(400, 1300, 5_000_000, 9_000_000).since(written(100, 1200, 2_000_000, 1_000_000))
    assert told["cpu_utilization_percentage"] == 75
    assert (told["network_receive_megabytes"], told["network_transmit_megabytes"]) == (3, 8)


def test_the_memory_of_this_process_is_what_the_kernel_says() -> None:
    told = machine()
    assert 0 < told["process_memory_megabytes"] <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6 + 1
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e6
    share = told["system_memory_usage_megabytes"] / pages * 100
    assert told["system_memory_usage_percentage"] == pytest.approx(share, rel=0.02)


def test_gpus_are_read_from_what_nvidia_smi_prints() -> None:
    told = read_gpus("0, 87, 40960, 81559, 412.55, 700.00\n3, 5, 512, 81559, [N/A], [N/A]\n")
    assert told["gpu_0_utilization_percentage"] == 87
    assert told["gpu_0_memory_usage_megabytes"] == pytest.approx(42949.67)
    assert told["gpu_0_memory_usage_percentage"] == pytest.approx(50.22, abs=0.01)
    assert told["gpu_0_power_usage_percentage"] == pytest.approx(58.94, abs=0.01)
    assert {name for name in told if name.startswith("gpu_3")} == {
        "gpu_3_utilization_percentage",
        "gpu_3_memory_usage_megabytes",
        "gpu_3_memory_usage_percentage",
    }


def test_a_machine_without_the_tool_has_no_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus() == {}


def test_figures_are_given_once_and_none_after_the_end() -> None:
    vitals = SystemMetrics(0.02)
    until = time.monotonic() + 10
    while not (told := vitals.new()):
        assert time.monotonic() < until
        time.sleep(0.005)
    vitals.close()
    assert {"cpu_utilization_percentage", "disk_usage_percentage", "process_cpu_percentage"} <= set(told)
    time.sleep(0.1)
    vitals.new()
    time.sleep(0.1)
    assert vitals.new() == {}
    assert SystemMetrics(0).new() == {}
