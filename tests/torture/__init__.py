"""`make torture`: attacks on a running system, for as long as asked, each repeatable by its seed."""
