"""Code that people copy from the documentation runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def library_example(text: str) -> str:
    """The first python block under a heading that contains "library"."""
    under_heading, fence, block = False, None, []
    for line in text.splitlines():
        if fence is None:
            if re.match(r"#+ .*library", line, re.IGNORECASE):
                under_heading = True
            if line.startswith("```"):
                fence = line.removeprefix("```").strip()
        elif not line.startswith("```"):
            if under_heading and fence == "python":
                block.append(line)
        else:
            fence = None
            if block:
                return "\n".join(block)
    return ""


@pytest.mark.parametrize("document", ["README.md", "docs/library.md"])
def test_the_library_example_runs(document, tmp_path, monkeypatch):
    code = library_example((ROOT / document).read_text())
    assert "from kd_det import" in code
    monkeypatch.chdir(tmp_path)
    exec(compile(code, document, "exec"), {"__name__": "example"})
    assert not list(tmp_path.iterdir())


def test_the_block_is_the_one_under_the_heading():
    text = "```python\nearly\n```\n# As a library\n```bash\nls\n```\n```python\na\n# b\n```\n"
    assert library_example(text) == "a\n# b"
    assert library_example("# Other\n```python\na\n```\n") == ""
