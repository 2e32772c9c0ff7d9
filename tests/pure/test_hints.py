"""Who is told to fetch something again is told how."""

import ast
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import edgekv
from edgekv import models
from edgekv.cli.main import app
from edgekv.errors import FETCH_AGAIN, CheckpointCorrupt

ADVICE = re.compile(r"\b(re-?)?(fetch|download)\b.*\bagain\b|\bre-?(fetch|download)\b", re.DOTALL)
SOURCES = sorted(
    path for package in (edgekv, models) for path in Path(package.__file__).parent.rglob("*.py")
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_hint_says_fetch_it_again_without_a_command(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    texts = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in documentation
    ]
    assert [text for text in texts if ADVICE.search(text) and "edgekv pull" not in text] == []


def test_the_command_exists_and_is_in_the_usual_hint():
    assert FETCH_AGAIN.startswith("edgekv pull --force MODEL ")
    assert FETCH_AGAIN in CheckpointCorrupt("x").hint
    assert "--force" in CliRunner().invoke(app, ["pull", "--help"]).output
