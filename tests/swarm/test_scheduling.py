"""Decisions of the scheduler: small cases by hand, and rules that hold whatever happens."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_layershuffle.swarm.policy import Policy
from hf_layershuffle.swarm.scheduling import Failed, Finished, Scheduler, Start, TimedOut


def scheduler_of(layers, workers, **policy):
    """A scheduler with workers by name, each with its layers."""
    scheduler = Scheduler(range(layers), Policy(**policy))
    for name, held in workers.items():
        scheduler.add_worker(name, held)
    return scheduler


def visits(decisions):
    return [decision.visit for decision in decisions if isinstance(decision, Start)]


def run_all(scheduler, now=0.0, seconds=1.0):
    """Lets every visit take as long, until nothing is left to do; what was decided."""
    decided, running = [], []
    while True:
        new = scheduler.decide(now)
        decided += new
        running += visits(new)
        if not running:
            return decided
        now += seconds
        for visit in running:
            scheduler.arrived(visit, now)
        running = []


def test_strict_requests_take_the_layers_in_order():
    scheduler = scheduler_of(3, {"a": [2, 0], "b": [1]}, name="strict")
    scheduler.accept("x", 0.0)
    *started, finished = run_all(scheduler)
    assert [(visit.layer, visit.worker, visit.position) for visit in visits(started)] == [
        (0, "a", 0),
        (1, "b", 1),
        (2, "a", 2),
    ]
    assert finished.order == [0, 1, 2] and finished.skipped == {}
    assert [seconds for _, seconds in finished.visits] == [1.0, 1.0, 1.0]


def test_strict_requests_follow_another_order_of_the_layers():
    scheduler = Scheduler([2, 0], Policy(name="strict"))
    scheduler.add_worker("a", [0, 1, 2])
    scheduler.accept("x", 0.0)
    assert run_all(scheduler)[-1].order == [2, 0]


def test_a_free_request_takes_the_worker_that_is_free():
    scheduler = scheduler_of(3, {"a": [0], "b": [1], "c": [2]})
    for name in "xyz":
        scheduler.accept(name, 0.0)
    assert sorted((visit.request, visit.layer) for visit in visits(scheduler.decide(0.0))) == [
        ("x", 0),
        ("y", 1),
        ("z", 2),
    ]


def test_the_oldest_request_comes_first():
    scheduler = scheduler_of(1, {"a": [0]})
    for name in ("old", "young"):
        scheduler.accept(name, 0.0)
    (visit,) = visits(scheduler.decide(0.0))
    assert visit.request == "old" and scheduler.num_waiting == 1
    scheduler.accept("youngest", 0.5)
    scheduler.arrived(visit, 1.0)
    assert [visit.request for visit in visits(scheduler.decide(1.0))] == ["young"]


def test_an_older_request_comes_before_the_one_that_its_worker_just_served():
    scheduler = scheduler_of(2, {"a": [0, 1]})
    for name in ("old", "young"):
        scheduler.accept(name, 0.0)
    served = [visit.request for visit in visits(run_all(scheduler))]
    assert served == ["old", "old", "young", "young"]


def test_of_two_free_workers_the_one_with_the_first_missing_layer_is_taken():
    scheduler = scheduler_of(2, {"b": [1], "a": [0]})
    scheduler.decide(0.0)
    scheduler.accept("x", 0.0)
    assert [visit.layer for visit in visits(scheduler.decide(0.0))] == [0]


def test_of_two_free_replicas_the_one_is_taken_that_is_idle_for_longer():
    scheduler = scheduler_of(1, {"a": [0], "b": [0]})
    for name, expected in (("x", "a"), ("y", "b"), ("z", "a")):
        scheduler.accept(name, 0.0)
        assert [visit.worker for visit in visits(run_all(scheduler))] == [expected]


def test_a_layer_that_nobody_holds_is_skipped_when_nothing_else_is_left():
    scheduler = scheduler_of(3, {"a": [0, 1], "b": [2]}, max_skips=1)
    scheduler.accept("x", 0.0)
    scheduler.remove_worker("b", "b died")
    finished = run_all(scheduler)[-1]
    assert finished.order == [0, 1] and finished.skipped == {2: "b died"}


def test_the_visit_of_a_worker_that_is_gone_comes_back():
    scheduler = scheduler_of(2, {"a": [0], "b": [1], "c": [0]})
    scheduler.accept("x", 0.0)
    (visit,) = visits(scheduler.decide(0.0))
    assert scheduler.remove_worker(visit.worker, "died") == [visit]
    finished = run_all(scheduler)[-1]
    assert sorted(finished.order) == [0, 1] and visit.worker not in {each.worker for each, _ in finished.visits}
    assert scheduler.remove_worker(visit.worker, "died") == []


def test_a_request_waits_for_what_it_may_not_skip_and_fails_after_max_wait():
    scheduler = scheduler_of(2, {"a": [0]}, max_wait=5.0)
    scheduler.accept("x", 0.0)
    scheduler.accept("y", 0.0)
    assert not [each for each in run_all(scheduler) if not isinstance(each, Start)]
    assert scheduler.next_check() is not None and 5.0 <= scheduler.next_check() <= 8.0
    failed = scheduler.decide(10.0)
    assert [(each.request, each.missing, each.deadline) for each in failed] == [
        ("x", {1: "no worker holds it"}, False),
        ("y", {1: "no worker holds it"}, False),
    ]
    assert scheduler.num_in_flight == 0 and scheduler.next_check() is None


def test_a_worker_that_comes_back_ends_the_wait():
    scheduler = scheduler_of(2, {"a": [0]}, max_wait=5.0)
    scheduler.accept("x", 0.0)
    run_all(scheduler)
    scheduler.add_worker("b", [1])
    (finished,) = [each for each in run_all(scheduler, 4.0) if isinstance(each, Finished)]
    assert finished.order == [0, 1]
    scheduler.accept("y", 9.0)  # the earlier patience is not held against later ones
    assert isinstance(run_all(scheduler, 9.0)[-1], Finished)


def test_patience_begins_anew_when_a_worker_came_and_went():
    scheduler = scheduler_of(2, {"a": [0]}, max_wait=5.0)
    scheduler.accept("x", 0.0)
    run_all(scheduler)  # stuck since 1.0
    scheduler.add_worker("b", [1])
    scheduler.pause_worker("b")
    scheduler.decide(3.0)
    scheduler.remove_worker("b", "died")
    scheduler.decide(4.0)
    assert scheduler.decide(6.5) == [] and scheduler.next_check() == 9.0
    assert isinstance(scheduler.decide(9.0)[0], Failed)


@pytest.mark.parametrize("name", ["free", "strict"])
def test_a_busy_worker_is_skipped_after_a_while(name):
    scheduler = scheduler_of(1, {"slow": [0]}, name=name, skip_after=2.0, max_skips=1)
    scheduler.accept("x", 0.0)
    scheduler.accept("y", 0.0)
    (visit,) = visits(scheduler.decide(0.0))
    assert scheduler.decide(1.9) == [] and scheduler.next_check() == 2.0
    (finished,) = scheduler.decide(2.0)
    assert finished.request == "y" and finished.skipped == {0: "no worker was free for 2 s"}
    scheduler.arrived(visit, 9.0)
    assert scheduler.decide(9.0)[0].order == [0]  # a layer that runs is waited for


def test_free_requests_run_all_else_before_they_skip():
    scheduler = scheduler_of(3, {"slow": [0], "b": [1], "c": [2]}, skip_after=0.5, max_skips=1)
    for name in "xyz":
        scheduler.accept(name, 0.0)
    started = visits(scheduler.decide(0.0))
    slow = next(visit for visit in started if visit.worker == "slow")
    now = 0.0
    done = []
    running = [visit for visit in started if visit is not slow]
    while running:
        now += 0.3
        for visit in running:
            scheduler.arrived(visit, now)
        decided = scheduler.decide(now)
        running = visits(decided)
        done += [each for each in decided if isinstance(each, Finished)]
    done += [each for each in scheduler.decide(now + 0.6) if isinstance(each, Finished)]
    assert {each.request for each in done} == {"x", "y", "z"} - {slow.request}
    assert all(sorted(each.order) == [1, 2] and list(each.skipped) == [0] for each in done)


@pytest.mark.parametrize("max_skips, ends", [(2, Finished), (1, Failed)])
def test_the_deadline_gives_the_answer_of_the_layers_that_ran(max_skips, ends):
    scheduler = scheduler_of(3, {"a": [0], "b": [1], "c": [2]}, deadline=1.5, max_skips=max_skips)
    scheduler.accept("x", 0.0)
    (first,) = visits(scheduler.decide(0.0))
    scheduler.arrived(first, 1.0)
    (second,) = visits(scheduler.decide(1.0))
    (end,) = scheduler.decide(1.5)
    assert type(end) is ends
    if ends is Finished:
        assert end.order == [first.layer] and set(end.skipped.values()) == {"the deadline came"}
    else:
        assert end.deadline and sorted(end.missing) == sorted({0, 1, 2} - {first.layer})
    assert not scheduler.arrived(second, 2.0)  # late
    scheduler.accept("y", 2.0)  # the late worker is free again
    assert visits(scheduler.decide(2.0))


def test_deadline_and_skips_of_a_request_come_before_those_of_the_policy():
    scheduler = scheduler_of(2, {"a": [0]}, deadline=100.0)
    scheduler.accept("x", 0.0, deadline=1.0, max_skips=1)
    scheduler.accept("y", 0.0)
    (ended,) = [each for each in run_all(scheduler) if isinstance(each, Finished)]
    assert ended.request == "x" and list(ended.skipped) == [1]


def test_a_call_that_takes_too_long_is_tried_elsewhere_and_its_late_result_dropped():
    scheduler = scheduler_of(1, {"a": [0]}, call_timeout=2.0)
    scheduler.accept("x", 0.0)
    (visit,) = visits(scheduler.decide(0.0))
    assert scheduler.decide(2.0) == [TimedOut(visit)]
    assert scheduler.visit_of("a") is visit  # it is busy with it
    scheduler.add_worker("b", [0])
    (again,) = visits(scheduler.decide(3.0))
    assert again.worker == "b" and again.position == 0
    assert not scheduler.arrived(visit, 3.5) and scheduler.visit_of("a") is None
    assert scheduler.arrived(again, 4.0)
    (finished,) = scheduler.decide(4.0)
    assert [each for each, _ in finished.visits] == [again]


def test_a_hedge_asks_a_replica_and_takes_the_first_result():
    scheduler = scheduler_of(1, {"a": [0], "b": [0]}, hedge=1.0)
    scheduler.accept("x", 0.0)
    (first,) = visits(scheduler.decide(0.0))
    (second,) = visits(scheduler.decide(1.0))
    assert second.layer == first.layer and second.worker != first.worker
    assert scheduler.arrived(second, 2.0) and not scheduler.arrived(first, 2.5)
    (finished,) = scheduler.decide(2.5)
    assert [visit for visit, _ in finished.visits] == [second]


def test_a_hedge_waits_for_a_replica_to_be_free():
    scheduler = scheduler_of(1, {"a": [0], "b": [0]}, hedge=1.0)
    scheduler.accept("x", 0.0)
    (first,) = visits(scheduler.decide(0.0))
    other = "b" if first.worker == "a" else "a"
    scheduler.pause_worker(other)
    assert scheduler.decide(1.0) == []
    scheduler.resume_worker(other)
    assert [visit.worker for visit in visits(scheduler.decide(2.0))] == [other]


def test_of_two_hedged_visits_one_may_fail():
    scheduler = scheduler_of(1, {"a": [0], "b": [0]}, hedge=1.0, max_attempts=1)
    scheduler.accept("x", 0.0)
    (first,) = visits(scheduler.decide(0.0))
    (second,) = visits(scheduler.decide(1.0))
    assert scheduler.failed(first, 1.5, "not finite") and scheduler.decide(1.5) == []
    assert scheduler.arrived(second, 2.0)
    assert scheduler.decide(2.0)[0].order == [0]


def test_a_layer_is_tried_only_so_often():
    scheduler = scheduler_of(2, {"a": [0, 1]}, max_attempts=2)
    scheduler.accept("poison", 0.0)
    tried = []
    while True:
        decided = scheduler.decide(1.0)
        if not visits(decided):
            break
        (visit,) = visits(decided)
        tried.append(visit.layer)
        scheduler.failed(visit, 1.0, "it is not finite")
    (failed,) = decided
    assert Counter(tried).most_common(1)[0][1] == 2
    assert "tried 2 times, at last it is not finite" in failed.missing.values()


def test_a_layer_that_was_tried_too_often_is_skipped_where_that_is_allowed():
    scheduler = scheduler_of(2, {"a": [0], "b": [1]}, max_attempts=1, max_skips=1)
    scheduler.accept("x", 0.0)
    (visit,) = visits(scheduler.decide(0.0))
    scheduler.failed(visit, 1.0, "bad")
    finished = run_all(scheduler, 1.0)[-1]
    assert list(finished.skipped) == [visit.layer] and "bad" in finished.skipped[visit.layer]


def test_a_cancelled_request_is_forgotten():
    scheduler = scheduler_of(1, {"a": [0]})
    scheduler.accept("x", 0.0)
    (visit,) = visits(scheduler.decide(0.0))
    scheduler.cancel("x")
    scheduler.cancel("unknown")
    assert scheduler.num_in_flight == 0 and not scheduler.arrived(visit, 1.0)
    scheduler.accept("y", 1.0)
    assert visits(scheduler.decide(1.0))


def test_a_paused_worker_gets_nothing_and_its_layers_are_waited_for():
    scheduler = scheduler_of(1, {"a": [0]}, max_skips=1)
    scheduler.pause_worker("a")
    scheduler.accept("x", 0.0)
    assert scheduler.decide(0.0) == []
    scheduler.resume_worker("a")
    assert run_all(scheduler)[-1].order == [0]


def test_workers_may_hold_layers_that_no_request_runs():
    scheduler = Scheduler([0, 2])
    scheduler.add_worker("a", [0, 1])
    scheduler.add_worker("b", [1])
    scheduler.add_worker("c", [2])
    scheduler.accept("x", 0.0)
    assert sorted(run_all(scheduler)[-1].order) == [0, 2]
    scheduler.remove_worker("b", "died")


def test_layers_of_a_worker_can_change():
    scheduler = scheduler_of(2, {"a": [0], "b": [1]})
    scheduler.add_worker("a", [1])
    scheduler.remove_worker("b", "died")
    scheduler.accept("x", 0.0)
    assert [(visit.worker, visit.layer) for visit in visits(run_all(scheduler))] == [("a", 1)]
    scheduler.add_worker("a", [0, 1])
    assert run_all(scheduler)[-1].order == [1, 0]


def test_a_name_that_is_in_flight_is_refused():
    scheduler = scheduler_of(1, {})
    scheduler.accept("x", 0.0)
    with pytest.raises(ValueError, match="'x' is in flight already"):
        scheduler.accept("x", 1.0)


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(name="any"), "`policy` is 'any'; it must be one of free, strict"),
        (dict(max_skips=-1), "`max_skips` is -1; it must be an integer of at least 0"),
        (dict(deadline=0), "`deadline` is 0; it must be a number of seconds above 0"),
        (dict(hedge=float("nan")), "`hedge` is nan"),
        (dict(call_timeout=None), "`call_timeout` is None"),
        (dict(skip_after=True), "`skip_after` is True"),
        (dict(max_wait=float("inf")), "`max_wait` is inf"),
    ],
)
def test_bad_policies_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Policy(**values)


class Checked:
    """A scheduler under random events, with the rules that must hold after each of them."""

    def __init__(self, num_layers, policy, workers):
        self.scheduler = Scheduler(range(num_layers), policy)
        self.num_layers, self.policy = num_layers, policy
        self.now, self.running, self.ended, self.accepted = 0.0, {}, {}, 0
        self.workers = dict(workers)
        self.paused, self.done = set(), Counter()
        for name, layers in workers.items():
            self.scheduler.add_worker(name, layers)

    def decide(self):
        for decision in self.scheduler.decide(self.now):
            if isinstance(decision, Start):
                visit = decision.visit
                busy = [each for each in self.running.values() if each.worker == visit.worker]
                assert not busy, "a worker has one visit at a time"
                assert visit.layer in self.workers[visit.worker] and visit.worker not in self.paused
                assert (visit.request, visit.layer) not in self.done, "no layer twice"
                self.running[visit.number] = visit
            elif isinstance(decision, (Finished, Failed)):
                assert decision.request not in self.ended, "each request ends once"
                self.ended[decision.request] = decision
                if isinstance(decision, Finished):
                    self.check_answer(decision)
        self.check_work_is_done()

    def check_answer(self, finished):
        assert len(set(finished.order)) == len(finished.order)
        assert sorted([*finished.order, *finished.skipped]) == list(range(self.num_layers))
        assert len(finished.skipped) <= self.policy.max_skips
        assert [visit.position for visit, _ in finished.visits] == list(range(len(finished.order)))
        assert {(finished.request, layer) for layer in finished.order} <= set(self.done)
        if self.policy.name == "strict":
            assert finished.order == sorted(finished.order)

    def check_work_is_done(self):
        """No worker is free while a waiting request could take one of its layers."""
        idle = {*self.workers} - {visit.worker for visit in self.running.values()} - self.paused
        free = {layer for worker in idle for layer in self.workers[worker]}
        for request in self.scheduler._requests.values():
            if request.waits:
                assert not free & set(self.scheduler._next_layers(request))

    def step(self, kind, number):
        self.now += 0.25
        if kind == "accept":
            self.scheduler.accept(self.accepted, self.now)
            self.accepted += 1
        elif kind in ("arrived", "failed") and self.running:
            visit = self.running.pop(sorted(self.running)[number % len(self.running)])
            if kind == "failed":
                self.scheduler.failed(visit, self.now, "bad")
            elif self.scheduler.arrived(visit, self.now):
                self.done[visit.request, visit.layer] += 1
        elif kind == "gone" and self.workers:
            name = sorted(self.workers)[number % len(self.workers)]
            self.scheduler.remove_worker(name, f"{name} died")
            self.running = {key: visit for key, visit in self.running.items() if visit.worker != name}
            del self.workers[name]
            self.paused.discard(name)
        elif kind == "added":
            name = f"new-{self.now}"
            self.workers[name] = [number % self.num_layers, (number + 1) % self.num_layers]
            self.scheduler.add_worker(name, self.workers[name])
        elif kind == "paused" and self.workers:
            name = sorted(self.workers)[number % len(self.workers)]
            (self.scheduler.resume_worker if name in self.paused else self.scheduler.pause_worker)(name)
            self.paused ^= {name}
        elif kind == "cancel" and self.accepted:
            self.scheduler.cancel(number % self.accepted)
            self.ended.setdefault(number % self.accepted, None)
        elif kind == "later":
            self.now += number / 4
        self.decide()

    def end(self):
        """With all workers back and no faults, every request ends."""
        for name in list(self.paused):
            self.scheduler.resume_worker(name)
        self.paused.clear()
        for layer in range(self.num_layers):
            self.workers[f"last-{layer}"] = [layer]
            self.scheduler.add_worker(f"last-{layer}", [layer])
        self.decide()
        for _ in range(10_000):
            if not self.running:
                break
            self.step("arrived", 0)
        assert set(self.ended) == set(range(self.accepted)) and self.scheduler.num_in_flight == 0


KINDS = ("accept", "accept", "arrived", "arrived", "arrived", "failed", "gone", "added", "paused", "cancel", "later")
SECONDS = st.one_of(st.none(), st.sampled_from([0.5, 1.0, 3.0]))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    policy=st.builds(
        Policy,
        name=st.sampled_from(["free", "strict"]),
        max_skips=st.integers(0, 3),
        skip_after=SECONDS,
        deadline=SECONDS,
        hedge=SECONDS,
        call_timeout=st.sampled_from([1.0, 100.0]),
        max_attempts=st.integers(1, 3),
        max_wait=st.sampled_from([2.0, 100.0]),
    ),
    workers=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True), max_size=5),
    events=st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 20)), max_size=60),
)
def test_the_rules_hold_whatever_happens(policy, workers, events):
    checked = Checked(4, policy, {f"worker-{number}": layers for number, layers in enumerate(workers)})
    for kind, number in events:
        checked.step(kind, number)
    checked.end()


def test_a_request_that_ran_layers_before_goes_on_behind_them():
    scheduler = scheduler_of(3, {"a": [0, 1, 2]}, name="free")
    scheduler.accept("x", 0.0, ran=[2, 0])
    scheduler.accept("done", 0.0, ran=[1, 0, 2])
    *started, last = run_all(scheduler)
    assert [(visit.request, visit.layer, visit.position) for visit in visits(started)] == [("x", 1, 2)]
    assert last.order == [2, 0, 1] and [visit.layer for visit, _ in last.visits] == [1]
    assert [decision.order for decision in started if isinstance(decision, Finished)] == [[1, 0, 2]]


def test_strict_requests_that_ran_before_do_not_go_back_to_what_they_skipped():
    scheduler = scheduler_of(4, {"a": [0, 1, 2, 3]}, name="strict", max_skips=1)
    scheduler.accept("x", 0.0, ran=[1, 2])
    finished = run_all(scheduler)[-1]
    assert finished.order == [1, 2, 3] and finished.skipped == {0: "it was skipped before"}


def test_each_time_of_waiting_counts_for_itself():
    scheduler = scheduler_of(2, {"a": [0], "b": [1]}, name="strict", skip_after=2.0, max_skips=1)
    for name in "yx":
        scheduler.accept(name, 0.0)
    (visit,) = visits(scheduler.decide(0.0))  # x waits for layer 0 from now on
    scheduler.arrived(visit, 1.5)
    (visit,) = [each for each in visits(scheduler.decide(1.5)) if each.request == "x"]
    scheduler.arrived(visit, 1.9)  # x waits for layer 1, which y runs
    assert scheduler.decide(2.1) == []
    (finished,) = scheduler.decide(3.9)
    assert finished.request == "x" and finished.order == [0] and list(finished.skipped) == [1]
