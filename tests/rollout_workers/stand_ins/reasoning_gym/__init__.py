"""Stands in for reasoning-gym 0.1: its factory, one task, its extraction of answers. Not the package."""

from reasoning_gym.factory import create_dataset as create_dataset
