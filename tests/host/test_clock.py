"""Time on a device: a GPU's by its own events, waiting only when the time is asked for; and who reads it."""

from itertools import count

import pytest
import torch
from diffusers import UNet2DConditionModel

from tomesd_plus.benchmark import UNTOUCHED, Protocol, Workload, measure, overhead
from tomesd_plus.host.clock import moment, now, seconds_between
from tomesd_plus.matching import MergePlan
from tomesd_plus.merging import gate
from tomesd_plus.merging.gate import Decision, Gate

CPU = torch.device("cpu")


def test_the_clock_waits_for_the_pipelines_own_device(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    now(torch.device("cuda:1"))
    now(CPU)
    assert waited == [torch.device("cuda:1")]


def test_on_a_cpu_it_is_the_time_between(monkeypatch):
    ticks = count(1.0, 2.0)
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    assert seconds_between(moment(CPU), moment(CPU)) == 2.0


def test_on_cuda_events_in_the_devices_stream_time_it_and_nothing_waits_before_it_is_asked_for(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing=False):
            assert enable_timing

        def record(self, stream):
            self.place = len(log)
            log.append(f"record in {stream}")

        def synchronize(self):
            log.append(f"wait for {self.place}")

        def elapsed_time(self, end):
            assert log[-1] == f"wait for {end.place}"
            return 1500.0 * (end.place - self.place)  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: pytest.fail("waited"))
    device = torch.device("cuda:1")
    start = moment(device)
    log.append("work")
    end = moment(device)
    assert log == ["record in the stream of cuda:1", "work", "record in the stream of cuda:1"]
    assert seconds_between(start, end) == 3.0


class Ticking:
    """A clock that others move, and that notes which devices were asked."""

    def __init__(self):
        self.time = 0.0
        self.devices = set()

    def __call__(self, device):
        self.devices.add(device)
        return self.time


def test_the_gate_takes_medians_of_both_ways_on_the_blocks_device(tmp_path, monkeypatch):
    clock = Ticking()
    monkeypatch.setattr(gate, "moment", clock)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"the GPU {device}")
    seconds = {"whole": iter([9, 3, 2, 4]), "merged": iter([9, 1, 1, 5])}  # the first warms up

    def run(way):
        clock.time += next(seconds[way])

    device = torch.device("cuda:1")
    own = Gate(tmp_path / "gate.json")
    decision = own.decide("a kind", device, lambda: run("whole"), lambda: run("merged"))
    assert decision == Decision(untouched_ms=3000, merged_ms=1000)
    assert clock.devices == {device} and "the GPU cuda:1" in next(iter(own.decisions))


def test_a_benchmarks_times_are_of_the_unets_calls(monkeypatch):
    clock = Ticking()
    monkeypatch.setattr("tomesd_plus.host.clock.moment", clock)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # of one it is the thread's own time
    monkeypatch.setattr(
        UNet2DConditionModel, "forward", lambda *args, **options: setattr(clock, "time", clock.time + 2)
    )
    [measured] = measure(Workload("tiny", 32), [UNTOUCHED], CPU, Protocol(repeats=2, run_seconds=0))
    assert measured.seconds == [2, 2] and clock.devices == {CPU}


def test_what_is_watched_is_counted_once(monkeypatch):
    clock = Ticking()
    monkeypatch.setattr(overhead, "moment", clock)

    def unmerge(plan, x):
        clock.time += 2

    def merge(plan, x):
        clock.time += 1
        plan.unmerge(x)  # inside another: its time is the other's

    monkeypatch.setattr(MergePlan, "merge", merge)
    monkeypatch.setattr(MergePlan, "unmerge", unmerge)
    plan = MergePlan.from_inverse(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64))
    with overhead.watched(CPU) as spent:
        plan.merge(None)
        plan.unmerge(None)
    plan.merge(None)
    assert spent == {"matching": 0, "merging": 5} and clock.devices == {CPU}
