"""Programs run where they can do little harm: :class:`Sandbox`, and what it does not protect from."""

from dsv3.evaluate.sandbox.run import Outcome, Sandbox, Unavailable, strongest

__all__ = ["Outcome", "Sandbox", "Unavailable", "strongest"]
