"""Chat templates of somebody else: rendered in jinja's sandbox, whatever they try."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import qwenft as qf
from qwenft.data.chat import ChatEncoder
from qwenft.models.load import load_tokenizer

from .hostile import refused

TEMPLATES = {
    "{{ ''.__class__.__mro__ }}": "access to attribute '__class__' of 'str' object is unsafe",
    "{{ cycler.__init__.__globals__.os.mkdir('ran') }}": "access to attribute '__init__' .* is unsafe",
    "{{ self.__init__.__globals__ }}": "is unsafe",
    "{{ messages.append(1) }}": "access to attribute 'append' of 'list' object is unsafe",
    "{{ messages[0].update(a=1) }}": "is unsafe",
    "{% for i in range(10**9) %}x{% endfor %}": "Range too big",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
    "{{ 1 / 0 }}": "division by zero",
    "{% include '/etc/passwd' %}": "no loader",
    "{% import 'os' as os %}": "no loader",
    "{{ messages[99].content.text }}": "no element 99",
    "{% for": "unexpected",
}


@pytest.fixture
def copy(dense_checkpoint, tmp_path):
    """A copy of a tiny checkpoint."""
    return Path(shutil.copytree(dense_checkpoint, tmp_path / "copy"))


@pytest.mark.parametrize("text", TEMPLATES)
def test_a_template_that_reaches_out_of_its_sandbox_is_refused(copy, tmp_path, monkeypatch, text):
    """The error names the checkpoint, the reason and what to do; nothing was run."""
    monkeypatch.chdir(tmp_path)
    (copy / "chat_template.jinja").write_text(text)
    encoder = ChatEncoder(load_tokenizer(copy))
    refused(qf.DataError, encoder.template, copy, f"chat template refuses it: .*{TEMPLATES[text]}")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "text",
    [
        "{{ '%s'|format(messages)|attr('__class__') }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ lipsum.__globals__ }}",
    ],
)
def test_what_the_sandbox_leaves_undefined_is_not_shown(copy, text):
    """Attributes that filters and formats ask for are nothing."""
    (copy / "chat_template.jinja").write_text(f"{text}{{{{ messages[0].content }}}}")
    asked = ChatEncoder(load_tokenizer(copy)).template().ask([{"role": "user", "content": "Hi"}])
    assert "class" not in asked
    assert "{" not in asked
