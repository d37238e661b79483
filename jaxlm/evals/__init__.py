"""Measuring trained models: perplexity, multiple choice, lm-evaluation-harness, and paired comparison of two runs."""
