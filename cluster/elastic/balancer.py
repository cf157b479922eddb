"""Resizes the pools of a run with `balance = "auto"` as the balance policy decides after each step."""

from collections.abc import Callable, Sequence
from time import perf_counter

from cluster.contracts.batches import BatchHandle, PoolState
from cluster.contracts.files import Record, RecordsFile
from cluster.elastic.balance_policy import Balance, BalanceSample, Horizon
from cluster.elastic.scale import Pools, placed_pools, pools_of
from cluster.elastic.splits import ROLLOUT, PoolRule, Space
from cluster.elastic.step_cost import WorkMeter
from cluster.placement.capacity import SplitCapacity
from cluster.run.hooks import RunContext, StepHook

MOVES = "balance/moves"  # metric: how often workers moved so far


class Balancer(StepHook):
    """Moves workers between the pools of a run, after any of its steps."""

    def __init__(
        self,
        balance: Balance,
        meter: WorkMeter,
        pools: Pools,
        capacity: SplitCapacity,
        moves: RecordsFile,
        say: Callable[[str], None],
        last_step: int,
    ) -> None:
        """Take the run's pools by the names that `preceptor scale` gives them; `balance` asks `capacity` what fits."""
        self._balance, self._meter, self._pools, self._capacity = balance, meter, pools, capacity
        self._moves, self._say, self._last_step = moves, say, last_step
        self._states: list[PoolState] = []  # after the step before
        self._num_steady = 0  # steps in a row with the same workers
        self.num_moves = 0
        self._observed_at = perf_counter()

    def after_step(self, step: int, metrics: Record, batches: Sequence[BatchHandle]) -> Record:
        """Resize pools if the policy decides so after this step; nothing moves after the last."""
        if step < self._last_step:
            self._balance_after(step, metrics, batches)
        return {MOVES: float(self.num_moves)}

    def _balance_after(self, step: int, metrics: Record, batches: Sequence[BatchHandle]) -> None:
        pools = self._pools()
        states = [pool.state() for pool in pools.values()]
        is_steady = bool(self._states) and all(map(_serves_as_before, self._states, states))
        self._num_steady = self._num_steady + 1 if is_steady else 0
        now = perf_counter()
        sample = BalanceSample(
            sizes={name: pool.size for name, pool in pools.items()},
            is_settled=self._num_steady > self._meter.steps_ahead,  # earlier ones were begun with other workers
            seconds=now - self._observed_at,
            steps_left=self._last_step - step,
            work=self._meter.measure(metrics, batches, pools[ROLLOUT].size),
        )
        self._states, self._observed_at = states, now
        if sample.is_settled:
            self._capacity.read({name: pool.staying for name, pool in pools.items()})
        decision = self._balance.decide(sample)
        if decision is None:
            return
        self._say(f"balance: {decision.sentence}")
        has_moved = decision.sizes is not None
        self._moves.write({"step": step, "sentence": decision.sentence, "moved": has_moved})
        for name, size in (decision.sizes or {}).items():
            pools[name].resize(size)
        self.num_moves += has_moved


def _serves_as_before(before: PoolState, after: PoolState) -> bool:
    """Return whether the same workers served at two moments, and all that are wanted."""
    same = (before.num_wanted, before.num_restarts, set(before.serving))
    return same == (after.num_wanted, after.num_restarts, set(after.serving)) and len(after.serving) == after.num_wanted


def make_balancer(run: RunContext) -> Balancer | None:
    """Return what balances a run's pools; None when the run file has `balance = "off"`."""
    config, pipeline, moves = run.config, run.pipeline, RecordsFile(run.directory.moves)
    moves.drop_from(run.first_step + 1)
    if config.balance.mode == "off":
        return None
    limits = {ROLLOUT: (config.rollout.min_workers, config.rollout.max_workers)}
    for name in pipeline.teachers.pools:
        limits[f"teachers.{name}"] = config.teachers[name].min_workers, config.teachers[name].max_workers
    capacity = SplitCapacity({name: int(share.gpus_per_worker) for name, share in placed_pools(pipeline).items()})
    # Without GPUs, any worker can take the place of any other.
    rules = {name: PoolRule(max(1, capacity.gpus[name]), *limits[name]) for name in limits}
    ahead = config.rollout.max_staleness
    horizon = Horizon(ahead, pipeline.start_seconds, config.ray.start_timeout_seconds)
    return Balancer(
        Balance(Space(rules, units=0, fits=capacity.fits), config.balance, horizon),
        WorkMeter(config.rollout.engine.concurrent_sequences, ahead),
        lambda: pools_of(pipeline),
        capacity,
        moves,
        run.view.say,
        last_step=config.run.steps,
    )
