"""Reinforcement learning by GRPO (report 5.2.2): rewards of groups of answers instead of a critic."""
