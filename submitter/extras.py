"""The command that installs a missing optional dependency, for error messages."""


def install_command(extra: str) -> str:
    """Return the exact `pip install` line for the packages of an extra.

    It names the packages themselves, so that it works whether kling-relay was installed from an index or from a
    folder. Where the package's metadata is missing (a function's package), it names the extra.
    """
    from importlib.metadata import PackageNotFoundError, requires

    try:
        requirements = requires("kling-relay") or []
    except PackageNotFoundError:
        requirements = []
    packages = [
        requirement.partition(";")[0].strip()
        for requirement in requirements
        if requirement.replace('"', "'").endswith(f"extra == '{extra}'")
    ]
    return "pip install " + " ".join(f"'{package}'" for package in packages or [f"kling-relay[{extra}]"])
