"""Bills of materials (CycloneDX JSON) from the pinned dependencies. `make sbom` writes them to .venv/sbom."""

import subprocess
import sys
from pathlib import Path

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

ROOT = Path(__file__).parents[2]
VERSION = SchemaVersion.V1_6
SOURCES = {
    "package": "requirements.txt",  # with the sandbox, and what builds the package
    "image": "infra/requirements.txt",
    "lambda": "infra/aws/requirements.txt",
}


def bill_of(source: str) -> str:
    """Return the bill of materials of a file of pins; the same pins give the same bill."""
    command = [sys.executable, "-m", "cyclonedx_py", "requirements", "--pyproject", "pyproject.toml"]
    options = ["--output-reproducible", "--output-format", "JSON", "--spec-version", VERSION.to_version()]
    made = subprocess.run([*command, *options, source], cwd=ROOT, capture_output=True, text=True, check=False)
    if made.returncode:
        raise RuntimeError(made.stderr)
    return made.stdout


def invalid_in(bill: str) -> str | None:
    """Return why a bill does not match CycloneDX's schema, or None."""
    error = JsonStrictValidator(VERSION).validate_str(bill)
    return None if error is None else str(error)


def main() -> None:
    folder = ROOT / ".venv/sbom"
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in SOURCES.items():
        bill = bill_of(source)
        invalid = invalid_in(bill)
        if invalid is not None:
            sys.exit(f"{source}: {invalid}")
        path = folder / f"kling-relay-{name}.cdx.json"
        path.write_text(bill)
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
