"""The command line, `kling-relay`: one module for each command or group, registered in `main`."""
