"""Measures what users ask of a model: tasks of lm-eval, and its behaviour in chats."""
