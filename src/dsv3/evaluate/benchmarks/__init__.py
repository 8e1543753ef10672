"""Benchmarks: questions with a judge, run through the engine, every prompt and answer kept."""
