"""The sandbox: stand-ins for the vendors, offline, with faults on demand."""
