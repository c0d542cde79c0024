"""The receiver: accepts vendor callbacks, polls overdue tasks, delivers task events to hooks."""
