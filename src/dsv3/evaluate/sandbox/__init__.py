"""Programs run where they can do little harm: :class:`Sandbox`, and what it does not protect from."""

from dsv3.evaluate.sandbox.run import MIB, Level, Outcome, Sandbox, Unavailable, strongest
from dsv3.evaluate.sandbox.service import Service

__all__ = ["MIB", "Level", "Outcome", "Sandbox", "Service", "Unavailable", "strongest"]
