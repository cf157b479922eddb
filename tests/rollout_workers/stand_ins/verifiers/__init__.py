"""Stands in for verifiers 0.4: the parts of its v1 that our harness uses, with one way to run an agent. Not the package."""
