"""What is installed holds more than modules: configs, templates, the page."""

import subprocess
import sys
from pathlib import Path

import emor3_jax

ROOT = Path(emor3_jax.__file__).parents[1]


def test_what_is_built_holds_configs_templates_and_the_page(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    package = tmp_path / "emor3_jax"
    configs = {file.name for file in (ROOT / "configs").glob("*.py")}
    assert {file.name for file in (package / "share" / "configs").iterdir()} == configs

    def others(folder: Path) -> set[str]:
        kinds = (".txt", ".j2", ".html", ".css", ".js")
        files = (file for file in folder.rglob("*") if file.suffix in kinds)
        return {str(file.relative_to(folder)) for file in files}

    assert others(package) == others(ROOT / "emor3_jax") and len(others(package)) > 20
    assert "emor3 = emor3_jax.__main__:main" in (ROOT / "setup.py").read_text()
