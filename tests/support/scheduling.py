"""A scheduler between a simulation and another one, that checks each decision against the rules."""

from collections import Counter

from hf_layershuffle.swarm.scheduling import Failed, Finished, Start, TimedOut


class CheckedScheduler:
    """Hands everything on, and keeps books of its own.

    Args:
        scheduler: Decides.
        layers: Those that a request must run.
        max_skips: Most that may be missing in an answer.
        policy: Its name, attempts and hedging are checked.
        is_work_conserving: Whether a free worker may not idle while a request waits for its layer.
    """

    def __init__(self, scheduler, layers, max_skips, policy, is_work_conserving=True):
        self.scheduler, self.layers, self.max_skips, self.policy = scheduler, list(layers), max_skips, policy
        self.is_work_conserving = is_work_conserving
        self.held, self.busy = {}, {}  # layers and the running visit of each worker
        self.ran, self.running = {}, {}  # layers and running visits of each request
        self.lost = Counter()  # visits in vain, by request and layer
        self.ended = {}

    def next_check(self):
        return self.scheduler.next_check()

    def add_worker(self, worker, layers):
        self.held[worker] = set(layers)
        self.scheduler.add_worker(worker, layers)

    def remove_worker(self, worker, reason):
        del self.held[worker]
        self.busy.pop(worker, None)
        lost = self.scheduler.remove_worker(worker, reason)
        for visit in lost:
            self._lose(visit)
        return lost

    def _lose(self, visit):
        self.running[visit.request].remove(visit)
        self.lost[visit.request, visit.layer] += 1

    def accept(self, request, now):
        assert request not in self.ran, "accepted twice"
        self.ran[request], self.running[request] = [], []
        self.scheduler.accept(request, now)

    def arrived(self, visit, now):
        if self.busy.get(visit.worker) is visit:
            del self.busy[visit.worker]
        counts = self.scheduler.arrived(visit, now)
        assert counts == (visit.request not in self.ended and visit in self.running[visit.request])
        if counts:
            self.running[visit.request] = []
            self.ran[visit.request].append(visit.layer)
        return counts

    def decide(self, now):
        decisions = self.scheduler.decide(now)
        for decision in decisions:
            if isinstance(decision, Start):
                self._check_start(decision.visit)
            elif isinstance(decision, TimedOut):
                if decision.visit in self.running[decision.visit.request]:
                    self._lose(decision.visit)
            else:
                self._check_end(decision)
        if self.is_work_conserving:
            self._check_nobody_idles()
        return decisions

    def _check_start(self, visit):
        assert visit.request not in self.ended, "runs on after its end"
        ran, running = self.ran[visit.request], self.running[visit.request]
        assert visit.layer not in ran, "runs a layer twice"
        assert visit.worker not in self.busy, "asks a worker for two things"
        assert visit.layer in self.held[visit.worker], "asks a worker that has not got the layer"
        assert visit.position == len(ran)
        if running:
            assert self.policy.hedge is not None and {each.layer for each in running} == {visit.layer}
            assert len(running) == 1 and running[0].worker != visit.worker
        if self.policy.name == "strict" and self.is_work_conserving:
            assert all(layer < visit.layer for layer in ran)
            assert self.max_skips or self.layers.index(visit.layer) == len(ran)
        self.busy[visit.worker] = visit
        running.append(visit)

    def _check_end(self, decision):
        request, ran = decision.request, self.ran[decision.request]
        assert request not in self.ended, "ends twice"
        self.ended[request] = decision
        self.running[request] = []
        if isinstance(decision, Finished):
            assert decision.order == ran == [visit.layer for visit, _ in decision.visits]
            assert set(decision.skipped) == set(self.layers) - set(ran), "the list of skips is not true"
            assert len(decision.skipped) <= self.max_skips, "too many skips"
            assert all(decision.skipped.values())
        else:
            assert isinstance(decision, Failed)
            assert set(decision.missing) == set(self.layers) - set(ran)
            assert all(decision.missing.values())

    def _check_nobody_idles(self):
        free = {worker: layers for worker, layers in self.held.items() if worker not in self.busy}
        if self.policy.name == "strict" and self.max_skips:
            return  # what a request went without is only known when it ends
        for request, ran in self.ran.items():
            if request in self.ended or self.running[request]:
                continue
            missing = [layer for layer in self.layers if layer not in ran]
            missing = missing[:1] if self.policy.name == "strict" else missing
            wanted = {layer for layer in missing if self.lost[request, layer] < self.policy.max_attempts}
            for worker, layers in free.items():
                assert not wanted & layers, f"{worker} idles while {request} waits for {wanted & layers}"
