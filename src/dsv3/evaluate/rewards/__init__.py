"""Rewards of reinforcement learning, with TRL's signature, so that functions written for it drop in.

A reward function is called with ``prompts`` and ``completions`` (strings, or lists of messages) and every
other column of the rows by name, and returns one float a completion, or None where it does not apply.
"""

from dsv3.evaluate.rewards.combine import Rewards, Scores
from dsv3.evaluate.rewards.functions import (
    RewardFunction,
    boxed_reward,
    format_reward,
    soft_overlong,
    task_reward,
    text_of,
)
from dsv3.evaluate.rewards.verl import from_verl

__all__ = [
    "RewardFunction", "Rewards", "Scores", "boxed_reward", "format_reward", "from_verl", "soft_overlong",
    "task_reward", "text_of",
]  # fmt: skip
