"""What is read of the machine: files are planted, programs are made up."""

from __future__ import annotations

import subprocess

import pytest

from distillabse import cores
from distillabse.cores import cpus_for
from distillabse.evaluation import gpu, machine
from distillabse.evaluation.engines import CudaClock
from distillabse.evaluation.machine import EnergyMeter, signs_of_debugging


def plant(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{text}\n")


@pytest.fixture
def power(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "POWER_CAPPING", tmp_path)
    for number in (0, 1):
        plant(tmp_path / f"intel-rapl:{number}" / "max_energy_range_uj", 1_000_000)
        plant(tmp_path / f"intel-rapl:{number}" / "energy_uj", 900_000)
    plant(tmp_path / "intel-rapl:0:0" / "energy_uj", 5)  # a part of package 0, counted there
    return tmp_path


def test_energy_of_all_packages_across_a_counter_that_starts_again(power):
    meter = EnergyMeter()
    before = meter.counters()
    plant(power / "intel-rapl:0" / "energy_uj", 950_000)  # 0.05 J
    plant(power / "intel-rapl:1" / "energy_uj", 200_000)  # from 0.9 over 1.0 to 0.2: 0.3 J
    assert meter.unavailable is None
    assert before == [900_000, 900_000]
    assert meter.joules(before, meter.counters()) == pytest.approx(0.35)


def test_energy_that_cannot_be_read_says_why(power, tmp_path, monkeypatch):
    (power / "intel-rapl:1" / "energy_uj").unlink()
    assert "chmod a+r" in EnergyMeter().unavailable
    monkeypatch.setattr(machine, "POWER_CAPPING", tmp_path / "nowhere")
    assert "lists no package" in EnergyMeter().unavailable
    assert EnergyMeter().counters() == []


def test_counters_of_throttling(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CPUS", tmp_path / "cpu")
    monkeypatch.setattr(machine, "CPU_STATISTICS", tmp_path / "stat")
    monkeypatch.setattr(machine, "CGROUP_STATISTICS", tmp_path / "cpu.stat")
    monkeypatch.setattr(machine.os, "sysconf", lambda name: 100)
    nothing = machine.throttling()
    assert nothing[1:] == (None, None, None)
    plant(tmp_path / "cpu/cpu0/thermal_throttle/core_throttle_count", 3)
    plant(tmp_path / "cpu/cpu1/thermal_throttle/package_throttle_count", 4)
    plant(tmp_path / "cpu/cpu1/cpufreq/scaling_governor", "powersave")
    plant(tmp_path / "stat", "cpu  1 2 3 4 5 6 7 250 9 10\ncpu0 0 0 0 0 0 0 0 0 0 0")
    plant(tmp_path / "cpu.stat", "usage_usec 9\nnr_throttled 2\nthrottled_usec 1500000")
    assert machine.throttling()[1:] == (7, 2.5, 1.5)
    assert machine.governors() == ["powersave"]


def test_the_reference_is_the_fastest_of_its_runs():
    times = iter([0, 5, 10, 12, *range(20, 20 + 26)])  # 5, then 2, then thirteen times 1
    assert machine.reference_seconds(lambda: next(times)) == 1


RELEASE = {"environment": {}, "dev_mode": False, "debug_python": False, "debug_torch": False,
           "onnxruntime_build": "ORT Build Info: git-branch=main, build type=Release"}  # fmt: skip


def test_release_builds_show_no_sign_of_debugging():
    assert signs_of_debugging(**RELEASE) == []
    assert signs_of_debugging(**{**RELEASE, "environment": {"LD_PRELOAD": "/usr/lib/libjemalloc.so.2"}}) == []
    assert signs_of_debugging(**{**RELEASE, "environment": {"CUDA_LAUNCH_BLOCKING": "0"}}) == []


@pytest.mark.parametrize(
    ("planted", "sign"),
    [
        ({"debug_python": True}, "Python is a debug build"),
        ({"dev_mode": True}, "development mode"),
        ({"debug_torch": True}, "PyTorch is a debug build"),
        ({"onnxruntime_build": "git-commit-id=1, build type=Debug"}, "ONNX Runtime is a debug build"),
        ({"environment": {"PYTHONDEVMODE": "1"}, "dev_mode": True}, "PYTHONDEVMODE=1"),
        ({"environment": {"PYTHONMALLOC": "debug"}}, "PYTHONMALLOC=debug"),
        ({"environment": {"CUDA_LAUNCH_BLOCKING": "1"}}, "CUDA_LAUNCH_BLOCKING=1"),
        ({"environment": {"LD_PRELOAD": "/usr/lib/libasan.so.8"}}, "LD_PRELOAD=/usr/lib/libasan.so.8"),
    ],
)
def test_every_sign_of_debugging(planted, sign):
    found = signs_of_debugging(**{**RELEASE, **planted})
    assert len(found) == 1 and sign in found[0]


def test_this_installation_is_read_without_an_error():
    assert isinstance(machine.debug_signs(), list)


def test_threads_are_pinned_to_physical_cores_first(tmp_path, monkeypatch):
    monkeypatch.setattr(cores, "CPU_TOPOLOGY", tmp_path)
    monkeypatch.setattr(cores, "_allowed_cpus", lambda: [0, 1, 2, 3])
    for cpu, siblings in enumerate(("0-1", "0-1", "2-3", "2-3")):
        plant(tmp_path / f"cpu{cpu}/topology/thread_siblings_list", siblings)
    assert [cpus_for(threads) for threads in (1, 2, 3, 4, 9)] == [[0], [0, 2], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3]]
    monkeypatch.setattr(cores, "_allowed_cpus", list)
    assert cpus_for(2) == []


SMI = """NVIDIA H100, 570.1, P0, 1980, 2619, 1980, 54, 310.5, 0x0000000000000000
NVIDIA H100, 570.1, P8, 345, 2619, 1980, 33, [N/A], 0x0000000000000044
"""


def test_the_state_of_gpus_is_read_from_nvidia_smi():
    asked = []

    def run(command):
        asked.append(command)
        return SMI

    state = gpu.gpu_state(run)
    assert asked[0][0] == "nvidia-smi" and "--format=csv,noheader,nounits" in asked[0]
    assert "clocks_throttle_reasons.active" in asked[0][1]
    assert (state[0]["power_state"], state[0]["sm_clock_mhz"], state[0]["power_watts"]) == ("P0", 1980, 310.5)
    assert (state[1]["temperature_celsius"], state[1]["power_watts"]) == (33, None)
    assert gpu.held_back_by(state[:1]) == []
    assert gpu.held_back_by(state) == ["hardware thermal slowdown", "software power cap"]


def test_without_nvidia_smi_there_is_nothing_to_say():
    def missing(command):
        raise FileNotFoundError(command[0])

    def failing(command):
        raise subprocess.CalledProcessError(9, command)

    assert gpu.gpu_state(missing) is None and gpu.gpu_state(failing) is None
    assert gpu.held_back_by(None) == []
    assert gpu.memory_of_process(7, missing) is None


def test_gpu_memory_of_one_process():
    listed = "17, 300\n7, 1024\n7, 512\n"
    assert gpu.memory_of_process(7, lambda command: listed) == 1536 * 2**20
    assert gpu.memory_of_process(8, lambda command: listed) is None


def test_the_gpu_clock_waits_for_events_and_adds_up_what_lies_between():
    done = []

    class Event:
        moments = iter([0.0, 1.5, 1.75, 10.0])

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.moment = next(self.moments)

        def synchronize(self):
            done.append(self.moment)

        def elapsed_time(self, later):
            return later.moment - self.moment  # milliseconds

    clock = CudaClock(Event)
    assert [clock(), clock(), clock()] == [1_500_000, 1_750_000, 10_000_000]
    assert done == [0.0, 1.5, 1.75, 10.0]
