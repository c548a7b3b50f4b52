"""What tests of the evaluation share."""

import pytest

import ottfx


@pytest.fixture
def dense_compile(monkeypatch):
    """`ottfx.compile` that leaves the model alone; gives the options of each call."""
    seen = []

    def compile(model, **options):
        seen.append(options)
        return model

    monkeypatch.setattr(ottfx, "compile", compile)
    return seen
