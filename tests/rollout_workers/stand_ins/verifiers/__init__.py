"""Stands in for verifiers 0.4: what our harness uses of its v1. Not the package."""
