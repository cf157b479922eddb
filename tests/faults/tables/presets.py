"""Faults of the published objectives: their presets, weights, bounds and routes."""

from tests.faults.fault import Fault

FAULTS: tuple[Fault, ...] = ()
