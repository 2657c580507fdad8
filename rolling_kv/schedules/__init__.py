"""Prompt schedules: from the text of any of several programs to the prompt and the switch of each chunk."""
