"""Reports of layers and summaries of runs, made up: what the tests of alerts, tables and the live view show."""

from __future__ import annotations

from dataclasses import replace

from svd_optim import Listener
from svd_optim.decisions.alerts import Alert, Level
from svd_optim.records import Action, Condition, Decision, Event, LayerMetrics, LayerReport, LayerState, Summary

PARTS = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
METRICS = {
    "principal_alignment": 0.618,
    "principal_excess": 0.246,
    "subspace_drift": 0.042,
    "subspace_angle": 1.234,
    "reconstruction_error": 0.271,
    "tangent_capture": 0.532,
    "capture_excess": 0.314,
}


def names_of(blocks: int, prefix: str = "blocks") -> list[str]:
    """The layers of a GPT."""
    return [f"{prefix}.{block}.{part}" for block in range(blocks) for part in PARTS]


def layer(name: str = "a", state: LayerState = LayerState.DENSE, **metrics: float | None) -> LayerReport:
    """A layer that capture holds back, unless the metrics say otherwise."""
    m = LayerMetrics(step=1, rank=42, measured=4, **(METRICS | metrics))
    conditions = (
        Condition(name="drift_stable", value=m.subspace_drift, threshold=0.1, above=False, margin=0.05),
        Condition(name="capture_safe", value=m.capture_excess, threshold=0.4, above=True, margin=0.05),
    )
    failing = [c for c in conditions if not c.holds]
    action = Action.HOLD if failing else Action.DESCEND
    decision = Decision(action=action, reason="; ".join(map(str, failing)), conditions=conditions)
    now = 2 if state == LayerState.FACTORIZED else 4
    sizes = {f"{kind}_bytes": now * 10**6 for kind in ("weight", "grad", "state")}
    dense = {f"{kind}_bytes_dense": 4 * 10**6 for kind in ("weight", "grad", "state")}
    return LayerReport(
        name=name, shape=(128, 512), state=state, rank=42, protected=False, metrics=m, decision=decision,
        monitoring_bytes=10**6, **sizes, **dense,
    )  # fmt: skip


def report(
    name: str = "a",
    drift: float | None = 0.9,
    excess: float | None = 0.0,
    step: int = 20,
    action: Action = Action.HOLD,
    danger: bool = False,
    state: LayerState = LayerState.DENSE,
) -> LayerReport:
    """A layer with this drift and principal excess, and with this decision."""
    stable = Condition(name="drift_stable", value=drift, threshold=0.3, above=False, margin=0.05)
    attack = Condition(name="danger", value=excess, threshold=0.4, above=True, margin=0.05)
    decision = Decision(action=action, reason="because", conditions=(stable,), danger=danger, attack=attack)
    metrics = LayerMetrics(step=step, rank=42, measured=4, subspace_drift=drift, principal_excess=excess)
    return replace(layer(name, state), metrics=metrics, decision=decision)


def summary(*layers: LayerReport, analyses: int = 60, step: int = 1200, **kwargs: object) -> Summary:
    seconds = {"measure": 2.0, "refresh": 1.0, "decide": 0.5, "base": 40.0}
    values = {
        "mode": "auto",
        "skipped": (),
        "events": (),
        "seconds": seconds,
        "seconds_total": 100.0,
    }
    return Summary(step=step, analyses=analyses, layers=layers, **(values | kwargs))


def analyses(listener: Listener, count: int = 3) -> None:
    """Tell a listener of so many analyses, with an alert and an event at each."""
    for step in range(20, 20 * count + 20, 20):
        listener.on_alerts(
            (Alert(step=step, layer="a", level=Level.CRITICAL, kind="about to act", text="descend: now"),)
        )
        listener.on_event(Event(step=step, layer="a", kind="descend", reason="why not"))
        listener.on_analysis(summary(report(step=step), analyses=step // 20, step=step))
