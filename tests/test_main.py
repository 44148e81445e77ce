"""The console command lists the programs, and runs one by its name."""

import ast
from pathlib import Path

import pytest

import emor3_jax
from emor3_jax import __main__ as console

PACKAGE = Path(emor3_jax.__file__).parent


def test_every_program_at_the_top_of_the_package_is_one_of_the_command():
    found = {
        file.stem
        for file in PACKAGE.glob("*.py")
        if 'if __name__ == "__main__":' in file.read_text() and file.stem != "__main__"
    }
    assert found == set(console.PROGRAMS)


def test_programs_are_listed_with_what_they_do(capsys):
    console.main([])
    shown = capsys.readouterr().out
    for program in console.PROGRAMS:
        doc = ast.get_docstring(ast.parse((PACKAGE / f"{program}.py").read_text()))
        assert f"  {program}" in shown and doc.splitlines()[0] in shown


def test_an_unknown_program_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        console.main(["trian"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: 'trian' is no program (nearest: train); ")


def test_a_program_gets_its_own_arguments(monkeypatch):
    given = {}

    def run(name, run_name, alter_sys):
        given.update(name=name, arguments=console.sys.argv[1:], run_name=run_name)

    monkeypatch.setattr(console.runpy, "run_module", run)
    monkeypatch.setattr(console.sys, "argv", ["emor3"])
    monkeypatch.setattr(console.sys, "path", list(console.sys.path))
    console.main(["infer", "policy", "--seed=3"])
    assert given == {
        "name": "emor3_jax.infer",
        "arguments": ["policy", "--seed=3"],
        "run_name": "__main__",
    }
